"""Checkpoints: everything that changes while training, written so that no crash can lose it.

Chapter 13 (training) and Chapter 19 (many GPUs).

A checkpoint is one file, ``checkpoint-00002500-5f3a9c0e12d4b7a6.pt``: the completed iterations and the first 16 digits
of the SHA-256 of its content. It is written under another name, brought to the disk and only then renamed, which a file
system does wholly or not at all; content and checksum cannot part. The newest two are kept: a kill, a full disk or a
flipped bit costs at most the work since the older one. The file is an ordinary ``torch.save`` archive and is read with
``weights_only=True``, so that opening one cannot run code.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mrcnn_edu import __version__
from mrcnn_edu.config import Config
from mrcnn_edu.fields import from_json, to_json
from mrcnn_edu.inference import check_weights
from mrcnn_edu.training.distributed import ALONE, World
from mrcnn_edu.training.schedule import WeightAverage
from mrcnn_edu.unpickling import read_torch

log = logging.getLogger(__name__)

KEEP = 2  # checkpoints per folder
NAME = re.compile(r"checkpoint-(\d{8,})-([0-9a-f]{16})\.pt")
PARTS = ("format", "version", "iteration", "seconds", "model", "average", "optimiser", "scaler", "sampler", "rng",
         "config", "categories", "data")  # fmt: skip
FORMAT = 2

# What may differ between a checkpoint's configuration and the one that continues it, because no weight depends on it.
FREE = {
    "data.train_images", "data.train_annotations", "data.val_images", "data.val_annotations", "data.test_size",
    "data.workers", "train.log_every", "train.evaluate_every", "train.validate_every", "train.checkpoint_every",
}  # fmt: skip


@dataclass
class Run:
    """Everything that changes from one iteration to the next, and so everything a checkpoint must hold.

    average    the averaged weights, or None
    iteration  completed iterations, which is also the position in the schedule and in the training data
    seconds    spent training so far, without evaluation
    saved      the last checkpoint written or read, or None

    Two things belong to the processes at hand and are in no checkpoint: ``world``, who they are, and ``replica``, the
    model as the loop calls it, in DDP where there are several.
    """

    model: nn.Module
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None = None
    world: World = ALONE
    replica: nn.Module | None = None
    iteration: int = 0
    seconds: float = 0.0
    saved: Path | None = None

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file wholly or not at all, and return only when it is on the disk.

    Raises OSError naming the file; whatever stood there before is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the new name is durable once the folder is; Windows cannot open folders
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        message = f"cannot write {path}: {error.strerror or error}; what was there before is untouched"
        raise OSError(error.errno, message) from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values as JSON, wholly or not at all."""
    write_atomically(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def save(folder: Path, state: dict[str, Any]) -> Path:
    """Write ``capture``'s state into the folder and drop all but the last two checkpoints; the path written.

    When this returns the checkpoint is on the disk. A crash before leaves the earlier ones as they were.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    path = folder / f"checkpoint-{state['iteration']:08d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    write_atomically(path, content)
    # A checkpoint as far on as this one was damaged, or this run would have continued from it: it must not count.
    others = [other for other in checkpoints(folder) if other != path]
    stale = [other for other in others if iteration_of(other) >= state["iteration"]]
    for old in [*stale, *[other for other in others if other not in stale][KEEP - 1 :]]:
        old.unlink(missing_ok=True)
    for left in folder.glob(".checkpoint-*.tmp"):  # of a run that was killed while it wrote
        left.unlink(missing_ok=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, the furthest first."""
    found = [path for path in folder.glob("checkpoint-*.pt") if NAME.fullmatch(path.name)]
    return sorted(found, key=iteration_of, reverse=True)


def iteration_of(path: Path) -> int:
    """The completed iterations in a checkpoint's name."""
    return int(NAME.fullmatch(path.name).group(1))


def load(folder: Path) -> tuple[dict[str, Any], Path]:
    """The furthest checkpoint of a folder that is whole, and its path; one that is damaged is passed over and named.

    Raises FileNotFoundError when there is none, ValueError when none can be read.
    """
    paths = checkpoints(Path(folder))
    if not paths:
        raise FileNotFoundError(f"no checkpoint (checkpoint-*.pt) in {folder}")
    problems = []
    for path in paths:
        try:
            return read(path), path
        except (ValueError, OSError) as error:
            problems.append(str(error))
            log.warning("%s", error)
            log.warning("trying the checkpoint before it" if path != paths[-1] else "no earlier checkpoint is left")
    raise ValueError("no checkpoint can be read: " + "; ".join(problems))


def read(path: Path) -> dict[str, Any]:
    """The content of one checkpoint file, on the CPU, after its checksum was compared.

    Raises ValueError for a file that is damaged or not a checkpoint, OSError when it cannot be read.
    """
    path = Path(path)
    name = NAME.fullmatch(path.name)
    if name is None:
        raise ValueError(
            f"{path} does not have a checkpoint's name, checkpoint-<iteration>-<16 digits of its SHA-256>.pt, "
            f"without which it cannot be checked"
        )
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:16]
    if digest != name.group(2):
        raise ValueError(
            f"{path} is damaged: the checksum of its {len(content)} bytes is {digest}, not the one in its name"
        )
    try:
        state = read_torch(io.BytesIO(content))
    except Exception as error:  # a file made to deceive can fail in any way inside the reader
        raise ValueError(f"{path} is not a checkpoint of this package: {str(error).splitlines()[0]}") from error
    missing = [part for part in PARTS if not isinstance(state, dict) or part not in state]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of this package: it lacks {', '.join(missing)}")
    if state["format"] != FORMAT:
        raise ValueError(f"{path} has format {state['format']} (version {state['version']}); this reads {FORMAT}")
    return state


