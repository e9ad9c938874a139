"""Test-time augmentation: merging by hand, and by law: one view changes nothing, and neither does an honest mirror."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import training_runs
from torch import Tensor, nn
from training_runs import DATA, MODEL, tiny_model

from mrcnn_edu import boxes as box_ops
from mrcnn_edu.augmentation import (
    Augmentation,
    detect_views,
    into_view,
    mean_maps,
    mean_masks,
    merge_boxes,
    out_of_view,
    views,
    voted_boxes,
)
from mrcnn_edu.data.shapes import write
from mrcnn_edu.inference import predict, predict_dataset
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.structures import Detections, ImageBatch, Proposals


def found(*rows: tuple) -> Detections:
    """Detections out of (box, score, label)."""
    boxes, scores, labels = zip(*rows)
    return Detections(torch.tensor(boxes).float(), torch.tensor(scores), torch.tensor(labels))


# Merging, by hand ----------------------------------------------------------------------------------------------------


def test_the_union_is_thinned_within_each_class() -> None:
    one = found(([0, 0, 10, 10], 0.9, 1), ([50, 50, 60, 60], 0.5, 1))
    two = found(([0, 0, 10, 11], 0.95, 1), ([0, 0, 10, 10], 0.8, 2))
    merged = merge_boxes([one, two], threshold=0.5, most=100)
    assert merged.scores.tolist() == pytest.approx([0.95, 0.8, 0.5])
    assert merged.labels.tolist() == [1, 2, 1]
    assert merged.boxes[0].tolist() == [0, 0, 10, 11]  # the better of the two; the first view's is gone
    assert len(merge_boxes([one, two], threshold=0.5, most=2)) == 2


def test_voting_by_hand() -> None:
    """Boxes ending at 10 (score 0.6) and 12 (score 0.2) have IoU 5/6: (0.6 x 10 + 0.2 x 12) / 0.8 = 10.5."""
    union = found(
        ([0, 0, 10, 10], 0.6, 1), ([0, 0, 12, 10], 0.2, 1), ([0, 0, 12, 10], 0.9, 2), ([0, 0, 30, 10], 0.9, 1)
    )
    assert voted_boxes(union[:1], union, 0.8)[0].tolist() == pytest.approx([0, 0, 10.5, 10])
    assert voted_boxes(union[:1], union, 0.9)[0].tolist() == pytest.approx([0, 0, 10, 10])
    merged = merge_boxes([union[:1], union[1:2]], threshold=0.5, most=10, vote=0.8)
    assert merged.boxes.tolist() == [pytest.approx([0, 0, 10.5, 10])]
    assert merged.scores.tolist() == pytest.approx([0.6])


def test_mean_masks_by_hand() -> None:
    plain, mirror = torch.tensor([[[1.0, 0], [1, 0]]]), torch.tensor([[[0.0, 0.5], [1, 0]]])
    assert mean_masks([plain, mirror], [False, True]).tolist() == [[[0.75, 0], [0.5, 0.5]]]


def test_mean_maps_by_hand() -> None:
    """Two joints that change places: the mirrored view's second map, turned back, belongs to the first joint."""
    plain = torch.tensor([[[[4.0, 0]], [[0, 2.0]]]])  # [1, 2, 1, 2]
    mirror = torch.tensor([[[[8.0, 0]], [[6.0, 0]]]])
    assert mean_maps([plain, mirror], [False, True], ((0, 1),)).tolist() == [[[[2, 3]], [[0, 5]]]]
    assert mean_maps([plain, mirror], [False, True], ()).tolist() == [[[[2, 4]], [[0, 4]]]]


def test_views_by_hand() -> None:
    image = torch.rand(3, 40, 80)
    batches = views(image, Augmentation((20, 40), 60, flip=True))
    assert [batch.sizes[0] for batch in batches] == [(20, 40), (20, 40), (30, 60), (30, 60)]
    assert [batch.mirrored for batch in batches] == [[False], [True], [False], [True]]
    assert torch.equal(batches[1].pixels[0, :, :20, :40], batches[0].pixels[0, :, :20, :40].flip(-1))
    assert not batches[1].pixels[0, :, 20:].any()


def test_boxes_go_into_a_view_and_out_again() -> None:
    boxes = torch.tensor([[1.0, 2, 5, 9], [0, 0, 20, 10]])
    for mirrored in (False, True):
        there = into_view(boxes, (10, 20), (33, 66), mirrored)
        assert torch.allclose(out_of_view(there, (33, 66), (10, 20), mirrored), boxes, atol=1e-5)


def test_the_paper_s_sizes() -> None:
    """Appendix B: "scales of [400, 1200] pixels with a step of 100 and on their horizontal flips"."""
    assert Augmentation().sizes == (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)
    assert Augmentation().flip and len(views(torch.rand(3, 8, 8), Augmentation((4, 5), 8))) == 4


# By law --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):
    folder = write(tmp_path_factory.mktemp("shapes") / "data", train=1, val=2, size=(64, 48), seed=1)
    return training_runs.datasets(folder)[1]


def assert_close(one: Detections, other: Detections, tolerance: float = 1e-5) -> None:
    assert len(one) == len(other) > 0
    assert torch.equal(one.labels, other.labels)
    for name in ("boxes", "scores", "mask_probs", "keypoints"):
        assert torch.allclose(getattr(one, name), getattr(other, name), atol=tolerance), name


def low_threshold(model: MaskRCNN) -> MaskRCNN:
    """The model, letting weights that have seen nothing detect something."""
    model.config = replace(model.config, box=replace(model.config.box, score_threshold=0.0))
    return model


