"""RoIPool, RoIWarp and RoIAlign: by hand, by law, and against torchvision."""

import functools

import pytest
import torch
import torchvision
from ops_cases import ALL, FAST, TOLERANCE, generator, laid_out, random_rois

from mrcnn_edu import ops

LAYERS = {
    "roi_align": lambda f, r, p, s, n, m: ops.roi_align(f, r, p, s, n, True, m),
    "roi_align_not_aligned": lambda f, r, p, s, n, m: ops.roi_align(f, r, p, s, n, False, m),
    "roi_warp": lambda f, r, p, s, n, m: ops.roi_warp(f, r, p, s, n, m),
    "roi_pool": lambda f, r, p, s, n, m: ops.roi_pool(f, r, p, s),
}


def roi(*box: float, image: int = 0) -> torch.Tensor:
    return torch.tensor([[image, *box]], dtype=torch.float32)


# By hand --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counting() -> torch.Tensor:
    """0 1 2 3 / 4 5 6 7 / 8 9 10 11 / 12 13 14 15: cell (y, x), whose centre is at (y + .5, x + .5), holds 4 y + x."""
    return torch.arange(16.0).view(1, 1, 4, 4)


@pytest.mark.parametrize("name", ALL)
def test_align_by_hand(counting, name):
    with ops.use(name):
        # One bin from (1, 1) to (3, 3), its four samples at 1.5 and 2.5: the centres of the cells 5, 6, 9, 10.
        assert ops.roi_align(counting, roi(1, 1, 3, 3), 1, 1.0).item() == (5 + 6 + 9 + 10) / 4
        assert ops.roi_align(counting, roi(1, 1, 3, 3), 1, 1.0, mode="max").item() == 10
        # One sample at (1.75, 1.25), cell indices (1.25, 0.75): the ramp 4 y + x is 5.75 there.
        assert ops.roi_align(counting, roi(1, 1.5, 1.5, 2), 1, 1.0, samples_per_bin=1).item() == 5.75
        # Half the size on the map when the stride is 2, and half a cell further without alignment.
        assert ops.roi_align(counting, roi(2, 2, 6, 6), 1, 0.5).item() == 7.5
        assert ops.roi_align(counting, roi(2, 2, 6, 6), 1, 0.5, aligned=False).item() == 7.5 + 4 * 0.5 + 0.5


@pytest.mark.parametrize("name", ALL)
def test_warp_by_hand(counting, name):
    with ops.use(name):
        # 0.6 and 1.4 round to cell 1, so the RoI is cell 1: its samples at 0.75 and 1.25 average to its centre.
        assert ops.roi_warp(counting, roi(0.6, 0.6, 1.4, 1.4), 1, 1.0).item() == pytest.approx(5)
        # RoIAlign does not round: the centre (1, 1) of the box is cell index 0.5.
        assert ops.roi_align(counting, roi(0.6, 0.6, 1.4, 1.4), 1, 1.0).item() == pytest.approx(2.5)


@pytest.mark.parametrize("name", ALL)
def test_pool_by_hand(counting, name):
    with ops.use(name):
        # Cells 0..2 in two bins: 0..1.5 and 1.5..3, rounded outwards 0..2 and 1..3.
        pooled = ops.roi_pool(counting, roi(0, 0, 2, 2), 2, 1.0)
        assert pooled.flatten().tolist() == [5, 6, 9, 10]
        # Halves are rounded away from zero, also below zero: cells -1..0, of which only cell 0 is on the map.
        assert ops.roi_pool(counting, roi(-0.5, -0.5, 0.4, 0.4), 1, 1.0).item() == 0
        assert ops.roi_pool(-1 - counting, roi(8, 8, 9, 9), 1, 1.0).item() == 0  # nothing to pool
        # A box turned inside out still has one cell.
        assert ops.roi_pool(counting, roi(2, 2, 1, 1), 1, 1.0).item() == 10


