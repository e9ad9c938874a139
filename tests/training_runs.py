"""A training run small enough for a test: a few drawn images, a model of some ten thousand weights, eight iterations.

As a script it trains until it is told to stop, ``python training_runs.py endless <data> <out>``, or kills itself a few
times, ``python training_runs.py kill <data> <out> 1 3 5``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mrcnn_edu.config import (
    BackboneConfig,
    BoxHeadConfig,
    Config,
    DataConfig,
    KeypointHeadConfig,
    MaskHeadConfig,
    ModelConfig,
    RPNConfig,
    TrainConfig,
)
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.models.mask_rcnn import MaskRCNN, build_model
from mrcnn_edu.training import checkpoint
from mrcnn_edu.training.loop import train

MODEL = ModelConfig(
    classes=6,
    backbone=BackboneConfig(
        architecture="resnet10", width=8, stem="3x3", norm="batch", frozen_stages=0, levels=("p4", "p5"), channels=8
    ),
    rpn=RPNConfig(anchor_sizes=((20,), (40,)), pre_nms=(30, 30), post_nms=(12, 12), batch_per_image=32),
    box=BoxHeadConfig(rois_per_image=12, pooled_size=3, fc=(16,), detections_per_image=5),
    mask=MaskHeadConfig(pooled_size=4, convs=(8,), rois_per_image=3),
    keypoint=KeypointHeadConfig(joints=7, labels=(6,), pooled_size=4, convs=(8,), rois_per_image=3),
    head_norm="batch",
)
DATA = DataConfig(min_size=(56, 64), max_size=64, test_size=64, channel_shuffle=0.5, workers=0)
TRAIN = TrainConfig(
    iterations=8,
    batch_size=2,
    optimiser="adamw",
    learning_rate=1e-3,
    schedule="cosine",
    warmup_iterations=3,
    clip_norm=5.0,
    average=0.9,
    log_every=2,
    checkpoint_every=4,
)
CONFIG = Config(MODEL, DATA, TRAIN)
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # for processes that import what the tests import
IMAGES = 5  # no multiple of the batch size, so that eight iterations pass several ends of the data


def with_train(**changes: Any) -> Config:
    """The tiny run with other training fields."""
    return replace(CONFIG, train=replace(TRAIN, **changes))


def tiny_model(seed: int = 0) -> MaskRCNN:
    """The tiny model with the weights of a seed."""
    torch.manual_seed(seed)
    return build_model(MODEL)


def datasets(folder: Path) -> tuple[CocoDataset, CocoDataset]:
    """Training and validation images that ``data.shapes.write`` left in a folder."""
    return tuple(CocoDataset(folder / part, folder / f"{part}.json") for part in ("train", "val"))


def train_and_kill(data: CocoDataset, out: Path, stops: list[int]) -> None:
    """Train with a checkpoint after each iteration; for each stop resume and kill -9 as soon as it has that many."""
    import torch._dynamo  # noqa: F401, seconds that PyTorch would otherwise take in the first step of every child

    for stop in stops:
        child = os.fork()
        if child == 0:
            train(with_train(checkpoint_every=1), tiny_model(), data, None, out, resume=True, device="cpu")
            os._exit(0)
        while not any(checkpoint.iteration_of(path) >= stop for path in checkpoint.checkpoints(out)):
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    what, folder, out, *numbers = sys.argv[1:]
    torch.set_num_threads(1)
    images, _ = datasets(Path(folder))
    if what == "kill":
        train_and_kill(images, Path(out), [int(number) for number in numbers])
    else:
        endless = with_train(iterations=100_000, log_every=1, checkpoint_every=0)
        train(replace(endless, data=replace(DATA, workers=2)), tiny_model(), images, None, Path(out), device="cpu")