def test_one_size_without_a_mirror_is_the_plain_prediction(data) -> None:
    model, image = low_threshold(tiny_model()), data[0][0]
    plain = predict(model, image, min_size=80, max_size=120)
    assert_close(predict(model, image, augmentation=Augmentation((80,), 120, flip=False)), plain)
    config = replace(DATA, test_size=80, max_size=120)
    together = predict_dataset(model, data, config, augmentation=Augmentation((80,), 120, flip=False))
    for image_id, plain in predict_dataset(model, data, config, batch_size=1).items():
        assert_close(together[image_id], plain)


class Bright(MaskRCNN):
    """Finds the bright rectangle of an image: exactly the same in the mirror, and at twice the size.

    Its mask is the picture inside the box; its joints are the rectangle's left and right end, which change places.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.config = replace(MODEL, classes=1, keypoint=replace(MODEL.keypoint, joints=2, labels=()))
        self.mask_head, self.keypoint_head, self.backbone = nn.Identity(), nn.Identity(), nn.Identity()
        self.register_buffer("pixel_mean", torch.zeros(()))

    def normalise(self, batch: ImageBatch) -> Tensor:
        return batch.pixels

    def rpn(self, features: Tensor, padded) -> None:
        return None

    def propose(self, guess, batch: ImageBatch, training: bool = False) -> list[Proposals]:
        return []

    def detect(self, features: Tensor, proposals, batch: ImageBatch, boxes_only: bool = False) -> list[Detections]:
        y, x = (features[0, 0] > 0.5).nonzero().unbind(1)
        box = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])[None].float()
        return [Detections(box, torch.tensor([0.9]), torch.tensor([1]))]

    def detect_masks(self, features: Tensor, detections: list[Detections]) -> list[Detections]:
        x1, y1, x2, y2 = detections[0].boxes[0].round().int().tolist()
        probs = nn.functional.interpolate(features[:, 1:2, y1:y2, x1:x2], (4, 4), mode="area")[0]
        return [replace(detections[0], mask_probs=probs)]

    def keypoint_maps(self, features: Tensor, detections: list[Detections]) -> list[tuple[Tensor, Tensor]]:
        logits = torch.zeros(1, 2, 8, 8)
        logits[0, 0, 3, 1] = logits[0, 1, 3, 6] = 20.0  # joint 0 is the left end of whatever is seen
        return [(torch.tensor([0]), logits)]


def bright_image() -> Tensor:
    image = torch.zeros(3, 32, 48)
    image[0, 8:24, 4:28] = 1.0
    image[1, 8:24, 4:12] = 1.0  # only the left third is object
    return image


def test_a_mirror_changes_nothing_for_a_model_that_treats_it_alike() -> None:
    model, image = Bright(), bright_image()
    plain, _ = detect_views(model, image, Augmentation((32,), 48, flip=False))
    assert plain.boxes.tolist() == [[4, 8, 28, 24]] and plain.mask_probs[0, 0].tolist()[0] == 1
    both, size = detect_views(model, image, Augmentation((32,), 48, flip=True, flip_pairs=((0, 1),), vote=0.9))
    assert size == (32, 48)
    assert_close(both, plain)


def test_several_sizes_change_nothing_for_a_model_that_scales_along() -> None:
    model, image = Bright(), bright_image()
    alone, _ = detect_views(model, image, Augmentation((64,), 96, flip=False))
    sizes = Augmentation((64, 32), 96, flip=True, flip_pairs=((0, 1),))
    together, size = detect_views(model, image, sizes)
    assert size == (64, 96)
    assert_close(together, alone, tolerance=0.06)  # bilinear edges are a little softer at half the size


def test_wrong_pairs_would_show() -> None:
    """Without the exchange of left and right each joint has its peak at both ends: the law can fail."""
    model, image = Bright(), bright_image()
    plain, _ = detect_views(model, image, Augmentation((32,), 48, flip=False))
    wrong, _ = detect_views(model, image, Augmentation((32,), 48, flip=True, flip_pairs=()))
    assert not torch.allclose(wrong.keypoints[..., :2], plain.keypoints[..., :2], atol=1.0)


def test_results_lie_in_the_image_s_own_pixels(data) -> None:
    model, image = low_threshold(tiny_model()), data[0][0]
    several = Augmentation((48, 64, 80), 120, flip=True, flip_pairs=data.flip_pairs, vote=0.9)
    result = predict(model, image, augmentation=several)
    assert 0 < len(result) <= MODEL.box.detections_per_image
    assert torch.equal(result.boxes, box_ops.clip(result.boxes, (64, 48)))
    assert result.mask_probs.shape[1:] == (8, 8) and result.keypoints.shape[1:] == (7, 3)
    assert result.scores.diff().max() <= 0


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": ()}, "one or more positive sizes"),
        ({"sizes": (0,)}, "one or more positive sizes"),
        ({"sizes": (800,), "max_size": 700}, "at least the largest size"),
        ({"vote": 0.0}, "an IoU above 0"),
        ({"vote": 1.5}, "an IoU above 0"),
    ],
)
def test_numbers_that_make_no_sense(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**arguments)


def test_what_cannot_be_augmented(data) -> None:
    with pytest.raises(ValueError, match="mirrored keypoints need flip_pairs"):
        predict(tiny_model(), data[0][0], augmentation=Augmentation((64,)))
    with pytest.raises(TypeError, match="needs a MaskRCNN, got Identity"):
        predict(nn.Identity(), data[0][0], augmentation=Augmentation((64,)))
