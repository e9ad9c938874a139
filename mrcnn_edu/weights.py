"""Published weights in and out: one visible table of names for each source.

Chapter 18 (real data and transfer). The names are torchvision's; the weights are of the models the paper describes.

Every key of the file must be used and every shape must fit. Two things differ beyond the names: torchvision keeps
unused slots for the background in the deltas and the masks, which are left out here and filled with zeros on the way
back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from mrcnn_edu.models.backbone import Res5
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.models.resnet import ResNet

Table = list[tuple[str, str]]  # (our name, their name) as a pattern and its replacement

RESNET: Table = [
    (r"^stem\.0\.", r"conv1."),
    (r"^stem\.1\.", r"bn1."),
    (r"^c2\.", r"layer1."),
    (r"^c3\.", r"layer2."),
    (r"^c4\.", r"layer3."),
    (r"^c5\.", r"layer4."),
    (r"\.norm(\d)\.", r".bn\1."),
    (r"\.shortcut\.", r".downsample."),
]

DETECTOR: Table = [
    *((pattern.replace("^", r"^backbone\.resnet\."), "backbone.body." + new) for pattern, new in RESNET[:6]),
    *RESNET[6:],
    (r"^backbone\.fpn\.lateral\.p2\.", r"backbone.fpn.inner_blocks.0.0."),
    (r"^backbone\.fpn\.lateral\.p3\.", r"backbone.fpn.inner_blocks.1.0."),
    (r"^backbone\.fpn\.lateral\.p4\.", r"backbone.fpn.inner_blocks.2.0."),
    (r"^backbone\.fpn\.lateral\.p5\.", r"backbone.fpn.inner_blocks.3.0."),
    (r"^backbone\.fpn\.output\.p2\.", r"backbone.fpn.layer_blocks.0.0."),
    (r"^backbone\.fpn\.output\.p3\.", r"backbone.fpn.layer_blocks.1.0."),
    (r"^backbone\.fpn\.output\.p4\.", r"backbone.fpn.layer_blocks.2.0."),
    (r"^backbone\.fpn\.output\.p5\.", r"backbone.fpn.layer_blocks.3.0."),
    (r"^rpn\.conv\.", r"rpn.head.conv.0.0."),
    (r"^rpn\.objectness\.", r"rpn.head.cls_logits."),
    (r"^rpn\.deltas\.", r"rpn.head.bbox_pred."),
    (r"^box_head\.hidden\.1\.", r"roi_heads.box_head.fc6."),
    (r"^box_head\.hidden\.3\.", r"roi_heads.box_head.fc7."),
    (r"^box_head\.class_logits\.", r"roi_heads.box_predictor.cls_score."),
    (r"^box_head\.deltas\.", r"roi_heads.box_predictor.bbox_pred."),
    (r"^mask_head\.convs\.0\.", r"roi_heads.mask_head.0.0."),
    (r"^mask_head\.convs\.2\.", r"roi_heads.mask_head.1.0."),
    (r"^mask_head\.convs\.4\.", r"roi_heads.mask_head.2.0."),
    (r"^mask_head\.convs\.6\.", r"roi_heads.mask_head.3.0."),
    (r"^mask_head\.deconv\.", r"roi_heads.mask_predictor.conv5_mask."),
    (r"^mask_head\.mask_logits\.", r"roi_heads.mask_predictor.mask_fcn_logits."),
    (r"^keypoint_head\.convs\.", r"roi_heads.keypoint_head."),
    (r"^keypoint_head\.deconv\.", r"roi_heads.keypoint_predictor.kps_score_lowres."),
]

# The files of torchvision's first COCO weights have older names than its code.
OLD_TORCHVISION: Table = [
    (r"(inner_blocks|layer_blocks)\.(\d)\.(weight|bias)$", r"\1.\2.0.\3"),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    (r"mask_head\.mask_fcn1\.", r"mask_head.0.0."),
    (r"mask_head\.mask_fcn2\.", r"mask_head.1.0."),
    (r"mask_head\.mask_fcn3\.", r"mask_head.2.0."),
    (r"mask_head\.mask_fcn4\.", r"mask_head.3.0."),
]

# Rows that torchvision keeps for the background at the front of these tensors.
BACKGROUND_ROWS = {"box_head.deltas": 4, "mask_head.mask_logits": 1}


def load_torchvision(model: MaskRCNN, state: dict[str, Tensor]) -> None:
    """Load a state dict of torchvision's Mask, Keypoint or Faster R-CNN ResNet-FPN into a model of the same shape.

    Build the model with the "torchvision" conventions and as many classes as the file has, without its background: 90
    for COCO. Raises ValueError naming keys that are missing, left over or of another shape, and then changes nothing.
    """
    state = {_rename(key, OLD_TORCHVISION): value for key, value in state.items()}
    loaded = {}
    for ours, theirs in _names(model, DETECTOR):
        if theirs in state:
            rows = _background_rows(ours)
            loaded[ours] = state[theirs][rows:] if rows else state[theirs]
    _load(model, loaded, state, DETECTOR, left_out=())


def to_torchvision(model: MaskRCNN) -> dict[str, Tensor]:
    """The model's weights under torchvision's names, with zeros for the background's deltas and mask."""
    own = model.state_dict()
    state = {}
    for ours, theirs in _names(model, DETECTOR):
        value, rows = own[ours], _background_rows(ours)
        state[theirs] = (
            torch.cat([torch.zeros_like(value[:1]).expand(rows, *value.shape[1:]), value]) if rows else value
        )
    return state


