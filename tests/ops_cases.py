"""What the tests of the ops share: the implementations, the tolerances, and random RoIs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mrcnn_edu.ops import compiled

needs_compiled = pytest.mark.skipif(compiled.MISSING is not None, reason=str(compiled.MISSING))
FAST = ["vectorized", pytest.param("compiled", marks=needs_compiled)]
ALL = ["reference", *FAST]

# Sums of some dozens of products: float32 rounds each at 6e-8 of its size, the loops form positions in double; half
# precision rounds the result once, at 2^-9 (bfloat16) or 2^-12 (float16) of its size.
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 8e-3, "atol": 8e-3},
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rois(seed: int, count: int, images: int, size: tuple[int, int]) -> Tensor:
    """Rois [R, 5] in and partly outside an image, small and large, some turned inside out and some without area."""
    g = generator(seed)
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)
    corner = (torch.rand(count, 2, generator=g) * 1.4 - 0.2) * extent
    side = torch.exp(torch.rand(count, 2, generator=g) * 4 - 3.5) * extent
    side[::7] *= -1
    side[3::11] = 0
    image = torch.randint(images, (count, 1), generator=g)
    return torch.cat([image.float(), corner, corner + side], dim=1)


def laid_out(features: Tensor, layout: str) -> Tensor:
    """The same map contiguous, channels last, or with gaps between its numbers."""
    if layout == "channels_last":
        return features.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([features, features], dim=-1).flatten(-2)[..., ::2]
    return features.contiguous()
