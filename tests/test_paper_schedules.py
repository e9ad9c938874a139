"""The paper, sentence by sentence: what it fixes about schedules, data and procedures.

Each test quotes or sums up one sentence, is named by its section and looks at what the code does: the rate that is
returned, the sizes that are drawn, the images that are batched. What it fixes about the model has a file of its own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import training_runs
from torch import nn

from mrcnn_edu.augmentation import Augmentation, views
from mrcnn_edu.config import Config, DataConfig, TrainConfig
from mrcnn_edu.data.coco import Category, CategoryMap, CocoDataset
from mrcnn_edu.data.loading import train_loader
from mrcnn_edu.data.parts import with_keypoints
from mrcnn_edu.data.shapes import write
from mrcnn_edu.data.transforms import Augment, resized
from mrcnn_edu.experiments import EXPERIMENTS, ROWS
from mrcnn_edu.losses import HEAD_LOSSES, RPN_LOSSES
from mrcnn_edu.training.distillation import expected_counts, select
from mrcnn_edu.training.schedule import build_optimiser, learning_rate
from mrcnn_edu.training.stages import END_TO_END, FOUR_STEP, PROCEDURES, STAGEWISE, origin, proposer
from mrcnn_edu.transfer import CITYSCAPES_FROM_COCO, match_names

LANDSCAPE = (480, 640)  # px, height and width, the usual size of COCO's images
BASE = EXPERIMENTS["table2a/resnet-50-fpn"]
C4 = EXPERIMENTS["table2a/resnet-50-c4"]
RESNEXT = EXPERIMENTS["table2a/resnext-101-fpn"]
PERSON = EXPERIMENTS["table4/keypoint"]
FINE, TUNED = EXPERIMENTS["table7/fine"], EXPERIMENTS["table7/fine-coco"]
TRAINED = [row for row in ROWS if row.config is not None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    folder = write(tmp_path_factory.mktemp("shapes") / "data", train=20, val=1, size=(24, 32), seed=1)
    return training_runs.datasets(folder)[0]


def sizes_drawn(config: DataConfig, size: tuple[int, int], count: int = 400) -> list[tuple[int, int]]:
    """(height, width) of an image of that size, as often as it comes up in training."""
    augment, drawn = Augment.for_training(config), []
    for seed in range(count):
        choice = augment.draw(torch.Generator().manual_seed(seed))
        drawn.append(resized(size, choice.min_size, augment.max_size))
    return drawn


def rates(train: TrainConfig) -> dict[float, tuple[int, int]]:
    """The first and last iteration of each learning rate, once it is warm; the last rate reaches to the end."""
    found: dict[float, tuple[int, int]] = {}
    looked_at = range(0, train.iterations + 1, 500)
    for iteration in sorted({*looked_at, *(iteration - 1 for iteration in looked_at)}):
        if not train.warmup_iterations <= iteration < train.iterations:
            continue
        rate = round(learning_rate(iteration, train), 10)
        found[rate] = (found.get(rate, (iteration, 0))[0], iteration)
    return found


def assert_falls(train: TrainConfig, start: float, steps: tuple[int, ...], end: int) -> None:
    """The rate is ``start``, divided by ten from each step on, for ``end`` iterations."""
    found = rates(train)
    assert list(found) == pytest.approx([start / 10**number for number in range(len(steps) + 1)])
    assert [first for first, _ in found.values()][1:] == list(steps)
    assert [last + 1 for _, last in found.values()] == [*steps, end]


def batch_of(config: Config, data: CocoDataset, world: int = 1, rank: int = 0) -> int:
    """The images that the loader really puts into one iteration of one process."""
    small = replace(config.data, min_size=(24,), max_size=32, test_size=24, workers=0)
    batch, targets, image_ids = next(train_loader(data, small, config.train.batch_size, seed=0, rank=rank, world=world))
    assert len(batch) == len(targets) == len(image_ids)
    return len(batch)


# Section 3.1 ---------------------------------------------------------------------------------------------------------


def test_3_1_images_have_a_shorter_edge_of_800_pixels() -> None:
    """ "Images are resized such that their scale (shorter edge) is 800 pixels"."""
    for row in (BASE, C4, RESNEXT):
        assert {min(size) for size in sizes_drawn(row.config.data, LANDSCAPE)} == {800}
        assert Augment.for_testing(row.config.data).min_sizes == (800,)


def test_3_1_two_images_per_gpu_on_eight_gpus_make_sixteen(data) -> None:
    """ "Each mini-batch has 2 images per GPU ... We train on 8 GPUs (so effective mini-batch size is 16)"."""
    assert batch_of(BASE.config, data) == 16
    assert [batch_of(BASE.config, data, world=8, rank=rank) for rank in range(8)] == [2] * 8


def test_3_1_the_images_of_eight_gpus_are_different_ones(data) -> None:
    small = replace(BASE.config.data, min_size=(24,), max_size=32, test_size=24, workers=0)
    ids = [next(train_loader(data, small, 16, seed=0, rank=rank, world=8))[2] for rank in range(8)]
    assert len({image_id for part in ids for image_id in part}) == 16


def test_3_1_160k_iterations_at_0_02_decreased_by_ten_at_120k() -> None:
    """ "for 160k iterations, with a learning rate of 0.02 which is decreased by 10 at the 120k iteration"."""
    assert_falls(BASE.config.train, 0.02, (120_000,), 160_000)
    assert_falls(C4.config.train, 0.02, (120_000,), 160_000)
    assert_falls(TrainConfig(), 0.02, (120_000,), 160_000)


def test_3_1_weight_decay_and_momentum() -> None:
    """ "We use a weight decay of 0.0001 and momentum of 0.9": in every parameter group of the optimiser."""
    train, rules = BASE.config.train, BASE.config.model.conventions
    optimiser = build_optimiser(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), train, rules)
    assert isinstance(optimiser, torch.optim.SGD) and len(optimiser.param_groups) == 3
    assert {(group["weight_decay"], group["momentum"]) for group in optimiser.param_groups} == {(0.0001, 0.9)}


def test_3_1_released_code_treats_biases_otherwise() -> None:
    """Detectron trains biases at twice the rate and without decay; the paper's words make no difference."""
    from mrcnn_edu.conventions import DETECTRON1

    groups = build_optimiser(nn.Conv2d(3, 4, 3), BASE.config.train, DETECTRON1).param_groups
    assert {group["name"]: (group["lr_factor"], group["weight_decay"]) for group in groups} == {
        "weights": (1.0, 1e-4),
        "biases": (2.0, 0.0),
    }


