"""The heads: mask branches and their two formulations, hard example mining, and what C4's branches share."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import images, shrink, truth

from mrcnn_edu import boxes as box_ops
from mrcnn_edu.config import MaskHeadConfig
from mrcnn_edu.losses import box_loss, classification_loss
from mrcnn_edu.models.box_head import candidate_rois, hardest_rois, label_rois, sample_rois
from mrcnn_edu.models.mask_head import MaskHead, MLPMaskHead, build_mask_head, mask_head_loss, mask_outputs, own_masks
from mrcnn_edu.models.mask_rcnn import build_model
from mrcnn_edu.presets import MODELS
from mrcnn_edu.structures import Proposals, Samples, Target

ONES = (1.0, 1.0, 1.0, 1.0)


# Mask branches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "loss", "outputs"),
    [("specific", "sigmoid", 80), ("specific", "softmax", 81), ("agnostic", "sigmoid", 1), ("agnostic", "softmax", 2)],
)
def test_outputs_by_hand(kind, loss, outputs):
    assert mask_outputs(80, kind, loss) == outputs
    for branch in ("fcn", "mlp"):
        config = MaskHeadConfig(branch=branch, convs=(4,), fc=(4,), classes=kind, loss=loss)
        assert build_mask_head(config, 3, 14, 80, None, None)(torch.rand(2, 3, 14, 14)).shape == (2, outputs, 28, 28)


def test_an_fcn_keeps_places_and_an_mlp_does_not():
    """Features moved by one cell move the mask by two pixels, away from the border; only the FCN obeys."""
    torch.manual_seed(0)
    pooled = torch.zeros(1, 2, 14, 14)
    pooled[:, :, 6, 6] = 1
    moved = pooled.roll((1, 1), dims=(2, 3))
    fcn, mlp = MaskHead(2, (4, 4), 1), MLPMaskHead(2, 14, (8,), 1, 28)
    for head, keeps in ((fcn, True), (mlp, False)):
        torch.nn.init.normal_(head.mask_logits.weight)
        assert torch.allclose(head(moved), head(pooled).roll((2, 2), dims=(2, 3)), atol=1e-5) is keeps


def test_the_multinomial_mask_is_its_class_against_the_background():
    """exp(logits) of 1, 3 and 12: class 1 has 3 / (1 + 3) against the background, although class 2 is likelier."""
    logits = torch.tensor([1.0, 3.0, 12.0]).log().reshape(1, 3, 1, 1).expand(2, 3, 2, 2)
    masks = own_masks(logits, torch.tensor([1, 2]), loss="softmax")
    torch.testing.assert_close(masks, torch.tensor([3 / 4, 12 / 13])[:, None, None].expand(2, 2, 2))
    independent = own_masks(logits[:, 1:], torch.tensor([1, 2]))
    torch.testing.assert_close(independent, torch.tensor([3 / 4, 12 / 13])[:, None, None].expand(2, 2, 2))


def test_an_agnostic_mask_is_the_same_for_every_class():
    logits = torch.randn(3, 1, 4, 4)
    torch.testing.assert_close(own_masks(logits, torch.tensor([1, 5, 80]), "agnostic"), logits[:, 0].sigmoid())
    two = torch.randn(2, 2, 4, 4)
    torch.testing.assert_close(
        own_masks(two, torch.tensor([7, 3]), "agnostic", "softmax"), two.softmax(dim=1)[:, 1], rtol=1e-5, atol=1e-6
    )


def test_who_learns_from_a_positive():
    """Independent: the mask of its class. Multinomial: all of them. Agnostic: the only one."""
    samples = [Samples(torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([2]), torch.tensor([0]))]
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :, :4] = True
    targets = [Target(torch.tensor([[0.0, 0.0, 4.0, 8.0]]), torch.tensor([2]), mask)]
    for kind, loss, expected in (
        ("specific", "sigmoid", [False, True, False]),
        ("specific", "softmax", [True, True, True, True]),
        ("agnostic", "sigmoid", [True]),
        ("agnostic", "softmax", [True, True]),
    ):
        logits = torch.zeros(1, len(expected), 4, 4, requires_grad=True)
        value = mask_head_loss(logits, samples, targets, "binary", True, kind, loss)
        torch.testing.assert_close(value.detach(), torch.tensor(math.log(2 if loss == "sigmoid" else len(expected))))
        value.backward()
        assert (logits.grad.abs().sum(dim=(0, 2, 3)) > 0).tolist() == expected


# C4 -------------------------------------------------------------------------------------------------


def test_both_branches_of_c4_see_the_same_maps():
    """The mask branch takes rows of what the box head saw; pooled anew they are the same numbers."""
    torch.manual_seed(0)
    config = shrink(MODELS["maskrcnn_resnet50_c4"])
    model = build_model(config).eval()
    batch = images()
    features = model.backbone(model.normalise(batch))
    boxes = [torch.tensor([[8.0, 12, 40, 44], [0, 0, 20, 30], [5, 5, 60, 60]]), torch.tensor([[1.0, 2, 30, 40]])]
    samples = [Samples(part, torch.ones(len(part)).long(), torch.zeros(len(part)).long()) for part in boxes]
    rows = [torch.tensor([2, 0]), torch.tensor([0])]
    calls = []
    model.res5.register_forward_hook(lambda *_: calls.append(1))
    maps = model.roi_maps(model.box_features, features, boxes)
    taken = model.maps_of(rows, model.mask_features, features, samples, maps)
    assert len(calls) == 1
    anew = model.roi_maps(model.mask_features, features, [part[some] for part, some in zip(boxes, rows)])
    torch.testing.assert_close(taken, anew)
    calls.clear()
    model(batch, [truth(config)] * 2)
    assert len(calls) == 1  # res5 runs once in training, for all branches


# Hard examples --------------------------------------------------------------------------------------


def rois() -> tuple[Proposals, Target]:
    """Two boxes on the object, one beside it, one far away."""
    boxes = torch.tensor(
        [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 11.0], [0.0, 0.0, 10.0, 4.0], [50.0, 50.0, 60.0, 60.0]]
    )
    return Proposals(boxes, torch.ones(4)), Target(torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([2]))


def test_labels_by_hand():
    """IoU 1, 10/11, 4/10, 0, and the true box itself."""
    samples, status = label_rois(*rois(), torch.zeros(0, 4), 0.5)
    assert samples.labels.tolist() == [2, 2, 0, 0, 2] and status.tolist() == [1, 1, 0, 0, 1]
    assert len(candidate_rois(*rois(), torch.zeros(0, 4), 0.5)) == 5
    crowd = torch.tensor([[45.0, 45.0, 65.0, 65.0]])
    assert candidate_rois(*rois(), crowd, 0.5, 0.7).labels.tolist() == [2, 2, 0, 2]  # the one in the crowd is left out
    torch.manual_seed(0)
    drawn = sample_rois(*rois(), torch.zeros(0, 4), 4, 0.25, 0.5)
    assert sorted(drawn.labels.tolist()) == [0, 0, 2]  # one of four may be positive, and there are two negatives


def test_the_hardest_by_hand():
    """Class logits make background roi 3 the worst, then positive roi 1; roi 0 and 4 hide behind it at IoU > 0.7."""
    proposals, target = rois()
    candidates = candidate_rois(proposals, target, torch.zeros(0, 4), 0.5)
    class_logits = torch.zeros(5, 3)
    class_logits[0, 2], class_logits[1, 0], class_logits[2, 0], class_logits[3, 1] = (
        5,
        4,
        6,
        9,
    )  # right wrong right wrong
    deltas = torch.zeros(5, 2, 4)
    found = hardest_rois(class_logits, deltas, candidates, target, 2, 0.7, ONES, 1.0)
    assert found.boxes.tolist() == [[0.0, 0.0, 10.0, 11.0], [50.0, 50.0, 60.0, 60.0]] and found.labels.tolist() == [
        2,
        0,
    ]
    all_apart = hardest_rois(class_logits, deltas, candidates, target, 9, 0.7, ONES, 1.0)
    assert all_apart.labels.tolist() == [2, 0, 0]
    everything = hardest_rois(class_logits, deltas, candidates, target, 9, 1.0, ONES, 1.0)
    assert len(everything) == 5


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_losses_of_single_rois_add_up_to_the_losses_of_the_head(beta):
    """[38] ranks by L_cls + L_box: alone in the batch, a roi's rank value is the head's loss for it."""
    generator = torch.Generator().manual_seed(0)
    proposals, target = rois()
    candidates = candidate_rois(proposals, target, torch.zeros(0, 4), 0.5)
    class_logits, deltas = torch.randn(5, 3, generator=generator), torch.randn(5, 2, 4, generator=generator)
    totals = []
    for row in range(5):
        label = candidates.labels[row : row + 1]
        total = classification_loss(class_logits[row : row + 1], label)
        if label > 0:
            wanted = box_ops.encode(target.boxes, candidates.boxes[row : row + 1], ONES)
            total = total + box_loss(deltas[row : row + 1, label - 1].reshape(1, 4), wanted, beta, 1)
        totals.append(total)
    order = torch.stack(totals).argsort(descending=True)
    for count in (1, 2, 3):
        found = hardest_rois(class_logits, deltas, candidates, target, count, 1.0, ONES, beta)
        expected = candidates[order[:count].sort().values]
        assert torch.equal(found.boxes, expected.boxes)


def test_mining_takes_no_gradient_and_no_more_rois_than_asked():
    torch.manual_seed(0)
    config = MODELS["maskrcnn_resnet50_fpn"]
    config = shrink(replace(config, box=replace(config.box, sampling="hardest")))
    model, calls = build_model(config), []
    model.box_head.register_forward_hook(
        lambda _, inputs, outputs: calls.append((len(inputs[0]), outputs[0].requires_grad))
    )
    model(images(), [truth(config)] * 2)
    (seen, learns), (kept, trains) = calls
    assert not learns and trains
    assert seen > 32 and kept <= 32  # 20 proposals and the true box in each of two images; 16 of each at most


def test_mining_without_anything_to_find():
    config = MODELS["maskrcnn_resnet50_fpn"]
    config = shrink(replace(config, box=replace(config.box, sampling="hardest")))
    losses = build_model(config)(images(), [Target.empty((64, 64)), truth(config)])
    assert all(loss.isfinite() for loss in losses.values())
