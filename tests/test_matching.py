"""Matching and sampling: by hand, by law, and against torchvision's Matcher."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection._utils import Matcher

from mrcnn_edu.matching import (
    IGNORED,
    NEGATIVE,
    POSITIVE,
    _sample_at_once,
    ignore_crowd,
    match,
    sample,
    sample_images,
    split_crowd,
    split_crowds,
)
from mrcnn_edu.structures import Target

# Tenths, so that ties and values exactly on a threshold are common.
TABLES = st.integers(1, 4).flatmap(
    lambda rows: st.lists(
        st.lists(st.integers(0, 10).map(lambda n: n / 10), min_size=rows, max_size=rows), min_size=1, max_size=12
    ).map(lambda columns: torch.tensor(columns).T)
)


def test_thresholds_by_hand():
    matched, status = match(torch.tensor([[0.8, 0.5, 0.1, 0.0]]), 0.7, 0.3)
    assert status.tolist() == [POSITIVE, IGNORED, NEGATIVE, NEGATIVE]
    assert matched.tolist() == [0, 0, 0, 0]


def test_at_a_threshold():
    _, status = match(torch.tensor([[0.75, 0.25]]), 0.75, 0.25)  # exact in float32
    assert status.tolist() == [POSITIVE, IGNORED]  # at or above is positive; only below is negative


def test_the_largest_overlap_is_matched():
    matched, _ = match(torch.tensor([[0.1, 0.6, 0.0], [0.4, 0.2, 0.3]]), 0.7, 0.3)
    assert matched.tolist() == [1, 0, 1]


def test_every_truth_keeps_its_best_boxes():
    iou = torch.tensor(
        [
            [0.9, 0.2, 0.1, 0.0],  # has a positive already
            [0.1, 0.25, 0.2, 0.25],  # its best are two, both far below 0.7
            [0.0, 0.0, 0.0, 0.0],  # overlaps nothing, so it has no best
        ]
    )
    matched, status = match(iou, 0.7, 0.3, keep_best=True)
    assert status.tolist() == [POSITIVE, POSITIVE, NEGATIVE, POSITIVE]
    assert matched.tolist() == [0, 1, 1, 1]
    assert match(iou, 0.7, 0.3)[1].tolist() == [POSITIVE, NEGATIVE, NEGATIVE, NEGATIVE]


def test_a_kept_box_still_belongs_to_its_own_largest_overlap():
    """The only box is the best of both truths and answers for the one it overlaps more."""
    matched, status = match(torch.tensor([[0.2], [0.6]]), 0.7, 0.3, keep_best=True)
    assert matched.tolist() == [1] and status.tolist() == [POSITIVE]


def test_without_truth_all_are_negative_and_without_boxes_none_are():
    for keep_best in (False, True):
        matched, status = match(torch.zeros(0, 3), 0.7, 0.3, keep_best)
        assert matched.tolist() == [0, 0, 0] and status.tolist() == [NEGATIVE] * 3
        matched, status = match(torch.zeros(2, 0), 0.7, 0.3, keep_best)
        assert len(matched) == len(status) == 0


@given(TABLES, st.booleans())
def test_matching_is_torchvisions(iou, keep_best):
    """Truths that overlap nothing are left out: torchvision calls every box their best."""
    iou = iou[iou.amax(dim=1) > 0]
    if len(iou) == 0:
        return
    theirs = Matcher(0.7, 0.3, allow_low_quality_matches=keep_best)(iou)
    matched, status = match(iou, 0.7, 0.3, keep_best)
    assert torch.equal(status == NEGATIVE, theirs == Matcher.BELOW_LOW_THRESHOLD)
    assert torch.equal(status == IGNORED, theirs == Matcher.BETWEEN_THRESHOLDS)
    assert torch.equal(matched[status == POSITIVE], theirs[status == POSITIVE])


@given(TABLES)
def test_keeping_the_best_only_adds_positives(iou):
    _, plain = match(iou, 0.7, 0.3)
    matched, kept = match(iou, 0.7, 0.3, keep_best=True)
    changed = plain != kept
    assert (kept[changed] == POSITIVE).all()
    best = torch.where(iou.amax(dim=1, keepdim=True) > 0, iou == iou.amax(dim=1, keepdim=True), False)
    assert (kept[best.any(dim=0)] == POSITIVE).all()
    assert ((matched >= 0) & (matched < len(iou))).all()


# Sampling -------------------------------------------------------------------------------------------


def statuses(positives: int, negatives: int, ignored: int) -> torch.Tensor:
    mixed = torch.tensor([POSITIVE] * positives + [NEGATIVE] * negatives + [IGNORED] * ignored, dtype=torch.int64)
    return mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("positives", "negatives", "drawn"),
    [
        (100, 100, (4, 12)),  # a quarter of 16
        (2, 100, (2, 14)),  # missing positives are replaced by negatives
        (100, 3, (4, 3)),  # missing negatives are not
        (0, 100, (0, 16)),
        (100, 0, (4, 0)),
        (0, 0, (0, 0)),
    ],
)
def test_counts_by_hand(positives, negatives, drawn):
    found = sample(statuses(positives, negatives, 5), 16, 0.25)
    assert tuple(map(len, found)) == drawn


@given(
    st.integers(0, 20), st.integers(0, 20), st.integers(0, 5), st.integers(0, 25), st.sampled_from([0, 0.25, 0.5, 1])
)
def test_what_is_drawn_is_what_it_is_called(positives, negatives, ignored, count, fraction):
    status = statuses(positives, negatives, ignored)
    chosen, others = sample(status, count, fraction, torch.Generator().manual_seed(1))
    assert (status[chosen] == POSITIVE).all() and (status[others] == NEGATIVE).all()
    assert (chosen.diff() > 0).all() and (others.diff() > 0).all()  # increasing, so none twice
    assert len(chosen) == min(positives, int(count * fraction))
    assert len(others) == min(negatives, count - len(chosen))


def test_a_generator_repeats_the_draw_and_every_box_has_its_chance():
    status = statuses(20, 20, 0)
    first, again = (sample(status, 8, 0.5, torch.Generator().manual_seed(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    generator = torch.Generator().manual_seed(0)
    seen = torch.cat([torch.cat(sample(status, 8, 0.5, generator)) for _ in range(100)])
    assert len(seen.unique()) == 40  # a box is missed 100 times with a chance of 0.8 ** 100


# Several images at once -----------------------------------------------------------------------------


def test_a_batch_is_matched_as_its_images_are():
    """Images with fewer truths are filled up with boxes of zeros, which overlap nothing."""
    torch.manual_seed(0)
    iou = torch.rand(3, 4, 50)
    iou[1, 2:] = 0.0
    iou[2] = 0.0
    matched, status = match(iou, 0.9, 0.5, keep_best=True)
    for image, truths in enumerate((4, 2, 0)):
        alone = match(iou[image, :truths], 0.9, 0.5, keep_best=True)
        assert torch.equal(status[image], alone[1]) and (matched[image] == alone[0])[status[image] == POSITIVE].all()
    matched, status = match(torch.zeros(2, 0, 5), 0.7, 0.3)
    assert matched.tolist() == [[0] * 5] * 2 and status.tolist() == [[NEGATIVE] * 5] * 2


def test_images_are_sampled_one_after_the_other():
    status = torch.stack([statuses(9, 20, 1), statuses(0, 30, 0), statuses(2, 3, 25), statuses(0, 0, 30)])
    torch.manual_seed(3)
    wanted = [sample(image, 8, 0.5) for image in status]
    torch.manual_seed(3)
    image, row, positive = sample_images(status, 8, 0.5)
    assert row.tolist() == [number for pair in wanted for part in pair for number in part.tolist()]
    assert image.tolist() == [0] * 8 + [1] * 8 + [2] * 5
    assert positive.tolist() == [True] * 4 + [False] * 4 + [False] * 8 + [True] * 2 + [False] * 3


images_of = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=4)


@given(images_of, st.integers(0, 25), st.sampled_from([0, 0.25, 0.5, 1]))
def test_what_lots_fall_on(images, count, fraction):
    """The GPU's way: of each image as many of each kind as ``sample`` draws, none twice, positives first."""
    status = torch.stack([statuses(*image, 24 - sum(image)) for image in images])
    torch.manual_seed(1)
    image, row, positive = _sample_at_once(status, count, fraction)
    assert torch.equal(status[image, row], torch.where(positive, POSITIVE, NEGATIVE))
    assert (image.diff() >= 0).all() and len(set(zip(image.tolist(), row.tolist()))) == len(row)
    assert all((positive[image == number].int().diff() <= 0).all() for number in range(len(images)))
    for number, (positives, negatives) in enumerate(images):
        chosen = int(positive[image == number].sum())
        assert chosen == min(positives, int(count * fraction))
        assert int((image == number).sum()) == chosen + min(negatives, count - chosen)


