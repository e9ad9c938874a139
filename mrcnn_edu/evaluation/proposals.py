"""How good proposals are by themselves: how many of the objects they cover.

Chapter 6 (the region proposal network) and Chapter 15 (measuring). Paper: Section 3.1, the RPN trained by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mrcnn_edu import boxes as box_ops
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.matching import split_crowd
from mrcnn_edu.structures import Proposals

THRESHOLDS = torch.arange(10) * 0.05 + 0.5  # IoU, COCO's ten


def recall(
    dataset: CocoDataset, proposals: Mapping[int, Proposals], counts: Sequence[int] = (100, 1000)
) -> dict[str, float | None]:
    """The share of instances that one of an image's best proposals covers, averaged over IoU 0.50:0.05:0.95.

    proposals  by image id, in the original images' pixels; an image left out has none
    counts     how many proposals of each image count, best first
    returns    ``{"AR100": ..., "AR1000": ...}`` in [0, 1]; None where there is no instance

    Crowd regions are left out. An instance takes its best proposal, which may be another's best as well: the boxes are
    candidates, not claims.
    """
    covered: dict[int, list[torch.Tensor]] = {count: [] for count in counts}
    for index, image_id in enumerate(dataset.image_ids):
        truth = split_crowd(dataset.target(index))[0].boxes
        found = proposals[image_id] if image_id in proposals else Proposals(torch.zeros(0, 4), torch.zeros(0))
        overlap = box_ops.iou(truth, found.boxes[found.scores.argsort(descending=True, stable=True)])
        for count, best in covered.items():
            top = overlap[:, :count]
            best.append(top.amax(dim=1) if top.shape[1] else torch.zeros(len(truth)))
    result: dict[str, float | None] = {}
    for count, best in covered.items():
        iou = torch.cat(best)
        result[f"AR{count}"] = (iou[:, None] >= THRESHOLDS).float().mean().item() if len(iou) else None
    return result
