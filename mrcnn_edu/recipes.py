"""What the paper's experiments are made of: its schedules, sizes and models, and the same in small for drawn shapes.

Chapter 17 (the ablations). Paper: Sections 3.1 and 5, Appendices A and B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mrcnn_edu.config import (
    BoxHeadConfig,
    Config,
    DataConfig,
    KeypointHeadConfig,
    LossWeights,
    MaskHeadConfig,
    ModelConfig,
    RoILayer,
    RoIMode,
    TrainConfig,
)
from mrcnn_edu.presets import MODELS, PRESETS

Procedure = Literal["stagewise", "four-step", "end-to-end"]
Data = Literal["coco", "coco-person", "cityscapes"]
Scale = Literal["toy", "coco"]
Numbers = dict[str, float]  # percent, or as its name says: "mask AP", "box AP75", "keypoint APl", "ms per image"
QUOTED = "another system, quoted by the paper; there is nothing to run"


@dataclass(frozen=True)
class Experiment:
    """One row.

    name       "table2c/roialign-mean"
    title      as the paper calls it
    paper      what the paper reports; the first number is the one that rows are compared by, mask AP where it has none
    config     the paper's schedule and model; None for a row that quotes another system
    procedure  how RPN and heads are trained
    data       which images
    weights    the backbone's start: "imagenet", or "imagenet-5k" (Appendix B, [45])
    start      the row whose trained model this one starts from, class by class
    distil     the row whose model labels the unlabelled images that this one trains on besides
    augmented  measured under test-time augmentation (Appendix B)
    few        labelled images at toy scale; None: all
    staged_toy train in the procedure's stages at toy scale too
    note       what the reader must know
    """

    name: str
    title: str
    paper: Numbers
    config: Config | None = None
    procedure: Procedure = "stagewise"
    data: Data = "coco"
    weights: Literal["imagenet", "imagenet-5k"] = "imagenet"
    start: str | None = None
    distil: str | None = None
    augmented: bool = False
    few: int | None = None
    staged_toy: bool = False
    note: str = ""

    @property
    def table(self) -> str:
        """The part of the name before the slash."""
        return self.name.split("/")[0]

    @property
    def measure(self) -> str:
        """The number by which the rows of a table are compared, such as "mask AP"."""
        return next(iter(self.paper), "mask AP")

    def at(self, scale: Scale) -> Config:
        """The configuration at a scale. Raises ValueError for a row that quotes another system."""
        if self.config is None:
            raise ValueError(f"{self.name} ({self.title}) is {QUOTED}")
        return self.config if scale == "coco" else toy_config(self.config, self.data)

    def procedure_at(self, scale: Scale) -> Procedure:
        """How RPN and heads are trained. At toy scale jointly, in half the time, unless the row is about just that."""
        return self.procedure if scale == "coco" or self.staged_toy else "end-to-end"

    def training(self, scale: Scale) -> tuple[object, ...]:
        """All that decides about the trained weights: rows in which it is equal differ in how they are measured."""
        config = self.at(scale)
        box = replace(config.model.box, nms_threshold=0.5)  # of the detections: no loss depends on it
        rest = (self.weights,) if scale == "coco" else (self.few,)  # toys are trained from scratch, on one data set
        rest += (config.data, config.train, self.procedure_at(scale), self.start, self.distil)
        return (replace(config.model, box=box), self.data if scale == "coco" else "shapes", *rest)


# ---------------------------------------------------------------------------------------------------------------------
# The paper's scale
# ---------------------------------------------------------------------------------------------------------------------

PAPER = TrainConfig()  # Section 3.1: 160k iterations of 16 images, 0.02, divided by ten at 120k
RESNEXT = replace(PAPER, batch_size=8, learning_rate=0.01)  # Section 3.1: 1 image per GPU, half the rate
UPDATED = {"iterations": 180_000, "steps": (120_000, 160_000)}  # Appendix B, "updated baseline"
JITTERED = {"iterations": 260_000, "steps": (200_000, 240_000)}  # Appendix B, "train-time augmentation"
PERSON = replace(PAPER, iterations=90_000, steps=(60_000, 80_000))  # Section 5
LONG_PERSON = {"iterations": 130_000, "steps": (100_000, 120_000)}  # Appendix B, keypoints
FINE = replace(PAPER, iterations=24_000, steps=(18_000,), batch_size=8, learning_rate=0.01)  # Appendix A
# Appendix A: 4k iterations, reduced at 3k. Its rate is not stated; this is the one that the plain run ends with.
TUNED = replace(FINE, iterations=4_000, steps=(3_000,), learning_rate=0.001)

SCALES = tuple(range(640, 801, 32))  # "randomly sampled from [640, 800] pixels", in Detectron's steps of 32
CITY_SCALES = tuple(range(800, 1025, 32))
SINGLE = DataConfig()  # Section 3.1: shorter side 800 px
JITTER = DataConfig(min_size=SCALES)
CITY = DataConfig(min_size=CITY_SCALES, max_size=2048, test_size=1024)


def model(name: str, nms: float = 0.3, **branches: object) -> ModelConfig:
    """A preset with the NMS of its section: 0.3 in Sections 3 and 4, 0.5 in Section 5 and Appendix B."""
    chosen = MODELS[name]
    return replace(chosen, box=replace(chosen.box, nms_threshold=nms), **branches)


def layered(chosen: ModelConfig, layer: RoILayer, mode: RoIMode = "mean") -> ModelConfig:
    """The model with another RoI layer in all its branches."""

    def of(branch: BoxHeadConfig | MaskHeadConfig | KeypointHeadConfig | None) -> object:
        return None if branch is None else replace(branch, layer=layer, mode=mode)

    return replace(chosen, box=of(chosen.box), mask=of(chosen.mask), keypoint=of(chosen.keypoint))


def masked(chosen: ModelConfig, **changes: object) -> ModelConfig:
    """The model with another mask branch."""
    return replace(chosen, mask=replace(chosen.mask, **changes))


C4, C4_101 = model("maskrcnn_resnet50_c4"), model("maskrcnn_resnet101_c4")
C5 = model("maskrcnn_resnet50_c5")
FPN, FPN_101 = model("maskrcnn_resnet50_fpn"), model("maskrcnn_resnet101_fpn")
X101 = model("maskrcnn_resnext101_32x8d_fpn")
X101_5, X152_5 = model("maskrcnn_resnext101_32x8d_fpn", 0.5), model("maskrcnn_resnext152_32x8d_fpn", 0.5)
NL_5 = model("maskrcnn_resnext152_32x8d_fpn_nonlocal", 0.5)
KP, KP_101 = model("keypointrcnn_resnet50_fpn", 0.5), model("keypointrcnn_resnet101_fpn", 0.5)
KP_X101, KP_MASK = model("keypointrcnn_resnext101_32x8d_fpn", 0.5), model("maskkeypointrcnn_resnet50_fpn", 0.5)
PEOPLE_BOX, PEOPLE_MASK = replace(KP, keypoint=None), replace(KP_MASK, keypoint=None)
CITY_MODEL = replace(FPN, classes=8)


# ---------------------------------------------------------------------------------------------------------------------
# Toy scale
# ---------------------------------------------------------------------------------------------------------------------

TOY_SIDE = 96  # px, of the drawn images, whose objects are 31 to 65 px: two to four cells of stride 16
TOY_ITERATIONS = 240  # of 4 images, for the schedule that a section begins with: half a minute of one core
SCHEDULES = {"coco": PAPER.iterations, "coco-person": PERSON.iterations, "cityscapes": FINE.iterations}
# Ten layers stand for 50, eighteen for 101. ResNeXt begins at 50 layers; a narrow one stands for 101 and for 152.
TOY_BODIES = {
    "resnet50": ("resnet10", 16),
    "resnet101": ("resnet18", 16),
    "resnext101_32x8d": ("resnext50_32x4d", 16),
    "resnext152_32x8d": ("resnext50_32x4d", 32),
}
# At stride 32 images are shown twice as large: objects of as many cells as at stride 16, not of one or two.
TOY_ENLARGED = {"c5": 2.0}


def toy_config(config: Config, data: Data) -> Config:
    """An experiment in small, for six classes of drawn shapes: what the row varies stays, all else is one for all rows.

    Layers, branches, losses, NMS and iterations relative to the section's schedule are the row's own. The networks are
    slim and trained from scratch, as ``maskrcnn_shapes`` is, on the easy world of ``data.flat``: on harder images so
    few iterations of so few rois teach nothing, and rows that have learned nothing cannot differ.
    """
    demo, big = PRESETS["maskrcnn_shapes"], config.model
    features = big.backbone.features
    enlarged = TOY_ENLARGED.get(features, 1.0)
    architecture, width = TOY_BODIES[big.backbone.architecture]
    levels = replace(
        demo.model.backbone, architecture=architecture, width=width, features=features, norm="batch", channels=32
    )
    sizes = tuple(size * enlarged for size in (28.0, 40.0, 56.0))  # px
    rpn = replace(demo.model.rpn, pre_nms=(100, 50), post_nms=(40, 20))
    small = replace(
        demo.model,
        backbone=replace(levels, non_local=big.backbone.non_local),
        rpn=replace(rpn, anchor_sizes=tuple((s,) for s in sizes) if features == "fpn" else (sizes,)),
        box=replace(big.box, rois_per_image=16, fc=(64, 64) if big.box.fc else ()),
        mask=None if big.mask is None else toy_mask(big.mask),
        keypoint=None if big.keypoint is None else replace(big.keypoint, **TOY_KEYPOINT),
        head_norm="batch",  # learns faster than the demo's, and here the time is short
    )
    side = round(TOY_SIDE * enlarged)
    smallest = [round(side * size / max(config.data.min_size)) for size in config.data.min_size]
    pixels = replace(demo.data, min_size=tuple(sorted(set(smallest))), max_size=side, test_size=side, workers=0)
    iterations = round(TOY_ITERATIONS * config.train.iterations / SCHEDULES[data])
    train = replace(TOY_TRAIN, iterations=iterations, warmup_iterations=round(0.08 * iterations))
    return Config(small, pixels, train)


# The rate is that of the small trainings in the book. Nothing here follows the demo, whose tuning goes on: results are
# stored, and belong to these values.
TOY_TRAIN = TrainConfig(
    batch_size=4,
    optimiser="adamw",
    learning_rate=1e-2,
    betas=(0.9, 0.98),
    weight_decay=0.02,
    schedule="cosine",
    loss_weights=LossWeights(rpn_box=3.0, box=2.0, keypoint=0.7),
    clip_norm=5.0,
    average=0.998,
    precision="fp32",
    checkpoint_every=0,
)
TOY_KEYPOINT = {"joints": 7, "labels": (6,), "convs": (32, 32, 32), "rois_per_image": 6}


def toy_mask(big: MaskHeadConfig) -> MaskHeadConfig:
    """The mask branch in small, of the same kind."""
    convs = (32, 32, 32) if big.convs else ()
    deconv = None if big.deconv is None else 32
    return replace(big, convs=convs, deconv=deconv, fc=(128,) * len(big.fc), rois_per_image=6)
