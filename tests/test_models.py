"""The model by law: what decides losses or detections, gradients for every parameter, empty and odd inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mrcnn_edu.config import BackboneConfig, BoxHeadConfig, KeypointHeadConfig, MaskHeadConfig, ModelConfig, RPNConfig
from mrcnn_edu.models import roi_features
from mrcnn_edu.models.mask_rcnn import MaskRCNN, build_model
from mrcnn_edu.models.resnet import group_norm
from mrcnn_edu.models.roi_features import assign_levels
from mrcnn_edu.structures import Detections, ImageBatch, Proposals, Target

SMALL = ModelConfig(
    classes=3,
    backbone=BackboneConfig(
        architecture="resnet10",
        width=8,
        stem="3x3",
        norm="batch",
        frozen_stages=0,
        levels=("p3", "p4", "p5"),
        channels=16,
    ),
    rpn=RPNConfig(anchor_sizes=((16,), (32,), (64,)), pre_nms=(50, 50), post_nms=(30, 20)),
    box=BoxHeadConfig(rois_per_image=16, fc=(32,), detections_per_image=10, score_threshold=0.0),
    mask=MaskHeadConfig(convs=(8,)),
    keypoint=KeypointHeadConfig(joints=4, labels=(3,), convs=(8,)),
    head_norm="batch",
)


@pytest.fixture
def model() -> MaskRCNN:
    torch.manual_seed(0)
    return build_model(SMALL)


def batch(*sizes: tuple[int, int]) -> ImageBatch:
    generator = torch.Generator().manual_seed(1)
    return ImageBatch.collate([torch.rand(3, *size, generator=generator) for size in sizes])


def target(size: tuple[int, int] = (96, 96), label: int = 3) -> Target:
    masks = torch.zeros(1, *size, dtype=torch.bool)
    masks[:, 20:70, 10:60] = True
    keypoints = torch.tensor([[[20.0, 30.0, 2.0], [50.0, 60.0, 2.0], [30.0, 40.0, 1.0], [0.0, 0.0, 0.0]]])
    boxes = torch.tensor([[10.0, 20.0, 60.0, 70.0]])
    return Target(boxes, torch.tensor([label]), masks, keypoints, torch.tensor([False]))


def test_arguments_decide_and_not_the_training_flag(model):
    for mode in (True, False):
        model.train(mode)
        losses = model(batch((96, 96)), [target()])
        assert set(losses) == {"objectness", "rpn_box", "classification", "box", "mask", "keypoint"}
        assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
        with torch.no_grad():
            found = model(batch((96, 96)))
        assert isinstance(found[0], Detections)
        assert found[0].mask_probs.shape[1:] == (28, 28)
        assert found[0].keypoints.shape[1:] == (4, 3)


@pytest.mark.parametrize(
    "targets",
    [
        [Target.empty((96, 96), 4), Target.empty((96, 96), 4)],
        [target(), Target.empty((96, 96), 4)],
        [target(label=1), target(label=2)],  # classes without keypoints
    ],
    ids=["none", "one", "no keypoints"],
)
def test_every_parameter_has_a_gradient(model, targets):
    losses = model(batch((96, 96), (96, 96)), targets)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_crowd_is_neither_positive_nor_negative(model):
    """Only a crowd, over the whole image: nothing is left to be background inside it, and nothing is positive."""
    region = Target(
        torch.tensor([[0.0, 0.0, 96.0, 96.0]]),
        torch.tensor([1]),
        torch.ones(1, 96, 96, dtype=torch.bool),
        torch.zeros(1, 4, 3),
        torch.tensor([True]),
    )
    proposals = [Proposals(torch.tensor([[10.0, 10.0, 50.0, 50.0]]), torch.ones(1))]
    losses = model(batch((96, 96)), [region], proposals)
    assert losses["classification"] == 0 and losses["box"] == 0 and losses["mask"] == 0
    unaware = build_model(replace(SMALL, conventions=replace(SMALL.conventions, crowd_overlap=None)))
    assert unaware(batch((96, 96)), [region], proposals)["classification"] > 0


def test_proposals_can_be_given(model):
    given = [Proposals(torch.tensor([[10.0, 20.0, 60.0, 70.0]]), torch.ones(1))]
    with torch.no_grad():
        found = model.eval()(batch((96, 96)), proposals=given)
    assert 1 <= len(found[0]) <= 3  # one roi, three classes


def test_without_proposals_nothing_is_found(model):
    nothing = [Proposals(torch.zeros(0, 4), torch.zeros(0))]
    found = model.eval()(batch((96, 96)), proposals=nothing)
    assert len(found[0]) == 0 and found[0].mask_probs.shape == (0, 28, 28) and found[0].keypoints.shape == (0, 4, 3)


def test_boxes_lie_inside_their_images_and_scores_descend(model):
    with torch.no_grad():
        found = model.eval()(batch((96, 64), (40, 128), (1, 300)))
    for part, (height, width) in zip(found, ((96, 64), (40, 128), (1, 300))):
        assert (part.boxes >= 0).all()
        assert (part.boxes[:, 2] <= width).all() and (part.boxes[:, 3] <= height).all()
        assert (part.scores.diff() <= 0).all()
        assert ((part.labels >= 1) & (part.labels <= 3)).all()


def test_padding_does_not_change_the_proposals_inside(model):
    """The network sees zeros in the padding whatever the mean is, as if the image ended there."""
    pixels = model.normalise(batch((96, 64), (64, 96)))
    assert (pixels[0, :, :, 64:] == 0).all() and (pixels[1, :, 64:] == 0).all()
    assert (pixels[0, :, :, :64] != 0).any()


def test_channel_order_and_range():
    rules = replace(SMALL.conventions, channel_order="bgr", pixel_range=255, pixel_mean=(1, 2, 3), pixel_std=(1, 1, 2))
    model = build_model(replace(SMALL, conventions=rules))
    red = torch.zeros(3, 32, 32)
    red[0] = 1.0
    pixels = model.normalise(ImageBatch.collate([red]))
    assert pixels[0, :, 0, 0].tolist() == [0 - 1, 0 - 2, (255 - 3) / 2]  # red comes last


def test_nan_weights_are_an_error_and_not_zero_detections(model):
    model.box_head.class_logits.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="box head"):
        model.eval()(batch((96, 96)))
    model.rpn.conv.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="RPN"):
        model.eval()(batch((96, 96)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([4])}, r"labels must lie in 1\.\.3"),
        ({"labels": torch.tensor([0])}, r"labels must lie in 1\.\.3"),
        ({"boxes": torch.tensor([[float("nan"), 0, 9, 9]])}, r"targets\[0\]\.boxes\[0\] must be finite"),
        ({"boxes": torch.tensor([[5.0, 5, 5, 20]])}, "x2 > x1"),
        ({"masks": torch.zeros(1, 96, 64, dtype=torch.bool)}, "96 x 64"),
        ({"keypoints": torch.zeros(1, 17, 3)}, "4 joints, got 17"),
    ],
)
def test_bad_targets_are_refused_by_name(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(batch((96, 96)), [replace(target(), **change)])


def test_missing_masks_and_counts_are_refused(model):
    with pytest.raises(ValueError, match=r"needs Target\.masks"):
        model(batch((96, 96)), [replace(target(), masks=None)])
    with pytest.raises(ValueError, match=r"needs Target\.keypoints"):
        model(batch((96, 96)), [replace(target(), keypoints=None)])
    with pytest.raises(ValueError, match="got 1 for 2 images"):
        model(batch((96, 96), (96, 96)), [target()])
    with pytest.raises(TypeError, match=r"Target\.from_dict"):
        model(batch((96, 96)), [target().to_dict()])


def test_names_are_corrected():
    with pytest.raises(ValueError, match="did you mean 'maskrcnn_resnet50_fpn'"):
        build_model("maskrcnn_resnet50_fnp")
    with pytest.raises(ValueError, match="did you mean 'torchvision'"):
        build_model("maskrcnn_shapes", conventions="torchvison")


@pytest.mark.parametrize(
    ("box", "level"),
    [
        ([0, 0, 224, 224], 4),  # the size ImageNet was seen at
        ([0, 0, 223, 224], 3),
        ([0, 0, 112, 112], 3),
        ([0, 0, 448, 448], 5),
        ([0, 0, 10, 10], 2),  # floor(4 + log2(10 / 224)) is -1
        ([0, 0, 5000, 5000], 5),
    ],
)
def test_levels_by_hand(box, level):
    assert assign_levels(torch.tensor([box], dtype=torch.float32), 2, 5).tolist() == [level]


def test_group_norm_knows_no_other_image():
    """An image's maps are the same beside any other and in either mode; with batch norm they are not."""
    image, first, second = batch((96, 96), (96, 96), (96, 96)).pixels.split(1)
    alone = {}
    for norm in ("group", "batch"):
        torch.manual_seed(0)
        config = replace(SMALL, backbone=replace(SMALL.backbone, norm=norm), head_norm=norm)
        backbone = build_model(config).backbone.train()
        pairs = [torch.cat([image, other]) for other in (first, second)]
        maps = [backbone(pair)["p3"][0] for pair in pairs]
        alone[norm] = torch.allclose(*maps, atol=1e-5)
        if norm == "group":
            torch.testing.assert_close(backbone.eval()(pairs[0])["p3"][0], maps[0])
    assert alone == {"group": True, "batch": False}


