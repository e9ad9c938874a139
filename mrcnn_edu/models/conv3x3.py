"""The 3x3 convolution, with a gradient that takes a processor less time.

Chapter 20 (speed). Paper: Section 3.1, Training. Two facts help:

- The gradient of the weights is one matrix product: the gradient at every cell times the 3 x 3 cells that it has seen.
  oneDNN takes up to twice as long as such a product (measured with AVX2, maps channels last).
- The RPN's losses look at 256 anchors per image, of some hundred thousand. So the gradient of its map is zero nearly
  everywhere, and both products of the way back, for the weights and for the features, need only the few cells where it
  is not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

Cells = tuple[Tensor, Tensor, Tensor]  # image, row and column [S]

FEW = 1 / 8  # of the cells; with more, dense products are as fast
WIDE = 128  # channels; with fewer, PyTorch is as fast, all in all
AT_ONCE = 2**20  # numbers in the windows that are written out at a time, few enough for a processor's cache


class Conv3x3(nn.Conv2d):
    """A padded 3x3 convolution: the numbers of ``nn.Conv2d``, and its gradient up to rounding.

    The quick gradient is that of a wide convolution in float32 on a CPU whose input has a gradient too; it has no
    second derivative. All else is left to PyTorch: a GPU, for one, would have to wait for the number of cells.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 3, stride, padding=1, bias=bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # what nn.Conv2d.forward calls
        quick = (
            torch.is_grad_enabled()
            and x.requires_grad
            and self.in_channels >= WIDE
            and x.device.type == "cpu"
            and x.dtype == weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )
        return QuickGradient.apply(x, weight, bias, self.stride[0]) if quick else super()._conv_forward(x, weight, bias)


class QuickGradient(torch.autograd.Function):
    """The convolution with the gradient of ``Conv3x3``."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, bias, stride, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (x, weight), stride = ctx.saved_tensors, ctx.stride
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        for_bias = gradient.sum(dim=(0, 2, 3)) if wants_bias else None
        for_x = for_weight = None
        cells = few_cells(gradient)
        if cells is None:
            if wants_x:
                for_x = conv2d_input(x.shape, weight, gradient, stride, padding=1)
            if wants_weight:
                for_weight = weight_gradient(x, gradient, stride)
        else:
            rows = gradient.permute(0, 2, 3, 1)[cells]  # [S, out]
            if wants_x:
                for_x = sparse_input_gradient(x, weight, rows, cells, stride)
            if wants_weight:
                for_weight = as_weight(rows.T @ windows_of(x, stride)[cells].flatten(1))
        return for_x, for_weight, for_bias, None


def few_cells(gradient: Tensor) -> Cells | None:
    """The cells whose gradient [B, out, H, W] is not zero, or None where they are many."""
    many = FEW * gradient[:, 0].numel()
    if gradient[:, 0].count_nonzero() > many:  # one channel tells already
        return None
    cells = (gradient != 0).any(dim=1).nonzero(as_tuple=True)
    return cells if len(cells[0]) <= many else None


def windows_of(x: Tensor, stride: int) -> Tensor:
    """What each cell of the output has seen of x [B, in, H, W], as a view [B, H / stride, W / stride, 3, 3, in]."""
    padded = F.pad(x.contiguous(memory_format=torch.channels_last), (1, 1, 1, 1))
    return padded.unfold(2, 3, stride).unfold(3, 3, stride).permute(0, 2, 3, 4, 5, 1)


def as_weight(product: Tensor) -> Tensor:
    """[out, 3 * 3 * in] in the shape of the weights, [out, in, 3, 3]."""
    return product.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)


def weight_gradient(x: Tensor, gradient: Tensor, stride: int) -> Tensor:
    """The gradient of the weights; of as many rows of cells at a time as the cache has room for."""
    windows, gradient = windows_of(x, stride), gradient.permute(0, 2, 3, 1)
    at_once = max(AT_ONCE // windows[:, 0].numel(), 1)
    total = gradient.new_zeros(gradient.shape[3], 9 * x.shape[1])
    for seen, change in zip(windows.split(at_once, dim=1), gradient.split(at_once, dim=1)):
        total.addmm_(change.flatten(0, 2).T, seen.reshape(-1, total.shape[1]))
    return as_weight(total)


def sparse_input_gradient(x: Tensor, weight: Tensor, rows: Tensor, cells: Cells, stride: int) -> Tensor:
    """The gradient of x: each cell's row [S, out], sent back by the weights into the 3 x 3 cells that it has seen."""
    image, row, column = (index[:, None, None] for index in cells)
    three = torch.arange(3)
    spread = torch.zeros_like(F.pad(x, (1, 1, 1, 1)))
    parts = (rows @ weight.permute(0, 2, 3, 1).flatten(1)).unflatten(1, (3, 3, -1))  # [S, 3, 3, in]
    window = (image, row * stride + three[:, None], column * stride + three)
    spread.permute(0, 2, 3, 1).index_put_(window, parts, accumulate=True)
    return spread[:, :, 1:-1, 1:-1]
