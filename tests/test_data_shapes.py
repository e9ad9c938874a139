"""The drawn world: true by construction, the same on every call, and hard enough."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from mrcnn_edu.data import shapes
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.drawing import stamp
from mrcnn_edu.masks import polygons_to_mask, to_boxes
from mrcnn_edu.structures import check_target


@pytest.fixture(scope="module")
def scenes() -> list[shapes.Scene]:
    return [shapes.draw_scene((7, seed)) for seed in range(300)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return shapes.write(tmp_path_factory.mktemp("shapes") / "data", train=70, val=30, seed=5)


def test_the_same_seed_draws_the_same_image():
    for seed in (0, (1, 2, 3)):
        (image, target), (again, same) = shapes.make(seed), shapes.make(seed)
        assert torch.equal(image, again) and torch.equal(target.masks, same.masks)
        assert torch.equal(target.keypoints, same.keypoints)
    assert not torch.equal(shapes.make(0)[0], shapes.make(1)[0])


def test_drawings_do_not_change_from_release_to_release():
    """If this fails on purpose, raise shapes.VERSION, so that folders written before are written anew."""
    labels = [shapes.make((0, 0, index))[1].labels.tolist() for index in range(6)]
    assert labels == [[2], [4, 2], [1, 6, 4, 3, 6, 5], [6, 2], [6, 3, 3, 4, 3, 1], [5, 6]]


@pytest.mark.parametrize("size", [16, 64, 161, (48, 200), (500, 320)])
def test_any_size_works(size):
    height, width = (size, size) if isinstance(size, int) else size
    for seed in range(10):
        image, target = shapes.make(seed, size)
        assert image.shape == (3, height, width) and image.dtype == torch.uint8
        check_target(target, (height, width), len(shapes.CLASSES), len(shapes.JOINTS))


def test_the_number_of_instances_is_a_parameter():
    counts = [int((~shapes.make(seed, 160, (3, 3))[1].crowd).sum()) for seed in range(40)]
    assert set(counts) <= {0, 3} and counts.count(3) > 30
    assert all(shapes.make(seed, 160, (0, 0))[1].crowd.all() for seed in range(40))


@pytest.mark.parametrize("arguments", [(0, 8), (0, (8, 100)), (0, 160, (3, 1)), (0, 160, (-1, 2)), (-1,)])
def test_impossible_drawings_are_refused(arguments):
    with pytest.raises(ValueError):
        shapes.make(*arguments)


# Truth ----------------------------------------------------------------------------------------------


def test_masks_do_not_overlap_and_boxes_are_tight(scenes):
    for scene in scenes:
        target = scene.target()
        assert (target.masks.sum(0) <= 1).all()
        assert torch.equal(to_boxes(target.masks), target.boxes)
        assert target.masks.flatten(1).any(1).all()


def test_nothing_is_hidden_by_more_than_its_share(scenes):
    hidden = [
        1 - int(mask.sum()) / instance.area
        for scene in scenes
        for instance, mask in zip(scene.instances, scene.target().masks)
    ]
    assert max(hidden) <= shapes.MOST_HIDDEN + 1e-9
    assert sum(share > 0.05 for share in hidden) > 0.1 * len(hidden)


def test_the_world_is_as_various_as_it_says(scenes):
    targets = [scene.target() for scene in scenes]
    labels = torch.cat([target.labels for target in targets])
    assert labels.bincount(minlength=7)[1:].min() > 0.1 * len(labels)
    assert 0.01 <= np.mean([len(target) == 0 for target in targets]) <= 0.08
    assert 0.02 <= np.mean([bool(target.crowd.any()) for target in targets]) <= 0.15
    assert {int((~target.crowd).sum()) for target in targets} == set(range(7))
    sides = torch.cat([(t.boxes[:, 2:] - t.boxes[:, :2]).amax(1)[~t.crowd] for t in targets])
    assert sides.amin() < 16 and sides.amax() > 90
    assert (sides < 32).float().mean() > 0.3 and (sides > 64).float().mean() > 0.15
    visibility = torch.cat([target.keypoints[target.labels == shapes.FIGURE][..., 2].flatten() for target in targets])
    assert all((visibility == value).float().mean() > 0.01 for value in (0, 1, 2))


def test_a_ring_has_its_hole():
    for seed in range(5):
        ring = stamp(shapes.CLASSES.index("ring") + 1, 40, 40, 20, np.random.default_rng(seed), (80, 80))
        mask = np.zeros((80, 80), dtype=bool)
        mask[ring.rows, ring.columns] = ring.mask
        assert not mask[36:44, 36:44].any() and mask[40].sum() >= 4


def test_areas_by_formula():
    """A shape's mask counts its pixels, so for a large shape it comes near to its area."""
    half, rng = 60.0, np.random.default_rng(0)
    areas = {"circle": np.pi * half**2, "square": (1.6 * half) ** 2, "triangle": 3 * np.sqrt(3) / 4 * half**2}
    for name, area in areas.items():
        shape = stamp(shapes.CLASSES.index(name) + 1, 80, 80, half, rng, (160, 160))
        assert abs(shape.mask.sum() - area) < 0.01 * area


