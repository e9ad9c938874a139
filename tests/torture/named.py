"""Files of annotations that contradict themselves in one of sixty and more ways, each with a name.

``tests/test_data_faults.py`` goes through the same list, by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from test_data_coco import HEIGHT, WIDTH, good_file

from torture.coco_files import FILE, Content, put_down, read_all
from torture.harness import Area

BOX_POLYGON = [6, 4, 16, 4, 16, 9, 6, 9]
OUTSIDE = [40, 4, 50, 4, 50, 9]


@dataclass(frozen=True)
class Fault:
    """One inconsistency.

    change   makes it, in a good file of two images and four annotations
    says     what strict reading says after the file's name, a pattern
    left     how many images and annotations lenient reading leaves; None: nothing can be saved, it refuses as well
    """

    name: str
    change: Callable[[dict[str, Any]], Content]
    says: str
    left: tuple[int, int] | None


def change(part: str, index: int, **fields: Any) -> Callable[[dict[str, Any]], Content]:
    """Other values for some fields of one entry; ``...`` takes a field out."""

    def changed(content: dict[str, Any]) -> Content:
        entry = content[part][index] | fields
        content[part][index] = {key: value for key, value in entry.items() if value is not ...}
        return content

    return changed


def annotation(**fields: Any) -> Callable[[dict[str, Any]], Content]:
    """Other values in the first annotation, whose id is 0."""
    return change("annotations", 0, **fields)


def image(**fields: Any) -> Callable[[dict[str, Any]], Content]:
    """Other values in the second image, which has no annotations and the id 3."""
    return change("images", 1, **fields)


def put(part: str, entry: Any) -> Callable[[dict[str, Any]], Content]:
    """One more entry."""
    return lambda content: content | {part: [*content[part], entry]}


def text(old: str, new: str) -> Callable[[dict[str, Any]], Content]:
    """The first occurrence of a piece of the file's text replaced."""
    return lambda content: json.dumps(content).replace(old, new, 1)


def whole(content: Content) -> Callable[[dict[str, Any]], Content]:
    """Another file altogether."""
    return lambda _: content


def rle(**fields: Any) -> Callable[[dict[str, Any]], Content]:
    """Run lengths that cover the image, but for some fields."""
    value = {"size": [HEIGHT, WIDTH], "counts": [100, 50, 450]} | fields
    return annotation(segmentation={key: value for key, value in value.items() if value is not ...})


def keypoints(*values: Any, **fields: Any) -> Callable[[dict[str, Any]], Content]:
    """Keypoints of five joints for the first annotation, padded by zeros."""
    return annotation(keypoints=[*values, *[0] * (15 - len(values))], **fields)


DROPPED = (2, 3)  # what is left without the one annotation
ONE_IMAGE = (1, 4)
NOTHING_LOST = (2, 4)

