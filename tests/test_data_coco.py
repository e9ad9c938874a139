"""The COCO reader: what it reads, what it refuses, what it drops when told to be lenient."""

from __future__ import annotations

import copy
import gc
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mrcnn_edu.data.coco import Category, CategoryMap, CocoDataset
from mrcnn_edu.masks import rle_counts, rle_encode

HEIGHT, WIDTH = 20, 30
PERSON = ("nose", "left_eye", "right_eye", "left_hip", "right_hip")


def square_mask() -> torch.Tensor:
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[4:9, 6:16] = True
    return mask


def good_file() -> dict[str, Any]:
    """Two images, one without annotations; category ids with a gap; every form of mask; a crowd; keypoints."""
    rle = rle_encode(square_mask())
    polygon = [6, 4, 16, 4, 16, 9, 6, 9]
    common = {"image_id": 70, "area": 50, "bbox": [6, 4, 10, 5], "iscrowd": 0}
    return {
        "info": {"anything": ["is", None, "allowed"]},
        "images": [
            {"id": 70, "file_name": "a.png", "height": HEIGHT, "width": WIDTH},
            {"id": 3, "file_name": "sub/b.png", "height": HEIGHT, "width": WIDTH},
        ],
        "annotations": [
            {"id": 0, "category_id": 90, "segmentation": [polygon], **common},
            {"id": 5, "category_id": 3, "segmentation": rle, **common},
            {"id": 9, "category_id": 3, "segmentation": {"size": rle["size"], "counts": rle_counts(rle).tolist()}}
            | common
            | {"iscrowd": 1},
            {
                "id": 2,
                "category_id": 90,
                "segmentation": [polygon, [20, 10, 25, 10, 25, 15]],
                "keypoints": [7.5, 5.0, 2, 0, 0, 0, 8, 6, 1, 0, 0, 0, 0, 0, 0],
                "num_keypoints": 2,
                **common,
            },
        ],
        "categories": [
            {"id": 90, "name": "person", "keypoints": list(PERSON), "skeleton": [[1, 2], [1, 3]]},
            {"id": 3, "name": "car", "supercategory": "vehicle"},
        ],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images/sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (WIDTH, HEIGHT), (9, 8, 7)).save(tmp_path / "images" / name)
    return tmp_path


def load(folder: Path, content: Any, **options: bool) -> CocoDataset:
    file = folder / "instances.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return CocoDataset(folder / "images", file, **options)


# Reading --------------------------------------------------------------------------------------------


def test_every_form_is_read(folder):
    dataset = load(folder, good_file())
    image, target = dataset[0]
    assert image.shape == (3, HEIGHT, WIDTH) and image[:, 0, 0].tolist() == [9, 8, 7]
    assert target.boxes.tolist() == [[6, 4, 16, 9]] * 4
    assert target.labels.tolist() == [2, 1, 1, 2]
    assert target.crowd.tolist() == [False, False, True, False]
    for row in range(3):
        assert torch.equal(target.masks[row], square_mask())
    assert target.masks[3].sum() > square_mask().sum()
    assert target.keypoints.shape == (4, 5, 3)
    assert target.keypoints[3, 0].tolist() == [7.5, 5, 2] and target.keypoints[3, 2].tolist() == [8, 6, 1]
    assert not target.keypoints[:3].any()


def test_images_without_annotations_stay(folder):
    dataset = load(folder, good_file())
    assert len(dataset) == 2 and dataset.image_ids == [70, 3] and dataset.sizes == [(HEIGHT, WIDTH)] * 2
    _, target = dataset[1]
    assert len(target) == 0 and target.masks.shape == (0, HEIGHT, WIDTH) and target.keypoints.shape == (0, 5, 3)


def test_a_file_without_any_annotation_is_read(folder):
    content = good_file() | {"annotations": []}
    for index in range(2):
        target = load(folder, content).target(index)
        assert len(target) == 0 and target.masks.shape == (0, HEIGHT, WIDTH)
    assert len(load(folder, content | {"images": []})) == 0


