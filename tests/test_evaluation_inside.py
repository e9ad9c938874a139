"""Measuring inside the true boxes: IoU and similarity by hand, perfect and useless branches by law."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import training_runs
from training_runs import DATA, tiny_model

from mrcnn_edu.data.shapes import write
from mrcnn_edu.evaluation.inside import mask_iou, measure_inside, similarity
from mrcnn_edu.masks import crop_masks
from mrcnn_edu.structures import Target


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):
    folder = write(tmp_path_factory.mktemp("shapes") / "data", train=1, val=6, size=(64, 48), seed=2)
    return training_runs.datasets(folder)[1]


def test_mask_iou_by_hand() -> None:
    masks = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 0]], [[1, 1, 1, 1]]], dtype=torch.bool)
    truth = torch.tensor([[[0, 1, 1, 0]], [[0, 0, 0, 0]], [[1, 1, 1, 1]]], dtype=torch.bool)
    assert mask_iou(masks, truth).tolist() == pytest.approx([1 / 3, 0, 1])


def test_similarity_by_hand() -> None:
    """A box of 10 x 10 and sigma 0.05: an error of d pixels counts exp(-d^2 / (2 x 0.1^2 x 100)) = exp(-d^2 / 2)."""
    joints = torch.tensor([[[1.0, 1, 2], [5, 5, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 0], [0, 0, 0]]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    target = Target(boxes, torch.tensor([1, 1]), keypoints=joints)
    found = joints.clone()
    found[0, 1, 0] += 2
    found[0, 2] = 100  # not labelled, so it does not count
    assert similarity(found, target, (0.05,) * 3).tolist() == pytest.approx([(1 + math.exp(-2)) / 2])


def test_perfect_and_useless_branches(data) -> None:
    """The truth itself drawn into its box is right up to the mask's resolution; an empty mask is worth nothing."""
    model, truths = tiny_model(), {}
    for index in range(len(data)):
        target = data.target(index)
        target = target if target.crowd is None else target[~target.crowd]
        truths[len(target), round(float(target.boxes.sum()), 1)] = target

    def perfect(features, detections):
        filled = []
        for found in detections:
            target = truths[len(found), round(float(found.boxes.sum()), 1)]
            probs = crop_masks(target.masks, target.boxes, torch.arange(len(target)), 56, "soft")
            filled.append(replace(found, mask_probs=probs))
        return filled

    def joints(features, detections):
        keyed = [truths[len(found), round(float(found.boxes.sum()), 1)].keypoints for found in detections]
        return [replace(found, keypoints=keypoints) for found, keypoints in zip(detections, keyed)]

    model.detect_masks, model.detect_keypoints = perfect, joints
    unscaled = replace(DATA, test_size=48, max_size=64)  # the images as they are, so that boxes can be recognised
    measured = measure_inside(model, data, unscaled)
    assert measured["mask_iou"] > 0.93 and measured["oks"] == pytest.approx(1.0)

    model.detect_masks = lambda features, detections: [
        replace(found, mask_probs=torch.zeros(len(found), 4, 4)) for found in detections
    ]
    model.detect_keypoints = lambda features, detections: [
        replace(found, keypoints=torch.full((len(found), 7, 3), 1e4)) for found in detections
    ]
    assert measure_inside(model, data, unscaled) == {"mask_iou": 0.0, "oks": pytest.approx(0.0, abs=1e-3)}


def test_a_real_model_and_one_without_branches(data) -> None:
    measured = measure_inside(tiny_model(), data, DATA, batch_size=2)
    assert 0 <= measured["mask_iou"] <= 1 and 0 <= measured["oks"] <= 1
    model = tiny_model()
    model.mask_head = model.keypoint_head = None
    assert measure_inside(model, data, DATA) == {}
