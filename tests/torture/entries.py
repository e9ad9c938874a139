"""Every name that ``mrcnn_edu`` exports, called as it should be but for one argument that is something else.

Either it is taken, or the answer is a sentence of the package that was raised on purpose; what Python, NumPy or PyTorch
say about a value that got too far is a fault. Objects that only have to behave like a data set or a model are left out.
"""

from __future__ import annotations

import functools
import math
import random
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from training_runs import CONFIG, MODEL, TRAIN, datasets, tiny_model

import mrcnn_edu
from mrcnn_edu.config import BackboneConfig, BoxHeadConfig, KeypointHeadConfig, LossWeights, MaskHeadConfig, RPNConfig
from mrcnn_edu.conventions import Conventions
from mrcnn_edu.data.shapes import write
from torture.harness import Area, refused

Call = tuple[Callable, dict[str, Any]]

JUNK: list[Any] = [
    None,
    0,
    1,
    -1,
    7,
    2**40,
    0.5,
    -0.5,
    math.nan,
    math.inf,
    True,
    "",
    "nothing",
    "../x",
    "\0",
    b"bytes",
    [],
    [1],
    [None],
    (),
    (1, 2),
    {},
    {"a": 1},
    {7: None},
    set(),
    object(),
    Path("nowhere"),
    np.zeros(3),
    np.zeros((4, 4, 3), np.uint8),
    Image.new("L", (4, 4)),
    torch.zeros(()),
    torch.zeros(0),
    torch.zeros(3),
    torch.zeros(2, 4),
    torch.full((2, 4), math.nan),
    torch.zeros(0, 4),
    torch.zeros(2, dtype=torch.int64),
    torch.zeros(2, dtype=torch.bool),
    torch.zeros(2, 9, 9, dtype=torch.bool),
    torch.zeros(2, 4, device="meta"),
    torch.rand(1, 3, 32, 32),
    torch.zeros(3, 8, 8),
    int,
    print,
]


@functools.cache
def data() -> Any:
    """Two small data sets, made once in a process."""
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    return datasets(write(folder / "data", train=2, val=2, size=64, seed=1))


def rows(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two boxes, and more."""
    return {"boxes": torch.tensor([[1.0, 1, 9, 9], [2, 2, 20, 20]]), **more}


def fields_of(kind: type) -> Call:
    """A config, from the defaults of all its fields."""
    good = kind()
    return kind, {field.name: getattr(good, field.name) for field in fields(kind)}


def entries() -> dict[str, Call]:
    """What is called, and with which good arguments."""
    detections = rows(scores=torch.tensor([0.9, 0.8]), labels=torch.tensor([1, 2]), mask_probs=torch.rand(2, 8, 8))
    target = rows(labels=torch.tensor([1, 2]), masks=torch.ones(2, 32, 32, dtype=torch.bool))
    image = torch.rand(3, 32, 32)
    images, annotations = data()[1].images_dir, data()[1].annotations_file
    configs = (BackboneConfig, BoxHeadConfig, Conventions, KeypointHeadConfig, LossWeights, MaskHeadConfig, RPNConfig,
               mrcnn_edu.Config, mrcnn_edu.DataConfig, mrcnn_edu.ModelConfig, mrcnn_edu.TrainConfig)  # fmt: skip
    return {
        **{kind.__name__: fields_of(kind) for kind in configs},
        "CocoDataset": (mrcnn_edu.CocoDataset, {"images_dir": images, "annotations_file": annotations}),
        "Target": (mrcnn_edu.Target, target),
        "Target.from_dict": (lambda **values: mrcnn_edu.Target.from_dict(values), target),
        "Detections": (mrcnn_edu.Detections, detections),
        "Proposals": (mrcnn_edu.Proposals, rows(scores=torch.rand(2))),
        "Samples": (mrcnn_edu.Samples, rows(labels=torch.tensor([0, 1]), matched=torch.tensor([0, 1]))),
        "ImageBatch": (
            mrcnn_edu.ImageBatch,
            {"pixels": torch.rand(1, 3, 32, 32), "sizes": [(32, 32)], "original_sizes": [(32, 32)]},
        ),
        "ImageBatch.collate": (
            mrcnn_edu.ImageBatch.collate,
            {"images": [image], "original_sizes": [(32, 32)], "multiple": 32},
        ),
        "preset": (mrcnn_edu.preset, {"name": "maskrcnn_shapes", "conventions": "paper"}),
        "build_model": (mrcnn_edu.build_model, {"model": MODEL, "conventions": "paper"}),
        "load_model": (mrcnn_edu.load_model, {"path": "nothing.safetensors"}),
        "predict": (
            mrcnn_edu.predict,
            {"model": _model(), "images": image, "min_size": 32, "max_size": 64, "batch_size": 1},
        ),
        "draw": (
            mrcnn_edu.draw,
            {
                "image": image,
                "instances": mrcnn_edu.Target(**target),
                "categories": ["a", "b"],
                "score_threshold": 0.5,
                "size": 2.0,
            },
        ),
        "evaluate": (
            mrcnn_edu.evaluate,
            {"dataset": data()[1], "predictions": {}, "kinds": ["box"], "area_scale": 1.0},
        ),
        "train": (_train, {"config": _config(), "out": None, "device": "cpu"}),
    }


@functools.cache
def _model() -> Any:
    return tiny_model()


def _config() -> Any:
    return replace(CONFIG, train=replace(TRAIN, iterations=1, checkpoint_every=0))


def _train(config: Any, out: Any, device: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run" if out is None else out
        return mrcnn_edu.train(config, tiny_model(), data()[0], None, out, progress=False, device=device)


LEFT_OUT = {("predict", "model"), ("evaluate", "dataset")}  # whatever behaves like one
PATHS = {("CocoDataset", "images_dir"), ("CocoDataset", "annotations_file"), ("load_model", "path"), ("train", "out")}
KEPT = {("train", "out"): (str, Path)}  # else a folder of that name would be made


def case(number: int, folder: Path) -> str:
    """One call with one argument replaced."""
    draw = random.Random(number)
    torch.manual_seed(number)
    known = entries()
    name = list(known)[number % len(known)]
    call, good = known[name]
    field = draw.choice([field for field in good if (name, field) not in LEFT_OUT])
    value = draw.choice(JUNK)
    if isinstance(value, KEPT.get((name, field), ())):
        return "left out"
    try:
        call(**good | {field: value})
    except Exception as error:
        if (name, field) in PATHS and isinstance(error, TypeError) and "PathLike" in str(error):
            return f"{name} refused, by Python's own sentence"  # which says what a path is
        return f"{name} {refused(error)}"
    return f"{name} taken"


AREA = Area("entries", "every exported name with one argument that is something else", case,
            short=300, full=10_000, memory=512, chunk=500)  # fmt: skip
