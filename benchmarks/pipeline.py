"""From files to a batch the network can take, on one core, beside torchvision's reference pipeline in one process.

Run it with ``python benchmarks/pipeline.py``. It never runs with the tests.

Both read the same generated folder, 640 x 480 JPEG files with eight polygons of 40 corners each, and end with the same:
images of 800 x 1067, normalised and padded to a batch of two, with boxes, labels and masks. Theirs is what
references/detection does: CocoDetection, polygons to masks by pycocotools, transforms v2 with a flip, then the resize
and normalisation of GeneralizedRCNNTransform. Ours are CocoDataset, Augment, ImageBatch.collate and
MaskRCNN.normalise. The ratio is the median of the ratios of rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import conditions, described, in_words, write
from PIL import Image
from pycocotools.coco import COCO
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from mrcnn_edu.config import DataConfig
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.loading import train_loader
from mrcnn_edu.models.mask_rcnn import build_model

IMAGES, ROUNDS, BATCH = 16, 7, 2
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def generate(folder: Path) -> None:
    """Smooth pictures with noise, so that the files are as large as photographs."""
    draw, generator = random.Random(0), np.random.default_rng(0)
    images, annotations = [], []
    for number in range(1, IMAGES + 1):
        coarse = Image.fromarray(generator.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
        noisy = np.asarray(coarse, dtype=np.int16) + generator.normal(0, 12, (480, 640, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=92)
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 480, "width": 640})
        for _ in range(8):
            x, y, size = draw.uniform(80, 560), draw.uniform(80, 400), draw.uniform(20, 75)
            angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
            radius = size * np.array([draw.uniform(0.7, 1) for _ in angles])
            points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)
            low, high = points.min(axis=0), points.max(axis=0)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0, "area": size**2,
                 "bbox": [*low.tolist(), *(high - low).tolist()], "segmentation": [points.reshape(-1).tolist()]}
            )  # fmt: skip
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "instances.json").write_text(json.dumps(content))


def theirs(folder: Path) -> Callable[[], None]:
    """One epoch of torchvision's reference pipeline."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports to the terminal
        data = CocoDetection(folder, folder / "instances.json")
    after = v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(0.5), v2.ToDtype(torch.float, scale=True)])
    resize = GeneralizedRCNNTransform(800, 1333, MEAN, STD).train()

    def sample(index: int) -> tuple[torch.Tensor, dict]:
        image, annotations = data[index]
        truth: COCO = data.coco
        masks = torch.stack([torch.as_tensor(truth.annToMask(annotation)) for annotation in annotations])
        boxes = torch.tensor([annotation["bbox"] for annotation in annotations])
        boxes[:, 2:] += boxes[:, :2]
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.size[::-1]),
            "masks": tv_tensors.Mask(masks),
            "labels": torch.tensor([annotation["category_id"] for annotation in annotations]),
        }
        return after(image, target)

    def epoch() -> None:
        for first in range(0, IMAGES, BATCH):
            images, targets = zip(*(sample(index) for index in range(first, first + BATCH)))
            resize(list(images), list(targets))

    return epoch


def ours(folder: Path) -> Callable[[], None]:
    """The same of the package, as the training loop has it."""
    data, config = CocoDataset(folder, folder / "instances.json"), DataConfig(workers=0)
    with torch.device("meta"):
        model = build_model("maskrcnn_resnet50_fpn")
    model.pixel_mean, model.pixel_std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]

    def epoch() -> None:
        batches = train_loader(data, config, BATCH, seed=0)
        for _ in range(IMAGES // BATCH):
            batch, _, _ = next(batches)
            model.normalise(batch)

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="where to write, without suffix; default: benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder)
        before = conditions()
        sides = {"torchvision": theirs(folder), "mrcnn_edu": ours(folder)}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(options.rounds + 1):
            for side, epoch in sides.items():
                began = time.process_time()  # of this one thread, so other programs do not count
                epoch()
                if number:  # the first one warms up
                    seconds[side].append((time.process_time() - began) / IMAGES)
    ratios = [a / b for a, b in zip(seconds["torchvision"], seconds["mrcnn_edu"])]
    report = described() | {
        "images": IMAGES,
        "rounds": options.rounds,
        "before": before,
        "after": conditions(),
        "ms_per_image": {side: round(1000 * statistics.median(values), 1) for side, values in seconds.items()},
        "images_per_second": {side: round(1 / statistics.median(values), 1) for side, values in seconds.items()},
        "ratio": round(statistics.median(ratios), 2),
        "range": [round(min(ratios), 2), round(max(ratios), 2)],
    }
    write(f"pipeline {report['processor']}", report, page(report), options.out)


def page(report: dict) -> str:
    """The report as a Markdown page."""
    rows = "\n".join(
        f"| {side} | {report['ms_per_image'][side]} | {rate} |" for side, rate in report["images_per_second"].items()
    )
    return (
        f"# From files to a batch, on one core\n\n{in_words(report)}. Load {report['before']['load']} before and "
        f"{report['after']['load']} after. Written by benchmarks/pipeline.py, which says what both do.\n\n"
        f"| | ms per image | images per second |\n|---|---|---|\n{rows}\n\n"
        f"Ratio {report['ratio']} ({report['range'][0]} to {report['range'][1]} in {report['rounds']} rounds of "
        f"{report['images']} images; aim: 2).\n"
    )


if __name__ == "__main__":
    main()
