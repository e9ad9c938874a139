"""Build the compiled ops of csrc/ where that is possible; metadata stands in pyproject.toml.

    pip install --no-build-isolation .        with the compiled ops (isolation would hide the installed torch)
    pip install .                             without, unless the build environment has torch
    python setup.py build_ext --inplace       in a checkout

The C++ part needs a C++ compiler, the CUDA part also nvcc; neither needs a GPU. Whatever cannot be built is left out
and said so, and the package then runs the same ops in PyTorch. MRCNN_EDU_EXTENSION=require makes a failure an error,
=cpu leaves the CUDA part out, =none leaves out both, =sanitize is csrc/sanitize.py's. TORCH_CUDA_ARCH_LIST chooses GPUs
as usual.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

CHOICES = ("auto", "require", "cpu", "none", "sanitize")
WANTED = os.environ.get("MRCNN_EDU_EXTENSION", "auto")
HERE = Path(__file__).parent
# T4, A100 and H100; the PTX of the last one serves whatever comes later. Few, because each is compiled separately.
ARCHITECTURES = "7.5;8.0;9.0+PTX"


def left_out(part, why):
    print(f"mrcnn_edu: {part} left out: {why}", file=sys.stderr)


def sources(pattern):
    return sorted(str(path.relative_to(HERE)) for path in HERE.glob(pattern))


def cpp_flags():
    if sys.platform == "win32":
        return ["/O2", "/fp:precise"]
    if WANTED == "sanitize":
        flags = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-DMRCNN_ONE_VERSION"]
        return [*flags, "-ffp-contract=off", "-fno-omit-frame-pointer", "-fopenmp"]
    # No fused multiply-add: every processor, and the CUDA part, then rounds alike.
    flags = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-Wno-unknown-pragmas"]
    return flags + (["-fopenmp"] if sys.platform == "linux" else [])


def link_flags():
    flags = ["-fopenmp"] if sys.platform == "linux" else []
    return [*flags, "-fsanitize=address,undefined"] if WANTED == "sanitize" else flags


def extension(cuda):
    from torch.utils import cpp_extension

    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return kind(
        "mrcnn_edu._C",
        sources("csrc/*.cpp")
        + sources("csrc/cpu/*.cpp")
        + (sources("csrc/cuda/*.cu") + sources("csrc/cuda/*.cpp") if cuda else []),
        depends=sources("csrc/**/*.h"),
        extra_compile_args={"cxx": cpp_flags(), "nvcc": ["-O3", "--fmad=false"]},
        extra_link_args=link_flags(),
    )


def find_toolkit():
    """Tell torch where CUDA is: the nvcc on the path may be a link or a wrapper outside its toolkit."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc is not None:
        homes[2:2] = [str(Path(nvcc).parent.parent), str(Path(nvcc).resolve().parent.parent)]
    for home in filter(None, homes):
        if (Path(home) / "include" / "cuda_runtime.h").exists() and shutil.which("nvcc", path=f"{home}/bin"):
            os.environ["CUDA_HOME"] = home
            return True
    return False


def cuda_is_missing():
    """Why the CUDA part cannot be built, or None."""
    import torch

    if WANTED in ("cpu", "sanitize"):
        return f"MRCNN_EDU_EXTENSION={WANTED}"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not find_toolkit():
        return "there is no CUDA toolkit with nvcc"
    return None


def builder():
    """torch's build_ext, which leaves out what does not compile."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, ext):
            try:
                super().build_extension(ext)
            except Exception as error:
                if WANTED in ("require", "sanitize"):
                    raise
                if any(source.endswith(".cu") for source in ext.sources):
                    left_out("the CUDA ops", f"they did not compile ({error})")
                    ext.__dict__.update(extension(cuda=False).__dict__)  # keeps what setuptools has added since
                    self.build_extension(ext)
                else:
                    left_out("the compiled ops", f"they did not compile ({error}); the ops run in PyTorch")

        def run(self):
            try:
                super().run()
            except Exception as error:  # no compiler at all, or one that torch refuses
                if WANTED in ("require", "sanitize"):
                    raise
                left_out("the compiled ops", f"{error}; the ops run in PyTorch")

        def copy_extensions_to_source(self):
            built = [ext for ext in self.extensions if os.path.exists(self.get_ext_fullpath(ext.name))]
            self.extensions = built if not self.inplace else self.extensions
            if built or self.inplace:
                super().copy_extensions_to_source()

    return Build


def main():
    if WANTED not in CHOICES:
        sys.exit(f"MRCNN_EDU_EXTENSION must be one of {', '.join(CHOICES)}, got {WANTED!r}")
    if WANTED == "none":
        return setup()
    try:
        import torch  # noqa: F401
    except ImportError as error:
        if WANTED in ("require", "sanitize"):
            raise
        left_out(
            "the compiled ops",
            f"torch cannot be imported while building ({error}). With torch installed, "
            "pip install --no-build-isolation . builds them; until then the ops run in PyTorch",
        )
        return setup()
    reason = cuda_is_missing()
    if reason is not None:
        left_out("the CUDA ops", reason)
    else:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    return setup(ext_modules=[extension(cuda=reason is None)], cmdclass={"build_ext": builder()})


main()
