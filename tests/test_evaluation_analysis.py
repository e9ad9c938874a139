"""evaluation.analysis and its figures: which class is taken for which, and what kind of mistake each detection is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_evaluation import make_dataset, perfect, rectangle

from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.evaluation.analysis import ERRORS, confusion, errors
from mrcnn_edu.evaluation.coco import available_counter, evaluate, evaluate_results
from mrcnn_edu.evaluation.figures import draw_confusion, draw_curves, draw_errors
from mrcnn_edu.evaluation.results import to_coco_results
from mrcnn_edu.structures import Detections

CATEGORIES = [
    {"id": 1, "name": "cat", "supercategory": "animal"},
    {"id": 2, "name": "dog", "supercategory": "animal"},
    {"id": 5, "name": "bus", "supercategory": "vehicle"},
]
CAT, DOG, BUS = 1, 2, 5


def box(image_id: int, category_id: int, corners: tuple, score: float) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": list(corners), "score": score}


@pytest.fixture
def dataset(tmp_path) -> CocoDataset:
    """Image 7: two cats, a dog, a bus and a crowd of cats; image 11: three more buses."""
    truth = [
        rectangle(1, 7, CAT, (0, 0, 20, 20)),
        rectangle(2, 7, CAT, (30, 0, 20, 20)),
        rectangle(3, 7, DOG, (60, 0, 20, 20)),
        rectangle(4, 7, BUS, (0, 40, 20, 20)),
        rectangle(5, 7, CAT, (60, 40, 50, 50), crowd=1),
        *(rectangle(6 + n, 11, BUS, (30 * n, 0, 20, 20)) for n in range(3)),
    ]
    return make_dataset(tmp_path, truth, categories=CATEGORIES)


def test_errors_by_hand(dataset: CocoDataset) -> None:
    results = [
        box(7, CAT, (0, 0, 20, 20), 0.9),  # correct
        box(7, CAT, (60, 2, 20, 20), 0.8),  # on the dog, which is an animal too: similar
        box(7, CAT, (30, 0, 20, 20), 0.1),  # correct, but the third of two cats: not looked at
        box(7, DOG, (63, 0, 31, 20), 0.9),  # 17 of 34 columns: an IoU of 0.5, correct
        box(7, BUS, (0, 0, 20, 20), 0.9),  # on a cat: other
        box(11, BUS, (0, 12, 20, 20), 0.8),  # 8 of 32 rows: 0.25, localisation
        box(11, BUS, (100, 80, 20, 20), 0.7),  # background
        box(11, BUS, (31, 0, 20, 20), 0.6),  # correct
    ]
    counts = errors(dataset, results)
    assert list(counts["cat"]) == list(ERRORS)
    assert counts == {
        "cat": dict(zip(ERRORS, (1, 0, 1, 0, 0, 1))),
        "dog": dict(zip(ERRORS, (1, 0, 0, 0, 0, 0))),
        "bus": dict(zip(ERRORS, (1, 1, 0, 1, 1, 3))),
    }
    assert errors(dataset, results, groups={"cat": "a", "dog": "b"})["cat"]["other"] == 1


def test_a_second_detection_of_an_instance_is_a_matter_of_localisation(dataset: CocoDataset) -> None:
    twice = [box(7, CAT, (0, 0, 20, 20), 0.9), box(7, CAT, (1, 0, 20, 20), 0.8)]
    assert errors(dataset, twice)["cat"] == dict(zip(ERRORS, (1, 1, 0, 0, 0, 1)))


def test_confusion_by_hand(dataset: CocoDataset) -> None:
    results = [
        box(7, CAT, (0, 0, 20, 20), 0.9),
        box(7, DOG, (30, 0, 20, 20), 0.8),  # a cat taken for a dog
        box(7, CAT, (30, 0, 20, 20), 0.7),  # the right class, but the cat is taken: found where nothing is
        box(7, BUS, (0, 40, 20, 20), 0.4),  # below the score
        box(7, CAT, (70, 50, 20, 20), 0.9),  # in the crowd: does not count
        box(7, BUS, (100, 0, 20, 20), 0.9),  # nothing there
    ]
    table = confusion(dataset, results)
    assert table.tolist() == [[0, 1, 0, 1], [0, 1, 1, 0], [1, 0, 0, 0], [4, 0, 0, 0]]
    assert confusion(dataset, results, score_threshold=0.3)[3].tolist() == [3, 0, 0, 1]


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_perfect_detections_make_no_mistake(dataset: CocoDataset, kind: str) -> None:
    results = to_coco_results(dataset, perfect(dataset), kind)
    assert confusion(dataset, results, kind).tolist() == np.diag([0, 2, 1, 4]).tolist()
    for name, count in (("cat", 2), ("dog", 1), ("bus", 4)):
        assert errors(dataset, results, kind)[name] == dict.fromkeys(ERRORS, 0) | {"correct": count}


def test_nothing_found_is_all_missed(dataset: CocoDataset) -> None:
    assert [found["missed"] for found in errors(dataset, []).values()] == [2, 1, 4]
    assert confusion(dataset, [])[1:, 0].tolist() == [2, 1, 4]


def test_curves_belong_to_the_numbers(dataset: CocoDataset) -> None:
    """AP50 of a class is the mean of its curve at IoU 0.5; one of two cats found is precision 1 up to recall 0.5."""
    result = evaluate_results(dataset, {"box": [box(7, CAT, (0, 0, 20, 20), 0.9)]})["box"]
    assert result.precision.shape == (10, 101, 3)
    assert result.precision[0, :, 0].tolist() == pytest.approx([1.0] * 51 + [0.0] * 50)
    for number, found in enumerate(result.per_class.values()):
        assert found["AP50"] == pytest.approx(result.precision[0, :, number].mean())


def test_figures_show_the_numbers(dataset: CocoDataset) -> None:
    result = evaluate(dataset, perfect(dataset), ["box"])["box"]
    left, right = draw_curves(result).axes
    assert [line.get_label() for line in left.lines] == ["IoU 0.5", "IoU 0.6", "IoU 0.7", "IoU 0.8", "IoU 0.9"]
    assert [line.get_label() for line in right.lines] == ["cat 100", "dog 100", "bus 100"]
    assert right.lines[0].get_ydata().min() == pytest.approx(1.0)
    (axes,) = draw_confusion(np.array([[0, 5, 0], [1, 2, 0], [0, 0, 3]]), ["cat", "dog"]).axes
    assert sorted(text.get_text() for text in axes.texts) == ["1", "2", "3", "5"]
    (axes,) = draw_errors({"cat": dict(zip(ERRORS, (3, 1, 0, 0, 0, 1))), "dog": dict.fromkeys(ERRORS, 0)}).axes
    widths = {bars.get_label(): bars[0].get_width() for bars in axes.containers}
    assert widths == {"correct": 0.75, "localisation": 0.25, "similar": 0, "other": 0, "background": 0, "missed": 0.25}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat (4)"]


@pytest.mark.skipif(
    available_counter() == "pycocotools", reason="needs faster-coco-eval (pip install mrcnn_edu[count])"
)
@pytest.mark.parametrize("seed", range(4))
def test_both_counters_give_the_same_numbers(tmp_path, seed: int) -> None:
    """Random truth and noisy detections of boxes, masks and keypoints; crowds, id 0 and equal scores among them."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    truth = [
        rectangle(n, (7, 11)[n % 2], (3, 90)[drawn(0, 2)], (drawn(0, 60), drawn(0, 50), drawn(3, 55), drawn(3, 45)),
                  crowd=int(n % 7 == 6))
        for n in range(14)
    ]  # fmt: skip
    dataset = make_dataset(tmp_path, truth)
    predictions = {}
    for image_id, found in perfect(dataset).items():
        noise = torch.randn(len(found), 4, generator=generator) * 2
        boxes = (found.boxes + noise).clamp(min=0)
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        scores = torch.randint(1, 5, (len(found),), generator=generator) / 5
        predictions[image_id] = Detections(boxes, scores, found.labels, found.mask_probs, found.keypoints)
    results = {kind: to_coco_results(dataset, predictions, kind) for kind in ("box", "mask", "keypoint")}
    slow, fast = (
        evaluate_results(dataset, results, area_scale=0.3, counter=counter).to_json()
        for counter in ("pycocotools", "faster-coco-eval")
    )
    for kind in results:  # up to the last bit, which depends on the order of sums
        left, right = fast[kind].pop("per_class"), slow[kind].pop("per_class")
        assert fast[kind] == pytest.approx(slow[kind], abs=1e-12)
        assert left.keys() == right.keys()
        assert all(left[name] == pytest.approx(right[name], abs=1e-12) for name in left)
    assert 0 < slow["box"]["AP"] < 1
    assert evaluate_results(dataset, {"box": []}, counter="faster-coco-eval")["box"]["AP"] == 0.0
