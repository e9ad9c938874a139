"""What happens before the first iteration: check that everything fits, open the folder, set up or pick up a run.

Chapter 13 (training).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from mrcnn_edu.config import Config, to_json
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.training import checkpoint
from mrcnn_edu.training.checkpoint import Run, write_json
from mrcnn_edu.training.randomness import rng_state, seed_rng
from mrcnn_edu.training.schedule import WeightAverage, build_optimiser

log = logging.getLogger(__name__)


def start(
    config: Config,
    model: MaskRCNN,
    train_data: CocoDataset,
    val_data: CocoDataset | None,
    folder: Path,
    resume: bool,
    device: torch.device | str | None,
) -> tuple[Run, dict[str, Any]]:
    """Check that everything fits, and set up: a run at iteration 0 or at its last checkpoint, and its random state."""
    settings, where = config.train, choose_device(device)
    check_fits(config, model, train_data, val_data)
    open_folder(folder, resume)
    model.to(where)
    if settings.channels_last:
        check_channels_last(model, where)
        model.to(memory_format=torch.channels_last)
    model.train()
    for part in model.children():
        if not any(parameter.requires_grad for parameter in part.parameters()):
            part.eval()  # what a stage has frozen keeps its statistics too
    run = Run(
        model,
        build_optimiser(model, settings, config.model.conventions),
        torch.amp.GradScaler(where.type, enabled=settings.precision == "fp16"),
        WeightAverage(model, settings.average) if settings.average else None,
    )
    if resume and checkpoint.checkpoints(folder):
        state, run.saved = checkpoint.load(folder)
        checkpoint.restore(run, state, config, train_data.categories, checkpoint.fingerprint(train_data))
        rng = state["rng"]
    else:
        if resume:
            log.warning("there is no checkpoint in %s yet: starting from the first iteration", folder)
        seed_rng(settings.seed)
        rng = rng_state()
    write_json(folder / "config.json", to_json(config))
    return run, rng


def check_fits(config: Config, model: MaskRCNN, train_data: CocoDataset, val_data: CocoDataset | None) -> None:
    """Refuse a model that is not the config's and data with other categories than the model's."""
    difference = checkpoint.first_difference(to_json(model.config), to_json(config.model))
    if difference is not None:
        field, built, wanted = difference
        raise ValueError(f"the model was built with {field} = {built!r}, but config.model says {wanted!r}")
    categories, branch = train_data.categories, config.model.keypoint
    if len(categories.names) != config.model.classes:
        raise ValueError(
            f"the data have {len(categories.names)} categories, the model {config.model.classes} classes; "
            f"set model.classes to {len(categories.names)}"
        )
    if branch is not None and branch.joints != train_data.joints:
        raise ValueError(f"the data have {train_data.joints} joints per keypoint class, the model {branch.joints}")
    if not len(train_data):
        raise ValueError("there are no training images")
    if val_data is not None and val_data.categories.to_json() != categories.to_json():
        raise ValueError("the validation data have other categories than the training data")


def open_folder(folder: Path, resume: bool) -> None:
    """Make the folder of a run; one that holds a run already is refused unless that is to be resumed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot make the folder {folder} for the run: {error.strerror}") from error
    log_file = folder / "metrics.jsonl"
    used = checkpoint.checkpoints(folder) or (log_file.exists() and log_file.stat().st_size)
    if used and not resume:
        raise FileExistsError(f"{folder} holds a run already; resume it, or choose another folder")


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, or the GPU if there is one."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but PyTorch finds no GPU; choose 'cpu'")
    return chosen


def check_channels_last(model: torch.nn.Module, device: torch.device) -> None:
    """Refuse what ends in a crash: on a CPU, oneDNN's gradient of one kind of convolution writes past its memory.

    That kind is 1x1 with a stride over fewer than 8 channels, channels last (found with PyTorch 2.14).
    """
    for name, module in model.named_modules():
        strided = isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1) and max(module.stride) > 1
        if device.type == "cpu" and strided and module.in_channels < 8:
            raise ValueError(
                f"{name} has a stride and only {module.in_channels} channels, which PyTorch cannot train channels last "
                f"on a CPU; set train.channels_last to False, or model.backbone.width to 8 or more"
            )