def test_every_row_may_draw_a_lot():
    status = torch.stack([statuses(20, 20, 0), statuses(3, 37, 0)])
    torch.manual_seed(0)
    seen = [set(), set()]
    for _ in range(100):
        image, row, _ = _sample_at_once(status, 8, 0.5)
        for number in (0, 1):
            seen[number] |= set(row[image == number].tolist())
    assert list(map(len, seen)) == [40, 40]  # one is missed 100 times with a chance of 0.87 ** 100 at most


# Crowds ---------------------------------------------------------------------------------------------


def test_a_crowd_is_split_off():
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 9, 9], [5, 5, 7, 7]])
    target = Target(boxes, torch.tensor([1, 2, 3]), crowd=torch.tensor([False, True, False]))
    single, crowd = split_crowd(target)
    assert single.labels.tolist() == [1, 3] and crowd.tolist() == [[0, 0, 9, 9]]
    for plain in (Target(boxes, target.labels), Target(boxes, target.labels, crowd=torch.zeros(3, dtype=torch.bool))):
        single, crowd = split_crowd(plain)
        assert single is plain and crowd.shape == (0, 4)
    without = Target(boxes, target.labels)
    for batch in ([target, without], [without, without], []):
        singles, crowds = split_crowds(batch)
        for whole, single, crowd in zip(batch, singles, crowds, strict=True):
            expected = split_crowd(whole)
            assert torch.equal(single.boxes, expected[0].boxes) and torch.equal(crowd, expected[1])


def test_negatives_in_a_crowd_are_ignored_by_hand():
    crowd = torch.tensor([[0.0, 0, 10, 10]])
    boxes = torch.tensor([[0.0, 0, 4, 4], [6, 0, 14, 10], [5, 0, 15, 10], [8, 0, 18, 10]])  # 1, 1/2, 1/2, 1/5 inside
    status = torch.tensor([POSITIVE, NEGATIVE, IGNORED, NEGATIVE])
    kept = status.clone()
    assert ignore_crowd(status, boxes, crowd, 0.5).tolist() == [POSITIVE, IGNORED, IGNORED, NEGATIVE]
    assert ignore_crowd(status, boxes, crowd, 0.6).tolist() == kept.tolist()
    assert ignore_crowd(status, boxes, crowd, None) is status
    assert ignore_crowd(status, boxes, crowd[:0], 0.5) is status
    assert torch.equal(status, kept)
