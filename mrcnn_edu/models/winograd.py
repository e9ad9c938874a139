"""The 3x3 convolution of a trained model with a quarter of the multiplications.

Chapter 20 (speed). Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016), F(4x4, 3x3).

Neighbouring results share most of what they are made of. The product of polynomials with three and with four
coefficients has six, and is known by its values at six points, one of them infinity: six multiplications, not twelve.
With matrices G and A that take three and four coefficients to their values, and B, the inverse of the one for six, it
is ``B @ ((G @ g) * (A @ h))``. The same, transposed, is a row of a convolution, four results from the six cells d that
a kernel g sees for them: ``A.T @ ((G @ g) * (B.T @ d))``.

In both directions that makes 36 multiplications for a tile of 4 x 4 results, where the definition has 144. They are
summed over the channels, so each of the 36 points has one matrix product. Taking the cells to the points costs as much
for each channel, not for each pair of channels, and so next to nothing where channels are many.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TILE, TAPS = 4, 3
SIDE = TILE + TAPS - 1  # cells that a tile of results sees
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)  # and infinity; of the sets tried the one that rounds least
WIDE = 256  # channels; with fewer, the change of basis takes what the products save
AT_ONCE = 272  # tiles, few enough for a processor's cache and enough for a fast product


def values(degree: int) -> Tensor:
    """The matrix [6, degree + 1] that takes the coefficients of a polynomial to its values at the points."""
    finite = torch.tensor(POINTS, dtype=torch.float64)[:, None] ** torch.arange(degree + 1)
    at_infinity = torch.eye(degree + 1, dtype=torch.float64)[-1:]
    return torch.cat([finite, at_infinity])


A, G, B = values(TILE - 1), values(TAPS - 1), torch.linalg.inv(values(SIDE - 1))
TO_POINTS, FROM_POINTS = B.T.float().contiguous(), A.T.float().contiguous()  # [6, 6] and [4, 6]


def both_ways(matrix: Tensor, tiles: Tensor, half: Tensor, out: Tensor) -> None:
    """``matrix @ tile @ matrix.T`` for every tile, [m, n] and [n * n, numbers] to ``out`` [m * m, numbers]."""
    m, n = matrix.shape
    torch.mm(matrix, tiles.view(n, -1), out=half.view(m, -1))
    torch.bmm(matrix.expand(m, m, n), half.view(m, n, -1), out=out.view(m, m, -1))


class WinogradConv(nn.Conv2d):
    """A padded 3x3 convolution of stride 1 with fixed weights, that of ``conv`` up to rounding; on a CPU, in float32.

    Elsewhere, and where a gradient is wanted, PyTorch does it. The weights at the points take four times their memory.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, TAPS, padding=1, bias=conv.bias is not None)
        self.weight, self.bias = conv.weight, conv.bias
        at_points = torch.einsum("ai,bj,koij->abok", G, G, conv.weight.detach().double())
        self.register_buffer("at_points", at_points.flatten(0, 1).float().contiguous(), persistent=False)

    def quick(self, x: Tensor) -> bool:
        """Is this a map [B, C, H, W] for the fewer multiplications?"""
        fixed = not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad))
        plain = x.device.type == "cpu" and x.dtype == self.weight.dtype == self.at_points.dtype == torch.float32
        return fixed and plain and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # what nn.Conv2d.forward calls
        return self.convolve(x) if self.quick(x) else super()._conv_forward(x, weight, bias)

    def convolve(self, x: Tensor, relu: bool = False) -> Tensor:
        """The convolution of x [B, C, H, W], and a ReLU after it if wanted; channels last."""
        images, channels, height, width = x.shape
        cells, outputs = x.permute(0, 2, 3, 1), self.out_channels
        out = x.new_empty(images, height, width, outputs)
        rows, columns = -(-height // TILE), -(-width // TILE)  # of tiles
        some_images, some_rows = max(1, AT_ONCE // (rows * columns)), max(1, AT_ONCE // columns)
        memory: dict[str, Tensor] = {}  # one block after the other in the same, which stays in the cache

        def room(name: str, *size: int) -> Tensor:
            if name not in memory:
                memory[name] = x.new_empty(size).flatten()  # the first block is the largest
            return memory[name][: torch.Size(size).numel()].view(size)

        for i, first in itertools.product(range(0, images, some_images), range(0, rows, some_rows)):
            top, bottom = first * TILE, min(first + some_rows, rows) * TILE
            block = cells[i : i + some_images, max(top - 1, 0) : bottom + 1]
            above, below = int(top == 0), max(bottom + 1 - height, 0)
            block = F.pad(block, (0, 0, 1, columns * TILE + 1 - width, above, below))
            tiles = block.unfold(1, SIDE, TILE).unfold(2, SIDE, TILE)  # [b, r, columns, C, 6, 6]
            size = tiles.shape[:3]
            count = size.numel()
            seen = room("seen", SIDE, SIDE, *size, channels).copy_(tiles.permute(4, 5, 0, 1, 2, 3))
            points = room("points", SIDE**2, count, channels)
            both_ways(TO_POINTS, seen, room("half", SIDE**2, count, channels), points)
            products = room("products", SIDE**2, count, outputs)
            torch.bmm(points, self.at_points, out=products)
            made = room("made", TILE**2, count, outputs)
            both_ways(FROM_POINTS, products, room("other half", TILE * SIDE, count, outputs), made)
            if self.bias is not None:
                made.add_(self.bias)
            made = (made.relu_() if relu else made).view(TILE, TILE, *size, outputs).permute(2, 3, 0, 4, 1, 5)
            made = made.reshape(size[0], bottom - top, columns * TILE, outputs)
            out[i : i + some_images, top:bottom] = made[:, : height - top, :width]
        return out.permute(0, 3, 1, 2)


def hasten(module: nn.Module) -> None:
    """Replace the wide 3x3 convolutions below ``module``, whose weights change no more, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            shape = (child.kernel_size, child.stride, child.padding, child.dilation, child.groups)
            if shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and min(child.in_channels, child.out_channels) >= WIDE:
                setattr(module, name, WinogradConv(child))
        else:
            hasten(child)
