"""What the guards cost: their share of a training step, in one process, from the files to the new weights.

Run it with ``python benchmarks/guards.py``. It never runs with the tests.

A guard refuses bad values: the checks of the ops' arguments, of images and targets, of losses, and those with which
the types are built. Each is timed where it is called; one inside another is not counted twice. The model is the small
one of the demo, whose steps are the shortest and so the guards' share the largest. The clock itself is part of the
share.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mrcnn_edu import config, structures
from mrcnn_edu.data import loading, shapes
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.models.mask_rcnn import build_model
from mrcnn_edu.ops import checks
from mrcnn_edu.training import loop

GUARDS = [
    *((checks, name) for name in ("size_pair", "sampling", "features_and_rois", "roi_values", "boxes_and_scores",
                                  "masks_and_boxes", "boxes_only")),
    (loading, "check_image"), (loading, "check_target"), (structures, "check_image"), (loop, "finite_losses"),
    *((kind, "__post_init__") for kind in (structures.ImageBatch, structures.Target, structures.Proposals,
                                           structures.Rows)),
]  # fmt: skip


class Stopwatch:
    """Seconds spent inside timed functions, by name, the outermost one only."""

    def __init__(self) -> None:
        self.seconds, self.calls, self.inside = Counter(), Counter(), False

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, its time taken."""

        def call(*arguments: Any, **named: Any) -> Any:
            if self.inside:
                return function(*arguments, **named)
            self.inside, began = True, time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.inside = False
                self.seconds[name] += time.perf_counter() - began
                self.calls[name] += 1

        return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4, help="images per step")
    options = parser.parse_args()
    watch = Stopwatch()
    for owner, name in GUARDS:
        place = owner.__name__.removeprefix("mrcnn_edu.")
        mock.patch.object(owner, name, watch.timed(f"{place}.{name}", getattr(owner, name))).start()
    with tempfile.TemporaryDirectory() as folder:
        total = train(Path(folder), options.steps, options.batch, watch)
    guards = sum(watch.seconds.values())
    per_step = 1000 / options.steps  # from seconds in all to ms a step
    print(f"{per_step * total:.1f} ms a step of {options.batch} images, {per_step * guards:.2f} ms in guards: "
          f"{100 * guards / total:.2f} %")  # fmt: skip
    for name, seconds in watch.seconds.most_common():
        print(f"  {name:40} {watch.calls[name] / options.steps:6.1f} calls {per_step * seconds:7.3f} ms a step")
    if guards > 0.02 * total:
        raise SystemExit("the guards take more than 2 % of a step")


def train(folder: Path, steps: int, batch_size: int, watch: Stopwatch) -> float:
    """The seconds of some steps, after two that are not counted."""
    shapes.write(folder / "data", train=32, val=1)
    data = CocoDataset(folder / "data" / "train", folder / "data" / "train.json")
    model = build_model("maskrcnn_shapes").train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = loop.Run(model, optimiser, torch.amp.GradScaler("cpu", enabled=False))
    settings = config.DataConfig(min_size=(160,), max_size=160, test_size=160, workers=0)
    batches = loading.train_loader(data, settings, batch_size, seed=0)
    began = 0.0
    for step in range(steps + 2):
        if step == 2:
            watch.seconds.clear()
            watch.calls.clear()
            began = time.perf_counter()
        batch, targets, image_ids = next(batches)
        losses = model(batch, targets)
        loop.finite_losses(losses, run, image_ids)
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
