"""The box head: what is in this roi, and where exactly?

Chapter 10 (Fast R-CNN's second stage). Paper: Section 3, Faster R-CNN, and Section 3.1; Figure 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mrcnn_edu import boxes as box_ops
from mrcnn_edu.losses import box_loss, classification_loss, roi_losses
from mrcnn_edu.matching import IGNORED, POSITIVE, ignore_crowd, match, sample_images
from mrcnn_edu.models.mask_head import conv_stack, fc_stack, initialise_fc
from mrcnn_edu.models.resnet import Norm
from mrcnn_edu.ops import nms, nms_of_images
from mrcnn_edu.structures import Detections, Proposals, Samples, Size, Target

Weights = tuple[float, float, float, float]


class BoxHead(nn.Module):
    """Pooled features [R, C, P, P] to class logits [R, K + 1] and deltas [R, K, (dx, dy, dw, dh)].

    Two hidden fully connected layers (C4: none), then one linear layer for each output. Index 0 of the logits is
    background; the deltas have one row per foreground class, label k in row k - 1.

    norm     builds a norm after each hidden layer, or None: a large learning rate needs one, since the first layer adds
             up thousands of inputs
    average  begin with the mean over the P x P places, as the head of C4 ends ("ave" in Figure 4, left)
    convs    widths of 3x3 convs in front, which the paper has not; ``conv_norm`` builds the norm after each, or None
    """

    def __init__(
        self,
        channels: int,
        pooled_size: int,
        widths: tuple[int, ...],
        classes: int,
        norm: Norm | None = None,
        average: bool = False,
        convs: tuple[int, ...] = (),
        conv_norm: Norm | None = None,
    ) -> None:
        super().__init__()
        self.classes, self.average, self.pooled_size = classes, average, pooled_size
        self.convs = conv_stack(channels, convs, conv_norm)
        channels = convs[-1] if convs else channels
        inputs = channels if average else channels * pooled_size**2
        self.hidden = fc_stack(inputs, widths, norm)
        self.class_logits = nn.Linear(widths[-1] if widths else inputs, classes + 1)
        self.deltas = nn.Linear(widths[-1] if widths else inputs, classes * 4)
        initialise_fc(self.hidden)
        for layer, std in ((self.class_logits, 0.01), (self.deltas, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.convs(pooled)
        hidden = self.hidden(pooled.mean(dim=(2, 3)) if self.average else pooled)  # [R, 1024]
        return self.class_logits(hidden), self.deltas(hidden).reshape(-1, self.classes, 4)


@torch.no_grad()
def label_rois(
    proposals: Proposals, target: Target, crowd: Tensor, positive_iou: float, crowd_overlap: float | None = None
) -> tuple[Samples, Tensor]:
    """All rois of one image, proposals and ground truth, with their labels; and the status [S] of each.

    target  single instances only; crowd holds the boxes [M, 4] of the image's crowd regions

    The true boxes join the proposals so that a young RPN, which finds nothing yet, does not leave the heads without
    positives.
    """
    boxes = torch.cat([proposals.boxes, target.boxes])
    matched, status = match(box_ops.iou(target.boxes, boxes), positive_iou, positive_iou)
    status = ignore_crowd(status, boxes, crowd, crowd_overlap)
    labels = torch.zeros_like(matched)
    if len(target):
        labels = torch.where(status == POSITIVE, target.labels[matched], labels)
    return Samples(boxes, labels, matched), status


@torch.no_grad()
def sample_rois(
    proposals: Proposals,
    target: Target,
    crowd: Tensor,
    count: int,
    positive_fraction: float,
    positive_iou: float,
    crowd_overlap: float | None = None,
) -> Samples:
    """The rois one image trains the heads on, drawn at random: a share of them positives, the rest negatives.

    proposals, target, crowd  as in ``label_rois``
    """
    return sample_rois_of_images([(proposals, target, crowd)], count, positive_fraction, positive_iou, crowd_overlap)[0]


@torch.no_grad()
def sample_rois_of_images(
    images: list[tuple[Proposals, Target, Tensor]],
    count: int,
    positive_fraction: float,
    positive_iou: float,
    crowd_overlap: float | None = None,
) -> list[Samples]:
    """``sample_rois`` for each image of a batch, given as (proposals, target, crowd); a GPU is asked once for all."""
    labelled = [label_rois(*image, positive_iou, crowd_overlap) for image in images]
    status = pad_sequence([part for _, part in labelled], batch_first=True, padding_value=IGNORED)
    image, row, _ = sample_images(status, count, positive_fraction)
    return [rois[rows.sort().values] for (rois, _), rows in zip(labelled, by_image(image, row, len(images)))]


def positive_rows(samples: list[Samples]) -> list[Tensor]:
    """The rows of each image's positives; a GPU is asked for all images at once."""
    labels = pad_sequence([part.labels for part in samples], batch_first=True)  # filled up with background
    return by_image(*(labels > 0).nonzero().unbind(1), len(samples))


