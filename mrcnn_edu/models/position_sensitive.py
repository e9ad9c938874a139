"""Position-sensitive maps, the rival that Figure 6 shows at fault: one map for each part of an object.

Chapter 23 (before and after). Paper: Section 2 and Figure 6, after FCIS [26] and InstanceFCN [8].

A roi is cut into parts, "upper left", "middle", and so on. For each part the network has maps of its own over the whole
image, and the roi's pixels are put together from them. Nothing is computed for a roi: two rois that call a pixel by the
same part get the same number there, whatever they contain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mrcnn_edu import ops


def assemble(maps: Tensor, rois: Tensor, parts: int, bins: int, spatial_scale: float) -> Tensor:
    """The maps of all rois, each part of a roi read from its own group of channels.

    maps           [B, parts * parts * C, H, W]; the group of the part in row i and column j comes at i * parts + j
    rois           [R, (image, x1, y1, x2, y2)] float32, image pixels
    parts          along each side of a roi, 7 in [26]
    bins           along each side of a part; 3 in [26]
    spatial_scale  cells per image pixel
    returns        [R, C, parts * bins, parts * bins], each bin read as by RoIAlign

    Raises ValueError for channels that do not divide into the parts.
    """
    if parts < 1 or bins < 1 or maps.shape[1] % parts**2:
        raise ValueError(
            f"parts and bins must be at least 1 and the channels a multiple of parts * parts, got {parts} and {bins} "
            f"for {maps.shape[1]} channels"
        )
    every = ops.roi_align(maps, rois, parts * bins, spatial_scale)  # each group in all parts; most is not needed
    shape = (len(rois), parts, parts, maps.shape[1] // parts**2, parts, bins, parts, bins)
    own = torch.einsum("rijcibjd->rcibjd", every.reshape(shape))  # the part (i, j) of the group (i, j)
    return own.flatten(4, 5).flatten(2, 3)


def inside_outside(assembled: Tensor) -> tuple[Tensor, Tensor]:
    """What FCIS reads from the two maps of each class: masks and class logits.

    assembled  [R, 2 * K, P, P]: for each class a logit that the pixel is inside the instance, and one that it is in the
               roi but outside
    returns    mask probabilities [R, K, P, P], the softmax of the two, and class logits [R, K], the mean over all
               pixels of the larger of the two
    """
    if assembled.ndim != 4 or assembled.shape[1] % 2:
        raise ValueError(f"each class needs two maps, got {list(assembled.shape)}")
    pairs = assembled.unflatten(1, (-1, 2))  # [R, K, (inside, outside), P, P]
    inside, outside = pairs.unbind(2)
    return torch.sigmoid(inside - outside), pairs.amax(dim=2).mean(dim=(2, 3))
