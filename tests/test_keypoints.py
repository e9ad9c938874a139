"""Keypoints: cells and peaks by hand, by law, and against torchvision."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints, keypoints_to_heatmap

from mrcnn_edu import boxes as box_ops
from mrcnn_edu.keypoints import decode, encode, flip, resize


def random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 40
    return torch.cat([corner, corner + 0.5 + torch.rand(count, 2, generator=generator) * 50], dim=1)


# To cells -------------------------------------------------------------------------------------------


def test_cells_by_hand():
    """A box from (10, 20) to (18, 28) in 4 x 4 cells of 2 x 2 pixels."""
    box = torch.tensor([[10.0, 20, 18, 28]])
    keypoints = torch.tensor(
        [
            [
                [10.0, 20.0, 2.0],  # the first corner: row 0, column 0
                [13.9, 22.0, 1.0],  # column 1, row 1; hidden joints are learnt as well
                [17.9, 20.0, 2.0],  # column 3
                [18.0, 28.0, 2.0],  # on the right and on the lower border: the last cell
                [18.1, 24.0, 2.0],  # outside
                [9.9, 24.0, 2.0],
                [14.0, 19.9, 2.0],
                [14.0, 24.0, 0.0],  # unlabelled
            ]
        ]
    )
    cells, visible = encode(keypoints, box, 4)
    assert visible.tolist() == [[True, True, True, True, False, False, False, False]]
    assert cells.tolist() == [[0, 1 * 4 + 1, 3, 3 * 4 + 3, 0, 0, 0, 0]]
    assert cells.dtype == torch.int64


def test_no_rois_give_no_cells():
    cells, visible = encode(torch.zeros(0, 5, 3), torch.zeros(0, 4), 56)
    assert cells.shape == visible.shape == (0, 5)


def test_cells_are_torchvisions():
    boxes = random_boxes(30, seed=0)
    generator = torch.Generator().manual_seed(1)
    inside = boxes[:, None, :2] + (boxes[:, 2:] - boxes[:, :2])[:, None] * torch.rand(30, 4, 2, generator=generator)
    spread = inside + 8 * torch.randn(30, 4, 2, generator=generator)
    border = boxes[:, None, 2:].expand(-1, 1, -1)
    xy = torch.cat([inside, spread, border], dim=1)
    keypoints = torch.cat([xy, torch.randint(0, 3, (30, 9, 1), generator=generator)], dim=2)
    cells, visible = encode(keypoints, boxes, 56)
    their_cells, their_visible = keypoints_to_heatmap(keypoints, boxes, 56)
    assert torch.equal(cells, their_cells)
    assert torch.equal(visible, their_visible.bool())
    assert 0 < visible.sum() < visible.numel()


@given(st.integers(-80, 80), st.integers(-80, 80), st.sampled_from([0.5, 2.0, 4.0]))
def test_cells_do_not_know_place_or_scale(right, down, scale):
    """In eighths of a pixel and with sides of a power of two nothing is rounded."""
    generator = torch.Generator().manual_seed(2)
    corner = torch.randint(0, 100, (8, 2), generator=generator) / 8
    boxes = torch.cat([corner, corner + 2.0 ** torch.randint(3, 6, (8, 2), generator=generator)], dim=1)
    xy = torch.randint(0, 240, (8, 5, 2), generator=generator) / 8
    keypoints = torch.cat([xy, torch.full((8, 5, 1), 2.0)], dim=2)
    expected = encode(keypoints, boxes, 8)
    assert expected[1].any()
    shift = torch.tensor([right / 8, down / 8])
    moved = torch.cat([xy + shift, keypoints[..., 2:]], dim=2)
    for place, around in ((moved, boxes + shift.repeat(2)), (resize(keypoints, scale, scale), boxes * scale)):
        cells, visible = encode(place, around, 8)
        assert torch.equal(cells, expected[0]) and torch.equal(visible, expected[1])


# And back -------------------------------------------------------------------------------------------


def test_a_peak_by_hand():
    """One pixel per cell: the peak in row 1, column 2 is the middle of that pixel."""
    logits = torch.zeros(1, 1, 4, 4)
    logits[0, 0, 1, 2] = 5.0
    x, y, score = decode(logits, torch.tensor([[10.0, 20, 14, 24]]))[0, 0].tolist()
    assert (x, y) == (12.5, 21.5)
    assert math.isclose(score, math.exp(5) / (math.exp(5) + 15), rel_tol=1e-5)  # the softmax over 16 cells


def test_a_fraction_of_a_pixel_stretches_the_pixels():
    """3.5 px wide: four columns of 0.875 px each, the last one's middle at 3.5 * 0.875."""
    logits = torch.zeros(1, 1, 4, 4)
    logits[0, 0, 0, 3] = 5.0
    found = decode(logits, torch.tensor([[0.0, 0, 3.5, 4]]))[0, 0]
    assert found[:2].tolist() == [3.5 * 0.875, 0.5]


