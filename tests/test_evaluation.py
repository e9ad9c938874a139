"""evaluation.coco and evaluation.report: by hand, by law, and pycocotools itself as the oracle."""

from __future__ import annotations

import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.loading import _ValOrder
from mrcnn_edu.evaluation import report
from mrcnn_edu.evaluation.coco import COCO_SIGMAS, evaluate, evaluate_results, ground_truth
from mrcnn_edu.evaluation.results import merge_results, to_coco_results
from mrcnn_edu.masks import rle_encode
from mrcnn_edu.structures import Detections

NAMES = ("box", "mask", "keypoint")
COCO_NAMES = {"box": "bbox", "mask": "segm", "keypoint": "keypoints"}
JOINTS = ["head", "left_hand", "right_hand"]
CATEGORIES = [  # ids with gaps, not in the order of the names
    {"id": 3, "name": "plate"},
    {"id": 90, "name": "figure", "keypoints": JOINTS, "skeleton": [[1, 2], [1, 3]]},
]


def rectangle(number, image_id, category_id, box, crowd=0, **more):
    """An annotation whose mask is all of its box (x, y, w, h), in whole pixels."""
    x, y, w, h = box
    outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    entry = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": list(box), "area": w * h}
    if crowd:
        mask = torch.zeros(100, 120, dtype=torch.bool)
        mask[y : y + h, x : x + w] = True
        outline = rle_encode(mask)
    if category_id == 90:
        more = {"keypoints": [x + 1, y + 1, 2, x + w - 1, y + 2, 1, x + 2, y + h - 1, 2], "num_keypoints": 3, **more}
    return {**entry, "iscrowd": crowd, "segmentation": outline, **more}


def make_dataset(folder, annotations, image_ids=(7, 11), categories=CATEGORIES, **options) -> CocoDataset:
    """A data set of black images, 120 x 100 (width x height)."""
    (folder / "images").mkdir(exist_ok=True)
    images = []
    for image_id in image_ids:
        Image.new("RGB", (120, 100)).save(folder / "images" / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": 120, "height": 100})
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(content))
    return CocoDataset(folder / "images", folder / "truth.json", **options)


def perfect(dataset: CocoDataset) -> dict[int, Detections]:
    """Predictions equal to the ground truth, crowds left out; masks fill their boxes."""
    predictions = {}
    for index in range(len(dataset)):
        target = dataset.target(index)
        target = target[~target.crowd]
        count = len(target)
        predictions[dataset.image_id(index)] = Detections(
            target.boxes,
            torch.linspace(0.9, 0.6, count),
            target.labels,
            torch.ones(count, 28, 28),
            target.keypoints,
        )
    return predictions


ANNOTATIONS = [
    rectangle(5, 7, 3, (10, 10, 20, 30)),
    rectangle(6, 7, 90, (50, 20, 40, 60)),
    rectangle(8, 11, 90, (5, 5, 36, 40)),
]


def test_perfect_detections_have_ap_1(tmp_path):
    dataset = make_dataset(tmp_path, ANNOTATIONS)
    result = evaluate(dataset, perfect(dataset))
    for kind in NAMES:
        assert result[kind]["AP"] == result[kind]["AP75"] == pytest.approx(1.0)
    assert set(result["box"].per_class) == {"plate", "figure"}
    assert set(result["keypoint"].per_class) == {"figure"}  # plates have none, so they are not counted
    assert (result.images, result.instances) == (2, 3)
    assert result["box"]["APl"] is None  # nothing is 96 x 96 pixels large


def test_annotation_id_0_counts(tmp_path):
    dataset = make_dataset(tmp_path, [rectangle(0, 7, 90, (10, 10, 40, 40))])
    result = evaluate(dataset, perfect(dataset))
    assert [result[kind]["AP"] for kind in NAMES] == pytest.approx([1.0, 1.0, 1.0])


def test_duplicate_annotation_ids_lose_nothing(tmp_path):
    twice = [rectangle(7, 7, 3, (10, 10, 40, 40)), rectangle(7, 11, 3, (10, 10, 40, 40))]
    with pytest.raises(ValueError, match="7"):
        make_dataset(tmp_path, twice)
    dataset = make_dataset(tmp_path, twice, strict=False)  # which drops the second one and says so
    assert evaluate(dataset, perfect(dataset), ["box", "mask"])["mask"]["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "nothing", [{}, {7: Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))}]
)
def test_no_detections_give_0(tmp_path, nothing):
    dataset = make_dataset(tmp_path, ANNOTATIONS)
    result = evaluate(dataset, nothing)
    for kind in NAMES:
        assert result[kind]["AP"] == 0.0
        assert result[kind].per_class["figure"]["AP50"] == 0.0


