"""The 3x3 convolution's quick gradient: PyTorch's, wherever the gradient is, and left to it where it must be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mrcnn_edu.models import conv3x3
from mrcnn_edu.models.conv3x3 import Conv3x3


@pytest.fixture(autouse=True)
def every_width(monkeypatch):
    monkeypatch.setattr(conv3x3, "WIDE", 1)


def gradients(asked: Tensor, layer: Conv3x3, x: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(asked, [t for t in (x, layer.weight, layer.bias) if t is not None], gradient)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride, size", [(1, (5, 15)), (2, (9, 30)), (2, (10, 29))])
@pytest.mark.parametrize("cells", [0, 1, 9, 150], ids=lambda n: f"{n} cells of 150")
@pytest.mark.parametrize("at_once", [1, 2**20], ids=["row by row", "all rows at once"])
def test_the_same_gradient_as_pytorch(at_once, cells, stride, size, bias, memory_format, monkeypatch):
    monkeypatch.setattr(conv3x3, "AT_ONCE", at_once)
    torch.manual_seed(0)
    layer = Conv3x3(5, 7, stride, bias).to(memory_format=memory_format)
    x = torch.randn(2, 5, *size).contiguous(memory_format=memory_format).requires_grad_()
    flat = torch.zeros(150, 7)
    flat[torch.randperm(150)[:cells]] = torch.randn(cells, 7)
    gradient = flat.view(2, 5, 15, 7).permute(0, 3, 1, 2)
    wanted = F.conv2d(x, layer.weight, layer.bias, stride, padding=1)
    found = layer(x)
    assert torch.equal(found, wanted)
    assert "QuickGradient" in type(found.grad_fn).__name__
    pairs = zip(gradients(found, layer, x, gradient), gradients(wanted, layer, x, gradient), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_one_cell_by_hand():
    """One cell in the corner, gradient 2: its window of x is the gradient of the weights, twice; outside is zero."""
    layer = Conv3x3(1, 1)
    x = torch.arange(1.0, 26).reshape(1, 1, 5, 5).requires_grad_()
    gradient = torch.zeros(1, 1, 5, 5)
    gradient[0, 0, 0, 0] = 2
    for_x, for_weight, for_bias = gradients(layer(x), layer, x, gradient)
    assert for_weight[0, 0].tolist() == [[0, 0, 0], [0, 2, 4], [0, 12, 14]]
    assert for_bias.tolist() == [2]
    assert torch.equal(for_x[0, 0, :2, :2], 2 * layer.weight[0, 0, 1:, 1:]) and for_x.count_nonzero() == 4


def test_only_what_is_asked_for():
    layer, x = Conv3x3(3, 3).requires_grad_(False), torch.randn(1, 3, 8, 8, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(F.conv2d(x, layer.weight, padding=1).sum(), x)[0])
    assert layer.weight.grad is None and layer.bias.grad is None


def test_nan_in_a_gradient_stays():
    layer, x = Conv3x3(1, 1), torch.ones(1, 1, 40, 40, requires_grad=True)
    gradient = torch.zeros(1, 1, 40, 40)
    gradient[0, 0, 20, 20] = float("nan")
    assert all(part.isnan().any() for part in gradients(layer(x), layer, x, gradient))


def test_everything_else_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(conv3x3.QuickGradient, "apply", lambda *_: pytest.fail("not ours"))
    layer, x = Conv3x3(4, 4), torch.randn(1, 4, 6, 6)
    assert layer(x).requires_grad  # the image: there is no gradient to send further back
    x.requires_grad_()
    monkeypatch.setattr(conv3x3, "WIDE", 5)
    assert layer(x).requires_grad
    monkeypatch.setattr(conv3x3, "WIDE", 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
    assert layer.double()(x.double()).dtype == torch.float64


def test_hooks_are_called():
    seen, layer = [], Conv3x3(1, 1)
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    layer(torch.ones(1, 1, 4, 4, requires_grad=True))
    assert seen == [(1, 1, 4, 4)]
