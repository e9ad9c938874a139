"""Pasting masks into the image: by hand, by law, and against torchvision."""

import numpy as np
import pytest
import torch
from ops_cases import ALL, FAST, generator
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

from mrcnn_edu import ops

RULES = ["continuous", "integer"]


def some_masks(seed: int, count: int, side: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(seed)
    extent = torch.tensor([size[1], size[0]])
    corner = (torch.rand(count, 2, generator=g) - 0.3) * extent
    boxes = torch.cat([corner, corner + torch.rand(count, 2, generator=g) * extent], dim=1)
    return torch.rand(count, side, side, generator=g), boxes


@pytest.mark.parametrize("name", ALL)
def test_a_full_mask_sets_exactly_its_box(name):
    full = torch.ones(4, 28, 28)
    boxes = torch.tensor([[10.0, 10, 20, 20], [0, 0, 48, 32], [-5, 3.5, 300, 300], [10.5, 10.4, 20.5, 20.6]])
    with ops.use(name):
        pasted = ops.paste_masks(full, boxes, (32, 48))
    assert pasted.dtype == torch.bool
    assert pasted.sum(dim=(1, 2)).tolist() == [100, 32 * 48, 29 * 48, 10 * 11]
    assert pasted[0, 10:20, 10:20].all()  # pixel 10 covers [10, 11)
    assert pasted[3, 10:21, 10:20].all()  # centres from 10.5 to 19.5, and from 10.5 to 20.5


@pytest.mark.parametrize("name", ALL)
def test_by_hand(name):
    """A 2 x 2 mask 0 1 / 0 1 in a box 4 wide: columns 0, 0.25, 0.75, 1, and 0.5 or more is set."""
    mask = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    with ops.use(name):
        probabilities = ops.paste_masks(mask, torch.tensor([[1.0, 1, 5, 5]]), (6, 6), threshold=None)
        expected = torch.zeros(1, 6, 6)
        expected[0, 1:5, 1:5] = torch.tensor([0, 0.25, 0.75, 1])
        assert torch.equal(probabilities, expected)
        assert torch.equal(ops.paste_masks(mask, torch.tensor([[1.0, 1, 5, 5]]), (6, 6)), expected >= 0.5)
        assert torch.equal(ops.paste_masks(mask, torch.tensor([[1.0, 1, 5, 5]]), (6, 6), 0.75), expected >= 0.75)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rule", RULES)
def test_nothing_outside_the_image(name, rule):
    boxes = torch.tensor([[-60.0, -60, -40, -40], [50, 5, 70, 9], [5, 5, 5, 5], [9, 9, 3, 3], [2e9, 0, 3e9, 9]])
    with ops.use(name):
        assert not ops.paste_masks(torch.ones(5, 7, 7), boxes[:5], (30, 40), rule="continuous").any()
        far = ops.paste_masks(torch.ones(3, 7, 7), boxes[[0, 1, 4]], (30, 40), rule=rule)
        assert far.shape == (3, 30, 40) and not far.any()
        assert ops.paste_masks(torch.ones(0, 7, 7), torch.zeros(0, 4), (30, 40), rule=rule).shape == (0, 30, 40)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("rule", RULES)
def test_boxes_far_larger_than_the_image(name, rule):
    """Clipped before anything is allocated, and finite boxes of any size are defined."""
    boxes = torch.tensor([[-1e9, -1e9, 1e9, 1e9], [-3e38, -3e38, 3e38, 3e38]])
    with ops.use(name):
        assert ops.paste_masks(torch.ones(2, 28, 28), boxes, (20, 30), rule=rule).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("side", [1, 7])
def test_equals_the_loops(name, rule, side):
    masks, boxes = some_masks(0, 12, side, (14, 18))
    with ops.use("reference"):
        expected = ops.paste_masks(masks, boxes, (14, 18), threshold=None, rule=rule)
    with ops.use(name):
        got = ops.paste_masks(masks, boxes, (14, 18), threshold=None, rule=rule)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
def test_integer_rule_equals_torchvision(name):
    masks, boxes = some_masks(1, 60, 28, (120, 160))
    boxes = boxes[(boxes[:, 2:] > 2).all(1)]  # torchvision fails on boxes outside the image
    masks = masks[: len(boxes)]
    expected = paste_masks_in_image(masks[:, None], boxes, (120, 160))[:, 0]
    with ops.use(name):
        torch.testing.assert_close(
            ops.paste_masks(masks, boxes, (120, 160), None, "integer"), expected, rtol=0, atol=1e-5
        )
        different = ops.paste_masks(masks, boxes, (120, 160), 0.5, "integer") != (expected >= 0.5)
    assert different.float().mean() < 1e-5  # a probability within rounding of one half


@pytest.mark.parametrize("name", FAST)
def test_laws(name):
    """Moving the box by whole pixels moves the mask; mirroring mask and box mirrors it; a constant stays constant."""
    masks, boxes = some_masks(2, 20, 14, (40, 50))
    with ops.use(name):
        here = ops.paste_masks(masks, boxes, (40, 50), threshold=None)
        there = ops.paste_masks(masks, boxes + torch.tensor([3.0, 2, 3, 2]), (42, 53), threshold=None)
        torch.testing.assert_close(there[:, 2:, 3:], here, rtol=0, atol=1e-4)
        mirrored = torch.stack([50 - boxes[:, 2], boxes[:, 1], 50 - boxes[:, 0], boxes[:, 3]], dim=1)
        flipped = ops.paste_masks(masks.flip(2), mirrored, (40, 50), threshold=None)
        torch.testing.assert_close(flipped.flip(2), here, rtol=0, atol=1e-4)
        constant = ops.paste_masks(torch.full((20, 14, 14), 0.3), boxes, (40, 50), threshold=None)
        assert set(constant.unique().tolist()) <= {0.0, torch.tensor(0.3).item()}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rule", RULES)
def test_crops_and_run_lengths_are_the_same_masks(name, rule):
    masks, boxes = some_masks(3, 8, 5, (12, 15))
    boxes[0], masks[0] = torch.tensor([-9.0, -9, 30, 30]), 1  # the whole image: its columns run into each other
    boxes[1] = torch.tensor([40.0, 40, 50, 50])
    with ops.use(name):
        pasted = ops.paste_masks(masks, boxes, (12, 15), rule=rule)
        crops = ops.paste_crops(masks, boxes, (12, 15), rule=rule)
        rles = ops.paste_rle(masks, boxes, (12, 15), rule=rule)
    for mask, (top, left, crop), rle in zip(pasted, crops, rles):
        canvas = torch.zeros(12, 15, dtype=torch.bool)
        canvas[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
        assert torch.equal(canvas, mask)
        assert sum(rle["counts"]) == 12 * 15 and all(count > 0 for count in rle["counts"][1:])
        decoded = coco_mask.decode(coco_mask.frPyObjects(rle, 12, 15))
        assert np.array_equal(decoded, mask.numpy())


@pytest.mark.parametrize("name", FAST)
def test_half_precision_masks(name):
    masks, boxes = some_masks(4, 5, 14, (30, 30))
    with ops.use(name):
        half = ops.paste_masks(masks.bfloat16(), boxes, (30, 30), threshold=None)
        assert torch.equal(half, ops.paste_masks(masks.bfloat16().float(), boxes, (30, 30), threshold=None))
