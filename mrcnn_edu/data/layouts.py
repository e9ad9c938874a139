"""Where the images and annotations lie in a folder: our own layout, COCO's by year and by name, and Cityscapes'.

Chapter 18 (your own data) and Chapter 19 (many GPUs). Names: cocodataset.org, "Download", and the paper's Section 4.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mrcnn_edu.config import DataConfig
from mrcnn_edu.data.cityscapes import CityscapesDataset
from mrcnn_edu.data.coco import CocoDataset

# What COCO calls its parts, beside train and val of a year: (images, annotation file).
COCO_PARTS = {
    "minival": ("val2014", "instances_minival2014.json"),  # 5k images; as good as val2017
    "valminusminival": ("val2014", "instances_valminusminival2014.json"),  # with train2014: trainval35k, train2017
    "test": ("test2017", "image_info_test2017.json"),
    "test-dev": ("test2017", "image_info_test-dev2017.json"),
    "unlabeled": ("unlabeled2017", "image_info_unlabeled2017.json"),
}


def find_split(folder: Path, split: str, keypoints: bool) -> tuple[Path, Path]:
    """The image folder and the annotation file of one part of a folder.

    split      "train", "val", a part of COCO by its name ("val2014", "minival", "test-dev", "unlabeled", ...), or of
               Cityscapes
    keypoints  prefer COCO's annotations of persons with keypoints, where it has some
    returns    for Cityscapes, in place of the file, the folder of its ``gtFine`` files

    Raises FileNotFoundError naming every place that was looked at.
    """
    tried = [(folder / split, folder / f"{split}.json"), (folder / "leftImg8bit" / split, folder / "gtFine" / split)]
    for name in (f"{split}2017", f"{split}2014") if split in ("train", "val") else (split,):
        files = [f"instances_{name}.json"]
        tried += _in_coco(folder, name, [f"person_keypoints_{name}.json", *files] if keypoints else files)
    if split in COCO_PARTS:
        place, file = COCO_PARTS[split]
        people = [file.replace("instances", "person_keypoints")] if keypoints and file.startswith("instances") else []
        tried += _in_coco(folder, place, [*people, file])
    for images, truth in tried:
        if images.is_dir() and truth.exists():
            return images, truth
    looked = " or ".join(f"{images} with {truth}" for images, truth in tried)
    raise FileNotFoundError(f"no {split} data in {folder}; looked for {looked}")


def _in_coco(folder: Path, images: str, files: list[str]) -> list[tuple[Path, Path]]:
    """The places of one image folder, which many keep in another one called images, with each of the files."""
    places = [folder / images, folder / "images" / images]
    return [(place, folder / "annotations" / file) for file in files for place in places]


def open_dataset(images: str | Path, annotations: str | Path, strict: bool) -> CocoDataset | CityscapesDataset:
    """The data set that ``find_split`` has found, saying what was dropped from it if it was read leniently."""
    if Path(annotations).is_dir():
        return CityscapesDataset(Path(annotations).parent.parent, Path(annotations).name)
    dataset = CocoDataset(images, annotations, strict)
    if dataset.report:
        print(f"{annotations}: {dataset.report}")
    return dataset


def with_folder(data: DataConfig, folder: Path, keypoints: bool) -> DataConfig:
    """The data config with the images and annotations that lie in a folder; validation data are optional."""
    images, annotations = find_split(folder, "train", keypoints)
    data = replace(data, train_images=str(images), train_annotations=str(annotations))
    try:
        images, annotations = find_split(folder, "val", keypoints)
    except FileNotFoundError:
        print(f"No validation data in {folder}: nothing will be measured")
        return data
    return replace(data, val_images=str(images), val_annotations=str(annotations))
