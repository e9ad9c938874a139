"""Masks: run lengths and polygons by hand, against pycocotools, and against hostile input; crops by hand."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torchvision.ops import roi_align

from mrcnn_edu.masks import (
    check_outlines,
    check_polygon,
    compress,
    crop_masks,
    polygons_to_mask,
    rle_counts,
    rle_decode,
    rle_encode,
    to_boxes,
)


def mask_of(*rows: str) -> torch.Tensor:
    return torch.tensor([[character == "#" for character in row] for row in rows])


@st.composite
def masks(draw) -> torch.Tensor:
    height, width, block = draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.integers(1, 9))
    share, seed = draw(st.floats(0, 1)), draw(st.integers(0, 2**31))
    small = np.random.default_rng(seed).random((height, width)) < share
    return torch.from_numpy(np.repeat(np.repeat(small, block, axis=0), block, axis=1))


# Run lengths ----------------------------------------------------------------------------------------


def test_runs_go_down_the_columns_and_start_with_zeros():
    mask = mask_of(
        ".#.",
        "##.",
    )
    assert rle_counts(rle_encode(mask)).tolist() == [1, 3, 2]  # column by column: .# ## ..
    assert rle_counts(rle_encode(~mask)).tolist() == [0, 1, 3, 2]


def test_compressed_text_by_hand():
    # 1 -> '1'; 3 -> '3'; 40 = 01000 + 1 * 32 -> 8 + 32 (more follows), then 1 -> 'X1'; the fourth, 2 - 3 = -1 -> 'O'
    assert compress(np.array([1, 3, 40, 2])) == "13X1O"


@given(masks())
@settings(max_examples=150, deadline=None)
def test_run_lengths_are_pycocotools_own_and_come_back(mask):
    rle = rle_encode(mask)
    theirs = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    assert rle == {"size": list(mask.shape), "counts": theirs["counts"].decode()}
    assert torch.equal(rle_decode(rle), mask)
    assert torch.equal(rle_decode({"size": rle["size"], "counts": theirs["counts"]}), mask)
    assert torch.equal(rle_decode({"size": rle["size"], "counts": rle_counts(rle).tolist()}), mask)


def test_long_runs_survive():
    mask = torch.zeros(4096, 4096, dtype=torch.bool)
    mask[4095, 4095] = True
    assert rle_counts(rle_encode(mask)).tolist() == [4096 * 4096 - 1, 1]
    assert torch.equal(rle_decode(rle_encode(mask)), mask)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [8, 8], "counts": rle_encode(torch.ones(64, 64, dtype=torch.bool))["counts"]}, "more than height"),
        ({"size": [64, 64], "counts": rle_encode(torch.ones(8, 8, dtype=torch.bool))["counts"]}, "cover 64 pixels"),
        ({"size": [8, 8], "counts": b""}, "characters"),
        ({"size": [8, 8], "counts": ""}, "characters"),
        ({"size": [8, 8], "counts": []}, "cover 0 pixels"),
        ({"size": [8, 8], "counts": "é"}, "characters"),
        ({"size": [8, 8], "counts": "P"}, "end within"),
        ({"size": [8, 8], "counts": "PPPPPPPPPPP0"}, "end within a number or hold one too long"),
        ({"size": [8, 8], "counts": "O"}, "cover -1"),
        ({"size": [8, 8], "counts": [60.5, 3.5]}, "whole numbers"),
        ({"size": [8, 8], "counts": [True, 63]}, "whole numbers"),
        ({"size": [8, 8], "counts": [70, -6]}, "between 0"),
        ({"size": [8, 8], "counts": [2**70]}, "between 0"),
        ({"size": [8, 8], "counts": [40] * 2}, "cover 80 pixels of 8 x 8 = 64"),
        ({"size": [8, 8], "counts": [0] * 66}, "at most 65 runs, got 66"),
        ({"size": [8, 8], "counts": "0" * 145}, "of 145 characters cannot be"),
        ({"size": [8, 8], "counts": "\ud800"}, "characters from"),
        ({"size": [8, 8], "counts": None}, "string or a list"),
        ({"size": [8, 8]}, "string or a list"),
        ({"size": [0, 8], "counts": []}, "1 to 32768"),
        ({"size": [2**31, 2**31], "counts": "0"}, "1 to 32768"),
        ({"size": [2**40, 2], "counts": "0"}, "1 to 32768"),
        ({"size": [32768, 32768], "counts": [2**30]}, "in all"),
        ({"size": [8.0, 8], "counts": [64]}, "whole pixels"),
        ({"size": [8], "counts": [64]}, "whole pixels"),
        ({"counts": [64]}, "whole pixels"),
        ([], "whole pixels"),
    ],
)
def test_bad_run_lengths_are_refused(rle, message):
    with pytest.raises(ValueError, match=message):
        rle_decode(rle)


def test_runs_of_one_pixel_fill_the_longest_list_and_text():
    """Squares of one pixel, a run each; and the longest text that runs with pixels can need: 1 and 17 in turn."""
    size = [4, 2**15]  # more than one piece of a list
    counts = [0] + [1] * 2**17
    assert rle_decode({"size": size, "counts": counts}).sum() == 2**16
    assert rle_decode({"size": size, "counts": compress(np.array(counts))}).sum() == 2**16
    runs = np.array([1, 17, 17, 1] * 100)
    assert torch.equal(rle_decode({"size": [36, 100], "counts": compress(runs)}).sum(), torch.tensor(1800))


def test_random_text_never_gets_through():
    generator = random.Random(0)
    start = time.perf_counter()
    for _ in range(5000):
        text = "".join(chr(generator.randint(44, 115)) for _ in range(generator.randint(0, 30)))
        rle = {"size": [generator.randint(1, 50), generator.randint(1, 50)], "counts": text}
        try:
            mask = rle_decode(rle)
        except ValueError:
            continue
        assert list(mask.shape) == rle["size"]
        assert torch.equal(rle_decode(rle_encode(mask)), mask)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    "mask", [torch.zeros(3, 3), np.zeros((3, 3), dtype=bool), torch.zeros(3, 3, dtype=torch.uint8)]
)
def test_only_bool_masks_are_encoded(mask):
    with pytest.raises(TypeError, match="bool"):
        rle_encode(mask)


def test_only_one_mask_is_encoded():
    with pytest.raises(ValueError, match="one mask"):
        rle_encode(torch.zeros(2, 3, 3, dtype=torch.bool))


# Polygons -------------------------------------------------------------------------------------------


def test_a_square_covers_the_pixels_between_its_corners():
    mask = polygons_to_mask([[2, 1, 5, 1, 5, 3, 2, 3]], (4, 6))
    assert torch.equal(
        mask,
        mask_of(
            "......",
            "..###.",
            "..###.",
            "......",
        ),
    )


def test_several_polygons_join():
    both = polygons_to_mask([[0, 0, 2, 0, 2, 2, 0, 2], [3, 0, 5, 0, 5, 2, 3, 2]], (2, 5))
    assert torch.equal(both, mask_of("##.##", "##.##"))


@given(st.lists(st.floats(-60, 80, width=32), min_size=6, max_size=40).filter(lambda n: len(n) % 2 == 0))
@settings(max_examples=150, deadline=None)
def test_polygons_are_pycocotools_own(numbers):
    theirs = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([numbers], 40, 60)))
    # within three times the image nothing is cut, so not a pixel may differ
    if all(-60 <= x <= 120 for x in numbers[::2]) and all(-40 <= y <= 80 for y in numbers[1::2]):
        assert torch.equal(polygons_to_mask([numbers], (40, 60)), torch.from_numpy(theirs.astype(bool)))


def test_decimals_are_rounded_as_in_the_whole_image():
    """Small polygons with one or two decimals, tenths among them: in fifths of a pixel these lie just on the edge."""
    generator = np.random.default_rng(0)
    for number in range(600):
        decimals, count = 1 + number % 2, int(generator.integers(3, 9))
        corners = generator.uniform(-6, 45, 2) + generator.uniform(-12, 12, (count, 2))
        numbers = np.round(corners, decimals).reshape(-1).tolist()
        theirs = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([numbers], 40, 48)))
        assert np.array_equal(polygons_to_mask([numbers], (40, 48)).numpy(), theirs.astype(bool)), numbers


def test_far_corners_cost_nothing_and_change_nothing():
    start = time.perf_counter()
    assert polygons_to_mask([[-1e9, -1e9, 1e9, -1e9, 1e9, 1e9, -1e9, 1e9]], (50, 70)).all()
    half = polygons_to_mask([[35, -1e8, 1e8, -1e8, 1e8, 1e8, 35, 1e8]], (50, 70))
    assert torch.equal(half, (torch.arange(70) >= 35).expand(50, 70))
    assert not polygons_to_mask([[1e8, 0, 2e8, 0, 2e8, 9]], (50, 70)).any()
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        ([1, 1, 6, 6], "three corners"),  # pycocotools takes four numbers for a box
        ([], "three corners"),
        ([1, 1, 6, 6, 3], "three corners"),
        ([1, 1, 6, 6, 3, 3, 2], "three corners"),
        ([float("nan"), 1, 6, 1, 6, 6], "finite"),
        ([float("inf"), 1, 6, 1, 6, 6], "finite"),
        ([10**400, 1, 6, 1, 6, 6], "finite"),
        (["1", 1, 6, 1, 6, 6], "numbers"),
        ([[1, 1], [6, 1], [6, 6]], "numbers"),
        ("111111", "numbers"),
        (None, "numbers"),
        ([True, 1, 6, 1, 6, 6], "numbers"),
    ],
)
def test_bad_polygons_are_refused(polygon, message):
    with pytest.raises(ValueError, match=message):
        check_polygon(polygon)
    with pytest.raises(ValueError, match=message):
        polygons_to_mask([polygon], (10, 10))


def test_corners_beyond_all_measure_are_cut_exactly():
    """At 1e300 px a corner cut off at the image lies anywhere by rounding, and pycocotools dies of it."""
    far = 1e300
    lower_half = [[-far, 20, far, 20, far, far, -far, far]]
    assert torch.equal(polygons_to_mask(lower_half, (50, 70)), (torch.arange(50) >= 20)[:, None].expand(50, 70))
    for corners in ([-far, -far, far, far, far, -far], [0, far, far, 0, -far, -far], [far, 3, 3, far, -far, -3]):
        assert polygons_to_mask([corners], (50, 70)).shape == (50, 70)


def test_outlines_too_long_to_draw_are_refused():
    """A zigzag of 20,000 lines across 16,384 pixels would have cost pycocotools 26 GB."""
    zigzag = [value for line in range(20_000) for value in (16_384.0 * (line % 2), line * 0.8)]
    with pytest.raises(ValueError, match=r"262144 px long together, these are 327\d{6} px; .* run lengths"):
        polygons_to_mask([zigzag], (16_384, 16_384))
    with pytest.raises(ValueError, match="long together"):  # of two, half as long each
        polygons_to_mask([zigzag[:32], zigzag[:32]], (16_384, 16_384))
    assert polygons_to_mask([zigzag[:8]], (16_384, 16_384)).any()


def test_any_rectangle_around_the_largest_images_can_be_drawn():
    for size in ((32_768, 8_192), (16_384, 16_384), (1, 32_768)):
        check_outlines([np.array([[-1e9, -1e9], [1e9, -1e9], [1e9, 1e9], [-1e9, 1e9]])], size)
        many = np.array([[-1e9, -1e9], [1e9, -1e9], [1e9, 1e9], [-1e9, 1e9]]).repeat(10, axis=0)
        check_outlines([many], size)  # where the corners must be looked at


@pytest.mark.parametrize(("polygons", "size"), [(None, (9, 9)), ({}, (9, 9)), ([[0, 0, 1, 0, 1, 1]], None)])
def test_what_is_no_list_of_polygons_or_no_size_is_refused(polygons, size):
    with pytest.raises(ValueError, match="got "):
        polygons_to_mask(polygons, size)


def test_polygons_need_a_sane_image():
    with pytest.raises(ValueError, match="in all"):
        polygons_to_mask([[0, 0, 1, 0, 1, 1]], (30000, 30000))


# Boxes of masks, crops ------------------------------------------------------------------------------


def test_boxes_are_tight_and_end_after_the_last_pixel():
    masks = torch.zeros(3, 8, 9, dtype=torch.bool)
    masks[0, 3, 3] = True
    masks[1, 2:5, 1:8] = True
    assert to_boxes(masks).tolist() == [[3, 3, 4, 4], [1, 2, 8, 5], [0, 0, 0, 0]]
    assert to_boxes(masks[:0]).shape == (0, 4)


def test_a_crop_of_whole_pixels_is_those_pixels():
    mask = mask_of("....", ".##.", ".#..", "....")[None]
    crop = crop_masks(mask, torch.tensor([[1.0, 1.0, 3.0, 3.0]]), torch.tensor([0]), size=2)
    assert crop.tolist() == [[[1, 1], [1, 0]]]


def test_crops_outside_the_image_are_empty_and_no_boxes_give_no_crops():
    masks = torch.ones(1, 4, 4, dtype=torch.bool)
    crop = crop_masks(masks, torch.tensor([[4.0, 0.0, 12.0, 4.0]]), torch.tensor([0]), size=4)
    assert not crop[0, :, 1:].any()
    assert crop_masks(masks, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), size=4).shape == (0, 4, 4)


def test_soft_crops_are_torchvisions_mask_targets():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(3, 20, 30, generator=generator) > 0.5
    corners = torch.rand(6, 2, 2, generator=generator) * torch.tensor([30.0, 20.0])
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    matched = torch.tensor([0, 1, 2, 2, 1, 0])
    ours = crop_masks(masks, boxes, matched, size=14, rule="soft", aligned=False)
    theirs = roi_align(masks[:, None].float(), torch.cat([matched[:, None].float(), boxes], 1), (14, 14), 1.0)[:, 0]
    torch.testing.assert_close(ours, theirs)
