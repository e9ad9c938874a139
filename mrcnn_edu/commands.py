"""What the ``mrcnn-edu`` command does, one function per subcommand; ``cli`` says what can be typed.

Chapter 18 (your own data).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mrcnn_edu import demo as demo_run
from mrcnn_edu import ops
from mrcnn_edu.augmentation import Augmentation
from mrcnn_edu.cli import Demo, Evaluate, Predict, Train
from mrcnn_edu.config import Config, DataConfig, ModelConfig, TrainConfig
from mrcnn_edu.data.cityscapes import CityscapesDataset
from mrcnn_edu.data.coco import CategoryMap, CocoDataset, flip_pairs, read_image
from mrcnn_edu.data.layouts import find_split, open_dataset, with_folder
from mrcnn_edu.data.transforms import FlipPairs
from mrcnn_edu.evaluation.analysis import confusion, errors
from mrcnn_edu.evaluation.coco import Evaluation
from mrcnn_edu.evaluation.figures import draw_confusion, draw_curves, draw_errors
from mrcnn_edu.evaluation.measure import branches, measure
from mrcnn_edu.evaluation.report import as_text, save_json
from mrcnn_edu.evaluation.results import FILES, PasteRule, image_results, load_results, save_results
from mrcnn_edu.inference import predict as predict_image
from mrcnn_edu.models.mask_rcnn import MaskRCNN, build_model
from mrcnn_edu.models.unshared import Unshared
from mrcnn_edu.ops import paste_masks
from mrcnn_edu.pictures import find_pictures, picture_names
from mrcnn_edu.planning import training_plan
from mrcnn_edu.presets import for_categories
from mrcnn_edu.published import (
    imagenet_state,
    is_published,
    label_table,
    open_weights,
    split_source,
    start_backbone,
)
from mrcnn_edu.structures import Detections
from mrcnn_edu.training.checkpoint import write_json
from mrcnn_edu.training.distributed import connected
from mrcnn_edu.training.loop import train as train_model
from mrcnn_edu.training.randomness import seed_rng
from mrcnn_edu.training.schedule import linear_rule
from mrcnn_edu.training.setup import choose_device
from mrcnn_edu.training.stages import PROCEDURES, train_stages
from mrcnn_edu.transfer import transfer
from mrcnn_edu.visualize import draw


def demo(options: Demo) -> None:
    """Train, measure and look at a small model."""
    demo_run.run(options.out, options.data, options.seed, options.iterations, options.smoke, options.device)


# ---------------------------------------------------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------------------------------------------------


def train(options: Train) -> None:
    """Train on COCO-format data and leave a run in ``options.out``; or only say what that would take."""
    if options.plan:
        config, train_data, _ = configure(options)
        print(training_plan(config, len(train_data), options.gpus, options.gpu, options.price))
        return
    with connected(options.device) as world:
        if options.backbone is not None and is_published(options.backbone):
            world.from_first(lambda: imagenet_state(*split_source(options.backbone)) and None)  # downloads it once
        with world.together():
            config, train_data, val_data = configure(options)
            seed_rng(config.train.seed)
            model = build_model(config.model)
            if options.start is not None:
                start_from(model, train_data.categories, options)
            else:
                start_backbone(model, options.backbone, options.resume)
        arguments = (config, model, train_data, val_data, options.out, options.resume)
        if options.procedure == "end-to-end":
            summary, where = train_model(*arguments, device=options.device), options.out / "weights.safetensors"
        else:
            stages = PROCEDURES[options.procedure]
            summary, where = train_stages(stages, *arguments, device=options.device)[stages[-1].name], options.out
    for kind in summary.get("evaluation", {}):
        if kind in FILES:
            print(f"{kind} AP {summary['evaluation'][kind]['AP']}")
    print(f"The run: {options.out}, its weights: {where}")


def configure(options: Train) -> tuple[Config, CocoDataset, CocoDataset | None]:
    """What the training is made of, as the options say: its configuration and the data."""
    with_keypoints = options.model.keypoint is not None
    data = options.data if options.folder is None else with_folder(options.data, options.folder, with_keypoints)
    if not data.train_images or not data.train_annotations:
        raise ValueError("no training data: give FOLDER, or --data.train-images and --data.train-annotations")
    train_data = open_dataset(data.train_images, data.train_annotations, data.strict)
    val_data = open_dataset(data.val_images, data.val_annotations, data.strict) if data.val_annotations else None
    model_config = for_categories(options.model, train_data.categories)
    say_model(model_config, train_data.categories, with_keypoints)
    return Config(model_config, data, with_batch(options.train, options.batch, options.resume)), train_data, val_data


def start_from(model: MaskRCNN, categories: CategoryMap, options: Train) -> None:
    """Start from the model of another run and say which classes it knows."""
    if options.backbone is not None:
        raise ValueError("--start takes the place of --backbone; leave one of them out")
    pairs = [pair.partition("=") for pair in options.rename]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise ValueError(f"--rename wants our=theirs, such as mcycle=motorcycle, got {' '.join(options.rename)}")
    source, known, _ = open_weights(options.start, None, None)
    source = source.detector if isinstance(source, Unshared) else source
    matches = transfer(model, categories, source, known, {ours: theirs for ours, _, theirs in pairs})
    fresh = [name for name, found in matches.items() if found is None]
    print(f"{len(matches) - len(fresh)} classes start as in {options.start}; at random: {', '.join(fresh) or 'none'}")


def with_batch(config: TrainConfig, batch: int | None, resume: bool) -> TrainConfig:
    """The training with another number of images per iteration, and what follows from it by the linear rule."""
    if batch is None:
        return config
    if batch < 1 or resume:
        raise ValueError(
            "--batch must be at least 1 and belongs to the start of a run: --resume continues its schedule"
        )
    scaled = linear_rule(config, batch)
    names = ("batch_size", "learning_rate", "iterations", "steps", "warmup_iterations")
    print("By the linear rule:")
    for name in names:
        print(f"  {name} {getattr(config, name)} -> {getattr(scaled, name)}")
    return scaled


def say_model(config: ModelConfig, categories: CategoryMap, wanted_keypoints: bool) -> None:
    """What was taken from the annotations, so that nobody trains another model than they think."""
    names = categories.names
    shown = ", ".join(names[:8]) + (f", ... {names[-1]}" if len(names) > 8 else "")
    branches = [name for name in ("box", "mask", "keypoint") if getattr(config, name) is not None]
    print(f"{config.classes} classes ({shown}); branches: {', '.join(branches)}; ops: {ops.backend()}")
    if wanted_keypoints and config.keypoint is None:
        print("The annotations have no keypoints: the keypoint branch is left out")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------------------------------------------------


def evaluate(options: Evaluate) -> None:
    """Measure trained weights on COCO-format data."""
    with connected(options.device) as world:
        with world.together():
            model, categories, config = open_weights(options.weights, options.min_size, options.max_size)
            model = placed(model, options, choose_device(options.device, world))
            dataset, labels = evaluated_data(options, model, categories)
            augmentation = augmentation_of(options, config, dataset.flip_pairs)
        evaluation, _ = measure(
            model, dataset, config, options.out, augmentation=augmentation, labels=labels, world=world
        )
        world.from_first(lambda: leave(options, dataset, evaluation))
    if evaluation.instances:
        print(as_text(evaluation))
        print(f"Numbers: {options.out / 'metrics.json'}, results: {options.out}/results-*.json")
    else:
        print(f"There is no ground truth to measure on; results for COCO's server: {options.out}/results-*.json")


def leave(options: Evaluate, dataset: CocoDataset | CityscapesDataset, evaluation: Evaluation) -> None:
    """Write the numbers and, where they were asked for, their figures."""
    save_json(options.out / "metrics.json", evaluation)
    if not options.figures or not evaluation.instances:
        return
    if isinstance(dataset, CityscapesDataset):
        raise ValueError("figures are drawn from COCO's numbers; leave --figures out for Cityscapes")
    for kind, metrics in evaluation.kinds.items():
        draw_curves(metrics).savefig(options.out / f"curves-{kind}.png", dpi=150)
        if kind != "keypoint":
            results = load_results(options.out / FILES[kind], dataset, kind)
            table = confusion(dataset, results, kind)
            draw_confusion(table, dataset.categories.names).savefig(options.out / f"confusion-{kind}.png", dpi=150)
            draw_errors(errors(dataset, results, kind)).savefig(options.out / f"errors-{kind}.png", dpi=150)


def evaluated_data(
    options: Evaluate, model: MaskRCNN, categories: CategoryMap
) -> tuple[CocoDataset | CityscapesDataset, Tensor | None]:
    """The data set to measure on, and where the model's labels go among its own; None: nowhere else.

    The data's categories must be among those of the weights, by id and name.
    """
    if (options.images is None) != (options.annotations is None):
        raise ValueError("--images and --annotations belong together: give both or neither")
    if options.images is None:
        images, annotations = find_split(options.folder, options.split, model.config.keypoint is not None)
    else:
        images, annotations = options.images, options.annotations
    dataset = open_dataset(images, annotations, options.strict)
    if dataset.categories.to_json() == categories.to_json():
        return dataset, None
    return dataset, label_table(categories, dataset.categories)


def placed(model: MaskRCNN | Unshared, options: Evaluate | Predict, device: torch.device) -> MaskRCNN | Unshared:
    """The model on its device, ready to detect; a faster one where that was asked for."""
    model.to(device).eval()
    return model if options.optimize is None else model.optimize(options.optimize)


def augmentation_of(options: Evaluate | Predict, config: DataConfig, pairs: FlipPairs) -> Augmentation | None:
    """The sizes and mirror images that were asked for, or None for a single look at the config's size."""
    if not (options.scales or options.mirror):
        if options.vote is not None:
            raise ValueError("--vote counts the boxes of several views; ask for some with --scales or --mirror")
        return None
    if options.scales and options.min_size is not None:
        raise ValueError("--scales takes the place of --min-size; leave one of them out")
    sizes = options.scales or (config.test_size,)
    longest = options.max_size or (Augmentation.max_size if options.scales else config.max_size)
    return Augmentation(sizes, max(longest, *sizes), options.mirror, pairs, options.vote)


