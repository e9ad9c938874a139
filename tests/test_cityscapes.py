"""Cityscapes: its files as targets, and its own definition of AP by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mrcnn_edu.config import DataConfig
from mrcnn_edu.data.cityscapes import CLASSES, CityscapesDataset
from mrcnn_edu.data.loading import train_loader
from mrcnn_edu.evaluation.cityscapes import SMALLEST, evaluate_results
from mrcnn_edu.evaluation.report import as_text
from mrcnn_edu.masks import rle_encode

HEIGHT, WIDTH = 60, 90
PERSON, CAR = 24, 26


def scene(*regions: tuple[int, int, int, int, int]) -> np.ndarray:
    """An instance image of road (7) with rectangles (value, x1, y1, x2, y2) on it."""
    values = np.full((HEIGHT, WIDTH), 7, dtype=np.int32)
    for value, x1, y1, x2, y2 in regions:
        values[y1:y2, x1:x2] = value
    return values


def write(root: Path, *scenes: np.ndarray, split: str = "val") -> CityscapesDataset:
    """A Cityscapes folder with one picture per scene, of two cities."""
    for number, values in enumerate(scenes):
        city = ("aachen", "bonn")[number % 2]
        name = f"{city}_{number:06d}_000019"
        for folder in ("leftImg8bit", "gtFine"):
            (root / folder / split / city).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (40, 90, 10 * number)).save(
            root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png"
        )
        Image.fromarray(values.astype(np.uint16)).save(
            root / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png"
        )
    return CityscapesDataset(root, split)


def found(x1: int, y1: int, x2: int, y2: int, score: float = 0.9, category: int = CAR, image: int = 1) -> dict:
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[y1:y2, x1:x2] = True
    return {"image_id": image, "category_id": category, "score": score, "segmentation": rle_encode(mask)}


def ap(dataset: CityscapesDataset, *results: dict, name: str = "car") -> tuple:
    numbers = evaluate_results(dataset, list(results))["mask"].per_class[name]
    return numbers["AP"], numbers["AP50"]


# Files ---------------------------------------------------------------------------------------------------------------


def test_targets_by_hand(tmp_path: Path) -> None:
    cars = (CAR * 1000, 10, 20, 30, 40), (CAR * 1000 + 1, 30, 20, 35, 40)
    values = scene(*cars, (PERSON, 50, 0, 90, 10), (29001, 0, 0, 5, 5))
    dataset = write(tmp_path, values, scene())
    image, target = dataset[0]
    assert image.shape == (3, HEIGHT, WIDTH) and image[:, 0, 0].tolist() == [40, 90, 0]
    assert target.boxes.tolist() == [[50, 0, 90, 10], [10, 20, 30, 40], [30, 20, 35, 40]]
    assert target.labels.tolist() == [1, 3, 3] and target.crowd.tolist() == [True, False, False]
    assert target.masks.flatten(1).sum(dim=1).tolist() == [400, 400, 100]
    assert len(dataset.target(1)) == 0 and dataset.target(1).masks.shape == (0, HEIGHT, WIDTH)
    assert dataset.image_ids == [1, 2] and dataset.sizes == [(HEIGHT, WIDTH)] * 2
    assert dataset.categories.names == list(CLASSES.values()) and dataset.categories.label(33) == 8


def test_they_are_loaded_like_any_other(tmp_path: Path) -> None:
    dataset = write(tmp_path, *[scene((CAR * 1000 + n, 10, 20, 30, 40)) for n in range(3)], split="train")
    config = DataConfig(min_size=(30,), max_size=60, test_size=30, workers=0)
    images, targets, ids = next(train_loader(dataset, config, 3, seed=0))
    assert sorted(ids) == [1, 2, 3] and images.sizes == [(30, 45)] * 3
    assert all(target.labels.tolist() == [3] and target.masks.sum() == 100 for target in targets)


@pytest.mark.parametrize("damage", ["folder", "empty", "picture", "truth"])
def test_what_is_missing_is_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path, scene())
    if damage == "folder":
        with pytest.raises(NotADirectoryError, match=r"leftImg8bit/test and gtFine/test"):
            CityscapesDataset(tmp_path, "test")
    elif damage == "empty":
        (tmp_path / "gtFine" / "val" / "aachen" / "aachen_000000_000019_gtFine_instanceIds.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"gtFine_instanceIds\.png in"):
            CityscapesDataset(tmp_path)
    elif damage == "picture":
        (tmp_path / "leftImg8bit" / "val" / "aachen" / "aachen_000000_000019_leftImg8bit.png").unlink()
        with pytest.raises(OSError, match=r"aachen_000000_000019_leftImg8bit\.png"):
            CityscapesDataset(tmp_path)[0]
    else:
        path = tmp_path / "gtFine" / "val" / "aachen" / "aachen_000000_000019_gtFine_instanceIds.png"
        dataset = CityscapesDataset(tmp_path)
        path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(OSError, match=r"cannot read the instances in .*aachen_000000"):
            dataset[0]


# AP ------------------------------------------------------------------------------------------------------------------


def test_perfect_is_1_and_nothing_is_0(tmp_path: Path) -> None:
    dataset = write(tmp_path, scene((CAR * 1000, 10, 20, 30, 40)), scene((PERSON * 1000, 0, 0, 20, 20)))
    assert ap(dataset, found(10, 20, 30, 40)) == (1.0, 1.0)
    both = evaluate_results(dataset, [found(10, 20, 30, 40), found(0, 0, 20, 20, category=PERSON, image=2)])
    assert both["mask"]["AP"] == 1.0 and both.instances == 2
    assert "counted by cityscapes" in as_text(both)
    assert evaluate_results(dataset, [])["mask"].numbers == {"AP": 0.0, "AP50": 0.0}
    assert ap(dataset, name="bus") == (None, None)


def test_one_of_two_is_the_half_of_a_straight_line(tmp_path: Path) -> None:
    """Precision 1 at recall 0 (by definition) and at 0.5: an area of 0.5, where COCO has 51/101."""
    dataset = write(tmp_path, scene((CAR * 1000, 0, 0, 20, 20), (CAR * 1000 + 1, 40, 0, 60, 20)))
    assert ap(dataset, found(0, 0, 20, 20)) == (0.5, 0.5)


def test_a_false_alarm_by_hand(tmp_path: Path) -> None:
    """Above the hit: (0, 1), (0, 0), (1, 1/2) enclose 1/4. Below it nothing is lost: (0, 1), (1, 1), (1, 1/2)."""
    dataset = write(tmp_path, scene((CAR * 1000, 0, 0, 20, 20)))
    hit, alarm = found(0, 0, 20, 20, 0.5), (40, 30, 60, 50)
    assert ap(dataset, hit, found(*alarm, 0.9)) == pytest.approx((0.25, 0.25))
    assert ap(dataset, hit, found(*alarm, 0.1)) == pytest.approx((1.0, 1.0))
    # at the same score there is a single threshold: (0, 1), (1, 1/2)
    assert ap(dataset, hit, found(*alarm, 0.5)) == pytest.approx((0.75, 0.75))


def test_an_overlap_must_be_larger_than_the_threshold(tmp_path: Path) -> None:
    """IoU 300/400 = 0.75 exactly: right at 0.50 to 0.70, five of the ten thresholds."""
    dataset = write(tmp_path, scene((CAR * 1000, 0, 0, 20, 20)))
    assert ap(dataset, found(0, 0, 15, 20)) == pytest.approx((0.5, 1.0))


def test_the_better_of_two_is_right_and_the_other_wrong(tmp_path: Path) -> None:
    dataset = write(tmp_path, scene((CAR * 1000, 0, 0, 20, 20)))
    assert ap(dataset, found(0, 0, 20, 20, 0.9), found(0, 0, 20, 20, 0.8)) == (1.0, 1.0)
    two = write(tmp_path / "two", scene((CAR * 1000, 0, 0, 20, 20), (CAR * 1000 + 1, 40, 0, 60, 20)))
    # right at 0.9, wrong at 0.8, right at 0.7: (0, 1), (1/2, 1), (1/2, 1/2), (1, 2/3)
    results = [found(0, 0, 20, 20, 0.9), found(0, 0, 20, 20, 0.8), found(40, 0, 60, 20, 0.7)]
    assert ap(two, *results)[1] == pytest.approx(0.5 + (1 / 2 + 2 / 3) / 2 / 2)


@pytest.mark.parametrize(
    ("ground", "excused"),
    [
        (CAR, True),  # a group of the class
        (PERSON, False),  # a group of another one
        (4, True),  # static: void
        (29, True),  # caravan: left out
        (29001, False),  # the instances of what is left out carry other values, which the official rule overlooks
        (7, False),  # road
    ],
)
def test_what_excuses_a_detection(tmp_path: Path, ground: int, excused: bool) -> None:
    dataset = write(tmp_path, scene((CAR * 1000, 0, 0, 20, 20), (ground, 40, 20, 90, 60)))
    alarm = ap(dataset, found(0, 0, 20, 20, 0.5), found(50, 30, 70, 50, 0.9))
    assert alarm == pytest.approx((1.0, 1.0) if excused else (0.25, 0.25))


def test_a_share_on_void_excuses_below_that_share(tmp_path: Path) -> None:
    """0.7 of the false alarm is void: more than 0.50 to 0.65, four thresholds; 0.70 is not less than 0.7."""
    dataset = write(tmp_path, scene((CAR * 1000, 0, 0, 20, 20), (4, 40, 20, 90, 60)))
    results = found(0, 0, 20, 20, 0.5), found(34, 30, 54, 50, 0.9)  # 14 of 20 columns
    assert ap(dataset, *results) == pytest.approx((0.4 * 1.0 + 0.6 * 0.25, 1.0))


def test_small_instances_do_not_count(tmp_path: Path) -> None:
    assert SMALLEST == 100
    dataset = write(tmp_path, scene((CAR * 1000, 0, 0, 20, 20), (CAR * 1000 + 1, 50, 0, 59, 11)))  # 99 pixels
    assert ap(dataset, found(0, 0, 20, 20)) == (1.0, 1.0)
    assert ap(dataset, found(0, 0, 20, 20, 0.5), found(50, 0, 59, 11, 0.9)) == (1.0, 1.0)
    counts = write(tmp_path / "counts", scene((CAR * 1000, 0, 0, 20, 20), (CAR * 1000 + 1, 50, 0, 60, 10)))  # 100
    assert ap(counts, found(0, 0, 20, 20)) == (0.5, 0.5)


def test_the_wrong_class_is_a_false_alarm(tmp_path: Path) -> None:
    dataset = write(tmp_path, scene((CAR * 1000, 0, 0, 20, 20), (PERSON * 1000, 40, 0, 60, 20)))
    assert ap(dataset, found(40, 0, 60, 20), name="person") == (0.0, 0.0)
    assert ap(dataset, found(40, 0, 60, 20)) == (0.0, 0.0)
