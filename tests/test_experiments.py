"""The paper's experiments: its numbers, one name per row, and each of them built, trained for a step and asked once."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_experiments import tiny

from mrcnn_edu import experiments
from mrcnn_edu.data import shapes
from mrcnn_edu.experiments import EXPERIMENTS, ROWS, TABLES, find, trained_as
from mrcnn_edu.inference import predict
from mrcnn_edu.models.mask_rcnn import build_model
from mrcnn_edu.planning import GPUS, plan
from mrcnn_edu.structures import ImageBatch

RUNNABLE = [row for row in ROWS if row.config is not None]
TRAININGS = list(dict.fromkeys(trained_as(row, "toy").name for row in RUNNABLE))

# Rows as the paper prints them: the name, then its numbers in its order.
PRINTED = {
    "table1/mnc": "24.6 44.3 24.8 4.7 25.9 43.6",
    "table1/fcis": "29.2 49.5 7.1 31.3 50.0",
    "table1/resnet-101-c4": "33.1 54.9 34.8 12.1 35.6 51.1",
    "table1/resnet-101-fpn": "35.7 58.0 37.8 15.5 38.1 52.4",
    "table1/resnext-101-fpn": "37.1 60.0 39.4 16.9 39.9 53.5",
    "table2a/resnet-101-c4": "32.7 54.2 34.3",
    "table2a/resnet-101-fpn": "35.4 57.3 37.5",
    "table2a/resnext-101-fpn": "36.7 59.5 38.9",
    "table2c/roipool-max": "26.9 48.8 26.4",
    "table2c/roiwarp-max": "27.2 49.2 27.1",
    "table2c/roiwarp-mean": "27.1 48.9 27.1",
    "table2c/roialign-max": "30.2 51.0 31.8",
    "table2c/roialign-mean": "30.3 51.2 31.5",
    "table2d/roipool": "23.6 46.5 21.6 28.2 52.7 26.9",
    "table2d/roialign": "30.9 51.8 32.1 34.0 55.3 36.4",
    "table2e/mlp-2": "31.5 53.7 32.8",
    "table2e/mlp-3": "31.5 54.0 32.6",
    "table2e/fcn": "33.6 55.2 35.3",
    "table3/faster-rcnn": "37.3 59.6 40.3 19.8 40.2 48.8",
    "table3/mask-rcnn": "38.2 60.3 41.7 20.1 41.1 50.2",
    "table3/mask-rcnn-resnext": "39.8 62.3 43.4 22.1 43.2 51.2",
    "table4/keypoint": "62.7 87.0 68.4 57.4 71.1",
    "table4/keypoint-mask": "63.1 87.3 68.7 57.8 71.4",
    "table5/box": "52.5",
    "table5/mask": "53.6 45.8",
    "table5/keypoint": "50.7 64.2",
    "table5/keypoint-mask": "52.0 45.1 64.7",
    "table6/roipool": "59.8 86.2 66.7 55.1 67.4",
    "table6/roialign": "64.2 86.6 69.7 58.7 73.0",
    "table7/sgn": "29.2 25.0 44.9 21.8 20.1 39.4 24.8 33.2 30.8 17.7 12.4",
    "table7/fine": "31.5 26.2 49.9 30.5 23.7 46.9 22.8 32.2 18.6 19.1 16.0 28.8 53.5 33.0",
    "table7/fine-coco": "36.4 32.0 58.1 34.8 27.0 49.1 30.1 40.9 30.9 24.1 18.7 38.0 57.5 41.2",
    "table8/original": "36.7 59.5 38.9 39.6 61.5 43.2",
    "table8/updated": "37.0 59.7 39.0 40.5 63.0 43.7",
    "table8/e2e": "37.6 60.4 39.9 41.7 64.1 45.2",
    "table8/test-augm": "41.8 66.0 44.8 47.3 69.3 51.5",
    "table9/updated": "65.1 86.6 70.9 59.9 73.6",
    "table9/distillation": "69.1 88.9 75.3 64.1 77.1",
    "table9/test-augm": "70.4 89.3 76.8 65.8 78.1",
}


@pytest.mark.parametrize("name", PRINTED)
def test_the_paper_s_numbers(name: str) -> None:
    assert list(EXPERIMENTS[name].paper.values()) == [float(value) for value in PRINTED[name].split()]


def test_every_row_of_every_table_has_a_name() -> None:
    counts = {table: sum(row.table == table for row in ROWS) for table in TABLES}
    text = counts.pop("text")
    assert counts == {
        "table1": 6, "table2a": 5, "table2b": 2, "table2c": 5, "table2d": 2, "table2e": 3, "table3": 7,
        "table4": 4, "table5": 4, "table6": 2, "table7": 7, "table8": 8, "table9": 6,
    }  # fmt: skip
    assert text == 10 and len(EXPERIMENTS) == len(ROWS) == 71
    assert all(re.fullmatch(r"[a-z0-9]+/[a-z0-9.+-]+", name) for name in EXPERIMENTS)


def test_quoted_rows_say_so() -> None:
    quoted = [row for row in ROWS if row.config is None]
    assert len(quoted) == 3 + 4 + 2 + 5
    assert all(row.paper and "nothing to run" in row.note for row in quoted)
    with pytest.raises(ValueError, match=r"table1/mnc .* is another system"):
        quoted[0].at("toy")


def test_differences_that_the_text_names() -> None:
    """Section 4.2: 5.5 points for softmax, 7.3 for RoIAlign at stride 32, 2.1 for FCNs; Appendix B: 5.1 and 7.7."""

    def gap(high: str, low: str, number: str = "mask AP") -> float:
        return round(EXPERIMENTS[high].paper[number] - EXPERIMENTS[low].paper[number], 1)

    assert gap("table2b/sigmoid", "table2b/softmax") == 5.5
    assert gap("table2d/roialign", "table2d/roipool") == 7.3
    assert gap("table2d/roialign", "table2d/roipool", "mask AP75") == 10.5
    assert gap("table2d/roialign", "table2d/roipool", "box AP") == 5.8
    assert gap("table2e/fcn", "table2e/mlp-2") == 2.1
    assert gap("table3/mask-rcnn", "table3/faster-rcnn", "box AP") == 0.9
    assert gap("table3/faster-rcnn", "table3/fpn", "box AP") == 1.1
    assert gap("table3/mask-rcnn-resnext", "table3/mask-rcnn", "box AP") == 1.6
    assert gap("table6/roialign", "table6/roipool", "keypoint AP") == 4.4
    assert gap("table8/test-augm", "table8/original") == 5.1
    assert gap("table8/test-augm", "table8/original", "box AP") == 7.7
    assert gap("table9/distillation", "table9/resnext", "keypoint AP") == 1.8
    assert gap("text/fpn-roialign", "text/fpn-roipool") == 1.5


def test_names_find_rows_and_tables() -> None:
    assert [row.name for row in find("table2d")] == ["table2d/roipool", "table2d/roialign"]
    assert find("table2c/roialign-mean") == [EXPERIMENTS["table2c/roialign-mean"]]
    with pytest.raises(
        ValueError, match="unknown experiment or table 'table2c/roi-warp', did you mean 'table2c/roiwarp"
    ):
        find("table2c/roi-warp")


def test_rows_that_share_a_training() -> None:
    for scale in ("toy", "coco"):
        assert trained_as(EXPERIMENTS["table2c/roialign-mean"], scale).name == "table2a/resnet-50-c4"
        assert trained_as(EXPERIMENTS["table3/mask-rcnn"], scale).name == "table1/resnet-101-fpn"
        assert trained_as(EXPERIMENTS["text/nms-0.5"], scale) == trained_as(EXPERIMENTS["text/nms-0.3"], scale)
        assert trained_as(EXPERIMENTS["table8/test-augm"], scale).name == "table8/non-local"
        assert trained_as(EXPERIMENTS["table2c/roipool-max"], scale).name == "table2c/roipool-max"


def test_references_to_other_rows_exist() -> None:
    for row in RUNNABLE:
        for other in (row.start, row.distil):
            assert other is None or EXPERIMENTS[other].config is not None


def test_a_toy_varies_what_the_row_varies() -> None:
    """Two rows that differ at the paper's scale differ at toy scale too, unless only in weights or in the procedure."""
    for one in RUNNABLE:
        for other in RUNNABLE:
            if one.table == other.table and one.config.model != other.config.model:
                assert one.at("toy").model != other.at("toy").model, (one.name, other.name)


