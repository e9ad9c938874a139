"""Configs: the presets against what each implementation chose, values by hand, JSON by law, mistakes by name."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrcnn_edu.config import (
    BackboneConfig,
    BoxHeadConfig,
    Config,
    DataConfig,
    KeypointHeadConfig,
    MaskHeadConfig,
    ModelConfig,
    RPNConfig,
    TrainConfig,
)
from mrcnn_edu.conventions import CONVENTIONS, PAPER, Conventions
from mrcnn_edu.data.coco import Category, CategoryMap
from mrcnn_edu.fields import from_json, lookup, to_json
from mrcnn_edu.presets import MODELS, PRESETS, for_categories, model_config, preset

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ONE = (1.0, 1.0, 1.0)

# What each implementation does, read from its source: paper, Detectron, detectron2, torchvision.
TABLE = {
    "channel_order": ("rgb", "bgr", "bgr", "rgb"),
    "pixel_range": (1, 255, 255, 1),
    "pixel_mean": (IMAGENET[0], (102.9801, 115.9465, 122.7717), (103.53, 116.28, 123.675), IMAGENET[0]),
    "pixel_std": (IMAGENET[1], ONE, ONE, IMAGENET[1]),
    "stride_in": ("1x1", "1x1", "1x1", "3x3"),
    "frozen_norm_eps": (1e-5, 1e-5, 1e-5, 1e-5),
    "anchor_rounding": ("none", "grid", "none", "corners"),
    "anchor_stride": ("level", "level", "level", "image/grid"),
    "straddle": (None, 0.0, None, None),
    "plus_one": (False, True, False, False),
    "proposal_min_size": (0.0, 1.0, 0.0, 1e-3),
    "detection_min_size": (0.0, 0.0, 0.0, 1e-2),
    "crowd_overlap": (0.7, 0.7, None, None),
    "level_rule": ("plain", "inside", "inside", "outside"),
    "level_epsilon": (0.0, 1e-6, 1e-8, 1e-6),
    "aligned": (True, False, True, False),
    "samples_per_bin": (2, 2, 0, 2),
    "rpn_box_beta": (1.0, 1 / 9, 0.0, 1 / 9),
    "box_beta": (1.0, 1.0, 0.0, 1 / 9),
    "rpn_loss_divisor": ("sampled", "batch", "batch", "sampled"),
    "mask_target": ("binary", "binary", "binary", "soft"),
    "mask_target_aligned": (True, True, True, False),
    "paste": ("continuous", "integer", "continuous", "integer"),
    "keypoint_rois": ("visible", "visible", "visible", "all"),
    "background": ("first", "first", "last", "first"),
    "bias_lr_factor": (1.0, 2.0, 1.0, 1.0),
    "bias_decay": (True, False, True, True),
}


@pytest.mark.parametrize("field", TABLE)
def test_conventions_against_the_table(field):
    for name, expected in zip(("paper", "detectron1", "detectron2", "torchvision"), TABLE[field]):
        assert getattr(CONVENTIONS[name], field) == expected, name


def test_the_table_is_complete():
    assert set(TABLE) == {field.name for field in fields(Conventions)}
    assert set(CONVENTIONS) == {"paper", "detectron1", "detectron2", "torchvision"}
    assert Conventions() == PAPER


def test_the_paper_by_hand():
    """Section 3.1 and Appendix B: 512 rois of which a quarter are positive, 100 detections, 0.02 for 120k of 160k."""
    model, train = ModelConfig(), TrainConfig()
    assert (model.box.rois_per_image, model.box.positive_fraction, model.box.positive_iou) == (512, 0.25, 0.5)
    assert model.box.detections_per_image == 100
    assert model.rpn.anchor_sizes == ((32,), (64,), (128,), (256,), (512,))  # five scales
    assert model.rpn.anchor_ratios == (0.5, 1.0, 2.0)  # and three ratios
    assert (model.rpn.positive_iou, model.rpn.negative_iou, model.rpn.nms_threshold) == (0.7, 0.3, 0.7)
    assert (train.batch_size, train.learning_rate, train.momentum, train.weight_decay) == (16, 0.02, 0.9, 1e-4)
    assert (train.iterations, train.steps, train.gamma) == (160_000, (120_000,), 0.1)
    assert KeypointHeadConfig().convs == (512,) * 8 and KeypointHeadConfig().joints == 17
    keypoints = PRESETS["keypointrcnn_resnet50_fpn"]
    assert (keypoints.train.iterations, keypoints.train.steps) == (90_000, (60_000, 80_000))
    assert (min(keypoints.data.min_size), max(keypoints.data.min_size)) == (640, 800)


# Names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rules", CONVENTIONS)
def test_every_preset_exists_under_every_conventions(name, rules):
    config = preset(name, rules)
    assert config.model.conventions is CONVENTIONS[rules]
    assert replace(config.model, conventions=PAPER) == replace(MODELS[name], conventions=PAPER)
    assert model_config(name, rules) == config.model


def test_names_are_corrected():
    with pytest.raises(ValueError, match="unknown preset 'maskrcnn_shape', did you mean 'maskrcnn_shapes'"):
        preset("maskrcnn_shape")
    with pytest.raises(ValueError, match="unknown model 'fasterrcnn', did you mean 'fasterrcnn_resnet50_fpn'"):
        model_config("fasterrcnn")
    with pytest.raises(ValueError, match="unknown conventions 'detectron3', did you mean 'detectron"):
        preset("maskrcnn_shapes", "detectron3")
    with pytest.raises(ValueError, match=r"unknown colour 'zzz'\. Known: red, blue$"):
        lookup("colour", {"red": 1, "blue": 2}, "zzz")


def test_a_model_is_changed_by_its_fields():
    config = model_config("maskrcnn_resnet50_fpn", "torchvision", classes=3, mask=None)
    assert config.classes == 3 and config.mask is None and config.conventions.aligned is False
    assert MODELS["maskrcnn_resnet50_fpn"].classes == 80
    with pytest.raises(TypeError, match="clases"):
        model_config("maskrcnn_resnet50_fpn", clases=3)


def categories(*joints: int) -> CategoryMap:
    return CategoryMap(
        tuple(
            Category(10 * i, f"thing {i}", tuple(f"joint {j}" for j in range(count))) for i, count in enumerate(joints)
        )
    )


def test_categories_decide_classes_and_joints():
    model = preset("maskrcnn_shapes", categories=categories(0, 5, 0, 5)).model
    assert model.classes == 4
    assert (model.keypoint.joints, model.keypoint.labels) == (5, (2, 4))
    assert preset("maskrcnn_shapes", categories=categories(0, 0)).model.keypoint is None
    plain = for_categories(MODELS["maskrcnn_resnet50_fpn"], categories(5))  # no branch is added
    assert plain.classes == 1 and plain.keypoint is None


def test_one_branch_has_one_number_of_joints():
    with pytest.raises(ValueError, match=r"one number of joints, got \(label: joints\) \{1: 5, 3: 17\}"):
        for_categories(MODELS["maskrcnn_shapes"], categories(5, 0, 17))


# Fields ---------------------------------------------------------------------------------------------


KINDS = (
    *(Conventions, BackboneConfig, RPNConfig, BoxHeadConfig, MaskHeadConfig, KeypointHeadConfig),
    *(ModelConfig, DataConfig, TrainConfig, Config),
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_configs_are_frozen_comparable_and_refuse_misspelt_fields(kind):
    config = kind()
    assert config == kind() and hash(config) == hash(kind())
    for field in fields(kind):
        with pytest.raises(FrozenInstanceError):
            setattr(config, field.name, None)
    with pytest.raises(TypeError, match="no_such_field"):
        kind(no_such_field=1)


NAN, INF = float("nan"), float("inf")

BAD = [
    (Conventions, {"channel_order": "gbr"}, "unknown Conventions.channel_order 'gbr', did you mean"),
    (Conventions, {"pixel_range": 256}, "pixel_range must be 1 or 255, got 256"),
    (Conventions, {"pixel_range": "255"}, "pixel_range must be 1 or 255, got '255'"),
    (Conventions, {"pixel_std": (1, 0, 1)}, "three positive numbers"),
    (Conventions, {"stride_in": "5x5"}, "stride_in"),
    (Conventions, {"frozen_norm_eps": -1e-5}, "at least 0"),
    (Conventions, {"anchor_rounding": "corner"}, "did you mean 'corners'"),
    (Conventions, {"anchor_stride": "grid"}, "anchor_stride"),
    (Conventions, {"level_rule": "insid"}, "did you mean 'inside'"),
    (Conventions, {"samples_per_bin": -1}, "0 \\(adaptive\\) or a positive number, got -1"),
    (Conventions, {"rpn_box_beta": -1.0}, "rpn_box_beta must be at least 0"),
    (Conventions, {"box_beta": NAN}, "box_beta must be at least 0, got nan"),
    (Conventions, {"rpn_loss_divisor": "sample"}, "did you mean 'sampled'"),
    (Conventions, {"mask_target": "polygon"}, "unknown Conventions.mask_target 'polygon'"),
    (Conventions, {"paste": None}, "unknown Conventions.paste 'None'"),
    (Conventions, {"keypoint_rois": "al"}, "did you mean 'all'"),
    (Conventions, {"background": "zero"}, "Known: first, last"),
    (BackboneConfig, {"architecture": "resnet51"}, "did you mean 'resnet50'"),
    (BackboneConfig, {"width": 0}, "at least 1"),
    (BackboneConfig, {"stem": "5x5"}, "stem"),
    (BackboneConfig, {"norm": "layer"}, "Known: frozen, batch, group"),
    (BackboneConfig, {"frozen_stages": 6}, "0 to 5, got 6"),
    (BackboneConfig, {"frozen_stages": -1}, "0 to 5"),
    (BackboneConfig, {"channels": 0}, "channels must be at least 1"),
    (BackboneConfig, {"roi_level_size": 0.0}, "positive number of pixels"),
    (BackboneConfig, {"features": "c3"}, "did you mean 'c"),
    (BackboneConfig, {"levels": ()}, "consecutive levels"),
    (BackboneConfig, {"levels": ("p2", "p4", "p5")}, "consecutive levels"),
    (BackboneConfig, {"levels": ("p5", "p4")}, "consecutive levels"),
    (BackboneConfig, {"levels": ("p1", "p2")}, "consecutive levels"),
    (BackboneConfig, {"levels": ("p5", "p6", "p7")}, "consecutive levels"),
    (BackboneConfig, {"levels": ("p2", "p3", "p4")}, "includes p5"),
    (RPNConfig, {"anchor_sizes": ((32,), (0,))}, "positive pixel sizes"),
    (RPNConfig, {"anchor_ratios": ()}, "positive ratios"),
    (RPNConfig, {"anchor_ratios": (1.0, -1.0)}, "positive ratios"),
    (RPNConfig, {"negative_iou": 0.8}, "negative_iou <= positive_iou"),
    (RPNConfig, {"positive_iou": 1.1}, "negative_iou <= positive_iou <= 1"),
    (RPNConfig, {"batch_per_image": 0}, "at least 1"),
    (RPNConfig, {"positive_fraction": 1.5}, "0 to 1"),
    (RPNConfig, {"pre_nms": (0, 1000)}, r"pre_nms must be two counts of at least 1, got \(0, 1000\)"),
    (RPNConfig, {"post_nms": (1000, 0)}, r"post_nms must be two counts of at least 1, got \(1000, 0\)"),
    (RPNConfig, {"nms_threshold": -0.1}, "nms_threshold must be 0 to 1"),
    (BoxHeadConfig, {"rois_per_image": 0}, "at least 1"),
    (BoxHeadConfig, {"positive_fraction": -0.1}, "0 to 1"),
    (BoxHeadConfig, {"positive_iou": 2.0}, "0 to 1"),
    (BoxHeadConfig, {"pooled_size": 0}, "at least 1"),
    (BoxHeadConfig, {"layer": "roialign"}, "did you mean 'roi_align'"),
    (BoxHeadConfig, {"fc": (1024, 0)}, "positive widths"),
    (BoxHeadConfig, {"mode": "average"}, "Known: mean, max"),
    (BoxHeadConfig, {"sampling": "hard"}, "did you mean 'hardest'"),
    (BoxHeadConfig, {"hardest_nms": 1.1}, "0 to 1"),
    (BoxHeadConfig, {"res5_stride": 3}, "res5_stride must be 1 or 2, got 3"),
    (BoxHeadConfig, {"delta_weights": (10.0, 10.0, 5.0, 0.0)}, "four positive numbers"),
    (BoxHeadConfig, {"score_threshold": 5}, "0 to 1"),
    (BoxHeadConfig, {"nms_threshold": NAN}, "0 to 1"),
    (BoxHeadConfig, {"detections_per_image": 0}, "at least 1"),
    (MaskHeadConfig, {"pooled_size": 0}, "at least 1"),
    (MaskHeadConfig, {"layer": "pool"}, "did you mean 'roi_pool'"),
    (MaskHeadConfig, {"convs": (256, 0)}, "positive widths"),
    (MaskHeadConfig, {"deconv": 0}, "None or at least 1"),
    (MaskHeadConfig, {"branch": "fc"}, "Known: fcn, mlp"),
    (MaskHeadConfig, {"fc": ()}, "one or more positive widths"),
    (MaskHeadConfig, {"size": 0}, "at least 1"),
    (MaskHeadConfig, {"classes": "all"}, "Known: specific, agnostic"),
    (MaskHeadConfig, {"loss": "multinomial"}, "Known: sigmoid, softmax"),
    (MaskHeadConfig, {"mode": "sum"}, "Known: mean, max"),
    (MaskHeadConfig, {"rois_per_image": 0}, "None or at least 1"),
    (KeypointHeadConfig, {"joints": 0}, "at least 1"),
    (KeypointHeadConfig, {"labels": (0,)}, "class labels of at least 1"),
    (KeypointHeadConfig, {"pooled_size": 0}, "at least 1"),
    (KeypointHeadConfig, {"layer": ""}, "Known: roi_align, roi_warp, roi_pool"),
    (KeypointHeadConfig, {"convs": (0,)}, "one or more positive widths"),
    (KeypointHeadConfig, {"rois_per_image": 0}, "None or at least 1"),
    (ModelConfig, {"classes": 0}, "at least 1 foreground class"),
    (ModelConfig, {"head_norm": "layer"}, "Known: none, batch, group"),
    (ModelConfig, {"backbone": BackboneConfig(levels=("p4", "p5"))}, "one entry per backbone level, got 5 for the 2"),
    (ModelConfig, {"backbone": BackboneConfig(features="c5")}, "got 5 for the 1 levels c5"),
    (ModelConfig, {"keypoint": KeypointHeadConfig(labels=(3,)), "classes": 2}, r"keypoint.labels must lie in 1\.\.2"),
    (DataConfig, {"min_size": ()}, "one or more positive sizes"),
    (DataConfig, {"min_size": (0,)}, "one or more positive sizes"),
    (DataConfig, {"max_size": 799}, "at least the largest min_size, got 799"),
    (DataConfig, {"test_size": 1334}, "1 to max_size"),
    (DataConfig, {"flip": 1.1}, "a probability"),
    (DataConfig, {"channel_shuffle": -0.1}, "a probability"),
    (DataConfig, {"workers": -1}, "0 or more"),
    (TrainConfig, {"iterations": 0}, "at least 1"),
    (TrainConfig, {"batch_size": 0}, "at least 1"),
    (TrainConfig, {"optimiser": "adam"}, "did you mean 'adamw'"),
    (TrainConfig, {"learning_rate": 0.0}, "a positive number"),
    (TrainConfig, {"learning_rate": NAN}, "a positive number"),
    (TrainConfig, {"learning_rate": INF}, "a positive number"),
    (TrainConfig, {"momentum": 1.0}, "0 <= momentum < 1"),
    (TrainConfig, {"betas": (0.9, 1.0)}, r"two numbers in \[0, 1\)"),
    (TrainConfig, {"weight_decay": -1e-4}, "at least 0"),
    (TrainConfig, {"weight_decay": INF}, "at least 0"),
    (TrainConfig, {"schedule": "cosinus"}, "did you mean 'cosine'"),
    (TrainConfig, {"steps": (80_000, 60_000)}, "increasing iterations"),
    (TrainConfig, {"steps": (60_000, 60_000)}, "increasing iterations"),
    (TrainConfig, {"gamma": 0.0}, "0 < gamma <= 1"),
    (TrainConfig, {"warmup_iterations": -1}, "0 or more"),
    (TrainConfig, {"warmup_factor": 0.0}, "0 < factor <= 1"),
    (TrainConfig, {"clip_norm": 0.0}, "None or a positive number"),
    (TrainConfig, {"average": 1.0}, "below 1"),
    (TrainConfig, {"precision": "fp8"}, "did you mean 'fp"),
    (TrainConfig, {"log_every": 0}, "at least 1"),
    (TrainConfig, {"evaluate_every": -1}, r"evaluate_every must be 0 \(never\) or a positive number"),
    (TrainConfig, {"validate_every": -1}, "validate_every must be"),
    (TrainConfig, {"checkpoint_every": -1}, "checkpoint_every must be"),
]


@pytest.mark.parametrize(("kind", "values", "message"), BAD, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_bad_values_are_refused_where_they_are_set(kind, values, message):
    with pytest.raises(ValueError, match=message) as error:
        kind(**values)
    assert next(iter(values)) in str(error.value)
    with pytest.raises(ValueError, match=message):
        replace(kind(), **values)
    with pytest.raises(ValueError, match=message):
        from_json(kind, to_json(kind()) | {k: to_json(v) if is_dataclass(v) else v for k, v in values.items()})


@pytest.mark.parametrize(
    ("kind", "name", "value", "wanted"),
    [
        (DataConfig, "min_size", [800], r"tuple\[int, \.\.\.\], got \[800\]"),
        (DataConfig, "min_size", (800, "a"), "tuple"),
        (DataConfig, "max_size", "1333", "int, got '1333'"),
        (DataConfig, "max_size", 1333.0, r"int, got 1333\.0"),
        (DataConfig, "workers", True, "int, got True"),
        (DataConfig, "train_images", None, "str, got None"),
        (RPNConfig, "pre_nms", (1, 2, 3), r"tuple\[int, int\]"),
        (RPNConfig, "anchor_sizes", ((32,), 64), "tuple"),
        (TrainConfig, "clip_norm", "5", r"float \| None, got '5'"),
        (TrainConfig, "loss_weights", {}, "LossWeights, got {}"),
        (ModelConfig, "conventions", "paper", "Conventions, got 'paper'"),
        (ModelConfig, "mask", 5, r"MaskHeadConfig \| None, got 5"),
    ],
)
def test_values_of_another_type_are_refused_where_they_are_set(kind, name, value, wanted):
    with pytest.raises(TypeError, match=rf"^{kind.__name__}\.{name} must be {wanted}"):
        kind(**{name: value})


def test_branches_that_share_res5_share_their_pooling():
    """On C4 res5 sees each roi once: it cannot be pooled in one way for the box and in another for the mask."""
    config = MODELS["maskrcnn_resnet50_c4"]
    pooled = replace(config.box, layer="roi_pool")
    with pytest.raises(ValueError, match=r"mask.layer must be box.layer on C4, .* got 'roi_align' and 'roi_pool'"):
        replace(config, box=pooled)
    assert replace(config, box=pooled, mask=None).box.layer == "roi_pool"
    with pytest.raises(ValueError, match=r"keypoint.pooled_size must be box.pooled_size on C4, .* got 14 and 7"):
        replace(config, keypoint=KeypointHeadConfig())


def test_released_models_differ_from_the_paper_where_the_table_says_so():
    """Rois per image 64 or 512, test proposals 300 or 1000, NMS 0.3 or 0.5, 7 x 7 and stride 1 or 14 x 14 and 2."""

    def numbers(name):
        model = MODELS[name]
        box = model.box
        return box.rois_per_image, model.rpn.post_nms[1], box.nms_threshold, box.pooled_size, box.res5_stride

    assert numbers("maskrcnn_resnet50_c4") == (64, 300, 0.3, 7, 1)
    for name in ("maskrcnn_resnet50_c4_detectron1", "maskrcnn_resnet50_c4_detectron2"):
        assert numbers(name) == (512, 1000, 0.5, 14, 2)
        assert MODELS[name].rpn.pre_nms == (12_000, 6000) and MODELS[name].rpn.post_nms[0] == 2000
        assert MODELS[name].conventions.samples_per_bin == 0  # as many samples as a bin has cells
    for implementation, kept in {"detectron1": 2000, "detectron2": 1000}.items():
        rpn = MODELS[f"maskrcnn_resnet50_fpn_{implementation}"].rpn
        assert (rpn.pre_nms, rpn.post_nms) == ((2000, 1000), (kept, 1000))
    assert MODELS["maskrcnn_resnext101_32x8d_fpn_detectron2"].conventions.pixel_std == (57.375, 57.12, 58.395)
    for architecture in ("resnet50", "resnet101", "resnext101_32x8d"):
        person = MODELS[f"keypointrcnn_{architecture}_fpn_detectron2"]
        assert person.conventions.box_beta == 0.5 and person.rpn.post_nms == (1500, 1000)


# JSON -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("rules", CONVENTIONS)
def test_presets_come_back_from_json(name, rules):
    config = preset(name, rules)
    assert from_json(Config, to_json(config)) == config
    assert from_json(Config, json.loads(json.dumps(to_json(config)))) == config


@given(
    st.builds(
        TrainConfig,
        iterations=st.integers(1, 10**9),
        learning_rate=st.floats(1e-30, 1e30),
        steps=st.sets(st.integers(0, 10**6), max_size=4).map(lambda s: tuple(sorted(s))),
        clip_norm=st.none() | st.floats(1e-3, 1e3),
        precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    )
)
def test_numbers_come_back_from_json_exactly(train):
    config = Config(train=train)
    assert from_json(Config, json.loads(json.dumps(to_json(config)))) == config


def test_what_json_leaves_out_is_the_default():
    assert from_json(Config, {}) == Config()
    config = from_json(Config, {"model": {"mask": None, "rpn": {"batch_per_image": 8}}, "train": {"steps": [5, 9]}})
    assert config.model.mask is None and config.model.rpn == RPNConfig(batch_per_image=8)
    assert config.train == TrainConfig(steps=(5, 9))


def test_bad_json_is_refused_by_its_place():
    with pytest.raises(ValueError, match="unknown field of config 'modle', did you mean 'model'"):
        from_json(Config, {"modle": {}})
    with pytest.raises(ValueError, match=r"unknown field of config\.model\.rpn 'nms_treshold', did you mean 'nms_thre"):
        from_json(Config, {"model": {"rpn": {"nms_treshold": 0.5}}})
    with pytest.raises(TypeError, match=r"config\.model\.box must be an object with the fields of BoxHeadConfig, got"):
        from_json(Config, {"model": {"box": [1, 2]}})
    with pytest.raises(TypeError, match=r"config must be an object .* got list"):
        from_json(Config, [])
    with pytest.raises(ValueError, match=r"BoxHeadConfig\.pooled_size must be at least 1, got 0"):
        from_json(Config, {"model": {"box": {"pooled_size": 0}}})
