"""Which implementation of the ops runs: the compiled one where it was built, else the vectorized one.

Chapter 9 (the same in C++ and CUDA).
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch

from mrcnn_edu.ops import compiled, reference, vectorized

COMPILED_FOR = compiled.devices()

_chosen: str | None = None  # set by use(); None: the fastest there is


def backend() -> str:
    """What runs the ops and, where it is not the compiled form, why."""
    if _chosen is not None:
        return f"{_chosen}: chosen by use()"
    if compiled.MISSING is not None:
        return f"vectorized: {compiled.MISSING}"
    text = f"compiled ({', '.join(COMPILED_FOR)})"
    if torch.cuda.is_available() and "cuda" not in COMPILED_FOR:
        text += "; vectorized on cuda: the CUDA ops were not built"
    return text


class use:
    """Choose the implementation: ``use("reference")`` for good, ``with use("reference"):`` for a block.

    "reference" and "vectorized" are always there, "compiled" where it was built; None goes back to the fastest.
    Raises ValueError for an unknown name and RuntimeError for one that is not there.
    """

    def __init__(self, name: Literal["reference", "vectorized", "compiled"] | None) -> None:
        global _chosen
        if name not in ("reference", "vectorized", "compiled", None):
            raise ValueError(f'an implementation is "reference", "vectorized" or "compiled", got {name!r}')
        if name == "compiled" and compiled.MISSING is not None:
            raise RuntimeError(f"there are no compiled ops to use: {compiled.MISSING}")
        self._before, _chosen = _chosen, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        global _chosen
        _chosen = self._before


def implementation(device: torch.device) -> ModuleType:
    """The module whose ``roi_features``, ``nms``, ``paste`` and ``crops`` work on tensors of that device."""
    if _chosen == "reference":
        return reference
    if _chosen == "vectorized" or compiled.MISSING is not None:
        return vectorized
    if device.type in COMPILED_FOR:
        return compiled
    if _chosen == "compiled":
        raise RuntimeError(f"the compiled ops were built for {', '.join(COMPILED_FOR)}, not for {device.type}")
    return vectorized
