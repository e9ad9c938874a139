"""Weights out of pickled files, which are programs, without running them.

Chapter 18 (real data and transfer).

A pickle says which functions to call. Here every name in it is looked up in a small table of stand-ins that can only
make arrays of numbers; any other name ends the reading before anything is called.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file of PyTorch (``.pth``), detectron2 or Detectron (``.pkl``), by the names in the file.

    Raises OSError where the file cannot be read, and ValueError where it holds anything but numbers; nothing in the
    file is executed in either case.
    """
    path = Path(path)
    try:
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                content = _Numbers(file, encoding="latin1").load()
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a broken file or one of another kind can fail in any way inside the reader
        raise ValueError(f"{path} is not a file of weights: {(str(error) or repr(error)).splitlines()[0]}") from error
    for wrapper in ("model", "blobs"):  # detectron2's files and Detectron's have more than weights
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a dict of weights by name, got {type(content).__name__}")
    weights = {}
    for name, value in content.items():
        if isinstance(value, _Array) and value.array is not None:
            value = torch.from_numpy(value.array)
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} should hold arrays by name, got {type(value).__name__} for {name!r}")
        weights[name] = value
    return weights


class _Dtype:
    """Stands for ``numpy.dtype``: whole numbers and floats of 1 to 8 bytes."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[fiu][1248]|b1", code):
            raise pickle.UnpicklingError(f"arrays of {code!r} are no numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for an array under construction."""

    def __init__(self, *_: Any) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data: bytes | str, dtype: _Dtype, shape: tuple[int, ...], order: str) -> None:
        raw = data.encode("latin1") if isinstance(data, str) else data  # Python 2 had no bytes
        array = np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)
        self.array = array.astype(array.dtype.newbyteorder("="), order="C")  # a copy in this machine's byte order


def _from_buffer(data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.fill(data, dtype, shape, order)
    return array


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes are written in latin1, got {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


_ALLOWED: dict[tuple[str, str], Callable] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    ("_codecs", "encode"): _latin1,
    **{(builtins, "bytes"): _no_bytes for builtins in ("__builtin__", "builtins")},  # an empty array, before protocol 3
    ("collections", "OrderedDict"): OrderedDict,
}


class _Numbers(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it calls for {module}.{name}, and weights need nothing but arrays")
        return _ALLOWED[module, name]
