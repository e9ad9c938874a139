"""Training on what it should not be given, with parts that fail, and interrupted at any moment."""

from __future__ import annotations

import functools
import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # seconds that PyTorch would otherwise take in the first step of every process
from many_processes import at_loss, processes
from torch import Tensor
from training_runs import DATA, MODEL, datasets, tiny_model, with_train

from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.loading import train_loader
from mrcnn_edu.data.shapes import write
from mrcnn_edu.structures import Target
from mrcnn_edu.training import checkpoint, distributed
from mrcnn_edu.training.loop import train
from torture.harness import Area

JOINTS = MODEL.keypoint.joints
NAN = float("nan")


class Changed:
    """A data set whose third image comes from elsewhere."""

    def __init__(self, whole: CocoDataset, load: Callable[[], Any]) -> None:
        self.whole, self.load = whole, load

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> Any:
        return self.load() if index == 2 else self.whole[index]


def data(folder: Path) -> CocoDataset:
    """Five drawn images of 64 x 64."""
    write(folder / "data", train=5, val=1, size=64, seed=1)
    return datasets(folder / "data")[0]


def run(images: Any, out: Path, model: Any = None, workers: int = 0, **changes: Any) -> dict[str, Any]:
    """A quiet run of eight iterations with a checkpoint after each."""
    config = with_train(**({"checkpoint_every": 1} | changes))
    config = replace(config, data=replace(DATA, workers=workers))
    return train(config, model or tiny_model(), images, None, out, resume=True, progress=False, device="cpu")


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong, and what has to be said
# ---------------------------------------------------------------------------------------------------------------------


def a_target(**fields: Tensor) -> Target:
    """One good instance in a 64 x 64 image, but for some fields."""
    good = {
        "boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.bool), "keypoints": torch.zeros(1, JOINTS, 3),
        "crowd": torch.zeros(1, dtype=torch.bool),
    }  # fmt: skip
    return Target(**good | fields)


def given(load: Callable[[], Any], workers: int = 0) -> Callable[[Path], None]:
    """A run on a data set of which one item is this."""
    return lambda folder: run(Changed(data(folder), load), folder / "run", workers=workers)


def bad_image(value: float) -> Callable[[], tuple[Tensor, Target]]:
    """An image with this value in one pixel."""

    def load() -> tuple[Tensor, Target]:
        image = torch.rand(3, 64, 64)
        image[1, 30, 20] = value
        return image, a_target()

    return load


def bad_target(**fields: Tensor) -> Callable[[], tuple[Tensor, Target]]:
    """A good image with these fields in its target."""
    return lambda: (torch.rand(3, 64, 64), a_target(**fields))


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def broken() -> None:
    raise OSError("cannot read the image a.png: it is damaged")


def bad_weight(folder: Path) -> None:
    """NaN in one weight."""
    model = tiny_model()
    next(model.mask_head.parameters()).data.view(-1)[0] = NAN
    run(data(folder), folder / "run", model)


def bad_loss(value: float) -> Callable[[Path], None]:
    """A loss of this value in the sixth iteration: the checkpoint of the fifth is named and stays."""

    def scenario(folder: Path) -> None:
        model = at_loss(tiny_model(), 6, lambda losses: losses | {"box": losses["box"] * 0 + value})
        try:
            run(data(folder), folder / "run", model)
        finally:
            _last_is(folder / "run", 5)

    return scenario