NAMED = [
    # identities
    Fault("annotation id twice", annotation(id=5), "annotation 5: field 'id' occurs twice", DROPPED),
    Fault("annotation id missing", annotation(id=...), "annotation number 0: field 'id'", DROPPED),
    Fault("annotation id a text", annotation(id="0"), "annotation number 0: field 'id'.*'0'", DROPPED),
    Fault("annotation id a fraction", annotation(id=0.5), "annotation number 0: field 'id'.*0.5", DROPPED),
    Fault("annotation id true", annotation(id=True), "annotation number 0: field 'id'.*True", DROPPED),
    Fault("annotation id beyond 64 bits", annotation(id=2**80), "annotation number 0: field 'id'", DROPPED),
    Fault("image id twice", image(id=70), "image 70: field 'id' occurs twice", ONE_IMAGE),
    Fault("image id a text", image(id="3"), "image number 1: field 'id'.*'3'", ONE_IMAGE),
    Fault("category id twice", put("categories", {"id": 3, "name": "cat"}), "category 3: field 'id' occurs twice",
          NOTHING_LOST),
    # references
    Fault("image unknown", annotation(image_id=71), "annotation 0: field 'image_id'.*71", DROPPED),
    Fault("image missing", annotation(image_id=...), "annotation 0: field 'image_id'.*None", DROPPED),
    Fault("image id of an annotation a text", annotation(image_id="70"),
          "annotation 0: field 'image_id'.*'70'", DROPPED),
    Fault("category unknown", annotation(category_id=4), "annotation 0: field 'category_id'.*4", DROPPED),
    Fault("category null", annotation(category_id=None), "annotation 0: field 'category_id'.*None", DROPPED),
    Fault("category counted from 0", annotation(category_id=0), "annotation 0: field 'category_id'.*0", DROPPED),
    # JSON
    Fault("NaN", text('"bbox": [6,', '"bbox": [NaN,'), "NaN is not a number", None),
    Fault("infinity", text('"area": 50', '"area": Infinity'), "Infinity is not a number", None),
    Fault("a number that overflows", text('"bbox": [6,', '"bbox": [1e999,'), "annotation 0: field 'bbox'", DROPPED),
    Fault("a key twice", text('"iscrowd": 0', '"iscrowd": 1, "iscrowd": 0'), "id 0: keys given twice: .*iscrowd",
          NOTHING_LOST),
    Fault("nesting without end", whole('{"images": ' + "[" * 100_000), "nested too deeply", None),
    Fault("cut off", lambda content: json.dumps(content)[:-40], "not valid JSON", None),
    Fault("empty", whole(""), "not valid JSON", None),
    Fault("a list", whole("[]"), "with the list 'images'", None),
    Fault("images missing", lambda content: content | {"images": None}, "with the list 'images'", None),
    Fault("annotations an object", lambda content: content | {"annotations": {}}, "with the list 'annotations'", None),
    Fault("categories missing", lambda content: content | {"categories": None}, "with the list 'categories'", None),
    Fault("no category", lambda content: content | {"categories": []}, "no usable category", None),
    Fault("an annotation that is a number", put("annotations", 7),
          "annotation number 4: must be an object", NOTHING_LOST),
    Fault("an image that is a list", put("images", []), "image number 2: must be an object", NOTHING_LOST),
    Fault("a category that is a text", put("categories", "cat"), "category number 2: must be an object", NOTHING_LOST),
    # images
    Fault("file name missing", image(file_name=...), "image 3: field 'file_name'.*None", ONE_IMAGE),
    Fault("file name out of the folder", image(file_name="../secret.png"),
          "image 3: file name '../secret.png'", ONE_IMAGE),
    Fault("file name absolute", image(file_name="/etc/passwd"), "image 3: file name '/etc/passwd'", ONE_IMAGE),
    Fault("one file for two images", image(file_name="a.png"), "image 3: field 'file_name'.*image 70", ONE_IMAGE),
    Fault("height 0", image(height=0), "image 3: field 'height'.*0", ONE_IMAGE),
    Fault("width negative", image(width=-30), "image 3: field 'width'.*-30", ONE_IMAGE),
    Fault("width a fraction", image(width=30.5), "image 3: field 'width'.*30.5", ONE_IMAGE),
    Fault("height missing", image(height=...), "image 3: field 'height'.*None", ONE_IMAGE),
    Fault("more pixels than any image", image(height=32000, width=32000), "image 3: 'height' x 'width'", ONE_IMAGE),
    Fault("another size than the image's", image(height=WIDTH, width=HEIGHT),
          "image 3:? is stated as 30 x 20.* is 20 x 30", ONE_IMAGE),
    Fault("no such file", image(file_name="c.png"), r"cannot read the image .*c\.png", ONE_IMAGE),
    # boxes
    Fault("box missing", annotation(bbox=...), "annotation 0: field 'bbox'.*None", DROPPED),
    Fault("box of three numbers", annotation(bbox=[6, 4, 10]), "annotation 0: field 'bbox'", DROPPED),
    Fault("box with a text", annotation(bbox=[6, 4, 10, "5"]), "annotation 0: field 'bbox'.*'5'", DROPPED),
    Fault("box without width", annotation(bbox=[6, 4, 0, 5]),
          "annotation 0: field 'bbox' must have a positive", DROPPED),
    Fault("box of negative height", annotation(bbox=[6, 4, 10, -5]), "annotation 0: field 'bbox'.*-5", DROPPED),
    Fault("box outside the image", annotation(bbox=[31, 4, 10, 5]), "annotation 0: field 'bbox'.*inside", DROPPED),
    # flags and areas
    Fault("iscrowd 2", annotation(iscrowd=2), "annotation 0: field 'iscrowd'.*2", DROPPED),
    Fault("iscrowd a text", annotation(iscrowd="0"), "annotation 0: field 'iscrowd'.*'0'", DROPPED),
    Fault("area negative", annotation(area=-1), "annotation 0: field 'area'.*-1", DROPPED),
    Fault("area a text", annotation(area="50"), "annotation 0: field 'area'.*'50'", DROPPED),
    # polygons
    Fault("no mask where others have one", annotation(segmentation=[]), "annotation 0: field 'segmentation'", DROPPED),
    Fault("mask null", annotation(segmentation=None), "annotation 0: field 'segmentation'.*None", DROPPED),
    Fault("mask a text", annotation(segmentation="polygon"), "annotation 0: field 'segmentation'.*'polygon'", DROPPED),
    Fault("polygon of two corners", annotation(segmentation=[BOX_POLYGON[:4]]),
          "annotation 0: .*three corners", DROPPED),
    Fault("polygon of odd length", annotation(segmentation=[BOX_POLYGON[:7]]), "annotation 0: .*even count", DROPPED),
    Fault("polygon of pairs", annotation(segmentation=[[[6, 4], [16, 4], [16, 9]]]),
          "annotation 0: .*flat list", DROPPED),
    Fault("polygon of texts", annotation(segmentation=[["6", *BOX_POLYGON[1:]]]), "annotation 0: .*numbers", DROPPED),
    Fault("polygon beyond all numbers", text("[6, 4, 16", "[1e999, 4, 16"), "annotation 0: .*finite", DROPPED),
    Fault("polygon outside the image", annotation(segmentation=[OUTSIDE]), "annotation 0: .*no pixel", DROPPED),
    Fault("one good polygon, one bad", annotation(segmentation=[BOX_POLYGON, [1, 1]]), "annotation 0: .*polygon 1",
          NOTHING_LOST),
    Fault("run lengths among polygons", annotation(segmentation=[BOX_POLYGON, {"size": [20, 30], "counts": [600]}]),
          "annotation 0: field 'segmentation', polygon 1", NOTHING_LOST),
    # run lengths
    Fault("runs too short", rle(counts=[100, 50]), "annotation 0: .*runs cover 150 pixels", DROPPED),
    Fault("runs too long", rle(counts=[100, 50, 500]), "annotation 0: .*runs cover 650 pixels", DROPPED),
    Fault("runs of nothing", rle(counts=[]), "annotation 0: .*runs cover 0 pixels", DROPPED),
    Fault("runs without a one", rle(counts=[600]), "annotation 0: .*no pixel", DROPPED),
    Fault("runs negative", rle(counts=[700, -100]), "annotation 0: .*runs must lie between", DROPPED),
    Fault("runs of fractions", rle(counts=[600.5]), "annotation 0: .*whole numbers", DROPPED),
    Fault("runs outside the alphabet", rle(counts="p~"), "annotation 0: .*characters", DROPPED),
    Fault("runs missing", rle(counts=...), "annotation 0: .*'counts'", DROPPED),
    Fault("runs of another size", rle(size=[10, 15], counts=[100, 50]), "annotation 0: .*10 x 15.*20 x 30", DROPPED),
    Fault("runs of the image turned", rle(size=[WIDTH, HEIGHT]), "annotation 0: .*30 x 20.*20 x 30", DROPPED),
    Fault("runs of an absurd size", rle(size=[2**40, 2]), "annotation 0: .*a mask may have", DROPPED),
    Fault("runs without a size", rle(size=...), "annotation 0: .*need 'size'", DROPPED),
    # keypoints
    Fault("a joint too few", annotation(keypoints=[1, 1, 2] * 4), "annotation 0: field 'keypoints'.*5 times", DROPPED),
    Fault("visibility 3", keypoints(1, 1, 3), "annotation 0: field 'keypoints'.*0, 1 or 2", DROPPED),
    Fault("keypoints as texts", keypoints("1", 1, 2), "annotation 0: field 'keypoints'", DROPPED),
    Fault("another number of keypoints", keypoints(1, 1, 2, num_keypoints=3),
          "annotation 0: field 'num_keypoints'", DROPPED),
    Fault("a number of keypoints without any", annotation(num_keypoints=3),
          "annotation 0: field 'num_keypoints'", DROPPED),
    Fault("a limb to nowhere", change("categories", 0, skeleton=[[1, 9]]),
          "category 90: field 'skeleton'", NOTHING_LOST),
    Fault("a joint's name twice", change("categories", 0, keypoints=["a", "a", "b", "c", "d"]),
          "category 90: field 'keypoints'.*differ", NOTHING_LOST),
    Fault("a left joint without its right", change("categories", 0, keypoints=["a", "left_b", "c", "d", "e"]),
          "'left_b' but no 'right_b'", None),
    Fault("a category without a name", change("categories", 1, name=None), "category 3: field 'name'", NOTHING_LOST),
]  # fmt: skip


