"""The compiled ops as PyTorch sees them: registration, torch.compile, determinism, and calls around the Python edge."""

import pytest
import torch
from ops_cases import generator, laid_out, needs_compiled, random_rois

from mrcnn_edu import ops
from mrcnn_edu.ops.checks import MAX_SAMPLES

pytestmark = needs_compiled

ROIS = random_rois(0, 9, 2, (32, 40))
LEVELS = torch.arange(9) % 2


def pyramid(dtype=torch.float32, layout="contiguous", grad=False, channels=6):
    maps = [torch.randn(2, channels, 16 >> i, 20 >> i, generator=generator(i)).to(dtype) for i in range(2)]
    return [laid_out(m, layout).requires_grad_(grad) for m in maps]


def raw(features, rois=ROIS, levels=LEVELS, layer=2, samples=2, maximum=False, scales=(0.5, 0.25), bins=(3, 2)):
    return torch.ops.mrcnn_edu.roi_features(features, rois, levels, scales, layer, *bins, samples, True, maximum)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("maximum", [False, True])
@pytest.mark.parametrize("channels", [1, 20])
def test_opcheck_roi_features(layout, maximum, channels):
    maps = pyramid(layout=layout, grad=True, channels=channels)
    arguments = (maps, ROIS, LEVELS, [0.5, 0.25], 2, 3, 2, 2, True, maximum)
    torch.library.opcheck(torch.ops.mrcnn_edu.roi_features.default, arguments)
    pooled, winners = torch.ops.mrcnn_edu.roi_features(*arguments)
    sizes = ([16, 8], [20, 10])
    arguments = (pooled.detach(), winners, ROIS, LEVELS, [0.5, 0.25], 2, *sizes, layout == "channels_last")
    torch.library.opcheck(torch.ops.mrcnn_edu.roi_features_backward.default, (*arguments, 2, 2, True, maximum))


