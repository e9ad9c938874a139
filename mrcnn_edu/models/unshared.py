"""RPN and Mask R-CNN as two networks with a backbone each, as the paper trains them by default.

Chapter 13 (training). Paper: Section 3.1, "RPN is trained separately and does not share features with Mask R-CNN".
"""

from __future__ import annotations

from torch import Tensor, nn

from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.structures import Detections, ImageBatch, Proposals


class Unshared(nn.Module):
    """Two networks that share nothing: the first proposes, the second detects; called as a ``MaskRCNN`` is."""

    def __init__(self, proposer: MaskRCNN, detector: MaskRCNN) -> None:
        super().__init__()
        self.proposer, self.detector = proposer, detector

    def forward(self, batch: ImageBatch) -> list[Detections]:
        return self.detector(batch, proposals=look(self.proposer, batch)[1])


def look(model: MaskRCNN, batch: ImageBatch) -> tuple[dict[str, Tensor], list[Proposals]]:
    """The features of a batch, and what the model's RPN proposes in it for inference."""
    features = model.backbone(model.normalise(batch))
    return features, model.propose(model.rpn(features, batch.pixels.shape[-2:]), batch)
