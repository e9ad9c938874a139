"""Two processes that go through the stages of a training together: ``python stages_together.py <data> <out>``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from many_processes import processes
from training_runs import datasets, tiny_model, with_train

from mrcnn_edu.training.stages import STAGEWISE, train_stages

TOGETHER = with_train(iterations=2, batch_size=2, warmup_iterations=0, average=0.0, checkpoint_every=0)


def work(_: int) -> dict[str, Any]:
    """Both stages, with validation images; what every process is told of them."""
    data, out = datasets(Path(sys.argv[1])), Path(sys.argv[2]) / "run"
    return train_stages(STAGEWISE, TOGETHER, tiny_model(), *data, out, progress=False, device="cpu")


if __name__ == "__main__":
    import torch._dynamo

    torch.set_num_threads(1)
    processes(2, Path(sys.argv[2]) / "both", work)
