"""A trained model as one file that needs nothing else: its weights, its configuration and the names of its classes.

Chapter 13 (training).

The format is safetensors: named tensors and a few strings, no code. ``checkpoint`` is for continuing a run,
this for using and publishing what came out of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from mrcnn_edu import __version__
from mrcnn_edu.config import ModelConfig
from mrcnn_edu.data.coco import CategoryMap
from mrcnn_edu.fields import from_json, to_json
from mrcnn_edu.inference import check_weights
from mrcnn_edu.models.mask_rcnn import MaskRCNN, build_model
from mrcnn_edu.training.checkpoint import check_state, write_atomically

MAX_CONFIG = 64 * 1024  # characters; a real one has about three thousand
MAX_CATEGORIES = 4 * 1024 * 1024


def export_weights(model: MaskRCNN, path: Path | str, categories: CategoryMap) -> Path:
    """Write the model's weights, ``model.config`` and the categories to a safetensors file; its path.

    Raises FloatingPointError for weights that are not finite, OSError when the file cannot be written.
    """
    path = Path(path)
    check_weights(model)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    metadata = {
        "format": "pt",
        "mrcnn_edu": __version__,
        "config": json.dumps(to_json(model.config)),
        "categories": json.dumps(categories.to_json()),
    }
    write_atomically(path, to_bytes(tensors, metadata))
    return path


def load_model(path: Path | str) -> tuple[MaskRCNN, CategoryMap]:
    """The model in a file from ``export_weights``, on the CPU and in evaluation mode, and its categories.

    The model is built only when the names and shapes of the file's tensors are those of the model it describes, so that
    no small file can ask for much memory. Raises OSError for a file that cannot be read, ValueError for one that is
    damaged or was not made by ``export_weights``, FloatingPointError for weights that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            config = _read_json(metadata, "config", MAX_CONFIG)
            categories = _read_json(metadata, "categories", MAX_CATEGORIES)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a file is no dict
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a weights file of this package: {error}") from error
    try:
        config = from_json(ModelConfig, config)
        categories = CategoryMap.from_json(categories)
        with torch.device("meta"):  # shapes without memory
            expected = build_model(config).state_dict()
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path} describes no model that can be built: {error}") from error
    if len(categories.names) != config.classes:
        raise ValueError(f"{path} names {len(categories.names)} categories for a model of {config.classes} classes")
    check_state(expected, tensors, str(path))
    model = build_model(config)
    model.load_state_dict(tensors)
    check_weights(model)
    return model.eval(), categories


def _read_json(metadata: dict[str, str], name: str, limit: int) -> Any:
    text = metadata.get(name)
    if text is None:
        raise ValueError(f"its metadata lack {name!r}")
    if len(text) > limit:
        raise ValueError(f"the {name} in its metadata have {len(text)} characters, more than {limit}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the {name} in its metadata are not JSON: {error}") from error
