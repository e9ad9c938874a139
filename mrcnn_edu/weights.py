"""Published weights in and out: one visible table of names for each source.

Chapter 18 (real data and transfer). The sources are torchvision, detectron2 and Detectron, the paper's own code.

Every key of the file must be used and every shape must fit. A few things differ beyond the names. torchvision and
Detectron keep unused slots for the background in the deltas and the masks: they are left out here and filled with zeros
on the way back. detectron2 has the background behind the classes. Detectron folds each batch norm into a scale and a
shift, and goes through the anchors of a cell by ratio first, where all others go by size first.
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
    *((rf"^backbone\.fpn\.lateral\.p{i + 2}\.", rf"backbone.fpn.inner_blocks.{i}.0.") for i in range(4)),
    *((rf"^backbone\.fpn\.output\.p{i + 2}\.", rf"backbone.fpn.layer_blocks.{i}.0.") for i in range(4)),
    (r"^rpn\.conv\.", r"rpn.head.conv.0.0."),
    (r"^rpn\.objectness\.", r"rpn.head.cls_logits."),
    (r"^rpn\.deltas\.", r"rpn.head.bbox_pred."),
    (r"^box_head\.hidden\.1\.", r"roi_heads.box_head.fc6."),
    (r"^box_head\.hidden\.3\.", r"roi_heads.box_head.fc7."),
    (r"^box_head\.class_logits\.", r"roi_heads.box_predictor.cls_score."),
    (r"^box_head\.deltas\.", r"roi_heads.box_predictor.bbox_pred."),
    *((rf"^mask_head\.convs\.{2 * i}\.", rf"roi_heads.mask_head.{i}.0.") for i in range(4)),
    (r"^mask_head\.deconv\.", r"roi_heads.mask_predictor.conv5_mask."),
    (r"^mask_head\.mask_logits\.", r"roi_heads.mask_predictor.mask_fcn_logits."),
    (r"^keypoint_head\.convs\.", r"roi_heads.keypoint_head."),
    (r"^keypoint_head\.deconv\.", r"roi_heads.keypoint_predictor.kps_score_lowres."),
]

# torchvision's second version: a norm after each conv of the pyramid and the heads, and more of these convs.
DETECTOR_V2: Table = [
    *(
        (rf"^backbone\.fpn\.{ours}\.p{k}\.", rf"backbone.fpn.{theirs}.{k - 2}.")
        for ours, theirs in (("lateral", "inner_blocks"), ("output", "layer_blocks"))
        for k in range(2, 6)
    ),
    *((rf"^rpn\.conv\.{2 * i}\.", rf"rpn.head.conv.{i}.0.") for i in range(2)),
    *(
        (rf"^{head}\.convs\.{3 * i + part}\.", rf"roi_heads.{head}.{i}.{part}.")
        for head in ("box_head", "mask_head")
        for i in range(4)
        for part in range(2)
    ),
    (r"^box_head\.hidden\.1\.", r"roi_heads.box_head.5."),
    *DETECTOR,
]

# The files of torchvision's first COCO weights have older names than its code.
OLD_TORCHVISION: Table = [
    (r"(inner_blocks|layer_blocks)\.(\d)\.(weight|bias)$", r"\1.\2.0.\3"),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    *((rf"mask_head\.mask_fcn{i + 1}\.", rf"mask_head.{i}.0.") for i in range(4)),
]

DETECTRON2: Table = [
    (r"^backbone\.resnet\.", r"backbone.bottom_up."),  # with a pyramid; see _detectron2_table
    (r"\.stem\.0\.", r".stem.conv1."),
    (r"\.stem\.1\.", r".stem.conv1.norm."),
    (r"\.c(\d)\.", r".res\1."),
    (r"\.norm(\d)\.", r".conv\1.norm."),
    (r"\.shortcut\.0\.", r".shortcut."),
    (r"\.shortcut\.1\.", r".shortcut.norm."),
    (r"^backbone\.fpn\.lateral\.p(\d)\.", r"backbone.fpn_lateral\1."),
    (r"^backbone\.fpn\.output\.p(\d)\.", r"backbone.fpn_output\1."),
    (r"^rpn\.conv\.", r"proposal_generator.rpn_head.conv."),
    (r"^rpn\.objectness\.", r"proposal_generator.rpn_head.objectness_logits."),
    (r"^rpn\.deltas\.", r"proposal_generator.rpn_head.anchor_deltas."),
    (r"^res5\.blocks\.", r"roi_heads.res5."),
    (r"^box_head\.hidden\.1\.", r"roi_heads.box_head.fc1."),
    (r"^box_head\.hidden\.3\.", r"roi_heads.box_head.fc2."),
    (r"^box_head\.class_logits\.", r"roi_heads.box_predictor.cls_score."),
    (r"^box_head\.deltas\.", r"roi_heads.box_predictor.bbox_pred."),
    *((rf"^mask_head\.convs\.{2 * i}\.", rf"roi_heads.mask_head.mask_fcn{i + 1}.") for i in range(4)),
    (r"^mask_head\.deconv\.", r"roi_heads.mask_head.deconv."),
    (r"^mask_head\.mask_logits\.", r"roi_heads.mask_head.predictor."),
    *((rf"^keypoint_head\.convs\.{2 * i}\.", rf"roi_heads.keypoint_head.conv_fcn{i + 1}.") for i in range(8)),
    (r"^keypoint_head\.deconv\.", r"roi_heads.keypoint_head.score_lowres."),
]

# Detectron names a pyramid's parts after the last block of their stage: see _detectron_table for the stars.
DETECTRON: Table = [
    (r"^backbone\.resnet\.", r""),
    (r"^res5\.blocks\.", r"c5."),
    (r"^stem\.0\.", r"conv1."),
    (r"^stem\.1\.", r"res_conv1_bn."),
    (r"^c(\d)\.(\d+)\.", r"res\1_\2_"),
    (r"_conv1\.", r"_branch2a."),
    (r"_conv2\.", r"_branch2b."),
    (r"_conv3\.", r"_branch2c."),
    (r"_norm1\.", r"_branch2a_bn."),
    (r"_norm2\.", r"_branch2b_bn."),
    (r"_norm3\.", r"_branch2c_bn."),
    (r"_shortcut\.0\.", r"_branch1."),
    (r"_shortcut\.1\.", r"_branch1_bn."),
    (r"^backbone\.fpn\.lateral\.p5\.", r"fpn_inner_res5_*_sum."),
    (r"^backbone\.fpn\.lateral\.p(\d)\.", r"fpn_inner_res\1_*_sum_lateral."),
    (r"^backbone\.fpn\.output\.p(\d)\.", r"fpn_res\1_*_sum."),
    (r"^rpn\.conv\.", r"conv_rpn_fpn2."),
    (r"^rpn\.objectness\.", r"rpn_cls_logits_fpn2."),
    (r"^rpn\.deltas\.", r"rpn_bbox_pred_fpn2."),
    (r"^box_head\.hidden\.1\.", r"fc6."),
    (r"^box_head\.hidden\.3\.", r"fc7."),
    (r"^box_head\.class_logits\.", r"cls_score."),
    (r"^box_head\.deltas\.", r"bbox_pred."),
    *((rf"^mask_head\.convs\.{2 * i}\.", rf"_[mask]_fcn{i + 1}.") for i in range(4)),
    (r"^mask_head\.deconv\.", r"conv5_mask."),
    (r"^mask_head\.mask_logits\.", r"mask_fcn_logits."),
    *((rf"^keypoint_head\.convs\.{2 * i}\.", rf"conv_fcn{i + 1}.") for i in range(8)),
    (r"^keypoint_head\.deconv\.", r"kps_score_lowres."),
    (r"_bn\.weight$", r"_bn_s"),
    (r"\.weight$", r"_w"),
    (r"\.bias$", r"_b"),
]

# What Detectron's files hold beside the weights: momenta, the ImageNet classifier, a bias of the first conv that
# nothing uses, and the fixed enlargement of keypoint maps, which is not a weight here.
DETECTRON_EXTRAS = re.compile(r".*_momentum|(fc1000|pred)_[wb]|conv1_b|kps_score_[wb]")

# Rows that torchvision and Detectron keep for the background at the front of these tensors.
BACKGROUND_ROWS = {"box_head.deltas": 4, "mask_head.mask_logits": 1}

CLASS_LOGITS = ("box_head.class_logits.weight", "box_head.class_logits.bias")  # with a row for the background


def load_torchvision(model: MaskRCNN, state: dict[str, Tensor]) -> None:
    """Load a state dict of torchvision's Mask, Keypoint or Faster R-CNN ResNet-FPN into a model of the same shape.

    Build the model with the "torchvision" conventions and as many classes as the file has, without its background: 90
    for COCO. Raises ValueError naming keys that are missing, left over or of another shape, and then changes nothing.
    """
    state, table = {_rename(key, OLD_TORCHVISION): value for key, value in state.items()}, _torchvision_table(model)
    loaded = {}
    for ours, theirs in _names(model, table):
        if theirs in state:
            rows = _background_rows(ours)
            loaded[ours] = state[theirs][rows:] if rows else state[theirs]
    _load(model, loaded, state, table, left_out=())


def to_torchvision(model: MaskRCNN) -> dict[str, Tensor]:
    """The model's weights under torchvision's names, with zeros for the background's deltas and mask."""
    own = model.state_dict()
    state = {}
    for ours, theirs in _names(model, _torchvision_table(model)):
        value, rows = own[ours], _background_rows(ours)
        state[theirs] = (
            torch.cat([torch.zeros_like(value[:1]).expand(rows, *value.shape[1:]), value]) if rows else value
        )
    return state


