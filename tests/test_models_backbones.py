"""Backbones: sizes by hand, dilation and the non-local block by law, C4's two halves against torchvision's ResNet."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchvision.models import resnet50

from mrcnn_edu.config import BackboneConfig
from mrcnn_edu.models.backbone import Res5, build_backbone
from mrcnn_edu.models.mask_rcnn import build_model
from mrcnn_edu.models.non_local import NonLocal
from mrcnn_edu.models.resnet import ARCHITECTURES, ResNet, stage
from mrcnn_edu.ops import pool_levels, roi_align
from mrcnn_edu.presets import MODELS
from mrcnn_edu.weights import load_imagenet


def backbone(features: str, architecture: str = "resnet18", **fields) -> torch.nn.Module:
    config = BackboneConfig(architecture=architecture, features=features, width=4, channels=8, norm="batch", **fields)
    torch.manual_seed(0)
    return build_backbone(config, torch.nn.BatchNorm2d, None, "1x1").eval()


# By hand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("fpn", {"p2": (8, 32), "p3": (8, 16), "p4": (8, 8), "p5": (8, 4), "p6": (8, 2)}),
        ("c4", {"c4": (16, 8)}),
        ("c5", {"c5": (32, 4)}),
        ("dc5", {"c5": (32, 8)}),
    ],
)
def test_what_is_read_from_an_image_of_128_pixels(features, expected):
    body = backbone(features)
    maps = body(torch.rand(1, 3, 128, 128))
    assert {name: (value.shape[1], value.shape[2]) for name, value in maps.items()} == expected
    assert {name: 128 // side for name, (_, side) in expected.items()} == dict(body.strides)
    assert all(value.shape[1] == body.channels for value in maps.values())


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_c4", "maskrcnn_resnet50_c5"])
def test_one_map_has_fifteen_anchors_in_each_cell(name):
    model = build_model(replace(MODELS[name], backbone=replace(MODELS[name].backbone, architecture="resnet10")))
    (level,) = model.rpn.strides
    anchors = model.rpn.get_buffer(f"anchors_{level}")
    width, height = (anchors[:, 2:] - anchors[:, :2]).T
    sizes = (width * height).sqrt().reshape(5, 3)
    torch.testing.assert_close(sizes, torch.tensor([32.0, 64, 128, 256, 512])[:, None].expand(5, 3))
    torch.testing.assert_close((height / width).reshape(5, 3), torch.tensor([0.5, 1, 2]).expand(5, 3))
    assert model.rpn.objectness.out_channels == 15


def test_depths():
    """Layers with weights: three per bottleneck, the first conv, and the classifier that a detector leaves away."""
    depth = {"resnet50": 50, "resnet101": 101, "resnet152": 152, "resnext101_64x4d": 101, "resnext152_32x8d": 152}
    for name, layers in depth.items():
        assert 3 * sum(ARCHITECTURES[name][1]) + 2 == layers
    with torch.device("meta"):
        blocks = ResNet("resnext152_32x8d", torch.nn.BatchNorm2d, stride_in="1x1").c4
    assert len(blocks) == 36 and blocks[0].conv2.groups == 32 and blocks[0].conv2.out_channels == 32 * 8 * 4
    assert blocks[0].conv1.stride == (1, 1) and blocks[0].conv2.stride == (2, 2)  # ResNeXt strides in the 3x3


# By law ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
@pytest.mark.parametrize("height", [128, 112], ids=["even", "odd"])
def test_every_second_cell_of_dc5_is_c5(architecture, height):
    """Dilation keeps what each 3x3 conv looks at; it only asks at twice as many places (stride in the first conv)."""
    plain, dilated = backbone("c5", "resnet50"), backbone("dc5", "resnet50")
    dilated.load_state_dict(plain.state_dict())
    pixels = torch.rand(1, 3, height, 160, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = plain(pixels)["c5"], dilated(pixels)["c5"]
    torch.testing.assert_close(found[:, :, ::2, ::2], expected, rtol=1e-4, atol=1e-5)


def test_a_stride_of_two_in_res5_is_every_second_bin():
    """The head of the released code reads every second bin of 14 x 14: as the drawn one does of 7 x 7 (Figure 4)."""
    heads = [Res5("resnet50", 16, 4, torch.nn.BatchNorm2d, stride, "1x1").eval() for stride in (1, 2)]
    heads[1].load_state_dict(heads[0].state_dict())
    pooled = torch.rand(2, 16, 14, 14)
    torch.testing.assert_close(heads[1](pooled), heads[0](pooled[:, :, ::2, ::2]))


def test_a_non_local_block_begins_as_the_identity():
    block = NonLocal(8)
    x = torch.rand(2, 8, 5, 7)
    assert torch.equal(block(x), x)
    plain, local = backbone("c5"), backbone("c5", non_local=True)
    missing, unexpected = local.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(".non_local." in name for name in missing)
    pixels = torch.rand(1, 3, 64, 64)
    assert torch.equal(plain(pixels)["c5"], local(pixels)["c5"])
    local(pixels)["c5"].sum().backward()
    assert local.resnet.non_local.output.weight.grad.abs().sum() > 0  # and learns


def test_the_non_local_block_stands_before_the_last_block_of_c4():
    local = backbone("c5", non_local=True)
    torch.nn.init.normal_(local.resnet.non_local.output.weight)
    x = local.resnet.c3(local.resnet.c2(local.resnet.stem(torch.rand(1, 3, 64, 64))))
    seen = []
    local.resnet.c4[0].register_forward_hook(lambda *_: seen.append("first block"))
    local.resnet.non_local.register_forward_hook(lambda *_: seen.append("non-local"))
    local.resnet.c4[1].register_forward_hook(lambda *_: seen.append("last block"))
    local(torch.rand(1, 3, 64, 64))
    assert seen == ["first block", "non-local", "last block"] and x.shape[1] == 8
    with torch.device("meta"):
        block = ResNet("resnext152_32x8d", torch.nn.BatchNorm2d, non_local=True).non_local
    assert (block.query.in_channels, block.query.out_channels) == (1024, 512)


def non_local_block(channels: int = 6) -> NonLocal:
    torch.manual_seed(0)
    block = NonLocal(channels)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    return block


def test_a_non_local_block_by_loops():
    block, x = non_local_block(), torch.randn(1, 6, 2, 3)
    cells = x.flatten(2)[0].T  # [6 cells, C]

    def layer(conv, cell):
        return conv.weight[:, :, 0, 0] @ cell + conv.bias

    rows = []
    for cell in cells:
        weights = torch.stack([(layer(block.query, cell) @ layer(block.key, other)).exp() for other in cells])
        mean = sum(w * layer(block.value, other) for w, other in zip(weights / weights.sum(), cells))
        rows.append(cell + layer(block.output, mean))
    torch.testing.assert_close(block(x), torch.stack(rows).T.reshape(1, 6, 2, 3), rtol=1e-4, atol=1e-4)


def test_a_non_local_block_does_not_know_where_a_cell_is():
    """It sees the cells as a set: shuffled cells give the shuffled result."""
    block, x = non_local_block(), torch.randn(2, 6, 4, 5)
    order = torch.randperm(20)
    shuffled = x.flatten(2)[:, :, order].reshape(x.shape)
    expected = block(x).flatten(2)[:, :, order].reshape(x.shape)
    torch.testing.assert_close(block(shuffled), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", ["fpn", "c4", "c5", "dc5"])
def test_frozen_stages(features):
    """The stem and the first stages do not learn; the non-local block belongs to c4."""
    for stages, first in ((0, "stem"), (2, "c3"), (3, "c4"), (4, "c5")):
        body = backbone(features, frozen_stages=stages, non_local=True).resnet
        learns = {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad}
        names = ["stem", "c2", "c3", "c4", *([] if features == "c4" else ["c5"])]
        wanted = set(names[names.index(first) :] if first in names else [])
        assert learns == wanted | ({"non_local"} if stages < 4 else set())


@pytest.mark.parametrize(
    ("layer", "mode"), [("roi_pool", "max"), ("roi_warp", "max"), ("roi_warp", "mean"), ("roi_align", "max")]
)
@pytest.mark.parametrize("name", ["maskrcnn_resnet50_c4", "maskrcnn_resnet50_fpn"])
def test_each_branch_has_the_roi_layer_of_its_config(name, layer, mode):
    """What the branch is given is what the op gives, on its own level and with its own mode."""
    config = MODELS[name]
    mask = replace(config.mask, layer=layer, mode=mode)
    box = replace(config.box, layer=layer, mode=mode) if name.endswith("c4") else config.box
    small = replace(config.backbone, architecture="resnet10", width=4, channels=4)
    model = build_model(replace(config, backbone=small, box=box, mask=mask))
    features = model.backbone(torch.rand(1, 3, 128, 128))
    level, stride = ("c4", 16) if name.endswith("c4") else ("p3", 8)
    boxes = torch.tensor([[5.0, 9.0, 120.0, 117.0]])  # 111 px: p3 begins at 112, p2 ends there
    boxes[0, 2:] += 4
    rois = torch.tensor([[0.0, *boxes[0]]])
    size, which = config.mask.pooled_size, torch.zeros(1, dtype=torch.int64)
    expected = pool_levels(layer, [features[level]], rois, which, size, [1 / stride], 2, True, mode)
    torch.testing.assert_close(model.mask_features(features, [boxes]), expected)
    assert not torch.allclose(expected, roi_align(features[level], rois, size, 1 / stride))
    if name.endswith("fpn"):  # the box branch keeps its own
        torch.testing.assert_close(
            model.box_features(features, [boxes]), roi_align(features[level], rois, 7, 1 / stride)
        )


# By oracle ------------------------------------------------------------------------------------------


def test_c4_and_its_head_are_torchvisions_resnet_in_two_parts():
    """layer1 to layer3 are the body, layer4 is res5; together they have every weight of the classifier but its last."""
    torch.manual_seed(0)
    theirs = resnet50(weights=None).eval()
    config = MODELS["maskrcnn_resnet50_c4"]
    rules = replace(config.conventions, stride_in="3x3")
    released = replace(config.box, pooled_size=14, res5_stride=2)
    model = build_model(
        replace(config, conventions=rules, box=released, mask=replace(config.mask, pooled_size=14))
    ).eval()
    load_imagenet(model.backbone.resnet, theirs.state_dict(), model.res5)
    pixels, pooled = torch.rand(1, 3, 64, 64), torch.rand(2, 1024, 14, 14)
    with torch.no_grad():
        stem = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(pixels))))
        torch.testing.assert_close(
            model.backbone(pixels)["c4"], theirs.layer3(theirs.layer2(theirs.layer1(stem))), rtol=1e-4, atol=5e-5
        )
        torch.testing.assert_close(model.res5(pooled), theirs.layer4(pooled), rtol=1e-4, atol=5e-5)
    without = sum(p.numel() for name, p in theirs.named_parameters() if not name.startswith("fc"))
    frozen = sum(
        v.numel() for m in (model.backbone, model.res5) for n, v in m.state_dict().items() if "running" not in n
    )
    assert frozen == without


def test_imagenet_weights_without_the_head_are_refused_on_c4():
    model = ResNet("resnet18", torch.nn.BatchNorm2d, width=8, last="c4")
    whole = ResNet("resnet18", torch.nn.BatchNorm2d, width=8)
    head = Res5("resnet18", 32, 8, torch.nn.BatchNorm2d, 1, "1x1")
    renames = {
        "stem.0": "conv1",
        "stem.1": "bn1",
        "c2.": "layer1.",
        "c3.": "layer2.",
        "c4.": "layer3.",
        "c5.": "layer4.",
    }
    state = {}
    for name, value in whole.state_dict().items():
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs, 1) if name.startswith(ours) else name
        state[name.replace(".norm", ".bn").replace("shortcut", "downsample")] = value
    with pytest.raises(ValueError, match=r"left over layer4\.0"):
        load_imagenet(model, state)
    load_imagenet(model, state, head)
    assert torch.equal(head.blocks[1].conv2.weight, whole.c5[1].conv2.weight)


def test_a_stage_alone_is_the_stage_of_the_whole():
    whole = ResNet("resnet50", torch.nn.BatchNorm2d, width=4)
    alone = stage("resnet50", "c3", whole.channels["c2"], 4, torch.nn.BatchNorm2d, 2)
    assert {name: v.shape for name, v in alone.state_dict().items()} == {
        name: v.shape for name, v in whole.c3.state_dict().items()
    }