# ---------------------------------------------------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------------------------------------------------


def capture(run: Run, config: Config, categories: Any, data: str, rngs: list[dict[str, Any]]) -> dict[str, Any]:
    """All of a run as plain values and tensors.

    categories  the CategoryMap of the training data
    data        ``fingerprint`` of the training data
    rngs        ``rng_state`` of every process, by rank

    Raises FloatingPointError when a weight is not finite: such a state must not replace a good one.
    """
    check_weights(run.model)
    average = None if run.average is None else run.average.model.state_dict()
    return {
        "format": FORMAT,
        "version": __version__,
        "iteration": run.iteration,
        "seconds": run.seconds,
        "model": run.model.state_dict(),
        "average": None if average is None else {"model": average, "updates": run.average.updates},
        "optimiser": run.optimiser.state_dict(),
        "scaler": run.scaler.state_dict(),
        "sampler": {"seed": config.train.seed, "batches": run.iteration},
        "rng": rngs,
        "config": to_json(config),
        "categories": categories.to_json(),
        "data": data,
    }


def restore(run: Run, state: dict[str, Any], config: Config, categories: Any, data: str) -> None:
    """Bring a run back to a captured state, random generators excepted (``set_rng_state``, when all else is set up).

    Raises ValueError, before anything is changed, when the state belongs to another model, configuration or data.
    """
    old = from_json(Config, state["config"])
    check_continues(old, config, state["iteration"])
    if _plain(state["categories"]) != _plain(categories.to_json()):
        raise ValueError("the checkpoint was trained on other categories than this data has; choose another folder")
    if state["data"] != data:
        raise ValueError(f"the checkpoint was trained on other data: {state['data']}; now it is {data}")
    check_state(run.model.state_dict(), state["model"], "the checkpoint")
    if (state["average"] is None) != (run.average is None):
        raise ValueError("the checkpoint and this run disagree about averaged weights (train.average)")
    run.model.load_state_dict(state["model"])
    if run.average is not None:
        run.average.model.load_state_dict(state["average"]["model"])
        run.average.updates = state["average"]["updates"]
    run.optimiser.load_state_dict(state["optimiser"])
    run.scaler.load_state_dict(state["scaler"])
    run.iteration = state["sampler"]["batches"]
    run.seconds = state["seconds"]


def fingerprint(dataset: Any) -> str:
    """A few words that tell one data set from another: how many images it has and a digest of their ids."""
    ids = ",".join(str(image_id) for image_id in dataset.image_ids)
    return f"{len(dataset)} images with ids {hashlib.sha256(ids.encode()).hexdigest()[:12]}"


def check_continues(old: Config, new: Config, iteration: int) -> None:
    """Refuse a configuration under which the checkpoint would not have been reached.

    Logging, evaluation, workers and where the data lie may change (``FREE``). ``train.iterations`` may change under the
    "step" schedule, whose past does not depend on it; a cosine would have been another one from the start.
    """
    free = FREE | ({"train.iterations"} if new.train.schedule == "step" else set())
    difference = first_difference(to_json(old), to_json(new), free)
    if difference is not None:
        field, was, wanted = difference
        raise ValueError(
            f"cannot resume: the checkpoint was made with {field} = {was!r}, now it is {wanted!r}; "
            f"set it back, or start a new run in another folder"
        )
    if new.train.iterations < iteration:
        raise ValueError(
            f"cannot resume: the checkpoint has {iteration} iterations, more than train.iterations = "
            f"{new.train.iterations}"
        )


def first_difference(
    old: dict[str, Any], new: dict[str, Any], free: Collection[str] = ()
) -> tuple[str, Any, Any] | None:
    """The first field in which two configurations (``to_json``) differ, as (dotted name, old, new); None if in none.

    free  names that may differ
    """
    before, now = _flat(old), _flat(new)
    for field in before | now:
        was, wanted = before.get(field, "absent"), now.get(field, "absent")
        if was != wanted and field not in free:
            return field, was, wanted
    return None


def check_state(expected: dict[str, Tensor], got: dict[str, Tensor], source: str) -> None:
    """Refuse a state dict with other names, shapes or types than the model's, naming the first that differ."""
    problems = [f"{name} is missing" for name in expected if name not in got]
    problems += [f"{name} is not part of the model" for name in got if name not in expected]
    plain = {name for name, value in got.items() if isinstance(value, Tensor) and _has_values(value)}
    problems += [f"{name} holds no plain numbers" for name in expected if name in got and name not in plain]
    for name in [name for name in expected if name in plain]:
        want, have = (f"{list(value.shape)} {value.dtype}" for value in (expected[name], got[name]))
        if want != have:
            problems.append(f"{name} is {have}, the model's is {want}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{source} belongs to another model: {'; '.join(problems[:3])}{more}")


def _has_values(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_meta and not value.is_quantized


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": _plain(value)}
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
