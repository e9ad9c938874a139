"""Weights that others publish, by name: the models they belong to, the download and its checksum.

Chapter 18 (real data and transfer). Source: the weight entries of torchvision.models and what they state.

A file of torchvision's is taken from its cache, from a path of your own, or from the network, and its SHA-256 must
begin with the eight digits in its published name. detectron2 and Detectron state no checksums: bring their files.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrcnn_edu.cli import read_config
from mrcnn_edu.config import BackboneConfig, BoxHeadConfig, DataConfig, KeypointHeadConfig, ModelConfig, RPNConfig
from mrcnn_edu.conventions import TORCHVISION
from mrcnn_edu.data.coco import CategoryMap
from mrcnn_edu.data.coco_json import Category
from mrcnn_edu.fields import lookup
from mrcnn_edu.models.mask_rcnn import MaskRCNN, build_model
from mrcnn_edu.models.unshared import Unshared
from mrcnn_edu.presets import MODELS
from mrcnn_edu.training.export import load_model
from mrcnn_edu.training.stages import load_stages
from mrcnn_edu.unpickling import read_torch, read_weights
from mrcnn_edu.weights import load_detectron, load_detectron2, load_imagenet, load_torchvision

PREFIX = "torchvision:"
ZOOS = {"detectron2": load_detectron2, "detectron1": load_detectron}  # files without checksums, by the code they are of


@dataclass(frozen=True)
class Published:
    """One set of weights: torchvision's name of it, the model it fits, and the AP on val2017 that is stated for it."""

    entry: str
    model: ModelConfig
    ap: dict[str, float]


# Its first files were trained with an eps of 0 in the frozen norms; the others have torch's own.
_V1 = ModelConfig(classes=90, conventions=replace(TORCHVISION, frozen_norm_eps=0.0))
_V2 = ModelConfig(
    classes=90,
    conventions=TORCHVISION,
    backbone=BackboneConfig(norm="batch", frozen_stages=0),
    rpn=RPNConfig(convs=2),
    box=BoxHeadConfig(convs=(256,) * 4, fc=(1024,)),
    head_norm="batch",
)
_PERSON = replace(_V1, classes=1, mask=None, keypoint=KeypointHeadConfig())
_LEGACY = replace(_PERSON, conventions=TORCHVISION)

PUBLISHED = {
    "maskrcnn_resnet50_fpn": Published("MaskRCNN_ResNet50_FPN_Weights.COCO_V1", _V1, {"box": 37.9, "mask": 34.6}),
    "maskrcnn_resnet50_fpn_v2": Published("MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1", _V2, {"box": 47.4, "mask": 41.8}),
    "fasterrcnn_resnet50_fpn": Published(
        "FasterRCNN_ResNet50_FPN_Weights.COCO_V1", replace(_V1, mask=None), {"box": 37.0}
    ),
    "fasterrcnn_resnet50_fpn_v2": Published(
        "FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1", replace(_V2, mask=None), {"box": 46.7}
    ),
    "keypointrcnn_resnet50_fpn": Published(
        "KeypointRCNN_ResNet50_FPN_Weights.COCO_V1", _PERSON, {"box": 54.6, "keypoint": 65.0}
    ),
    "keypointrcnn_resnet50_fpn_legacy": Published(
        "KeypointRCNN_ResNet50_FPN_Weights.COCO_LEGACY", _LEGACY, {"box": 50.6, "keypoint": 61.1}
    ),
}


def load_published(name: str, file: Path | None = None) -> tuple[MaskRCNN, CategoryMap]:
    """A published model, on the CPU and in evaluation mode, and its categories.

    name  a key of ``PUBLISHED``
    file  the downloaded file, where there is no network; None: torchvision's cache, or the download

    The category ids are COCO's; the eleven numbers that it skips are classes too, called "N/A". Raises ValueError for
    an unknown name, a file with another checksum or other weights, OSError where there is neither file nor network,
    ModuleNotFoundError without torchvision.
    """
    chosen = lookup("published model", PUBLISHED, name)
    state, meta = read_entry(chosen.entry, file)
    model = build_model(chosen.model)
    load_torchvision(model, state)
    return model.eval(), cocos_categories(meta)


def load_from_zoo(code: str, name: str, file: Path | None) -> tuple[MaskRCNN, CategoryMap]:
    """A model that detectron2 or Detectron trained on COCO, on the CPU and in evaluation mode, and COCO's categories.

    code  a key of ``ZOOS``
    name  of a preset without the code's name at its end, "maskrcnn_resnet50_fpn"
    file  the ``.pkl`` of the zoo

    Raises ValueError for an unknown name and for other weights, OSError for a file that cannot be read,
    ModuleNotFoundError without torchvision, which knows COCO's categories.
    """
    from torchvision.models import get_weight

    suffix = f"_{code}"
    known = {key.removesuffix(suffix): model for key, model in MODELS.items() if key.endswith(suffix)}
    config = lookup(f"model of {code}", known, name)
    if file is None:
        raise ValueError(f"{code} states no checksums, so nothing is downloaded: name its file as {code}:{name}:FILE")
    model = build_model(config)
    ZOOS[code](model, read_weights(file))
    meta = get_weight(
        PUBLISHED["keypointrcnn_resnet50_fpn" if config.classes == 1 else "maskrcnn_resnet50_fpn"].entry
    ).meta
    named = [category for category in cocos_categories(meta).categories if category.name != "N/A"]
    if config.classes == 1:
        named = [category for category in named if category.name == "person"]
    return model.eval(), CategoryMap(tuple(named))