@pytest.mark.parametrize("name", ALL)
def test_mirrored_and_empty_rois(counting, name):
    with ops.use(name):
        forward = ops.roi_align(counting, roi(0.5, 0.5, 3, 3.5), 2, 1.0)
        mirrored = ops.roi_align(counting, roi(3, 3.5, 0.5, 0.5), 2, 1.0)
        torch.testing.assert_close(mirrored, forward.flip(2, 3))
        assert ops.roi_align(counting, roi(3, 3, 1, 1), 2, 1.0, samples_per_bin=0).abs().max() == 0
        assert ops.roi_align(counting, roi(1.5, 1.5, 1.5, 1.5), 1, 1.0).item() == pytest.approx(5)
        assert ops.roi_align(counting, roi(90, 90, 95, 95), 1, 1.0).item() == 0  # off the map


@pytest.mark.parametrize("name", ALL)
def test_no_rois_no_images(name):
    with ops.use(name):
        features = torch.ones(2, 3, 4, 4, requires_grad=True)
        pooled = ops.roi_align(features, torch.zeros(0, 5), (3, 2), 1.0)
        assert pooled.shape == (0, 3, 3, 2)
        if name != "reference":
            pooled.sum().backward()
            assert features.grad.shape == features.shape and features.grad.abs().max() == 0
        assert ops.roi_pool(torch.ones(0, 3, 4, 4), torch.zeros(0, 5), 2, 1.0).shape == (0, 3, 2, 2)
        with pytest.raises(ValueError, match=r"rois\[0\].*there are 0 images"):
            ops.roi_align(torch.ones(0, 3, 4, 4), roi(0, 0, 1, 1), 2, 1.0)


