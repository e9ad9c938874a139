"""Losses: by hand, by law, and against torch's and torchvision's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import fastrcnn_loss, keypointrcnn_loss, maskrcnn_loss

from mrcnn_edu.keypoints import encode
from mrcnn_edu.losses import (
    box_loss,
    classification_loss,
    keypoint_loss,
    mask_loss,
    multinomial_mask_loss,
    objectness_loss,
    roi_losses,
)
from mrcnn_edu.masks import crop_masks


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rand(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


# By hand --------------------------------------------------------------------------------------------


def test_objectness_by_hand():
    """An undecided logit costs ln 2 whichever the truth; log 3 is a probability of 3/4."""
    undecided = objectness_loss(torch.zeros(4), torch.tensor([True, False, False, True]), 4)
    torch.testing.assert_close(undecided, torch.tensor(math.log(2)))
    sure = torch.tensor([math.log(3)])
    torch.testing.assert_close(objectness_loss(sure, torch.tensor([True]), 1), torch.tensor(math.log(4 / 3)))
    torch.testing.assert_close(objectness_loss(sure, torch.tensor([False]), 2), torch.tensor(math.log(4) / 2))


@pytest.mark.parametrize(
    ("difference", "beta", "loss"),
    [
        (0.5, 1.0, 0.125),  # 0.5 ** 2 / 2
        (2.0, 1.0, 1.5),  # 2 - 1/2
        (-2.0, 1.0, 1.5),
        (0.5, 0.25, 0.375),  # 0.5 - 0.25 / 2
        (0.125, 0.25, 0.03125),  # 0.125 ** 2 / (2 * 0.25)
        (0.5, 0.0, 0.5),  # plain L1
        (1e-9, 0.0, 1e-9),
    ],
)
def test_smooth_l1_by_hand(difference, beta, loss):
    target = torch.zeros(1, 4)
    deltas = torch.tensor([[0.0, difference, 0.0, 0.0]])
    torch.testing.assert_close(box_loss(deltas, target, beta, 1), torch.tensor(loss))
    torch.testing.assert_close(box_loss(deltas, target, beta, 8), torch.tensor(loss / 8))


def test_classification_by_hand():
    labels = torch.tensor([0, 3, 1])
    torch.testing.assert_close(classification_loss(torch.zeros(3, 4), labels), torch.tensor(math.log(4)))
    logits = torch.tensor([[0.0, math.log(3)]])  # 1/4 background, 3/4 class 1
    torch.testing.assert_close(classification_loss(logits, torch.tensor([1])), torch.tensor(math.log(4 / 3)))


def test_masks_by_hand():
    """Two of four cells right by log 3, two wrong: the average of ln(4/3) and ln 4."""
    logits = torch.full((1, 2, 2, 2), math.log(3))
    target = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    loss = mask_loss(logits, target, torch.tensor([2]))
    torch.testing.assert_close(loss, torch.tensor((math.log(4 / 3) + math.log(4)) / 2))


def test_multinomial_masks_by_hand():
    """Three channels of 1, 2 and 5 eighths: -ln 5/8 where the object of class 2 is, -ln 1/8 where it is not."""
    logits = torch.tensor([1.0, 2.0, 5.0]).log().reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    target = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])
    loss = multinomial_mask_loss(logits, target, torch.tensor([2]))
    torch.testing.assert_close(loss, torch.tensor((3 * math.log(8 / 5) + math.log(8)) / 4))


def test_single_rois_by_hand():
    """A positive costs ln 3 and the half square of its delta, a negative ln 3 whatever its deltas say."""
    deltas = torch.zeros(2, 2, 4)
    deltas[0, 1, 0], deltas[1] = 0.5, 9.0
    losses = roi_losses(torch.zeros(2, 3), deltas, torch.tensor([2, 0]), torch.zeros(2, 4), 1.0)
    torch.testing.assert_close(losses, torch.tensor([math.log(3) + 0.125, math.log(3)]))


def test_keypoints_by_hand():
    cells, visible = torch.tensor([[0, 5]]), torch.tensor([[True, True]])
    torch.testing.assert_close(keypoint_loss(torch.zeros(1, 2, 3, 3), cells, visible), torch.tensor(math.log(9)))
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 0, 1, 0] = math.log(5)  # cell 2 has 5 / 8 of the first joint
    loss = keypoint_loss(logits, torch.tensor([[2, 0]]), torch.tensor([[True, False]]))
    torch.testing.assert_close(loss, torch.tensor(math.log(8 / 5)))


# By law ---------------------------------------------------------------------------------------------


def test_only_the_own_class_of_a_mask_learns(random):
    logits = rand(2, 3, 4, 4, generator=random).requires_grad_()
    mask_loss(logits, torch.ones(2, 4, 4), torch.tensor([1, 3])).backward()
    learns = logits.grad.flatten(2).abs().sum(dim=2) > 0
    assert learns.tolist() == [[True, False, False], [False, False, True]]


def test_multinomial_masks_compete(random):
    logits = rand(2, 4, 3, 3, generator=random).requires_grad_()
    multinomial_mask_loss(logits, torch.ones(2, 3, 3), torch.tensor([1, 3])).backward()
    assert (logits.grad != 0).all()
    torch.testing.assert_close(logits.grad.sum(dim=1), torch.zeros(2, 3, 3))  # what one gains the others lose


def test_only_visible_joints_learn(random):
    logits = rand(2, 2, 3, 3, generator=random).requires_grad_()
    visible = torch.tensor([[True, False], [False, False]])
    keypoint_loss(logits, torch.zeros(2, 2, dtype=torch.int64), visible).backward()
    assert torch.equal(logits.grad.flatten(2).abs().sum(dim=2) > 0, visible)


def test_a_softmax_does_not_see_a_shift(random):
    logits, labels = rand(5, 4, generator=random), torch.tensor([0, 1, 2, 3, 0])
    torch.testing.assert_close(classification_loss(logits + 7, labels), classification_loss(logits, labels))
    maps, cells, visible = rand(2, 3, 4, 4, generator=random), torch.full((2, 3), 6), torch.ones(2, 3).bool()
    shift = rand(2, 3, 1, 1, generator=random) * 5
    torch.testing.assert_close(keypoint_loss(maps + shift, cells, visible), keypoint_loss(maps, cells, visible))


def test_the_divisor_divides_and_nothing_else(random):
    deltas, target = rand(3, 4, generator=random), rand(3, 4, generator=random)
    torch.testing.assert_close(4 * box_loss(deltas, target, 1.0, 8), box_loss(deltas, target, 1.0, 2))
    logits, positive = rand(6, generator=random), torch.arange(6) < 2
    torch.testing.assert_close(4 * objectness_loss(logits, positive, 8), objectness_loss(logits, positive, 2))


@pytest.mark.parametrize(
    "name", ["objectness", "box", "l1", "classification", "mask", "multinomial", "keypoint", "no visible joint"]
)
def test_nothing_to_learn_is_zero_and_still_has_gradients(name):
    """A layer whose outputs nobody needs has a gradient of zero, not none: every process has the same graph."""
    layer, inputs = torch.nn.Linear(2, 36), torch.ones(1 if name == "no visible joint" else 0, 2)
    out, none = layer(inputs), torch.zeros(0, dtype=torch.int64)
    loss = {
        "objectness": lambda: objectness_loss(out.flatten(), torch.zeros(0, dtype=torch.bool), 1),
        "box": lambda: box_loss(out.reshape(-1, 4), torch.zeros(0, 4), 1.0, 1),
        "l1": lambda: box_loss(out.reshape(-1, 4), torch.zeros(0, 4), 0.0, 1),
        "classification": lambda: classification_loss(out, none),
        "mask": lambda: mask_loss(out.reshape(-1, 4, 3, 3), torch.zeros(0, 3, 3), none),
        "multinomial": lambda: multinomial_mask_loss(out.reshape(-1, 4, 3, 3), torch.zeros(0, 3, 3), none),
        "keypoint": lambda: keypoint_loss(
            out.reshape(-1, 4, 3, 3), torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.bool)
        ),
        "no visible joint": lambda: keypoint_loss(
            out.reshape(-1, 4, 3, 3), torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.bool)
        ),
    }[name]()
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))


def test_gradients():
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    wanted = torch.zeros(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda d: box_loss(d, wanted, 0.5, 3), draw(3, 4))
    labels = torch.tensor([0, 2, 1])
    assert torch.autograd.gradcheck(lambda x: classification_loss(x, labels), draw(3, 3))
    target = torch.rand(2, 3, 3, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: mask_loss(x, target, torch.tensor([2, 1])), draw(2, 2, 3, 3))
    assert torch.autograd.gradcheck(lambda x: multinomial_mask_loss(x, target, torch.tensor([2, 1])), draw(2, 3, 3, 3))
    cells, visible = torch.tensor([[1, 8]]), torch.tensor([[True, True]])
    assert torch.autograd.gradcheck(lambda x: keypoint_loss(x, cells, visible), draw(1, 2, 3, 3))


# By oracle ------------------------------------------------------------------------------------------


def test_objectness_is_torchs(random):
    logits, positive = rand(20, generator=random) * 10, torch.arange(20) % 3 == 0
    theirs = F.binary_cross_entropy(logits.double().sigmoid(), positive.double()).float()
    torch.testing.assert_close(objectness_loss(logits, positive, 20), theirs)


def test_box_head_losses_are_torchvisions(random):
    logits, deltas = rand(6, 4, generator=random), rand(6, 4, 4, generator=random)
    labels, wanted = torch.tensor([0, 3, 1, 0, 2, 1]), rand(6, 4, generator=random)
    theirs = fastrcnn_loss(logits, deltas.flatten(1), [labels], [wanted])
    positives = labels > 0
    own = deltas[positives, labels[positives]]  # torchvision keeps a row for the background
    torch.testing.assert_close(classification_loss(logits, labels), theirs[0])
    torch.testing.assert_close(box_loss(own, wanted[positives], 1 / 9, len(labels)), theirs[1])


def test_multinomial_masks_are_torchs_cross_entropy(random):
    """With a target of zeros and ones: the class inside the mask, 0 outside, averaged over all pixels."""
    logits, inside = rand(3, 5, 6, 6, generator=random), torch.rand(3, 6, 6, generator=random) > 0.4
    labels = torch.tensor([4, 1, 2])
    theirs = F.cross_entropy(logits, torch.where(inside, labels[:, None, None], 0))
    torch.testing.assert_close(multinomial_mask_loss(logits, inside.float(), labels), theirs)


def rois(count: int, generator: torch.Generator) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, generator=generator) * 30
    return torch.cat([corners.amin(1), corners.amax(1) + 2], dim=1)


def test_the_mask_loss_is_torchvisions(random):
    boxes, masks = rois(5, random), torch.rand(2, 32, 40, generator=random) > 0.5
    matched, truth_labels = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([2, 1])
    logits = rand(5, 3, 14, 14, generator=random)  # background, 1, 2
    theirs = maskrcnn_loss(logits, [boxes], [masks.float()], [truth_labels], [matched])
    target = crop_masks(masks, boxes, matched, 14, rule="soft", aligned=False)
    torch.testing.assert_close(mask_loss(logits[:, 1:], target, truth_labels[matched]), theirs)


def test_the_keypoint_loss_is_torchvisions(random):
    boxes, matched = rois(5, random), torch.tensor([0, 1, 1, 0, 1])
    keypoints = torch.cat([torch.rand(2, 3, 2, generator=random) * 30, torch.tensor([[[2.0], [0], [1]]] * 2)], dim=2)
    logits = rand(5, 3, 8, 8, generator=random)
    theirs = keypointrcnn_loss(logits, [boxes], [keypoints], [matched])
    cells, visible = encode(keypoints[matched], boxes, 8)
    assert 0 < visible.sum() < 10  # some joints lie outside
    torch.testing.assert_close(keypoint_loss(logits, cells, visible), theirs)
