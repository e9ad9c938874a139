"""Data distillation: how many, which, and that what is written trains the next model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_runs
from training_runs import DATA, tiny_model, with_train

from mrcnn_edu.augmentation import Augmentation
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.loading import train_loader
from mrcnn_edu.data.parts import Subset, Union, with_keypoints
from mrcnn_edu.data.shapes import write
from mrcnn_edu.inference import predict_dataset
from mrcnn_edu.structures import Detections
from mrcnn_edu.training.distillation import distil, expected_counts, select, write_annotations
from mrcnn_edu.training.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[CocoDataset, CocoDataset]:
    """Labelled images, and a held-back part whose annotations nobody looks at."""
    folder = write(tmp_path_factory.mktemp("shapes") / "data", train=6, val=4, size=64, seed=1)
    return training_runs.datasets(folder)


def scored(*rows: tuple[float, int]) -> Detections:
    count = len(rows)
    boxes = torch.tensor([[0.0, 0, 8, 8]]).repeat(count, 1)
    return Detections(boxes, torch.tensor([s for s, _ in rows]), torch.tensor([label for _, label in rows]))


def test_the_expected_number_by_hand(data) -> None:
    content = json.loads(data[0].annotations_file.read_text())
    counts = [
        sum(a["category_id"] == c["id"] and not a["iscrowd"] for a in content["annotations"]) / 6
        for c in content["categories"]
    ]
    assert expected_counts(data[0]).tolist() == pytest.approx(counts)


def test_selection_by_hand() -> None:
    """Three images, 1 instance of class 1 and 1/3 of class 2 on average: the best three and the best one of all."""
    predictions = {
        10: scored((0.9, 1), (0.8, 1), (0.2, 2)),
        20: scored((0.7, 1), (0.6, 2)),
        30: scored((0.1, 1)),
    }
    chosen = select(predictions, torch.tensor([1.0, 1 / 3]))
    assert {image_id: found.scores.tolist() for image_id, found in chosen.items()} == {
        10: pytest.approx([0.9, 0.8]),
        20: pytest.approx([0.7, 0.6]),
        30: [],
    }
    # That is a threshold: nothing left out scores higher than what was kept of its class
    assert sum(map(len, select(predictions, torch.tensor([5.0, 0.0])).values())) == 4
    with pytest.raises(ValueError, match=r"labels must lie in 1\.\.1, got 1 to 2"):
        select(predictions, torch.tensor([1.0]))
    assert select({}, torch.tensor([1.0])) == {}


def test_what_is_written_is_read_again(data, tmp_path: Path) -> None:
    held_back = data[1]
    image_id = held_back.image_ids[0]
    probs = torch.ones(2, 4, 4)
    probs[1] = 0
    joints = torch.zeros(2, 7, 3)
    joints[:, 0] = torch.tensor([10.0, 12, 0.9])
    boxes = torch.tensor([[8.0, 8, 16, 24], [0, 0, 4, 4]])
    found = Detections(boxes, torch.tensor([0.9, 0.8]), torch.tensor([6, 6]), probs, joints)
    path = write_annotations(
        tmp_path / "new.json", held_back, {image_id: found}, held_back.categories, first_id=100, joint_score=0.5
    )
    again = CocoDataset(held_back.images_dir, path)
    assert again.image_ids == [100, 101, 102, 103] and again.sizes == held_back.sizes
    image, target = again[0]
    assert torch.equal(image, held_back[0][0])
    assert target.boxes.tolist() == [[8, 8, 16, 24]] and target.labels.tolist() == [6]  # the empty mask is left out
    assert int(target.masks.sum()) == 8 * 16 and target.masks[0, 8:24, 8:16].all()
    assert target.keypoints[0, 0].tolist() == [10, 12, 2] and not target.keypoints[0, 1:].any()
    assert len(again.target(1)) == 0


def test_a_union_trains_as_one_data_set(data, tmp_path: Path) -> None:
    """Predict on the held-back part under augmentation, keep the best, train on both: the whole of Appendix B's way."""
    labelled, unlabelled = data
    teacher = tiny_model()
    teacher.config = replace(teacher.config, box=replace(teacher.config.box, score_threshold=0.0))
    several = Augmentation((56, 64), 64, flip=True, flip_pairs=labelled.flip_pairs)
    predictions = predict_dataset(teacher, unlabelled, DATA, augmentation=several)
    both = distil(predictions, labelled, unlabelled, tmp_path / "distilled.json")
    assert len(both) == len(labelled) + len(unlabelled) == len(set(both.image_ids))
    wanted = sum(round(share * 4) for share in expected_counts(labelled).tolist())
    assert 0 < sum(len(both[index][1]) for index in range(6, 10)) <= wanted
    assert torch.equal(both[7][0], unlabelled[1][0])
    config = with_train(iterations=2, average=0.0)
    summary = train(config, tiny_model(), both, None, tmp_path / "run", progress=False, device="cpu")
    assert summary["iterations"] == 2


def test_a_held_back_part_of_one_data_set(data, tmp_path: Path) -> None:
    """The first half labelled, the second treated as if it were not: ids, sizes and images stay those of the whole."""
    whole = data[0]
    labelled, held_back = Subset(whole, range(3)), Subset(whole, range(3, 6))
    assert held_back.image_ids == whole.image_ids[3:] and held_back.sizes == whole.sizes[3:]
    assert torch.equal(held_back[1][0], whole[4][0])
    predictions = {image_id: scored((0.9, 1)) for image_id in held_back.image_ids}
    both = distil(predictions, labelled, held_back, tmp_path / "distilled.json")
    assert len(both) == 6 and torch.equal(both[5][0], whole[5][0])
    with pytest.raises(ValueError, match="indices must lie in"):
        Subset(whole, [6])


def test_images_that_contain_keypoints(data) -> None:
    chosen = with_keypoints(data[0])
    wanted = [i for i in range(len(data[0])) if bool((data[0].target(i).keypoints[..., 2] > 0).any())]
    assert chosen.indices == wanted and 0 < len(wanted) < len(data[0])


def test_unions_that_do_not_fit(data) -> None:
    with pytest.raises(ValueError, match="an image id occurs in two"):
        Union(data[0], data[0])
    with pytest.raises(ValueError, match="at least one data set"):
        Union()


def test_without_masks_in_one_part_there_are_none(data, tmp_path: Path) -> None:
    found = scored((0.9, 6))
    joints = torch.full((1, 7, 3), 5.0)
    boxes_only = {data[1].image_ids[0]: replace(found, keypoints=joints)}
    path = write_annotations(tmp_path / "new.json", data[1], boxes_only, data[0].categories, first_id=100)
    both = Union(data[0], CocoDataset(data[1].images_dir, path))
    assert all(both[index][1].masks is None for index in range(len(both)))
    assert len(next(train_loader(both, DATA, 4, seed=0))[1]) == 4

    values = json.loads(path.read_text())
    values["categories"][0]["name"] = "disc"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="has other categories"):
        Union(data[0], CocoDataset(data[1].images_dir, path))
