"""The easy world: by hand, by law."""

from __future__ import annotations

import pytest
import torch

from mrcnn_edu.data import flat
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
