"""The easy world: by hand, by law."""

from __future__ import annotations

import pytest
import torch

from mrcnn_edu.data import flat
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.drawing import FIGURE
from mrcnn_edu.structures import check_target


def test_everything_is_true_and_repeatable():
    for seed in range(20):
        image, target = flat.make(seed)
        again, same = flat.make(seed)
        assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
        assert torch.equal(image, again) and torch.equal(target.masks, same.masks)
        check_target(target, (64, 64), classes=6, joints=7)
        assert (target.masks.sum(dim=0) <= 1).all()  # one owner per pixel
        assert (target.masks.sum(dim=(1, 2)) >= 0.03 * 64**2).all()
        assert not target.crowd.any()


def test_an_instance_stands_out_from_the_ground():
    image, target = flat.make(3, instances=1)
    ground = ~target.masks[0]
    inside, outside = image[:, target.masks[0]].float().mean(1), image[:, ground].float().mean(1)
    assert (inside - outside).abs().max() > 50
    assert image[:, ground].float().std(dim=1).max() < 15


def test_only_the_wanted_classes_and_only_figures_have_joints():
    drawn = [flat.make((1, seed), labels=(2, FIGURE))[1] for seed in range(15)]
    assert {label for target in drawn for label in target.labels.tolist()} == {2, FIGURE}
    for target in drawn:
        assert torch.equal(target.keypoints[..., 2].any(dim=1), target.labels == FIGURE)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="got 8 and 3"):
        flat.make(0, size=8)
    assert len(flat.make(0, instances=0)[1]) == 0


def test_what_is_written_comes_back(tmp_path):
    data = CocoDataset(*flat.write(tmp_path / "flat", count=6, seed=4, labels=(5, 2)))
    assert len(data) == 6 and data.categories.names == ["square", "ring"] and data.joints == 0
    for index in range(6):
        image, target = flat.make((4, index), labels=(5, 2))
        read, back = data[index]
        assert torch.equal(read, image) and torch.equal(back.boxes, target.boxes)
        assert torch.equal(back.masks, target.masks)
        assert torch.equal(back.labels, torch.where(target.labels == 2, 1, 2))


def test_figures_are_written_with_their_joints(tmp_path):
    data = CocoDataset(*flat.write(tmp_path / "flat", count=5, seed=2, labels=(1, FIGURE, FIGURE)))
    assert data.categories.names == ["circle", "figure"] and data.joints == 7
    seen = 0
    for index in range(5):
        _, target = flat.make((2, index), labels=(1, FIGURE, FIGURE))
        back = data.target(index)
        torch.testing.assert_close(back.keypoints, target.keypoints, rtol=0, atol=0.01)
        seen += int((target.labels == FIGURE).sum())
    assert seen > 0
