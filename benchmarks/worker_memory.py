"""How much memory the loader's workers copy: a generated annotation file as large as COCO's, walked through by workers.

Run it with ``python benchmarks/worker_memory.py``, some ten minutes. It never runs with the tests.

A worker begins as a copy of its parent that shares all pages. Python objects have reference counts in them, so merely
reading a list of dicts copies its pages, worker by worker; the flat tensors of ``data.annotations`` stay shared. Both
are measured: the private memory of each worker after its first images and after its last (Linux, smaps_rollup).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import tempfile
import time
from pathlib import Path

from machine import described, in_words, processor, write
from torch.utils.data import DataLoader, Dataset

from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.loading import _start_worker


def generate(path: Path, images: int, per_image: int) -> None:
    """A COCO file of 640 x 480 images with polygons of 20 corners."""
    generator = random.Random(0)
    annotations = []
    for image in range(1, images + 1):
        for _ in range(per_image):
            x, y = generator.uniform(0, 500), generator.uniform(0, 350)
            corners = [round(generator.uniform(0, 100), 2) for _ in range(40)]
            polygon = [value + (x, y)[index % 2] for index, value in enumerate(corners)]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": generator.randint(1, 80), "iscrowd": 0,
                 "bbox": [x, y, 100.0, 100.0], "area": 5000.0, "segmentation": [polygon]}
            )  # fmt: skip
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, 81)],
    }
    path.write_text(json.dumps(content))


def private_mib() -> float:
    """Memory of this process that it shares with no other."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(kib) for kib in re.findall(r"Private_\w+:\s+(\d+) kB", rollup)) / 1024


class Targets(Dataset):
    """Reads the ground truth of an image and tells who did and how much memory that process has to itself."""

    def __init__(self, data: CocoDataset) -> None:
        self.data, self.readings = data, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, float]:
        self.data.target(index)
        return self.memory()

    def memory(self) -> tuple[int, float]:
        """Who this is, and its memory at every 200th reading from the 20th on: looking it up takes milliseconds."""
        self.readings += 1
        return os.getpid(), private_mib() if self.readings % 200 == 20 else -1.0


class Plain(Targets):
    """The same for a list of dicts with lists in them, as a JSON file is when it has been read."""

    def __init__(self, count: int, per_image: int) -> None:
        self.readings = 0
        self.entries = [
            [{"bbox": [float(i), 2.0, 3.0, 4.0], "segmentation": [float(j) for j in range(40)]}] * per_image
            for i in range(count)
        ]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[int, float]:
        sum(len(entry["bbox"]) + len(entry["segmentation"]) for entry in self.entries[index])
        return self.memory()


def growth(data: Dataset, workers: int, stride: int) -> list[float]:
    """MiB by which each worker's private memory has grown between its 20th reading and its largest."""
    seen: dict[int, list[float]] = {}
    order = list(range(0, len(data), stride))
    loader = DataLoader(
        data, batch_size=None, sampler=order, num_workers=workers, worker_init_fn=_start_worker,
        multiprocessing_context="fork",
    )  # fmt: skip
    for pid, memory in loader:
        if memory >= 0:
            seen.setdefault(pid, []).append(memory)
    return [max(found) - found[0] for found in seen.values()]


def page(report: dict) -> str:
    """The report as a Markdown page."""
    rows = "\n".join(
        f"| {one['kind']} | {', '.join(f'{mib:.1f}' for mib in one['grown_mib'])} |" for one in report["results"]
    )
    return (
        f"# Memory that the loader's workers copy\n\n{in_words(report)}. Written by benchmarks/worker_memory.py.\n\n"
        f"{report['images']:,} images with {report['annotations']:,} annotations, a file of {report['megabytes']} MB, "
        f"read and checked in {report['reading_seconds']} s. MiB by which the private memory of each of "
        f"{report['workers']} workers grew over one epoch (aim: under 10):\n\n"
        f"| annotations kept as | MiB per worker |\n|---|---|\n{rows}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--per-image", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stride", type=int, default=1, help="read every so many-th image only")
    parser.add_argument("--out", type=Path, help="where to write, without suffix; default: benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "instances.json"
        generate(file, options.images, options.per_image)
        began = time.perf_counter()
        data = CocoDataset(folder, file)
        report = described() | {
            "images": options.images,
            "annotations": len(data.annotations.ids),
            "megabytes": round(file.stat().st_size / 1e6),
            "reading_seconds": round(time.perf_counter() - began),
            "workers": options.workers,
            "results": [],
        }
        for kind, dataset in (("flat tensors", Targets(data)), ("lists of dicts", Plain(options.images, 1))):
            grown = growth(dataset, options.workers, options.stride)
            report["results"].append({"kind": kind, "grown_mib": [round(mib, 1) for mib in grown]})
    write(f"worker memory {processor()}", report, page(report), options.out)


if __name__ == "__main__":
    main()
