"""The optimised model: folding by hand, the same detections by oracle, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_runs
from tiny_models import images, shrink, truth
from torch import nn
from torch.nn import functional as F

from mrcnn_edu.config import ModelConfig
from mrcnn_edu.data.shapes import write
from mrcnn_edu.inference import predict
from mrcnn_edu.models.graphed import Graphed
from mrcnn_edu.models.mask_rcnn import MaskRCNN, build_model
from mrcnn_edu.models.optimized import FIXED_NORMS, FusedBlock, conv_relu, fold_norms, one_pass
from mrcnn_edu.models.resnet import FrozenBatchNorm
from mrcnn_edu.models.unshared import Unshared
from mrcnn_edu.presets import MODELS
from mrcnn_edu.structures import Detections, Proposals
from mrcnn_edu.training.loop import train

BOXES, SCORES = 0.2, 1e-3  # px and probability by which the same detection may differ
R50_FPN = MODELS["maskrcnn_resnet50_fpn"]


def ready(config: ModelConfig, norm: str = "frozen") -> MaskRCNN:
    """A slim model with random weights and statistics that folding cannot ignore."""
    config = shrink(config)
    torch.manual_seed(0)
    model = build_model(replace(config, backbone=replace(config.backbone, norm=norm))).eval()
    for module in model.modules():
        if isinstance(module, FIXED_NORMS):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.3, 0.7)
            module.bias.data.uniform_(-0.2, 0.2)
    return model


def assert_same(found: Detections, wanted: Detections) -> None:
    """The same detections, in any order where scores are as good as equal."""
    assert len(found) == len(wanted) > 0
    for index in range(len(wanted)):
        distance = (found.boxes - wanted.boxes[index]).abs().amax(dim=1) + 1e6 * (found.labels != wanted.labels[index])
        nearest = int(distance.argmin())
        assert distance[nearest] < BOXES
        assert abs(found.scores[nearest] - wanted.scores[index]) < SCORES
        for name in ("mask_probs", "keypoints"):
            if getattr(wanted, name) is not None:
                rest = getattr(found, name)[nearest] - getattr(wanted, name)[index]
                assert rest.abs().max() < (BOXES if name == "keypoints" else 0.01)


def test_a_norm_folded_by_hand():
    """weight 2 and bias 1; (y - 4) * 3 / sqrt(3 + 1) + 1: scale 1.5, so weight 3 and bias (1 - 4) * 1.5 + 1 = -3.5."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), FrozenBatchNorm(1, eps=1.0))
    model[0].weight.data.fill_(2.0)
    model[0].bias.data.fill_(1.0)
    for name, value in (("weight", 3.0), ("bias", 1.0), ("running_mean", 4.0), ("running_var", 3.0)):
        getattr(model[1], name).fill_(value)
    x = torch.tensor([[[[10.0]]]])
    assert model(x).item() == (2 * 10 + 1 - 4) * 1.5 + 1 == 26.5
    fold_norms(model)
    assert model[0].weight.item() == 3.0 and model[0].bias.item() == -3.5
    assert isinstance(model[1], nn.Identity)
    assert model(x).item() == 26.5


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_with_sum_and_relu(stride, groups, monkeypatch):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, stride, 1, groups=groups).requires_grad_(False)
    x = torch.randn(2, 8, 9, 11).contiguous(memory_format=torch.channels_last)
    added = torch.randn_like(conv(x))
    alone, both, before = F.relu(conv(x)), F.relu(conv(x) + added), added.clone()
    for enabled in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
        assert one_pass(x) == (enabled and torch.backends.mkldnn.is_available())
        torch.testing.assert_close(conv_relu(conv, x), alone)
        added = before.clone()
        result = conv_relu(conv, x, added)
        torch.testing.assert_close(result, both)
        assert result.data_ptr() == added.data_ptr()  # no new memory


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("maskrcnn_resnet50_fpn", "frozen"),
        ("maskrcnn_resnet50_fpn", "batch"),
        ("maskrcnn_resnet50_fpn", "group"),
        ("maskrcnn_resnet50_c4", "frozen"),
        ("maskrcnn_resnet50_c5", "frozen"),
        ("keypointrcnn_resnet50_fpn", "frozen"),
        ("maskrcnn_resnext152_32x8d_fpn_nonlocal", "frozen"),
        ("maskrcnn_shapes", "batch"),
        ("maskrcnn_shapes", "group"),
    ],
)
def test_the_same_detections(name, norm):
    model = ready(MODELS[name], norm)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = model.optimize()
    with torch.inference_mode():
        wanted, found = model(images()), fast(images())
    for pair in zip(found, wanted):
        assert_same(*pair)
    folded = [isinstance(child, FusedBlock) for child in fast.modules()]
    assert any(folded) == (norm != "group")
    assert not any(isinstance(child, FIXED_NORMS) for child in fast.modules())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in fast.parameters()}