def load_imagenet(resnet: ResNet, state: dict[str, Tensor], res5: Res5 | None = None) -> None:
    """Load a state dict of torchvision's ResNet or ResNeXt classifier; its last layer, ``fc``, is left out.

    res5  the model's own on C4, which has the fifth stage in its head

    A non-local block, which no classifier has, stays as it is.

    Raises ValueError naming keys that are missing, left over or of another shape; the model is then as it was.
    """
    body = torch.nn.Module()
    for name, stage in resnet.named_children():
        if name != "non_local":
            body.add_module(name, stage)
    if res5 is not None:
        body.add_module("c5", res5.blocks)
    loaded = {ours: state[theirs] for ours, theirs in _names(body, RESNET) if theirs in state}
    _load(body, loaded, state, RESNET, left_out=("fc.weight", "fc.bias"))


def _names(module: torch.nn.Module, table: Table) -> list[tuple[str, str]]:
    return [(name, _rename(name, table)) for name in module.state_dict()]


def _rename(name: str, table: Table) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def _background_rows(name: str) -> int:
    return BACKGROUND_ROWS.get(name.rsplit(".", 1)[0], 0)


def _load(
    module: torch.nn.Module, loaded: dict[str, Tensor], state: dict[str, Tensor], table: Table, left_out: Iterable[str]
) -> None:
    own = module.state_dict()
    # Batches seen by a batch norm: counted by torch, used by nobody who does not train on with momentum None.
    missing = [f"{_rename(key, table)} (our {key})" for key in own if key not in loaded and not _is_counter(key)]
    used = {_rename(key, table) for key in own} | set(left_out)
    extra = [key for key in state if key not in used and not _is_counter(key)]
    wrong = [
        f"{key}: expected {list(own[key].shape)}, got {list(value.shape)}"
        for key, value in loaded.items()
        if value.shape != own[key].shape
    ]
    if missing or extra or wrong:
        raise ValueError(
            "these weights are of another model: "
            + "; ".join(
                f"{title} {', '.join(items[:3])}{f' and {len(items) - 3} more' if len(items) > 3 else ''}"
                for title, items in (("missing", missing), ("left over", extra), ("of another shape", wrong))
                if items
            )
        )
    module.load_state_dict(loaded, strict=False)


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")
