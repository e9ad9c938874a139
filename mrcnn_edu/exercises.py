"""Checks for the book's exercises: they look at an answer and say what is missing, and never raise.

Used by every chapter from Chapter 1 on. A check compares a reader's function with the library's on inputs, or an answer
with a value, so that no right answer is written down where it could be copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """What a check found; notebooks show its text."""

    passed: bool
    text: str

    def __repr__(self) -> str:
        return f"✓ Solved. {self.text}" if self.passed else f"✗ Not yet. {self.text}"


def check_function(
    mine: Callable[..., Any],
    like: Callable[..., Any],
    inputs: Sequence[tuple],
    tolerance: float = 1e-5,
    hint: str = "",
) -> Verdict:
    """Does a function give what another one gives?

    mine       the reader's
    like       the one to be equal to
    inputs     tuples of arguments, tried in this order
    tolerance  largest difference of a number, absolute and relative
    hint       what to say when it does not
    """
    if not inputs:
        raise ValueError("a check without inputs would pass anything; give at least one tuple of arguments")
    for arguments in inputs:
        name = getattr(mine, "__name__", "answer").replace("<lambda>", "answer")
        asked = f"{name}({', '.join(_short(argument) for argument in arguments)})"
        wanted = like(*arguments)
        try:
            got = mine(*arguments)
        except Exception as error:  # whatever a reader's code raises is an answer to talk about
            return _not_yet(f"{asked} raised {type(error).__name__}: {error}", hint)
        if got is ... or (isinstance(got, tuple) and any(part is ... for part in got)):
            return _not_yet("There is no answer so far.", hint)
        problem = _difference(got, wanted, tolerance)
        if problem is not None:
            return _not_yet(f"{asked} gave {_short(got)}, wanted {_short(wanted)}{problem}", hint)
    return Verdict(True, f"All {len(inputs)} cases agree." if len(inputs) > 1 else "The case agrees.")


def check_value(got: Any, wanted: Any, tolerance: float = 1e-5, hint: str = "") -> Verdict:
    """Is an answer (number, tensor, text, or a tuple, list or dict of them) the wanted one? It is not given away."""
    if got is ...:
        return _not_yet("There is no answer so far.", hint)
    problem = _difference(got, wanted, tolerance)
    if problem is not None:
        return _not_yet(f"{_short(got)} is not it{problem}.", hint)
    return Verdict(True, f"{_short(got)} is right.")


def check_that(*claims: tuple[Callable[[], Any], str]) -> Verdict:
    """Do all claims hold? For answers of which many are right.

    claims  (function of nothing that is true when the claim holds, the sentence to say when it is not), in this order
    """
    if not claims:
        raise ValueError("a check without claims would pass anything; give at least one")
    for holds, otherwise in claims:
        try:
            if holds():
                continue
        except Exception as error:
            return _not_yet(f"{otherwise} ({type(error).__name__}: {error})", "")
        return _not_yet(otherwise, "")
    return Verdict(True, f"All {len(claims)} claims hold." if len(claims) > 1 else "The claim holds.")


def _not_yet(text: str, hint: str) -> Verdict:
    return Verdict(False, f"{text} Hint: {hint}" if hint else text)


def _difference(got: Any, wanted: Any, tolerance: float) -> str | None:
    """None where the two are equal, else what differs besides the plain values, to be put behind them."""
    if isinstance(wanted, (tuple, list)):
        if not isinstance(got, (tuple, list)) or len(got) != len(wanted):
            return f" (wanted {len(wanted)} values)"
        found = (_difference(g, w, tolerance) for g, w in zip(got, wanted))
        return next((problem for problem in found if problem is not None), None)
    if isinstance(wanted, dict):
        if not isinstance(got, dict) or set(got) != set(wanted):
            return f" (wanted the keys {sorted(map(str, wanted))})"
        return _difference([got[key] for key in wanted], list(wanted.values()), tolerance)
    if isinstance(wanted, (Tensor, np.ndarray, float, int, bool, np.generic)):
        return _number_difference(got, wanted, tolerance)
    return None if got == wanted else ""


def _number_difference(got: Any, wanted: Any, tolerance: float) -> str | None:
    if not isinstance(got, (Tensor, np.ndarray, float, int, bool, np.generic)):
        return f" ({type(got).__name__} is no number or tensor)"
    a, b = (torch.as_tensor(value).detach().cpu() for value in (got, wanted))
    if a.shape != b.shape:
        return f" (shape {list(a.shape)}, wanted {list(b.shape)})"
    if (a.dtype == torch.bool) != (b.dtype == torch.bool):
        return f" (dtype {a.dtype}, wanted {b.dtype})"
    close = torch.isclose(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    return None if bool(close.all()) else ""


def _short(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() > 12:
        return f"a tensor {list(value.shape)}"
    text = " ".join(repr(_rounded(value)).split())
    return text if len(text) <= 90 else text[:87] + "..."


def _rounded(value: Any) -> Any:
    """Tensors as lists, and floats with five digits: enough to see what is wrong."""
    if isinstance(value, (Tensor, np.ndarray)):
        return _rounded(value.tolist())
    if isinstance(value, (list, tuple)):
        return type(value)(_rounded(item) for item in value) if type(value) in (list, tuple) else value
    return float(f"{value:.5g}") if isinstance(value, float) else value
