"""Files of annotations that contradict themselves, as chance makes them of a good one; the named ones are ``named``'s.

``case`` changes a good file in a few random places and holds every result to the same law.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image
from test_data_coco import HEIGHT, WIDTH, good_file

from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.evaluation.coco import ground_truth
from mrcnn_edu.structures import check_target
from torture.harness import Area, refused

Content = Any  # the file as parsed JSON, or its text
FILE = "instances.json"


def put_down(folder: Path, content: Content) -> Path:
    """The images of the good file, and these annotations; the annotation file."""
    (folder / "images/sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / name)
    file = folder / FILE
    file.write_bytes(content if isinstance(content, bytes) else _as_text(content).encode("utf-8", "surrogatepass"))
    return file


def _as_text(content: Content) -> str:
    return content if isinstance(content, str) else json.dumps(content)


def read_all(file: Path, strict: bool) -> CocoDataset:
    """The data set, after every image and target was looked at."""
    dataset = CocoDataset(file.parent / "images", file, strict=strict)
    for index in range(len(dataset)):
        picture, target = dataset[index]
        check_target(target, tuple(picture.shape[1:]), len(dataset.categories), dataset.joints or None)
        if target.masks is not None and not target.masks.flatten(1).any(dim=1).all():
            raise AssertionError(f"image {dataset.image_id(index)} has a mask without a pixel")
    if sum(len(dataset.labels(index)[0]) for index in range(len(dataset))) != len(ground_truth(dataset)):
        raise AssertionError("the evaluation sees other annotations than training")
    return dataset


JUNK = [None, -1, 0, 1, 7, 2**70, 1.5, -0.0, 1e308, "", "x", "70", [], {}, [[]], True, False, [1e308] * 4, [6] * 6,
        [[6, 4, 16]], {"size": [20, 30], "counts": "0"}, {"size": [20, 30], "counts": [600]}, "../a.png", "a.png",
        ["a"] * 5]  # fmt: skip


def mutated(draw: random.Random) -> Content:
    """A good file, changed in a few places of its tree or of its text."""
    content: Any = good_file()
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        holder, key = content, draw.choice(["images", "annotations", "annotations", "annotations", "categories"])
        while isinstance(holder[key], (list, dict)) and holder[key] and draw.random() < 0.85:
            holder = holder[key]
            key = draw.choice(sorted(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
        how = draw.random()
        if how < 0.6:
            holder[key] = copy.deepcopy(draw.choice(JUNK))
        elif how < 0.75:
            del holder[key]
        elif how < 0.9 and isinstance(holder[key], int | float):
            holder[key] = draw.choice([-1, 1, 0.5, 10, 1e6, 2**40]) * holder[key] + draw.choice([0, 0, 1, -1])
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        if not {"images", "annotations", "categories"} <= set(content):
            break
    if draw.random() < 0.75:
        return content
    data = bytearray(json.dumps(content).encode())
    for _ in range(draw.choice([1, 1, 3])):
        place = draw.randrange(len(data))
        how = draw.random()
        if how < 0.4:
            data[place] = draw.randrange(256)
        elif how < 0.6:
            data[place] ^= 1 << draw.randrange(8)
        elif how < 0.8:
            del data[place : place + draw.randrange(1, 20)]
        else:
            data[place:place] = draw.choice([b"1", b"-", b"e9", b"[", b"]", b"{", b",", b'"', b"NaN", b"null", b"\xff"])
    return bytes(data)


def case(number: int, folder: Path) -> str:
    """A mutated file: what strict reading accepts, lenient reading leaves whole; what it refuses, lenient reports."""
    file = put_down(folder, mutated(random.Random(number)))
    words = []
    for strict in (True, False):
        try:
            found = read_all(file, strict)
        except Exception as error:
            words.append(refused(error))
            if not any(name in str(error) for name in (FILE, str(folder / "images"))):
                raise AssertionError(f"the error names no file: {error}") from error
            continue
        words.append("report" if found.report else "accepted")
        if not all(FILE in sentence for sentence in found.report):
            raise AssertionError(f"a sentence that names no file in {found.report}")
    if (words[0] == "accepted") != (words[1] == "accepted") or words[0] == "report":
        raise AssertionError(f"strict reading: {words[0]}, lenient reading: {words[1]}")
    if words[1] != "report" and words[0].startswith("refused") != words[1].startswith("refused"):
        raise AssertionError(f"strict reading: {words[0]}, lenient reading: {words[1]}")
    return words[0] if words[0] == "accepted" else f"strict {words[0]}, lenient {words[1]}"


AREA = Area(
    "datasets", "COCO files changed at random, read strictly and leniently", case, short=300, full=10_000, chunk=500
)
