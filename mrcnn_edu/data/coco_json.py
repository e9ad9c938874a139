"""COCO-format JSON, entry by entry: what is read strictly, and what is said when it is wrong.

Chapter 2 (a data set we can trust) and Chapter 18 (your own data). Format: cocodataset.org, "Data format".
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrcnn_edu.data.images import check_file_name, file_inside, image_size
from mrcnn_edu.masks import MAX_AREA, MAX_SIDE, short
from mrcnn_edu.structures import Size


@dataclass(frozen=True)
class Category:
    """One class as the annotation file describes it; ``skeleton`` counts joints from 1, as COCO does."""

    id: int
    name: str
    keypoints: tuple[str, ...] = ()
    skeleton: tuple[tuple[int, int], ...] = ()


class Faults:
    """What is wrong with a file: an error at once where reading is strict, else a list of what was dropped."""

    def __init__(self, file: str, strict: bool) -> None:
        self.file, self.strict, self.dropped = file, strict, []
        self.images: set[int] = set()  # that were dropped; what they hold goes with them, without a word of its own

    def add(self, place: str, problem: str) -> None:
        """Note one problem. Raises ValueError when strict."""
        sentence = f"{self.file}: {place}: {problem}"
        if self.strict:
            raise ValueError(f"{sentence} (strict=False drops faulty parts and reports them)")
        self.dropped.append(sentence)


def read_json(path: Path, faults: Faults) -> Any:
    """Parse JSON without NaN, infinities or keys given twice. Raises OSError or ValueError naming the file."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            faults.add(f"the object with id {brief(value.get('id'))}", f"keys given twice: {brief(twice)}")
        return value

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not a number JSON knows")

    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
    except ValueError as error:  # such as a zero byte in its name
        raise ValueError(f"{str(path)!r} cannot be the name of a file: {error}") from error
    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError(f"{path}: lists and objects are nested too deeply") from None
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: not valid JSON: {message}") from error


def brief(value: Any) -> str:
    """The start of a value's text, short enough for a message."""
    return short(value, 80)


def is_whole(value: Any) -> bool:
    """Is this an integer, neither a bool nor beyond 64 bits?"""
    return type(value) is int and -(2**62) < value < 2**62


def are_numbers(value: Any, count: int) -> bool:
    """Is this a list of so many finite numbers?"""
    if not isinstance(value, list) or len(value) != count or not set(map(type, value)) <= {int, float}:
        return False
    return all(-1e9 < number < 1e9 for number in value)


def new_id(entry: Any, kind: str, index: int, known: Any, faults: Faults) -> int | None:
    """The entry's id if it has a good and new one."""
    if not isinstance(entry, dict):
        faults.add(f"{kind} number {index}", f"must be an object, got {type(entry).__name__}")
    elif not is_whole(entry.get("id")):
        faults.add(f"{kind} number {index}", f"field 'id' must be a whole number, got {brief(entry.get('id'))}")
    elif entry["id"] in known:
        faults.add(f"{kind} {entry['id']}", "field 'id' occurs twice; ids must differ")
    else:
        return entry["id"]
    return None


def read_categories(entries: list[Any], faults: Faults) -> tuple[Category, ...]:
    """The categories in the order of their ids."""
    categories: dict[int, Category] = {}
    for index, entry in enumerate(entries):
        number = new_id(entry, "category", index, categories, faults)
        if number is None:
            continue
        name = entry.get("name")
        if not isinstance(name, str) or not name:
            faults.add(f"category {number}", f"field 'name' must be a text, got {brief(name)}")
            name = f"category {number}"
        categories[number] = Category(number, name, *_read_joints(entry, faults))
    if not categories:
        raise ValueError(f"{faults.file}: no usable category; a data set needs at least one")
    ordered = tuple(categories[number] for number in sorted(categories))
    counts = {category.name: len(category.keypoints) for category in ordered if category.keypoints}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{faults.file}: all categories with keypoints need the same number of them, got {counts}")
    return ordered


def _read_joints(entry: dict[str, Any], faults: Faults) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """The names of a category's joints and the limbs between them, as pairs counted from 1."""
    place, joints, skeleton = f"category {entry['id']}", entry.get("keypoints") or [], entry.get("skeleton") or []
    if not isinstance(joints, list) or not all(isinstance(joint, str) for joint in joints):
        faults.add(place, f"field 'keypoints' must be a list of names, got {brief(joints)}")
        return (), ()
    if len(set(joints)) < len(joints):
        faults.add(place, f"field 'keypoints': the names must differ, got {brief(joints)}")
    limbs = isinstance(skeleton, list) and all(
        isinstance(limb, list) and len(limb) == 2 and all(is_whole(j) and 1 <= j <= len(joints) for j in limb)
        for limb in skeleton
    )
    if not limbs:
        faults.add(place, f"field 'skeleton' must hold pairs of joints out of 1..{len(joints)}")
        skeleton = []
    return tuple(joints), tuple((a, b) for a, b in skeleton)


def check_size(stated: Size, images_dir: Path, name: str) -> None:
    """Raise ValueError or OSError unless a file below the image folder is an image of the stated (height, width)."""
    size = image_size(file_inside(images_dir, name))
    if size != stated:
        raise ValueError(
            f"is stated as {stated[0]} x {stated[1]} pixels (height x width), but {images_dir / name} is {size[0]} x "
            f"{size[1]} once upright"
        )


@dataclass(frozen=True)
class ImageEntry:
    """What the file says of one image."""

    file: str
    size: Size  # px, (height, width)


def read_images(entries: list[Any], faults: Faults, images_dir: Path | None = None) -> dict[int, ImageEntry]:
    """The images by id, in the file's order.

    images_dir  look there whether each file is an image of the size stated; None: that shows when it is read
    """
    images: dict[int, ImageEntry] = {}
    files: dict[str, int] = {}
    for index, entry in enumerate(entries):
        number = new_id(entry, "image", index, images, faults)
        if number is None:
            continue
        name, height, width = entry.get("file_name"), entry.get("height"), entry.get("width")
        try:
            if not isinstance(name, str):
                raise ValueError(f"field 'file_name' must be a text, got {brief(name)}")
            check_file_name(name)
            for field, side in (("height", height), ("width", width)):
                if not is_whole(side) or not 1 <= side <= MAX_SIDE:
                    raise ValueError(f"field {field!r} must be 1 to {MAX_SIDE} pixels, got {brief(side)}")
            if height * width > MAX_AREA:
                raise ValueError(f"'height' x 'width' must be at most {MAX_AREA}, got {height} x {width}")
            if name in files:
                raise ValueError(f"field 'file_name' is {name!r}, which is the file of image {files[name]} already")
            if images_dir is not None:
                check_size((height, width), images_dir, name)
        except (ValueError, OSError) as error:
            faults.add(f"image {number}", str(error))
            faults.images.add(number)
            continue
        images[number], files[name] = ImageEntry(name, (height, width)), number
    return images
