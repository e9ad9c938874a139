"""The optimised model on a GPU, with and without recordings. Only where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from mrcnn_edu.models.graphed import Graphed
from mrcnn_edu.models.mask_rcnn import build_model
from mrcnn_edu.structures import ImageBatch

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)


def batches() -> list[ImageBatch]:
    """Two sizes, taking turns."""
    torch.manual_seed(1)
    sizes = [(96, 128), (160, 96), (96, 128), (160, 96)]
    return [ImageBatch.collate([torch.rand(3, *size)]).to("cuda") for size in sizes]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recordings_find_the_same(precision):
    torch.manual_seed(0)
    model = build_model("maskrcnn_shapes").cuda().eval()
    fast, recorded = model.optimize(precision), model.optimize(precision, graphs=True)
    for number, batch in enumerate(batches()):
        with torch.inference_mode() if number % 2 == 0 else torch.no_grad():
            wanted, found = fast(batch)[0], recorded(batch)[0]
        assert len(wanted) == len(found) > 0
        torch.testing.assert_close(found.boxes, wanted.boxes, rtol=1e-3, atol=0.05)
        torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-3, atol=1e-3)
    assert len(recorded.backbone._recordings) == 2


def test_a_size_too_many_runs_as_ever():
    layer = torch.nn.Conv2d(3, 4, 3).cuda()
    recorded = Graphed(layer, most=1)
    with torch.no_grad():
        for side in (8, 9, 8, 9):
            x = torch.rand(1, 3, side, side, device="cuda")
            torch.testing.assert_close(recorded(x).clone(), layer(x), rtol=1e-3, atol=1e-3)
    assert len(recorded._recordings) == 1


def test_with_gradients_nothing_is_recorded():
    recorded = Graphed(torch.nn.Conv2d(3, 4, 3).cuda())
    recorded(torch.rand(1, 3, 8, 8, device="cuda")).sum().backward()
    assert recorded.module.weight.grad is not None and not recorded._recordings
