"""inference: what goes in, in which pixels it comes out, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mrcnn_edu.config import DataConfig
from mrcnn_edu.data import shapes
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.evaluation.results import to_coco_results
from mrcnn_edu.inference import as_image, check_finite, detect, predict, predict_dataset, to_original
from mrcnn_edu.masks import rle_decode
from mrcnn_edu.models.mask_rcnn import build_model
from mrcnn_edu.structures import Detections, ImageBatch


class Middle(nn.Module):
    """Finds one object in every image: its middle half, with a joint at its centre."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.BatchNorm2d(1).eval()
        self.batches: list[ImageBatch] = []
        self.modes: list[bool] = []

    def forward(self, batch: ImageBatch) -> list[Detections]:
        self.batches.append(batch)
        self.modes.append(self.training)
        found = []
        for h, w in batch.sizes:
            box = torch.tensor([[w / 4, h / 4, 3 * w / 4, 3 * h / 4]]) * self.scale
            joint = torch.tensor([[[w / 2, h / 2, 0.5]]])
            found.append(Detections(box, torch.tensor([0.9]), torch.tensor([1]), torch.ones(1, 28, 28), joint))
        return found


def test_to_original_by_hand():
    # 100 x 50 (height x width) seen at 200 x 150: x shrinks by 3, y by 2.
    found = Detections(
        torch.tensor([[30.0, 20, 60, 40], [-3, 100, 156, 230]]),
        torch.tensor([0.9, 0.8]),
        torch.tensor([1, 2]),
        keypoints=torch.tensor([[[30.0, 20, 0.5]], [[160.0, -2, 0.25]]]),
    )
    original = to_original(found, (200, 150), (100, 50))
    assert original.boxes.tolist() == [[10, 10, 20, 20], [0, 50, 50, 100]]
    assert original.keypoints.tolist() == [[[10, 10, 0.5]], [[50, 0, 0.25]]]
    assert original.scores is found.scores and found.boxes[0, 0] == 30


def test_every_kind_of_image_gives_the_same(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    frozen = pixels.copy()
    frozen.setflags(write=False)
    sources = [
        tmp_path / "image.png", str(tmp_path / "image.png"), Image.fromarray(pixels), pixels, frozen, tensor,
        np.asfortranarray(pixels), pixels[::-1][::-1],
    ]  # fmt: skip
    for source in sources:
        assert torch.equal(as_image(source), tensor)
    model = Middle()
    results = predict(model, [*sources, tensor / 255], min_size=20, max_size=100)
    for found in results:
        assert found.boxes.tolist() == [[20, 10, 60, 30]]
        assert found.keypoints.tolist() == [[[40, 20, 0.5]]]
    assert {tuple(batch.sizes) for batch in model.batches} == {((20, 40),)}
    assert isinstance(predict(model, pixels, 20, 100), Detections)
    assert isinstance(predict(model, [pixels], 20, 100), list)
    assert isinstance(predict(model, (pixels,), 20, 100), list)


def test_gray_alpha_and_sideways_images():
    gray = Image.fromarray(np.full((10, 20), 7, dtype=np.uint8))
    assert as_image(gray).shape == (3, 10, 20) and (as_image(gray) == 7).all()
    assert as_image(Image.new("RGBA", (20, 10), (255, 0, 0, 255)))[:, 0, 0].tolist() == [255, 0, 0]
    sideways = Image.new("RGB", (20, 10))
    sideways.getexif()[0x0112] = 6  # the camera was turned by 90 degrees
    assert as_image(sideways).shape == (3, 20, 10)


def test_batches_of_different_sizes():
    images = [torch.rand(3, 40, 80), torch.rand(3, 80, 40), torch.rand(3, 50, 50)]
    alone, together = Middle(), Middle()
    expected = predict(alone, images, 32, 64)
    found = predict(together, images, 32, 64, batch_size=2)
    assert [len(batch) for batch in together.batches] == [2, 1]
    assert [len(batch) for batch in alone.batches] == [1, 1, 1]
    for one, other, image in zip(found, expected, images):
        assert torch.equal(one.boxes, other.boxes)
        assert one.boxes[0, 2] == 0.75 * image.shape[2]
    with pytest.raises(ValueError, match="batch_size"):
        predict(together, images, batch_size=0)


def test_a_line_of_1_by_5000_pixels():
    found = predict(Middle(), torch.rand(3, 1, 5000), 800, 1333)
    assert found.boxes.tolist() == [pytest.approx([1250, 0.25, 3750, 0.75])]


def test_modes_come_back():
    model = Middle()
    model.train()
    model.frozen.eval()
    predict(model, torch.rand(3, 32, 32), 32, 32)
    assert model.modes == [False] and model.training and not model.frozen.training
    model.scale.data[()] = float("nan")
    with pytest.raises(FloatingPointError):
        predict(model, torch.rand(3, 32, 32), 32, 32)
    assert model.training and not model.frozen.training


def test_arguments_are_left_as_they_were():
    array = np.zeros((32, 32, 3), dtype=np.uint8)
    as_image(array)[:] = 9
    assert not array.any()
    images = [torch.rand(3, 32, 32)]
    before = images[0].clone()
    predict(Middle(), images, 64, 64)
    assert len(images) == 1 and torch.equal(images[0], before)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "at least one image"),
        (torch.rand(32, 32), ValueError, r"\[3, H, W\]"),
        (torch.rand(1, 32, 32), ValueError, "gray"),
        (torch.rand(3, 0, 32), ValueError, "no pixels"),
        (torch.full((3, 8, 8), float("nan")), ValueError, "NaN"),
        (torch.rand(3, 8, 8) * 255, ValueError, "divide"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError, "uint8"),
        (np.zeros((8, 8), dtype=np.uint8), ValueError, r"\[H, W, 3\]"),
        (np.zeros((8, 8, 4), dtype=np.uint8), ValueError, r"\[H, W, 3\]"),
        (np.zeros((8, 8, 3)), ValueError, "float64"),
        (Image.new("F", (8, 8)), ValueError, "floating"),
        (5, TypeError, "tensor"),
        ([torch.rand(3, 8, 8), None], TypeError, "image 1"),
        ("no/such/file.png", OSError, r"file\.png"),
    ],
)
def test_what_is_no_image_is_refused(images, error, message):
    with pytest.raises(error, match=message):
        predict(Middle(), images, 32, 32)


