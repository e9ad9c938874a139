"""Predict a whole data set, write the results for others to check, and measure them.

Chapter 15 (measuring).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mrcnn_edu.augmentation import Augmentation
from mrcnn_edu.config import DataConfig
from mrcnn_edu.data.cityscapes import CityscapesDataset
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.evaluation import cityscapes
from mrcnn_edu.evaluation.coco import Evaluation, evaluate_results
from mrcnn_edu.evaluation.results import FILES, Kind, Result, merge_results, save_results, to_coco_results
from mrcnn_edu.inference import predict_dataset
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.structures import Detections
from mrcnn_edu.training.distributed import ALONE, World
from mrcnn_edu.training.proposals import SavedProposals


def measure(
    model: MaskRCNN,
    dataset: CocoDataset,
    config: DataConfig,
    out: Path,
    area_scale: float = 1.0,
    progress: bool = True,
    augmentation: Augmentation | None = None,
    labels: Tensor | None = None,
    world: World = ALONE,
) -> tuple[Evaluation, dict[int, Detections]]:
    """COCO's AP and AR of a model on a data set, and the predictions behind them by image id.

    config        gives the size at which the network sees the images
    out           folder that gets results-bbox.json and, where there are such branches, results-segm.json and so on
    area_scale    of the sides that divide small, medium and large instances, see ``coco.evaluate``
    augmentation  sizes and mirror images to combine, in place of the config's size
    labels        [K + 1], what the model's labels are in the data set; those that are 0 in it are dropped
    world         the processes that share the images; each gets the same numbers, and its own predictions
    """
    results, predictions = predict_all(
        model, dataset, config, world, progress, augmentation=augmentation, labels=labels
    )

    def write() -> None:
        out.mkdir(parents=True, exist_ok=True)
        for kind, entries in results.items():
            save_results(out / FILES[kind], entries)

    world.from_first(write)
    return count(dataset, results, world, area_scale), predictions


def predict_all(
    model: MaskRCNN,
    dataset: CocoDataset,
    config: DataConfig,
    world: World,
    progress: bool = False,
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
    proposals: SavedProposals | None = None,
    augmentation: Augmentation | None = None,
    labels: Tensor | None = None,
) -> tuple[dict[Kind, list[Result]], dict[int, Detections]]:
    """What a model finds in a data set: results by kind on process 0, none on the others; and the own predictions.

    Whoever predicted what, each image counts once and the results stand in the data set's order, so that nothing
    depends on the number of processes: where scores are equal, the order decides about AP.
    """
    kinds = [kind for kind in branches(model) if kind != "keypoint" or dataset.joints]
    paste = model.config.conventions.paste
    with world.together(patiently=True), interruptible():
        predictions = predict_dataset(
            model,
            dataset,
            config,
            progress=progress and world.rank == 0,
            proposals=proposals,
            augmentation=augmentation,
            rank=world.rank,
            world=world.size,
        )
        if labels is not None:
            predictions = {image_id: relabelled(found, labels) for image_id, found in predictions.items()}
        own = {kind: to_coco_results(dataset, predictions, kind, paste) for kind in kinds}
    parts = world.to_first(own)
    results = {kind: merge_results([part[kind] for part in parts], dataset.image_ids) for kind in kinds if parts}
    return results, predictions


def relabelled(found: Detections, labels: Tensor) -> Detections:
    """The detections with label k as ``labels[k]``, without those for which that is 0."""
    new = labels[found.labels]
    return replace(found, labels=new)[new > 0]


def count(
    dataset: CocoDataset,
    results: dict[Kind, list[Result]],
    world: World,
    area_scale: float = 1.0,
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Evaluation:
    """The AP and AR of results that process 0 has, on every process, by the rules of the data set."""

    def work() -> Evaluation:
        with interruptible():
            if isinstance(dataset, CityscapesDataset):
                return cityscapes.evaluate_results(dataset, results["mask"])
            return evaluate_results(dataset, results, area_scale)

    return world.from_first(work)


def branches(model: MaskRCNN) -> list[Kind]:
    """The kinds of result that a model gives."""
    heads: dict[Kind, object] = {"box": model.box_head, "mask": model.mask_head, "keypoint": model.keypoint_head}
    return [kind for kind, head in heads.items() if head is not None]
