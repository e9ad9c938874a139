"""Where pycocotools is known to be wrong: each trap with its answer, and with ours."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_evaluation import make_dataset, rectangle

from mrcnn_edu.evaluation.coco import evaluate_results
from mrcnn_edu.evaluation.results import merge_results
from mrcnn_edu.masks import rle_encode

BOX = (10, 10, 40, 30)
PLATES = [{"id": 3, "name": "plate"}]


def found(image_id: int = 7, box: Any = BOX, score: float = 0.9) -> dict[str, Any]:
    """One result, right but for what is said."""
    return {"image_id": image_id, "category_id": 3, "bbox": list(map(float, box)), "score": score}


def theirs(folder: Path, results: list[dict[str, Any]], kind: str = "bbox") -> float:
    """AP as pycocotools has it from the same file; -1 is its word for nothing to measure."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "truth.json"))
        evaluator = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats[0]


def write(folder: Path, **changes: Any) -> None:
    """The file of ``make_dataset`` with some lists replaced."""
    make_dataset(folder, [rectangle(1, 7, 3, BOX)], categories=PLATES)
    content = json.loads((folder / "truth.json").read_text())
    (folder / "truth.json").write_text(json.dumps(content | changes))


def refuses_file(folder: Path, message: str) -> None:
    """Strict reading names what is wrong."""
    from mrcnn_edu.data.coco import CocoDataset

    with pytest.raises(ValueError, match=message):
        CocoDataset(folder / "images", folder / "truth.json")


def ap(dataset, results, kind: str = "box") -> float | None:
    return evaluate_results(dataset, {kind: results}, counter="pycocotools")[kind]["AP"]


def test_annotation_id_0_is_no_match(tmp_path):
    dataset = make_dataset(tmp_path, [rectangle(0, 7, 3, BOX)], categories=PLATES)
    assert theirs(tmp_path, [found()]) == 0.0
    assert ap(dataset, [found()]) == pytest.approx(1.0)


def test_annotations_with_one_id(tmp_path):
    annotations = [rectangle(5, 7, 3, BOX), rectangle(5, 11, 3, BOX)]
    with pytest.raises(ValueError, match="annotation 5: field 'id' occurs twice"):
        make_dataset(tmp_path, annotations, categories=PLATES)
    assert theirs(tmp_path, [found(7), found(11)]) < 1
    lenient = make_dataset(tmp_path, annotations, categories=PLATES, strict=False)
    assert ap(lenient, [found(7)]) == pytest.approx(1.0) and len(lenient.report) == 1


def test_images_with_one_id(tmp_path):
    image = {"id": 7, "file_name": "7.png", "width": 120, "height": 100}
    write(tmp_path, images=[image, image | {"file_name": "11.png", "width": 60}])
    assert theirs(tmp_path, [found()]) == pytest.approx(1.0)  # as if nothing were wrong
    refuses_file(tmp_path, "image 7: field 'id' occurs twice")


def test_an_annotation_of_no_image(tmp_path):
    write(tmp_path, annotations=[rectangle(1, 7, 3, BOX), rectangle(2, 99, 3, BOX)])
    assert theirs(tmp_path, [found()]) == pytest.approx(1.0)
    refuses_file(tmp_path, "annotation 2: field 'image_id'")


def test_an_annotation_of_no_category(tmp_path):
    write(tmp_path, annotations=[rectangle(1, 7, 4, BOX)])
    assert theirs(tmp_path, [found()]) == -1
    refuses_file(tmp_path, "annotation 1: field 'category_id'")


def test_no_results(tmp_path):
    dataset = make_dataset(tmp_path, [rectangle(1, 7, 3, BOX)], categories=PLATES)
    with pytest.raises(IndexError):
        theirs(tmp_path, [])
    assert ap(dataset, []) == 0.0