def test_category_ids_go_both_ways_and_through_json(folder):
    categories = load(folder, good_file()).categories
    assert categories.names == ["car", "person"]
    assert [categories.category_id(label) for label in (1, 2)] == [3, 90]
    assert [categories.label(number) for number in (3, 90)] == [1, 2]
    assert CategoryMap.from_json(json.loads(json.dumps(categories.to_json()))) == categories
    for wrong in (0, 3):
        with pytest.raises(ValueError, match="labels go from 1 to 2"):
            categories.category_id(wrong)
    with pytest.raises(ValueError, match="unknown category id 4"):
        categories.label(4)
    with pytest.raises(ValueError, match="differ"):
        CategoryMap((Category(1, "a"), Category(1, "b")))


def test_flip_pairs_come_from_the_names(folder):
    dataset = load(folder, good_file())
    assert dataset.joints == 5 and dataset.flip_pairs == ((1, 2), (3, 4))
    content = good_file()
    content["categories"][0]["keypoints"][2] = "other_eye"
    with pytest.raises(ValueError, match="'left_eye' but no 'right_eye'"):
        load(folder, content)
    without = load(folder, content, keypoints=False)
    assert without.joints == 0 and without.flip_pairs == () and without.target(0).keypoints is None


def test_the_seventeen_joints_of_coco(folder):
    parts = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
    names = ["nose"] + [f"{side}_{part}" for part in parts for side in ("left", "right")]
    content = good_file()
    content["categories"] = [{"id": 1, "name": "person", "keypoints": names, "skeleton": [[16, 14]]}]
    content["annotations"] = content["annotations"][:1]
    content["annotations"][0] |= {"category_id": 1, "keypoints": [3, 4, 2] * 17, "num_keypoints": 17}
    dataset = load(folder, content)
    assert dataset.joints == 17 and dataset.flip_pairs == tuple((i, i + 1) for i in range(1, 17, 2))
    assert dataset.target(0).keypoints.shape == (1, 17, 3)


def test_boxes_without_any_mask_are_enough(folder):
    content = good_file()
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    target = load(folder, content).target(0)
    assert target.masks is None and len(target) == 4


def test_boxes_are_clipped_to_the_image(folder):
    content = good_file()
    content["annotations"][0]["bbox"] = [-4, 10.5, 10, 100]
    assert load(folder, content).target(0).boxes[0].tolist() == [0, 10.5, 6, 20]


def test_crowds_may_be_polygons(folder):
    content = good_file()
    content["annotations"][0]["iscrowd"] = 1
    assert load(folder, content).target(0).crowd[0]


def test_masks_are_pycocotools_own(folder):
    dataset = load(folder, good_file())
    theirs = COCO(str(folder / "instances.json"))
    for mask, number in zip(dataset.target(0).masks, (0, 5, 9, 2)):
        assert torch.equal(mask, torch.from_numpy(theirs.annToMask(theirs.anns[number])).bool())


# Refusing -------------------------------------------------------------------------------------------

POINTS = [1, 1, 9, 1, 9, 9]

