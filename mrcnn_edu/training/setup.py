"""What happens before the first iteration: check that everything fits, open the folder, set up or pick up a run.

Chapter 13 (training).
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mrcnn_edu.config import Config, TrainConfig
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.fields import to_json
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.training import checkpoint
from mrcnn_edu.training.checkpoint import Run, write_json
from mrcnn_edu.training.distributed import ALONE, World
from mrcnn_edu.training.randomness import rng_state, seed_rng
from mrcnn_edu.training.schedule import WeightAverage, build_optimiser

log = logging.getLogger(__name__)

COMPILER = "inductor"  # the backend of torch.compile


def start(
    config: Config,
    model: MaskRCNN,
    train_data: CocoDataset,
    val_data: CocoDataset | None,
    folder: Path,
    resume: bool,
    device: torch.device | str | None,
    world: World,
) -> tuple[Run, dict[str, Any]]:
    """Check that everything fits, and set up: a run at iteration 0 or at its last checkpoint, and its random state."""
    settings = config.train
    with world.together():
        where = choose_device(device, world)
        check_fits(config, model, train_data, val_data)
        check_divides(settings, world)
        prepare(model, settings, where)
    check_same(config, train_data, world)
    world.from_first(lambda: open_folder(folder, resume))
    model.train()
    for part in model.children():
        if not any(parameter.requires_grad for parameter in part.parameters()):
            part.eval()  # what a stage has frozen keeps its statistics too
    run = Run(
        model,
        build_optimiser(model, settings, config.model.conventions),
        torch.amp.GradScaler(where.type, enabled=settings.precision == "fp16"),
        WeightAverage(model, settings.average) if settings.average else None,
        world=world,
    )
    rng = pick_up(run, config, train_data, folder, world) if resume else None
    if rng is None:
        seed_rng(settings.seed, world.rank)
        rng = rng_state()
    if settings.compile:
        compile_parts(model)
    run.replica = model if world.size == 1 else replicate(model)
    world.from_first(lambda: write_json(folder / "config.json", to_json(config)))
    return run, rng


def prepare(model: MaskRCNN, settings: TrainConfig, device: torch.device) -> None:
    """Bring the model where it is trained, in its memory layout and with the batch norms asked for."""
    if settings.sync_norm:
        if device.type != "cuda":
            raise ValueError("train.sync_norm needs GPUs: PyTorch's SyncBatchNorm has no CPU form")
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # replaces the layers inside the model
    model.to(device)
    if settings.channels_last:
        check_channels_last(model, device)
        model.to(memory_format=torch.channels_last)


def replicate(model: MaskRCNN) -> DistributedDataParallel:
    """The model in DDP, which averages gradients. Frozen weights are frozen by now, so it does not wait for theirs."""
    # After its first backward pass, which may be that of a resumed run, DDP deals the gradients out to other buckets;
    # then more than two numbers are added in another order. Only where it looks for unused weights it does not.
    to_the_bit = next(model.parameters()).device.type == "cpu" and dist.get_world_size() > 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of PyTorch have another name for the option
        # Statistics of batch norms are shared where they matter, before a model is measured or left (share_buffers)
        return DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=to_the_bit
        )


def compile_parts(model: MaskRCNN) -> None:
    """Let torch.compile have the parts that are nothing but layers; the names of the weights stay.

    What lies between them, matching, sampling and NMS, has other sizes for each image.
    """
    for part in (model.backbone, model.box_head, model.mask_head, model.keypoint_head):
        if part is not None:
            part.compile(backend=COMPILER)


def pick_up(run: Run, config: Config, train_data: CocoDataset, folder: Path, world: World) -> dict[str, Any] | None:
    """Continue from the last checkpoint in the folder, which the first process reads for all; this one's random state.

    None: there is no checkpoint yet, or another number of processes made it. The data go on all the same, since their
    order does not depend on how many share them.
    """
    found = world.from_first(lambda: checkpoint.load(folder) if checkpoint.checkpoints(folder) else None)
    if found is None:
        log.warning("there is no checkpoint in %s yet: starting from the first iteration", folder)
        return None
    state, run.saved = found
    checkpoint.restore(run, state, config, train_data.categories, checkpoint.fingerprint(train_data))
    if len(state["rng"]) == world.size:
        return state["rng"][world.rank]
    log.warning(
        "%d processes made the checkpoint, now there are %d: the run continues, but draws other random numbers",
        len(state["rng"]),
        world.size,
    )
    seed_rng(config.train.seed + run.iteration, world.rank)
    return rng_state()


def check_divides(settings: TrainConfig, world: World) -> None:
    """Refuse a batch that cannot be shared out evenly."""
    parts = world.size * settings.accumulate
    if settings.batch_size % parts:
        raise ValueError(
            f"train.batch_size {settings.batch_size} cannot be divided by {world.size} processes x "
            f"{settings.accumulate} parts (train.accumulate); choose a multiple of {parts}"
        )


def check_same(config: Config, train_data: CocoDataset, world: World) -> None:
    """Refuse processes that were started with other settings, or see other data, than the first."""
    seen = world.gather((to_json(config), checkpoint.fingerprint(train_data)))
    with world.together():
        difference = checkpoint.first_difference(seen[0][0], seen[world.rank][0], checkpoint.FREE)
        if difference is not None:
            raise ValueError(f"process 0 has {difference[0]} = {difference[1]!r}, this one {difference[2]!r}")
        if seen[0][1] != seen[world.rank][1]:
            raise ValueError(f"process 0 trains on {seen[0][1]}, this one on {seen[world.rank][1]}")


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


def choose_device(device: torch.device | str | None, world: World = ALONE) -> torch.device:
    """The device asked for, or the GPU if there is one; among several processes of a host each has its own GPU."""
    asked = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        chosen = torch.device(asked)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"device must be None or a name such as 'cpu', 'cuda' or 'cuda:1', got {device!r}") from error
    if chosen.type != "cuda":
        return chosen
    if not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but PyTorch finds no GPU; choose 'cpu'")
    if world.size > 1:
        if chosen.index is not None or world.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"each process of a host needs its own GPU: this one is number {world.local_rank} of its host, which "
                f"has {torch.cuda.device_count()}; start no more than that, and ask for device 'cuda'"
            )
        chosen = torch.device("cuda", world.local_rank)
    if chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(chosen)
    return chosen


def check_channels_last(model: nn.Module, device: torch.device) -> None:
    """Refuse what ends in a crash: on a CPU, oneDNN's gradient of one kind of convolution writes past its memory.

    That kind is 1x1 with a stride over fewer than 8 channels, channels last (found with PyTorch 2.14).
    """
    for name, module in model.named_modules():
        strided = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and max(module.stride) > 1
        if device.type == "cpu" and strided and module.in_channels < 8:
            raise ValueError(
                f"{name} has a stride and only {module.in_channels} channels, which PyTorch cannot train channels last "
                f"on a CPU; set train.channels_last to False, or model.backbone.width to 8 or more"
            )