def no_room(folder: Path) -> None:
    """The disk is full when the third checkpoint is written: the second one stays."""

    def fill(_: dict) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))

    try:
        run(data(folder), folder / "run", at_loss(tiny_model(), 3, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        _last_is(folder / "run", 2)


def hanging(folder: Path) -> None:
    """A worker that never delivers."""
    stuck = Changed(data(folder), lambda: time.sleep(1000))
    for _ in train_loader(stuck, replace(DATA, workers=1), 2, 0, timeout=1):
        pass


def on_one_of_two(what: str | Callable[[], Any]) -> Callable[[Path], None]:
    """Two processes, of which the second has this third image, or does this in its third iteration; both must end."""

    def scenario(folder: Path) -> None:
        images, reasons = data(folder), []

        def hangs() -> None:  # until the other has given it up
            while not (folder / "ends" / "0.pt").exists():
                time.sleep(0.1)

        def work(rank: int) -> None:
            model = tiny_model()

            def spoils() -> None:
                next(model.mask_head.parameters()).data.fill_(NAN)

            action = {
                "loss": lambda losses: losses | {"mask": losses["mask"] * NAN},
                "weight": lambda _: spoils(),
                "death": lambda _: killed(),
                "hang": lambda _: hangs(),
            }
            if rank == 1 and what in action:
                at_loss(model, 3, action[what])
            run(Changed(images, what) if rank == 1 and callable(what) else images, folder / "run", model)

        with mock.patch.object(distributed, "TIMEOUT", timedelta(seconds=10)):  # not ten minutes
            processes(2, folder / "ends", work)
        for file in sorted((folder / "ends").glob("[01].pt")):
            end = torch.load(file, weights_only=False)
            reasons.append(f"{end.get('kind')}: {end.get('message')}")
            if "kind" not in end:
                raise AssertionError(f"process {file.stem}: {end}")
        if len(reasons) != (1 if what == "death" else 2):
            raise AssertionError(f"two processes left {reasons}")
        if not callable(what):
            _last_is(folder / "run", 2)
        raise OSError(reasons[0])

    return scenario


def _last_is(out: Path, iteration: int) -> None:
    state, _ = checkpoint.load(out)
    if state["iteration"] != iteration or not all(value.isfinite().all() for value in state["model"].values()):
        raise AssertionError(f"the last good state was of iteration {iteration}, {state['iteration']} is left")


# A scenario, the error that it must end in, and some of its words.
SCENARIOS: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "an image with NaN": (given(bad_image(NAN)), ValueError, "image 3 must lie in"),
    "an image with infinity, by a worker": (
        given(bad_image(float("inf")), workers=1),
        ValueError,
        "image 3 must lie in",
    ),
    "an image of 0 to 255": (given(bad_image(255.0)), ValueError, "image 3 must lie in"),
    "an image of one channel": (given(lambda: (torch.rand(1, 64, 64), a_target())), ValueError, "image 3 must be RGB"),
    "a box of NaN": (given(bad_target(boxes=torch.full((1, 4), NAN))), ValueError, "target of image 3.boxes"),
    "a box of no width": (
        given(bad_target(boxes=torch.tensor([[5.0, 5, 5, 20]]))),
        ValueError,
        "target of image 3.boxes",
    ),
    "the label 0": (given(bad_target(labels=torch.tensor([0]))), ValueError, "target of image 3.labels"),
    "the label 7 of 6": (given(bad_target(labels=torch.tensor([7]))), ValueError, "target of image 3.labels"),
    "masks of another size": (
        given(bad_target(masks=torch.ones(1, 9, 9, dtype=torch.bool))),
        ValueError,
        "target of image 3.masks",
    ),
    "keypoints of NaN": (
        given(bad_target(keypoints=torch.full((1, JOINTS, 3), NAN))),
        ValueError,
        "target of image 3.keypoints",
    ),
    "no target": (given(lambda: (torch.rand(3, 64, 64), {})), TypeError, "target of image 3 must be a Target"),
    "a weight of NaN": (bad_weight, FloatingPointError, "a loss is not finite|hold NaN"),
    "a loss of NaN": (bad_loss(NAN), FloatingPointError, "a loss is not finite"),
    "a loss of infinity": (bad_loss(float("inf")), FloatingPointError, "a loss is not finite"),
    "a worker that is killed": (given(killed, workers=1), RuntimeError, "worker died"),
    "a worker that raises": (given(broken, workers=1), OSError, "cannot read the image a.png"),
    "a worker that hangs": (hanging, RuntimeError, "timed out"),
    "a folder that cannot be made": (
        lambda folder: run(data(folder), Path("/dev/null/run")),
        OSError,
        "cannot make the folder",
    ),
    "a disk that is full": (no_room, OSError, "cannot write|File too large"),
    "a loss of NaN on one of two": (on_one_of_two("loss"), OSError, "a loss is not finite"),
    "a weight of NaN on one of two": (on_one_of_two("weight"), OSError, "the gradient is not finite"),
    "a damaged image on one of two": (on_one_of_two(broken), OSError, "cannot read the image a.png"),
    "an image with NaN on one of two": (on_one_of_two(bad_image(NAN)), OSError, "image 3 must lie in"),
    "a box of NaN on one of two": (
        on_one_of_two(bad_target(boxes=torch.full((1, 4), NAN))),
        OSError,
        "target of image 3.boxes",
    ),
    "the death of one of two": (on_one_of_two("death"), OSError, "has lost another one"),
    "one of two that hangs": (
        on_one_of_two("hang"),
        OSError,
        "has lost another one, which was killed, failed or hangs",
    ),
}


def scenario(number: int, folder: Path) -> str:
    """One scenario: it ends with the right kind of error, and never by itself."""
    folder.mkdir()
    name, (work, kind, words) = list(SCENARIOS.items())[number]
    try:
        work(folder)
    except Exception as error:
        if not isinstance(error, kind) or not re.search(words, str(error)):
            raise
        return f"ended as documented, {kind.__name__}"
    raise AssertionError(f"{name}: training went on")


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def undisturbed() -> tuple[dict[str, Tensor], float]:
    """The weights at the end of a run that is left alone, and the seconds it takes."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        images, began = data(Path(folder)), time.monotonic()
        run(images, Path(folder) / "run")
        return checkpoint.load(Path(folder) / "run")[0]["model"], time.monotonic() - began


def interrupted(number: int, folder: Path) -> str:
    """A signal at a random moment of a run, which is then resumed: the same weights to the bit."""
    folder.mkdir()
    weights, seconds = undisturbed()
    images, kind = data(folder), (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[number % 3]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(images, folder / "run")
            code = 0
        except KeyboardInterrupt:
            code = 130
        except SystemExit as error:
            code = error.code
        finally:
            os._exit(code)
    time.sleep(random.Random(number).uniform(0.0, 1.2) * seconds)
    os.kill(child, kind)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    early = code == -kind  # before the run looks after signals, or SIGKILL
    if code not in (0, {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[kind]) and not early:
        raise AssertionError(f"{kind.name} ended the run with {code}")
    run(images, folder / "run")
    end = checkpoint.load(folder / "run")[0]["model"]
    if different := [name for name, value in weights.items() if not torch.equal(value, end[name])]:
        raise AssertionError(f"after {kind.name} {different} differ")
    return f"{kind.name}, {'too late' if code == 0 else 'resumed'}: the same weights"


TRAINING = Area("training", "bad images, targets, weights, losses, workers, folders and processes", scenario,
                short=len(SCENARIOS), full=len(SCENARIOS), seconds=240, memory=512, chunk=4)  # fmt: skip
INTERRUPTS = Area("interruptions", "SIGINT, SIGTERM and SIGKILL at any moment of a run, then resumed", interrupted,
                  short=3, full=60, memory=512, chunk=20)  # fmt: skip
