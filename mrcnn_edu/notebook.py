"""What a chapter shows of the library and says about itself: included source, measured numbers, time and memory.

Used by every chapter. Inside the build of the book numbers go to the page's text; elsewhere they are printed.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np

BUILDING = "MRCNN_EDU_BOOK"  # an environment variable that the book's Sphinx extension sets for the kernels it starts


def building() -> bool:
    """Does the book's build run this notebook? Then there is a page but no reader at a kernel."""
    return bool(os.environ.get(BUILDING))


class Source:
    """A piece of the library's own source, as a notebook and the book show it: included, never copied."""

    def __init__(self, *things: Any, lines: int | None = None) -> None:
        """things: functions, classes or modules of this package, shown one below the other; the first lines of each."""
        if not things:
            raise ValueError("show_source needs at least one function, class or module")
        self.parts = [(_place(thing), _first(inspect.getsource(thing), lines)) for thing in things]

    def _repr_markdown_(self) -> str:
        return "\n\n".join(f"*{place}*\n\n````python\n{code}\n````" for place, code in self.parts)

    def __repr__(self) -> str:
        return "\n\n".join(f"# {place}\n{code}" for place, code in self.parts)


def show_source(*things: Any, lines: int | None = None) -> Source:
    """The source of functions, classes or modules of this package (or its first lines), to stand last in a cell."""
    return Source(*things, lines=lines)


class NativeSource:
    """A piece of the C++ or CUDA sources, as a notebook and the book show it; without a checkout, where it would be."""

    def __init__(self, file: str, name: str) -> None:
        """file: below ``csrc/``; name: of a function, struct or kernel that begins at the margin."""
        path = Path(__file__).parent.parent / "csrc" / file
        self.place, self.code = f"csrc/{file}", None
        if path.exists():
            first, self.code = _native_piece(path.read_text(encoding="utf-8").split("\n"), name)
            self.place += f", line {first + 1}"

    def _repr_markdown_(self) -> str:
        if self.code is None:
            return f"*{self.place}: the repository has it, an installed library does not.*"
        return f"*{self.place}*\n\n````cpp\n{self.code}\n````"

    def __repr__(self) -> str:
        return f"// {self.place}\n{self.code or ''}"


def show_native(file: str, name: str) -> NativeSource:
    """A function, struct or kernel of the C++ or CUDA sources with the comment above it, to stand last in a cell."""
    return NativeSource(file, name)


def _native_piece(lines: list[str], name: str) -> tuple[int, str]:
    """The first line's index and the text from the comment above a definition to the brace that closes it."""
    for number, line in enumerate(lines):
        if re.search(rf"\b{re.escape(name)}\b", line) and re.match(r"\w", line) and not line.rstrip().endswith(";"):
            first, last = number, number
            while first > 0 and re.match(r"//|template", lines[first - 1]):
                first -= 1
            while not re.match(r"\}|\w.*\}$", lines[last]):
                last += 1
            return first, "\n".join(lines[first : last + 1])
    raise ValueError(f"no definition of {name} begins at the margin")


def _first(code: str, count: int | None) -> str:
    """So many lines of it, with a remark where some were left out; methods stand at the margin."""
    every = textwrap.dedent(code).rstrip().split("\n")
    if count is None or count >= len(every):
        return "\n".join(every)
    return "\n".join([*every[:count], f"    # ... and {len(every) - count} more lines"])


def _place(thing: Any) -> str:
    thing = inspect.unwrap(thing)  # a decorated function is where it was written
    package = Path(__file__).parent
    file = Path(inspect.getsourcefile(thing)).resolve()
    if not file.is_relative_to(package.resolve()):
        raise ValueError(f"show_source shows this package only, {thing!r} is from {file}")
    name = file.relative_to(package.resolve().parent).as_posix()
    return name if inspect.ismodule(thing) else f"{name}, line {inspect.getsourcelines(thing)[1]}"


def glue(name: str, value: Any) -> None:
    """Give a computed value to the chapter's text, which names it as ``{glue:text}`name:.2f```."""
    value = value.item() if isinstance(value, np.generic) else value  # the page formats Python's numbers only
    if building():
        from myst_nb import glue as into_the_page

        into_the_page(name, value, display=False)
    else:
        print(f"{name} = {value}")


def measured() -> None:
    """Give the chapter's text what running it has taken so far: ``seconds`` of processor time, ``memory`` in GB."""
    glue("seconds", max(1, round(time.process_time())))
    memory = _peak_memory()
    if memory is not None:
        glue("memory", round(memory, 1))


def _peak_memory() -> float | None:
    """GB this process held at most; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, kilobytes elsewhere
