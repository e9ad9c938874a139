"""What a training costs in full, a row of the paper or one of your own: hours and memory, from published rates.

Chapter 17 (the ablations), Chapter 19 (many GPUs).
"""

from __future__ import annotations

from dataclasses import dataclass

from mrcnn_edu.config import Config
from mrcnn_edu.experiments import trained_as
from mrcnn_edu.recipes import Experiment

RATES_FROM = "detectron2's model zoo: 8 V100 GPUs, 16 images per iteration"
# (architecture, features, keypoints instead of masks): seconds per iteration, GB per GPU with 2 images
RATES = {
    ("resnet50", "fpn", False): (0.261, 3.4),
    ("resnet101", "fpn", False): (0.340, 4.6),
    ("resnext101_32x8d", "fpn", False): (0.690, 7.2),
    ("resnet50", "c4", False): (0.584, 5.2),
    ("resnet101", "c4", False): (0.652, 6.3),
    ("resnet50", "c5", False): (0.471, 6.5),  # of its dilated form, so more than this one needs
    ("resnet50", "fpn", True): (0.315, 5.0),
    ("resnet101", "fpn", True): (0.390, 6.1),
    ("resnext101_32x8d", "fpn", True): (0.738, 8.7),
}
RPN_ALONE = {"fpn": 0.186 / 0.261, "c4": 0.130 / 0.584, "c5": 0.130 / 0.584}  # of its R50 model's rate; c5: as c4
DEEPER = 152 / 101  # ResNeXt-152 by its layers: no rate of it is published without other changes

# Images per second of one GPU, relative to a V100, with the same or nearly the same code.
GPUS = {
    "v100": (1.0, RATES_FROM),
    "a100": (24 / 16, "NVIDIA DeepLearningExamples 21.12, Mask R-CNN in PyTorch: 16 and 24 images/s on one GPU"),
    "h100": (24 / 16 * 50 / 19.18, "the A100 rate times MLPerf's 50 min on 8 A100 (1.0) to 19.18 min on 8 H100 (3.0)"),
}


@dataclass(frozen=True)
class Plan:
    """What to type, and what it takes. ``hours`` and ``gigabytes`` (per GPU) are None where no rate is published."""

    command: str
    iterations: int
    stages: int
    images_per_gpu: float
    hours: float | None
    gigabytes: float | None
    sources: tuple[str, ...]

    def __str__(self) -> str:
        hours = "unknown" if self.hours is None else f"about {self.hours:.0f} h"
        memory = "unknown" if self.gigabytes is None else f"about {self.gigabytes:.0f} GB per GPU"
        stages = "" if self.stages == 1 else f" in each of {self.stages} stages"
        return (
            f"{self.command}\n  {self.iterations} iterations{stages}, {self.images_per_gpu:g} images per GPU; "
            f"time: {hours}; memory: {memory}\n  from {'; '.join(self.sources)}"
        )


def plan(experiment: Experiment, gpus: int = 8, gpu: str = "h100", folder: str = "DATA") -> Plan:
    """The command that runs a row at the paper's scale, and its expected cost for one seed.

    gpus, gpu  how many of which kind, a key of ``GPUS``
    folder     where the data are, for the command

    Hours are iterations times the published rate, scaled by images, number and kind of GPU; training alone, without the
    proposals in between and without the rows it starts from. A stage of the heads is counted as if its RPN ran too, so
    stage-wise hours are an upper bound. Raises ValueError for a quoted row, an unknown GPU, and a number of GPUs that
    does not divide the batch.
    """
    if gpus < 1 or gpu not in GPUS:
        raise ValueError(f"a plan is for one or more of {', '.join(GPUS)}, got {gpus} of {gpu!r}")
    config = experiment.at("coco")
    if config.train.batch_size % gpus:
        raise ValueError(
            f"{gpus} GPUs cannot share the {config.train.batch_size} images of an iteration of {experiment.name}"
        )
    source = trained_as(experiment, "coco")
    speed, source_of_speed = GPUS[gpu]
    seconds, gigabytes = rate(config)
    share = config.train.batch_size / gpus
    times = {"end-to-end": 1.0, "stagewise": 1.0, "four-step": 2.0}[source.procedure]
    rpn = 0.0 if source.procedure == "end-to-end" else RPN_ALONE[config.model.backbone.features] * times
    work = (times + rpn) * config.train.iterations * config.train.batch_size / 16
    weights = "imagenet5k.pth" if experiment.weights == "imagenet-5k" else f"{config.model.backbone.architecture}.pth"
    command = (
        f"torchrun --standalone --nproc_per_node={gpus} -m mrcnn_edu reproduce {experiment.name} --scale coco "
        f"--data {folder} --backbone {weights}"
    )
    if experiment.start is not None:
        command += " --coco COCO"
    if experiment.distil is not None:
        command += " --unlabelled UNLABELLED.json"
    return Plan(
        command,
        config.train.iterations,
        {"end-to-end": 1, "stagewise": 2, "four-step": 4}[source.procedure],
        share,
        work * seconds * 8 / gpus / speed / 3600,
        gigabytes * max(share, 1) / 2,
        tuple(dict.fromkeys((RATES_FROM, source_of_speed))),
    )