# One step and one look -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAININGS)
def test_each_takes_a_training_step_and_predicts(name: str) -> None:
    config = tiny(EXPERIMENTS[name].at("toy"))
    torch.manual_seed(0)
    model = build_model(config.model)
    images, targets = zip(*(shapes.make(seed, 64, instances=(2, 3)) for seed in (3, 4)))
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = {key: value.clone() for key, value in model.named_parameters()}
    losses = model(ImageBatch.collate(list(images)), list(targets))
    assert {"mask" in losses, config.model.mask is not None} != {True, False}
    assert {"keypoint" in losses, config.model.keypoint is not None} != {True, False}
    sum(losses.values()).backward()
    optimiser.step()
    moved = [key for key, value in model.named_parameters() if not torch.equal(value, before[key])]
    assert len(moved) > 0.5 * len(before)
    found = predict(model, images[0], config.data.test_size, config.data.max_size)
    assert (found.mask_probs is not None) == (config.model.mask is not None)
    assert len(found.boxes) == len(found.scores)


# Plans ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", RUNNABLE, ids=lambda row: row.name)
def test_every_row_has_a_plan(row) -> None:
    made = plan(row, 8, "a100")
    assert made.command.startswith("torchrun --standalone --nproc_per_node=8 -m mrcnn_edu reproduce " + row.name)
    assert 0.1 < made.hours < 400 and 1 < made.gigabytes < 40
    assert "detectron2's model zoo" in str(made) and "DeepLearningExamples" in str(made)


