"""The 3x3 convolution by points: by hand, beside the definition in double precision, and left to PyTorch elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_models_optimized import assert_same, ready
from tiny_models import images
from torch import nn
from torch.nn import functional as F

from mrcnn_edu.models import winograd
from mrcnn_edu.models.mask_rcnn import MaskRCNN, build_model
from mrcnn_edu.models.winograd import POINTS, SIDE, A, B, G, WinogradConv, hasten, values
from mrcnn_edu.presets import MODELS


def fixed(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias).requires_grad_(False)


def test_a_polynomial_at_the_points_by_hand():
    """3 - x + 2 x^2: 3 at 0; at 3/4 it is 3 - 0.75 + 2 * 0.5625; at infinity what counts is the 2."""
    found = values(2) @ torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    assert found.tolist() == [3.0, 3.375, 4.875, 6.0, 9.0, 2.0]
    assert len(found) == len(POINTS) + 1 == SIDE


def test_four_results_of_a_row():
    """d = 1, 2, 4, 8, 16, 32 under g = (1, 10, 100): 1 + 20 + 400, and each of the others twice the one before."""
    d = torch.tensor([1.0, 2, 4, 8, 16, 32], dtype=torch.float64)
    g = torch.tensor([1.0, 10, 100], dtype=torch.float64)
    torch.testing.assert_close((A.T @ ((G @ g) * (B.T @ d))).tolist(), [421.0, 842.0, 1684.0, 3368.0])


def test_a_kernel_of_one_number_moves_the_map():
    conv = fixed(1, 1, bias=False)
    conv.weight.zero_()[0, 0, 0, 2] = 2.0  # twice the cell above, to the right
    x = torch.arange(1.0, 13).reshape(1, 1, 3, 4)
    found = WinogradConv(conv).convolve(x)
    torch.testing.assert_close(found[0, 0], torch.tensor([[0.0, 0, 0, 0], [4, 6, 8, 0], [12, 14, 16, 0]]))


@pytest.mark.parametrize("at_once", [1, 5, 272], ids=lambda n: f"{n} tiles at once")
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 4, 8), (2, 9, 21), (5, 14, 14), (1, 3, 40), (0, 8, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_definition(bias, size, at_once, monkeypatch):
    """What a convolution says it is, in float64; with rounding of the order that float32 has anyway."""
    monkeypatch.setattr(winograd, "AT_ONCE", at_once)
    images, height, width = size
    conv = fixed(16, 8, bias)
    x = torch.randn(images, 16, height, width)
    wanted = F.conv2d(x.double(), conv.weight.double(), None if conv.bias is None else conv.bias.double(), padding=1)
    fast = WinogradConv(conv)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        for found, right in ((fast(given), wanted), (fast.convolve(given, relu=True), wanted.relu())):
            torch.testing.assert_close(found, right.float(), rtol=1e-5, atol=1e-5)
            assert found.is_contiguous(memory_format=torch.channels_last)


def test_little_is_lost_by_rounding():
    """256 channels of unit deviation: at most twice the error of a direct sum, which is 1e-5."""
    conv = fixed(256, 16, bias=False)
    conv.weight.normal_(std=(9 * 256) ** -0.5)
    x = torch.randn(1, 256, 32, 32)
    exact = F.conv2d(x.double(), conv.weight.double(), padding=1)
    assert (WinogradConv(conv)(x) - exact).abs().max() < 2e-5


def test_infinity_stays_in_its_tile():
    """Where a map is not finite the result is not either: around it, and nowhere but in the tiles that see it."""
    x = torch.zeros(1, 2, 16, 16)
    x[0, 0, 5, 5] = torch.inf
    bad = ~WinogradConv(fixed(2, 2))(x).isfinite().all(dim=1)[0]
    assert bad[4:7, 4:7].all() and bad[4:8, 4:8].sum() == bad.sum()


def test_left_to_pytorch(monkeypatch):
    """With gradients, in another precision, under autocast, on another device: PyTorch's numbers, to the bit."""
    conv, x = fixed(4, 4), torch.randn(1, 4, 6, 6)
    monkeypatch.setattr(WinogradConv, "convolve", None)
    fast = WinogradConv(conv)
    assert fast.quick(x)
    wanting = x.clone().requires_grad_()
    assert not fast.quick(wanting) and torch.equal(fast(wanting), conv(x))
    fast(wanting).sum().backward()
    assert wanting.grad.shape == x.shape
    with torch.no_grad():
        assert fast.quick(wanting)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fast.quick(x) and fast(x).dtype == torch.bfloat16
    assert not fast.quick(x.double()) and not fast.quick(x.to("meta"))
    assert fast.double()(x.double()).dtype == torch.float64


def test_only_wide_and_plain_convolutions_are_replaced():
    wide = winograd.WIDE
    others = [
        nn.Conv2d(wide, wide, 3, stride=2, padding=1),
        nn.Conv2d(wide, wide, 3),
        nn.Conv2d(wide, wide, 3, padding=2, dilation=2),
        nn.Conv2d(wide, wide, 3, padding=1, groups=2),
        nn.Conv2d(wide, wide, 1),
        nn.Conv2d(wide, wide - 1, 3, padding=1),
        nn.Conv2d(wide - 1, wide, 3, padding=1),
    ]
    model = nn.Sequential(nn.Sequential(nn.Conv2d(wide, wide, 3, padding=1)), *others)
    hasten(model)
    assert isinstance(model[0][0], WinogradConv) and list(model[1:]) == others


def wide_model() -> MaskRCNN:
    """The paper's widths behind ten slim layers: its pyramid, RPN and mask head are replaced."""
    config = ready(MODELS["maskrcnn_resnet50_fpn"]).config
    mask = replace(config.mask, convs=(winograd.WIDE,) * 2, deconv=16)
    torch.manual_seed(0)
    return build_model(replace(config, backbone=replace(config.backbone, channels=winograd.WIDE), mask=mask)).eval()


def test_the_same_detections_of_a_wide_model():
    model = wide_model()
    fast, half = model.optimize(), model.optimize("bf16")
    replaced = [name for name, module in fast.named_modules() if isinstance(module, WinogradConv)]
    assert {name.split(".")[0] for name in replaced} == {"backbone", "rpn", "mask_head"}
    assert not any(isinstance(module, WinogradConv) for module in half.modules())
    with torch.inference_mode():
        for found, wanted in zip(fast(images()), model(images())):
            assert_same(found, wanted)
