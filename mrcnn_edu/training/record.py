"""What a run leaves to read: ``metrics.jsonl``, TensorBoard's files, and a progress bar or a few printed lines.

Chapter 13 (training).
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mrcnn_edu.config import TrainConfig
from mrcnn_edu.training.checkpoint import Run, write_atomically

LINES = 20  # printed per run where there is no terminal to draw a bar on ...
SILENCE = 600  # seconds, the longest time between two of them


class Record:
    """Writes one JSON object per line and the same numbers to TensorBoard; shows them while ``progress`` is on.

    A training line has, averaged over the iterations since the line before: ``losses`` by name and their sum ``total``,
    ``gradient_norm`` before clipping, ``images_per_second`` and ``loading_seconds`` (waited for data, per iteration);
    and as they are: ``learning_rate``, ``memory_mib`` (the process's peak, or the GPU's), ``seconds`` of training so
    far and ``seconds_left``. Other lines have ``validation`` or ``evaluation``. Iterations count from 1.
    """

    def __init__(self, folder: Path, config: TrainConfig, start: int, progress: bool) -> None:
        self.path = folder / "metrics.jsonl"
        self.config = config
        self.last: dict[str, Any] = {}
        self._window: list[dict[str, Any]] = []
        self._printed = (-math.inf, -math.inf)  # iteration, time
        if self.path.exists():
            drop_after(self.path, start)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
        self._progress = progress
        self._bar = None
        if progress and sys.stdout.isatty():
            self._bar = tqdm(total=config.iterations, initial=start, unit="it", file=sys.stdout, dynamic_ncols=True)

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self._board.close()
        self._file.close()

    def step(
        self, run: Run, losses: dict[str, float], rate: float, norm: float, images: int, seconds: float, loading: float
    ) -> None:
        """Note one iteration: learning rate, gradient norm, seconds it took and seconds of those it waited for data."""
        self._window.append(
            {"losses": losses, "rate": rate, "norm": norm, "images": images, "seconds": seconds, "loading": loading}
        )
        if self._bar is not None:
            self._bar.update(1)
        if run.iteration % self.config.log_every == 0 or run.iteration == self.config.iterations:
            self.last = self._summary(run)
            self._window.clear()
            self._write(self.last)
            self._show(self.last)

    def _summary(self, run: Run) -> dict[str, Any]:
        window, steps = self._window, len(self._window)
        losses = {name: sum(step["losses"][name] for step in window) / steps for name in window[0]["losses"]}
        norms = [step["norm"] for step in window if math.isfinite(step["norm"])]  # fp16 skips a step that overflows
        return {
            "iteration": run.iteration,
            "losses": losses,
            "total": sum(losses.values()),
            "learning_rate": window[-1]["rate"],
            "gradient_norm": sum(norms) / len(norms) if norms else None,
            "images_per_second": sum(step["images"] for step in window) / sum(step["seconds"] for step in window),
            "loading_seconds": sum(step["loading"] for step in window) / steps,
            "memory_mib": peak_memory_mib(),
            "seconds": run.seconds,
            "seconds_left": run.seconds / run.iteration * (self.config.iterations - run.iteration),
        }

    def result(self, iteration: int, kind: str, numbers: dict[str, Any]) -> None:
        """Note a ``validation`` or an ``evaluation``: a dict of numbers, nested as it likes."""
        self._write({"iteration": iteration, kind: numbers})

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        elif self._progress:
            print(text, flush=True)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for tag, value in _scalars(line):
            if tag != "iteration":
                self._board.add_scalar(tag, value, line["iteration"])

    def _show(self, line: dict[str, Any]) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {line['total']:.3f}, {line['images_per_second']:.1f} images/s")
            return
        iteration, now, total = line["iteration"], time.monotonic(), self.config.iterations
        due = iteration - self._printed[0] >= total / LINES or now - self._printed[1] >= SILENCE
        if due or iteration == total:
            self._printed = (iteration, now)
            parts = ", ".join(f"{name} {value:.3f}" for name, value in line["losses"].items())
            self.say(
                f"iteration {iteration:>{len(str(total))}}/{total}  loss {line['total']:.3f} ({parts})  "
                f"{line['images_per_second']:.1f} images/s  {clock(line['seconds_left'])} left"
            )


class Silence:
    """The record that the other processes of a run keep: none. The first one writes for all."""

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, *_: object) -> None:
        """Note nothing."""

    def result(self, *_: object) -> None:
        """Note nothing."""

    def say(self, *_: object) -> None:
        """Print nothing."""


def drop_after(path: Path, iteration: int) -> None:
    """Remove the lines of iterations that a resumed run will do again, and a last line that was cut off."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["iteration"] <= iteration:
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} has a line that is no metrics: {line[:60]!r}; move the file away") from error
    write_atomically(path, "".join(kept).encode())


def peak_memory_mib() -> float | None:
    """The most memory so far, in MiB: of the GPU if one is used, else of this process; None where it is not told."""
    if torch.cuda.is_initialized() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def clock(seconds: float) -> str:
    """Seconds as 4:07 or 12:04:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _scalars(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found.append((f"{prefix}{name}", value))
    return found
