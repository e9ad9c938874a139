"""Mask targets: what a box sees of its instance, by hand, by law, and against torchvision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from mrcnn_edu.masks import crop_masks, to_boxes

FIRST = torch.tensor([0])
MASKS = st.builds(
    lambda seed, share: torch.rand(2, 12, 16, generator=torch.Generator().manual_seed(seed)) < share,
    st.integers(0, 2**31),
    st.sampled_from([0.1, 0.5, 0.9]),
)


def square(x1: int, y1: int, x2: int, y2: int, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[:, y1:y2, x1:x2] = True
    return mask


def test_a_covered_share_by_hand():
    """Cells of 2 x 2 px over a mask that ends one pixel into the second column and the second row."""
    crop = crop_masks(square(0, 0, 3, 3), torch.tensor([[0.0, 0, 4, 4]]), FIRST, 2, rule="soft")
    assert crop.tolist() == [[[1.0, 0.5], [0.5, 0.25]]]
    crop = crop_masks(square(0, 0, 3, 3), torch.tensor([[0.0, 0, 4, 4]]), FIRST, 2)
    assert crop.tolist() == [[[1.0, 1.0], [1.0, 0.0]]]  # half covered counts


def test_half_a_pixel_apart():
    """A box over two whole pixels sees one of them; without alignment every sample sits half a pixel further on."""
    mask, box = square(1, 1, 2, 2, (4, 4)), torch.tensor([[1.0, 1, 3, 3]])
    assert crop_masks(mask, box, FIRST, 2, rule="soft").tolist() == [[[1.0, 0.0], [0.0, 0.0]]]
    shifted = crop_masks(mask, box, FIRST, 2, rule="soft", aligned=False)
    assert shifted.tolist() == [[[0.25, 0.0], [0.0, 0.0]]]


def test_each_box_sees_its_own_instance():
    masks = torch.cat([square(0, 0, 8, 8), square(8, 8, 16, 16)])
    boxes = torch.tensor([[8.0, 8, 16, 16], [8, 8, 16, 16], [0, 0, 8, 8]])
    crops = crop_masks(masks, boxes, torch.tensor([0, 1, 0]), 4)
    assert crops.flatten(1).mean(dim=1).tolist() == [0, 1, 1]
    assert crops.dtype == torch.float32


def test_the_tight_box_of_a_full_square_is_full():
    """With whole pixels to a cell; the corners of finer cells are rounded off by the bilinear samples."""
    masks = torch.cat([square(3, 5, 11, 9), square(0, 0, 4, 16)])
    assert (crop_masks(masks, to_boxes(masks), torch.tensor([0, 1]), 4, rule="soft") == 1).all()


def test_other_rules_are_refused():
    with pytest.raises(ValueError, match="soft and binary, got 'polygon'"):
        crop_masks(square(0, 0, 4, 4), torch.tensor([[0.0, 0, 4, 4]]), FIRST, 2, rule="polygon")


@given(MASKS, st.sampled_from(["soft", "binary"]))
def test_a_mirrored_mask_has_a_mirrored_crop(masks, rule):
    boxes, mirrored = torch.tensor([[2.0, 1, 10, 9]]), torch.tensor([[6.0, 1, 14, 9]])  # 16 px wide
    crop = crop_masks(masks, boxes, FIRST, 8, rule)
    assert torch.equal(crop_masks(masks.flip(-1), mirrored, FIRST, 8, rule), crop.flip(-1))


@given(MASKS, st.integers(0, 3), st.integers(0, 3))
def test_whole_pixels_are_copied_wherever_they_are(masks, right, down):
    box = torch.tensor([[2.0 + right, 1.0 + down, 10.0 + right, 9.0 + down]])
    crop = crop_masks(masks, box, torch.tensor([1]), 8, rule="soft")[0]
    assert torch.equal(crop, masks[1, 1 + down : 9 + down, 2 + right : 10 + right].float())


@given(MASKS)
def test_a_mask_and_the_rest_cover_every_cell_once(masks):
    boxes, matched = torch.tensor([[1.3, 2.1, 9.7, 8.2], [4.0, 4.0, 12.5, 11.0]]), torch.tensor([0, 1])
    crop = crop_masks(masks, boxes, matched, 5, rule="soft")
    rest = crop_masks(~masks, boxes, matched, 5, rule="soft")
    torch.testing.assert_close(crop + rest, torch.ones_like(crop))
    assert ((crop >= 0) & (crop <= 1 + 1e-6)).all()
    assert torch.equal(crop_masks(masks, boxes, matched, 5), (crop >= 0.5).float())


@given(MASKS, st.sampled_from([7, 14]))
def test_unaligned_soft_crops_are_torchvisions_targets(masks, size):
    boxes = torch.tensor([[1.3, 2.1, 9.7, 8.2], [-2.0, -3.0, 18.5, 11.0], [5.0, 5.0, 5.4, 5.9]])
    matched = torch.tensor([1, 0, 1])
    theirs = project_masks_on_boxes(masks.float(), boxes, matched, size)
    ours = crop_masks(masks, boxes, matched, size, rule="soft", aligned=False)
    torch.testing.assert_close(ours, theirs)
