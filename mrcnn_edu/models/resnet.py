"""ResNet and ResNeXt, the backbones that turn pixels into the maps c2..c5.

Chapter 3 (backbones). Paper: Section 3, Network Architecture, with ResNet [19] and ResNeXt [45].

A stage ``c_k`` has stride ``2^k``: it sees the image ``2^k`` times smaller. Modules are named by stage, so that
``resnet.c4[0].conv2`` is where a reader of the paper expects it. What only a sum or a ReLU would read again is changed
in place: for large maps new memory costs more than the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrcnn_edu.models.conv3x3 import Conv3x3
from mrcnn_edu.models.non_local import NonLocal

Norm = Callable[[int], nn.Module]  # channels -> a normalisation layer

# name: (block, blocks per stage, groups, channels per group)
ARCHITECTURES: dict[str, tuple[Literal["basic", "bottleneck"], tuple[int, int, int, int], int, int]] = {
    "resnet10": ("basic", (1, 1, 1, 1), 1, 64),
    "resnet18": ("basic", (2, 2, 2, 2), 1, 64),
    "resnet34": ("basic", (3, 4, 6, 3), 1, 64),
    "resnet50": ("bottleneck", (3, 4, 6, 3), 1, 64),
    "resnet101": ("bottleneck", (3, 4, 23, 3), 1, 64),
    "resnet152": ("bottleneck", (3, 8, 36, 3), 1, 64),
    "resnext50_32x4d": ("bottleneck", (3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": ("bottleneck", (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": ("bottleneck", (3, 4, 23, 3), 64, 4),
    "resnext152_32x8d": ("bottleneck", (3, 8, 36, 3), 32, 8),
}


class FrozenBatchNorm(nn.Module):
    """Batch normalisation with fixed statistics and a fixed affine part: one multiplication and one addition.

    Detectors train with one or two images per device, too few for batch statistics, so the pretrained ones stay.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """What each channel is multiplied with, and what is then added to it."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = (part[:, None, None].to(x.dtype) for part in self.scale_and_shift())
        return (x * scale).add_(shift)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def normed(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(conv(x))``; a frozen norm is put into the convolution, to the same numbers with less memory to go through.

    (x * w) * scale + shift = x * (w * scale) + shift, and w is small: a map is hundreds of times as large.
    """
    if not isinstance(norm, FrozenBatchNorm):
        return norm(conv(x))
    scale, shift = norm.scale_and_shift()
    return conv._conv_forward(x, conv.weight * scale[:, None, None, None], shift)


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalisation by the statistics of one image's groups of 16 channels, whatever else is in the batch.

    So training and inference compute the same, and two images per process are enough. Source: Wu & He 2018, "Group
    Normalization", who train Mask R-CNN from scratch with it.
    """
    return nn.GroupNorm(math.gcd(channels, max(channels // 16, 1)), channels)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A convolution without bias (the norm after it has one) that keeps the size up to its stride."""
    if (kernel, groups, dilation) == (3, 1, 1):
        return Conv3x3(inputs, outputs, stride, bias=False)
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2 * dilation, dilation, groups, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, norm: Norm, dilation: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, width, 3, stride, dilation=dilation), norm(width)
        self.conv2, self.norm2 = conv(width, width, 3, dilation=dilation), norm(width)
        self.shortcut = shortcut(inputs, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(normed(self.conv1, self.norm1, x), inplace=True)
        y = normed(self.conv2, self.norm2, y)
        return F.relu(y + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up to four times the width, and a shortcut around them."""

    expansion = 4

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        norm: Norm,
        groups: int,
        group_width: int,
        stride_in: Literal["1x1", "3x3"],
        dilation: int = 1,
    ) -> None:
        super().__init__()
        inner = width * group_width // 64 * groups
        outputs = width * self.expansion
        stride1, stride2 = (stride, 1) if stride_in == "1x1" else (1, stride)
        self.conv1, self.norm1 = conv(inputs, inner, 1, stride1), norm(inner)
        self.conv2, self.norm2 = conv(inner, inner, 3, stride2, groups, dilation), norm(inner)
        self.conv3, self.norm3 = conv(inner, outputs, 1), norm(outputs)
        self.shortcut = shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(normed(self.conv1, self.norm1, x), inplace=True)
        y = F.relu(normed(self.conv2, self.norm2, y), inplace=True)
        y = normed(self.conv3, self.norm3, y)
        return F.relu(y + self.shortcut(x), inplace=True)


def shortcut(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Module:
    """The identity where shapes allow it, else a strided 1x1 projection."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return Projection(conv(inputs, outputs, 1, stride), norm(outputs))


class Projection(nn.Sequential):
    """A convolution and its norm, see ``normed``."""

    def forward(self, x: Tensor) -> Tensor:
        return normed(*self, x)


def stage(
    architecture: str,
    name: str,
    inputs: int,
    width: int,
    norm: Norm,
    stride: int,
    stride_in: Literal["1x1", "3x3"] = "1x1",
    dilation: int = 1,
) -> nn.Sequential:
    """The blocks of one stage, maps ``[B, inputs, H, W]`` to ``[B, stage_channels(...), H / stride, W / stride]``.

    name      "c2" to "c5"; "c5" is also, as 'res5', the head of the C4 models (Figure 4, left)
    width     channels of the stem
    stride    of the first block
    dilation  of every 3x3 conv
    """
    block, depths, groups, group_width = ARCHITECTURES[architecture]
    if groups > 1:
        stride_in = "3x3"  # ResNeXt, unlike ResNet, has always had its stride in the grouped 3x3
    index = int(name[1:]) - 2
    blocks: list[nn.Module] = []
    for position in range(depths[index]):
        step = stride if position == 0 else 1
        if block == "basic":
            blocks.append(BasicBlock(inputs, width * 2**index, step, norm, dilation))
        else:
            blocks.append(Bottleneck(inputs, width * 2**index, step, norm, groups, group_width, stride_in, dilation))
        inputs = stage_channels(architecture, name, width)
    return nn.Sequential(*blocks)


def stage_channels(architecture: str, name: str, width: int) -> int:
    """Channels that a stage gives: 256 for "c2" of a bottleneck network whose stem has 64."""
    expansion = BasicBlock.expansion if ARCHITECTURES[architecture][0] == "basic" else Bottleneck.expansion
    return width * 2 ** (int(name[1:]) - 2) * expansion


class ResNet(nn.Module):
    """Images [B, 3, H, W] to the maps c2..c5, each half the size of the one before.

    architecture  a key of ``ARCHITECTURES``
    width         channels of the stem; stage c_k is ``2^(k - 2)`` times as wide (times 4 for bottlenecks)
    stem          "7x7" is a 7x7 conv of stride 2 and a max pool; "3x3" is two 3x3 convs of stride 2, for small images
    stride_in     which conv of a bottleneck strides: "1x1" [19], or "3x3" (torchvision, and all ResNeXts)
    norm          builds the normalisation layers
    last          "c5", or "c4" where the fifth stage is the roi head
    dilated       c5 keeps the stride of c4, and its 3x3 convs look at every second cell instead
    non_local     put a non-local block before the last block of c4 (Appendix B)

    ``strides`` and ``channels`` say what each map is: ``resnet.strides["c4"] == 16``.
    """

    def __init__(
        self,
        architecture: str,
        norm: Norm,
        width: int = 64,
        stem: Literal["7x7", "3x3"] = "7x7",
        stride_in: Literal["1x1", "3x3"] = "1x1",
        last: Literal["c4", "c5"] = "c5",
        dilated: bool = False,
        non_local: bool = False,
    ) -> None:
        super().__init__()
        if stem == "7x7":
            self.stem = nn.Sequential(conv(3, width, 7, 2), norm(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        else:
            self.stem = nn.Sequential(
                conv(3, width, 3, 2), norm(width), nn.ReLU(), conv(width, width, 3, 2), norm(width), nn.ReLU()
            )
        self.strides = {"c2": 4, "c3": 8, "c4": 16, "c5": 16 if dilated else 32}
        if last == "c4":
            del self.strides["c5"]
        self.channels: dict[str, int] = {}
        inputs, at = width, 4
        for name, stride in self.strides.items():
            dilation = 2 if name == "c5" and dilated else 1
            self.add_module(name, stage(architecture, name, inputs, width, norm, stride // at, stride_in, dilation))
            self.channels[name] = inputs = stage_channels(architecture, name, width)
            at = stride
        initialise(self)
        before_last = self.channels["c4" if len(self.c4) > 1 else "c3"]
        self.non_local = NonLocal(before_last) if non_local else None  # beside c4, so that its blocks keep their names

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.stem(pixels)  # [B, width, H/4, W/4]
        features = {}
        for name in self.strides:
            blocks = self.get_submodule(name)
            x = blocks[:-1](x)
            if name == "c4" and self.non_local is not None:
                x = self.non_local(x)
            x = features[name] = blocks[-1](x)
        return features

    def freeze(self, stages: int) -> None:
        """Stop training the first parts: 0 is none, 1 the stem, 2 the stem and c2, up to 5 for everything."""
        parts = [self.stem, *(self.get_submodule(name) for name in self.strides)][:stages]
        if stages >= 4 and self.non_local is not None:
            parts.append(self.non_local)
        for part in parts:
            part.requires_grad_(False)


def initialise(module: nn.Module) -> None:
    """He initialisation of every convolution below ``module``, for training from scratch."""
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
            if child.bias is not None:
                nn.init.zeros_(child.bias)
