"""Runs of several processes, one scenario after the other: ``python many_processes.py <data> <streets> <out>``.

Starting PyTorch takes seconds, so this happens once, and the processes of each scenario are forked. Each leaves what it
returned or raised, and how long it took, in ``<out>/<scenario>/<rank>.pt``; the tests look there.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training_runs import CONFIG, DATA, MODEL, TRAIN, datasets, tiny_model

from mrcnn_edu.config import Config
from mrcnn_edu.data.cityscapes import CityscapesDataset
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.evaluation.measure import measure
from mrcnn_edu.models.mask_rcnn import MaskRCNN, build_model
from mrcnn_edu.training.distributed import connected
from mrcnn_edu.training.loop import train

PATIENCE = 60  # seconds until the processes of a scenario count as hung

# Batches of four, shared out evenly among 1, 2 and 4 processes.
SHARED = replace(CONFIG, train=replace(TRAIN, batch_size=4, iterations=6, checkpoint_every=3))

# Eight iterations that may end after four: the learning rate does not depend on their number.
EIGHT = replace(CONFIG, train=replace(TRAIN, batch_size=4, schedule="step", steps=(6,)))
STREETS = replace(MODEL, classes=8, keypoint=None)  # Cityscapes'

# Nothing is left to chance and no norm looks at its neighbours, so the gradient depends on the images alone.
PLAIN_MODEL = replace(
    MODEL,
    backbone=replace(MODEL.backbone, norm="frozen"),
    rpn=replace(MODEL.rpn, batch_per_image=10_000, positive_fraction=1.0),
    box=replace(MODEL.box, rois_per_image=1000, positive_fraction=1.0),
    mask=replace(MODEL.mask, rois_per_image=None),
    keypoint=replace(MODEL.keypoint, rois_per_image=None),
    head_norm="none",
)
PLAIN = Config(
    PLAIN_MODEL,
    DATA,
    replace(
        TRAIN, batch_size=4, iterations=2, optimiser="sgd", learning_rate=0.02, schedule="step", steps=(), average=0.0,
        warmup_iterations=0, clip_norm=None,
    ),
)  # fmt: skip


def plain_model() -> MaskRCNN:
    """The model whose gradient depends on the images alone."""
    torch.manual_seed(0)
    return build_model(PLAIN_MODEL)


def processes(size: int, folder: Path, work: Callable[[int], Any]) -> None:
    """Fork so many processes that form one ``torch.distributed`` world, and wait until they have left their outcome."""
    folder.mkdir(parents=True)
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            _run(rank, size, folder, work)
            os._exit(0)
        children.append(child)
    began = time.monotonic()
    deadline = began + PATIENCE
    while children:
        for child in list(children):
            if os.waitpid(child, os.WNOHANG)[0]:
                children.remove(child)
        if time.monotonic() > deadline:
            for child in children:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    print(f"{folder.name}: {time.monotonic() - began:.1f} s", flush=True)


def _run(rank: int, size: int, folder: Path, work: Callable[[int], Any]) -> None:
    began, outcome = time.monotonic(), {}
    try:
        dist.init_process_group(
            "gloo", f"file://{folder}/store", timeout=timedelta(seconds=PATIENCE), rank=rank, world_size=size
        )
        outcome["result"] = work(rank)
    except BaseException as error:
        outcome |= {"kind": type(error).__name__, "message": str(error)}
    torch.save(outcome | {"seconds": time.monotonic() - began}, folder / f"{rank}.pt")


def at_loss(model: MaskRCNN, iteration: int, action: Callable[[dict], dict | None]) -> MaskRCNN:
    """The model, doing something with the losses of an iteration, counted from 1."""
    losses, count = model.losses, 0

    def patched(*arguments):
        nonlocal count
        count += 1
        values = losses(*arguments)
        return (action(values) or values) if count == iteration else values

    model.losses = patched
    return model


def training(data: CocoDataset, out: Path, config: Config = SHARED, model: MaskRCNN | None = None, **options: Any):
    """Train quietly; the number of iterations."""
    return train(config, model or tiny_model(), data, None, out, progress=False, device="cpu", **options)["iterations"]


# ---------------------------------------------------------------------------------------------------------------------
# Scenarios
# ---------------------------------------------------------------------------------------------------------------------


def gradients(out: Path, data: CocoDataset) -> None:
    """The same four images per iteration: by 1 process in 4 parts, by 2 in 2, by 4 at once."""
    for world in (1, 2, 4):
        config = replace(PLAIN, train=replace(PLAIN.train, accumulate=4 // world))
        run = out / f"run-{world}"
        processes(world, out / f"gradients-{world}", lambda _, r=run, c=config: training(data, r, c, plain_model()))


def resuming(out: Path, data: CocoDataset, streets: CityscapesDataset) -> None:
    """Eight iterations; and four, and four more by new processes: four of them on COCO's format, two on Cityscapes'."""
    for name, size, images, config in (
        ("coco", 4, data, EIGHT),
        ("streets", 2, streets, replace(EIGHT, model=STREETS)),
    ):
        four = replace(config, train=replace(config.train, iterations=4))

        def work(_: int, run: str, seed: int = 0, c: Config = config, d: Any = images, **options: Any) -> int:
            torch.manual_seed(seed)
            return training(d, out / run, c, build_model(c.model), **options)

        processes(size, out / f"{name}-eight", partial(work, run=f"{name}-eight-run"))
        processes(size, out / f"{name}-four", partial(work, run=f"{name}-four-run", c=four))
        processes(size, out / f"{name}-four-more", partial(work, run=f"{name}-four-run", seed=9, resume=True))


def stopping(out: Path, data: CocoDataset) -> None:
    """Six iterations in one go; and with one of the two processes told to stop in the second, then resumed."""
    processes(2, out / "undisturbed", lambda _: training(data, out / "run"))

    def told(rank: int) -> int:
        model = tiny_model()
        if rank == 1:
            at_loss(model, 2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        return training(data, out / "stopped-run", model=model)

    processes(2, out / "stopped", told)
    processes(2, out / "resumed", lambda rank: training(data, out / "stopped-run", resume=True, model=tiny_model(9)))
    processes(1, out / "alone", lambda _: training(data, out / "alone-run"))
    processes(2, out / "joined-later", lambda _: training(data, out / "alone-run", resume=True))


def failing(out: Path, data: CocoDataset) -> None:
    """What happens to two processes when only the second has a bad loss, a bad image, other data, or is killed."""

    def bad_loss(rank: int) -> int:
        model = tiny_model()
        if rank == 1:
            at_loss(model, 2, lambda losses: losses | {"mask": losses["mask"] * float("nan")})
        return training(data, out / "bad-loss-run", model=model)

    def bad_image(rank: int) -> int:
        def broken(index: int):
            raise OSError("cannot read the image a.png: it is damaged")

        if rank == 1:
            data.target = broken
        return training(data, out / "bad-image-run")

    def other_settings(rank: int) -> int:
        config = replace(SHARED, train=replace(SHARED.train, learning_rate=0.5)) if rank == 1 else SHARED
        return training(data, out / "other-run", config)

    def killed(rank: int) -> int:
        model = tiny_model()
        if rank == 1:
            at_loss(model, 2, lambda _: os.kill(os.getpid(), signal.SIGKILL))
        return training(data, out / "killed-run", model=model)

    for work in (bad_loss, bad_image, other_settings, killed):
        processes(2, out / work.__name__, work)
    processes(2, out / "uneven", lambda _: training(data, out / "uneven-run", replace(SHARED, train=replace(
        SHARED.train, batch_size=5))))  # fmt: skip
    processes(2, out / "no-folder", lambda _: training(data, Path("/dev/null/run")))


def evaluating(out: Path, val_data: CocoDataset, streets: CityscapesDataset) -> None:
    """AP of one model by 1, 2, 3 and 4 processes: more of them than batches of images; Cityscapes' by 1 and 2."""
    for size in (1, 2, 3, 4):

        def work(_: int, size: int = size) -> dict:
            with connected("cpu") as world:
                found, _ = measure(tiny_model(8), val_data, DATA, out / f"results-{size}", progress=False, world=world)
            return found.to_json()

        processes(size, out / f"evaluating-{size}", work)

    for size in (1, 2):

        def work(_: int, size: int = size) -> dict:
            torch.manual_seed(8)
            model = build_model(replace(STREETS, box=replace(STREETS.box, score_threshold=0.0)))
            with connected("cpu") as world:
                return measure(model, streets, DATA, out / f"streets-results-{size}", progress=False, world=world)[
                    0
                ].to_json()

        processes(size, out / f"streets-evaluating-{size}", work)


if __name__ == "__main__":
    import torch._dynamo

    torch.set_num_threads(1)
    train_data, held_out = datasets(Path(sys.argv[1]))
    streets = CityscapesDataset(sys.argv[2], "train")
    where = Path(sys.argv[3])
    gradients(where, train_data)
    resuming(where, train_data, streets)
    stopping(where, train_data)
    failing(where, train_data)
    evaluating(where, held_out, streets)