# ---------------------------------------------------------------------------------------------------------------------
# Predict
# ---------------------------------------------------------------------------------------------------------------------


def predict(options: Predict) -> None:
    """Find the instances in pictures; one that cannot be read is named at the end and does not stop the others."""
    paths = find_pictures(options.images)
    model, categories, config = open_weights(options.weights, options.min_size, options.max_size)
    model = placed(model, options, choose_device(options.device))
    pairs = flip_pairs(categories) if model.config.keypoint is not None else ()
    augmentation = augmentation_of(options, config, pairs)
    names, plain = picture_names(paths)
    images: list[dict[str, Any]] = []
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in branches(model)}
    problems: list[str] = []
    try:
        for image_id, path in enumerate(tqdm(paths, unit="picture", disable=len(paths) == 1), start=1):
            try:
                image = read_image(path)
            except OSError as error:
                problems.append(str(error))
                continue
            size = (image.shape[1], image.shape[2])
            found = predict_image(model, image, config.test_size, config.max_size, augmentation=augmentation)
            images.append({"id": image_id, "file_name": names[path], "height": size[0], "width": size[1]})
            for kind, entries in results.items():
                entries += image_results(categories, image_id, size, found, kind, model.config.conventions.paste)
            save_pictures(options, plain[path], image, found, categories, model.config.conventions.paste)
    finally:  # what was found before an interruption is kept
        save_listing(options.out, images, categories, results)
    print(f"{len(results['box'])} detections in {len(images)} pictures: {options.out}")
    if problems:
        raise OSError(f"{len(problems)} of {len(paths)} pictures could not be read: {'; '.join(problems[:5])}")


def save_listing(out: Path, images: list[dict], categories: CategoryMap, results: dict[str, list[dict]]) -> None:
    """The pictures as a COCO file without annotations, and beside it the results that refer to it."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "images.json", {"images": images, "annotations": [], "categories": categories.to_json()})
    for kind, entries in results.items():
        save_results(out / FILES[kind], entries)


def save_pictures(
    options: Predict, name: str, image: Tensor, found: Detections, categories: CategoryMap, paste: PasteRule
) -> None:
    """The overlay of one picture and the masks of its instances, as far as they are wanted."""
    if options.overlays:
        target = options.out / "overlays" / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        draw(image, found, categories, score_threshold=options.score).savefig(target, dpi=150)
    if options.masks and found.mask_probs is not None:
        kept = found[found.scores >= options.score]
        for number, label in enumerate(kept.labels.tolist()):
            one, class_name = kept[number : number + 1], re.sub(r"[^\w-]+", "-", categories.names[label - 1])
            target = options.out / "masks" / f"{name}-{number + 1}-{class_name}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            mask = paste_masks(one.mask_probs, one.boxes, (image.shape[1], image.shape[2]), rule=paste)[0]
            Image.fromarray(mask.to(torch.uint8).mul(255).numpy()).save(target)
