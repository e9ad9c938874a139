"""The demo: draw a data set, train a small Mask R-CNN on it, measure it on images it has not seen, and show them.

Chapter 13 (training end to end). It uses nothing but the package's public functions, in the order a project would.
Started by torchrun, as ``make demo`` does, its processes share the work: the layers of so small a model are too short
to be divided well among threads, a batch is not.
"""

from __future__ import annotations

import platform
import time
from collections import ChainMap
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mrcnn_edu import __version__, ops
from mrcnn_edu.config import Config
from mrcnn_edu.data import shapes
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.evaluation.measure import measure
from mrcnn_edu.evaluation.report import as_text
from mrcnn_edu.models.mask_rcnn import build_model
from mrcnn_edu.presets import preset
from mrcnn_edu.structures import Detections
from mrcnn_edu.training.checkpoint import write_json
from mrcnn_edu.training.distributed import connected
from mrcnn_edu.training.loop import train
from mrcnn_edu.training.randomness import seed_rng
from mrcnn_edu.visualize import sheet

WARMUP = 0.08  # of the iterations
SHOWN = 12  # held-out images on the sheet
AREA_SCALE = 0.25  # COCO's images are about four times as wide, so "large" is from 24 px here instead of 96


def run(
    out: Path,
    data: Path | None = None,
    seed: int = 0,
    iterations: int | None = None,
    smoke: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Everything from nothing to ``out/sheet.png`` and ``out/metrics.json``; the content of the latter.

    out         folder of the run; one that was stopped goes on where it was
    data        folder of the drawn images, written if need be
    seed        of weights and training
    iterations  None: the preset's
    smoke       few images and iterations, only to see that everything works
    """
    began = time.perf_counter()
    images = {"train": 32, "val": 8} if smoke else {"train": 4000, "val": 200}
    data = data or (out / "data" if smoke else Path("data/shapes"))
    with connected(device) as world:
        print(f"Drawing {images['train']} images to train on and {images['val']} to measure on: {data}")
        world.from_first(lambda: shapes.write(data, **images) and None)
        train_data = CocoDataset(data / "train", data / "train.json")
        val_data = CocoDataset(data / "val", data / "val.json")

        config = demo_config(seed, iterations or (12 if smoke else None))
        started = (out / "config.json").exists()
        settings = config.train
        print(f"Training {settings.iterations} iterations of {settings.batch_size} images; ops: {ops.backend()}")
        if started:
            print(f"Going on with the run in {out}; for a new one choose another --out")
        seed_rng(seed)
        model = build_model(config.model)
        summary = train(config, model, train_data, None, out, resume=started, device=device)

        evaluation, predictions = measure(model, val_data, config.data, out, AREA_SCALE, world=world)
        print(as_text(evaluation))
        metrics = {
            "evaluation": evaluation.to_json(),
            "seconds": {"training": summary["seconds"], "total": time.perf_counter() - began},
            "memory_mib": sum(part or 0.0 for part in world.gather(summary["memory_mib"])),
            "iterations": settings.iterations,
            "seed": seed,
            "backend": ops.backend(),
            "processes": world.size,
            "threads": torch.get_num_threads(),
            "versions": {"mrcnn_edu": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        parts = world.to_first(predictions)
        world.from_first(lambda: leave(out, metrics, val_data, dict(ChainMap(*parts))))
    return metrics


def leave(out: Path, metrics: dict[str, Any], data: CocoDataset, predictions: dict[int, Detections]) -> None:
    """Write the numbers and the pictures, and say where they are."""
    write_json(out / "metrics.json", metrics)
    save_sheet(out / "sheet.png", data, predictions)
    print(f"Pictures: {out / 'sheet.png'}\nNumbers:  {out / 'metrics.json'}\nWeights:  {out / 'weights.safetensors'}")


def demo_config(seed: int = 0, iterations: int | None = None) -> Config:
    """The ``maskrcnn_shapes`` preset with another seed, or shortened or lengthened with its warm-up in proportion."""
    config = preset("maskrcnn_shapes")
    train = replace(config.train, seed=seed)
    if iterations is not None:
        train = replace(train, iterations=iterations, warmup_iterations=round(WARMUP * iterations))
    return replace(config, train=train)


def save_sheet(path: Path, data: CocoDataset, predictions: dict[int, Detections]) -> None:
    """The first held-out images that have instances, ground truth beside prediction."""
    chosen = [index for index in range(len(data)) if len(data.target(index))][:SHOWN]
    images, targets = zip(*(data[index] for index in chosen))
    found = [predictions[data.image_id(index)] for index in chosen]
    sheet(images, targets, found, data.categories).savefig(path, dpi=150)