def strictly(fault: Fault, folder: Path) -> None:
    """Strict reading refuses a named inconsistency, naming file and field; AssertionError otherwise."""
    file = put_down(folder, fault.change(good_file()))
    try:
        read_all(file, strict=True)
    except (ValueError, OSError) as error:
        if not re.search(fault.says, str(error), re.DOTALL):
            raise AssertionError(f"{fault.name}: the error does not say {fault.says!r}") from error
        if not any(name in str(error) for name in (FILE, str(folder / "images"))):
            raise AssertionError(f"{fault.name}: the error names no file") from error
        return
    raise AssertionError(f"{fault.name}: accepted")


def leniently(fault: Fault, folder: Path) -> None:
    """Lenient reading drops the part and reports it, or refuses where nothing is left; AssertionError otherwise."""
    file = put_down(folder, fault.change(good_file()))
    try:
        dataset = read_all(file, strict=False)
    except ValueError as error:
        if fault.left is not None or not re.search(fault.says, str(error), re.DOTALL):
            raise
        return
    left = (len(dataset), sum(len(dataset.target(index)) for index in range(len(dataset))))
    if left != fault.left:
        raise AssertionError(f"{fault.name}: {left} images and annotations are left, not {fault.left}")
    if not 1 <= len(dataset.report) <= 2:  # a polygon, and with the last one its annotation
        raise AssertionError(f"{fault.name}: reported as {dataset.report}")
    if not (all(FILE in sentence for sentence in dataset.report)
            and re.search(fault.says, dataset.report[0], re.DOTALL)):  # fmt: skip
        raise AssertionError(f"{fault.name}: {dataset.report} does not say {fault.says!r} of the file")


def named(number: int, folder: Path) -> str:
    """One named inconsistency, read both ways."""
    fault = NAMED[number]
    strictly(fault, folder / "strict")
    leniently(fault, folder / "lenient")
    return "refused, and " + ("refused" if fault.left is None else "dropped and reported") + " leniently"


AREA = Area("named faults", "inconsistencies of a COCO file, read strictly and leniently", named,
                  short=len(NAMED), full=len(NAMED), chunk=50)  # fmt: skip