def test_no_ground_truth_gives_none(tmp_path):
    dataset = make_dataset(tmp_path, [rectangle(1, 7, 3, (10, 10, 40, 40))])
    result = evaluate(dataset, perfect(dataset), ["box"])
    assert result["box"]["AP"] == pytest.approx(1.0)  # the mean is over the class that has instances
    assert result["box"].per_class["figure"]["AP"] is None


def test_one_of_two_found(tmp_path):
    # One of two instances found and no false alarm: precision 1 up to recall 0.5, which is 51 of 101 recall levels.
    dataset = make_dataset(tmp_path, [rectangle(1, 7, 3, (0, 0, 40, 40)), rectangle(2, 7, 3, (60, 50, 40, 40))])
    one = Detections(torch.tensor([[0.0, 0, 40, 40]]), torch.tensor([0.8]), torch.tensor([1]))
    assert evaluate(dataset, {7: one}, ["box"])["box"]["AP"] == pytest.approx(51 / 101)
    assert evaluate(dataset, {7: one}, ["box"])["box"]["AR100"] == pytest.approx(0.5)


def test_detection_in_a_crowd_is_neither_right_nor_wrong(tmp_path):
    crowd = rectangle(2, 7, 3, (60, 20, 50, 50), crowd=1)
    dataset = make_dataset(tmp_path, [rectangle(1, 7, 3, (0, 0, 40, 40)), crowd])
    boxes = torch.tensor([[65.0, 25, 85, 45], [70, 30, 90, 60], [0, 0, 40, 40]])
    found = Detections(boxes, torch.tensor([0.99, 0.98, 0.5]), torch.ones(3, dtype=torch.int64), torch.ones(3, 28, 28))
    result = evaluate(dataset, {7: found}, ["box", "mask"])
    assert result["box"]["AP"] == result["mask"]["AP"] == pytest.approx(1.0)
    assert result.instances == 1
    elsewhere = Detections(boxes - 60, found.scores, found.labels)
    assert evaluate(dataset, {11: elsewhere}, ["box"])["box"]["AP"] == 0.0


def random_set(folder, seed: int, count: int = 12):
    """Random ground truth with crowds, and results that are near it, elsewhere, or missing."""
    rng = np.random.default_rng(seed)
    image_ids = (rng.permutation(1000)[:count] + 1).tolist()
    annotations, results = [], {kind: [] for kind in NAMES}
    for image_id in image_ids:
        for _ in range(rng.integers(0, 7)):
            w, h = (int(side) for side in rng.integers(6, 70, 2))
            x, y = int(rng.integers(0, 120 - w)), int(rng.integers(0, 100 - h))
            category = int(rng.choice([3, 90]))
            number = len(annotations) + 1
            annotations.append(rectangle(number, image_id, category, (x, y, w, h), crowd=int(rng.random() < 0.15)))
            if category == 90 and rng.random() < 0.2:
                annotations[-1] |= {"keypoints": [0] * 9, "num_keypoints": 0}
            for _ in range(rng.integers(0, 3)):
                dx, dy = (int(shift) for shift in rng.integers(-4, 5, 2))
                head = {"image_id": image_id, "category_id": category, "score": round(rng.random(), 2)}
                box = [max(0, x + dx), max(0, y + dy), w, h]
                mask = torch.zeros(100, 120, dtype=torch.bool)
                mask[box[1] : box[1] + h, box[0] : box[0] + w] = True
                results["box"].append({**head, "bbox": [float(value) for value in box]})
                results["mask"].append({**head, "segmentation": rle_encode(mask)})
                if category == 90:
                    joints = [x + 1, y + 1, 1, x + w - 1, y + 2, 1, x + 2, y + h - 1, 1]
                    joints = [float(v + rng.normal(0, 2)) for v in joints]
                    results["keypoint"].append({**head, "keypoints": joints})
    return make_dataset(folder, annotations, image_ids), results


