"""Training on a GPU: every precision, resumption, and DDP over NCCL with one process. Only where there is a GPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training_runs import datasets, tiny_model, with_train

from mrcnn_edu.data.loading import train_loader
from mrcnn_edu.data.shapes import write
from mrcnn_edu.training import checkpoint
from mrcnn_edu.training.loop import train
from mrcnn_edu.training.setup import replicate

DEVICE = "cuda"
if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("shapes") / "data", train=5, val=2, size=64, seed=1)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_of_every_precision(folder: Path, tmp_path: Path, precision: str) -> None:
    data, val_data = datasets(folder)
    config = with_train(precision=precision, sync_norm=True)
    summary = train(config, tiny_model(), data, val_data, tmp_path, progress=False, device=DEVICE)
    assert summary["iterations"] == 8 and math.isfinite(summary["training"]["total"])
    assert 0 <= summary["evaluation"]["box"]["AP"] <= 1 and summary["memory_mib"] > 0


def test_four_and_four_are_eight(folder: Path, tmp_path: Path) -> None:
    """Up to the order of the sums in atomic additions, which a GPU does not promise."""
    data, _ = datasets(folder)
    options = {"progress": False, "device": DEVICE}
    for out, parts in (("whole", [8]), ("parts", [4, 8])):
        for iterations in parts:
            config = with_train(schedule="step", steps=(), iterations=iterations)
            train(config, tiny_model(), data, None, tmp_path / out, resume=iterations > parts[0], **options)
    whole, parts = (checkpoint.load(tmp_path / out)[0]["model"] for out in ("whole", "parts"))
    del whole["keypoint_head.deconv.bias"]  # a softmax does not feel it: AdamW makes its steps of rounding alone
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-2, atol=1e-3, msg=name)


def test_nccl_gives_the_gradients_of_the_model_itself(folder: Path, tmp_path: Path) -> None:
    """A world of one process; with more, see the tests that run on CPUs."""
    data, _ = datasets(folder)
    dist.init_process_group("cpu:gloo,cuda:nccl", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        batch, targets, _ = next(train_loader(data, with_train().data, 4, seed=0))
        batch, targets = batch.to(DEVICE), [target.to(DEVICE) for target in targets]
        gradients = []
        for wrap in (lambda model: model, replicate):
            model = tiny_model().to(DEVICE).train()
            called = wrap(model)
            torch.manual_seed(0)  # the same anchors and rois are drawn
            sum(called(batch, targets).values()).backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    finally:
        dist.destroy_process_group()
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-3, atol=1e-5, msg=name)
