"""Anchors: cells and grids by hand, by law, and against torchvision's generator."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from mrcnn_edu.anchors import cell_anchors, grid_anchors, inside

RATIOS = (0.5, 1.0, 2.0)  # height / width
STRIDES = (4, 8, 16, 32, 64)
SIZES = (32, 64, 128, 256, 512)


def sides(anchors: torch.Tensor, plus_one: int = 0) -> list[tuple[float, float]]:
    """(width, height) of each anchor."""
    return [tuple(pair) for pair in (anchors[:, 2:] - anchors[:, :2] + plus_one).tolist()]


def test_exact_anchors_have_their_area_and_their_ratio():
    anchors = cell_anchors((32, 64), RATIOS)
    width, height = torch.tensor(sides(anchors)).unbind(1)
    torch.testing.assert_close(width * height, torch.tensor([32.0**2] * 3 + [64.0**2] * 3))  # sizes outermost
    torch.testing.assert_close(height / width, torch.tensor(RATIOS * 2))
    torch.testing.assert_close(anchors[:, :2], -anchors[:, 2:])  # around the origin


def test_a_square_anchor_by_hand():
    assert cell_anchors((32,), (1.0,)).tolist() == [[-16, -16, 16, 16]]
    assert cell_anchors((32,), (4.0,)).tolist() == [[-8, -32, 8, 32]]  # four times as high as wide


def test_corners_to_whole_pixels():
    """32 at 1 : 2 is 45.25 x 22.63: half of that, 22.63 and 11.31, rounds to 23 and 11."""
    anchors = cell_anchors((32,), RATIOS, "corners")
    assert anchors.tolist() == [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]
    assert sides(anchors)[0] == (46, 22)


def test_sides_on_the_stride_grid():
    """A 4 x 4 cell at 1 : 2 is 5.66 wide, so 6, and 6 / 2 = 3 high; eight times that is 48 x 24."""
    anchors = cell_anchors((32,), RATIOS, "grid", stride=4)
    assert sides(anchors, plus_one=1) == [(48, 24), (32, 32), (24, 48)]  # boxes hold their last pixel's index
    middle = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert middle.tolist() == [[1.5, 1.5]] * 3  # of the cell's pixels 0, 1, 2, 3


@pytest.mark.parametrize(
    ("stride", "wide", "high"),
    [
        # width round(stride * 1.414), height half of it, an exact half to the even neighbour
        (4, (6, 3), (3, 6)),
        (8, (11, 6), (6, 12)),  # 5.5 -> 6
        (16, (23, 12), (11, 22)),  # 11.5 -> 12
        (32, (45, 22), (23, 46)),  # 22.5 -> 22
        (64, (91, 46), (45, 90)),  # 45.5 -> 46
    ],
)
def test_sides_on_every_stride_grid(stride, wide, high):
    found = sides(cell_anchors((8 * stride,), RATIOS, "grid", stride), plus_one=1)
    assert found == [(8 * wide[0], 8 * wide[1]), (8 * stride, 8 * stride), (8 * high[0], 8 * high[1])]


def test_a_grid_by_hand():
    cell = torch.tensor([[-1.0, -2, 1, 2], [-3, -3, 3, 3]])
    found = grid_anchors(cell, (2, 3), (10, 20))  # 2 rows 10 px apart, 3 columns 20 px apart
    assert found.shape == (2 * 3 * 2, 4)
    assert found[0].tolist() == [-1, -2, 1, 2]
    assert found[1].tolist() == [-3, -3, 3, 3]  # all anchors of a cell together
    assert found[2].tolist() == [19, -2, 21, 2]  # then one column on
    assert found[6].tolist() == [-1, 8, 1, 12]  # then one row down
    assert found[-1].tolist() == [37, 7, 43, 13]


def test_a_grid_of_nothing():
    assert grid_anchors(torch.zeros(3, 4), (0, 5), (4, 4)).shape == (0, 4)


def test_twice_the_scale_is_twice_the_anchors():
    small = grid_anchors(cell_anchors((32,), RATIOS), (3, 5), (8, 8))
    large = grid_anchors(cell_anchors((64,), RATIOS), (3, 5), (16, 16))
    torch.testing.assert_close(large, 2 * small)


@pytest.mark.parametrize("size", [(128, 192), (200, 104)])
def test_the_pyramid_is_torchvisions(size):
    height, width = size
    grids = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    generator = AnchorGenerator(tuple((s,) for s in SIZES), (RATIOS,) * 5)
    maps = [torch.zeros(1, 1, *grid) for grid in grids]
    theirs = generator(ImageList(torch.zeros(1, 3, *size), [size]), maps)[0]
    ours = [
        grid_anchors(cell_anchors((s,), RATIOS, "corners"), grid, (height // grid[0], width // grid[1]))
        for s, grid in zip(SIZES, grids)
    ]
    assert torch.equal(torch.cat(ours), theirs)


def test_several_sizes_per_cell_are_torchvisions_in_another_order():
    """Sizes are outermost here, ratios there."""
    theirs = AnchorGenerator().generate_anchors(SIZES, RATIOS).reshape(3, 5, 4)
    ours = cell_anchors(SIZES, RATIOS, "corners").reshape(5, 3, 4)
    assert torch.equal(ours.transpose(0, 1), theirs)


def test_inside_by_hand():
    anchors = torch.tensor(
        [
            [0.0, 0, 9, 19],  # within 20 x 10 (height x width)
            [0, 0, 10, 19],  # touches the right border
            [-1, 0, 9, 19],  # one pixel out at the left
            [0, -3, 9, 19],  # three at the top
            [0, 0, 9, 22],  # two at the bottom
        ]
    )
    assert inside(anchors, (20, 10), 0.0).tolist() == [True, False, False, False, False]
    assert inside(anchors, (20, 10), 1.0).tolist() == [True, True, True, False, False]
    assert inside(anchors, (20, 10), 99.0).all()
