"""The RPN's quick gradient: the same as PyTorch's, wherever the gradient is, and left to PyTorch where it must be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mrcnn_edu.models import conv_gradient
from mrcnn_edu.models.conv_gradient import conv3x3


def gradients(asked: Tensor, layer: nn.Conv2d, x: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(asked, [t for t in (x, layer.weight, layer.bias) if t is not None], gradient)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cells", [0, 1, 9, 150], ids=lambda n: f"{n} cells of 150")
def test_the_same_gradient_as_pytorch(cells, bias, memory_format):
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 7, 3, padding=1, bias=bias).to(memory_format=memory_format)
    x = torch.randn(2, 5, 5, 15).contiguous(memory_format=memory_format).requires_grad_()
    flat = torch.zeros(150, 7)
    flat[torch.randperm(150)[:cells]] = torch.randn(cells, 7)
    gradient = flat.view(2, 5, 15, 7).permute(0, 3, 1, 2)
    wanted = layer(x)
    found = conv3x3(layer, x)
    assert torch.equal(found, wanted)
    assert "Conv3x3" in type(found.grad_fn).__name__
    pairs = zip(gradients(found, layer, x, gradient), gradients(wanted, layer, x, gradient), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_one_cell_by_hand():
    """One cell in the corner, gradient 2: its window of x is the gradient of the weights, twice; outside is zero."""
    layer = nn.Conv2d(1, 1, 3, padding=1)
    x = torch.arange(1.0, 26).reshape(1, 1, 5, 5).requires_grad_()
    gradient = torch.zeros(1, 1, 5, 5)
    gradient[0, 0, 0, 0] = 2
    for_x, for_weight, for_bias = gradients(conv3x3(layer, x), layer, x, gradient)
    assert for_weight[0, 0].tolist() == [[0, 0, 0], [0, 2, 4], [0, 12, 14]]
    assert for_bias.tolist() == [2]
    assert torch.equal(for_x[0, 0, :2, :2], 2 * layer.weight[0, 0, 1:, 1:]) and for_x.count_nonzero() == 4


def test_only_what_is_asked_for():
    layer, x = nn.Conv2d(3, 3, 3, padding=1), torch.randn(1, 3, 8, 8)
    conv3x3(layer, x)[0, 0, 0, 0].backward()
    assert x.grad is None and layer.weight.grad.count_nonzero() > 0
    layer.requires_grad_(False)
    x.requires_grad_()
    conv3x3(layer, x).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(layer(x).sum(), x)[0])


def test_nan_in_a_gradient_stays():
    layer, x = nn.Conv2d(1, 1, 3, padding=1), torch.ones(1, 1, 40, 40, requires_grad=True)
    gradient = torch.zeros(1, 1, 40, 40)
    gradient[0, 0, 20, 20] = float("nan")
    assert all(part.isnan().any() for part in gradients(conv3x3(layer, x), layer, x, gradient))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, 2, 1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
    ],
    ids=["unpadded", "1x1", "strided", "groups", "float64", "sequence"],
)
def test_everything_else_is_left_to_pytorch(layer, monkeypatch):
    monkeypatch.setattr(conv_gradient.Conv3x3, "apply", lambda *_: pytest.fail("not ours"))
    x = torch.randn(1, 4, 6, 6, dtype=next(layer.parameters()).dtype)
    assert torch.equal(conv3x3(layer, x), layer(x))


def test_autocast_and_inference_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(conv_gradient.Conv3x3, "apply", lambda *_: pytest.fail("not ours"))
    layer, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(1, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv3x3(layer, x).dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(conv3x3(layer, x), layer(x))
