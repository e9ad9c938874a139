"""The mask head: which pixels of this roi belong to the object?

Chapter 11 (the mask head). Paper: Section 3, Mask Representation, and Section 3.1; Figure 4, right.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrcnn_edu.losses import mask_loss
from mrcnn_edu.masks import MaskTarget, crop_masks
from mrcnn_edu.models.resnet import Norm
from mrcnn_edu.structures import Samples, Target


class MaskHead(nn.Module):
    """Pooled features [R, C, P, P] to mask logits [R, K, M, M] with M = 2 P, one mask per foreground class.

    Fully convolutional, so that every output pixel keeps its place: 3x3 convs, a 2x2 deconv of stride 2, a 1x1 conv.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], classes: int, norm: Norm | None = None) -> None:
        super().__init__()
        self.convs = conv_stack(channels, widths, norm)
        self.deconv = nn.ConvTranspose2d(widths[-1], widths[-1], 2, stride=2)
        self.mask_logits = nn.Conv2d(widths[-1], classes, 1)
        nn.init.kaiming_normal_(self.deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.deconv.bias)
        nn.init.normal_(self.mask_logits.weight, std=0.001)
        nn.init.zeros_(self.mask_logits.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        hidden = F.relu(self.deconv(self.convs(pooled)))  # [R, 256, M, M]
        return self.mask_logits(hidden)


def conv_stack(channels: int, widths: tuple[int, ...], norm: Norm | None) -> nn.Sequential:
    """3x3 convolutions of the given widths, each followed by its norm, if any, and a ReLU."""
    layers: list[nn.Module] = []
    for width in widths:
        layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=norm is None))
        nn.init.kaiming_normal_(layers[-1].weight, mode="fan_out", nonlinearity="relu")
        if norm is None:
            nn.init.zeros_(layers[-1].bias)
        layers += [norm(width), nn.ReLU()] if norm is not None else [nn.ReLU()]
        channels = width
    return nn.Sequential(*layers)


def mask_head_loss(
    mask_logits: Tensor, positives: list[Samples], targets: list[Target], rule: MaskTarget, aligned: bool
) -> Tensor:
    """The mask loss of all images' positive samples; ``mask_logits [P, K, M, M]``, image after image."""
    size = mask_logits.shape[-1]
    wanted = []
    for part, target in zip(positives, targets):
        if target.masks is None:
            raise ValueError(
                "a model with a mask head needs Target.masks to train; build it with mask=None for boxes only"
            )
        wanted.append(crop_masks(target.masks, part.boxes, part.matched, size, rule, aligned))
    return mask_loss(mask_logits, torch.cat(wanted), torch.cat([part.labels for part in positives]))


def own_masks(mask_logits: Tensor, labels: Tensor) -> Tensor:
    """The mask of each roi's predicted class as probabilities: ``[N, K, M, M]`` and labels ``[N]`` to ``[N, M, M]``."""
    own = mask_logits[torch.arange(len(labels), device=labels.device), labels - 1]
    return own.float().sigmoid()