def test_the_same_detections_after_training(tmp_path: Path):
    """A shortly trained model, on images it has not seen, through the whole of ``predict``."""
    folder = write(tmp_path / "data", train=training_runs.IMAGES, val=3, size=64, seed=1)
    data, unseen = training_runs.datasets(folder)
    model = training_runs.tiny_model()
    train(training_runs.CONFIG, model, data, None, tmp_path / "run", progress=False, device="cpu")
    model.eval()
    pictures = [unseen[index][0] for index in range(len(unseen))]
    models = (model, model.optimize(), model.optimize("bf16"))
    wanted, found, rough = (predict(one, pictures, 64, 64) for one in models)
    for pair in zip(found, wanted):
        assert_same(*pair)
    for low, high in zip(rough, wanted):  # the best of each image; scores of a young model lie close together
        assert len(low) > 0 and abs(low.scores[0] - high.scores[0]) < 0.02


def test_bfloat16_rounds_maps_and_no_boxes():
    model = ready(R50_FPN)
    fast = model.optimize("bf16")
    assert {p.dtype for p in fast.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in fast.buffers()} == {torch.float32}  # anchors, mean and deviation
    given = [Proposals(torch.tensor([[8.0, 12, 40, 44], [3.1, 20.7, 60.3, 50.2]]), torch.ones(2))] * 2
    with torch.inference_mode():
        assert fast.backbone(fast.normalise(images()))["p2"].dtype == torch.bfloat16
        wanted, found = model(images(), proposals=given), fast(images(), proposals=given)
    for low, high in zip(found, wanted):
        assert low.boxes.dtype == low.scores.dtype == low.mask_probs.dtype == torch.float32
        assert (low.scores - high.scores).abs().max() < 0.02
        nearest = torch.cdist(low.boxes, high.boxes).amin(dim=1)
        assert nearest.median() < 0.5


def test_every_map_is_channels_last():
    fast = ready(R50_FPN).optimize()
    with torch.inference_mode():
        features = fast.backbone(fast.normalise(images()))
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in list(features.values())[:4])


def test_on_a_processor_nothing_is_recorded():
    model = ready(R50_FPN)
    fast, recorded = model.optimize(), model.optimize(graphs=True)
    with torch.inference_mode():
        for pair in zip(recorded(images()), fast(images())):
            assert_same(*pair)
    assert isinstance(recorded.backbone, Graphed) and not recorded.backbone._recordings


def test_what_is_refused():
    model = ready(R50_FPN)
    fast = model.optimize()
    assert not any(p.requires_grad for p in fast.parameters()) and not fast.training
    with pytest.raises(ValueError, match="optimised already"):
        fast.optimize()
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        model.train().optimize()
    with pytest.raises(ValueError, match='"fp32" or "bf16", got \'fp16\''):
        model.eval().optimize("fp16")
    with pytest.raises(ValueError, match="has no losses"):
        fast(images(1), [truth(model.config)])
    with pytest.raises(RuntimeError, match="cannot be trained"):
        fast.train()


def test_two_networks_that_share_nothing():
    model = Unshared(ready(R50_FPN), ready(R50_FPN)).eval()
    with torch.inference_mode():
        for pair in zip(model.optimize()(images()), model(images())):
            assert_same(*pair)
