"""The same detections in less time: a trained model made ready for inference alone.

Chapter 20 (speed). Paper: Section 3.1, Inference, and the times of Section 4.4.

What costs time on the way through the network is memory as much as arithmetic: a batch norm and a ReLU each read and
write a whole map to do almost nothing with it. So fixed norms become part of the convolutions before them, ReLU and sum
are done while a convolution writes its result, and every map keeps the channels of a pixel together (channels_last), as
the fast convolutions and RoIAlign want it. On a processor wide 3x3 convolutions make do with a quarter of their
products (``winograd``). Or the weights may be bfloat16: half the bytes, and on processors that have the instructions
twice the arithmetic or more.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mrcnn_edu.models.box_head import BoxHead
from mrcnn_edu.models.graphed import Graphed
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.models.resnet import BasicBlock, Bottleneck, FrozenBatchNorm
from mrcnn_edu.models.winograd import WinogradConv, hasten
from mrcnn_edu.ops.backends import COMPILED_FOR
from mrcnn_edu.structures import Detections, ImageBatch, Proposals, Target

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FIXED_NORMS = (FrozenBatchNorm, nn.BatchNorm2d, nn.SyncBatchNorm)  # in evaluation mode; a group norm never is


class OptimizedMaskRCNN(MaskRCNN):
    """What ``MaskRCNN.optimize`` gives: it detects as its model does, and can do nothing else."""

    def forward(
        self,
        batch: ImageBatch,
        targets: list[Target] | None = None,
        proposals: list[Proposals] | None = None,
        only: Collection[str] | None = None,
        boxes_only: bool = False,
    ) -> list[Detections]:
        """Detections as those of ``MaskRCNN.forward``; ValueError for targets."""
        if targets is not None:
            raise ValueError("an optimised model has no losses; ask the model it was made of")
        return super().forward(batch, None, proposals, only, boxes_only)

    def normalise(self, batch: ImageBatch) -> Tensor:
        """As ``MaskRCNN.normalise``, in the type and the memory layout of the weights."""
        dtype = self.rpn.objectness.weight.dtype
        return super().normalise(batch).to(dtype, memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> OptimizedMaskRCNN:
        if mode:
            raise RuntimeError("an optimised model cannot be trained; train the model it was made of")
        return super().train(mode)


def optimized(model: MaskRCNN, precision: Literal["fp32", "bf16"], graphs: bool) -> OptimizedMaskRCNN:
    """See ``MaskRCNN.optimize``."""
    if precision not in DTYPES:
        raise ValueError(f'precision must be "fp32" or "bf16", got {precision!r}')
    if isinstance(model, OptimizedMaskRCNN):
        raise ValueError("this model is optimised already; optimise the one it was made of")
    if model.training:
        raise ValueError("only a model in evaluation mode has fixed norms to fold; call model.eval() first")
    parts = {name: deepcopy(part).requires_grad_(False) for name, part in model.named_children()}
    fast = OptimizedMaskRCNN(model.config, **parts).to(model.pixel_mean.device).eval()
    fold_norms(fast)
    if precision == "fp32" and model.pixel_mean.device.type == "cpu":
        hasten(fast)
    fuse_blocks(fast)
    fuse_rows(fast)
    if isinstance(fast.rpn.conv, nn.Conv2d):
        fast.rpn.conv = ConvReLU(fast.rpn.conv)  # the RPN's own ReLU then has nothing left to do
    flatten_last(fast.box_head)
    for parameter in fast.parameters():  # these alone: the anchors, which are buffers, stay float32
        parameter.data = parameter.data.to(DTYPES[precision])
    if graphs:
        fast.backbone = Graphed(fast.backbone)
    return fast.to(memory_format=torch.channels_last)


def fold_norms(module: nn.Module) -> None:
    """Put each batch norm below ``module`` into the convolution before it, in place; an identity remains.

    With scale = weight / sqrt(variance + eps) of the norm, the convolution's weight becomes weight * scale and its bias
    (bias - mean) * scale + the norm's bias.
    """
    before = None
    for name, child in module.named_children():
        if isinstance(child, FIXED_NORMS) and isinstance(before, nn.Conv2d):
            statistics = (child.running_mean, child.running_var, child.eps, child.weight, child.bias)
            before.weight, before.bias = fuse_conv_bn_weights(before.weight, before.bias, *statistics)
            setattr(module, name, nn.Identity())
        else:
            fold_norms(child)
        before = child


def fuse_blocks(module: nn.Module) -> None:
    """Replace each residual block below ``module`` whose norms are folded by a ``FusedBlock``, in place."""
    for name, child in module.named_children():
        if isinstance(child, (BasicBlock, Bottleneck)) and isinstance(child.norm1, nn.Identity):
            setattr(module, name, FusedBlock(child))
        else:
            fuse_blocks(child)


def fuse_rows(module: nn.Module) -> None:
    """Replace each convolution and the ReLU after it, in the rows of layers below ``module``, by one, in place."""
    for name, child in module.named_children():
        if type(child) is not nn.Sequential:
            fuse_rows(child)
            continue
        layers: list[nn.Module] = []
        for layer in child:
            if isinstance(layer, nn.ReLU) and layers and isinstance(layers[-1], nn.Conv2d):
                layers[-1] = ConvReLU(layers[-1])
            elif not isinstance(layer, nn.Identity):
                layers.append(layer)
                fuse_rows(layer)
        setattr(module, name, nn.Sequential(*layers))


class ConvReLU(nn.Module):
    """A convolution and the ReLU after it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return conv_relu(self.conv, x)


