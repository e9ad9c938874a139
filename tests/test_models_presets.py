"""By law: every named model takes a step and predicts; and so does every variant of the paper's tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import images, shrink, truth

from mrcnn_edu.config import ModelConfig
from mrcnn_edu.models.mask_rcnn import build_model
from mrcnn_edu.presets import MODELS

FPN, C4, C5 = (MODELS[f"maskrcnn_resnet50_{features}"] for features in ("fpn", "c4", "c5"))
SMALL_C4 = replace(C4, backbone=replace(C4.backbone, architecture="resnet10"))
SMALL_FPN = replace(FPN, backbone=replace(FPN.backbone, architecture="resnet10"))
BOTH = MODELS["maskkeypointrcnn_resnet50_fpn"]

VARIANTS = {
    **{
        f"{layer}-{mode} on {name}": replace(
            config, box=replace(config.box, layer=layer, mode=mode), mask=replace(config.mask, layer=layer, mode=mode)
        )
        for name, config in (("C4", SMALL_C4), ("FPN", SMALL_FPN))
        for layer, mode in (("roi_pool", "max"), ("roi_warp", "max"), ("roi_warp", "mean"), ("roi_align", "max"))
    },
    "softmax on C4": replace(SMALL_C4, mask=replace(C4.mask, loss="softmax")),
    "agnostic on C4": replace(SMALL_C4, mask=replace(C4.mask, classes="agnostic")),
    "agnostic softmax": replace(SMALL_FPN, mask=replace(FPN.mask, classes="agnostic", loss="softmax")),
    "mlp": replace(SMALL_FPN, mask=replace(FPN.mask, branch="mlp")),
    "mlp of three": replace(SMALL_FPN, mask=replace(FPN.mask, branch="mlp", fc=(1024, 1024, 1024))),
    "mlp on C4": replace(SMALL_C4, mask=replace(C4.mask, branch="mlp")),
    "mask aligned, box pooled": replace(SMALL_FPN, box=replace(FPN.box, layer="roi_pool")),
    "keypoints on C4": replace(
        SMALL_C4, keypoint=replace(BOTH.keypoint, pooled_size=7), backbone=replace(SMALL_C4.backbone, non_local=True)
    ),
    "hardest": replace(SMALL_FPN, box=replace(FPN.box, sampling="hardest")),
    "hardest on C4": replace(SMALL_C4, box=replace(C4.box, sampling="hardest")),
    "dilated": replace(C5, backbone=replace(C5.backbone, features="dc5", architecture="resnet10")),
}


def take_a_step_and_predict(config: ModelConfig) -> None:
    torch.manual_seed(0)
    config = shrink(config)
    model, batch = build_model(config), images()
    losses = model(batch, [truth(config), truth(config)])
    heads = {name for name in ("mask", "keypoint") if getattr(config, name) is not None}
    assert set(losses) == {"objectness", "rpn_box", "classification", "box"} | heads
    assert all(loss.isfinite() and loss >= 0 for loss in losses.values()), losses
    if config.box.sampling == "random":  # the hardest may all be negatives, which teach the mask head nothing
        assert all(loss > 0 for loss in losses.values()), losses
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    moved = {name.split(".")[0] for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    still = {name.split(".")[0] for name in before} - moved
    assert not still or (config.box.sampling == "hardest" and still == {"mask_head"})
    with torch.no_grad():
        found = model.eval()(batch)
    assert [len(part) for part in found] == [5, 5]
    for part in found:
        assert (part.mask_probs is None) == (config.mask is None)
        assert (part.keypoints is None) == (config.keypoint is None)
        if config.mask is not None:
            side = 14 if config.backbone.features == "c4" and config.mask.branch == "fcn" else 28
            assert part.mask_probs.shape == (5, side, side)
            assert ((part.mask_probs >= 0) & (part.mask_probs <= 1)).all()


@pytest.mark.parametrize("name", MODELS)
def test_every_named_model_takes_a_step_and_predicts(name):
    take_a_step_and_predict(MODELS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_the_tables_takes_a_step_and_predicts(name):
    take_a_step_and_predict(VARIANTS[name])


@pytest.mark.parametrize("config", [SMALL_C4, BOTH], ids=["C4", "mask and keypoints"])
def test_boxes_only(config):
    """Section 4.3: from the same model the same boxes, without the masks and keypoints."""
    torch.manual_seed(0)
    model, batch = build_model(shrink(config)).eval(), images()
    with torch.no_grad():
        found, boxes = model(batch), model(batch, boxes_only=True)
    for full, part in zip(found, boxes):
        assert torch.equal(part.boxes, full.boxes) and torch.equal(part.scores, full.scores)
        assert part.mask_probs is None and part.keypoints is None and full.mask_probs is not None


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_c4", "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_c5"])
def test_the_branches_can_be_left_out_one_by_one(name):
    """A branch has weights of its own and shares the rest: leaving it out removes its weights and no others."""
    config = shrink(MODELS[name])
    config = replace(config, backbone=replace(config.backbone, architecture="resnet10"))
    keypoint = replace(shrink(BOTH).keypoint, pooled_size=config.mask.pooled_size)
    names = {
        key: set(build_model(replace(config, mask=mask, keypoint=joints)).state_dict())
        for key, mask, joints in (
            ("box", None, None),
            ("mask", config.mask, None),
            ("keypoint", None, keypoint),
            ("both", config.mask, keypoint),
        )
    }
    assert {name.split(".")[0] for name in names["mask"] - names["box"]} == {"mask_head"}
    assert {name.split(".")[0] for name in names["keypoint"] - names["box"]} == {"keypoint_head"}
    assert names["both"] == names["mask"] | names["keypoint"] and names["box"] == names["mask"] & names["keypoint"]