def test_3_1_resnext_has_1_image_per_gpu_as_many_iterations_and_half_the_rate(data) -> None:
    """ "With ResNeXt, we train with 1 image per GPU and the same number of iterations, with a starting learning rate of
    0.01"."""
    assert [batch_of(RESNEXT.config, data, world=8, rank=rank) for rank in range(8)] == [1] * 8
    assert_falls(RESNEXT.config.train, 0.01, (120_000,), 160_000)


def test_3_1_rpn_is_trained_separately_and_shares_nothing_unless_specified() -> None:
    """ "For convenient ablation, RPN is trained separately and does not share features with Mask R-CNN"."""
    first, second = STAGEWISE
    assert (first.train, first.losses) == (("backbone", "rpn"), RPN_LOSSES)
    assert (second.train, second.losses) == (("backbone", "heads"), HEAD_LOSSES)
    assert origin("backbone", "rpn", STAGEWISE) != origin("backbone", "heads", STAGEWISE)
    assert proposer(STAGEWISE) == "rpn"
    joint = {"table8/e2e", "table8/imagenet-5k", "table8/train-augm", "table8/deeper", "table8/non-local"}
    specified = {row.name: row.procedure for row in TRAINED if row.procedure != "stagewise"}
    assert specified == {
        name: "four-step" if name == "text/four-step" else "end-to-end"
        for name in [*joint, "table8/test-augm", "text/four-step"]
    }


def test_3_1_rpn_and_mask_rcnn_have_the_same_backbones() -> None:
    """ "For every entry in this paper, RPN and Mask R-CNN have the same backbones and so they are shareable": every
    stage trains the one model of the entry's config, of which a stage only chooses parts."""
    for stages in PROCEDURES.values():
        parts = {part for stage in stages for part in stage.train}
        assert parts == {"backbone", "rpn", "heads"}
    assert proposer(FOUR_STEP) is None  # and shared they are


# Section 4 -----------------------------------------------------------------------------------------------------------


def test_4_trained_on_trainval35k_measured_on_minival() -> None:
    """Section 4: 115k training images, 5k to measure on; they are COCO's train2017 and val2017."""
    for row in TRAINED:
        assert row.data in ("coco", "coco-person", "cityscapes")
        assert (row.data == "cityscapes") == (row.table == "table7")