def oracle(folder, results, kind, categories=(3, 90), area_scale=1.0, sigmas=None):
    """pycocotools by itself, from files."""
    (folder / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "truth.json"))
        for annotation in truth.dataset["annotations"]:
            annotation.setdefault("num_keypoints", 0)
            annotation.setdefault("keypoints", [0] * 9)
        evaluator = COCOeval(truth, truth.loadRes(str(folder / "results.json")), COCO_NAMES[kind])
        evaluator.params.catIds = list(categories)
        evaluator.params.areaRng = [[limit * area_scale**2 if limit < 1e9 else limit for limit in pair]
                                    for pair in evaluator.params.areaRng]  # fmt: skip
        if kind == "keypoint":
            evaluator.params.kpt_oks_sigmas = np.full(3, np.mean(COCO_SIGMAS)) if sigmas is None else np.array(sigmas)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats


def numbers(metrics):
    return [-1.0 if value is None else value for value in metrics.values()]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", NAMES)
def test_equal_to_pycocotools(tmp_path, seed, kind):
    dataset, results = random_set(tmp_path, seed)
    before = copy.deepcopy(results)
    result = evaluate_results(dataset, {kind: results[kind]})
    assert results == before, "the caller's lists must stay as they are"
    categories = (90,) if kind == "keypoint" else (3, 90)
    assert numbers(result[kind].numbers) == pytest.approx(oracle(tmp_path, results[kind], kind, categories), abs=1e-9)
    figure = oracle(tmp_path, results[kind], kind, (90,))
    assert numbers(result[kind].per_class["figure"]) == pytest.approx(figure, abs=1e-9)


@pytest.mark.parametrize("kind", NAMES)
def test_area_scale_and_sigmas_reach_pycocotools(tmp_path, kind):
    dataset, results = random_set(tmp_path, 9)
    sigmas = [0.03, 0.1, 0.2] if kind == "keypoint" else None
    result = evaluate_results(dataset, {kind: results[kind]}, area_scale=0.5, sigmas=sigmas)
    categories = (90,) if kind == "keypoint" else (3, 90)
    expected = oracle(tmp_path, results[kind], kind, categories, 0.5, sigmas)
    assert numbers(result[kind].numbers) == pytest.approx(expected, abs=1e-9)
    assert result.size_limits == (16, 48)
    assert result[kind]["APl"] is not None  # 48 x 48 is within reach here


def test_order_of_images_does_not_matter(tmp_path):
    dataset = make_dataset(tmp_path, ANNOTATIONS)
    found = perfect(dataset)
    turned = dict(reversed(found.items()))
    assert evaluate(dataset, found).to_json() == evaluate(dataset, turned).to_json()


def test_ground_truth_is_the_files_not_ours(tmp_path):
    # A box that leaves the image is clipped for training; the ground truth keeps the file's.
    dataset = make_dataset(tmp_path, [rectangle(1, 7, 3, (100, 10, 40, 20), area=123.5)])
    entry = ground_truth(dataset)[0]
    assert (entry["bbox"], entry["area"]) == ([100, 10, 40, 20], 123.5)
    assert dataset.target(0).boxes.tolist() == [[100, 10, 120, 30]]


def test_a_file_that_changed_is_noticed(tmp_path):
    dataset = make_dataset(tmp_path, ANNOTATIONS)
    make_dataset(tmp_path, ANNOTATIONS[1:])
    with pytest.raises(ValueError, match="changed since"):
        ground_truth(dataset)


def test_missing_area_is_the_masks(tmp_path):
    entry = rectangle(1, 7, 3, (10, 10, 20, 30))
    del entry["area"]
    dataset = make_dataset(tmp_path, [entry])
    assert ground_truth(dataset)[0]["area"] == 600
    assert ground_truth(dataset, masks=False)[0]["area"] == 600


def test_kinds_that_are_not_there(tmp_path):
    plain = [{"id": 3, "name": "plate"}]
    entry = rectangle(1, 7, 3, (10, 10, 20, 30))
    del entry["segmentation"]
    dataset = make_dataset(tmp_path, [entry], categories=plain)
    found = perfect(dataset)
    assert list(evaluate(dataset, found).kinds) == ["box"]
    with pytest.raises(ValueError, match="no keypoints"):
        evaluate_results(dataset, {"keypoint": []})
    with pytest.raises(ValueError, match="no masks"):
        evaluate(dataset, found, ["mask"])


def test_sigmas(tmp_path):
    dataset = make_dataset(tmp_path, ANNOTATIONS)
    assert evaluate_results(dataset, {"keypoint": []}).sigmas == pytest.approx([0.0669] * 3, abs=1e-4)
    for sigmas in ([0.1], [0.1, 0.1, 0.0], [0.1, float("nan"), 0.1]):
        with pytest.raises(ValueError, match="one per joint"):
            evaluate_results(dataset, {"keypoint": []}, sigmas=sigmas)
    with pytest.raises(ValueError, match="area_scale"):
        evaluate_results(dataset, {"box": []}, area_scale=0)


