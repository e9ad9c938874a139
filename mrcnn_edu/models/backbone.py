"""The backbone: a ResNet and what the heads read from it, as one module that knows its strides.

Chapter 4 (C4, C5 and feature pyramids). Paper: Section 3, "ResNet-50-FPN" and its relatives.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from mrcnn_edu.config import BackboneConfig
from mrcnn_edu.models.fpn import FPN
from mrcnn_edu.models.resnet import Norm, ResNet, initialise, stage, stage_channels


class Backbone(nn.Module):
    """Normalised pixels [B, 3, H, W] to ``{"p2": [B, channels, H/4, W/4], ...}``, or to the one map "c4" or "c5".

    fpn  None gives the ResNet's last map as it is
    ``strides`` gives the image pixels per cell of each map; nothing is guessed from sizes.
    """

    def __init__(self, resnet: ResNet, fpn: FPN | None = None) -> None:
        super().__init__()
        self.resnet = resnet
        self.fpn = fpn
        if fpn is not None:
            self.strides, self.channels = fpn.strides, fpn.channels
        else:
            last = list(resnet.strides)[-1]
            self.strides, self.channels = {last: resnet.strides[last]}, resnet.channels[last]

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.resnet(pixels)
        if self.fpn is not None:
            return self.fpn(features)
        return {name: features[name] for name in self.strides}


class Res5(nn.Module):
    """The fifth stage of a ResNet as the first part of every head of C4 (Figure 4, left).

    Rois of 7 x 7 x 1024 become 7 x 7 x 2048 for the box and for the mask branch. ``stride`` is 1 as the paper draws it,
    or 2 in the first conv for rois of 14 x 14, as in [19] and in all released code.
    """

    def __init__(
        self, architecture: str, inputs: int, width: int, norm: Norm, stride: int, stride_in: Literal["1x1", "3x3"]
    ) -> None:
        super().__init__()
        self.stride = stride
        self.channels = stage_channels(architecture, "c5", width)
        self.blocks = stage(architecture, "c5", inputs, width, norm, stride, stride_in)
        initialise(self)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.blocks(pooled)

    def side(self, pooled_size: int) -> int:
        """Height and width of what it gives."""
        return (pooled_size - 1) // self.stride + 1


def build_backbone(
    config: BackboneConfig, norm: Norm, fpn_norm: Norm | None, stride_in: Literal["1x1", "3x3"]
) -> Backbone:
    """The backbone of a config.

    norm       of the ResNet; fpn_norm of the pyramid, None for none
    stride_in  which conv of a bottleneck strides, "1x1" or "3x3"
    """
    resnet = ResNet(
        config.architecture,
        norm,
        config.width,
        config.stem,
        stride_in,
        last="c4" if config.features == "c4" else "c5",
        dilated=config.features == "dc5",
        non_local=config.non_local,
    )
    resnet.freeze(config.frozen_stages)
    if config.features == "fpn":
        return Backbone(resnet, FPN(resnet.channels, config.channels, config.levels, fpn_norm))
    return Backbone(resnet)