def cocos_categories(meta: dict[str, Any]) -> CategoryMap:
    """The categories that torchvision states for weights, without the background."""
    joints, names = tuple(meta.get("keypoint_names", ())), meta["categories"][1:]
    return CategoryMap(tuple(Category(number, name, joints) for number, name in enumerate(names, start=1)))


def imagenet_state(architecture: str, file: Path | None = None) -> dict[str, Tensor]:
    """torchvision's ImageNet weights (its first version) of a ResNet or ResNeXt, by the name it has in both packages.

    Raises as ``load_published`` does.
    """
    from torchvision.models import get_model_weights

    try:
        entries = get_model_weights(architecture)
    except ValueError as error:
        raise ValueError(f"torchvision publishes no weights of {architecture!r}") from error
    return read_entry(f"{entries.__name__}.IMAGENET1K_V1", file)[0]


def read_entry(entry: str, file: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of one of torchvision's weight entries, its checksum compared, and what torchvision says of it."""
    from torchvision.models import get_weight

    weights = get_weight(entry)
    if file is None:
        file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        if not file.is_file():
            try:
                weights.get_state_dict(progress=True, check_hash=True)
            except OSError as error:  # what urllib raises without a network
                raise OSError(
                    f"cannot download {weights.url}: {error}; where there is no network, bring the file and name it as "
                    f"{PREFIX}NAME:FILE, or put it into {file.parent}"
                ) from error
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    expected = digest_in(weights.url)
    if not digest.startswith(expected):
        raise ValueError(f"{file} is not the published file: its SHA-256 begins with {digest[:8]}, not {expected}")
    try:
        with open(file, "rb") as content:
            return read_torch(content), weights.meta
    except Exception as error:  # a file of another kind can fail in any way inside the reader
        raise ValueError(f"{file} is not a PyTorch weights file: {str(error).splitlines()[0]}") from error


def digest_in(url: str) -> str:
    """The digits of the SHA-256 in the name of a published file."""
    return re.search(r"-([0-9a-f]{8,})\.", url.rsplit("/", 1)[-1]).group(1)


def is_published(source: Path | str) -> bool:
    """Does this name published weights, rather than a file or folder?"""
    return str(source).startswith((PREFIX, *(f"{code}:" for code in ZOOS)))


def open_published(source: Path | str) -> tuple[MaskRCNN, CategoryMap]:
    """The model and the categories of "torchvision:NAME", "torchvision:NAME:FILE" or "detectron2:NAME:FILE"."""
    if str(source).startswith(PREFIX):
        return load_published(*split_source(source))
    code, _, rest = str(source).partition(":")
    return load_from_zoo(code, *split_source(rest))


def split_source(source: Path | str) -> tuple[str, Path | None]:
    """The name and the file in "torchvision:NAME" or "torchvision:NAME:FILE"."""
    name, _, file = str(source).removeprefix(PREFIX).partition(":")
    return name, Path(file) if file else None


def label_table(known: CategoryMap, wanted: CategoryMap) -> Tensor:
    """Where a model's labels go among those of a data set, [K + 1] int64, by category id; 0 where it has none.

    Raises ValueError when the model does not know a category, or knows it by another name or with other joints.
    """
    table = torch.zeros(len(known) + 1, dtype=torch.int64)
    by_id = {category.id: category for category in known.categories}
    for label, category in enumerate(wanted.categories, start=1):
        theirs = by_id.get(category.id)
        if theirs is None or theirs.name != category.name:
            has = "none" if theirs is None else theirs.name
            raise ValueError(
                f"the data have the category {category.name!r} with id {category.id}, the weights know {has!r} by it"
            )
        if theirs.keypoints and category.keypoints and theirs.keypoints != category.keypoints:
            raise ValueError(f"the joints of {category.name!r} are {category.keypoints} in the data, "
                             f"{theirs.keypoints} in the weights")  # fmt: skip
        table[known.label(category.id)] = label
    return table


def open_weights(
    path: Path, min_size: int | None, max_size: int | None
) -> tuple[MaskRCNN | Unshared, CategoryMap, DataConfig]:
    """A trained model, its categories, and the size at which it should see images; stages end in one model or two."""
    if is_published(path):
        model, categories = open_published(path)
        data = DataConfig()
    else:
        if (path / "stages.json").exists():
            model, categories = load_stages(path)
            beside = path / "config.json"
        else:
            path = path / "weights.safetensors" if path.is_dir() else path
            model, categories = load_model(path)
            beside = path.with_name("config.json")
        data = read_config(beside).data if beside.exists() else DataConfig()
    data = replace(data, max_size=max_size or max(data.max_size, min_size or 0), min_size=(1,))
    return model, categories, replace(data, test_size=min_size or data.test_size)


def start_backbone(model: MaskRCNN, weights: Path | None, resume: bool) -> None:
    """Load ImageNet weights into the backbone; refuse to train one whose frozen parts would stay random."""
    if weights is not None and is_published(weights):
        load_imagenet(model.backbone.resnet, imagenet_state(*split_source(weights)), model.res5)
    elif weights is not None:
        try:
            with open(weights, "rb") as file:
                state = read_torch(file)
        except OSError:
            raise
        except Exception as error:  # a file of another kind can fail in any way inside the reader
            raise ValueError(f"{weights} is not a PyTorch weights file: {str(error).splitlines()[0]}") from error
        load_imagenet(model.backbone.resnet, state, model.res5)
    elif model.config.backbone.norm == "frozen" and not resume:
        raise ValueError(
            "this backbone has frozen parts that need ImageNet weights: give torchvision's file with --backbone, or "
            "train all of it from scratch with --model.backbone.norm batch --model.backbone.frozen-stages 0"
        )
