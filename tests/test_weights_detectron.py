"""detectron2's and Detectron's weights: exactly their names and shapes, there and back, and refused where they differ.

The names are built here by loops of their own, so that they check the tables. Where detectron2 is installed its own
models are compared as a whole: names, proposals, detections, losses.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import shrink

from mrcnn_edu.config import ModelConfig
from mrcnn_edu.models.mask_rcnn import MaskRCNN, build_model
from mrcnn_edu.presets import MODELS
from mrcnn_edu.structures import ImageBatch, Proposals, Target
from mrcnn_edu.unpickling import read_weights
from mrcnn_edu.weights import load_detectron, load_detectron2, to_detectron2

BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnext101": (3, 4, 23, 3)}
Shapes = dict[str, tuple[int, ...]]

# ---------------------------------------------------------------------------------------------------------------------
# The names and shapes of detectron2, for 80 classes
# ---------------------------------------------------------------------------------------------------------------------


def norm2(name: str, channels: int) -> Shapes:
    return {f"{name}.norm.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}


def stage2(name: str, blocks: int, inputs: int, inner: int, outputs: int, groups: int) -> Shapes:
    shapes: Shapes = {}
    for block in range(blocks):
        place = f"{name}.{block}"
        if block == 0:
            shapes |= {f"{place}.shortcut.weight": (outputs, inputs, 1, 1)} | norm2(f"{place}.shortcut", outputs)
        shapes |= {f"{place}.conv1.weight": (inner, inputs, 1, 1)} | norm2(f"{place}.conv1", inner)
        shapes |= {f"{place}.conv2.weight": (inner, inner // groups, 3, 3)} | norm2(f"{place}.conv2", inner)
        shapes |= {f"{place}.conv3.weight": (outputs, inner, 1, 1)} | norm2(f"{place}.conv3", outputs)
        inputs = outputs
    return shapes


def layer2(name: str, *shape: int, bias: int | None = None) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": (shape[0] if bias is None else bias,)}


def detectron2_shapes(name: str) -> Shapes:
    features = name.split("_")[2]
    architecture = name.split("_")[1]
    classes, person = (1, True) if name.startswith("keypoint") else (80, False)
    groups, inner = (32, 256) if architecture == "resnext101" else (1, 64)
    if architecture == "resnext101":
        features = name.split("_")[3]
    body = "backbone.bottom_up" if features == "fpn" else "backbone"
    shapes = {f"{body}.stem.conv1.weight": (64, 3, 7, 7)} | norm2(f"{body}.stem.conv1", 64)
    inputs = 64
    for stage, blocks in zip((2, 3, 4, 5), BLOCKS[architecture]):
        place = "roi_heads.res5" if features == "c4" and stage == 5 else f"{body}.res{stage}"
        outputs = 64 * 2**stage
        shapes |= stage2(place, blocks, inputs, inner * 2 ** (stage - 2), outputs, groups)
        inputs = outputs
    if features == "fpn":
        for stage in (2, 3, 4, 5):
            shapes |= layer2(f"backbone.fpn_lateral{stage}", 256, 64 * 2**stage, 1, 1)
            shapes |= layer2(f"backbone.fpn_output{stage}", 256, 256, 3, 3)
    channels, anchors = {"fpn": (256, 3), "c4": (1024, 15), "dc5": (2048, 15)}[features]
    rpn, roi = "proposal_generator.rpn_head", "roi_heads"
    shapes |= layer2(f"{rpn}.conv", channels, channels, 3, 3)
    shapes |= layer2(f"{rpn}.objectness_logits", anchors, channels, 1, 1)
    shapes |= layer2(f"{rpn}.anchor_deltas", 4 * anchors, channels, 1, 1)
    width = 2048 if features == "c4" else 1024
    if features != "c4":
        shapes |= layer2(f"{roi}.box_head.fc1", 1024, channels * 49) | layer2(f"{roi}.box_head.fc2", 1024, 1024)
    shapes |= layer2(f"{roi}.box_predictor.cls_score", classes + 1, width)
    shapes |= layer2(f"{roi}.box_predictor.bbox_pred", 4 * classes, width)
    if person:
        for conv in range(1, 9):
            shapes |= layer2(f"{roi}.keypoint_head.conv_fcn{conv}", 512, channels if conv == 1 else 512, 3, 3)
        shapes |= layer2(f"{roi}.keypoint_head.score_lowres", 512, 17, 4, 4, bias=17)
        return shapes
    if features != "c4":
        for conv in range(1, 5):
            shapes |= layer2(f"{roi}.mask_head.mask_fcn{conv}", 256, channels if conv == 1 else 256, 3, 3)
    shapes |= layer2(f"{roi}.mask_head.deconv", 2048 if features == "c4" else 256, 256, 2, 2, bias=256)
    return shapes | layer2(f"{roi}.mask_head.predictor", classes, 256, 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The names and shapes of Detectron: end-to-end trained, 81 classes with the background
# ---------------------------------------------------------------------------------------------------------------------


def detectron_shapes(name: str) -> Shapes:
    _, architecture, *rest = name.removesuffix("_detectron1").split("_")
    features, person = rest[-1], name.startswith("keypoint")
    depths = BLOCKS[architecture]
    groups, inner = {"32x8d": (32, 256), "64x4d": (64, 256)}.get(rest[0], (1, 64))
    classes = 2 if person else 81
    shapes: Shapes = {"conv1_w": (64, 3, 7, 7), "res_conv1_bn_s": (64,), "res_conv1_bn_b": (64,)}
    inputs = 64
    for stage, blocks in zip((2, 3, 4, 5), depths):
        outputs, middle = 64 * 2**stage, inner * 2 ** (stage - 2)
        for block in range(blocks):
            convs = {
                "branch2a": (middle, inputs, 1, 1),
                "branch2b": (middle, middle // groups, 3, 3),
                "branch2c": (outputs, middle, 1, 1),
            }
            if block == 0:
                convs["branch1"] = (outputs, inputs, 1, 1)
            for branch, shape in convs.items():
                place = f"res{stage}_{block}_{branch}"
                shapes |= {f"{place}_w": shape, f"{place}_bn_s": shape[:1], f"{place}_bn_b": shape[:1]}
            inputs = outputs

    def layer(blob: str, *shape: int, bias: int | None = None) -> None:
        shapes[f"{blob}_w"], shapes[f"{blob}_b"] = shape, (shape[0] if bias is None else bias,)

    channels, anchors, level = (256, 3, "_fpn2") if features == "fpn" else (1024, 15, "")
    if features == "fpn":
        for stage, blocks in zip((2, 3, 4, 5), depths):
            place = f"res{stage}_{blocks - 1}_sum"
            layer(f"fpn_inner_{place}" + ("" if stage == 5 else "_lateral"), 256, 64 * 2**stage, 1, 1)
            layer(f"fpn_{place}", 256, 256, 3, 3)
        layer("fc6", 1024, 256 * 49)
        layer("fc7", 1024, 1024)
    layer(f"conv_rpn{level}", channels, channels, 3, 3)
    layer(f"rpn_cls_logits{level}", anchors, channels, 1, 1)
    layer(f"rpn_bbox_pred{level}", 4 * anchors, channels, 1, 1)
    layer("cls_score", classes, 1024 if features == "fpn" else 2048)
    layer("bbox_pred", 4 * classes, 1024 if features == "fpn" else 2048)
    if person:
        for conv in range(1, 9):
            layer(f"conv_fcn{conv}", 512, 256 if conv == 1 else 512, 3, 3)
        layer("kps_score_lowres", 512, 17, 4, 4, bias=17)
        return shapes
    if features == "fpn":
        for conv in range(1, 5):
            layer(f"_[mask]_fcn{conv}", 256, 256, 3, 3)
    layer("conv5_mask", 256 if features == "fpn" else 2048, 256, 2, 2, bias=256)
    layer("mask_fcn_logits", classes, 256, 1, 1)
    return shapes


DETECTRON2 = [name for name in MODELS if name.endswith("_detectron2")]
DETECTRON1 = [name for name in MODELS if name.endswith("_detectron1")]


def outline(name: str) -> MaskRCNN:
    with torch.device("meta"):
        return build_model(name)


@pytest.mark.parametrize("name", DETECTRON2)
def test_names_and_shapes_are_detectron2s(name):
    assert {key: tuple(value.shape) for key, value in to_detectron2(outline(name)).items()} == detectron2_shapes(name)


@pytest.mark.parametrize("name", DETECTRON1)
def test_every_blob_of_detectron_is_used(name, monkeypatch):
    """The blobs of a whole file fit, with the momenta and the other leftovers that real files have."""
    shapes = detectron_shapes(name)
    extras = ["conv1_b", "fc1000_w", "fc1000_b", *(f"{blob}_momentum" for blob in shapes)]
    blobs = {blob: torch.zeros(1).expand(shape) for blob, shape in shapes.items()} | dict.fromkeys(
        extras, torch.ones(1)
    )
    model, taken = outline(name), {}
    monkeypatch.setattr(model, "load_state_dict", lambda state, strict: taken.update(state))
    load_detectron(model, blobs)
    assert {key: value.shape for key, value in taken.items()} == {k: v.shape for k, v in model.state_dict().items()}
    del blobs["cls_score_w"]
    with pytest.raises(ValueError, match="missing cls_score_w"):
        load_detectron(model, blobs)
    with pytest.raises(ValueError, match="left over lr"):
        load_detectron(
            model, {**blobs, "cls_score_w": torch.zeros(1).expand(shapes["cls_score_w"]), "lr": torch.ones(1)}
        )


# ---------------------------------------------------------------------------------------------------------------------
# There and back
# ---------------------------------------------------------------------------------------------------------------------


def small(name: str, seed: int = 0) -> MaskRCNN:
    """A named model, narrow, with every weight and statistic at random."""
    config = shrink(MODELS[name])
    torch.manual_seed(seed)
    model = build_model(replace(config, backbone=replace(config.backbone, norm="frozen")))
    for key, value in model.state_dict().items():
        if "norm" in key or "stem.1" in key or "shortcut.1" in key:
            value.uniform_(0.5, 1.0)
    return model


@pytest.mark.parametrize("name", [name for name in DETECTRON2 if "101" not in name])
def test_there_and_back(name):
    first, second = small(name), small(name, seed=1)
    state = to_detectron2(first)
    load_detectron2(second, {key: value.clone() for key, value in state.items()})
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


def test_the_background_moves_from_the_end_to_the_front():
    model = small("maskrcnn_resnet50_fpn_detectron2")
    state = to_detectron2(model)
    state["roi_heads.box_predictor.cls_score.bias"] = torch.tensor([1.0, 2, 3, 4, 5, 6, 0])  # six classes, background
    state["roi_heads.box_predictor.bbox_pred.bias"] = torch.arange(24.0)
    load_detectron2(model, state)
    assert model.box_head.class_logits.bias.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert model.box_head(torch.zeros(1, 16, 7, 7))[1].shape == (1, 6, 4)
    assert model.box_head.deltas.bias.tolist() == list(range(24))  # these have no background


def test_constants_in_older_files_are_compared():
    """Files of the model zoo hold mean, deviation and anchors: ResNeXt has another deviation than ResNet."""
    model = small("maskrcnn_resnet50_c4_detectron2")
    anchors = model.rpn.get_buffer("anchors_c4")
    old = {
        "pixel_mean": torch.tensor([103.53, 116.28, 123.675]).reshape(3, 1, 1),
        "pixel_std": torch.ones(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": anchors.clone(),
    }
    load_detectron2(model, to_detectron2(model) | old)
    with pytest.raises(ValueError, match=r"pixel_std = \[57.375, .*the model has \[1.0"):
        load_detectron2(model, to_detectron2(model) | old | {"pixel_std": torch.tensor([57.375, 57.12, 58.395])})
    with pytest.raises(ValueError, match=r"cell_anchors.0 = .*build it by the preset"):
        name = "proposal_generator.anchor_generator.cell_anchors.0"
        load_detectron2(model, to_detectron2(model) | old | {name: anchors * 2})
    with pytest.raises(ValueError, match=r"left over .*cell_anchors.1"):
        load_detectron2(model, to_detectron2(model) | {"proposal_generator.anchor_generator.cell_anchors.1": anchors})


def test_another_model_is_refused_and_nothing_changes():
    model = small("maskrcnn_resnet50_fpn_detectron2")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = to_detectron2(small("maskrcnn_resnet50_fpn_detectron2", seed=1))
    for change, message in (
        ({"roi_heads.mask_head.deconv.weight": None}, r"missing roi_heads\.mask_head\.deconv\.weight"),
        ({"roi_heads.mask_head.mask_fcn5.weight": torch.zeros(1)}, r"left over roi_heads\.mask_head\.mask_fcn5"),
        ({"roi_heads.box_predictor.cls_score.bias": torch.zeros(82)}, r"of another shape .*expected \[7\], got \[82\]"),
    ):
        changed = {key: value for key, value in (state | change).items() if value is not None}
        with pytest.raises(ValueError, match=message):
            load_detectron2(model, changed)
    with pytest.raises(ValueError, match="missing"):
        load_detectron2(model, to_detectron2(small("maskrcnn_resnet50_dc5_detectron2")))
    with pytest.raises(ValueError, match="detectron2's conventions: build it by a preset"):
        load_detectron2(small("maskrcnn_resnet50_fpn"), state)
    with pytest.raises(ValueError, match="detectron1's conventions: build it by a preset"):
        load_detectron(model, {})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def blobs_for(name: str) -> dict[str, torch.Tensor]:
    """Random blobs that fit the small model of six classes."""
    generator = torch.Generator().manual_seed(3)
    narrow = {64: 16, 128: 32, 256: 64, 512: 128, 1024: 256, 2048: 512}
    rows = {"cls_score": 7, "bbox_pred": 28, "mask_fcn_logits": 7}
    blobs = {}
    for blob, shape in detectron_shapes(name).items():
        size = [narrow.get(side, side) for side in shape]
        size[0] = rows.get(blob[:-2], size[0])
        blobs[blob] = torch.rand(size, generator=generator) / 10
    wide, few = torch.rand(512, 8, 2, 2), torch.rand(7, 8, 1, 1)
    return blobs | {"conv5_mask_w": wide, "conv5_mask_b": wide[0, :, 0, 0], "mask_fcn_logits_w": few}


def test_detectrons_blobs_by_hand():
    """The background leads, deltas and masks have unused rows for it, and norms are a scale and a shift."""
    name = "maskrcnn_resnet50_c4_detectron1"
    model, blobs = small(name), blobs_for(name)
    load_detectron(model, blobs)
    assert torch.equal(model.box_head.class_logits.weight, blobs["cls_score_w"])
    assert torch.equal(model.box_head.deltas.weight, blobs["bbox_pred_w"][4:])
    assert torch.equal(model.mask_head.mask_logits.bias, blobs["mask_fcn_logits_b"][1:])
    x = torch.rand(1, 64, 5, 5)
    expected = x * blobs["res2_0_branch1_bn_s"][:, None, None] + blobs["res2_0_branch1_bn_b"][:, None, None]
    torch.testing.assert_close(model.backbone.resnet.c2[0].shortcut[1](x), expected)
    assert torch.equal(model.res5.blocks[2].conv3.weight, blobs["res5_2_branch2c_w"])


def test_detectrons_anchors_go_by_ratio_first():
    """Its anchor 1 has the first ratio and the second size; here that is the first anchor of the second size."""
    name = "maskrcnn_resnet50_c4_detectron1"
    model, blobs = small(name), blobs_for(name)
    blobs["rpn_cls_logits_b"], blobs["rpn_bbox_pred_b"] = torch.arange(15.0), torch.arange(60.0)
    load_detectron(model, blobs)
    by_size = model.rpn.objectness.bias.reshape(5, 3)
    assert by_size.tolist() == [[size + 5 * ratio for ratio in range(3)] for size in range(5)]
    deltas = model.rpn.deltas.bias.reshape(5, 3, 4)
    assert deltas[1, 0].tolist() == [4, 5, 6, 7] and deltas[0, 1].tolist() == [20, 21, 22, 23]


# ---------------------------------------------------------------------------------------------------------------------
# Pickled files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_are_read_from_every_protocol(tmp_path, protocol):
    arrays = OrderedDict(
        a=np.arange(6, dtype=np.float32).reshape(2, 3),
        b=np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        c=np.array(7, dtype=np.int64),
        d=np.arange(3, dtype=">f4"),
        e=np.zeros((0, 2), dtype=np.float16),
    )
    for wrap in (lambda x: x, lambda x: {"model": x, "__author__": "me"}, lambda x: {"blobs": x, "cfg": "TEST: 1"}):
        (tmp_path / "weights.pkl").write_bytes(pickle.dumps(wrap(arrays), protocol))
        found = read_weights(tmp_path / "weights.pkl")
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            assert found[name].shape == array.shape and found[name].tolist() == array.tolist()


def test_a_file_of_python_2_by_hand(tmp_path):
    """Strings without an encoding, as Detectron's files have them: one array of two floats, 1.0 and 0.5."""
    program = (
        b"(dp0\nS'blobs'\np1\n(dp2\nS'w'\np3\n"
        b"cnumpy.core.multiarray\n_reconstruct\np4\n(cnumpy\nndarray\np5\n(I0\ntS'b'\ntRp6\n"
        b"(I1\n(I2\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
        b"I00\nS'\\x00\\x00\\x80?\\x00\\x00\\x00?'\ntbss."
    )
    (tmp_path / "python2.pkl").write_bytes(program)
    assert read_weights(tmp_path / "python2.pkl")["w"].tolist() == [1.0, 0.5]


