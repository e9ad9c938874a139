"""By oracle: torchvision's detectors at shared random weights, images of several sizes, every output and gradient.

torchvision's models are the independent implementation here. Its images go in without a resize, so that the two
models see the same pixels and only the models are compared.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torchvision.models import resnet18, resnet50, resnext50_32x4d
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection import fasterrcnn_resnet50_fpn, keypointrcnn_resnet50_fpn, maskrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from mrcnn_edu.config import BackboneConfig
from mrcnn_edu.models.mask_rcnn import build_model
from mrcnn_edu.models.resnet import FrozenBatchNorm, ResNet
from mrcnn_edu.ops import paste_masks
from mrcnn_edu.presets import model_config
from mrcnn_edu.structures import ImageBatch, Target
from mrcnn_edu.weights import load_imagenet, load_torchvision, to_torchvision

SIZES = [(96, 128), (112, 80), (61, 71)]
CLASSES = 5  # foreground
JOINTS = 17

LOSS_NAMES = {
    "objectness": "loss_objectness",
    "rpn_box": "loss_rpn_box_reg",
    "classification": "loss_classifier",
    "box": "loss_box_reg",
    "mask": "loss_mask",
    "keypoint": "loss_keypoint",
}


def randomise(model: torch.nn.Module) -> None:
    """Statistics of real activations, so that rounding does not grow from layer to layer."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.backbone.train()(torch.rand(2, 3, 160, 224, generator=torch.Generator().manual_seed(0)) * 4 - 2)


def spread_out(model: torch.nn.Module) -> torch.nn.Module:
    """Larger weights in the last layers: scores without ties, of which many pass the threshold."""
    scales = {"rpn.head.cls_logits": 20, "rpn.head.bbox_pred": 5, "cls_score": 6, "box_predictor.bbox_pred": 5}
    for key, value in model.named_parameters():
        for name, scale in scales.items():
            if name in key and key.endswith("weight"):
                value.data.mul_(scale)
    return model


def torchvision_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(3)
    options = dict(
        weights=None, weights_backbone=None, box_detections_per_img=30, box_batch_size_per_image=48,
        rpn_pre_nms_top_n_train=300, rpn_post_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=300, rpn_post_nms_top_n_test=100,
    )  # fmt: skip
    if kind == "mask":
        model = maskrcnn_resnet50_fpn(num_classes=CLASSES + 1, **options)
    elif kind == "keypoint":
        model = keypointrcnn_resnet50_fpn(num_classes=2, num_keypoints=JOINTS, **options)
    else:
        model = fasterrcnn_resnet50_fpn(num_classes=CLASSES + 1, **options)
    model.transform.resize = lambda image, target: (image, target)
    randomise(model)
    return model


def our_model(kind: str, norm: str = "batch") -> torch.nn.Module:
    names = {"mask": "maskrcnn_resnet50_fpn", "keypoint": "keypointrcnn_resnet50_fpn", "box": "fasterrcnn_resnet50_fpn"}
    config = model_config(names[kind], "torchvision", classes=1 if kind == "keypoint" else CLASSES)
    return build_model(
        replace(
            config,
            backbone=BackboneConfig(norm=norm, frozen_stages=0),
            rpn=replace(config.rpn, pre_nms=(300, 300), post_nms=(200, 100)),
            box=replace(config.box, detections_per_image=30, rois_per_image=48),
        )
    )


def pictures() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) for size in SIZES]


