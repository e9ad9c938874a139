"""Predict a whole data set, write the results for others to check, and measure them.

Chapter 15 (measuring).
"""

from __future__ import annotations

from pathlib import Path

from mrcnn_edu.augmentation import Augmentation
from mrcnn_edu.config import DataConfig
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.evaluation.coco import Evaluation, evaluate_results
from mrcnn_edu.evaluation.results import FILES, Kind, save_results, to_coco_results
from mrcnn_edu.inference import predict_dataset
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.structures import Detections


def measure(
    model: MaskRCNN,
    dataset: CocoDataset,
    config: DataConfig,
    out: Path,
    area_scale: float = 1.0,
    progress: bool = True,
    augmentation: Augmentation | None = None,
) -> tuple[Evaluation, dict[int, Detections]]:
    """COCO's AP and AR of a model on a data set, and the predictions behind them by image id.

    config        gives the size at which the network sees the images
    out           folder that gets results-bbox.json and, where there are such branches, results-segm.json and so on
    area_scale    of the sides that divide small, medium and large instances, see ``coco.evaluate``
    augmentation  sizes and mirror images to combine, in place of the config's size
    """
    predictions = predict_dataset(model, dataset, config, progress=progress, augmentation=augmentation)
    kinds = [kind for kind in branches(model) if kind != "keypoint" or dataset.joints]
    paste = model.config.conventions.paste
    results = {kind: to_coco_results(dataset, predictions, kind, paste) for kind in kinds}
    out.mkdir(parents=True, exist_ok=True)
    for kind, entries in results.items():
        save_results(out / FILES[kind], entries)
    return evaluate_results(dataset, results, area_scale), predictions


def branches(model: MaskRCNN) -> list[Kind]:
    """The kinds of result that a model gives."""
    heads: dict[Kind, object] = {"box": model.box_head, "mask": model.mask_head, "keypoint": model.keypoint_head}
    return [kind for kind, head in heads.items() if head is not None]