class Evil:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_in_a_file_is_executed(tmp_path, wrapped):
    import os

    for call in ((os.mkdir, str(tmp_path / "harm")), (eval, "1 + 1"), (getattr, "a", "upper"), (np.load, "x")):
        content = {"w": Evil(*call)}
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": content} if wrapped else content))
        with pytest.raises(ValueError, match=r"is not a file of weights: it calls for "):
            read_weights(tmp_path / "evil.pkl")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": np.array([object()], dtype=object)}, "no numbers"),
        ({"w": np.array(["text"])}, "no numbers"),
        ({"w": np.zeros(2, dtype=[("x", "f4")])}, "no numbers"),
        ({"w": "text"}, "arrays by name, got str for 'w'"),
        ({3: np.zeros(1)}, "arrays by name, got Tensor for 3"),
        ([np.zeros(1)], "a dict of weights by name, got list"),
    ],
)
def test_what_is_no_weights_is_refused(tmp_path, content, message):
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "weights.pkl")


def test_broken_files_are_refused(tmp_path):
    good = pickle.dumps({"w": np.arange(100.0)})
    for content in (
        b"",
        good[:-20],
        good.replace(b"w", b"\xff", 1),
        b"not a pickle",
        np.random.default_rng(0).bytes(999),
    ):
        (tmp_path / "broken.pkl").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.pkl"):
            read_weights(tmp_path / "broken.pkl")
    with pytest.raises(OSError):
        read_weights(tmp_path / "absent.pkl")


