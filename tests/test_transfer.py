"""Class-by-class transfer: which rows go where, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training_runs import MODEL

from mrcnn_edu.config import MaskHeadConfig, ModelConfig
from mrcnn_edu.data.coco import Category, CategoryMap
from mrcnn_edu.models.mask_rcnn import build_model
from mrcnn_edu.transfer import CITYSCAPES_FROM_COCO, match_names, transfer

CITYSCAPES = ["person", "rider", "car", "truck", "bus", "train", "mcycle", "bicycle"]
COCO = ["person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck"]  # the first eight of 80


def named(names: list[str]) -> CategoryMap:
    return CategoryMap(tuple(Category(number, name) for number, name in enumerate(names, start=1)))


def config(names: list[str], mask: MaskHeadConfig | None = None, keypoint: bool = False) -> ModelConfig:
    branch = replace(MODEL.keypoint, labels=(1,)) if keypoint else None
    return replace(MODEL, classes=len(names), mask=mask or MODEL.mask, keypoint=branch)


def built(seed: int, *arguments, **options):
    torch.manual_seed(seed)
    return build_model(config(*arguments, **options))


def test_seven_of_the_eight_cityscapes_classes_come_from_coco() -> None:
    """Appendix A: "we initialize the corresponding 7 categories ... (rider being randomly initialized)"."""
    matches = match_names(CITYSCAPES, COCO, CITYSCAPES_FROM_COCO)
    assert matches == {name: name for name in CITYSCAPES} | {"rider": None, "mcycle": "motorcycle"}
    assert sum(found is not None for found in matches.values()) == 7


@pytest.mark.parametrize(
    "mask",
    [
        MODEL.mask,
        replace(MODEL.mask, loss="softmax"),
        replace(MODEL.mask, classes="agnostic"),
        replace(MODEL.mask, branch="mlp", fc=(8,), size=3),
        replace(MODEL.mask, branch="mlp", fc=(8,), size=3, loss="softmax"),
    ],
)
def test_rows_go_to_their_class(mask: MaskHeadConfig) -> None:
    model, source = built(1, CITYSCAPES, mask), built(2, COCO, mask)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    transfer(model, named(CITYSCAPES), source, named(COCO), CITYSCAPES_FROM_COCO)
    after, theirs = model.state_dict(), source.state_dict()
    assert torch.equal(after["backbone.resnet.stem.0.weight"], theirs["backbone.resnet.stem.0.weight"])
    for here, there in [(0, None), (1, 1), (2, None), (3, 3), (4, 8), (5, 6), (6, 7), (7, 4), (8, 2)]:
        own = after["box_head.class_logits.weight"][here]
        expected = theirs["box_head.class_logits.weight"][0 if here == 0 else there] if here != 2 else None
        if expected is None:  # rider keeps its random start
            assert torch.equal(own, before["box_head.class_logits.weight"][2])
        else:
            assert torch.equal(own, expected)
    deltas, source_deltas = (state["box_head.deltas.weight"].reshape(8, 4, -1) for state in (after, theirs))
    assert torch.equal(deltas[6], source_deltas[3]) and torch.equal(deltas[7], source_deltas[1])
    masks, source_masks, old_masks = (state["mask_head.mask_logits.weight"] for state in (after, theirs, before))
    if mask.classes == "agnostic":
        assert torch.equal(masks, source_masks)
        return
    outputs = 9 if mask.loss == "softmax" else 8
    masks, source_masks, old_masks = (m.reshape(outputs, -1) for m in (masks, source_masks, old_masks))
    first = outputs - 8
    assert torch.equal(masks[first + 6], source_masks[first + 3])  # mcycle from motorcycle
    assert torch.equal(masks[first + 1], old_masks[first + 1])  # rider
    assert first == 0 or torch.equal(masks[0], source_masks[0])  # background


def test_the_same_classes_in_another_order_are_the_same_model() -> None:
    """By law: a permuted list of classes permutes the logits and changes nothing else."""
    model, source = built(1, COCO[::-1]), built(2, COCO)
    transfer(model, named(COCO[::-1]), source, named(COCO))
    pooled = torch.rand(5, 8, 3, 3)
    logits, deltas = model.eval().box_head(pooled)
    expected_logits, expected_deltas = source.eval().box_head(pooled)
    assert torch.equal(logits[:, 1:].flip(1), expected_logits[:, 1:]) and torch.equal(
        logits[:, 0], expected_logits[:, 0]
    )
    assert torch.equal(deltas.flip(1), expected_deltas)


def test_branches_that_only_one_of_them_has() -> None:
    jointed, plain = built(1, COCO, keypoint=True), built(2, COCO)
    before = {name: value.clone() for name, value in jointed.state_dict().items()}
    transfer(jointed, named(COCO), plain, named(COCO))
    assert torch.equal(jointed.state_dict()["keypoint_head.deconv.weight"], before["keypoint_head.deconv.weight"])
    transfer(plain, named(COCO), jointed, named(COCO))
    assert torch.equal(plain.state_dict()["box_head.deltas.bias"], jointed.state_dict()["box_head.deltas.bias"])


def test_what_is_refused_changes_nothing() -> None:
    model, source = built(1, CITYSCAPES), built(2, COCO)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = (model, named(CITYSCAPES), source, named(COCO))
    with pytest.raises(ValueError, match="unknown class to rename 'mcylce', did you mean 'mcycle'"):
        transfer(*arguments, {"mcylce": "motorcycle"})
    with pytest.raises(ValueError, match="that 'mcycle' is to be taken from"):
        transfer(*arguments, {"mcycle": "motorbike"})
    with pytest.raises(ValueError, match="none of the classes a, b"):
        transfer(built(1, ["a", "b"]), named(["a", "b"]), source, named(COCO))
    wide = build_model(replace(config(COCO), box=replace(MODEL.box, fc=(17,))))
    with pytest.raises(ValueError, match=r"another model: box_head.hidden.1.weight is \[17, 72\] there"):
        transfer(model, named(CITYSCAPES), wide, named(COCO))
    soft = built(2, COCO, replace(MODEL.mask, branch="mlp", fc=(8,), size=3))
    with pytest.raises(ValueError, match="another model: mask_head"):
        transfer(model, named(CITYSCAPES), soft, named(COCO))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
