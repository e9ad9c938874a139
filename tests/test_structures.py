"""The five types: what they hold by hand, round trips by law, and every mistake they refuse."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mrcnn_edu.ops import paste_masks
from mrcnn_edu.structures import (
    Detections,
    ImageBatch,
    Proposals,
    Samples,
    Target,
    check_image,
    check_target,
    check_targets,
)

SIZE = (12, 16)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")


def make_target(count: int = 3, **changes) -> Target:
    """Instances side by side, each one pixel further to the right."""
    boxes = torch.tensor([[i, 1.0, i + 4.0, 6.0] for i in range(count)]).reshape(-1, 4)
    masks = torch.zeros(count, *SIZE, dtype=torch.bool)
    for i in range(count):
        masks[i, 1:6, i : i + 4] = True
    keypoints = torch.arange(count * 6, dtype=torch.float32).reshape(count, 2, 3)
    crowd = torch.arange(count) == 1
    values = dict(boxes=boxes, labels=torch.arange(count) + 1, masks=masks, keypoints=keypoints, crowd=crowd)
    return Target(**(values | changes))


def make_detections(**changes) -> Detections:
    boxes = torch.tensor([[2.0, 1, 10, 9], [4, 4, 12, 8]])
    values = dict(boxes=boxes, scores=torch.tensor([0.9, 0.5]), labels=torch.tensor([3, 1]))
    return Detections(**(values | changes))


def same(a, b) -> bool:
    """Equal fields in equal types; the dataclasses themselves compare by identity."""
    ours, theirs = a._tensors(), b._tensors()
    return type(a) is type(b) and ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


# Rows -----------------------------------------------------------------------------------------------


def test_rows_by_hand():
    target = make_target()
    assert len(target) == 3
    assert target[1:].labels.tolist() == [2, 3]
    assert target[[2, 0]].labels.tolist() == [3, 1]
    assert target[torch.tensor([2, 2])].boxes[:, 0].tolist() == [2, 2]
    assert target[torch.tensor([True, False, True])].crowd.tolist() == [False, False]
    assert len(target[:0]) == 0 and target[:0].masks.shape == (0, *SIZE)
    assert target[1:].keypoints.shape == (2, 2, 3)


def test_absent_fields_stay_absent():
    target = make_target(masks=None, keypoints=None, crowd=None)[1:]
    assert target.masks is None and target.keypoints is None and target.crowd is None
    assert set(target.to_dict()) == {"boxes", "labels"}


def test_an_integer_is_no_row():
    with pytest.raises(TypeError, match=r"use \[1:2\]"):
        make_target()[1]
    with pytest.raises(ValueError, match="first dimension N"):
        Samples(*(torch.zeros(3, 4), torch.zeros(3), torch.zeros(3)))[torch.tensor(1)]


def test_counts_must_agree():
    with pytest.raises(ValueError, match=r"Target: all fields need the same number of rows.*'labels': 2"):
        make_target(labels=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="Proposals: all fields"):
        Proposals(torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="Samples: all fields"):
        Samples(torch.zeros(2, 4), torch.zeros(2), torch.zeros(1))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_cat_undoes_cutting(counts):
    whole = make_target(sum(counts))
    parts, start = [], 0
    for count in counts:
        parts.append(whole[start : start + count])
        start += count
    assert same(Target.cat(parts), whole)


def test_cat_needs_parts_with_the_same_fields():
    with pytest.raises(ValueError, match=r"Target\.cat needs at least one part"):
        Target.cat([])
    with pytest.raises(ValueError, match=r"different fields.*'masks'"):
        Target.cat([make_target(), make_target(masks=None)])


def test_to_and_pin_keep_the_rows():
    target = make_target()
    assert same(target.to("cpu"), target)
    assert same(target.to(torch.device("cpu"), non_blocking=True), target)
    assert target.to("meta").masks.is_meta


@needs_cuda
def test_pinned_memory():
    assert make_target().pin_memory().masks.is_pinned()
    assert ImageBatch.collate([torch.rand(3, 4, 4)]).pin_memory().pixels.is_pinned()


# Fields ---------------------------------------------------------------------------------------------


def test_a_misspelt_field_fails_where_it_is_written():
    target = make_target()
    with pytest.raises(TypeError, match="lables"):
        make_target(lables=torch.tensor([1]))
    with pytest.raises(TypeError, match="lables"):
        replace(target, lables=target.labels)
    with pytest.raises(AttributeError, match="lables"):
        _ = target.lables
    with pytest.raises(FrozenInstanceError):
        target.lables = target.labels


@pytest.mark.parametrize(
    "rows",
    [
        make_target(),
        make_detections(),
        Proposals(torch.zeros(1, 4), torch.zeros(1)),
        Samples(torch.zeros(1, 4), torch.zeros(1), torch.zeros(1)),
        ImageBatch.collate([torch.zeros(3, 4, 4)]),
    ],
    ids=lambda rows: type(rows).__name__,
)
def test_fields_are_frozen_and_objects_compare_by_identity(rows):
    for name in vars(rows):
        with pytest.raises(FrozenInstanceError):
            setattr(rows, name, None)
    assert rows == rows and rows != replace(rows)
    assert hash(rows) == hash(rows)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": torch.zeros(3, 5)}, ValueError, r"Target\.boxes must be \[N, 4\], got \[3, 5\]"),
        ({"boxes": torch.zeros(3)}, ValueError, r"Target\.boxes must be \[N, 4\]"),
        ({"boxes": torch.zeros(3, 4).double()}, TypeError, r"Target\.boxes must be torch\.float32.*convert with \.to"),
        ({"boxes": torch.zeros(3, 4).long()}, TypeError, "got torch.int64"),
        ({"boxes": [[0, 0, 1, 1]] * 3}, TypeError, r"Target\.boxes must be a tensor, got list"),
        ({"boxes": None}, TypeError, r"Target\.boxes must be a tensor, got NoneType"),
        ({"labels": torch.ones(3, 1).long()}, ValueError, r"Target\.labels must be \[N\]"),
        ({"labels": torch.ones(3)}, TypeError, r"Target\.labels must be torch\.int64"),
        ({"labels": torch.tensor(1)}, ValueError, "first dimension N, got a scalar"),
        ({"masks": torch.zeros(3, 1, 4, 4).bool()}, ValueError, r"Target\.masks must be \[N, H, W\]"),
        ({"masks": torch.zeros(3, 4, 4, dtype=torch.uint8)}, TypeError, r"Target\.masks must be torch\.bool"),
        ({"keypoints": torch.zeros(3, 2, 2)}, ValueError, r"Target\.keypoints must be \[N, J, 3\]"),
        ({"keypoints": torch.zeros(3, 2, 3).long()}, TypeError, r"Target\.keypoints must be torch\.float32"),
        ({"crowd": torch.zeros(3, 1).bool()}, ValueError, r"Target\.crowd must be \[N\]"),
        ({"crowd": torch.zeros(3).long()}, TypeError, r"Target\.crowd must be torch\.bool"),
    ],
)
def test_targets_of_the_wrong_shape_or_kind_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        make_target(**change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": torch.zeros(2, 5)}, ValueError, r"Detections\.boxes must be \[N, 4\]"),
        ({"boxes": torch.zeros(2, 4).half()}, TypeError, r"Detections\.boxes must be torch\.float32"),
        ({"mask_probs": torch.zeros(2, 28)}, ValueError, r"mask_probs must be \[N, M, M\], got \[2, 28\]"),
        ({"mask_probs": torch.zeros(2, 28, 14)}, ValueError, r"mask_probs must be \[N, M, M\]"),
        ({"scores": torch.zeros(3)}, ValueError, "same number of rows"),
        ({"keypoints": [1, 2]}, TypeError, r"Detections\.keypoints must be a tensor"),
    ],
)
def test_detections_of_the_wrong_shape_or_kind_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        make_detections(**change)


def test_proposals_of_the_wrong_shape_or_kind_are_refused():
    with pytest.raises(ValueError, match=r"Proposals\.boxes must be \[N, 4\]"):
        Proposals(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(TypeError, match=r"Proposals\.boxes must be torch\.float32"):
        Proposals(torch.zeros(2, 4, dtype=torch.bfloat16), torch.zeros(2))


# Images ---------------------------------------------------------------------------------------------


def test_collate_by_hand():
    """10 x 40 and 33 x 20 share 33 x 40, which rounds up to 64 x 64."""
    batch = ImageBatch.collate([torch.ones(3, 10, 40), torch.full((3, 33, 20), 0.5)], [(100, 400), (66, 40)])
    assert batch.pixels.shape == (2, 3, 64, 64) and len(batch) == 2
    assert batch.sizes == [(10, 40), (33, 20)] and batch.original_sizes == [(100, 400), (66, 40)]
    assert batch.pixels[0].sum() == 3 * 10 * 40 and batch.pixels[1].sum() == 3 * 33 * 20 / 2
    assert (batch.pixels[0, :, :10, :40] == 1).all() and (batch.pixels[1, :, :33, :20] == 0.5).all()


def test_collate_pads_no_more_than_needed():
    assert ImageBatch.collate([torch.zeros(3, 64, 96)]).pixels.shape == (1, 3, 64, 96)
    assert ImageBatch.collate([torch.zeros(3, 65, 96)]).pixels.shape == (1, 3, 96, 96)
    assert ImageBatch.collate([torch.zeros(3, 5, 7)], multiple=1).pixels.shape == (1, 3, 5, 7)
    assert ImageBatch.collate([torch.zeros(3, 1, 1)]).original_sizes == [(1, 1)]


def test_bytes_are_divided_by_255():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    batch = ImageBatch.collate([image, torch.ones(3, 2, 2, dtype=torch.float64)])
    assert batch.pixels.dtype == torch.float32
    torch.testing.assert_close(batch.pixels[0, :, 0, 0], torch.tensor([0, 0.2, 1.0]))


def test_a_batch_moves_with_its_sizes():
    batch = ImageBatch.collate([torch.rand(3, 8, 8)])
    moved = batch.to("meta")
    assert moved.pixels.is_meta and moved.sizes == batch.sizes and moved.original_sizes == batch.original_sizes
    lasting = replace(batch, pixels=batch.pixels.to(memory_format=torch.channels_last)).to("cpu")
    assert lasting.pixels.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.full((3, 4, 4), float("nan")), ValueError, "without NaN"),
        (torch.tensor([0, float("inf"), 0])[:, None, None], ValueError, r"lie in \[0, 1\]"),
        (torch.full((3, 4, 4), 128.0), ValueError, "divide 0..255 by 255"),
        (torch.full((3, 4, 4), -0.1), ValueError, "values from -0.1"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), TypeError, "float in .* or uint8, got torch.int64"),
        (torch.zeros(3, 4, 4, dtype=torch.bool), TypeError, "got torch.bool"),
        (torch.zeros(1, 4, 4), ValueError, "repeat a gray channel"),
        (torch.zeros(4, 4, 3), ValueError, r"RGB \[3, H, W\], got \[4, 4, 3\]"),
        (torch.zeros(4, 4), ValueError, r"RGB \[3, H, W\]"),
        (torch.zeros(1, 3, 4, 4), ValueError, r"RGB \[3, H, W\]"),
        (torch.zeros(3, 0, 4), ValueError, "no pixels"),
        ("cat.jpg", TypeError, "must be a tensor.*got str; data.coco.read_image reads files"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_bad_images_are_refused_by_name(image, error, message):
    with pytest.raises(error, match=f"^image .*{message}"):
        check_image(image)
    with pytest.raises(error, match=f"^image 1 .*{message}"):
        ImageBatch.collate([torch.zeros(3, 4, 4), image])


def test_one_nan_among_many_pixels_is_found():
    image = torch.rand(3, 50, 50, generator=torch.Generator().manual_seed(0))
    image[1, 20, 30] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        check_image(image, "photo")


def test_batches_that_do_not_add_up_are_refused():
    pixels = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match="at least one image"):
        ImageBatch.collate([])
    with pytest.raises(ValueError, match="2 images, 2 sizes, 1 original sizes"):
        ImageBatch.collate([torch.zeros(3, 4, 4)] * 2, [(4, 4)])
    with pytest.raises(ValueError, match="2 images, 1 sizes"):
        ImageBatch(pixels, [(4, 4)], [(4, 4)] * 2)
    with pytest.raises(ValueError, match=r"sizes\[1\] is 33 x 4, outside 1 x 1 to 32 x 32"):
        ImageBatch(pixels, [(4, 4), (33, 4)], [(4, 4)] * 2)
    with pytest.raises(ValueError, match=r"sizes\[0\] is 0 x 4"):
        ImageBatch(pixels, [(0, 4), (4, 4)], [(4, 4)] * 2)
    for shape in ((3, 32, 32), (2, 1, 32, 32)):
        with pytest.raises(ValueError, match=r"pixels must be \[B, 3, H, W\]"):
            ImageBatch(torch.zeros(shape), [(4, 4)] * 2, [(4, 4)] * 2)


# Targets --------------------------------------------------------------------------------------------


def test_the_empty_target_is_a_good_one():
    target = Target.empty(SIZE, joints=5)
    assert len(target) == 0 and target.masks.shape == (0, *SIZE) and target.keypoints.shape == (0, 5, 3)
    assert Target.empty(SIZE).keypoints is None
    check_target(target, SIZE, classes=1, joints=5)
    assert same(Target.cat([target, target]), target)


def test_a_good_target_passes():
    check_target(make_target(), SIZE, classes=3, joints=2)
    check_target(make_target(), SIZE, classes=3)  # a model without a keypoint head does not count joints
    check_target(make_target(masks=None, keypoints=None, crowd=None), SIZE, classes=3, joints=2)


def test_values_no_training_should_see_are_refused():
    def refused(message: str, classes: int = 3, joints: int | None = 2, **changes) -> None:
        with pytest.raises(ValueError, match=f"^target {message}"):
            check_target(make_target(**changes), SIZE, classes, joints, name="target ")

    good = make_target().boxes
    for bad in ([0, 0, 0, 5], [0, 5, 5, 5], [9, 0, 2, 5], [0, 0, float("inf"), 5], [0, float("nan"), 5, 5]):
        boxes = torch.cat([good[:2], torch.tensor([bad], dtype=torch.float32)])
        refused(r"\.boxes\[2\] must be finite with x2 > x1 and y2 > y1", boxes=boxes)
    refused(r"\.labels must lie in 1\.\.2 .*got 3", classes=2)
    refused(r"\.labels must lie in 1\.\.3 \(0 is background\), got 0", labels=torch.tensor([1, 0, 2]))
    refused(r"\.labels must .*got -1", labels=torch.tensor([1, -1, 2]))
    refused(r"\.masks must have the image's size 12 x 16, got 16 x 12", masks=torch.zeros(3, 16, 12).bool())
    refused(r"\.keypoints must have 17 joints, got 2", joints=17)
    refused(r"\.keypoints must be finite; mark unknown joints by v = 0", keypoints=torch.full((3, 2, 3), float("nan")))


def test_a_batch_of_targets_is_checked_as_each_of_them():
    good, sizes = make_target(), [SIZE, SIZE]
    check_targets([good, make_target(masks=None, keypoints=None, crowd=None)], sizes, 3, 2)
    check_targets([Target.empty(SIZE), good], sizes, 3, 2)
    for changes in (
        {"labels": torch.tensor([1, 0, 2])},
        {"labels": torch.tensor([1, 4, 2])},
        {"boxes": good.boxes.index_fill(0, torch.tensor([1]), float("nan"))},
        {"boxes": good.boxes[:, [2, 1, 0, 3]]},
        {"keypoints": torch.full((3, 2, 3), float("inf"))},
        {"masks": torch.zeros(3, 16, 12).bool()},
        {"keypoints": torch.zeros(3, 5, 3)},
    ):
        with pytest.raises(ValueError, match=r"^targets\[1\]\."):
            check_targets([good, make_target(**changes)], sizes, 3, 2)
    with pytest.raises(TypeError, match=r"^targets\[1\] must be a Target, got dict"):
        check_targets([good, good.to_dict()], sizes, 3, 2)


def test_only_targets_are_targets():
    with pytest.raises(TypeError, match=r"must be a Target, got dict; Target\.from_dict converts dicts"):
        check_target(make_target().to_dict(), SIZE, 3)


@pytest.mark.parametrize("absent", [(), ("masks",), ("keypoints", "crowd"), ("masks", "keypoints", "crowd")])
def test_a_target_comes_back_from_its_dict(absent):
    target = make_target(**dict.fromkeys(absent))
    assert same(Target.from_dict(target.to_dict()), target)


def test_dicts_are_torchvisions():
    values = make_target().to_dict()
    assert set(values) == {"boxes", "labels", "masks", "keypoints", "iscrowd"}
    assert values["masks"].dtype == torch.uint8 and values["iscrowd"].tolist() == [0, 1, 0]


def test_a_dict_may_be_loose_about_types_and_carry_more():
    target = Target.from_dict(
        {
            "boxes": torch.tensor([[0, 1, 2, 3]]),
            "labels": torch.tensor([2], dtype=torch.int32),
            "masks": torch.ones(1, 4, 4),
            "keypoints": torch.ones(1, 2, 3, dtype=torch.int64),
            "iscrowd": torch.tensor([0]),
            "image_id": torch.tensor(7),
            "area": torch.tensor([4.0]),
        }
    )
    assert target.boxes.tolist() == [[0, 1, 2, 3]] and target.masks.all() and not target.crowd.any()
    nothing = Target.from_dict({"boxes": torch.zeros(0), "labels": torch.zeros(0)})  # what torch.tensor([]) gives
    assert nothing.boxes.shape == (0, 4) and nothing.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("masks", "got"),
    [
        (torch.tensor([0, 255], dtype=torch.uint8), "255"),
        (torch.tensor([0, 2]), "2"),
        (torch.tensor([0, -1]), "-1"),
        (torch.tensor([0.0, 0.5]), "0.5"),
        (torch.tensor([1.0, float("nan")]), "nan"),
    ],
)
def test_masks_of_other_values_than_0_and_1_are_refused(masks, got):
    values = {"boxes": torch.tensor([[0.0, 0, 2, 1]]), "labels": torch.tensor([1]), "masks": masks[None, None]}
    with pytest.raises(ValueError, match=f"0 and 1 only, got {got}; compare with > 0"):
        Target.from_dict(values)


def test_a_dict_needs_boxes_and_labels():
    with pytest.raises(ValueError, match=r"needs 'boxes' and 'labels', got only \['labels'\]"):
        Target.from_dict({"labels": torch.tensor([1])})
    with pytest.raises(ValueError, match=r"got only \['boxes', 'masks'\]"):
        Target.from_dict({"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 4, 4)})


# Detections -----------------------------------------------------------------------------------------


def test_detections_as_torchvision_has_them():
    probs = torch.rand(2, 14, 14, generator=torch.Generator().manual_seed(0))
    keypoints = torch.tensor([[[3.0, 4, 0.25]], [[5, 6, 0.75]]])
    found = make_detections(mask_probs=probs, keypoints=keypoints)
    values = found.to_dict(SIZE)
    assert set(values) == {"boxes", "scores", "labels", "masks", "keypoints", "keypoints_scores"}
    assert values["masks"].shape == (2, 1, *SIZE) and values["masks"].dtype == torch.bool
    assert torch.equal(values["masks"][:, 0], paste_masks(probs, found.boxes, SIZE))
    assert values["keypoints"].tolist() == [[[3, 4, 1]], [[5, 6, 1]]]
    assert values["keypoints_scores"].tolist() == [[0.25], [0.75]]
    assert "masks" not in found.to_dict() and "mask_probs" not in found.to_dict()
    assert torch.equal(found.keypoints, keypoints)


def test_boxes_scores_and_keypoints_come_back_from_their_dict():
    found = make_detections(keypoints=torch.tensor([[[3.0, 4, 0.25]], [[5, 6, 0.75]]]))
    assert same(Detections.from_dict(found.to_dict(SIZE)), found)
    plain = make_detections()
    assert same(Detections.from_dict(plain.to_dict()), plain)
    unscored = {k: v for k, v in found.to_dict().items() if k != "keypoints_scores"}
    assert Detections.from_dict(unscored).keypoints[..., 2].tolist() == [[1], [1]]


def test_masks_of_whole_cells_come_back_from_their_dict():
    """One cell per pixel in the first box, two cells per pixel and row in the second."""
    boxes = torch.tensor([[2.0, 1, 10, 9], [4, 4, 8, 8]])
    probs = torch.zeros(2, 8, 8)
    probs[0, 2:5, 1:7] = 1.0
    probs[1, :4] = 1.0
    found = make_detections(boxes=boxes, mask_probs=probs)
    back = Detections.from_dict(found.to_dict(SIZE), mask_size=8)
    assert torch.equal(back.mask_probs[0], probs[0])
    assert torch.equal(back.to_dict(SIZE)["masks"], found.to_dict(SIZE)["masks"])


def test_probabilities_stay_probabilities():
    """torchvision's masks [N, 1, H, W] hold probabilities: half sure over the whole image stays half sure."""
    values = make_detections().to_dict() | {"masks": torch.full((2, 1, *SIZE), 0.4)}
    torch.testing.assert_close(Detections.from_dict(values).mask_probs, torch.full((2, 28, 28), 0.4))


def test_nothing_found_comes_back_too():
    nothing = make_detections(mask_probs=torch.zeros(2, 28, 28), keypoints=torch.zeros(2, 5, 3))[:0]
    back = Detections.from_dict(nothing.to_dict(SIZE))
    assert len(back) == 0 and back.mask_probs.shape == (0, 28, 28) and back.keypoints.shape == (0, 5, 3)