def rate(config: Config) -> tuple[float, float]:
    """Seconds per iteration of 16 images on 8 V100, and GB per GPU with 2 images, of the published model most alike."""
    body = config.model.backbone
    keypoints = config.model.keypoint is not None
    architecture = "resnext101_32x8d" if body.architecture == "resnext152_32x8d" else body.architecture
    seconds, gigabytes = RATES[architecture, body.features, keypoints]
    if body.architecture == "resnext152_32x8d":
        return seconds * DEEPER, gigabytes * DEEPER
    return seconds, gigabytes


def training_plan(config: Config, images: int, gpus: int, gpu: str, price: float | None = None) -> str:
    """What a training takes, before anything starts: schedule, global batch, memory per GPU, hours and cost, in lines.

    images     in the training data
    gpus, gpu  how many of which kind, a key of ``GPUS``
    price      of one GPU for an hour, in whatever currency

    Memory is that of weights, gradients and optimiser, counted, and the published peak of the model most alike with 2
    images per GPU, in proportion to the images at once. Raises ValueError where the GPUs do not divide the batch.
    """
    import torch  # here, so that the plans of experiments need not wait for it

    from mrcnn_edu.models.mask_rcnn import build_model
    from mrcnn_edu.training.schedule import in_words

    train = config.train
    if gpus < 1 or gpu not in GPUS:
        raise ValueError(f"a plan is for one or more of {', '.join(GPUS)}, got {gpus} of {gpu!r}")
    if train.batch_size % (gpus * train.accumulate):
        raise ValueError(
            f"{gpus} GPUs x {train.accumulate} parts (train.accumulate) cannot share the {train.batch_size} images of "
            "an iteration; choose others, or another --batch"
        )
    with torch.device("meta"):  # shapes without memory
        model = build_model(config.model)
    weights = sum(value.numel() for value in model.parameters())
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    copies = 4 * (weights * (2 if train.average else 1) + trained * (2 if train.optimiser == "sgd" else 3)) / 2**30
    at_once = train.batch_size // (gpus * train.accumulate)
    lines = [
        in_words(train, images, gpus),
        f"{weights / 1e6:.1f} M weights, {trained / 1e6:.1f} M of them trained: {copies:.2f} GiB with gradients and "
        f"optimiser on each GPU",
    ]
    try:
        seconds, gigabytes = rate(config)
    except KeyError:
        return "\n".join([*lines, "memory, hours and cost: no rate is published for a model like this one"])
    speed, source = GPUS[gpu]
    hours = train.iterations * seconds * train.batch_size / 16 * 8 / gpus / speed / 3600
    cost = "" if price is None else f", {hours * gpus * price:,.0f} at {price:g} per GPU and hour"
    lines += [
        f"about {gigabytes * max(at_once, 1) / 2:.1f} GB per GPU with {at_once} images at once",
        f"about {hours:.1f} h on {gpus} {gpu.upper()}: {hours * gpus:.0f} GPU hours{cost}",
        f"from {'; '.join(dict.fromkeys((RATES_FROM, source)))}",
    ]
    return "\n".join(lines)
