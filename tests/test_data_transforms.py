"""Transforms by hand and by law: image, boxes, masks and keypoints must go on agreeing."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrcnn_edu.config import DataConfig
from mrcnn_edu.data import shapes
from mrcnn_edu.data.transforms import Augment, drop_vanished, flip, resize, resize_target, resized, shuffle_channels
from mrcnn_edu.masks import to_boxes
from mrcnn_edu.structures import Target


def same(a: Target, b: Target) -> bool:
    return all(torch.equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))


def one_square() -> tuple[torch.Tensor, Target]:
    """A white square at x 2..6, y 1..3 of a 6 x 8 image, one keypoint at its centre and one unlabelled."""
    masks = torch.zeros(1, 6, 8, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    keypoints = torch.tensor([[[4.0, 2.0, 2.0], [0.0, 0.0, 0.0]]])
    target = Target(to_boxes(masks), torch.tensor([1]), masks, keypoints, torch.tensor([False]))
    return masks[0].to(torch.uint8).expand(3, 6, 8) * 255, target


# Resize ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        ((800, 1067), (800, 1067)),
        ((400, 1600), (333, 1333)),  # the longer side decides
        ((1, 5000), (1, 1333)),
        ((5000, 1), (1333, 1)),
        ((1, 1), (800, 800)),
    ],
)
def test_sizes(size, expected):
    assert resized(size, 800, 1333) == expected


@given(st.integers(1, 6000), st.integers(1, 6000), st.integers(1, 1000), st.integers(0, 1000))
@settings(deadline=None)
def test_sizes_by_law(height, width, min_size, more):
    new = resized((height, width), min_size, min_size + more)
    assert 1 <= min(new) <= min_size and max(new) <= min_size + more
    assert resized(new, min_size, min_size + more) == new or min(new) <= 2  # rounding may tip only a sliver


def test_no_pixels_are_no_image():
    with pytest.raises(ValueError, match="0 x 5"):
        resized((0, 5), 10, 20)


def test_doubling_by_hand():
    image, target = one_square()
    pixels, new = resize(image, target, 12, 100)
    assert pixels.shape == (3, 12, 16) and pixels.dtype == torch.uint8
    assert new.boxes.tolist() == [[4, 2, 12, 6]]
    assert torch.equal(new.masks, target.masks.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert new.keypoints.tolist() == [[[8, 4, 2], [0, 0, 0]]]
    assert pixels[:, 3:5, 5:11].eq(255).all() and pixels[:, 8:].eq(0).all()


def test_a_resize_to_its_own_size_changes_nothing():
    image, target = shapes.make(5)
    pixels, new = resize(image, target, 160, 160)
    assert torch.equal(pixels, image) and same(new, target)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("side", [97, 160, 233, 320])
def test_masks_boxes_and_keypoints_stay_together(seed, side):
    image, target = shapes.make(seed)
    pixels, new = resize(image, target, side, 1000)
    scale = side / 160
    assert pixels.shape == (3, side, side) and new.masks.shape[1:] == (side, side)
    if len(target):
        assert len(new) == len(target)
        torch.testing.assert_close(new.boxes, target.boxes * scale)
        # nearest pixels: an edge moves by half a pixel of either grid, and a thin tip may fall between two samples
        assert (to_boxes(new.masks) - new.boxes).abs().max() <= (0.5 + scale / 2 if scale >= 1 else 2)
        torch.testing.assert_close(new.keypoints[..., :2], target.keypoints[..., :2] * scale)
        assert torch.equal(new.keypoints[..., 2], target.keypoints[..., 2])


@pytest.mark.parametrize("sizes", [((160, 96), (97, 233)), ((48, 65), (80, 108)), ((5, 7), (1, 50))])
def test_masks_are_torchs_nearest_exact(sizes):
    (old, new), generator = sizes, torch.Generator().manual_seed(0)
    masks = torch.rand(3, *old, generator=generator) > 0.5
    ours = resize_target(Target(torch.zeros(3, 4), torch.ones(3, dtype=torch.int64), masks), old, new).masks
    theirs = torch.nn.functional.interpolate(masks[None].float(), new, mode="nearest-exact")[0] > 0.5
    assert torch.equal(ours, theirs)


def test_the_target_moves_with_the_pixels():
    """A bright square found again in the resized pixels, where its box says."""
    image = torch.zeros(3, 50, 70, dtype=torch.uint8)
    image[:, 10:30, 20:50] = 255
    masks = (image[:1] > 0).clone()
    target = Target(to_boxes(masks), torch.tensor([1]), masks)
    for min_size in (25, 33, 80, 150):
        pixels, new = resize(image, target, min_size, 1000)
        bright = pixels[:1] > 127
        assert (to_boxes(bright) - new.boxes).abs().max() <= 1
        assert (bright ^ new.masks).sum() <= bright.sum() * 0.1


def test_slivers_keep_their_pixel():
    for size in ((1, 5000), (5000, 1)):
        masks = torch.ones(1, *size, dtype=torch.bool)
        target = Target(to_boxes(masks), torch.tensor([1]), masks)
        pixels, new = resize(torch.zeros(3, *size, dtype=torch.uint8), target, 800, 1333)
        assert min(pixels.shape[1:]) == 1 and max(pixels.shape[1:]) == 1333
        assert len(new) == 1 and new.masks.all()
        assert new.boxes.tolist() == [[0, 0, pixels.shape[2], pixels.shape[1]]]


def test_what_vanishes_is_dropped_from_every_field():
    image, target = one_square()
    tiny = torch.zeros(1, 6, 8, dtype=torch.bool)
    tiny[0, 0, 0] = True
    both = Target.cat([target, Target(to_boxes(tiny), torch.tensor([2]), tiny, target.keypoints, torch.tensor([True]))])
    _, new = resize(image, both, 2, 100)
    assert new.labels.tolist() == [1] and len(new.masks) == len(new.keypoints) == len(new.crowd) == 1
    flat = Target(torch.tensor([[1.0, 1, 1, 5], [1, 1, 2, 2]]), torch.tensor([1, 2]))
    assert drop_vanished(flat).labels.tolist() == [2]


def test_box_only_targets_pass():
    target = Target(torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([1]))
    _, new = resize(torch.zeros(3, 8, 8), target, 16, 16)
    assert new.boxes.tolist() == [[0, 0, 8, 8]] and new.masks is None
    _, new = flip(torch.zeros(3, 8, 8), target)
    assert new.boxes.tolist() == [[4, 0, 8, 4]]


# Flip -----------------------------------------------------------------------------------------------


def test_a_flip_by_hand():
    image, target = one_square()
    pixels, new = flip(image, target, ((0, 1),))
    assert new.boxes.tolist() == [[2, 1, 6, 3]]
    assert new.keypoints.tolist() == [[[0, 0, 0], [4, 2, 2]]]
    assert torch.equal(pixels, image.flip(2)) and torch.equal(new.masks, target.masks.flip(2))


@pytest.mark.parametrize("seed", range(20))
def test_two_flips_are_none(seed):
    image, target = shapes.make(seed)
    once = flip(image, target, shapes.FLIP_PAIRS)
    pixels, new = flip(*once, shapes.FLIP_PAIRS)
    assert (
        torch.equal(pixels, image) and torch.equal(new.masks, target.masks) and torch.equal(new.labels, target.labels)
    )
    torch.testing.assert_close(new.boxes, target.boxes)
    torch.testing.assert_close(new.keypoints, target.keypoints)
    assert torch.equal(to_boxes(once[1].masks), once[1].boxes)


def test_a_mirrored_figure_has_its_left_hand_on_the_right_again():
    """A figure faces us: its left hand is right of its neck, before the flip and after it."""
    left, right = shapes.JOINTS.index("left_hand"), shapes.JOINTS.index("right_hand")
    seen = 0
    for seed in range(60):
        image, target = shapes.make(seed)
        for _ in range(2):
            for joints in target.keypoints[target.labels == shapes.FIGURE]:
                if joints[left, 2] and joints[right, 2]:
                    seen += 1
                    assert joints[left, 0] > joints[right, 0]
            image, target = flip(image, target, shapes.FLIP_PAIRS)
    assert seen > 20


def test_flip_and_resize_commute():
    """Up to a pixel where the centre of a new one lies exactly between two old ones; 160 to 96 has none."""
    for seed in range(5):
        image, target = shapes.make(seed)
        pixels, first = resize(*flip(image, target, shapes.FLIP_PAIRS), 96, 96)
        mirrored, second = flip(*resize(image, target, 96, 96), shapes.FLIP_PAIRS)
        assert (pixels.int() - mirrored.int()).abs().max() <= 1
        assert torch.equal(first.labels, second.labels)
        torch.testing.assert_close(first.boxes, second.boxes)
        torch.testing.assert_close(first.keypoints, second.keypoints)


# Colour, chance -------------------------------------------------------------------------------------


def test_channels_change_places():
    image, target = shapes.make(0)
    pixels, new = shuffle_channels(image, target, [2, 0, 1])
    assert torch.equal(pixels[0], image[2]) and torch.equal(pixels[1], image[0]) and new is target


def test_arguments_are_not_changed():
    image, target = shapes.make(3)
    before = image.clone(), target[:]
    augment = Augment((96, 200), 300, flip=1.0, channel_shuffle=1.0, flip_pairs=shapes.FLIP_PAIRS)
    augment(image, target, torch.Generator().manual_seed(0))
    assert torch.equal(image, before[0]) and same(target, before[1])


def test_chance_is_the_generators_alone():
    image, target = shapes.make(3)
    augment = Augment((96, 128, 200), 300, flip=0.5, channel_shuffle=0.5, flip_pairs=shapes.FLIP_PAIRS)
    results = [augment(image, target, torch.Generator().manual_seed(seed)) for seed in [*range(40), *range(40)]]
    for (pixels, new), (again, other) in zip(results[:40], results[40:]):
        assert torch.equal(pixels, again) and same(new, other)
    assert {pixels.shape[1] for pixels, _ in results} == {96, 128, 200}
    flipped = sum(not torch.allclose(new.boxes, target.boxes * (len(pixels[0]) / 160)) for pixels, new in results[:40])
    assert 8 <= flipped <= 32


def test_augment_follows_the_config():
    config = DataConfig(min_size=(64, 96), max_size=200, test_size=80, flip=0.25, channel_shuffle=0.5)
    assert Augment.for_training(config, ((0, 1),)) == Augment((64, 96), 200, 0.25, 0.5, ((0, 1),))
    assert Augment.for_testing(config) == Augment((80,), 200)


def test_resize_target_alone():
    _, target = one_square()
    assert resize_target(target, (6, 8), (3, 4)).boxes.tolist() == [[1, 0.5, 3, 1.5]]