# What is changed in the good file, and what strict reading says; lenient reading drops this one annotation.
ANNOTATION_FAULTS = [
    ({"id": 5}, r"annotation 5: field 'id' occurs twice"),
    ({"id": "0"}, r"annotation number 0: field 'id' must be a whole number, got '0'"),
    ({"id": True}, r"annotation number 0: field 'id' must be a whole number"),
    ({"id": None}, r"annotation number 0: field 'id' must be a whole number"),
    ({"id": 2**80}, r"annotation number 0: field 'id' must be a whole number"),
    ({"image_id": 71}, r"annotation 0: field 'image_id'.*got 71"),
    ({"image_id": "70"}, r"annotation 0: field 'image_id'"),
    ({"image_id": [70]}, r"annotation 0: field 'image_id'"),
    ({"category_id": 4}, r"annotation 0: field 'category_id'.*got 4"),
    ({"category_id": None}, r"annotation 0: field 'category_id'"),
    ({"bbox": [6, 4, 0, 5]}, r"annotation 0: field 'bbox' must have a positive width.*strict=False"),
    ({"bbox": [6, 4, 10, -5]}, r"annotation 0: field 'bbox' must have a positive"),
    ({"bbox": [6, 4, 10]}, r"annotation 0: field 'bbox' must be \[x, y, width, height\]"),
    ({"bbox": [6, 4, 10, "5"]}, r"annotation 0: field 'bbox' must be"),
    ({"bbox": None}, r"annotation 0: field 'bbox' must be"),
    ({"bbox": [6, 4, 10, 1e30]}, r"annotation 0: field 'bbox' must be"),
    ({"bbox": [31, 4, 10, 5]}, r"annotation 0: field 'bbox'.*no extent inside its image"),
    ({"bbox": [6, -50, 10, 5]}, r"annotation 0: field 'bbox'.*no extent inside its image"),
    ({"iscrowd": 2}, r"annotation 0: field 'iscrowd' must be 0 or 1, got 2"),
    ({"iscrowd": "0"}, r"annotation 0: field 'iscrowd'"),
    ({"area": -1}, r"annotation 0: field 'area'"),
    ({"area": "big"}, r"annotation 0: field 'area'"),
    ({"segmentation": []}, r"annotation 0: field 'segmentation' must be polygons or run lengths"),
    ({"segmentation": None}, r"annotation 0: field 'segmentation'"),
    ({"segmentation": "polygon"}, r"annotation 0: field 'segmentation'"),
    ({"segmentation": [[1, 1, 6, 6]]}, r"annotation 0: field 'segmentation', polygon 0: .*three corners"),
    ({"segmentation": [POINTS[:5]]}, r"annotation 0: field 'segmentation', polygon 0"),
    ({"segmentation": [[]]}, r"annotation 0: field 'segmentation', polygon 0"),
    ({"segmentation": [["1", *POINTS[1:]]]}, r"annotation 0: field 'segmentation', polygon 0: .*numbers"),
    ({"segmentation": POINTS}, r"annotation 0: field 'segmentation', polygon 0: .*flat list"),
    ({"segmentation": {"size": [20, 30], "counts": "0"}}, r"annotation 0: field 'segmentation': the runs cover 0"),
    ({"segmentation": {"size": [20, 30], "counts": [600.0]}}, r"annotation 0: field 'segmentation': .*whole"),
    ({"segmentation": {"size": [30, 20], "counts": [600]}}, r"annotation 0: .* are for 30 x 20, the image is 20 x 30"),
    ({"segmentation": {"size": [2**40, 2], "counts": [1]}}, r"annotation 0: field 'segmentation': a mask may have"),
    ({"segmentation": {"counts": [600]}}, r"annotation 0: field 'segmentation': run lengths need 'size'"),
    ({"keypoints": [1, 1, 2] * 4}, r"annotation 0: field 'keypoints' must hold 5 times"),
    ({"keypoints": [1, 1, 3] + [0] * 12}, r"annotation 0: field 'keypoints': each v must be 0, 1 or 2"),
    ({"keypoints": ["1", 1, 2] + [0] * 12}, r"annotation 0: field 'keypoints'"),
    ({"keypoints": [1, 1, 2] + [0] * 12, "num_keypoints": 2}, r"annotation 0: field 'num_keypoints' is 2, but 1"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), ANNOTATION_FAULTS)
def test_faulty_annotations(folder, change, message):
    content = good_file()
    content["annotations"][0] |= change
    with pytest.raises(ValueError, match=r"instances\.json: " + message) as caught:
        load(folder, content)
    assert str(caught.value).count("instances.json") == 1
    dataset = load(folder, content, strict=False)
    assert len(dataset.target(0)) == 3 and len(dataset) == 2
    assert dataset.report and all("instances.json" in sentence for sentence in dataset.report)