def by_image(image: Tensor, row: Tensor, images: int) -> list[Tensor]:
    """The rows [S] of each image; ``image [S]`` says which one a row belongs to, in order."""
    return list(row.split(image.bincount(minlength=images).tolist()))


def candidate_rois(
    proposals: Proposals, target: Target, crowd: Tensor, positive_iou: float, crowd_overlap: float | None = None
) -> Samples:
    """Every roi of one image that may be trained on, to choose the hardest from; arguments as in ``label_rois``."""
    rois, status = label_rois(proposals, target, crowd, positive_iou, crowd_overlap)
    return rois[status != IGNORED]


@torch.no_grad()
def hardest_rois(
    class_logits: Tensor,
    deltas: Tensor,
    candidates: Samples,
    target: Target,
    count: int,
    nms_threshold: float,
    weights: Weights,
    beta: float,
    plus_one: bool = False,
) -> Samples:
    """Online hard example mining [38]: the ``count`` rois of one image with the largest losses, positives or not.

    class_logits   [S, K + 1] and deltas [S, K, 4], what the head now says about the S candidates
    nms_threshold  IoU; of two rois that overlap more only the harder stays, so that no loss is counted twice (0.7 [38])
    weights, beta, plus_one  of the box loss
    """
    wanted = torch.zeros_like(candidates.boxes)
    positives = (candidates.labels > 0).nonzero()[:, 0]
    truth = target.boxes[candidates.matched[positives]]
    wanted[positives] = box_ops.encode(truth, candidates.boxes[positives], weights, plus_one)
    losses = roi_losses(class_logits.float(), deltas.float(), candidates.labels, wanted, beta)
    return candidates[nms(candidates.boxes, losses, nms_threshold, max_keep=count).sort().values]


def box_head_losses(
    class_logits: Tensor,
    deltas: Tensor,
    samples: list[Samples],
    targets: list[Target],
    weights: Weights,
    beta: float,
    plus_one: bool = False,
) -> dict[str, Tensor]:
    """The losses "classification" over all samples and "box" over the positives, each for its own class only.

    class_logits  [S, K + 1] and deltas [S, K, 4] of all images' samples, one after the other
    """
    labels = torch.cat([part.labels for part in samples])
    positives = (labels > 0).nonzero()[:, 0]
    rois = torch.cat([part.boxes for part in samples])
    # Without a truth there is no positive either, so what stands there does not matter
    truths = [t.boxes[part.matched] if len(t) else part.boxes for part, t in zip(samples, targets)]
    wanted = box_ops.encode(torch.cat(truths)[positives], rois[positives], weights, plus_one)
    own = deltas[positives, labels[positives] - 1]  # [P, 4]
    return {
        "classification": classification_loss(class_logits, labels),
        "box": box_loss(own, wanted, beta, max(len(labels), 1)),
    }


@torch.no_grad()
def detect_boxes(
    class_logits: Tensor,
    deltas: Tensor,
    proposals: list[Tensor],
    sizes: list[Size],
    weights: Weights,
    score_threshold: float,
    nms_threshold: float,
    most: int,
    min_size: float = 0.0,
    plus_one: bool = False,
) -> list[Detections]:
    """Each image's detections: every class of every proposal above a score, thinned by NMS per class, the best kept.

    class_logits [R, K + 1] and deltas [R, K, 4] of all images' proposals, one after the other
    proposals  [[R_i, 4]], image pixels
    sizes      [(height, width)] to clip to
    most       detections kept per image
    min_size   least width and height, pixels; empty boxes never pass

    Raises FloatingPointError for logits or deltas that are not finite: NaN would pass for "nothing found".
    """
    if not (class_logits.isfinite().all() & deltas.isfinite().all()):
        raise FloatingPointError("the box head gave logits or deltas that are not finite: look for NaN in the weights")
    scores = F.softmax(class_logits.float(), dim=-1)[:, 1:]  # [R, K]
    boxes = box_ops.decode(deltas, torch.cat(proposals)[:, None], weights, plus_one)  # [R, K, 4]
    roi, label = (scores > score_threshold).nonzero().unbind(1)
    boxes, scores = boxes[roi, label], scores[roi, label]
    ends = torch.tensor([len(part) for part in proposals], device=roi.device).cumsum(0)
    counts = torch.searchsorted(roi, ends).diff(prepend=ends.new_zeros(1)).tolist()  # found in each image
    boxes = torch.cat([box_ops.clip(part, size) for part, size in zip(boxes.split(counts), sizes)]).float()
    wide = box_ops.wide_enough(boxes, min_size) & (box_ops.area(boxes) > 0)
    best = nms_of_images(boxes, scores.where(wide, -torch.inf), label, counts, nms_threshold, max_keep=most)
    found = zip(boxes.split(counts), scores.split(counts), (label + 1).split(counts))
    return [Detections(*parts)[rows] for parts, rows in zip(found, best)]


def at_most(rows: Tensor, count: int | None) -> Tensor:
    """The rows themselves, or a random ``count`` of them where there are more."""
    if count is None or len(rows) <= count:
        return rows
    return rows[torch.randperm(len(rows), device=rows.device)[:count]]
