"""Non-maximum suppression: by hand, by law, and against torchvision."""

import pytest
import torch
import torchvision
from ops_cases import ALL, FAST, generator

from mrcnn_edu import ops


def crowd(seed: int, count: int, extent: float = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes that overlap a lot, with scores of which every third is the same."""
    g = generator(seed)
    corner = torch.rand(count, 2, generator=g) * extent
    boxes = torch.cat([corner, corner + 20 + torch.rand(count, 2, generator=g) * 90], dim=1)
    scores = torch.rand(count, generator=g)
    scores[::3] = 0.5
    return boxes, scores


@pytest.mark.parametrize("name", ALL)
def test_by_hand(name):
    """B covers 6 of A's 10 cells and 4 more: IoU 6 / 10 = 0.6 with A. C touches nobody."""
    a, b, c = [0.0, 0, 10, 1], [0.0, 0, 6, 1], [20.0, 0, 30, 1]
    boxes = torch.tensor([b, c, a])
    scores = torch.tensor([0.8, 0.1, 0.9])
    with ops.use(name):
        assert ops.nms(boxes, scores, 0.5).tolist() == [2, 1]
        assert ops.nms(boxes, scores, 0.7).tolist() == [2, 0, 1]
        assert ops.nms(boxes, scores, 0.5, max_keep=1).tolist() == [2]
        assert ops.nms(boxes, scores, 0.5, max_keep=0).tolist() == []
        assert ops.nms(boxes[:0], scores[:0], 0.5).tolist() == []


@pytest.mark.parametrize("name", ALL)
def test_what_is_suppressed_does_not_suppress(name):
    """A chain A - B - C, each overlapping the next: B falls to A, so C stays."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])
    with ops.use(name):
        assert ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.3).tolist() == [0, 2]


@pytest.mark.parametrize("name", ALL)
def test_equal_scores_keep_their_order(name):
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 0, 60, 10]])
    with ops.use(name):
        assert ops.nms(boxes, torch.full((3,), 0.5), 0.5).tolist() == [0, 2]


@pytest.mark.parametrize("name", ALL)
def test_boxes_without_area_have_no_overlap(name):
    """0 / 0 is taken as 0, so equal points all stay."""
    with ops.use(name):
        assert ops.nms(torch.ones(3, 4), torch.tensor([0.1, 0.3, 0.2]), 0.5).tolist() == [1, 2, 0]


@pytest.mark.parametrize("name", ALL)
def test_areas_beyond_float32(name):
    """The area of a box 1e20 wide is no float32; twins of that size suppress each other all the same."""
    boxes = torch.tensor([[0.0, 0, 1e20, 1e20], [0, 0, 1e20, 1e20], [0, 0, 1, 1]])
    with ops.use(name):
        assert ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 2]


@pytest.mark.parametrize("name", ALL)
def test_groups_never_touch(name):
    """Also with negative coordinates, where moving groups apart by the largest coordinate fails."""
    box = torch.tensor([-100.0, -100, -10, -10])
    boxes = torch.stack([box, box, box, box])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    with ops.use(name):
        assert ops.batched_nms(boxes, scores, torch.tensor([0, 1, 0, -7]), 0.5).tolist() == [0, 1, 3]
        assert ops.batched_nms(boxes * 1e4, scores, torch.tensor([1200, 1201, 1200, 2**62]), 0.5).tolist() == [0, 1, 3]


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("count", [1, 15, 16, 17, 700, 2500])
def test_equals_torchvision(name, count):
    boxes, scores = crowd(count, count)
    for threshold in (0.0, 0.3, 0.5, 0.7, 1.0):
        expected = torchvision.ops.nms(boxes, scores, threshold)
        with ops.use(name):
            kept = ops.nms(boxes, scores, threshold)
        # torchvision leaves the order of equal scores open; it is stable on the CPU
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("name", ALL)
def test_thresholds_that_ious_hit_exactly(name):
    """Boxes on a grid have IoUs like 1/2 and 3/10: only what is larger than the threshold suppresses."""
    g = generator(0)
    corner = torch.randint(0, 12, (120, 2), generator=g).float()
    boxes = torch.cat([corner, corner + torch.randint(1, 11, (120, 2), generator=g)], dim=1)
    scores = torch.rand(120, generator=g)
    with ops.use(name):
        for threshold in (0.1, 0.2, 0.25, 0.3, 1 / 3, 0.5, 0.6, 0.75):
            assert torch.equal(ops.nms(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("groups", [1, 5, 80])
def test_batched_is_nms_per_group(name, groups):
    boxes, scores = crowd(3, 800, extent=100)
    group = torch.randint(groups, (800,), generator=generator(4))
    with ops.use(name):
        kept = ops.batched_nms(boxes, scores, group, 0.4)
        expected = torch.zeros(800, dtype=torch.bool)
        for g in range(groups):
            rows = (group == g).nonzero()[:, 0]
            expected[rows[ops.nms(boxes[rows], scores[rows], 0.4)]] = True
        assert torch.equal(kept.sort().values, expected.nonzero()[:, 0])
        assert (scores[kept].diff() <= 0).all()
        for most in (0, 1, 100, 10_000):
            assert torch.equal(ops.batched_nms(boxes, scores, group, 0.4, max_keep=most), kept[:most])


@pytest.mark.parametrize("name", FAST)
def test_laws(name):
    """What is kept does not depend on the order of the rows, on where the boxes lie, or on their unit."""
    boxes, scores = crowd(5, 300)
    scores = torch.randperm(300, generator=generator(6)).float()
    order = torch.randperm(300, generator=generator(7))
    with ops.use(name):
        kept = ops.nms(boxes, scores, 0.45)
        assert torch.equal(order[ops.nms(boxes[order], scores[order], 0.45)], kept)
        assert torch.equal(ops.nms(boxes * 4, scores, 0.45), kept)
        assert torch.equal(kept[ops.nms(boxes[kept], scores[kept], 0.45)], kept)  # twice is once


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_scores_of_any_precision(name, dtype):
    boxes, scores = crowd(8, 200)
    scores = torch.randn(200, generator=generator(9)) * 3
    scores[::5], scores[1::5] = 0.0, -0.0  # equal, for all that their bits differ
    with ops.use(name):
        assert torch.equal(
            ops.nms(boxes, scores.to(dtype), 0.5), torchvision.ops.nms(boxes, scores.to(dtype).float(), 0.5)
        )


@pytest.mark.parametrize("name", FAST)
def test_nms_of_images_is_nms_of_each(name):
    counts = [300, 0, 1, 200]
    boxes, scores = crowd(11, sum(counts))
    groups = torch.randint(3, (sum(counts),), generator=generator(12))
    absent = torch.rand(sum(counts), generator=generator(13)) < 0.3
    marked = scores.masked_fill(absent, -torch.inf)
    with ops.use(name):
        for most in (None, 0, 20):
            found = ops.nms_of_images(boxes, marked, groups, counts, 0.4, most)
            assert len(found) == len(counts)
            first = 0
            for rows, count in zip(found, counts):
                there = first + (~absent[first : first + count]).nonzero()[:, 0]
                expected = there[ops.batched_nms(boxes[there], scores[there], groups[there], 0.4, most)]
                assert torch.equal(rows + first, expected)
                first += count
        assert ops.nms_of_images(boxes[:0], scores[:0], groups[:0], [], 0.4) == []
        with pytest.raises(ValueError, match="counts must be the rows of each image, 501 together, got"):
            ops.nms_of_images(boxes, scores, groups, [300, 200], 0.4)
        with pytest.raises(ValueError, match="is not finite"):
            ops.nms_of_images(boxes, scores.masked_fill(absent, torch.nan), groups, counts, 0.4)