def load_detectron2(model: MaskRCNN, state: dict[str, Tensor]) -> None:
    """Load a state dict of detectron2's Mask, Keypoint or Faster R-CNN into a model of the same shape.

    state  as ``unpickling.read_weights`` gives it, from detectron2's model zoo or from a training of one's own

    Build the model by the preset with "_detectron2" in its name, for as many classes as the file has. Raises ValueError
    for other conventions, and naming keys that are missing, left over or of another shape; the model is then as it was.
    """
    _need_background(model, "last", "detectron2")
    extras = [key for key in state if key.startswith(("pixel_", "proposal_generator.anchor_generator."))]
    _check_constants(model, {key: state[key] for key in extras})
    table = _detectron2_table(model)
    loaded = {ours: state[theirs] for ours, theirs in _names(model, table) if theirs in state}
    for name in CLASS_LOGITS:
        if name in loaded:
            loaded[name] = loaded[name].roll(1, dims=0)  # the background from the end to the front
    _load(model, loaded, state, table, left_out=extras)


def to_detectron2(model: MaskRCNN) -> dict[str, Tensor]:
    """The model's weights under detectron2's names, with the background behind the classes."""
    own = model.state_dict()
    names = _names(model, _detectron2_table(model))
    return {theirs: own[ours].roll(-1, dims=0) if ours in CLASS_LOGITS else own[ours] for ours, theirs in names}


