"""What the ops refuse, and that each refusal is a sentence with the value and what is allowed."""

import math

import pytest
import torch
from ops_cases import ALL, FAST, laid_out, needs_compiled

from mrcnn_edu import ops

NAN, INF = math.nan, math.inf
BOX = [[0.0, 0, 0, 8, 8]]


def align(features=None, rois=BOX, size=2, scale=1.0, samples=2, **more):
    features = torch.ones(1, 4, 16, 16) if features is None else features
    rois = torch.tensor(rois) if isinstance(rois, list) else rois
    return ops.roi_align(features, rois, size, scale, samples, **more)


BAD_VALUES = {
    "image too large": [[1.0, 1, 1, 9, 9]],
    "image negative": [[-1.0, 1, 1, 9, 9]],
    "image far away": [[1e6, 1, 1, 9, 9]],
    "image nan": [[NAN, 1, 1, 9, 9]],
    "image not whole": [[0.7, 1, 1, 9, 9]],
    "box nan": [[0.0, NAN, NAN, NAN, NAN]],
    "one edge nan": [[0.0, 1, NAN, 9, 9]],
    "box infinite": [[0.0, 0, 0, INF, INF]],
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rois", BAD_VALUES.values(), ids=BAD_VALUES)
@pytest.mark.parametrize("layer", ["roi_align", "roi_warp", "roi_pool"])
def test_bad_rois_are_named(name, rois, layer):
    good_then_bad = torch.tensor(BOX + rois)
    with ops.use(name), pytest.raises(ValueError, match=r"rois\[1\] = .*image"):
        getattr(ops, layer)(torch.ones(1, 4, 16, 16), good_then_bad, 2, 1.0)


BAD_CALLS = {
    "features a list": (TypeError, "features must be a tensor", {"features": [[1.0]]}),
    "features 3-d": (ValueError, r"\[B, C, H, W\]", {"features": torch.ones(4, 16, 16)}),
    "features int": (TypeError, r"use .float\(\)", {"features": torch.ones(1, 4, 16, 16, dtype=torch.int64)}),
    "no images": (ValueError, "there are 0 images", {"features": torch.ones(0, 4, 16, 16)}),
    "no rows": (ValueError, "no cells", {"features": torch.ones(1, 4, 0, 16)}),
    "no columns": (ValueError, "no cells", {"features": torch.ones(1, 4, 16, 0)}),
    "rois an array": (TypeError, "rois must be a tensor", {"rois": ((0, 0, 0, 8, 8),)}),
    "rois 1-d": (ValueError, "x1, y1, x2, y2", {"rois": torch.zeros(5)}),
    "rois boxes": (ValueError, "x1, y1, x2, y2", {"rois": torch.zeros(3, 4)}),
    "rois half": (TypeError, "float32 whatever", {"rois": torch.zeros(1, 5, dtype=torch.float16)}),
    "rois int": (TypeError, "float32 whatever", {"rois": torch.zeros(1, 5, dtype=torch.int64)}),
    "size 0": (ValueError, "output_size", {"size": 0}),
    "size negative": (ValueError, "output_size", {"size": (-1, 2)}),
    "size three": (ValueError, "output_size", {"size": (1, 2, 3)}),
    "size float": ((TypeError, ValueError), "output_size", {"size": 2.5}),
    "scale nan": (ValueError, "spatial_scale", {"scale": NAN}),
    "scale 0": (ValueError, "spatial_scale", {"scale": 0.0}),
    "scale negative": (ValueError, "spatial_scale", {"scale": -0.25}),
    "scale infinite": (ValueError, "spatial_scale", {"scale": INF}),
    "scale absurd": (ValueError, "spatial_scale", {"scale": 3e38}),
    "samples negative": (ValueError, "samples_per_bin", {"samples": -1}),
    "samples many": (ValueError, "samples_per_bin", {"samples": 100_000}),
    "samples float": (TypeError, "samples_per_bin", {"samples": 2.0}),
    "mode": (ValueError, "mode", {"mode": "median"}),
}


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("case", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_refused(name, case):
    error, sentence, arguments = case
    with ops.use(name), pytest.raises(error, match=sentence):
        align(**arguments)


@pytest.mark.parametrize("name", FAST)
def test_levels_are_checked(name):
    features = [torch.ones(1, 4, 16, 16), torch.ones(1, 4, 8, 8)]

    def pool(features=features, levels=(0,), scales=(1.0, 0.5), layer="roi_align"):
        return ops.pool_levels(layer, features, torch.tensor(BOX), torch.tensor(levels), 2, scales)

    with ops.use(name):
        for error, sentence, arguments in (
            (ValueError, "levels must lie in 0..1", {"levels": [2]}),
            (ValueError, "levels must lie in 0..1", {"levels": [-1]}),
            (ValueError, "one level per roi", {"levels": [0, 1]}),
            (TypeError, "int64", {"levels": [0.0]}),
            (ValueError, "one scale per feature map", {"scales": [1.0]}),
            (ValueError, "one scale per feature map", {"features": [], "scales": []}),
            (ValueError, "same B and C", {"features": [features[0], torch.ones(1, 3, 8, 8)]}),
            (ValueError, "one dtype", {"features": [features[0], features[1].double()]}),
            (ValueError, "layer must be", {"layer": "roi_crop"}),
        ):
            with pytest.raises(error, match=sentence):
                pool(**arguments)


@pytest.mark.parametrize("name", FAST)
def test_the_sampling_grid_is_bounded(name):
    """A box of 2e5 cells asks for 28572 x 28572 samples per bin; it is answered at once, from a grid of 256 x 256."""
    with ops.use(name):
        pooled = align(rois=[[0.0, -1e5, -1e5, 1e5, 1e5], [0.0, 0, 0, 3e38, 3e38]], size=7, samples=0)
    assert torch.isfinite(pooled).all() and pooled.max() <= 1.0001


@pytest.mark.parametrize("name", FAST)
def test_layouts_are_equal(name):
    features = torch.randn(2, 20, 9, 8)
    rois = torch.tensor([[0.0, 1, 1, 6, 7], [1, 0, 0, 3, 3]])
    strided_rois = torch.stack([rois, rois], dim=-1)[..., 0].t().contiguous().t()
    with ops.use(name):
        expected = align(features, rois)
        for layout in ("contiguous", "channels_last", "strided"):
            torch.testing.assert_close(align(laid_out(features, layout), rois), expected)
        torch.testing.assert_close(align(features, strided_rois), expected, rtol=0, atol=0)
        if name == "compiled":  # as their users expect: what goes in contiguous comes out so, and channels_last too
            assert align(features, rois).is_contiguous()
            assert align(laid_out(features, "channels_last"), rois).is_contiguous(memory_format=torch.channels_last)


@needs_compiled
def test_more_numbers_than_int32_counts():
    """Three images of 2^30 numbers: six gigabytes of address space, of which only the pages read are ever there."""
    try:
        features = torch.empty(3, 1, 32768, 32768, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no such tensor here: {error}")
    features[2, 0, 31990:32010] = 7
    with ops.use("compiled"):
        assert ops.roi_align(features, torch.tensor([[2.0, 32000, 32000, 32004, 32004]]), 1, 1.0).item() == 7


BOXES, SCORES = [[0.0, 0, 9, 9], [0, 0, 9, 9], [20, 20, 30, 30]], [0.9, 0.8, 0.7]

BAD_NMS = {
    "score nan": (ValueError, r"scores\[0\]", {"scores": [NAN, 0.9, 0.8]}),
    "score infinite": (ValueError, r"scores\[1\]", {"scores": [0.9, INF, 0.8]}),
    "box nan": (ValueError, r"boxes\[1\]", {"boxes": [[0.0, 0, 9, 9], [NAN] * 4, [20, 20, 30, 30]]}),
    "edge infinite": (ValueError, r"boxes\[2\]", {"boxes": [[0.0, 0, 9, 9], [0, 0, 9, 9], [0, 0, INF, 9]]}),
    "threshold nan": (ValueError, "threshold", {"threshold": NAN}),
    "threshold negative": (ValueError, "threshold", {"threshold": -1.0}),
    "threshold large": (ValueError, "threshold", {"threshold": 1.5}),
    "fewer scores": (ValueError, "one score per box", {"scores": [0.9, 0.8]}),
    "boxes 1-d": (ValueError, r"\[N, \(x1", {"boxes": [0.0, 0, 9, 9]}),
    "boxes five": (ValueError, r"\[N, \(x1", {"boxes": [[0.0] * 5] * 3}),
    "boxes int": (TypeError, "boxes must be float32", {"boxes": [[0, 0, 9, 9]] * 3}),
    "scores int": (TypeError, "scores must be floating", {"scores": [1, 2, 3]}),
    "fewer groups": (ValueError, "one group per box", {"groups": [0]}),
    "groups float": (TypeError, "groups must be int64", {"groups": [0.0, 1, 2]}),
    "max_keep": (ValueError, "max_keep", {"max_keep": -1}),
}


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("case", BAD_NMS.values(), ids=BAD_NMS)
def test_bad_nms_calls_are_refused(name, case):
    error, sentence, changed = case
    given = {"boxes": BOXES, "scores": SCORES, "groups": [0, 0, 1], "threshold": 0.5, "max_keep": None} | changed
    tensors = [torch.tensor(given[key]) for key in ("boxes", "scores", "groups")]
    with ops.use(name), pytest.raises(error, match=sentence):
        ops.batched_nms(*tensors, given["threshold"], given["max_keep"])


@pytest.mark.parametrize("name", FAST)
def test_bad_pastes_are_refused(name):
    masks, boxes = torch.rand(2, 7, 7), torch.tensor([[0.0, 0, 9, 9]] * 2)
    with ops.use(name):
        for error, sentence, arguments in (
            (ValueError, "one box per mask", (masks, boxes[:1], (9, 9))),
            (ValueError, r"boxes\[0\].*not finite", (masks, boxes * NAN, (9, 9))),
            (ValueError, "size must be", (masks, boxes, (0, 9))),
            (ValueError, "size must be", (masks, boxes, None)),
            (ValueError, "square", (masks[:, :3], boxes, (9, 9))),
            (ValueError, r"\[N, M, M\]", (masks[0], boxes, (9, 9))),
            (TypeError, "floating point", (masks > 0.5, boxes, (9, 9))),
            (ValueError, "threshold", (masks, boxes, (9, 9), NAN)),
            (ValueError, "rule", (masks, boxes, (9, 9), 0.5, "round")),
        ):
            with pytest.raises(error, match=sentence):
                ops.paste_masks(*arguments)


def test_choosing_an_implementation():
    before = ops.backend()
    with ops.use("reference"):
        assert ops.backend() == "reference: chosen by use()"
        with ops.use("vectorized"):
            assert ops.backend().startswith("vectorized")
        assert ops.backend().startswith("reference")
    assert ops.backend() == before
    ops.use("vectorized")  # for good
    assert ops.backend() == "vectorized: chosen by use()"
    ops.use(None)
    assert ops.backend() == before
    with pytest.raises(ValueError, match='"reference", "vectorized" or "compiled"'):
        ops.use("cuda")
