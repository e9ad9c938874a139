"""evaluation.results: COCO-results lists written, read and refused."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.evaluation.coco import evaluate, evaluate_results
from mrcnn_edu.evaluation.results import check_results, load_results, save_results, to_coco_results
from mrcnn_edu.masks import rle_decode, rle_encode
from mrcnn_edu.structures import Detections

CATEGORIES = [
    {"id": 4, "name": "plate"},
    {"id": 9, "name": "hand", "keypoints": ["wrist", "tip"], "skeleton": [[1, 2]]},
]


@pytest.fixture
def dataset(tmp_path) -> CocoDataset:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "a.png")
    outline = [[2, 2, 12, 2, 12, 12, 2, 12]]
    joints = {"keypoints": [3, 3, 2, 10, 10, 2], "num_keypoints": 2}
    entry = {"id": 1, "image_id": 5, "category_id": 9, "bbox": [2, 2, 10, 10], "area": 100, "iscrowd": 0, **joints}
    content = {
        "images": [{"id": 5, "file_name": "a.png", "width": 30, "height": 20}],
        "annotations": [{**entry, "segmentation": outline}],
        "categories": CATEGORIES,
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    return CocoDataset(tmp_path / "images", tmp_path / "truth.json")


@pytest.fixture
def predictions() -> dict[int, Detections]:
    return {
        5: Detections(
            torch.tensor([[1.5, 2.25, 11.0, 12.0], [2.0, 2.0, 12.0, 12.0]]),
            torch.tensor([0.25, 0.75]),
            torch.tensor([1, 2]),
            torch.ones(2, 4, 4),
            torch.tensor([[[0.0, 0, 0], [0, 0, 0]], [[3, 3, 0.5], [10, 10, 0.25]]]),
        )
    }


def test_by_hand(dataset, predictions):
    box = to_coco_results(dataset, predictions, "box")
    assert box == [
        {"image_id": 5, "category_id": 9, "score": 0.75, "bbox": [2, 2, 10, 10]},
        {"image_id": 5, "category_id": 4, "score": 0.25, "bbox": [1.5, 2.25, 9.5, 9.75]},
    ]
    joints = to_coco_results(dataset, predictions, "keypoint")
    assert joints == [{"image_id": 5, "category_id": 9, "score": 0.75, "keypoints": [3, 3, 0.5, 10, 10, 0.25]}]
    mask = rle_decode(to_coco_results(dataset, predictions, "mask")[0]["segmentation"])
    assert mask.shape == (20, 30) and mask[2:12, 2:12].all() and mask.sum() == 100


def test_paste_rule_is_used(dataset, predictions):
    areas = [
        int(rle_decode(to_coco_results(dataset, predictions, "mask", rule)[0]["segmentation"]).sum())
        for rule in ("continuous", "integer")
    ]
    assert areas[0] == 100 and areas[1] > 100  # Detectron's rule grows a full mask by a pixel


@pytest.mark.parametrize("kind", ["box", "mask", "keypoint"])
def test_a_file_gives_the_same_numbers(dataset, predictions, kind, tmp_path):
    results = to_coco_results(dataset, predictions, kind)
    save_results(tmp_path / "results.json", results)
    loaded = load_results(tmp_path / "results.json", dataset, kind)
    assert loaded == results
    assert evaluate_results(dataset, {kind: loaded})[kind] == evaluate(dataset, predictions, [kind])[kind]


BOX = {"image_id": 5, "category_id": 4, "score": 0.5, "bbox": [0, 0, 5, 5]}
MASK = {"image_id": 5, "category_id": 4, "score": 0.5, "segmentation": rle_encode(torch.ones(20, 30, dtype=torch.bool))}
JOINTS = {"image_id": 5, "category_id": 9, "score": 0.5, "keypoints": [1, 1, 1, 2, 2, 1]}
SMALL = rle_encode(torch.ones(20, 29, dtype=torch.bool))
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "entry", "message"),
    [
        ("box", {**BOX, "image_id": 6}, "image_id 6"),
        ("box", {**BOX, "image_id": "5"}, "image_id '5'"),
        ("box", {**BOX, "image_id": True}, "image_id True"),
        ("box", {**BOX, "image_id": [5]}, "image_id"),
        ("box", {**BOX, "category_id": 1}, r"category_id 1 is not one of \[4, 9\]"),
        ("box", {**BOX, "score": NAN}, "score"),
        ("box", {**BOX, "score": "0.5"}, "score"),
        ("box", {**BOX, "score": 10**400}, "score"),
        ("box", {**BOX, "score": None}, "score"),
        ("box", {**BOX, "bbox": [0, 0, NAN, 5]}, "bbox"),
        ("box", {**BOX, "bbox": [0, 0, INF, 5]}, "bbox"),
        ("box", {**BOX, "bbox": [0, 0, -5, 5]}, "bbox"),
        ("box", {**BOX, "bbox": [0, 0, 5]}, "bbox"),
        ("box", {**BOX, "bbox": 5}, "bbox"),
        ("box", MASK, "needs image_id, category_id, score, bbox"),
        ("box", 5, "got int"),
        ("mask", {**MASK, "segmentation": SMALL}, "20 x 29 but image 5 is 20 x 30"),
        ("mask", {**MASK, "segmentation": {**SMALL, "size": [20, 30]}}, "cover 580 pixels"),
        ("mask", {**MASK, "segmentation": {"size": [20, 30], "counts": "~~~"}}, "counts"),
        ("mask", {**MASK, "segmentation": {"size": [20, 30], "counts": [-1, 601]}}, "runs"),
        ("mask", {**MASK, "segmentation": [[0, 0, 5, 0, 5, 5]]}, "size"),
        ("keypoint", {**JOINTS, "keypoints": [1, 1, 1]}, "6 finite numbers"),
        ("keypoint", {**JOINTS, "keypoints": [1, 1, 1, NAN, 2, 1]}, "6 finite numbers"),
        ("keypoint", {**JOINTS, "category_id": 4}, "with its 0 joints"),
    ],
)
def test_what_does_not_fit_is_refused(dataset, kind, entry, message):
    good = {"box": BOX, "mask": MASK, "keypoint": JOINTS}[kind]
    check_results(dataset, [good], kind)
    with pytest.raises(ValueError, match=message) as caught:
        check_results(dataset, [good, entry], kind)
    assert str(caught.value).startswith("result 1: ")
    with pytest.raises(ValueError, match=message):
        evaluate_results(dataset, {kind: [good, entry]})


@pytest.mark.parametrize(
    "text", ["{}", "[{]", "[NaN]", '[{"score": Infinity}]', "[" * 100_000, '{"a": 1}', "null", "[null]"]
)
def test_damaged_files_are_refused_by_name(dataset, tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json"):
        load_results(tmp_path / "bad.json", dataset, "box")


def test_files_that_are_not_text(dataset, tmp_path):
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bad\.json"):
        load_results(tmp_path / "bad.json", dataset, "box")
    with pytest.raises(OSError):
        load_results(tmp_path / "none.json", dataset, "box")


def test_unknown_kind(dataset):
    with pytest.raises(ValueError, match="'box', 'mask' or 'keypoint'"):
        check_results(dataset, [], "bbox")