class FlattenLast(nn.Module):
    """Pooled features ``[R, C, P, P]`` channels last to rows ``[R, P * P * C]``: as they lie, without a copy."""

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled.permute(0, 2, 3, 1).flatten(1)


def flatten_last(head: BoxHead) -> None:
    """Let the first full layer of a box head take its inputs in the order in which they lie channels last, in place."""
    if head.average or len(head.hidden) == 1:  # there is no map to flatten, or no layer
        return
    first = head.hidden[1]
    rows = first.weight.unflatten(1, (-1, head.pooled_size**2)).transpose(1, 2).flatten(1)  # [out, P * P * C]
    head.hidden[0], first.weight = FlattenLast(), nn.Parameter(rows, requires_grad=False)


class FusedBlock(nn.Module):
    """A residual block without norms, each convolution together with its ReLU, the last also with the shortcut.

    The result takes the place of the shortcut, of the block's own input where that is the identity: nothing else reads
    it, since the maps that a pyramid reads are followed by a projection.
    """

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        self.convs = nn.ModuleList(child for child in block.children() if isinstance(child, nn.Conv2d))
        self.shortcut = block.shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs[:-1]:
            y = conv_relu(conv, y)
        return conv_relu(self.convs[-1], y, self.shortcut(x))


def conv_relu(conv: nn.Conv2d, x: Tensor, added: Tensor | None = None) -> Tensor:
    """``relu(conv(x) + added)``, in one pass over memory where that can be had; ``added`` may be overwritten by it."""
    if x.is_cuda and "cuda" in COMPILED_FOR and not torch.is_autocast_enabled("cuda"):  # one type for map and bias
        y = conv._conv_forward(x, conv.weight, None).contiguous(memory_format=torch.channels_last)
        torch.ops.mrcnn_edu.bias_relu_(y, conv.bias, added)
        return y
    if added is None and isinstance(conv, WinogradConv) and conv.quick(x):
        return conv.convolve(x, relu=True)
    if not one_pass(x):
        y = conv(x)
        return F.relu_(y if added is None else added.add_(y))
    numbers = (conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups)
    if added is None:
        return torch.ops.mkldnn._convolution_pointwise(x, *numbers, "relu", [], "")
    return torch.ops.mkldnn._convolution_pointwise_.binary(added, x, *numbers, "add", 1.0, "relu", [], "")


def one_pass(x: Tensor) -> bool:
    """Does oneDNN, PyTorch's library for the CPU, have such convolutions for this map?

    PyTorch keeps them private, for what torch.compile writes: another version may not have them.
    """
    if x.device.type != "cpu" or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise_"):
        return False
    return x.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
