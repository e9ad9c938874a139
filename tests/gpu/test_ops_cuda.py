"""The CUDA ops: equal to the CPU's, safe on bad rows, deterministic when asked. Only where there is a GPU."""

import pytest
import torch

from mrcnn_edu import ops
from mrcnn_edu.ops.backends import COMPILED_FOR

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)
if "cuda" not in COMPILED_FOR:
    pytest.skip(f"the CUDA ops were not built: {ops.backend()}", allow_module_level=True)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# The CPU and the GPU round every product alike (no fused multiply-add) but add up in another order.
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 2e-2, "atol": 2e-2},
}


def case(seed: int, dtype: torch.dtype, rois_per_case: int = 40):
    """A random pyramid, rois on it, and a setting of the layers; some rois inside out, empty or off the map."""
    g = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    channels = pick(1, 3, 16, 20, 64)
    maps = [torch.randn(2, channels, 24 >> i, 32 >> i, generator=g).to(dtype) for i in range(pick(1, 2, 3))]
    if pick(True, False):
        maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]
    corner = torch.rand(rois_per_case, 2, generator=g) * 120 - 10
    side = torch.exp(torch.rand(rois_per_case, 2, generator=g) * 5)
    side[::9] *= -1
    side[4::13] = 0
    image = torch.randint(2, (rois_per_case, 1), generator=g)
    rois = torch.cat([image.float(), corner, corner + side], dim=1)
    levels = torch.randint(len(maps), (rois_per_case,), generator=g)
    options = {
        "layer": pick("roi_align", "roi_warp", "roi_pool"),
        "output_size": pick(7, (3, 5), 1),
        "scales": [0.25 / 2**i for i in range(len(maps))],
        "samples_per_bin": pick(0, 1, 2, 3),
        "aligned": pick(True, False),
        "mode": pick("mean", "max"),
    }
    return maps, rois, levels, options


def both_directions(maps, rois, levels, options, device):
    leaves = [m.detach().to(device).requires_grad_() for m in maps]
    pooled = ops.pool_levels(features=leaves, rois=rois.to(device), levels=levels.to(device), **options)
    gradient = torch.sin(torch.arange(pooled.numel(), dtype=torch.float64)).view(pooled.shape)
    pooled.backward(gradient.to(device, pooled.dtype))
    return [pooled.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("first_seed", range(0, 100, 20))
def test_roi_layers_equal_the_cpu(dtype, deterministic, first_seed):
    try:
        torch.use_deterministic_algorithms(deterministic)
        for seed in range(first_seed, first_seed + 20):
            arguments = case(seed, dtype)
            expected = both_directions(*arguments, "cpu")
            got = both_directions(*arguments, "cuda")
            for ours, theirs in zip(got, expected):
                torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_deterministic_gradient_has_the_same_bits(mode):
    maps, rois, levels, options = case(7, torch.float32, rois_per_case=300)
    options = options | {"mode": mode, "layer": "roi_align"}
    try:
        torch.use_deterministic_algorithms(True)
        first = both_directions(maps, rois, levels, options, "cuda")
        for _ in range(20):
            again = both_directions(maps, rois, levels, options, "cuda")
            assert all(torch.equal(a, b) for a, b in zip(first, again))
    finally:
        torch.use_deterministic_algorithms(False)


def test_bad_rows_are_skipped_and_reported():
    features = torch.ones(1, 4, 16, 16, device="cuda")
    good = torch.tensor([[0.0, 1, 1, 9, 9]], device="cuda")
    for bad in ([1, 1, 1, 9, 9], [-1, 1, 1, 9, 9], [1e6, 1, 1, 9, 9], [torch.nan, 1, 1, 9, 9], [0, 1, torch.inf, 9, 9]):
        rois = torch.cat([good, torch.tensor([bad], device="cuda", dtype=torch.float32)])
        pooled = ops.roi_align(features, rois, 2, 1.0)
        assert pooled[0].eq(1).all() and pooled[1].eq(0).all()
        with pytest.raises(ValueError, match="row 1 of the rois"):
            torch.ops.mrcnn_edu.raise_reported()
        torch.ops.mrcnn_edu.raise_reported()  # said once


def test_the_next_call_reports_too():
    features = torch.ones(1, 4, 16, 16, device="cuda")
    ops.roi_align(features, torch.tensor([[9.0, 1, 1, 9, 9]], device="cuda"), 2, 1.0)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="row 0 of the rois"):
        ops.roi_align(features, torch.tensor([[0.0, 1, 1, 9, 9]], device="cuda"), 2, 1.0)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000, 20_000])
def test_nms_equals_the_cpu(count):
    g = torch.Generator().manual_seed(count)
    corner = torch.rand(count, 2, generator=g) * 500
    boxes = torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=g) * 90], dim=1)
    scores = torch.rand(count, generator=g)
    scores[::3] = 0.5
    groups = torch.randint(4, (count,), generator=g)
    for threshold in (0.0, 0.3, 0.7, 1.0):
        for most in (None, 0, 10):
            expected = ops.batched_nms(boxes, scores, groups, threshold, most)
            got = ops.batched_nms(boxes.cuda(), scores.cuda(), groups.cuda(), threshold, most)
            assert torch.equal(got.cpu(), expected)
    assert torch.equal(ops.nms(boxes.cuda(), scores.cuda(), 0.5).cpu(), ops.nms(boxes, scores, 0.5))