def test_lenient_reading_drops_a_bad_polygon_alone(folder):
    content = good_file()
    content["annotations"][3]["segmentation"].append([1, 1, 6, 6])
    with pytest.raises(ValueError, match=r"annotation 2: field 'segmentation', polygon 2"):
        load(folder, content)
    dataset = load(folder, content, strict=False)
    assert len(dataset.target(0)) == 4 and len(dataset.report) == 1
    assert torch.equal(dataset.target(0).masks, load(folder, good_file()).target(0).masks)


def test_all_faults_are_reported(folder):
    content = good_file()
    content["annotations"][0]["bbox"] = None
    content["annotations"][1]["category_id"] = 8
    report = load(folder, content, strict=False).report
    assert len(report) == 2 and "annotation 0" in report[0] and "annotation 5" in report[1]
    assert load(folder, good_file(), strict=False).report == []


IMAGE_FAULTS = [
    ({"id": 3}, r"image 3: field 'id' occurs twice"),
    ({"id": "70"}, r"image number 0: field 'id'"),
    ({"file_name": "../secret.png"}, r"image 70: file name '../secret.png' must be a relative path"),
    ({"file_name": "/etc/passwd"}, r"image 70: file name"),
    ({"file_name": None}, r"image 70: field 'file_name'"),
    ({"height": 0}, r"image 70: field 'height' must be 1 to 32768 pixels, got 0"),
    ({"width": -3}, r"image 70: field 'width'"),
    ({"width": 30.0}, r"image 70: field 'width'"),
    ({"width": None}, r"image 70: field 'width'"),
    ({"height": 30000, "width": 30000}, r"image 70: 'height' x 'width'"),
]


@pytest.mark.parametrize(("change", "message"), IMAGE_FAULTS)
def test_faulty_images(folder, change, message):
    content = good_file()
    if "id" in change:
        content["images"] = content["images"][::-1]
        content["images"][1 if change["id"] == 3 else 0] |= change
    else:
        content["images"][0] |= change
    with pytest.raises(ValueError, match=r"instances\.json: " + message):
        load(folder, content)
    assert len(load(folder, content, strict=False)) == 1


CATEGORY_FAULTS = [
    ({"id": 3}, r"category 3: field 'id' occurs twice"),
    ({"name": ""}, r"category 90: field 'name'"),
    ({"keypoints": "nose"}, r"category 90: field 'keypoints'"),
    ({"skeleton": [[0, 1]]}, r"category 90: field 'skeleton' must hold pairs of joints out of 1..5"),
    ({"skeleton": [[1, 6]]}, r"category 90: field 'skeleton'"),
]


@pytest.mark.parametrize(("change", "message"), CATEGORY_FAULTS)
def test_faulty_categories(folder, change, message):
    content = good_file()
    content["categories"][0] |= change
    with pytest.raises(ValueError, match=r"instances\.json: " + message):
        load(folder, content)
    load(folder, content, strict=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "with the list 'images'"),
        ('{"images": []}', "with the list 'annotations'"),
        ('{"images": {}, "annotations": [], "categories": []}', "with the list 'images'"),
        ('{"images": [], "annotations": [], "categories": []}', "no usable category"),
        ('{"images": [NaN]}', "NaN is not a number"),
        ('{"images": [-Infinity]}', "-Infinity is not a number"),
        ('{"images": [' + "9" * 5000 + "]}", "not valid JSON"),
        ('{"images": ' + "[" * 200_000, "nested too deeply"),
        ('{"images": [1], "images": [2]}', "keys given twice"),
        ('{"images": [7], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "must be an object, got int"),
        ('{"images": [], "annotations": ["x"], "categories": [{"id": 1, "name": "a"}]}', "must be an object, got str"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a", "keypoints": ["x"]},'
            ' {"id": 2, "name": "b", "keypoints": ["x", "y"]}]}',
            "the same number of them",
        ),
    ],
)
def test_faulty_json(folder, text, message):
    with pytest.raises(ValueError, match=r"instances\.json.*" + message):
        load(folder, text)