def test_boxes_thinner_than_a_pixel_count_as_one_pixel():
    found = decode(torch.zeros(1, 2, 4, 4), torch.tensor([[5.0, 6, 5.2, 6]]))
    assert found[0, :, :2].tolist() == [[5.5, 6.5]] * 2


def test_no_boxes_give_no_keypoints():
    assert decode(torch.zeros(0, 17, 56, 56), torch.zeros(0, 4)).shape == (0, 17, 3)


def test_positions_are_torchvisions():
    boxes = random_boxes(12, seed=3)
    logits = 3 * torch.randn(12, 5, 14, 14, generator=torch.Generator().manual_seed(4))
    theirs, _ = heatmaps_to_keypoints(logits, boxes)
    torch.testing.assert_close(decode(logits, boxes)[..., :2], theirs[..., :2])


def test_scores_are_probabilities():
    boxes = random_boxes(12, seed=5)
    logits = 10 * torch.randn(12, 5, 14, 14, generator=torch.Generator().manual_seed(6))
    scores = decode(logits, boxes)[..., 2]
    assert ((scores > 0) & (scores <= 1)).all()
    torch.testing.assert_close(decode(logits + 30, boxes)[..., 2], scores, atol=1e-4, rtol=0)


def test_decode_undoes_encode_to_half_a_cell():
    """Cells one to one with pixels: each joint comes back to the middle of the pixel it lay in."""
    boxes = torch.tensor([[3.0, 5, 19, 21], [0, 0, 16, 16]])
    generator = torch.Generator().manual_seed(7)
    xy = boxes[:, None, :2] + 16 * torch.rand(2, 6, 2, generator=generator)
    cells, visible = encode(torch.cat([xy, torch.ones(2, 6, 1)], dim=2), boxes, 16)
    assert visible.all()
    logits = 8 * torch.nn.functional.one_hot(cells, 256).reshape(2, 6, 16, 16).float()
    assert torch.equal(decode(logits, boxes)[..., :2], xy.floor() + 0.5)


def test_a_mirrored_map_has_a_mirrored_peak():
    boxes = random_boxes(8, seed=8)
    logits = 3 * torch.randn(8, 3, 7, 7, generator=torch.Generator().manual_seed(9))
    found, mirrored = decode(logits, boxes), decode(logits.flip(-1), box_ops.flip(boxes, 100))
    torch.testing.assert_close(mirrored[..., 0], 100 - found[..., 0], atol=1e-3, rtol=0)
    torch.testing.assert_close(mirrored[..., 1:], found[..., 1:], atol=1e-3, rtol=0)


# In the image ---------------------------------------------------------------------------------------


def test_resize_by_hand():
    keypoints = torch.tensor([[[2.0, 3.0, 1.0]]])
    assert resize(keypoints, 0.5, 4.0).tolist() == [[[1.0, 12.0, 1.0]]]


def test_a_mirror_swaps_left_and_right():
    """A nose, a left and a right hand, and a joint nobody has marked."""
    keypoints = torch.tensor([[[1.0, 1.0, 2.0], [2.0, 5.0, 2.0], [8.0, 6.0, 1.0], [0.0, 0.0, 0.0]]])
    mirrored = flip(keypoints, 10, ((1, 2),))
    assert mirrored.tolist() == [[[9.0, 1.0, 2.0], [2.0, 6.0, 1.0], [8.0, 5.0, 2.0], [0.0, 0.0, 0.0]]]
    assert torch.equal(flip(mirrored, 10, ((1, 2),)), keypoints)
