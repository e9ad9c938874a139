"""The 3x3 convolution of the RPN and of the pyramid, with a gradient that takes a CPU less time.

Chapter 20 (speed). Paper: Section 3.1, Training. Two facts help:

- The RPN's losses look at 256 anchors per image, of some hundred thousand. So the gradient of its map is zero nearly
  everywhere, and the two large products of the way back, for the weights and for the features, need only the few cells
  where it is not.
- Where many cells have a gradient, oneDNN computes that of the weights from channels-last maps at a quarter of its
  speed (measured with AVX2), so it is given contiguous copies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

FEW = 1 / 8  # of the cells; with more, dense products are as fast


class Conv3x3(nn.Conv2d):
    """A padded 3x3 convolution: the numbers of ``nn.Conv2d``, and its gradient up to rounding.

    The quick gradient is that of float32 on a CPU; everything else is left to PyTorch: a GPU, for one, would have to
    wait for the number of cells.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        quick = (
            torch.is_grad_enabled()
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )
        return QuickGradient.apply(x, self.weight, self.bias) if quick else super().forward(x)


class QuickGradient(torch.autograd.Function):
    """The convolution with the gradient of ``Conv3x3``."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_bias = gradient.sum(dim=(0, 2, 3)) if ctx.needs_input_grad[2] else None
        image, row, column = (gradient != 0).any(dim=1).nonzero(as_tuple=True)  # [S] each
        for_x = for_weight = None
        if len(image) > FEW * gradient[:, 0].numel():
            if ctx.needs_input_grad[0]:
                for_x = conv2d_input(x.shape, weight, gradient, padding=1)
            if ctx.needs_input_grad[1]:
                for_weight = conv2d_weight(x.contiguous(), weight.shape, gradient.contiguous(), padding=1)
            return for_x, for_weight, for_bias

        rows = gradient[image, :, row, column]  # [S, out]
        padded, three = F.pad(x, (1, 1, 1, 1)), torch.arange(3)
        windows = (image[:, None, None], row[:, None, None] + three[:, None], column[:, None, None] + three)
        if ctx.needs_input_grad[0]:
            spread = torch.zeros_like(padded)
            parts = (rows @ weight.permute(0, 2, 3, 1).flatten(1)).unflatten(1, (3, 3, -1))  # [S, 3, 3, in]
            spread.permute(0, 2, 3, 1).index_put_(windows, parts, accumulate=True)
            for_x = spread[:, :, 1:-1, 1:-1]
        if ctx.needs_input_grad[1]:
            seen = padded.permute(0, 2, 3, 1)[windows].flatten(1)  # [S, 3 * 3 * in]
            for_weight = (rows.T @ seen).unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        return for_x, for_weight, for_bias