def truths(kind: str) -> list[Target]:
    """Three boxes per image with block masks and random joints; no instance at all in the last image."""
    generator = torch.Generator().manual_seed(2)
    targets = []
    for index, (height, width) in enumerate(SIZES):
        if index == len(SIZES) - 1:
            joints = JOINTS if kind == "keypoint" else 0
            targets.append(Target.empty((height, width), joints))
            continue
        corner = torch.rand(3, 2, generator=generator) * torch.tensor([width / 2, height / 2])
        side = 20 + torch.rand(3, 2, generator=generator) * torch.tensor([width / 3, height / 3])
        boxes = torch.cat([corner, corner + side], dim=1)
        masks = torch.zeros(3, height, width, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist()):
            mask[y1 : (y1 + 2 * y2) // 3, x1:x2] = True
        labels = torch.randint(1, (1 if kind == "keypoint" else CLASSES) + 1, (3,), generator=generator)
        keypoints = None
        if kind == "keypoint":
            xy = corner[:, None] + torch.rand(3, JOINTS, 2, generator=generator) * side[:, None]
            keypoints = torch.cat([xy, torch.randint(0, 3, (3, JOINTS, 1), generator=generator)], dim=2)
        targets.append(Target(boxes, labels, masks, keypoints))
    return targets


@pytest.fixture(scope="module", params=["mask", "keypoint", "box"])
def pair(request):
    theirs, ours = torchvision_model(request.param), our_model(request.param)
    load_torchvision(ours, theirs.state_dict())
    return request.param, theirs, ours


@pytest.fixture(scope="module")
def sure(pair):
    kind, theirs, ours = copy.deepcopy(pair)
    load_torchvision(ours, spread_out(theirs).state_dict())
    return kind, theirs, ours


def test_proposals_are_the_same(sure):
    _, theirs, ours = sure
    theirs.eval(), ours.eval()
    with torch.no_grad():
        batch = ImageBatch.collate(pictures())
        images, _ = theirs.transform(pictures())
        features = theirs.backbone(images.tensors)
        expected, _ = theirs.rpn(images, features)
        torch.testing.assert_close(ours.normalise(batch), images.tensors, atol=1e-6, rtol=0)
        own = ours.propose(ours.rpn(ours.backbone(ours.normalise(batch)), batch.pixels.shape[-2:]), batch)
    for found, boxes in zip(own, expected):
        torch.testing.assert_close(found.boxes, boxes, atol=1e-3, rtol=0)


def test_detections_are_the_same(sure):
    kind, theirs, ours = sure
    theirs.eval(), ours.eval()
    with torch.no_grad():
        expected = theirs(pictures())
        own = ours(ImageBatch.collate(pictures()))
    assert sum(map(len, own)) > 20
    for found, other, size in zip(own, expected, SIZES):
        torch.testing.assert_close(found.boxes, other["boxes"], atol=1e-3, rtol=0)
        torch.testing.assert_close(found.scores, other["scores"], atol=1e-5, rtol=0)
        assert torch.equal(found.labels, other["labels"])
        if kind == "mask":
            pasted = paste_masks(found.mask_probs, found.boxes, size, threshold=None, rule="integer")
            torch.testing.assert_close(pasted, other["masks"][:, 0], atol=2e-4, rtol=0)
        if kind == "keypoint":
            torch.testing.assert_close(found.keypoints[..., :2], other["keypoints"][..., :2], atol=1e-3, rtol=0)


def test_losses_and_gradients_are_the_same(pair):
    """Both draw their minibatches by ``torch.randperm`` in the same order, so one seed fixes the sampling of both.

    In float64, where rounding does not push a ReLU over its edge; proposals are rounded to float32 on both sides, since
    ours always are.
    """
    kind, theirs, ours = copy.deepcopy(pair)
    for model in (theirs, ours):
        model.double().train()
        for module in model.modules():  # the statistics of the fixture, not of this batch
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    ours.pixel_mean = ours.pixel_mean.new_tensor(theirs.transform.image_mean)[:, None, None]  # not rounded to float32
    ours.pixel_std = ours.pixel_std.new_tensor(theirs.transform.image_std)[:, None, None]
    find = theirs.rpn.filter_proposals
    theirs.rpn.filter_proposals = lambda *arguments: tuple(
        [value.float().double() for value in part] for part in find(*arguments)
    )
    targets = truths(kind)
    torch.manual_seed(5)
    expected = theirs([picture.double() for picture in pictures()], [target.to_dict() for target in targets])
    torch.manual_seed(5)
    own = ours(ImageBatch.collate(pictures()), targets)
    assert set(own) == {name for name, other in LOSS_NAMES.items() if other in expected}
    for name, value in own.items():
        torch.testing.assert_close(value, expected[LOSS_NAMES[name]], rtol=1e-5, atol=1e-7, check_dtype=False)
    sum(expected.values()).backward()
    sum(own.values()).backward()
    grads = {name: value.grad for name, value in theirs.named_parameters()}
    converted = to_torchvision_gradients(ours)
    assert set(converted) == set(grads)
    largest = max(float(value.abs().max()) for value in grads.values())
    for name, value in converted.items():
        # A softmax over cells does not feel its bias: that gradient is rounding alone, hence the floor.
        scale = grads[name].abs().max().clamp(min=1e-6 * largest)
        assert (value - grads[name]).abs().max() / scale < 1e-4, name


def to_torchvision_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients under torchvision's names: the weights are replaced by their gradients, then converted."""
    twin = build_model(model.config).double()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    twin.load_state_dict({**twin.state_dict(), **gradients})
    converted, trained = to_torchvision(twin), {name for name, _ in torchvision_model_names(twin)}
    return {name: value for name, value in converted.items() if name in trained}


def torchvision_model_names(twin: torch.nn.Module):
    from mrcnn_edu.weights import DETECTOR, _rename

    return [(_rename(name, DETECTOR), name) for name, _ in twin.named_parameters()]


def test_frozen_norms_and_their_eps():
    """COCO weights come with frozen norms whose eps torchvision sets to 0: the same output, and another with 1e-5."""
    theirs = TorchvisionMaskRCNN(
        resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, norm_layer=partial(FrozenBatchNorm2d, eps=0.0), trainable_layers=3
        ),
        CLASSES + 1,
    )
    for name, value in theirs.backbone.named_buffers():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
    config = our_model("mask", norm="frozen").config
    ours = build_model(replace(config, conventions=replace(config.conventions, frozen_norm_eps=0.0)))
    load_torchvision(ours, theirs.state_dict())
    pixels = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected, own = theirs.double().backbone(pixels), ours.double().backbone(pixels)
    for level, other in zip(own, expected.values()):
        torch.testing.assert_close(own[level], other, atol=1e-9, rtol=1e-9)
    own_eps = {module.eps for module in ours.modules() if isinstance(module, FrozenBatchNorm)}
    assert own_eps == {0.0}


