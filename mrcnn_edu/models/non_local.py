"""A non-local block: every cell of a map looks at every other.

Chapter 3 (backbones) and Chapter 21 (bells and whistles). Paper: Appendix B, the non-local model [43], Table 8.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class NonLocal(nn.Module):
    """A map [B, C, H, W] to one of the same shape, with a weighted mean over all its cells added to each cell.

    The weights are a softmax over the dot products of two embeddings ("embedded Gaussian"); all embeddings have C / 2
    channels, 512 for the 1024 of res4. ``output`` starts at zero, so the block begins as the identity and can be put
    into a pretrained network.

    The paper says only that the model of [43] is used. What is chosen here: one block, before the last block of res4,
    as [43] does for Mask R-CNN; no pooling of the keys, which [43] has as an option; and no batch norm after
    ``output``, whose scale [43] starts at zero for video: a detector's norms are frozen, so here ``output`` itself
    starts at zero (equation 6 of [43]).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 2, 1)
        self.query = nn.Conv2d(channels, inner, 1)  # theta in [43]
        self.key = nn.Conv2d(channels, inner, 1)  # phi
        self.value = nn.Conv2d(channels, inner, 1)  # g
        self.output = nn.Conv2d(inner, channels, 1)  # W_z
        for layer in (self.query, self.key, self.value):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x).flatten(2).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mean = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # [B, H * W, C / 2]; [43] does not scale
        return x + self.output(mean.transpose(1, 2).unflatten(2, x.shape[-2:]))
