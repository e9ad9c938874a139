"""Which picture files are meant by what was typed, and what to call what is made of them.

Chapter 18 (your own data).
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from pathlib import Path

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".jp2", ".avif"}


def find_pictures(patterns: tuple[str, ...]) -> list[Path]:
    """The picture files that are meant, each once, in order; everything named must exist."""
    if not patterns:
        raise ValueError('no pictures: name files, folders or patterns such as "photos/*.jpg"')
    paths: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        elif path.exists():
            found = [path]
        else:
            found = sorted(Path(file) for file in glob.glob(pattern, recursive=True) if Path(file).is_file())
        if not found:
            raise FileNotFoundError(f"no picture at {pattern}")
        paths += found
    return list(dict.fromkeys(paths))


def picture_names(paths: list[Path]) -> tuple[dict[Path, str], dict[Path, str]]:
    """Each picture's name below the folder that holds them all, and the same without its suffix where that suffices."""
    full = {path: path.resolve() for path in paths}
    top = Path(os.path.commonpath([path.parent for path in full.values()]))
    names = {path: where.relative_to(top) for path, where in full.items()}
    counts = Counter(name.with_suffix("") for name in names.values())
    plain = {path: name.with_suffix("") if counts[name.with_suffix("")] == 1 else name for path, name in names.items()}
    return {path: name.as_posix() for path, name in names.items()}, {path: str(name) for path, name in plain.items()}
