"""The region proposal network: where in the image is something worth a second look?

Chapter 6 (the region proposal network). Paper: Section 3, Faster R-CNN, and Section 3.1, after [36] and [27].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mrcnn_edu import boxes as box_ops
from mrcnn_edu.anchors import Rounding, cell_anchors, grid_anchors, inside
from mrcnn_edu.losses import box_loss, objectness_loss
from mrcnn_edu.matching import IGNORED, ignore_crowd, match, sample_images
from mrcnn_edu.models.conv3x3 import Conv3x3
from mrcnn_edu.ops import nms_of_images
from mrcnn_edu.structures import Proposals, Size, Target

AT_ONCE = (2**21, 2**25)  # numbers in a table of IoUs: what a processor's cache has room for, and what a GPU has


class Guess(NamedTuple):
    """What the RPN says about every anchor, before anything is filtered; N anchors over all levels, finest first.

    anchors     [N, (x1, y1, x2, y2)] float32, image pixels, the same for all images
    objectness  [B, N] logits
    deltas      [B, N, (dx, dy, dw, dh)]
    counts      anchors per level
    """

    anchors: Tensor
    objectness: Tensor
    deltas: Tensor
    counts: list[int]


class RPN(nn.Module):
    """A 3x3 conv slid over every level, then per anchor one objectness logit and four deltas.

    channels  of every level
    strides   pixels per cell, ``{"p2": 4, ...}``
    sizes     anchor sizes per level, pixels
    ratios    anchor ratios height / width
    rounding, exact_stride  see ``Conventions.anchor_rounding`` and ``anchor_stride``
    convs     3x3 convs, each with a ReLU, before the outputs
    """

    def __init__(
        self,
        channels: int,
        strides: dict[str, int],
        sizes: tuple[tuple[float, ...], ...],
        ratios: tuple[float, ...],
        rounding: Rounding = "none",
        exact_stride: bool = True,
        convs: int = 1,
    ) -> None:
        super().__init__()
        counts = {len(level) * len(ratios) for level in sizes}
        if len(counts) != 1:
            raise ValueError(f"every level needs the same number of anchor sizes, got {sizes}: the head is shared")
        per_cell = counts.pop()
        layers = [Conv3x3(channels, channels) for _ in range(convs)]
        self.conv = layers[0] if convs == 1 else nn.Sequential(*[m for c in layers for m in (c, nn.ReLU())][:-1])
        self.objectness = nn.Conv2d(channels, per_cell, 1)
        self.deltas = nn.Conv2d(channels, per_cell * 4, 1)
        self.strides, self.exact_stride = strides, exact_stride
        for name, level_sizes in zip(strides, sizes):
            anchors = cell_anchors(level_sizes, ratios, rounding, strides[name])
            self.register_buffer(f"anchors_{name}", anchors, persistent=False)
        for layer in (*layers, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: dict[str, Tensor], padded: Size) -> Guess:
        """Guesses for every anchor of every level; ``padded`` is the (height, width) of the batch in pixels."""
        anchors, objectness, deltas = [], [], []
        for level, stride in self.strides.items():
            hidden = F.relu(self.conv(features[level]), inplace=True)
            rows, columns = hidden.shape[-2:]
            step = (stride, stride) if self.exact_stride else (padded[0] // rows, padded[1] // columns)
            anchors.append(grid_anchors(self.get_buffer(f"anchors_{level}"), (rows, columns), step))
            objectness.append(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1))  # [B, rows * columns * A]
            deltas.append(self.deltas(hidden).permute(0, 2, 3, 1).reshape(len(hidden), -1, 4))
        counts = [len(level) for level in anchors]
        return Guess(torch.cat(anchors), torch.cat(objectness, dim=1), torch.cat(deltas, dim=1), counts)


@torch.no_grad()
def propose(
    guess: Guess,
    sizes: list[Size],
    pre_nms: int,
    post_nms: int,
    nms_threshold: float,
    min_size: float = 0.0,
    plus_one: bool = False,
) -> list[Proposals]:
    """The best boxes of each image: top anchors per level, decoded, clipped, thinned by NMS per level.

    sizes     [(h, w)] of the images before padding, pixels
    pre_nms   anchors kept per level
    post_nms  proposals kept per image
    min_size  least width and height, pixels; empty boxes never pass

    No gradient flows through the boxes: Section 3.1's stages and Appendix B's approximate joint training both stop it.
    """
    if not (guess.objectness.isfinite().all() & guess.deltas.isfinite().all()):
        raise FloatingPointError("the RPN's outputs are not finite: look for NaN in the weights, or a rate too high")
    level = torch.repeat_interleave(torch.tensor(guess.counts)).to(guess.objectness.device)  # [N]
    offset, kept = 0, []
    for logits in guess.objectness.split(guess.counts, dim=1):
        kept.append(logits.topk(min(pre_nms, logits.shape[1]), dim=1).indices + offset)
        offset += logits.shape[1]
    rows = torch.cat(kept, dim=1)  # [B, about L * pre_nms]
    scores = guess.objectness.gather(1, rows).float().sigmoid()
    deltas = guess.deltas.gather(1, rows[..., None].expand(-1, -1, 4))
    candidates = box_ops.decode(deltas, guess.anchors[rows], plus_one=plus_one)
    boxes = torch.stack([box_ops.clip(image, size) for image, size in zip(candidates, sizes)]).float().flatten(0, 1)
    wide = box_ops.wide_enough(boxes, min_size) & (box_ops.area(boxes) > 0)
    present = scores.flatten().where(wide, -torch.inf)
    counts = [rows.shape[1]] * len(rows)
    best = nms_of_images(boxes, present, level[rows].flatten(), counts, nms_threshold, max_keep=post_nms)
    return [Proposals(image[kept], score[kept]) for image, score, kept in zip(boxes.view_as(candidates), scores, best)]


def rpn_losses(
    guess: Guess,
    targets: list[Target],
    crowds: list[Tensor],
    sizes: list[Size],
    positive_iou: float,
    negative_iou: float,
    batch_per_image: int,
    positive_fraction: float,
    beta: float,
    divisor: str = "sampled",
    straddle: float | None = None,
    crowd_overlap: float | None = None,
    plus_one: bool = False,
) -> dict[str, Tensor]:
    """The losses "objectness" and "rpn_box" over a random minibatch of anchors per image.

    targets        single instances only; crowds holds each image's crowd boxes [M, 4]
    sizes          [(h, w)] of the images before padding, pixels
    straddle       anchors further outside their image than this (pixels) are ignored; None: all take part
    crowd_overlap  negatives with this share of themselves inside a crowd region are ignored
    divisor        "sampled": the anchors really drawn; "batch": ``batch_per_image`` for every image
    """
    # All images at once, since a GPU is done with small tensors before it has been told the next step
    truths = pad_sequence([target.boxes for target in targets], batch_first=True)  # [B, G, 4]; zeros overlap nothing
    cells = max(truths.shape[1] * len(guess.anchors), 1)
    at_once = max(AT_ONCE[truths.is_cuda] // cells, 1)
    parts = []
    for some in truths.split(at_once):
        parts.append(match(box_ops.iou(some, guess.anchors), positive_iou, negative_iou, keep_best=True))
    matched, status = (torch.cat(part) for part in zip(*parts))  # [B, N]
    for number, crowd in enumerate(crowds):
        if len(crowd):
            status[number] = ignore_crowd(status[number], guess.anchors, crowd, crowd_overlap)
    if straddle is not None:
        taking_part = torch.stack([inside(guess.anchors, size, straddle) for size in sizes])
        status = torch.where(taking_part, status, IGNORED)
    image, anchor, positive = sample_images(status, batch_per_image, positive_fraction)
    found = positive.nonzero()[:, 0]
    truth = truths[image[found], matched[image[found], anchor[found]]]
    wanted = box_ops.encode(truth, guess.anchors[anchor[found]], plus_one=plus_one)
    count = max(len(anchor) if divisor == "sampled" else batch_per_image * len(targets), 1)
    return {
        "objectness": objectness_loss(guess.objectness[image, anchor], positive, count),
        "rpn_box": box_loss(guess.deltas[image[found], anchor[found]], wanted, beta, count),
    }