def test_predictions_that_do_not_fit(tmp_path):
    dataset = make_dataset(tmp_path, ANNOTATIONS)
    one = perfect(dataset)[11]
    with pytest.raises(ValueError, match="no image 12"):
        evaluate(dataset, {12: one})
    with pytest.raises(ValueError, match=r"1\.\.2, got 3"):
        evaluate(dataset, {11: Detections(one.boxes, one.scores, one.labels + 1)}, ["box"])
    with pytest.raises(ValueError, match="scores"):
        evaluate(dataset, {11: Detections(one.boxes, one.scores * float("nan"), one.labels)}, ["box"])
    with pytest.raises(ValueError, match="bbox"):
        evaluate(dataset, {11: Detections(one.boxes * float("inf"), one.scores, one.labels)}, ["box"])
    with pytest.raises(ValueError, match="leave 'mask' out"):
        evaluate(dataset, {11: Detections(one.boxes, one.scores, one.labels)}, ["mask"])


def test_nothing_is_printed(tmp_path, capsys):
    dataset = make_dataset(tmp_path, ANNOTATIONS)
    evaluate(dataset, perfect(dataset))
    assert capsys.readouterr() == ("", "")


def test_report(tmp_path):
    dataset = make_dataset(tmp_path, ANNOTATIONS)
    result = evaluate(dataset, perfect(dataset), area_scale=0.5)
    text = report.as_text(result)
    lines = text.splitlines()
    assert "2 images, 3 instances" in lines[0]
    assert lines[1] == "small is under 16 x 16 pixels, large over 48 x 48"
    assert next(line for line in lines if line.startswith("keypoint")).split()[:2] == ["keypoint", "100.0"]
    assert next(line for line in lines if line.startswith("plate")).split()[-3:] == ["-", "-", "-"]
    assert len({line.rstrip() != line for line in lines}) == 1, "no blanks at the ends of lines"
    report.save_json(tmp_path / "metrics.json", result)
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved == result.to_json()
    assert saved["mask"]["AP"] == pytest.approx(1.0)
    assert saved["box"]["APs"] is None and saved["keypoint"]["per_class"]["figure"]["AP"] == pytest.approx(1.0)


def test_results_are_what_the_server_takes(tmp_path):
    dataset = make_dataset(tmp_path, ANNOTATIONS)
    found = perfect(dataset)
    assert to_coco_results(dataset, found, "box")[0] == {
        "image_id": 7, "category_id": 3, "score": pytest.approx(0.9), "bbox": [10, 10, 20, 30],
    }  # fmt: skip
    assert [entry["category_id"] for entry in to_coco_results(dataset, found, "keypoint")] == [90, 90]
    assert to_coco_results(dataset, found, "mask")[0]["segmentation"]["size"] == [100, 120]


@pytest.mark.parametrize("world", range(1, 9))
def test_any_number_of_processes_measures_the_same(tmp_path, world):
    """Simulated: 11 images in batches of 2, every score the same, so that AP hangs on the order of the results."""
    image_ids = [40, 7, 19, 3, 28, 11, 5, 36, 2, 90, 61]
    truth = [rectangle(n, image_ids[n % 11], 3, (5 * n % 60, 7 * n % 40, 20, 20)) for n in range(25)]
    dataset = make_dataset(tmp_path, truth, image_ids)
    whole = [
        {"image_id": image_id, "category_id": 3, "score": 0.5, "bbox": [5.0 * n % 60, 7.0 * n % 40, 20.0, 15.0 + n % 5]}
        for place, image_id in enumerate(image_ids)
        for n in (place, place + 11, place + 12)
    ]
    parts = []
    for rank in range(world):
        own = {dataset.image_id(index) for batch in _ValOrder(11, 2, rank, world) for _, index in batch}
        parts.append([result for result in whole if result["image_id"] in own])
    assert sum(map(len, parts)) == len(whole)
    merged = merge_results(parts, dataset.image_ids)
    assert merged == merge_results([whole], dataset.image_ids) == whole
    backwards = evaluate_results(dataset, {"box": whole[::-1]})["box"]["AP"]
    assert evaluate_results(dataset, {"box": merged})["box"]["AP"] != backwards
