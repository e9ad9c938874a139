"""The feature pyramid: the semantics of c5 brought down to the resolution of c2.

Chapter 4 (C4, C5 and feature pyramids). Paper: Section 3, Network Architecture, after FPN [27].
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mrcnn_edu.models.conv3x3 import Conv3x3
from mrcnn_edu.models.resnet import Norm


class FPN(nn.Module):
    """Maps c2..c5 to pyramid levels of one width.

    levels    consecutive names out of p2..p6, finest first; ``p_k`` has stride ``2^k``
    inputs    channels of the maps, ``{"c2": 256, ...}``
    channels  of every level
    norm      builds a norm after each convolution, or None for plain convolutions with a bias

    Going down, each coarser map is doubled in size (nearest pixel) and added to a 1x1 conv of the finer one; a 3x3 conv
    then smooths the sum. p6 is every second pixel of p5: only the RPN uses it, for its largest anchors.
    """

    def __init__(
        self, inputs: dict[str, int], channels: int, levels: tuple[str, ...], norm: Norm | None = None
    ) -> None:
        super().__init__()
        self.levels = levels
        names = [level for level in levels if level != "p6"]
        self.lateral = nn.ModuleDict({p: conv_norm(inputs["c" + p[1:]], channels, 1, norm) for p in names})
        self.output = nn.ModuleDict({p: conv_norm(channels, channels, 3, norm) for p in names})
        self.strides = {level: 2 ** int(level[1:]) for level in levels}
        self.channels = channels

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        pyramid: dict[str, Tensor] = {}
        above = None
        for level in reversed(list(self.lateral)):
            x = self.lateral[level](features["c" + level[1:]])  # [B, channels, H/2^k, W/2^k]
            if above is not None:
                add_doubled(x, above)
            above = x
            pyramid[level] = self.output[level](x)
        if "p6" in self.levels:
            pyramid["p6"] = pyramid["p5"][:, :, ::2, ::2]
        return {level: pyramid[level] for level in self.levels}


def add_doubled(x: Tensor, above: Tensor) -> None:
    """Add ``above`` [B, C, h, w] to x [B, C, H, W] in place, each pixel to its four; H = 2 h for a padded image."""
    (height, width), (h, w) = x.shape[-2:], above.shape[-2:]
    # As a sum of views the doubled map is never written; but the gradient of such a sum is slow on a CPU
    if (height, width) == (2 * h, 2 * w) and (x.is_cuda or not x.requires_grad):
        x.view(*x.shape[:2], h, 2, w, 2).add_(above[:, :, :, None, :, None])
    else:
        x.add_(F.interpolate(above, size=(height, width), mode="nearest"))


def conv_norm(inputs: int, outputs: int, kernel: int, norm: Norm | None) -> nn.Module:
    """A convolution with a bias, or one without followed by a norm; initialised for layers without a ReLU."""
    bias = norm is None
    layer = Conv3x3(inputs, outputs, bias=bias) if kernel == 3 else nn.Conv2d(inputs, outputs, kernel, bias=bias)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    if norm is None:
        nn.init.zeros_(layer.bias)
        return layer
    return nn.Sequential(layer, norm(outputs))