@pytest.mark.parametrize(("channels", "groups"), [(8, 1), (24, 1), (32, 2), (64, 4), (88, 1), (256, 16)])
def test_groups_have_sixteen_channels(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_a_step_downhill_lowers_the_loss(model):
    """Four steps on one image: the sum of all losses falls."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    totals = []
    for _ in range(4):
        torch.manual_seed(2)
        total = sum(model(batch((96, 96)), [target()]).values())
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        totals.append(total.item())
    assert totals[-1] < totals[0]


# The same losses, however they are computed ---------------------------------------------------------------------------


def test_the_losses_do_not_depend_on_the_memory_layout(model):
    """channels_last is what ``train`` chooses; the gradient reaches every weight alike."""
    pixels = batch((96, 96), (96, 96))
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        one = build_model(SMALL).to(memory_format=layout)
        one.load_state_dict(model.state_dict())
        torch.manual_seed(4)
        losses = one(replace(pixels, pixels=pixels.pixels.contiguous(memory_format=layout)), [target(), target()])
        sum(losses.values()).backward()
        found.append((losses, dict(one.named_parameters())))
    (losses, weights), (other_losses, other_weights) = found
    for name, loss in losses.items():
        torch.testing.assert_close(other_losses[name], loss, msg=name, rtol=1e-4, atol=1e-5)
    for name, weight in weights.items():
        rest = (other_weights[name].grad - weight.grad).abs().max()
        assert rest <= 1e-3 * weight.grad.abs().max() + 1e-6, name


def test_under_autocast_maps_are_rounded_and_boxes_are_not(model, monkeypatch):
    """The losses stay where they were to bfloat16's three digits, on the same samples."""
    seen, pool = [], roi_features.pool_levels
    given = [Proposals(torch.tensor([[10.0, 20.0, 60.0, 70.0], [30.3, 5.1, 90.7, 60.2]]), torch.ones(2))]

    def watched(layer, maps, rois, *rest, **options):
        seen.append((maps[0].dtype, rois.dtype))
        return pool(layer, maps, rois, *rest, **options)

    monkeypatch.setattr(roi_features, "pool_levels", watched)
    found = []
    for enabled in (False, True):
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(model.eval()(batch((96, 96)), [target()], given))
    plain, rounded = found
    assert set(seen[:3]) == {(torch.float32, torch.float32)} and set(seen[3:]) == {(torch.bfloat16, torch.float32)}
    assert len(seen) == 6  # for each of three heads all levels at once
    for name, loss in plain.items():
        torch.testing.assert_close(rounded[name].float(), loss, msg=name, rtol=0.05, atol=0.02)


def test_how_often_a_gpu_would_have_to_answer(model):
    """Per image of a training step: no look at values that another look has already paid for."""

    class Looks(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            masks = func.overloadpacket is torch.ops.aten.index and any(
                index is not None and index.dtype == torch.bool for index in args[1]
            )
            self.count += masks or func.overloadpacket in (torch.ops.aten.nonzero, torch.ops.aten._local_scalar_dense)
            return func(*args, **(kwargs or {}))

    found = []
    for images in (1, 2):
        with Looks() as looks, torch.no_grad():
            model(batch(*[(96, 96)] * images), [target()] * images)
        found.append(looks.count)
    assert found[1] - found[0] <= 18