@pytest.mark.parametrize("result", [found(score=math.nan), found(box=(10, 10, math.nan, 30))])
def test_results_that_are_not_numbers(tmp_path, result):
    dataset = make_dataset(tmp_path, [rectangle(1, 7, 3, BOX)], categories=PLATES)
    assert theirs(tmp_path, [result]) == pytest.approx(1.0)  # a hit
    with pytest.raises(ValueError, match=r"result 0: .*finite.*nan"):
        ap(dataset, [result])


def test_an_image_that_two_processes_have_seen(tmp_path):
    dataset = make_dataset(tmp_path, [rectangle(1, 7, 3, BOX), rectangle(2, 11, 3, BOX)], categories=PLATES)
    parts = [[found(7, score=0.9), found(11, score=0.8)], [found(7, score=0.9)]]  # padding made the shares equal
    assert theirs(tmp_path, [*parts[0], *parts[1]]) < 0.9
    assert ap(dataset, merge_results(parts, dataset.image_ids)) == pytest.approx(1.0)


def test_masks_of_another_size(tmp_path):
    dataset = make_dataset(tmp_path, [rectangle(1, 7, 3, BOX)], categories=PLATES)
    small = torch.zeros(50, 60, dtype=torch.bool)
    small[5:20, 5:25] = True
    result = {"image_id": 7, "category_id": 3, "score": 0.9, "segmentation": rle_encode(small)}
    assert theirs(tmp_path, [result], "segm") == 0.0
    with pytest.raises(ValueError, match="the mask is 50 x 60 but image 7 is 100 x 120"):
        ap(dataset, [result], "mask")


@pytest.mark.parametrize("counts", ["", "1", "zz", "PPYo1"])
def test_runs_that_do_not_fill_the_mask(tmp_path, counts):
    """pycocotools reads memory that is not its own, hangs or dies of these, so it is not asked."""
    dataset = make_dataset(tmp_path, [rectangle(1, 7, 3, BOX)], categories=PLATES)
    result = {"image_id": 7, "category_id": 3, "score": 0.9, "segmentation": {"size": [100, 120], "counts": counts}}
    with pytest.raises(ValueError, match="result 0: "):
        ap(dataset, [result], "mask")


def test_the_callers_list_stays(tmp_path):
    dataset = make_dataset(tmp_path, [rectangle(1, 7, 3, BOX)], categories=PLATES)
    results = [found()]
    with contextlib.redirect_stdout(io.StringIO()):
        COCO(str(tmp_path / "truth.json")).loadRes(results)
    assert set(results[0]) > set(found())  # an id, an area, a polygon
    results = [found()]
    ap(dataset, results)
    assert results == [found()]


def test_a_class_of_crowds_alone_has_no_ap(tmp_path):
    dataset = make_dataset(tmp_path, [rectangle(1, 7, 3, BOX, crowd=1)], categories=PLATES)
    assert theirs(tmp_path, [found()]) == -1  # a number that a mean would take in
    assert ap(dataset, [found()]) is None


@pytest.mark.parametrize("result", [found(image_id=8), found() | {"category_id": 4}])
def test_results_on_what_is_not_there(tmp_path, result):
    dataset = make_dataset(tmp_path, [rectangle(1, 7, 3, BOX)], categories=PLATES)
    with contextlib.suppress(AssertionError):  # pycocotools' answer to an unknown image; gone under python -O
        assert theirs(tmp_path, [result, found()]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"result 0: (image_id 8|category_id 4)"):
        ap(dataset, [result, found()])


def test_more_masks_than_a_byte_counts(tmp_path):
    """From 256 masks on numpy 2 overflows in pycocotools' area of a list; ours takes them one by one."""
    dataset = make_dataset(tmp_path, [rectangle(1, 7, 3, BOX)], categories=PLATES)
    mask = torch.zeros(100, 120, dtype=torch.bool)
    mask[10:40, 10:50] = True
    results = [
        {"image_id": 7, "category_id": 3, "score": float(score), "segmentation": rle_encode(mask)}
        for score in np.linspace(0.1, 0.9, 300)
    ]
    assert ap(dataset, results, "mask") == pytest.approx(1.0)
