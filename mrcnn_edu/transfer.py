"""From one list of classes to another: a trained model as the start of the next, class by class.

Chapter 18 (real data and transfer). Paper: Appendix A, "we initialize the corresponding 7 categories in Cityscapes from
a pre-trained COCO Mask R-CNN model (rider being randomly initialized)".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mrcnn_edu.config import ModelConfig
from mrcnn_edu.data.coco import CategoryMap
from mrcnn_edu.fields import lookup
from mrcnn_edu.models.mask_rcnn import MaskRCNN

# Cityscapes' classes under the names COCO has for them; the other five are called alike, and COCO has no rider.
CITYSCAPES_FROM_COCO = {"mcycle": "motorcycle"}


def transfer(
    model: MaskRCNN,
    categories: CategoryMap,
    source: MaskRCNN,
    source_categories: CategoryMap,
    rename: Mapping[str, str] | None = None,
) -> dict[str, str | None]:
    """Start a model from one that was trained on other classes; for each class name the one it was taken from, or None.

    model, categories          what is to be trained: its weights are replaced
    source, source_categories  what has been trained, such as ``load_model`` gives
    rename                     names of the model's classes under which they are found in the source,
                               ``{"mcycle": "motorcycle"}``; without it names must be equal

    Layers that know no classes are copied. Of the others the rows of the background and of each class that both know
    are; a class that the source does not know keeps the model's random start, as does a branch that the source lacks.
    Raises ValueError, and changes nothing, when the two share no class, when a renamed class does not exist, or for
    models whose other layers differ.
    """
    matches = match_names(categories.names, source_categories.names, rename or {})
    if not any(matches.values()):
        raise ValueError(
            f"none of the classes {', '.join(categories.names)} is among those of the source, "
            f"{', '.join(source_categories.names)}; rename says which is which"
        )
    old, new = source.state_dict(), dict(model.state_dict())
    branches = {name.split(".")[0] for name in old}
    for name, value in new.items():
        if name.split(".")[0] not in branches:
            continue
        rows = _class_rows(name, value, model.config)
        theirs = old.get(name)
        if theirs is not None and rows is not None and rows == _class_rows(name, theirs, source.config):
            places = [
                (label, source_categories.names.index(found))
                for label, found in enumerate(matches.values())
                if found is not None
            ]
            new[name] = _with_rows(value, theirs.to(value.device), *rows, places)
        elif theirs is not None and rows is None and theirs.shape == value.shape:
            new[name] = theirs
        else:
            got = "absent" if theirs is None else list(theirs.shape)
            raise ValueError(f"the source is another model: {name} is {got} there, here it is {list(value.shape)}")
    model.load_state_dict(new)
    return matches


def match_names(names: list[str], source: list[str], rename: Mapping[str, str]) -> dict[str, str | None]:
    """For each name its counterpart in the source: itself, or what it is renamed to; None where there is none."""
    for name, theirs in rename.items():
        lookup("class to rename", dict.fromkeys(names), name)
        lookup(f"class that {name!r} is to be taken from", dict.fromkeys(source), theirs)
    return {name: rename.get(name, name if name in source else None) for name in names}


def _class_rows(name: str, value: Tensor, config: ModelConfig) -> tuple[int, int] | None:
    """The rows for the background and for each class in a tensor that has such, else None."""
    layer = name.rsplit(".", 1)[0]
    if layer == "box_head.class_logits":
        return 1, 1
    if layer == "box_head.deltas":
        return 0, 4
    if layer == "mask_head.mask_logits" and config.mask.classes == "specific":
        background = 1 if config.mask.loss == "softmax" else 0
        each = len(value) // (config.classes + background)  # 1 for a convolution, M * M for an MLP
        return background * each, each
    return None


def _with_rows(own: Tensor, theirs: Tensor, background: int, each: int, places: list[tuple[int, int]]) -> Tensor:
    """``own`` with the rows of the background and of some classes, (own place, their place), out of ``theirs``."""
    result = own.clone()
    with torch.no_grad():
        result[:background] = theirs[:background]
        for here, there in places:
            a, b = background + here * each, background + there * each
            result[a : a + each] = theirs[b : b + each]
    return result
