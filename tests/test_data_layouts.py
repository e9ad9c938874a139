"""Where data lie: our layout, COCO's by year and by name, Cityscapes'; and what COCO has of hidden test images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from test_cityscapes import scene, write

from mrcnn_edu.config import DataConfig
from mrcnn_edu.data.cityscapes import CityscapesDataset
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.layouts import find_split, open_dataset, with_folder
from mrcnn_edu.evaluation.coco import evaluate_results


def touch(root: Path, *names: str) -> Path:
    """Files of these names; a name that ends in a slash is a folder."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).mkdir(exist_ok=True) if name.endswith("/") else (root / name).write_text("{}")
    return root


COCO = (
    "train2017/", "val2017/", "test2017/", "unlabeled2017/",
    *(f"annotations/{kind}_{part}2017.json" for kind in ("instances", "person_keypoints") for part in ("train", "val")),
    *(f"annotations/image_info_{part}2017.json" for part in ("test", "test-dev", "unlabeled")),
)  # fmt: skip
COCO_2014 = ("images/train2014/", "images/val2014/", "annotations/instances_train2014.json",
             "annotations/instances_minival2014.json", "annotations/person_keypoints_minival2014.json",
             "annotations/instances_valminusminival2014.json")  # fmt: skip


@pytest.mark.parametrize(
    ("names", "split", "keypoints", "images", "annotations"),
    [
        (("train/", "train.json"), "train", False, "train", "train.json"),
        (COCO, "train", False, "train2017", "annotations/instances_train2017.json"),
        (COCO, "val", True, "val2017", "annotations/person_keypoints_val2017.json"),
        (COCO, "val2017", False, "val2017", "annotations/instances_val2017.json"),
        (COCO, "test-dev", False, "test2017", "annotations/image_info_test-dev2017.json"),
        (COCO, "test", True, "test2017", "annotations/image_info_test2017.json"),
        (COCO, "unlabeled", False, "unlabeled2017", "annotations/image_info_unlabeled2017.json"),
        (COCO_2014, "train", True, "images/train2014", "annotations/instances_train2014.json"),
        (COCO_2014, "minival", False, "images/val2014", "annotations/instances_minival2014.json"),
        (COCO_2014, "minival", True, "images/val2014", "annotations/person_keypoints_minival2014.json"),
        (COCO_2014, "valminusminival", False, "images/val2014", "annotations/instances_valminusminival2014.json"),
        (("leftImg8bit/val/", "gtFine/val/"), "val", False, "leftImg8bit/val", "gtFine/val"),
    ],
)
def test_parts_are_found_by_name(tmp_path: Path, names, split, keypoints, images, annotations) -> None:
    folder = touch(tmp_path, *names)
    assert find_split(folder, split, keypoints) == (folder / images, folder / annotations)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no val data.*gtFine.*val2017 with .*instances_val2017\.json"
    ) as raised:
        find_split(touch(tmp_path, "val2017/", "val.json"), "val", False)
    assert "val2014" in str(raised.value)


def test_a_config_for_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = with_folder(DataConfig(), touch(tmp_path, *COCO), keypoints=False)
    assert found.train_images.endswith("train2017") and found.val_annotations.endswith("instances_val2017.json")
    alone = with_folder(DataConfig(), touch(tmp_path / "own", "train/", "train.json"), keypoints=False)
    assert alone.val_images == "" and "nothing will be measured" in capsys.readouterr().out


def test_cityscapes_opens_as_what_it_is(tmp_path: Path) -> None:
    write(tmp_path, scene((26000, 0, 0, 20, 20)))
    assert isinstance(open_dataset(*find_split(tmp_path, "val", False), strict=True), CityscapesDataset)


def test_images_without_annotations_can_be_predicted_but_not_measured(tmp_path: Path) -> None:
    """COCO's test images come as a file without the list of annotations."""
    touch(tmp_path, "test2017/", "annotations/image_info_test-dev2017.json")
    Image.new("RGB", (30, 20)).save(tmp_path / "test2017" / "1.jpg")
    content = {"images": [{"id": 1, "file_name": "1.jpg", "width": 30, "height": 20}],
               "categories": [{"id": 3, "name": "car"}]}  # fmt: skip
    (tmp_path / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(content))
    dataset = open_dataset(*find_split(tmp_path, "test-dev", False), strict=True)
    assert len(dataset) == 1 and len(dataset[0][1]) == 0
    found = [{"image_id": 1, "category_id": 3, "score": 0.5, "bbox": [0, 0, 5, 5]}]
    assert evaluate_results(dataset, {"box": found})["box"]["AP"] is None
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="list 'annotations'"):
        CocoDataset(tmp_path / "test2017", tmp_path / "train.json")
