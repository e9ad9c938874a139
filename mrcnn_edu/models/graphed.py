"""A part of the model as a CUDA graph: its hundreds of kernels are started by one call.

Chapter 20 (speed). Paper: Section 4.4, the times of inference. A GPU is through with a small layer before the processor
has started the next one. A recording does not ask the processor again. But it knows one size of input only, so there is
one for each size that comes, and images that are padded to few sizes need few.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Graphed(nn.Module):
    """``module``, recorded for each size of its input; the next call overwrites the result.

    module  without anything random, and without a look at a value; takes one tensor
    most    sizes to record; others run as ever, and so does everything on a CPU and with gradients
    """

    def __init__(self, module: nn.Module, most: int = 16) -> None:
        super().__init__()
        self.module, self.most = module, most
        self._recordings: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Tensor, Any]] = {}
        self._memory: Any = None  # all recordings share what they need in between: they run one after the other

    def forward(self, x: Tensor) -> Any:
        if not x.is_cuda or torch.is_grad_enabled():
            return self.module(x)
        key = (x.device, x.dtype, x.shape, x.stride())
        if key not in self._recordings:
            if len(self._recordings) >= self.most:
                return self.module(x)
            with torch.inference_mode(False), torch.no_grad():  # so that any later call may write into the input
                self._recordings[key] = self._record(x)
        graph, place, result = self._recordings[key]
        place.copy_(x)
        graph.replay()
        return result

    def _record(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Any]:
        place = torch.zeros_like(x)
        with torch.cuda.device(x.device):
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):  # libraries choose their algorithms and fetch memory the first few times
                for _ in range(3):
                    self.module(place)
            torch.cuda.current_stream().wait_stream(beside)
            if self._memory is None:
                self._memory = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory):
                result = self.module(place)
        return graph, place, result
