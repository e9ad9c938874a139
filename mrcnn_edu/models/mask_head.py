"""The mask head: which pixels of this roi belong to the object?

Chapter 11 (the mask head). Paper: Section 3, Mask Representation, and Section 3.1; Figure 4; Tables 2b and 2e.

A mask's channel ("agnostic" has one for all classes) and its formulation decide what the K outputs of a pixel mean:
with "sigmoid" each is a question of its own, with "softmax" they compete, and channel 0 is the background.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrcnn_edu.config import MaskHeadConfig
from mrcnn_edu.losses import mask_loss, multinomial_mask_loss
from mrcnn_edu.masks import MaskTarget, crop_masks
from mrcnn_edu.models.conv3x3 import Conv3x3
from mrcnn_edu.models.resnet import Norm
from mrcnn_edu.structures import Samples, Target

Classes = Literal["specific", "agnostic"]
Formulation = Literal["sigmoid", "softmax"]


class MaskHead(nn.Module):
    """Pooled features [R, C, P, P] to mask logits [R, outputs, M, M] with M = 2 P.

    Fully convolutional, so that every output pixel keeps its place: 3x3 convs, a 2x2 deconv of stride 2, a 1x1 conv.

    widths   of the 3x3 convs; empty on C4, where res5 stands before the deconv
    outputs  see ``mask_outputs``
    deconv   its width; None takes that of the last conv
    """

    def __init__(
        self,
        channels: int,
        widths: tuple[int, ...],
        outputs: int,
        norm: Norm | None = None,
        deconv: int | None = None,
    ) -> None:
        super().__init__()
        self.convs = conv_stack(channels, widths, norm)
        inputs = widths[-1] if widths else channels
        width = inputs if deconv is None else deconv
        self.deconv = nn.ConvTranspose2d(inputs, width, 2, stride=2)
        self.mask_logits = nn.Conv2d(width, outputs, 1)
        nn.init.kaiming_normal_(self.deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.deconv.bias)
        nn.init.normal_(self.mask_logits.weight, std=0.001)
        nn.init.zeros_(self.mask_logits.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        hidden = F.relu(self.deconv(self.convs(pooled)), inplace=True)  # [R, 256, M, M]
        return self.mask_logits(hidden)


class MLPMaskHead(nn.Module):
    """Pooled features [R, C, P, P] to mask logits [R, outputs, M, M] by fully connected layers (Table 2e, "MLP").

    The first layer forgets where things were, and every output pixel has to learn it anew. Table 2e names widths only;
    that the features are those of the fully convolutional head, 14 x 14, is our reading.

    widths   of the hidden layers, 1024 and 1024 or three times 1024 in the paper
    outputs  see ``mask_outputs``
    size     M
    """

    def __init__(
        self,
        channels: int,
        pooled_size: int,
        widths: tuple[int, ...],
        outputs: int,
        size: int,
        norm: Norm | None = None,
    ) -> None:
        super().__init__()
        self.outputs, self.size = outputs, size
        self.hidden = fc_stack(channels * pooled_size**2, widths, norm)
        self.mask_logits = nn.Linear(widths[-1] if widths else channels * pooled_size**2, outputs * size**2)
        initialise_fc(self.hidden)
        nn.init.normal_(self.mask_logits.weight, std=0.001)
        nn.init.zeros_(self.mask_logits.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.mask_logits(self.hidden(pooled)).reshape(-1, self.outputs, self.size, self.size)


def build_mask_head(
    config: MaskHeadConfig, channels: int, side: int, classes: int, conv_norm: Norm | None, fc_norm: Norm | None
) -> MaskHead | MLPMaskHead:
    """The mask head of a config, for features [R, channels, side, side] and K ``classes``."""
    outputs = mask_outputs(classes, config.classes, config.loss)
    if config.branch == "mlp":
        return MLPMaskHead(channels, side, config.fc, outputs, config.size, fc_norm)
    return MaskHead(channels, config.convs, outputs, conv_norm, config.deconv)


def mask_outputs(classes: int, kind: Classes, loss: Formulation) -> int:
    """Channels of the mask logits: K, or 1 for all classes; one more for the background where a softmax needs it."""
    return (1 if kind == "agnostic" else classes) + (1 if loss == "softmax" else 0)


def conv_stack(channels: int, widths: tuple[int, ...], norm: Norm | None) -> nn.Sequential:
    """3x3 convolutions of the given widths, each followed by its norm, if any, and a ReLU."""
    layers: list[nn.Module] = []
    for width in widths:
        layers.append(Conv3x3(channels, width, bias=norm is None))
        nn.init.kaiming_normal_(layers[-1].weight, mode="fan_out", nonlinearity="relu")
        if norm is None:
            nn.init.zeros_(layers[-1].bias)
        layers += [norm(width), nn.ReLU(inplace=True)] if norm is not None else [nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers)


def fc_stack(inputs: int, widths: tuple[int, ...], norm: Norm | None) -> nn.Sequential:
    """All features of a roi in one row, then fully connected layers, each followed by its norm, if any, and a ReLU."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in widths:
        layers.append(nn.Linear(inputs, width))
        layers += [nn.ReLU()] if norm is None else [norm(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers)


def initialise_fc(layers: nn.Sequential) -> None:
    """The initialisation of all hidden fully connected layers."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)


def mask_head_loss(
    mask_logits: Tensor,
    positives: list[Samples],
    targets: list[Target],
    rule: MaskTarget,
    aligned: bool,
    kind: Classes = "specific",
    loss: Formulation = "sigmoid",
) -> Tensor:
    """The mask loss of all images' positive samples; ``mask_logits [P, outputs, M, M]``, image after image.

    rule, aligned  as in ``masks.crop_masks``
    """
    size = mask_logits.shape[-1]
    wanted = []
    for part, target in zip(positives, targets):
        if target.masks is None:
            raise ValueError(
                "a model with a mask head needs Target.masks to train; build it with mask=None for boxes only"
            )
        wanted.append(crop_masks(target.masks, part.boxes, part.matched, size, rule, aligned))
    labels = mask_labels(torch.cat([part.labels for part in positives]), kind)
    if loss == "softmax":
        return multinomial_mask_loss(mask_logits, torch.cat(wanted), labels)
    return mask_loss(mask_logits, torch.cat(wanted), labels)


def mask_labels(labels: Tensor, kind: Classes) -> Tensor:
    """The class of each mask: its roi's, or 1 where all classes share one mask."""
    return torch.ones_like(labels) if kind == "agnostic" else labels


def own_masks(mask_logits: Tensor, labels: Tensor, kind: Classes = "specific", loss: Formulation = "sigmoid") -> Tensor:
    """Each roi's mask of its predicted class as probabilities: logits ``[N, outputs, M, M]`` to ``[N, M, M]``.

    With a softmax the probability is that of the class against the background alone, p_k / (p_k + p_0): the box branch
    has already decided against the other classes. (p_k itself, which the paper's words allow as well, would also lose
    the pixels that the mask branch divides between two classes.)
    """
    labels = mask_labels(labels, kind)
    rows = torch.arange(len(labels), device=labels.device)
    if loss == "softmax":
        own = mask_logits[rows, labels].float() - mask_logits[:, 0].float()
    else:
        own = mask_logits[rows, labels - 1].float()
    return own.sigmoid()
