"""Run the paper's experiments: train a row, measure it, and leave one file of numbers per seed.

Chapter 17 (the ablations). Paper: Tables 1 to 9. The command is ``mrcnn-edu reproduce``.

Rows that are trained alike are trained once. Everything can be stopped and goes on where it was.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mrcnn_edu import __version__, ops
from mrcnn_edu.augmentation import Augmentation
from mrcnn_edu.config import Config
from mrcnn_edu.data.coco import Category, CategoryMap, CocoDataset
from mrcnn_edu.data.parts import Subset, Union
from mrcnn_edu.evaluation.inside import measure_inside
from mrcnn_edu.evaluation.measure import count, predict_all
from mrcnn_edu.experiments import EXPERIMENTS, trained_as
from mrcnn_edu.inference import predict_dataset
from mrcnn_edu.models.mask_rcnn import MaskRCNN, build_model
from mrcnn_edu.models.unshared import Unshared
from mrcnn_edu.recipes import TOY_SIDE, Experiment, Scale
from mrcnn_edu.structures import Detections
from mrcnn_edu.training.checkpoint import write_json
from mrcnn_edu.training.distillation import distil, with_distilled
from mrcnn_edu.training.distributed import ALONE, World
from mrcnn_edu.training.randomness import seed_rng
from mrcnn_edu.training.setup import choose_device
from mrcnn_edu.training.stages import PROCEDURES, load_stages, train_stages
from mrcnn_edu.transfer import CITYSCAPES_FROM_COCO, transfer

TOY_UNKNOWN = "star"  # at toy scale the class that starts at random, as rider does in Appendix A
TOY_AREA = TOY_SIDE / 640  # COCO's images are about so much larger, and with them what it calls small and large


class Datasets(NamedTuple):
    """The images of an experiment; ``unlabelled`` only where one distils, its annotations are not looked at."""

    train: CocoDataset | Subset
    val: CocoDataset
    unlabelled: CocoDataset | Subset | None = None


@dataclass(frozen=True)
class Setting:
    """Everything about a run that the experiment does not say.

    scale       "toy" or "coco"
    out         folder of all runs
    data        gives the images of an experiment
    backbone    gives a model its pre-trained weights; None: none, as at toy scale
    iterations  another number than the experiment's, of which the results then tell; None: its own
    device      "cpu", "cuda", ...; None: the GPU if there is one
    command     what was typed, for the result
    progress    show bars and lines
    world       the processes that share the work
    """

    scale: Scale
    out: Path
    data: Callable[[Experiment], Datasets]
    backbone: Callable[[MaskRCNN], None] | None = None
    iterations: int | None = None
    device: str | None = None
    command: str = ""
    progress: bool = True
    world: World = ALONE

    def name(self, seed: int) -> str:
        """What a run of one seed is called."""
        return f"seed-{seed}" if self.iterations is None else f"seed-{seed}-of-{self.iterations}"

    def config(self, experiment: Experiment, seed: int) -> Config:
        """The configuration of a run."""
        config = experiment.at(self.scale)
        train = replace(config.train, seed=seed)
        if self.iterations is not None:
            share = self.iterations / train.iterations
            warmup = round(train.warmup_iterations * share)
            steps = tuple(sorted({max(1, round(step * share)) for step in train.steps}))
            train = replace(train, iterations=self.iterations, warmup_iterations=warmup, steps=steps)
        return replace(config, train=train)


def result_file(experiment: Experiment, setting: Setting, seed: int) -> Path:
    """Where the numbers of a run are, or will be."""
    return setting.out / setting.scale / experiment.name / f"{setting.name(seed)}.json"


def run(experiment: Experiment, setting: Setting, seed: int) -> dict[str, Any]:
    """The numbers of one experiment with one seed: read if they are there, else trained for, measured and written.

    Raises ValueError for a row that quotes another system, and whatever training raises.
    """
    path, world = result_file(experiment, setting, seed), setting.world
    there = world.from_first(lambda: json.loads(path.read_text()) if path.exists() else None)
    if there is not None:
        return there
    began = time.perf_counter()
    config, data = setting.config(experiment, seed), setting.data(experiment)
    model, summary = trained(experiment, setting, seed)
    model.to(choose_device(setting.device, world))
    looking = time.perf_counter()
    views = augmentation(setting.scale, data.val) if experiment.augmented else None
    found, _ = predict_all(model, data.val, config.data, world, setting.progress, augmentation=views)
    predicting = time.perf_counter() - looking
    evaluation = count(data.val, found, world, TOY_AREA if setting.scale == "toy" else 1.0)
    detector = model.detector if isinstance(model, Unshared) else model
    inside = world.from_first(lambda: measure_inside(detector, data.val, config.data))
    result = {
        "experiment": experiment.name,
        "scale": setting.scale,
        "seed": seed,
        "command": setting.command,
        "version": __version__,
        "machine": machine(setting.device),
        "iterations": summary["iterations"],
        "images": {"train": len(data.train), "val": len(data.val)},
        "seconds": {
            "training": summary["seconds"],
            "prediction": predicting,
            "total": time.perf_counter() - began,
        },
        "evaluation": evaluation.to_json(),
        "inside": inside,
        "paper": experiment.paper,
    }

    def write() -> dict[str, Any]:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
        return result

    return world.from_first(write)


def trained(experiment: Experiment, setting: Setting, seed: int) -> tuple[MaskRCNN | Unshared, dict[str, Any]]:
    """The experiment's model, trained unless it is already, with its own rules for detections; iterations and seconds.

    It may have been trained for another row that is trained in the same way.
    """
    source = trained_as(experiment, setting.scale)
    folder = setting.out / setting.scale / source.name / setting.name(seed)
    done, config, world = folder / "trained.json", setting.config(source, seed), setting.world
    sums = world.from_first(lambda: json.loads(done.read_text()) if done.exists() else None)
    if sums is None:
        seed_rng(seed)
        model, data = build_model(config.model), setting.data(source)
        if setting.backbone is not None and source.start is None:
            setting.backbone(model)
        prepare_start(model, source, setting, data, seed)
        images = training_images(source, setting, data, seed, folder)
        resume = world.from_first((folder / "stages.json").exists)
        stages = PROCEDURES[source.procedure_at(setting.scale)]
        options = {"resume": resume, "progress": setting.progress, "device": setting.device}
        summaries = train_stages(stages, config, model, images, None, folder, **options).values()
        sums = {key: sum(summary[key] for summary in summaries) for key in ("iterations", "seconds")}
        world.from_first(lambda: write_json(done, sums))
    model, _ = load_stages(folder)
    rules = experiment.at(setting.scale).model
    detector = model.detector if isinstance(model, Unshared) else model
    detector.config = rules
    return model, sums


def prepare_start(model: MaskRCNN, experiment: Experiment, setting: Setting, data: Datasets, seed: int) -> None:
    """Start from the model of another experiment, class by class, where the experiment says so (Appendix A)."""
    if experiment.start is None:
        return
    source = EXPERIMENTS[experiment.start]
    other, _ = trained(source, setting, seed)
    other = other.detector if isinstance(other, Unshared) else other
    categories = setting.data(source).train.categories
    if setting.scale == "toy":
        categories = without(categories, TOY_UNKNOWN)
    names = data.train.categories.names
    rename = {ours: theirs for ours, theirs in CITYSCAPES_FROM_COCO.items() if ours in names}
    transfer(model, data.train.categories, other, categories, rename)


def without(categories: CategoryMap, name: str) -> CategoryMap:
    """The categories with one of them under a name that nobody asks for."""
    hidden = (Category(c.id, f"not {name}") if c.name == name else c for c in categories.categories)
    return CategoryMap(tuple(hidden))


def training_images(
    experiment: Experiment, setting: Setting, data: Datasets, seed: int, folder: Path
) -> CocoDataset | Subset | Union:
    """The labelled images; and where the experiment distils, the unlabelled ones with what its teacher sees in them."""
    if experiment.distil is None:
        return data.train
    if data.unlabelled is None:
        raise ValueError(f"{experiment.name} needs unlabelled images; name their COCO-format file with --unlabelled")
    path, world = folder / "distilled.json", setting.world
    if world.from_first(path.exists):
        return with_distilled(data.train, data.unlabelled, path)
    teacher, _ = trained(EXPERIMENTS[experiment.distil], setting, seed)
    teacher.to(choose_device(setting.device, world))
    views = augmentation(setting.scale, data.val)
    config = setting.config(experiment, seed)
    predictions = predict_part(teacher, data.unlabelled, config, setting, views)
    own = world.to_first(predictions)

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        everything = {image_id: found for part in own for image_id, found in part.items()}
        in_order = {image_id: everything[image_id] for image_id in data.unlabelled.image_ids}
        distil(in_order, data.train, data.unlabelled, path, config.model.conventions.paste)

    world.from_first(write)
    return with_distilled(data.train, data.unlabelled, path)


def predict_part(
    model: MaskRCNN | Unshared, data: CocoDataset | Subset, config: Config, setting: Setting, views: Augmentation
) -> dict[int, Detections]:
    """What a model sees in this process's share of some images."""
    world = setting.world
    with world.together(patiently=True):
        return predict_dataset(
            model,
            data,
            config.data,
            progress=setting.progress and world.rank == 0,
            augmentation=views,
            rank=world.rank,
            world=world.size,
        )


def augmentation(scale: Scale, data: CocoDataset) -> Augmentation:
    """The views of Appendix B, or at toy scale the same in relation to the images."""
    pairs = data.flip_pairs
    if scale == "coco":
        return Augmentation(flip_pairs=pairs)
    sizes = tuple(round(TOY_SIDE * size / 800) for size in Augmentation.sizes)
    return Augmentation(sizes, 2 * TOY_SIDE, flip_pairs=pairs)


def machine(device: str | None = None) -> dict[str, Any]:
    """What kind of machine this is, as far as its numbers and times depend on it."""
    where = choose_device(device)
    gpu = torch.cuda.get_device_name(where) if where.type == "cuda" else None
    return {
        "kind": gpu or f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": ops.backend(),
    }
