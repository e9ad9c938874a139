"""RPN and Mask R-CNN as two networks with a backbone each, as the paper trains them by default.

Chapter 13 (training). Paper: Section 3.1, "RPN is trained separately and does not share features with Mask R-CNN".
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from mrcnn_edu.config import ModelConfig
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.structures import Detections, ImageBatch, Proposals


class Unshared(nn.Module):
    """Two networks that share nothing: the first proposes, the second detects.

    It is called as a ``MaskRCNN`` is, to detect, and has that one's ``config`` and heads.
    """

    def __init__(self, proposer: MaskRCNN, detector: MaskRCNN) -> None:
        super().__init__()
        self.proposer, self.detector = proposer, detector

    def forward(self, batch: ImageBatch, boxes_only: bool = False) -> list[Detections]:
        return self.detector(batch, proposals=look(self.proposer, batch)[1], boxes_only=boxes_only)

    def optimize(self, precision: Literal["fp32", "bf16"] = "fp32", graphs: bool = False) -> Unshared:
        """Both networks made ready for inference alone, see ``MaskRCNN.optimize``."""
        return Unshared(*(model.optimize(precision, graphs) for model in (self.proposer, self.detector))).eval()

    @property
    def config(self) -> ModelConfig:
        """That of the second network."""
        return self.detector.config

    @property
    def box_head(self) -> nn.Module:
        """That of the second network."""
        return self.detector.box_head

    @property
    def mask_head(self) -> nn.Module | None:
        """That of the second network."""
        return self.detector.mask_head

    @property
    def keypoint_head(self) -> nn.Module | None:
        """That of the second network."""
        return self.detector.keypoint_head


def look(model: MaskRCNN, batch: ImageBatch) -> tuple[dict[str, Tensor], list[Proposals]]:
    """The features of a batch, and what the model's RPN proposes in it for inference."""
    features = model.backbone(model.normalise(batch))
    return features, model.propose(model.rpn(features, batch.pixels.shape[-2:]), batch)