def test_nms_of_very_many_boxes():
    """2^17 boxes: the table of pairs has more than 2^31 bits."""
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(1 << 17, 2, generator=g) * 20_000
    boxes = torch.cat([corner, corner + 50], dim=1)
    scores = torch.rand(1 << 17, generator=g)
    assert torch.equal(ops.nms(boxes.cuda(), scores.cuda(), 0.5).cpu(), ops.nms(boxes, scores, 0.5))


def test_nms_of_images_equals_image_after_image():
    g = torch.Generator().manual_seed(3)
    counts = [0, 1, 700, 64, 65, 3000, 0]
    corner = torch.rand(sum(counts), 2, generator=g) * 300
    boxes = torch.cat([corner, corner + 5 + torch.rand(sum(counts), 2, generator=g) * 90], dim=1)
    scores = torch.rand(sum(counts), generator=g)
    scores[::3], scores[1::7] = 0.5, -torch.inf
    groups = torch.randint(3, (sum(counts),), generator=g)
    for most in (None, 0, 100):
        expected = ops.nms_of_images(boxes, scores, groups, counts, 0.5, most)
        got = ops.nms_of_images(boxes.cuda(), scores.cuda(), groups.cuda(), counts, 0.5, most)
        assert len(got) == len(counts) and all(torch.equal(a.cpu(), b) for a, b in zip(got, expected))


def test_nms_of_images_reports_bad_rows():
    boxes = torch.tensor([[0.0, 0, 9, 9], [1, 1, torch.nan, 5]], device="cuda")
    scores, groups = torch.tensor([0.5, 0.4], device="cuda"), torch.zeros(2, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match="row 1 of"):
        ops.nms_of_images(boxes, scores, groups, [1, 1], 0.5)
    with pytest.raises(ValueError, match="row 1 of"):
        ops.nms(boxes[[0, 0]], torch.tensor([0.5, -torch.inf], device="cuda"), 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 6, 64])
def test_bias_relu_is_what_it_says(dtype, channels):
    g = torch.Generator().manual_seed(channels)
    whole, added = (torch.randn(2, channels, 5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(channels, generator=g, dtype=torch.float64)
    whole[0, 0, 0, 0] = torch.nan
    for other in (None, added):
        place, more = (
            None if part is None else part.to("cuda", dtype).contiguous(memory_format=torch.channels_last)
            for part in (whole, other)
        )
        expected = place.double() + bias.to("cuda", dtype).double()[:, None, None]
        expected = (expected if more is None else expected + more.double()).relu()
        torch.ops.mrcnn_edu.bias_relu_(place, bias.to("cuda", dtype), more)
        torch.testing.assert_close(place.double(), expected, rtol=1e-2, atol=1e-2, equal_nan=True)
    with pytest.raises(ValueError, match="channels last"):
        torch.ops.mrcnn_edu.bias_relu_(torch.zeros(2, 3, 4, 5, device="cuda"), torch.zeros(3, device="cuda"), None)


@pytest.mark.parametrize("rule", ["continuous", "integer"])
@pytest.mark.parametrize("threshold", [0.5, None])
def test_paste_equals_the_cpu(rule, threshold):
    g = torch.Generator().manual_seed(1)
    masks = torch.rand(50, 28, 28, generator=g)
    corner = torch.rand(50, 2, generator=g) * 200 - 60
    boxes = torch.cat([corner, corner + torch.rand(50, 2, generator=g) * 150], dim=1)
    expected = ops.paste_masks(masks, boxes, (120, 160), threshold, rule)
    torch.testing.assert_close(ops.paste_masks(masks.cuda(), boxes.cuda(), (120, 160), threshold, rule).cpu(), expected)
    on_gpu = ops.paste_crops(masks.cuda(), boxes.cuda(), (120, 160), threshold, rule)
    for ours, theirs in zip(on_gpu, ops.paste_crops(masks, boxes, (120, 160), threshold, rule)):
        assert ours[:2] == theirs[:2]
        torch.testing.assert_close(ours[2].cpu(), theirs[2])


def test_opcheck_on_cuda():
    maps, rois, levels, _ = case(3, torch.float32)
    maps = [m.cuda().requires_grad_() for m in maps]
    arguments = (maps, rois.cuda(), levels.cuda(), [0.25] * len(maps), 2, 3, 3, 2, True, False)
    torch.library.opcheck(torch.ops.mrcnn_edu.roi_features.default, arguments)


def test_more_numbers_than_int32_counts():
    features = torch.zeros(3, 1, 32768, 32768, dtype=torch.float16, device="cuda")  # 6 GiB
    features[2, 0, 31990:32010] = 7
    rois = torch.tensor([[2.0, 32000, 32000, 32004, 32004]], device="cuda")
    assert ops.roi_align(features, rois, 1, 1.0).item() == 7


def test_autocast_and_graph_capture():
    features = torch.randn(1, 64, 16, 16, device="cuda", dtype=torch.bfloat16)
    rois = torch.tensor([[0.0, 1, 1, 9, 9]], device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = ops.roi_align(features, rois, 7, 1.0)
    assert expected.dtype == torch.bfloat16
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.roi_align(features, rois, 7, 1.0)
    graph.replay()
    torch.testing.assert_close(captured, expected)