# By law ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("samples", [0, 1, 2, 3])
def test_constant_and_ramp_are_exact(name, samples):
    """The mean of a constant is that constant; of a ramp in x it is the ramp at the bin's centre, inside the map."""
    y, x = torch.meshgrid(torch.arange(20.0) + 0.5, torch.arange(30.0) + 0.5, indexing="ij")
    features = torch.stack([torch.full_like(x, 3.25), x, y, 2 * x - y])[None]
    boxes = torch.rand(40, 2, generator=generator(0)) * torch.tensor([20.0, 10.0]) + 1
    rois = torch.cat([torch.zeros(40, 1), boxes, boxes + 1 + torch.rand(40, 2, generator=generator(1)) * 7], dim=1)
    with ops.use(name):
        pooled = ops.roi_align(features, rois, 5, 1.0, samples)
    fraction = (torch.arange(5.0) + 0.5) / 5
    centre_x = (rois[:, 1, None] + fraction * (rois[:, 3] - rois[:, 1])[:, None])[:, None, :].expand(-1, 5, -1)
    centre_y = (rois[:, 2, None] + fraction * (rois[:, 4] - rois[:, 2])[:, None])[:, :, None].expand(-1, -1, 5)
    expected = torch.stack([torch.full_like(centre_x, 3.25), centre_x, centre_y, 2 * centre_x - centre_y], dim=1)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_translation_and_flip(name, layer, mode):
    """Moving map and RoI by whole cells changes nothing; mirroring both mirrors the result."""
    features = torch.randn(1, 3, 16, 18, generator=generator(2))
    rois = roi(14.3, 9.1, 40.2, 33.7)
    moved = torch.nn.functional.pad(features, (5, 0, 3, 0))
    with ops.use(name):
        here = LAYERS[layer](features, rois, 3, 0.25, 2, mode)
        there = LAYERS[layer](moved, rois + torch.tensor([0, 20, 12, 20, 12]), 3, 0.25, 2, mode)
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
        if layer == "roi_align":  # rounding and the missing half cell know left from right
            width = 18 * 4
            mirrored = torch.tensor([[0, width - 40.2, 9.1, width - 14.3, 33.7]])
            flipped = LAYERS[layer](features.flip(3), mirrored, 3, 0.25, 2, mode)
            torch.testing.assert_close(here, flipped.flip(3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
def test_scale(name):
    """Only the product of box and scale matters to RoIAlign."""
    features = torch.randn(2, 3, 16, 18, generator=generator(3))
    rois = random_rois(4, 30, 2, (64, 72))
    doubled = rois * torch.tensor([1, 2, 2, 2, 2])
    with ops.use(name):
        torch.testing.assert_close(
            ops.roi_align(features, rois, 4, 0.25), ops.roi_align(features, doubled, 4, 0.125), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradcheck(name, layer, mode):
    features = torch.randn(2, 5, 4, 5, dtype=torch.float64, generator=generator(5)).requires_grad_()
    rois = random_rois(6, 4, 2, (16, 20))
    layer = LAYERS[layer]
    with ops.use(name):
        assert torch.autograd.gradcheck(
            lambda f: layer(laid_out(f, "channels_last"), rois, (1, 2), 0.25, 2, mode), (features,)
        )
        assert torch.autograd.gradcheck(lambda f: layer(f, rois, 2, 0.25, 0, mode), (features,))


@pytest.mark.parametrize("name", FAST)
def test_no_gradient_to_rois_and_none_twice(name):
    features = torch.randn(1, 6, 8, 8, requires_grad=True)
    rois = roi(1, 1, 7, 7).requires_grad_()
    with ops.use(name):
        pooled = ops.roi_align(features, rois, 2, 1.0)
        (gradient,) = torch.autograd.grad(pooled.sum(), features, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad((gradient * torch.rand_like(gradient)).sum(), features)
        ops.roi_align(features, rois, 2, 1.0).sum().backward()
    assert rois.grad is None


# By oracle ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [2, 0, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_align_equals_torchvision(name, aligned, samples, layout, dtype):
    features = torch.randn(2, 20, 25, 34, dtype=dtype, generator=generator(7))
    rois = random_rois(8, 60, 2, (100, 136))
    ours, theirs = (features.clone().requires_grad_() for _ in range(2))
    for output_size in (7, (3, 5)):
        with ops.use(name):
            pooled = ops.roi_align(laid_out(ours, layout), rois, output_size, 0.25, samples, aligned)
        expected = torchvision.ops.roi_align(theirs, rois.to(dtype), output_size, 0.25, samples or -1, aligned)
        torch.testing.assert_close(pooled, expected, **TOLERANCE[dtype])
        weight = torch.randn(expected.shape, dtype=dtype, generator=generator(9))
        pooled.backward(weight)
        expected.backward(weight)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_pool_equals_torchvision(name, layout):
    features = torch.randn(2, 20, 25, 34, generator=generator(10))
    rois = random_rois(11, 60, 2, (100, 136))
    ours, theirs = (features.clone().requires_grad_() for _ in range(2))
    with ops.use(name):
        pooled = ops.roi_pool(laid_out(ours, layout), rois, (7, 4), 0.25)
    expected = torchvision.ops.roi_pool(theirs, rois, (7, 4), 0.25)
    assert torch.equal(pooled, expected)
    weight = torch.randn(expected.shape, generator=generator(12))
    pooled.backward(weight)
    expected.backward(weight)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", ALL)
def test_pool_bins_are_exact_fractions(name):
    """57 cells in 7 bins: float32 makes 7 * (57 / 7) a little more than 57, and torchvision reads a 58th cell."""
    features = torch.zeros(1, 1, 1, 60)
    features[..., 57] = 1
    rois = roi(0, 0, 56, 0)
    with ops.use(name):
        assert ops.roi_pool(features, rois, (1, 7), 1.0).max() == 0
    assert torchvision.ops.roi_pool(features, rois, (1, 7), 1.0).max() == 1


def pooled_and_gradient(name: str, layer: str, mode: str, samples: int, channels: int, layout: str):
    features = torch.randn(2, channels, 9, 12, generator=generator(13))
    if layer != "roi_warp":  # zeros tie, as after a ReLU; RoIWarp's samples lie so evenly that others would tie as well
        features = features.clamp(min=0)
    features.requires_grad_()
    with ops.use(name):
        pooled = LAYERS[layer](laid_out(features, layout), LOOP_ROIS, (2, 3), 0.25, samples, mode)
    (gradient,) = torch.autograd.grad(pooled, features, torch.randn(pooled.shape, generator=generator(15)))
    return pooled, gradient


LOOP_ROIS = torch.cat([random_rois(14, 7, 2, (30, 40)), roi(-60, -50, -30, 2), roi(10, 8, 70, 60)])
by_loops = functools.lru_cache(functools.partial(pooled_and_gradient, "reference", layout="contiguous"))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("channels", [1, 20])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", FAST)
def test_equals_the_loops(name, layer, mode, samples, channels, layout):
    """Values and gradients of the fast forms are those of the definition, ties of the maximum included."""
    expected = by_loops(layer=layer, mode=mode, samples=samples, channels=channels)
    got = pooled_and_gradient(name, layer, mode, samples, channels, layout)
    torch.testing.assert_close(got, expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_half_precision_sums_in_float32(name, dtype, mode):
    features = torch.randn(2, 24, 20, 20, generator=generator(16)).to(dtype)
    rois = random_rois(17, 40, 2, (80, 80))
    half, full = features.clone().requires_grad_(), features.float().requires_grad_()
    with ops.use(name):
        got = ops.roi_align(half, rois, 5, 0.25, mode=mode)
        expected = ops.roi_align(full, rois, 5, 0.25, mode=mode)
    assert got.dtype == dtype
    assert torch.equal(got, expected.to(dtype))
    weight = torch.randn(got.shape, generator=generator(18)).to(dtype)
    got.backward(weight)
    expected.backward(weight.float())
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad.float(), full.grad, **TOLERANCE[dtype])


@pytest.mark.parametrize("name", FAST)
def test_autocast_leaves_rois_alone(name):
    """bfloat16 cannot hold image index 257 or box edge 1001; the rois stay float32, so neither is moved."""
    features = torch.arange(300.0).view(300, 1, 1, 1).expand(300, 4, 2, 2).to(torch.bfloat16)
    with ops.use(name), torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = ops.roi_align(features, roi(0, 0, 2, 2, image=257), 1, 1.0)
    assert pooled.dtype == torch.bfloat16
    assert pooled[0, 0].item() == features[257, 0, 0, 0]


@pytest.mark.parametrize("name", FAST)
def test_image_index_beyond_half_precision(name):
    features = torch.zeros(2051, 1, 1, 1, dtype=torch.float16)
    features[2049] = 7
    with ops.use(name):
        assert ops.roi_align(features, roi(0, 0, 1, 1, image=2049), 1, 1.0).item() == 7


# Levels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("layer", ["roi_align", "roi_warp", "roi_pool"])
def test_levels_are_separate_calls(name, layer):
    """One call over a pyramid gives, row by row, what each RoI gives alone on its level."""
    features = [torch.randn(2, 5, 16 >> i, 20 >> i, generator=generator(i)) for i in range(3)]
    scales = [0.25, 0.125, 0.0625]
    rois = random_rois(19, 12, 2, (64, 80))
    levels = torch.arange(12) % 3
    leaves = [f.clone().requires_grad_() for f in features]
    with ops.use(name):
        pooled = ops.pool_levels(layer, leaves, rois, levels, 2, scales)
        pooled.sum().backward()
        single = getattr(ops, layer)
        for row in range(12):
            level = int(levels[row])
            alone = single(features[level], rois[row : row + 1], 2, scales[level])
            torch.testing.assert_close(pooled[row : row + 1], alone)
    assert all(leaf.grad is not None for leaf in leaves)


@pytest.mark.parametrize("name", FAST)
def test_empty_levels_have_gradients(name):
    """A level without RoIs gets a gradient of zeros, so that every process of a group has the same graph."""
    leaves = [torch.randn(1, 4, 8, 8, requires_grad=True) for _ in range(2)]
    with ops.use(name):
        levels = torch.zeros(1, dtype=torch.int64)
        ops.pool_levels("roi_align", leaves, roi(1, 1, 5, 5), levels, 2, [1.0, 0.5]).sum().backward()
    assert leaves[0].grad.abs().max() > 0 and leaves[1].grad.abs().max() == 0