def test_numbers_that_are_not_finite_do_not_enter_by_overflow(folder):
    text = json.dumps(good_file()).replace('"bbox": [6,', '"bbox": [1e999,', 1)
    with pytest.raises(ValueError, match="annotation 0: field 'bbox'"):
        load(folder, text)


def test_duplicate_keys_name_their_object(folder):
    text = json.dumps(good_file()).replace('"iscrowd": 0', '"iscrowd": 0, "iscrowd": 1', 1)
    with pytest.raises(ValueError, match=r"object with id 0: keys given twice: \['iscrowd'\]"):
        load(folder, text)
    assert len(load(folder, text, strict=False).report) == 1


def test_missing_files_are_os_errors(folder):
    with pytest.raises(OSError, match=r"nowhere\.json"):
        CocoDataset(folder / "images", folder / "nowhere.json")
    with pytest.raises(OSError, match="nowhere does not exist"):
        CocoDataset(folder / "nowhere", folder / "instances.json")
    (folder / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.json: not UTF-8"):
        CocoDataset(folder / "images", folder / "binary.json")


def test_an_image_of_another_size_is_an_error_naming_both(folder):
    dataset = load(folder, good_file())
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "images/a.png")
    with pytest.raises(ValueError, match=r"instances\.json: image 70 is stated as 20 x 30 .*a\.png is 30 x 20"):
        dataset[0]


def test_the_stated_size_is_that_of_the_upright_image(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "images/a.png", exif=exif)
    assert load(folder, good_file())[0][0].shape == (3, HEIGHT, WIDTH)


def test_an_image_link_out_of_the_folder_is_refused(folder):
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "secret.png")
    (folder / "images/a.png").unlink()
    (folder / "images/a.png").symlink_to(folder / "secret.png")
    with pytest.raises(ValueError, match="leads out"):
        load(folder, good_file())[0]


def test_random_changes_are_refused_or_readable(folder):
    """A value anywhere replaced by another: a ValueError naming the file, or a data set that can be read."""
    generator = torch.Generator().manual_seed(0)
    junk = [None, -1, 0, 2**70, 1.5, "", "x", [], {}, [[]], True, [1e308] * 4]

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    for _ in range(200):
        content = good_file()
        entry = content[("images", "annotations", "categories")[draw(3)]]
        entry = entry[draw(len(entry))]
        key = sorted(entry)[draw(len(entry))]
        entry[key] = copy.deepcopy(junk[draw(len(junk))])
        for strict in (True, False):
            try:
                dataset = load(folder, content, strict=strict)
            except ValueError as error:
                assert "instances.json" in str(error)
                continue
            for index in range(len(dataset)):
                assert bool(dataset.target(index).boxes.isfinite().all())


# Memory ---------------------------------------------------------------------------------------------


def test_annotations_are_flat(folder):
    """The number of Python objects must not grow with the data, or every worker would copy them."""

    def objects(copies: int) -> int:
        content = good_file()
        for number in range(copies):
            content["images"].append({**content["images"][0], "id": 1000 + number, "file_name": f"{number}.png"})
            content["annotations"].append({**content["annotations"][0], "id": 1000 + number, "image_id": 1000 + number})
        dataset = load(folder, content)
        del content
        gc.collect()
        before = len(gc.get_objects())
        assert len(dataset) == 2 + copies
        del dataset
        gc.collect()
        return before - len(gc.get_objects())

    assert objects(1000) <= objects(0) + 20


def test_a_data_set_can_be_sent_to_another_process(folder):
    dataset = load(folder, good_file())
    copied = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copied.target(0).masks, dataset.target(0).masks)
    assert copied.categories == dataset.categories


def test_pycocotools_never_sees_unchecked_runs(folder, monkeypatch):
    content = good_file()
    content["annotations"][1]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": "zz"}
    monkeypatch.setattr(coco_mask, "decode", lambda _: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="annotation 5"):
        load(folder, content)


def test_a_name_that_no_file_can_have(tmp_path):
    with pytest.raises(ValueError, match=r"'a\\x00b.json' cannot be the name of a file"):
        CocoDataset(tmp_path, "a\0b.json")