@pytest.mark.parametrize("name", ["table2b/softmax", "table2c/roipool-max", "text/class-agnostic"])
def test_4_2_ablations_on_c4_differ_in_one_thing(name: str) -> None:
    """Section 4.2: Tables 2b and 2c and class-agnostic masks are ResNet-50-C4 under the schedule of Section 3.1."""
    row = EXPERIMENTS[name]
    assert (row.config.train, row.config.data) == (C4.config.train, C4.config.data)
    same = replace(row.config.model, mask=C4.config.model.mask, box=C4.config.model.box)
    assert same == C4.config.model != row.config.model


def test_4_4_four_step_training_shares_the_backbone() -> None:
    """Section 4.4: "a ResNet-101-FPN model that shares features between the RPN and Mask R-CNN stages, following the
    4-step training"."""
    row = EXPERIMENTS["text/four-step"]
    assert row.config.model.backbone.architecture == "resnet101" and row.config.model.backbone.features == "fpn"
    assert PROCEDURES[row.procedure] is FOUR_STEP and len(FOUR_STEP) == 4
    assert [stage.losses for stage in FOUR_STEP] == [RPN_LOSSES, HEAD_LOSSES] * 2
    assert all("backbone" not in stage.train for stage in FOUR_STEP[2:])
    assert origin("backbone", "rpn-3", FOUR_STEP) == origin("backbone", "heads-4", FOUR_STEP) == "heads-2"


def test_4_4_sixteen_images_in_0_72_seconds_are_32_hours() -> None:
    """ "32 hours ... (0.72s per 16-image mini-batch)": that is 160k iterations, the schedule of Section 3.1."""
    row = EXPERIMENTS["text/resnet-50-fpn"]
    assert row.config.train.iterations * 0.72 / 3600 == pytest.approx(row.paper["training hours"])
    assert EXPERIMENTS["text/unshared"].paper["training hours"] == 44


# Section 5 -----------------------------------------------------------------------------------------------------------


def test_5_images_that_contain_annotated_keypoints(data) -> None:
    """ "Models are trained on all COCO trainval35k images that contain annotated keypoints"."""
    chosen = with_keypoints(data)
    assert 0 < len(chosen) < len(data)
    assert all(bool((chosen[index][1].keypoints[..., 2] > 0).any()) for index in range(len(chosen)))
    left_out = set(data.image_ids) - set(chosen.image_ids)
    assert not any(
        bool((data.target(data.image_ids.index(image_id)).keypoints[..., 2] > 0).any()) for image_id in left_out
    )


def test_5_scales_from_640_to_800_in_training_and_800_in_inference() -> None:
    """ "we train using image scales randomly sampled from [640, 800] pixels; inference is on a single scale of 800"."""
    drawn = [min(size) for size in sizes_drawn(PERSON.config.data, LANDSCAPE)]
    assert (min(drawn), max(drawn)) == (640, 800)
    counts = {size: drawn.count(size) for size in set(drawn)}
    assert len(counts) == 6 and min(counts.values()) > 0.5 * len(drawn) / 6  # evenly, in the released code's steps
    assert Augment.for_testing(PERSON.config.data).min_sizes == (800,)


def test_5_90k_iterations_from_0_02_reduced_at_60k_and_80k(data) -> None:
    """ "We train for 90k iterations, starting from a learning rate of 0.02 and reducing it by 10 at 60k and 80k";
    "Other details are identical as in Section 3.1"."""
    for name in ("table4/keypoint", "table4/keypoint-mask", "table6/roipool", "table6/roialign", "table9/original"):
        assert_falls(EXPERIMENTS[name].config.train, 0.02, (60_000, 80_000), 90_000)
    assert batch_of(PERSON.config, data) == 16


def test_table_5_all_entries_are_trained_on_the_same_data() -> None:
    """ "All entries are trained on the same data for fair comparisons"."""
    rows = [EXPERIMENTS[f"table5/{name}"] for name in ("box", "mask", "keypoint", "keypoint-mask")]
    assert {row.data for row in rows} == {"coco-person"}
    assert all((row.config.train, row.config.data) == (PERSON.config.train, PERSON.config.data) for row in rows)
    branches = [(row.config.model.mask is not None, row.config.model.keypoint is not None) for row in rows]
    assert branches == [(False, False), (True, False), (False, True), (True, True)]


# Appendix A ----------------------------------------------------------------------------------------------------------


def test_a_scales_from_800_to_1024_in_training_and_1024_in_inference() -> None:
    """ "image scale (shorter side) randomly sampled from [800, 1024] ...; inference is on a single scale of 1024"."""
    city = (1024, 2048)  # "All images are 2048 x 1024 pixels"
    drawn = sizes_drawn(FINE.config.data, city)
    assert (min(drawn), max(drawn)) == ((800, 1600), (1024, 2048))
    assert len(set(drawn)) == 8
    assert resized(city, FINE.config.data.test_size, FINE.config.data.max_size) == city