def test_opcheck_nms_and_paste():
    boxes, scores = ROIS[:, 1:].contiguous(), torch.rand(9, generator=generator(1))
    torch.library.opcheck(torch.ops.mrcnn_edu.nms.default, (boxes, scores, None, 0.5, None))
    torch.library.opcheck(torch.ops.mrcnn_edu.nms.default, (boxes, scores, LEVELS, 0.5, 3))
    for threshold in (0.5, None):
        arguments = (torch.rand(9, 5, 5), boxes, 12, 14, threshold, True)
        torch.library.opcheck(torch.ops.mrcnn_edu.paste.default, arguments)
        torch.library.opcheck(torch.ops.mrcnn_edu.paste_crops.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    def step(features, rois):
        a = ops.roi_align(features, rois, 3, 0.5)
        b = ops.roi_warp(features * 2, rois, 3, 0.5, mode="max")
        return (a + b + ops.roi_pool(features, rois, 3, 0.5)).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for count in (9, 5):
        features = pyramid(grad=True)[0]
        expected = step(features, ROIS[:count])
        (wanted,) = torch.autograd.grad(expected, features)
        got = compiled(features, ROIS[:count])
        (gradient,) = torch.autograd.grad(got, features)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(gradient, wanted)
    with pytest.raises(ValueError, match=r"rois\[0\]"):  # unread while tracing, refused when it runs
        compiled(features, ROIS[:count] * torch.nan)


@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_for_any_number_of_threads(mode, layout):
    rois = random_rois(2, 200, 2, (32, 40))
    levels = torch.arange(200) % 2
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            maps = pyramid(layout=layout, grad=True, channels=70)
            pooled = ops.pool_levels("roi_align", maps, rois, levels, 7, [0.5, 0.25], mode=mode)
            pooled.backward(torch.randn(pooled.shape, generator=generator(3)))
            results.append((pooled, maps[0].grad, maps[1].grad))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@pytest.mark.parametrize("channels", [1, 5, 20, 130])
@pytest.mark.parametrize("count", [2, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_same_bits_in_every_layout(channels, count, dtype):
    """Few RoIs have their windows turned to channels last, many the whole map; what comes out does not tell."""
    rois = random_rois(5, count, 2, (120, 160))
    gradient = torch.randn(count, channels, 3, 4, generator=generator(6)).to(dtype)
    results = []
    for layout in ("contiguous", "channels_last", "strided"):
        features = torch.randn(2, channels, 60, 80, generator=generator(7)).to(dtype)
        features = laid_out(features, layout).requires_grad_()
        for samples in (0, 2):
            pooled = ops.roi_align(features, rois, (3, 4), 0.5, samples)
            results.append((layout, samples, pooled, torch.autograd.grad(pooled, features, gradient)[0]))
    for samples in (0, 2):
        (_, _, *expected), *others = [r for r in results if r[1] == samples]
        for layout, _, *got in others:
            assert all(torch.equal(a, b) for a, b in zip(got, expected)), (layout, samples)


def test_large_results_are_stored_past_the_caches():
    """Above 16 MB the stores are of another kind; the numbers are not."""
    features = torch.randn(1, 300, 8, 8, generator=generator(8)).contiguous(memory_format=torch.channels_last)
    rois = random_rois(9, 300, 1, (16, 16))
    for dtype, channels in ((torch.float32, 300), (torch.float32, 299), (torch.bfloat16, 296)):
        some = features[:, :channels].to(dtype, memory_format=torch.channels_last)
        large = ops.roi_align(some, rois, 10 if dtype == torch.float32 else 15, 0.5)
        assert large.numel() * large.element_size() > 1 << 24
        small = [ops.roi_align(some, part, large.shape[2:], 0.5) for part in rois.split(50)]
        assert torch.equal(large, torch.cat(small))


def test_the_ops_check_for_themselves():
    """Called without Python's checks, neither forward nor backward leaves its memory."""
    maps = pyramid()
    raw(maps, samples=MAX_SAMPLES)
    bad = ROIS.clone()
    for row in (
        [7.0, 0, 0, 9, 9],
        [-1.0, 0, 0, 9, 9],
        [torch.nan, 0, 0, 9, 9],
        [0.5, 0, 0, 9, 9],
        [0, 0, 0, torch.inf, 9],
    ):
        bad[4] = torch.tensor(row)
        with pytest.raises(ValueError, match=r"rois\[4\]"):
            raw(maps, rois=bad)
        with pytest.raises(ValueError, match=r"rois\[4\]"):
            backward(rois=bad)
    for levels in (LEVELS + 1, LEVELS - 1, LEVELS * 0 + 2**40):
        with pytest.raises(ValueError, match="level"):
            raw(maps, levels=levels)
    for wrong in (
        {"features": []},
        {"scales": (1.0,)},
        {"scales": (1.0, float("nan"))},
        {"bins": (0, 2)},
        {"bins": (2**40, 2)},
        {"layer": 3},
        {"samples": -1},
        {"samples": MAX_SAMPLES + 1},
        {"levels": LEVELS[:3]},
        {"rois": ROIS[:, :4]},
        {"features": [maps[0], maps[1][:, :2]]},
        {"features": [maps[0], maps[1][0]]},
        {"features": [maps[0][:, :, :0], maps[1]]},
        {"features": maps * 5, "scales": (1.0,) * 10},
    ):
        with pytest.raises(ValueError):
            raw(**{"features": maps} | wrong)
    for wrong in ({"rois": ROIS.double()}, {"levels": LEVELS.int()}, {"features": [m.long() for m in maps]}):
        with pytest.raises((TypeError, NotImplementedError)):
            raw(**{"features": maps} | wrong)


def backward(rois=ROIS, levels=LEVELS, gradient=None, winners=None, sizes=((16, 8), (20, 10)), images=2, maximum=False):
    gradient = torch.ones(len(rois), 6, 3, 2) if gradient is None else gradient
    winners = torch.zeros(gradient.numel() if maximum else 0, dtype=torch.int32) if winners is None else winners
    scales = [0.5, 0.25]
    return torch.ops.mrcnn_edu.roi_features_backward(
        gradient, winners, rois, levels, scales, images, *sizes, False, 2, 2, True, maximum
    )


def test_the_backward_checks_for_itself():
    for winner in (-1, -(2**31), 4, 2**31 - 1):  # no sample of a 2 x 2 grid
        winners = torch.full((9 * 6 * 3 * 2,), winner, dtype=torch.int32)
        assert all(g.abs().max() == 0 for g in backward(winners=winners, maximum=True))
    for wrong in (
        {"gradient": torch.ones(3, 6, 3, 2)},
        {"gradient": torch.ones(9, 6)},
        {"winners": torch.zeros(5, dtype=torch.int32), "maximum": True},
        {"sizes": ((16,), (20,))},
        {"sizes": ((16, 0), (20, 10))},
        {"sizes": ((16, -8), (20, 10))},
        {"images": -1},
        {"images": 0},
    ):
        with pytest.raises(ValueError):
            backward(**wrong)
    with pytest.raises(TypeError):
        backward(winners=torch.zeros(9 * 6 * 3 * 2), maximum=True)


def test_nms_and_paste_check_for_themselves():
    boxes, scores = torch.tensor([[0.0, 0, 9, 9], [1, 1, torch.nan, 9]]), torch.tensor([0.5, 0.6])
    with pytest.raises(ValueError, match=r"boxes\[1\]"):
        torch.ops.mrcnn_edu.nms(boxes, scores, None, 0.5, None)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match=r"scores\[0\]"):
            torch.ops.mrcnn_edu.nms(boxes[:1], torch.tensor([torch.nan], dtype=dtype), None, 0.5, None)
    with pytest.raises(ValueError, match=r"boxes\[1\]"):
        torch.ops.mrcnn_edu.paste(torch.rand(2, 5, 5), boxes, 9, 9, 0.5, False)
    good = boxes.nan_to_num(9)
    for arguments in (
        (good, scores[:1], None, 0.5, None),
        (good, scores, torch.zeros(1, dtype=torch.int64), 0.5, None),
        (good, scores, None, float("nan"), None),
        (good, scores, None, 0.5, -1),
        (good[:, :3], scores, None, 0.5, None),
    ):
        with pytest.raises(ValueError):
            torch.ops.mrcnn_edu.nms(*arguments)
    for arguments in (
        (torch.rand(3, 5, 5), good, 9, 9),
        (torch.rand(2, 5, 4), good, 9, 9),
        (torch.rand(2, 5, 5), good, 0, 9),
        (torch.rand(2, 5, 5), good, 9, 2**40),
    ):
        with pytest.raises(ValueError):
            torch.ops.mrcnn_edu.paste(*arguments, 0.5, False)


def test_says_what_runs():
    assert ops.backend().startswith("compiled (cpu")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.complex128], ids=str)
def test_a_raw_gradient_of_another_type_is_refused_before_it_is_turned(dtype: torch.dtype) -> None:
    """Two rois, so that it lies in planes and not channels last; its numbers are not as wide as those of any map."""
    rois, levels = torch.tensor([[0.0, 1, 1, 5, 5], [0, 2, 2, 6, 6]]), torch.zeros(2, dtype=torch.int64)
    gradient, winners = torch.ones(2, 3, 2, 3).to(dtype), torch.zeros(0, dtype=torch.int32)
    with pytest.raises(TypeError, match="floating point"):
        torch.ops.mrcnn_edu.roi_features_backward(
            gradient, winners, rois, levels, [0.5], 1, [6], [8], True, 2, 2, True, False
        )
