"""Boxes: areas, overlaps and deltas by hand, by law, and against torchvision.

The laws draw corners on a grid of 1/8 px, where float32 adds, subtracts and doubles without rounding. What has to be
exactly equal is compared exactly.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, clip_boxes_to_image

from mrcnn_edu import boxes as box_ops

EIGHTHS = st.integers(-800, 800).map(lambda n: n / 8)
SIDES = st.integers(1, 1600).map(lambda n: n / 8)
BOX = st.tuples(EIGHTHS, EIGHTHS, SIDES, SIDES).map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
BOXES = st.lists(BOX, min_size=1, max_size=6).map(torch.tensor)
PAIRS = st.lists(st.tuples(BOX, BOX), min_size=1, max_size=6).map(lambda p: torch.tensor(p).unbind(1))
SHIFT = st.tuples(EIGHTHS, EIGHTHS).map(lambda s: torch.tensor([*s, *s]))
SCALE = st.sampled_from([0.25, 0.5, 2.0, 8.0])
WEIGHTS = st.sampled_from([(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])


# Areas and overlaps ---------------------------------------------------------------------------------


def test_areas_by_hand():
    boxes = torch.tensor([[0.0, 0, 4, 3], [1.5, 2, 2, 6], [3, 3, 3, 9], [5, 5, 2, 1]])
    assert box_ops.area(boxes).tolist() == [12, 2, 0, 0]  # 4 * 3; 0.5 * 4; no width; inside out


def test_overlaps_by_hand():
    a = torch.tensor([[0.0, 0, 4, 4]])
    b = torch.tensor([[0.0, 0, 4, 4], [2, 2, 6, 6], [4, 0, 8, 4], [1, 1, 3, 3], [0, 0, 8, 8]])
    assert box_ops.intersection(a, b).tolist() == [[16, 4, 0, 4, 16]]  # a shared border shares nothing
    torch.testing.assert_close(box_ops.iou(a, b), torch.tensor([[1, 4 / 28, 0, 4 / 16, 16 / 64]]))
    torch.testing.assert_close(box_ops.ioa(a, b), torch.tensor([[1, 4 / 16, 0, 4 / 16, 1.0]]))
    torch.testing.assert_close(box_ops.ioa(b, a).T, torch.tensor([[1, 4 / 16, 0, 1.0, 16 / 64]]))


def test_empty_boxes_overlap_nothing_and_give_no_nan():
    empty, whole = torch.tensor([[2.0, 2, 2, 2]]), torch.tensor([[0.0, 0, 4, 4]])
    for overlap in (box_ops.iou, box_ops.ioa):
        assert overlap(empty, empty).tolist() == [[0]]
        assert overlap(empty, whole).tolist() == [[0]]
        assert overlap(whole, empty).tolist() == [[0]]
        assert overlap(whole[:0], whole).shape == (0, 1)
        assert overlap(whole, whole[:0]).shape == (1, 0)


@given(BOXES, BOXES)
def test_iou_is_symmetric_bounded_and_one_for_equals(a, b):
    overlap = box_ops.iou(a, b)
    assert torch.equal(overlap, box_ops.iou(b, a).T)
    assert ((overlap >= 0) & (overlap <= 1)).all()
    assert torch.equal(box_ops.iou(a, a).diagonal(), torch.ones(len(a)))
    assert (overlap <= box_ops.ioa(a, b)).all()  # the union is at least a


@given(BOXES, BOXES, SHIFT, SCALE)
def test_iou_keeps_under_shift_scale_and_mirror(a, b, shift, scale):
    overlap = box_ops.iou(a, b)
    assert torch.equal(box_ops.iou(a + shift, b + shift), overlap)
    assert torch.equal(box_ops.iou(a * scale, b * scale), overlap)
    assert torch.equal(box_ops.iou(box_ops.flip(a, 640), box_ops.flip(b, 640)), overlap)


@given(BOXES, BOXES)
def test_iou_is_torchvisions(a, b):
    torch.testing.assert_close(box_ops.iou(a, b), box_iou(a, b))


# Clip, sides, resize, mirror ------------------------------------------------------------------------


def test_clip_by_hand():
    boxes = torch.tensor([[-3.0, 1, 5, 30], [12, -9, 14, -2]])
    assert box_ops.clip(boxes, (20, 10)).tolist() == [[0, 1, 5, 20], [10, 0, 10, 0]]  # 20 high, 10 wide
    assert box_ops.clip(boxes[None], (20, 10)).shape == (1, 2, 4)


@given(BOXES)
def test_clip_is_torchvisions_and_clips_once(boxes):
    clipped = box_ops.clip(boxes, (50, 70))
    assert torch.equal(clipped, clip_boxes_to_image(boxes, (50, 70)))
    assert torch.equal(box_ops.clip(clipped, (50, 70)), clipped)


def test_wide_enough_asks_for_both_sides_and_refuses_nan():
    nan = float("nan")
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.9], [0, 0, 1.9, 2], [nan, 0, 9, 9], [9, 9, 0, 0]])
    assert box_ops.wide_enough(boxes, 2).tolist() == [True, False, False, False, False]


def test_resize_by_hand():
    boxes = torch.tensor([[1.0, 2, 3, 4]])
    assert box_ops.resize(boxes, (10, 20), (30, 10)).tolist() == [[0.5, 6, 1.5, 12]]  # y times 3, x halved


@given(BOXES)
def test_resize_comes_back_and_scales_the_area(boxes):
    larger = box_ops.resize(boxes, (64, 32), (128, 256))  # powers of two: no rounding
    assert torch.equal(box_ops.area(larger), box_ops.area(boxes) * 16)
    assert torch.equal(box_ops.resize(larger, (128, 256), (64, 32)), boxes)


@given(BOXES)
def test_flip_twice_is_nothing(boxes):
    assert torch.equal(box_ops.flip(box_ops.flip(boxes, 640), 640), boxes)


def test_flip_by_hand():
    assert box_ops.flip(torch.tensor([[1.0, 2, 3, 4]]), 10).tolist() == [[7, 2, 9, 4]]


def test_nothing_is_changed_in_place():
    boxes, anchors = torch.tensor([[-1.0, 2, 30, 40]]), torch.tensor([[0.0, 0, 16, 16]])
    kept = boxes.clone(), anchors.clone()
    box_ops.clip(boxes, (8, 8))
    box_ops.flip(boxes, 8)
    box_ops.resize(boxes, (8, 8), (4, 4))
    box_ops.decode(box_ops.encode(boxes, anchors), anchors)
    assert torch.equal(boxes, kept[0]) and torch.equal(anchors, kept[1])


# Deltas ---------------------------------------------------------------------------------------------


def test_encode_by_hand():
    anchor = torch.tensor([[0.0, 0, 10, 20]])  # centre (5, 10), 10 x 20
    box = torch.tensor([[5.0, 5, 25, 15]])  # centre (15, 10), 20 x 10
    expected = torch.tensor([[1.0, 0.0, math.log(2), math.log(0.5)]])  # one anchor width to the right
    torch.testing.assert_close(box_ops.encode(box, anchor), expected)
    weights = (10.0, 10.0, 5.0, 5.0)
    torch.testing.assert_close(box_ops.encode(box, anchor, weights), expected * torch.tensor(weights))


def test_encode_with_plus_one_by_hand():
    """Pixels 0..9 are ten pixels, centre 5; pixels 5..24 are twenty, centre 15."""
    anchor, box = torch.tensor([[0.0, 0, 9, 19]]), torch.tensor([[5.0, 5, 24, 14]])
    expected = torch.tensor([[1.0, 0.0, math.log(2), math.log(0.5)]])
    torch.testing.assert_close(box_ops.encode(box, anchor, plus_one=True), expected)


def test_zero_deltas_are_the_anchor():
    anchors = torch.tensor([[0.0, 0, 10, 20], [3, 4, 5, 6]])
    assert torch.equal(box_ops.decode(torch.zeros(2, 4), anchors), anchors)
    assert torch.equal(box_ops.decode(torch.zeros(2, 4), anchors, plus_one=True), anchors)


def test_growth_is_capped_and_shrinking_is_not():
    anchor = torch.tensor([[0.0, 0, 16, 16]])
    grown = box_ops.decode(torch.tensor([[0.0, 0, 99, 99]]), anchor)
    torch.testing.assert_close(grown, torch.tensor([[-492.0, -492, 508, 508]]))  # 1000 px around (8, 8)
    shrunk = box_ops.decode(torch.tensor([[0.0, 0, -9, -9]]), anchor)
    torch.testing.assert_close(shrunk[0, 2] - shrunk[0, 0], torch.tensor(16 * math.exp(-9)), atol=1e-6, rtol=0)


def test_deltas_of_several_classes_share_their_anchors():
    anchors = torch.tensor([[0.0, 0, 16, 16], [8, 8, 24, 40]])
    deltas = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    boxes = box_ops.decode(deltas, anchors[:, None])
    assert boxes.shape == (2, 3, 4)
    for k in range(3):
        assert torch.equal(boxes[:, k], box_ops.decode(deltas[:, k], anchors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_deltas_give_float32_boxes(dtype):
    anchors = torch.tensor([[700.0, 700, 801, 1001]])
    deltas = torch.tensor([[0.1, -0.2, 0.3, 0.4]]).to(dtype)
    boxes = box_ops.decode(deltas, anchors)
    assert boxes.dtype == torch.float32
    assert torch.equal(boxes, box_ops.decode(deltas.float(), anchors))


@given(PAIRS, WEIGHTS, st.booleans())
def test_decode_undoes_encode(pair, weights, plus_one):
    boxes, anchors = pair
    side = (boxes[:, 2:] - boxes[:, :2] + plus_one) / (anchors[:, 2:] - anchors[:, :2] + plus_one)
    rows = (side <= 62.5).all(dim=1)  # further growth is capped
    boxes, anchors = boxes[rows], anchors[rows]
    back = box_ops.decode(box_ops.encode(boxes, anchors, weights, plus_one), anchors, weights, plus_one)
    torch.testing.assert_close(back, boxes, atol=2e-3, rtol=0)  # exp and log of sides up to 200 px, places up to 300


@given(PAIRS, SHIFT, SCALE)
def test_deltas_do_not_know_place_or_scale(pair, shift, scale):
    boxes, anchors = pair
    deltas = box_ops.encode(boxes, anchors)
    assert torch.equal(box_ops.encode(boxes + shift, anchors + shift), deltas)
    assert torch.equal(box_ops.encode(boxes * scale, anchors * scale), deltas)


@given(PAIRS)
def test_a_mirror_turns_dx_around_and_nothing_else(pair):
    boxes, anchors = pair
    mirrored = box_ops.encode(box_ops.flip(boxes, 640), box_ops.flip(anchors, 640))
    assert torch.equal(mirrored, box_ops.encode(boxes, anchors) * torch.tensor([-1.0, 1, 1, 1]))


@given(PAIRS)
def test_plus_one_is_the_same_code_for_boxes_one_pixel_longer(pair):
    boxes, anchors = pair
    longer = torch.tensor([0.0, 0, 1, 1])
    deltas = box_ops.encode(boxes, anchors, plus_one=True)
    assert torch.equal(deltas, box_ops.encode(boxes + longer, anchors + longer))
    theirs = box_ops.decode(deltas, anchors + longer) - longer
    assert torch.equal(box_ops.decode(deltas, anchors, plus_one=True), theirs)


@given(PAIRS, WEIGHTS)
def test_the_coder_is_torchvisions(pair, weights):
    boxes, anchors = pair
    coder = BoxCoder(weights)
    deltas = box_ops.encode(boxes, anchors, weights)
    torch.testing.assert_close(deltas, coder.encode_single(boxes, anchors), atol=1e-5, rtol=1e-5)
    wild = deltas * 3  # past the cap as well
    theirs = coder.decode_single(wild, anchors)
    torch.testing.assert_close(box_ops.decode(wild, anchors, weights), theirs, atol=1e-2, rtol=1e-5)


def test_gradients_of_the_coder():
    boxes = torch.tensor([[1.0, 2, 30, 40], [5, 5, 9, 12]], dtype=torch.float64, requires_grad=True)
    anchors = torch.tensor([[0.0, 0, 16, 16], [4, 4, 12, 12]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda b: box_ops.encode(b, anchors), boxes)
    deltas = torch.tensor([[0.1, 0.2, -0.3, 0.4], [0, 0, 1, -1]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: box_ops.decode(d, anchors), deltas)
