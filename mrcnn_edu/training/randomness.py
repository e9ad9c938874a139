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
    """The state of every random generator a model or a data set may draw from: Python, numpy, PyTorch, each GPU."""
    kind, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(kind), keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def seed_rng(seed: int) -> None:
    """Set every random generator to the start of its sequence number ``seed``."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # every GPU's as well


def set_rng_state(state: dict[str, Any]) -> None:
    """Set every random generator to a state from ``rng_state``; says so when the number of GPUs has changed."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    else:
        log.warning(
            "the checkpoint was made with %d GPUs, here are %d: the run continues, but draws other random numbers",
            len(state["cuda"]),
            torch.cuda.device_count(),
        )