def test_a_one_image_per_gpu_24k_iterations_0_01_to_0_001_at_18k(data) -> None:
    """ "a mini-batch size of 1 image per GPU (so 8 on 8 GPUs) and train the model for 24k iterations, starting from a
    learning rate of 0.01 and reducing it to 0.001 at 18k iterations"."""
    assert [batch_of(FINE.config, data, world=8, rank=rank) for rank in range(8)] == [1] * 8
    assert_falls(FINE.config.train, 0.01, (18_000,), 24_000)


def test_a_coco_models_are_tuned_for_4k_iterations_reduced_at_3k() -> None:
    """ "We fine-tune this model for 4k iterations in which the learning rate is reduced at 3k iterations". At which
    rate it starts the paper does not say; ours is the one that the plain run ends with."""
    assert_falls(TUNED.config.train, 0.001, (3_000,), 4_000)
    assert TUNED.config.data == FINE.config.data and TUNED.config.model == FINE.config.model


def test_a_seven_categories_start_as_coco_s_and_rider_at_random() -> None:
    """ "we initialize the corresponding 7 categories in Cityscapes from a pre-trained COCO Mask R-CNN model (rider
    being randomly initialized)"."""
    cityscapes = ["person", "rider", "car", "truck", "bus", "train", "mcycle", "bicycle"]
    coco = ["person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"]
    matches = match_names(cityscapes, coco, CITYSCAPES_FROM_COCO)
    assert [name for name, found in matches.items() if found is None] == ["rider"]
    assert EXPERIMENTS[TUNED.start].config.model.backbone == TUNED.config.model.backbone


def test_a_eight_categories_and_resnet_50_fpn() -> None:
    """ "The instance segmentation task involves 8 object categories"; "models with the ResNet-FPN-50 backbone"."""
    for row in (FINE, TUNED):
        body = row.config.model.backbone
        assert (row.config.model.classes, body.architecture, body.features) == (8, "resnet50", "fpn")


# Appendix B ----------------------------------------------------------------------------------------------------------


def test_b_the_updated_baseline_has_180k_iterations_reduced_at_120k_and_160k_and_nms_of_one_half() -> None:
    """ "We lengthen the training to 180k iterations, in which the learning rate is reduced by 10 at 120k and 160k
    iterations. We also change the NMS threshold to 0.5 (from a default value of 0.3)"."""
    before, after = EXPERIMENTS["table8/original"].config, EXPERIMENTS["table8/updated"].config
    assert_falls(after.train, 0.01, (120_000, 160_000), 180_000)
    assert (before.model.box.nms_threshold, after.model.box.nms_threshold) == (0.3, 0.5)
    assert replace(after.model, box=before.model.box) == before.model


def test_b_all_previous_results_used_stage_wise_training() -> None:
    """ "All previous results used stage-wise training, i.e., training RPN as the first stage and Mask R-CNN as the
    second. ... we evaluate end-to-end ('e2e') training that jointly trains RPN and Mask R-CNN"."""
    assert EXPERIMENTS["table8/updated"].procedure == "stagewise"
    row = EXPERIMENTS["table8/e2e"]
    assert PROCEDURES[row.procedure] is END_TO_END
    assert row.config == EXPERIMENTS["table8/updated"].config
    (stage,) = END_TO_END
    assert stage.train == ("backbone", "rpn", "heads") and stage.losses is None and stage.proposals is None


def test_b_imagenet_5k_changes_the_pre_training_only() -> None:
    before, after = EXPERIMENTS["table8/e2e"], EXPERIMENTS["table8/imagenet-5k"]
    assert (before.weights, after.weights) == ("imagenet", "imagenet-5k") and before.config == after.config


def test_b_train_time_augmentation_640_to_800_260k_reduced_at_200k_and_240k() -> None:
    """ "we randomly sample a scale from [640, 800] pixels and we increase the number of iterations to 260k (with the
    learning rate reduced by 10 at 200k and 240k iterations)"."""
    config = EXPERIMENTS["table8/train-augm"].config
    assert_falls(config.train, 0.01, (200_000, 240_000), 260_000)
    drawn = [min(size) for size in sizes_drawn(config.data, LANDSCAPE)]
    assert (min(drawn), max(drawn)) == (640, 800)
    assert {min(size) for size in sizes_drawn(EXPERIMENTS["table8/e2e"].config.data, LANDSCAPE)} == {800}