def test_what_is_not_finite_is_an_error_and_never_silence():
    image = torch.rand(3, 64, 64)
    torch.manual_seed(0)
    model = build_model("maskrcnn_shapes")
    assert isinstance(predict(model, image, 64, 64), Detections)
    model.box_head.class_logits.weight.data[1, 0] = float("nan")  # softmax, threshold: nothing would be found
    with pytest.raises(FloatingPointError, match=r"box_head\.class_logits\.weight"):
        predict(model, image, 64, 64)
    model = build_model("maskrcnn_shapes")
    model.pixel_std[0] = float("inf")
    with pytest.raises(FloatingPointError, match="pixel_std"):
        predict(model, image, 64, 64)


@pytest.mark.parametrize("field", ["boxes", "scores", "mask_probs", "keypoints"])
def test_outputs_are_checked(field):
    good = {
        "boxes": torch.rand(3, 4),
        "scores": torch.rand(3),
        "labels": torch.ones(3, dtype=torch.int64),
        "mask_probs": torch.rand(3, 28, 28),
        "keypoints": torch.rand(3, 7, 3),
    }
    check_finite(Detections(**good), "the image")
    check_finite(Detections(**good)[:0], "the image")
    good[field][1] = float("inf")
    with pytest.raises(FloatingPointError, match=rf"{field} .* the image \(detections \[1\]\)"):
        check_finite(Detections(**good), "the image")


def test_detect_names_the_image():
    model = Middle()
    model.scale.data[()] = float("nan")
    batch = ImageBatch.collate([torch.rand(3, 8, 8)])
    with pytest.raises(FloatingPointError, match="image 17"):
        detect(model, batch, ["image 17"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_whole_data_set(tmp_path, workers, capfd):
    shapes.write(tmp_path / "shapes", train=1, val=5, size=64)
    dataset = CocoDataset(tmp_path / "shapes" / "val", tmp_path / "shapes" / "val.json")
    config = DataConfig(min_size=(96,), max_size=96, test_size=96, workers=workers)
    model = Middle()
    found = predict_dataset(model, dataset, config, batch_size=2)
    assert list(found) == dataset.image_ids
    assert [len(batch) for batch in model.batches] == [2, 2, 1]
    assert all(batch.sizes[0] == (96, 96) for batch in model.batches)
    for detections in found.values():
        assert detections.boxes.tolist() == [[16, 16, 48, 48]]
    assert "predicting" not in capfd.readouterr().err
    predict_dataset(model, dataset, config, progress=True)
    assert "predicting" in capfd.readouterr().err


def test_predict_equals_predict_dataset(tmp_path):
    shapes.write(tmp_path / "shapes", train=1, val=3, size=64)
    dataset = CocoDataset(tmp_path / "shapes" / "val", tmp_path / "shapes" / "val.json")
    torch.manual_seed(1)
    model = build_model("maskrcnn_shapes")
    config = DataConfig(min_size=(64,), max_size=64, test_size=64, workers=0)
    found = predict_dataset(model, dataset, config, batch_size=1)
    again = predict(model, [dataset.path(index) for index in range(3)], 64, 64)
    for one, other in zip(found.values(), again):
        assert torch.equal(one.boxes, other.boxes) and torch.equal(one.mask_probs, other.mask_probs)
        assert torch.equal(one.labels, other.labels) and torch.equal(one.keypoints, other.keypoints)


class _Large:
    """A data set of one image of twelve million pixels, as far as results are concerned."""

    def __init__(self, categories) -> None:
        self.image_ids, self.sizes, self.annotations_file, self.categories = [1], [(3000, 4000)], "none", categories


def test_many_masks_of_a_large_image_become_run_lengths(tmp_path):
    # All at once the masks would be 240 MB; one after the other it is the memory of one.
    shapes.write(tmp_path / "shapes", train=1, val=1, size=32)
    categories = CocoDataset(tmp_path / "shapes" / "val", tmp_path / "shapes" / "val.json").categories
    count = 20
    corner = torch.rand(count, 2) * torch.tensor([3000.0, 2000])
    boxes = torch.cat([corner, corner + 50 + torch.rand(count, 2) * 900], dim=1)
    found = Detections(boxes, torch.rand(count), torch.ones(count, dtype=torch.int64), torch.ones(count, 28, 28))
    results = to_coco_results(_Large(categories), {1: found}, "mask")
    assert len(results) == count
    best = int(found.scores.argmax())
    width, height = (boxes[best, 2:].round() - boxes[best, :2].round()).tolist()
    mask = rle_decode(results[0]["segmentation"])
    assert mask.shape == (3000, 4000) and int(mask.sum()) == pytest.approx(width * height, rel=0.05)