def test_weights_come_back_unchanged(pair):
    _, theirs, ours = pair
    for name, value in to_torchvision(ours).items():
        expected = theirs.state_dict()[name].clone()
        if name.endswith(("box_predictor.bbox_pred.weight", "box_predictor.bbox_pred.bias")):
            expected[:4] = 0  # the background's deltas, which nothing reads
        if "mask_fcn_logits" in name:
            expected[:1] = 0
        assert torch.equal(value, expected), name


def test_old_names_of_published_files_are_understood(pair):
    kind, theirs, ours = pair
    if kind != "mask":
        pytest.skip("the older names differ most in the mask model")
    old = {}
    for name, value in theirs.state_dict().items():
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for index in range(4):
            name = name.replace(f"mask_head.{index}.0.", f"mask_head.mask_fcn{index + 1}.")
            name = name.replace(f"_blocks.{index}.0.", f"_blocks.{index}.")
        old[name] = value
    assert set(old) != set(theirs.state_dict())
    load_torchvision(ours, old)


def test_a_file_of_another_model_is_refused(pair):
    _, theirs, ours = pair
    state, before = dict(theirs.state_dict()), {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(ValueError, match=r"missing backbone\.body\.conv1\.weight"):
        load_torchvision(ours, {k: v for k, v in state.items() if k != "backbone.body.conv1.weight"})
    with pytest.raises(ValueError, match="left over surprise"):
        load_torchvision(ours, {**state, "surprise": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"of another shape rpn\.conv\.bias: expected \[256\], got \[3\]"):
        load_torchvision(ours, {**state, "rpn.head.conv.0.0.bias": torch.zeros(3)})
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("build", [resnet18, resnet50, resnext50_32x4d])
def test_imagenet_weights_load_by_name(build):
    torch.manual_seed(0)
    theirs = build(weights=None).eval()
    ours = ResNet(build.__name__, torch.nn.BatchNorm2d, stride_in="3x3").eval()
    load_imagenet(ours, theirs.state_dict())
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        stem = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(pixels))))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(stem))))
        torch.testing.assert_close(ours(pixels)["c5"], expected, atol=1e-5, rtol=1e-5)