def load_detectron(model: MaskRCNN, blobs: dict[str, Tensor]) -> None:
    """Load the weights of Detectron's end-to-end trained Mask, Keypoint or Faster R-CNN into a model of the same shape.

    blobs  as ``unpickling.read_weights`` gives them

    Build the model by the preset with "_detectron1" in its name, for as many classes as the file has without its
    background. Raises ValueError for other conventions, and naming keys that are missing, left over or of another
    shape; the model is then as it was.
    """
    _need_background(model, "first", "detectron1")
    table = _detectron_table(model)
    eps, sizes = model.config.conventions.frozen_norm_eps, len(model.config.rpn.anchor_sizes[0])
    loaded = {}
    for ours, theirs in _names(model, table):
        if theirs in blobs:
            loaded[ours] = blobs[theirs][_background_rows(ours) :]
        elif ours.endswith("running_mean"):
            loaded[ours] = torch.zeros_like(model.get_buffer(ours))
        elif ours.endswith("running_var"):  # divided by the root of 1, and eps comes on top
            loaded[ours] = torch.full_like(model.get_buffer(ours), 1 - eps)
    for name in (f"rpn.{layer}.{kind}" for layer in ("objectness", "deltas") for kind in ("weight", "bias")):
        if name in loaded:
            loaded[name] = _sizes_first(loaded[name], sizes, len(model.config.rpn.anchor_ratios))
    _load(model, loaded, blobs, table, left_out=[key for key in blobs if DETECTRON_EXTRAS.fullmatch(key)])


def _torchvision_table(model: MaskRCNN) -> Table:
    return DETECTOR_V2 if model.config.head_norm == "batch" else DETECTOR


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


def _detectron2_table(model: MaskRCNN) -> Table:
    if model.backbone.fpn is not None:
        return DETECTRON2
    return [(DETECTRON2[0][0], r"backbone."), *DETECTRON2[1:]]


def _detectron_table(model: MaskRCNN) -> Table:
    """Detectron's table for the depth of a model, with or without a pyramid."""
    table: Table = list(DETECTRON)
    if model.backbone.fpn is None:
        table += [(r"_fpn2_", r"_")]
    for stage in (name for name in ("c2", "c3", "c4", "c5") if name in model.backbone.resnet.strides):
        last = len(model.backbone.resnet.get_submodule(stage)) - 1
        table.append((rf"res{stage[1]}_\*_sum", rf"res{stage[1]}_{last}_sum"))
    return table


def _need_background(model: MaskRCNN, place: str, conventions: str) -> None:
    if model.config.conventions.background != place:
        raise ValueError(
            f"these weights need a model with {conventions}'s conventions: build it by a preset that ends in "
            f'"_{conventions}", or with conventions="{conventions}"'
        )


def _check_constants(model: MaskRCNN, constants: dict[str, Tensor]) -> None:
    """Mean, deviation and anchors, which older files of detectron2 hold, must be those of the model."""
    own = {"pixel_mean": model.pixel_mean, "pixel_std": model.pixel_std}
    for index, level in enumerate(model.rpn.strides):
        own[f"proposal_generator.anchor_generator.cell_anchors.{index}"] = model.rpn.get_buffer(f"anchors_{level}")
    for name, value in constants.items():
        if name not in own:
            raise ValueError(f"these weights are of another model: left over {name}")
        expected = own[name].detach().cpu()
        fits = value.numel() == expected.numel()
        if not (fits and torch.allclose(value.float().reshape(expected.shape), expected, rtol=1e-3, atol=1e-2)):
            raise ValueError(
                f"these weights were trained with {name} = {value.flatten().tolist()[:4]}, the model has "
                f"{expected.flatten().tolist()[:4]}: build it by the preset of these weights"
            )


def _sizes_first(rows: Tensor, sizes: int, ratios: int) -> Tensor:
    """Rows of the RPN, for anchors by ratio and then by size, in the order by size and then by ratio."""
    each = len(rows) // (sizes * ratios)  # 1, or 4 for deltas
    if len(rows) != each * sizes * ratios:
        return rows  # of another model, as the check of the shapes will say
    return rows.reshape(ratios, sizes, each, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


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
