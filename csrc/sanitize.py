"""Run the tests of the ops on a CPU build that watches its memory: AddressSanitizer and UBSan.

    python csrc/sanitize.py [--calls 2000]

Builds the package into a temporary folder, so nothing in the checkout changes. Needs GCC on Linux, torch and the test
requirements. Exits with 0 only when no test fails and nothing is reported.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def library(name: str) -> str:
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="hostile calls after the tests")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build = ["-q", "build", "--build-base", f"{folder}/build", "--build-lib", f"{folder}/lib"]
        environment = os.environ | {"MRCNN_EDU_EXTENSION": "sanitize"}
        subprocess.run([sys.executable, "setup.py", *build], cwd=ROOT, env=environment, check=True)
        environment |= {
            # The sanitizer has to be there before Python is, and libstdc++ so that it can follow exceptions.
            "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
            # Python never frees some of its memory.
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
            "PYTHONPATH": f"{folder}/lib",
        }
        tests = [
            str(path) for path in sorted((ROOT / "tests").glob("test_ops_*.py")) if path.stem != "test_ops_hostile"
        ]
        options = ["-q", "-p", "no:cacheprovider", "-k", "not int32_counts and not graph_breaks"]
        built = f"import mrcnn_edu._C as c; assert c.__file__.startswith({folder!r}), c.__file__"
        for command in (
            ["-c", f"import torch; {built}"],  # not the one in the checkout
            ["-m", "pytest", *options, *tests],
            [str(ROOT / "tests" / "hostile_ops.py"), "--calls", str(args.calls)],
        ):
            if subprocess.run([sys.executable, *command], cwd=folder, env=environment).returncode != 0:
                return 1
    print("AddressSanitizer and UBSan have nothing to report.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
