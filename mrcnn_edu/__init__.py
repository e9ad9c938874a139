"""Mask R-CNN, built piece by piece: the library of the book.

The names below are imported when they are first used, so that ``import mrcnn_edu`` and ``mrcnn-edu --help`` do not wait
for PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mrcnn_edu.config import Config, DataConfig, ModelConfig, TrainConfig
    from mrcnn_edu.data.coco import CocoDataset
    from mrcnn_edu.evaluation.coco import evaluate
    from mrcnn_edu.inference import predict
    from mrcnn_edu.models.mask_rcnn import build_model
    from mrcnn_edu.presets import preset
    from mrcnn_edu.structures import Detections, ImageBatch, Proposals, Samples, Target
    from mrcnn_edu.training.export import load_model
    from mrcnn_edu.training.loop import train
    from mrcnn_edu.visualize import draw

__version__ = "0.1.0"

__all__ = [
    "CocoDataset",
    "Config",
    "DataConfig",
    "Detections",
    "ImageBatch",
    "ModelConfig",
    "Proposals",
    "Samples",
    "Target",
    "TrainConfig",
    "build_model",
    "draw",
    "evaluate",
    "load_model",
    "predict",
    "preset",
    "train",
]

_HOME = {
    "config": ("Config", "DataConfig", "ModelConfig", "TrainConfig"),
    "data.coco": ("CocoDataset",),
    "evaluation.coco": ("evaluate",),
    "inference": ("predict",),
    "models.mask_rcnn": ("build_model",),
    "presets": ("preset",),
    "structures": ("Detections", "ImageBatch", "Proposals", "Samples", "Target"),
    "training.export": ("load_model",),
    "training.loop": ("train",),
    "visualize": ("draw",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"mrcnn_edu.{module}"), name)
    raise AttributeError(f"module 'mrcnn_edu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