def test_b_each_row_of_table_8_adds_to_the_one_above() -> None:
    """ "Each row adds an extra component to the above row": what a row has gained, the later rows keep."""
    names = ("train-augm", "deeper", "non-local", "test-augm")
    rows = [EXPERIMENTS[f"table8/{name}"] for name in names]
    assert len({(row.config.train, row.config.data, row.procedure, row.weights) for row in rows}) == 1
    bodies = [row.config.model.backbone for row in rows]
    assert [body.architecture for body in bodies] == ["resnext101_32x8d"] + ["resnext152_32x8d"] * 3
    assert [body.non_local for body in bodies] == [False, False, True, True]
    assert [row.augmented for row in rows] == [False, False, False, True]


def test_b_views_from_400_to_1200_by_100_and_their_mirror_images() -> None:
    """ "We combine the model results evaluated using scales of [400, 1200] pixels with a step of 100 and on their
    horizontal flips"."""
    defaults = Augmentation()
    small = Augmentation(tuple(size // 100 for size in defaults.sizes), 20, defaults.flip)  # a hundredth, to look at it
    seen = [(min(batch.sizes[0]), batch.mirrored[0]) for batch in views(torch.rand(3, 6, 8), small)]
    assert seen == [(size, mirror) for size in (4, 5, 6, 7, 8, 9, 10, 11, 12) for mirror in (False, True)]
    assert defaults.sizes == (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)


def test_b_keypoints_have_130k_iterations_reduced_at_100k_and_120k() -> None:
    """ "we extend the training schedule to 130k iterations in which the learning rate is reduced by 10 at 100k and
    120k"; the ResNeXt of Table 9 at half the batch and rate, as in Section 3.1."""
    for name in ("updated", "deeper"):
        assert_falls(EXPERIMENTS[f"table9/{name}"].config.train, 0.02, (100_000, 120_000), 130_000)
    for name in ("resnext", "distillation", "test-augm"):
        config = EXPERIMENTS[f"table9/{name}"].config
        assert_falls(config.train, 0.01, (100_000, 120_000), 130_000)
        assert config.train.batch_size == 8


def test_b_only_keypoint_annotations_are_used() -> None:
    """Table 9: "Here we use only keypoint annotations but no mask annotations"."""
    rows = [row for row in ROWS if row.table == "table9"]
    assert all(row.config.model.mask is None and row.config.model.keypoint is not None for row in rows)


def test_b_distillation_uses_the_model_before_it_and_as_many_instances_as_people_label() -> None:
    """ "uses a model trained on labeled data to predict annotations on unlabeled images, and in turn updates the model
    with these new annotations", as many per image as are labelled [35]."""
    row = EXPERIMENTS["table9/distillation"]
    assert row.distil == "table9/resnext" and EXPERIMENTS[row.distil].config == row.config

    class Labelled:  # four images with ten people in all
        categories = CategoryMap((Category(1, "person"),))

        def __len__(self) -> int:
            return 4

        def labels(self, index: int):
            return torch.ones(index + 1, dtype=torch.int64), torch.zeros(index + 1, dtype=torch.bool)

    from mrcnn_edu.structures import Detections

    def crowd(seed: int) -> Detections:
        scores = torch.rand(9, generator=torch.Generator().manual_seed(seed))
        return Detections(torch.rand(9, 4), scores, torch.ones(9, dtype=torch.int64))

    chosen = select({seed: crowd(seed) for seed in range(6)}, expected_counts(Labelled()))
    assert sum(map(len, chosen.values())) == 6 * 10 / 4


def test_b_keypoints_are_measured_under_the_same_augmentation() -> None:
    """ "By using the same test-time augmentation as used for instance segmentation"."""
    assert EXPERIMENTS["table9/test-augm"].augmented and EXPERIMENTS["table8/test-augm"].augmented
    assert [row.name for row in ROWS if row.augmented] == ["table8/test-augm", "table9/test-augm"]


# What the paper leaves to the released code --------------------------------------------------------------------------


def test_the_warm_up_is_the_released_code_s() -> None:
    """The paper states none. Every released code has one, and so do these schedules; it changes nothing after it."""
    train = BASE.config.train
    assert learning_rate(0, train) < 0.001 < learning_rate(train.warmup_iterations, train) == 0.02
    assert learning_rate(0, replace(train, warmup_iterations=0)) == 0.02


def test_a_longer_side_is_limited_as_in_the_released_code() -> None:
    """The paper states no limit; 1333 px is that of every released code."""
    drawn = sizes_drawn(BASE.config.data, (300, 900), count=5)
    assert set(drawn) == {(444, 1333)}
