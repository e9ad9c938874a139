"""Measuring a whole data set: the files are what was measured, and their number does not matter."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mrcnn_edu.data import shapes
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.evaluation.coco import evaluate, evaluate_results
from mrcnn_edu.evaluation.measure import branches, measure
from mrcnn_edu.evaluation.results import load_results
from mrcnn_edu.models.mask_rcnn import build_model
from mrcnn_edu.presets import preset
from mrcnn_edu.structures import Detections


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = shapes.write(tmp_path_factory.mktemp("shapes"), train=0, val=4, size=64)
    return CocoDataset(folder / "val", folder / "val.json")


def test_the_files_give_the_same_numbers(data, tmp_path):
    config = preset("maskrcnn_shapes", categories=data.categories)
    torch.manual_seed(0)
    model = build_model(replace(config.model, box=replace(config.model.box, score_threshold=0.0)))
    size = replace(config.data, min_size=(64,), max_size=64, test_size=64, workers=0)
    evaluation, predictions = measure(model, data, size, tmp_path, area_scale=0.5, progress=False)
    assert branches(model) == list(evaluation.kinds) == ["box", "mask", "keypoint"]
    assert sorted(predictions) == sorted(data.image_ids)
    results = {kind: load_results(tmp_path / f"results-{name}.json", data, kind) for kind, name in
               {"box": "bbox", "mask": "segm", "keypoint": "keypoints"}.items()}  # fmt: skip
    again = evaluate_results(data, results, area_scale=0.5)
    assert json.dumps(again.to_json()) == json.dumps(evaluation.to_json())


def test_hundreds_of_perfect_masks_are_measured(data):
    """pycocotools fails on the areas of more than 255 masks given at once."""
    predictions = {}
    for index, image_id in enumerate(data.image_ids):
        target = data.target(index)
        rows = target.crowd.logical_not().nonzero()[:, 0].repeat(70)  # the best scores: each instance once
        scores = torch.linspace(0.9, 0.1, len(rows))
        predictions[image_id] = Detections(
            target.boxes[rows], scores, target.labels[rows], torch.ones(len(rows), 28, 28)
        )
    evaluation = evaluate(data, predictions, ("box", "mask"))
    assert evaluation.detections["mask"] > 255
    assert evaluation["box"]["AR100"] == 1