def test_outlines_describe_their_shapes():
    rng = np.random.default_rng(0)
    for label, name in enumerate(shapes.CLASSES, start=1):
        for _ in range(5):
            shape = stamp(label, 80, 80, 50.0, rng, (160, 160))
            if shape.outline is None:
                assert name in ("ring", "figure")
                continue
            mask = np.zeros((160, 160), dtype=bool)
            mask[shape.rows, shape.columns] = shape.mask
            drawn = polygons_to_mask([shape.outline.reshape(-1)], (160, 160)).numpy()
            assert (drawn ^ mask).sum() <= 0.02 * mask.sum()


def test_joints_lie_on_their_figure_or_behind_another(scenes):
    seen = {1: 0, 2: 0}
    for scene in scenes:
        target = scene.target()
        for row in (target.labels == shapes.FIGURE).nonzero().flatten().tolist():
            for x, y, visible in target.keypoints[row].tolist():
                if visible:
                    owner = int(scene.owner[int(y), int(x)])
                    seen[visible] += 1
                    assert (owner > row) == (visible == 1)
                    assert visible == 1 or owner == row or scene.instances[row].area < 120
                else:
                    assert (x, y) == (0, 0)
        assert not target.keypoints[target.labels != shapes.FIGURE].any()
    assert seen[1] > 20 and seen[2] > 500


def test_noise_and_textures_differ(scenes):
    spread = torch.tensor([float(scene.pixels.std()) for scene in scenes])
    assert spread.min() > 3 and spread.max() > 60


# On disk --------------------------------------------------------------------------------------------


def test_a_written_world_reads_as_it_was_drawn(written):
    for split, (name, count) in enumerate((("train", 70), ("val", 30))):
        dataset = CocoDataset(written / name, written / f"{name}.json")
        assert len(dataset) == count
        assert dataset.categories.names == list(shapes.CLASSES)
        assert [dataset.categories.category_id(i) for i in range(1, 7)] == list(shapes.CATEGORY_IDS)
        assert dataset.joints == 7 and dataset.flip_pairs == shapes.FLIP_PAIRS
        assert dataset.categories.categories[5].skeleton == shapes.SKELETON
        for index in range(count):
            image, target = dataset[index]
            drawn, truth = shapes.make((5, split, index))
            assert torch.equal(image, drawn)
            assert torch.equal(target.boxes, truth.boxes) and torch.equal(target.labels, truth.labels)
            assert torch.equal(target.crowd, truth.crowd)
            torch.testing.assert_close(target.keypoints, truth.keypoints, atol=0.01, rtol=0)
            wrong = (target.masks ^ truth.masks).flatten(1).sum(1)
            assert (wrong <= 0.02 * truth.masks.flatten(1).sum(1)).all()


def test_the_file_uses_every_form_of_coco(written):
    content = json.loads((written / "train.json").read_text())
    forms = {type(a["segmentation"]["counts"] if isinstance(a["segmentation"], dict) else a["segmentation"])
             for a in content["annotations"] if not a["iscrowd"]}  # fmt: skip
    assert forms == {list, str}  # polygons and compressed run lengths
    crowds = [annotation for annotation in content["annotations"] if annotation["iscrowd"]]
    assert crowds and all(isinstance(crowd["segmentation"]["counts"], list) for crowd in crowds)
    assert [annotation["id"] for annotation in content["annotations"]] == [*range(1, len(content["annotations"]) + 1)]
    assert [image["id"] for image in content["images"]] == [*range(1, 71)]


def fingerprint(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_writing_twice_writes_once(tmp_path):
    folder = shapes.write(tmp_path / "data", 3, 2, size=32)
    before, when = fingerprint(folder), os.stat(folder / "train.json").st_mtime_ns
    assert shapes.write(tmp_path / "data", 3, 2, size=32) == folder
    assert fingerprint(folder) == before and os.stat(folder / "train.json").st_mtime_ns == when
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_other_parameters_or_missing_files_write_anew(tmp_path):
    folder = shapes.write(tmp_path / "data", 3, 2, size=32)
    first = fingerprint(folder)
    shapes.write(folder, 2, 2, size=(24, 40))
    assert Image.open(folder / "val/000002.png").size == (40, 24)
    assert not (folder / "train/000003.png").exists()
    shapes.write(folder, 3, 2, size=32)
    (folder / "train/000002.png").unlink()
    shapes.write(folder, 3, 2, size=32)
    assert fingerprint(folder) == first


def test_several_processes_write_what_one_writes(tmp_path, written):
    """64 images and more are shared among processes; a single one must draw the same."""
    for index in (0, 69):
        shapes._write_image(tmp_path, index, (160, 160), (5, 0))
        name = f"{index + 1:06d}.png"
        assert (tmp_path / name).read_bytes() == (written / "train" / name).read_bytes()


def test_files_of_others_are_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        shapes.write(tmp_path, 1, 1, size=32)
    folder = shapes.write(tmp_path / "data", 1, 1, size=32)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        shapes.write(folder, 2, 1, size=32)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(NotADirectoryError):
        shapes.write(tmp_path / "thesis.txt", 1, 1, size=32)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    shapes.write(tmp_path / "data", 1, 1, size=32)
    before = fingerprint(tmp_path)
    monkeypatch.setattr(shapes, "_write_split", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shapes.write(tmp_path / "data", 2, 1, size=32)
    assert fingerprint(tmp_path) == before


def test_counts_must_be_possible(tmp_path):
    with pytest.raises(ValueError, match="0 or more"):
        shapes.write(tmp_path / "data", -1, 2)
