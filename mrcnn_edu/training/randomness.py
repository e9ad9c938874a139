"""The state of every random generator, so that a resumed run draws what an undisturbed one would have drawn.

Chapter 13 (training).
"""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy
import torch

log = logging.getLogger(__name__)


def rng_state() -> dict[str, Any]:
    """The state of every random generator this process may draw from: Python, numpy, PyTorch, its current GPU."""
    kind, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(kind), keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        # the current GPU alone, and only where one is in use: asking would start a context on it, in each process
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def seed_rng(seed: int, rank: int = 0) -> None:
    """Set every random generator to the start of its sequence number ``seed``; each process of a run has its own."""
    if rank:
        seed = int(numpy.random.SeedSequence([seed % 2**32, rank]).generate_state(1)[0])
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # every GPU's as well


def set_rng_state(state: dict[str, Any]) -> None:
    """Set every random generator to a state from ``rng_state``; says so when there was a GPU and is none, or not."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) != torch.cuda.is_initialized():
        was, now = ("on a GPU" if there else "without a GPU" for there in (state["cuda"], torch.cuda.is_initialized()))
        log.warning("the checkpoint was made %s, this is %s: the run continues, but draws other numbers", was, now)
    elif state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])
