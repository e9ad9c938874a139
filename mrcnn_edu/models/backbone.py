"""The backbone: a ResNet and its feature pyramid, as one module that knows its strides.

Chapter 4 (C4, C5 and feature pyramids). Paper: Section 3, "ResNet-50-FPN" and its relatives.
"""

from __future__ import annotations

from torch import Tensor, nn

from mrcnn_edu.models.fpn import FPN
from mrcnn_edu.models.resnet import ResNet


class Backbone(nn.Module):
    """Normalised pixels [B, 3, H, W] to ``{"p2": [B, channels, H/4, W/4], ...}``.

    ``strides`` gives the image pixels per cell of each level; nothing is guessed from sizes.
    """

    def __init__(self, resnet: ResNet, fpn: FPN) -> None:
        super().__init__()
        self.resnet = resnet
        self.fpn = fpn
        self.strides = fpn.strides
        self.channels = fpn.channels

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.resnet(pixels))