def test_files_of_pytorch_are_read_too(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "iteration": 3}, tmp_path / "weights.pth")
    assert read_weights(tmp_path / "weights.pth")["w"].tolist() == [1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# detectron2 itself, where it is installed
# ---------------------------------------------------------------------------------------------------------------------

ZOO = {
    "maskrcnn_resnet50_c4_detectron2": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
    "maskrcnn_resnet50_dc5_detectron2": "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x.yaml",
    "maskrcnn_resnet50_fpn_detectron2": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "maskrcnn_resnet101_fpn_detectron2": "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml",
    "maskrcnn_resnext101_32x8d_fpn_detectron2": "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml",
    "keypointrcnn_resnet50_fpn_detectron2": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "keypointrcnn_resnet101_fpn_detectron2": "COCO-Keypoints/keypoint_rcnn_R_101_FPN_3x.yaml",
    "keypointrcnn_resnext101_32x8d_fpn_detectron2": "COCO-Keypoints/keypoint_rcnn_X_101_32x8d_FPN_3x.yaml",
}
LOSSES = {
    "objectness": "loss_rpn_cls",
    "rpn_box": "loss_rpn_loc",
    "classification": "loss_cls",
    "box": "loss_box_reg",
    "mask": "loss_mask",
    "keypoint": "loss_keypoint",
}
EVERY = 10**6  # more than there are: nothing is left to chance


def theirs(name: str) -> torch.nn.Module:
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2 import model_zoo
    from detectron2.modeling import build_model as build

    config = model_zoo.get_config(ZOO[name], trained=False)
    config.merge_from_list(
        ["MODEL.DEVICE", "cpu", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", EVERY, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64,
         "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20,
         "MODEL.RPN.POST_NMS_TOPK_TEST", 40, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0125,
         "TEST.DETECTIONS_PER_IMAGE", 10]
    )  # fmt: skip
    torch.manual_seed(0)
    model = build(config)
    for module in model.modules():  # statistics as of real activations, so that rounding does not grow
        if type(module).__name__ == "FrozenBatchNorm2d":
            module.register_forward_pre_hook(settle)
    with torch.no_grad():
        model.eval()([as_input(image) for image in pictures()])
    for module in model.modules():
        module._forward_pre_hooks.clear()
    sure = 2 if name.startswith("keypoint") else 6  # of one class all scores would be 1 but for rounding
    for key, value in model.named_parameters():  # larger last layers: scores without ties, and no sigmoid of 1
        for part, scale in {"objectness_logits": 4, "anchor_deltas": 5, "cls_score": sure, "bbox_pred": 5}.items():
            if f"{part}.weight" in key:
                value.data.mul_(scale)
    return model


def settle(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
    x = inputs[0]
    if len(x) > 0:
        module.running_mean.copy_(x.mean(dim=(0, 2, 3)))
        module.running_var.copy_(x.var(dim=(0, 2, 3)) + 1e-3)


def pictures() -> list[torch.Tensor]:
    """RGB images of whole numbers, 96 x 128, smooth enough to look like something."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(2, 3, 12, 16, generator=generator) * 255
    return list(torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear").round())


def as_input(image: torch.Tensor) -> dict:
    return {"image": image.flip(0), "height": image.shape[1], "width": image.shape[2]}


def ours(name: str) -> ModelConfig:
    config = MODELS[name]
    return replace(
        config,
        rpn=replace(config.rpn, batch_per_image=EVERY, post_nms=(20, 40)),
        box=replace(
            config.box, rois_per_image=64, positive_fraction=1.0, score_threshold=0.0125, detections_per_image=10
        ),
    )


def objects(keypoints: bool) -> list[Target]:
    targets = []
    for shift in (0.0, 9.0):
        boxes = torch.tensor([[10.0, 12.0, 70.0, 60.0], [40.0, 30.0, 120.0, 90.0]]) + shift / 2
        masks = torch.zeros(2, 96, 128, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist()):
            mask[y1 : (y1 + 2 * y2) // 3, x1:x2] = True
        joints = None
        if keypoints:
            place = torch.rand(2, 17, 2, generator=torch.Generator().manual_seed(2))
            xy = boxes[:, None, :2] + place * (boxes[:, None, 2:] - boxes[:, None, :2])
            joints = torch.cat([xy, torch.full((2, 17, 1), 2.0)], dim=2)
        labels = torch.tensor([1, 1]) if keypoints else torch.tensor([3, 17])
        targets.append(Target(boxes, labels, masks, joints))
    return targets


def as_instances(target: Target):
    from detectron2.structures import BitMasks, Boxes, Instances, Keypoints

    instances = Instances((96, 128))
    instances.gt_boxes, instances.gt_classes = Boxes(target.boxes), target.labels - 1
    if target.keypoints is None:
        instances.gt_masks = BitMasks(target.masks)
    else:
        instances.gt_keypoints = Keypoints(target.keypoints)
    return instances


def first_stage(model: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Objectness [B, N] and deltas [B, N, 4] of detectron2's RPN, in the order of its anchors."""
    generator = model.proposal_generator
    features = model.backbone(pixels.to(model.pixel_mean.dtype))
    logits, deltas = generator.rpn_head([features[name] for name in generator.in_features])
    return (
        torch.cat([part.permute(0, 2, 3, 1).flatten(1) for part in logits], dim=1),
        torch.cat([part.permute(0, 2, 3, 1).reshape(len(part), -1, 4) for part in deltas], dim=1),
    )


@pytest.mark.parametrize("name", ZOO)
def test_the_whole_model_is_detectron2s(name):
    """Names, losses and detections, at shared random weights, with every anchor and roi in the sample."""
    other = theirs(name)
    state = other.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == detectron2_shapes(name)
    model = build_model(ours(name))
    load_detectron2(model, state)
    person = name.startswith("keypoint")
    targets, batch = objects(person), ImageBatch.collate([image / 255 for image in pictures()])
    inputs = [as_input(image) | {"instances": as_instances(target)} for image, target in zip(pictures(), targets)]
    from detectron2.utils.events import EventStorage

    with torch.no_grad(), EventStorage():
        expected = other.train()(inputs)
        found = model(batch, targets)
    assert set(expected) == {LOSSES[key] for key in found}
    for key, value in found.items():
        torch.testing.assert_close(value, expected[LOSSES[key]], rtol=1e-3, atol=1e-4)
    other.eval(), model.eval()
    with torch.no_grad():
        pixels = other.preprocess_image(inputs).tensor
        torch.testing.assert_close(model.normalise(batch), pixels, rtol=0, atol=1e-4)
        # Rounding grows through random layers, and a roi 1e-4 px wider may have one sample more in each bin: so the
        # layers are compared in float64, the proposals from the same logits, the detections on the same proposals.
        exact, expected = (
            model.double().rpn(model.backbone(pixels.double()), (96, 128)),
            first_stage(other.double(), pixels),
        )
        for found, wanted in zip((exact.objectness, exact.deltas), expected):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
        model.float(), other.float()
        objectness, deltas = first_stage(other, pixels)
        guess = model.rpn(model.backbone(pixels), (96, 128))._replace(objectness=objectness, deltas=deltas)
        own = model.propose(guess, batch)
        pictured = other.preprocess_image(inputs)
        proposed, _ = other.proposal_generator(pictured, other.backbone(pixels))
        given = [Proposals(part.proposal_boxes.tensor, part.objectness_logits) for part in proposed]
        instances = other.inference(inputs, do_postprocess=False)
        detections = model(batch, proposals=given)
    for part, wanted in zip(own, given):
        torch.testing.assert_close(part.boxes, wanted.boxes, rtol=0, atol=1e-3)
    assert sum(map(len, detections)) > 10
    for part, theirs_ in zip(detections, instances):
        torch.testing.assert_close(part.boxes, theirs_.pred_boxes.tensor, rtol=0, atol=0.02)
        torch.testing.assert_close(part.scores, theirs_.scores, rtol=1e-3, atol=1e-5)
        assert torch.equal(part.labels, theirs_.pred_classes + 1)
        if person:
            torch.testing.assert_close(part.keypoints[..., :2], theirs_.pred_keypoints[..., :2], rtol=0, atol=1.0)
        else:
            torch.testing.assert_close(part.mask_probs, theirs_.pred_masks[:, 0], rtol=1e-3, atol=1e-3)