def test_a_plan_by_hand() -> None:
    """Jointly: 180k iterations of 8 images at 0.69 s per 16 on 8 V100 are 17.25 h; half as many GPUs, twice as long."""
    row = EXPERIMENTS["table8/e2e"]
    assert plan(row, 8, "v100").hours == pytest.approx(180_000 * 0.5 * 0.690 / 3600)
    assert plan(row, 4, "v100").hours == pytest.approx(2 * plan(row, 8, "v100").hours)
    assert plan(row, 8, "v100").hours / plan(row, 8, "a100").hours == pytest.approx(1.5)
    assert (plan(row, 8).images_per_gpu, plan(row, 8).stages) == (1, 1)
    assert plan(row, 8).gigabytes == pytest.approx(3.6)
    apart = plan(EXPERIMENTS["table2a/resnet-50-fpn"], 8, "v100")
    assert apart.hours == pytest.approx(160_000 * (0.261 + 0.186) / 3600) and apart.stages == 2
    assert set(GPUS) == {"v100", "a100", "h100"}


@pytest.mark.parametrize(("gpus", "gpu"), [(0, "v100"), (8, "abacus"), (5, "v100")])
def test_plans_that_cannot_be_made(gpus: int, gpu: str) -> None:
    with pytest.raises(ValueError, match=r"a plan is for|cannot share"):
        plan(EXPERIMENTS["table2a/resnet-50-fpn"], gpus, gpu)


def test_experiments_are_complete_without_torch() -> None:
    """Names, numbers and plans are data: the listing does not wait for PyTorch."""
    import subprocess
    import sys

    code = "import sys, mrcnn_edu.experiments, mrcnn_edu.planning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert experiments.TABLES[0] == "table1"
