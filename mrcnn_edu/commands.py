"""What the ``mrcnn-edu`` command does, one function per subcommand; ``cli`` says what can be typed.

Chapter 18 (your own data).
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mrcnn_edu import demo as demo_run
from mrcnn_edu import ops
from mrcnn_edu.augmentation import Augmentation
from mrcnn_edu.cli import Demo, Evaluate, Predict, Train, read_config
from mrcnn_edu.config import Config, DataConfig, ModelConfig, TrainConfig, for_categories
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
from mrcnn_edu.published import imagenet_state, is_published, label_table, load_published, split_source
from mrcnn_edu.structures import Detections
from mrcnn_edu.training.checkpoint import write_json
from mrcnn_edu.training.distributed import connected
from mrcnn_edu.training.export import load_model
from mrcnn_edu.training.loop import train as train_model
from mrcnn_edu.training.randomness import seed_rng
from mrcnn_edu.training.schedule import linear_rule
from mrcnn_edu.training.setup import choose_device
from mrcnn_edu.training.stages import last_stage, load_stages
from mrcnn_edu.visualize import draw
from mrcnn_edu.weights import load_imagenet

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".jp2", ".avif"}


def demo(options: Demo) -> None:
    """Train, measure and look at a small model."""
    demo_run.run(options.out, options.data, options.seed, options.iterations, options.smoke, options.device)


# ---------------------------------------------------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------------------------------------------------


def train(options: Train) -> None:
    """Train on COCO-format data and leave a run in ``options.out``."""
    with connected(options.device) as world:
        if options.backbone is not None and is_published(options.backbone):
            world.from_first(lambda: imagenet_state(*split_source(options.backbone)) and None)  # downloads it once
        with world.together():
            config, model, train_data, val_data = prepare(options)
        summary = train_model(config, model, train_data, val_data, options.out, options.resume, device=options.device)
    for kind in summary.get("evaluation", {}):
        if kind in FILES:
            print(f"{kind} AP {summary['evaluation'][kind]['AP']}")
    print(f"The run: {options.out}, its weights: {options.out / 'weights.safetensors'}")


def prepare(options: Train) -> tuple[Config, MaskRCNN, CocoDataset, CocoDataset | None]:
    """What the training is made of, as the options say: its configuration, a model and the data."""
    with_keypoints = options.model.keypoint is not None
    data = options.data if options.folder is None else with_folder(options.data, options.folder, with_keypoints)
    if not data.train_images or not data.train_annotations:
        raise ValueError("no training data: give FOLDER, or --data.train-images and --data.train-annotations")
    train_data = open_dataset(data.train_images, data.train_annotations, data.strict)
    val_data = open_dataset(data.val_images, data.val_annotations, data.strict) if data.val_annotations else None
    model_config = for_categories(options.model, train_data.categories)
    say_model(model_config, train_data.categories, with_keypoints)
    config = Config(model_config, data, with_batch(options.train, options.batch, options.resume))
    seed_rng(config.train.seed)
    model = build_model(config.model)
    start_backbone(model, options.backbone, options.resume)
    return config, model, train_data, val_data


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


def start_backbone(model: MaskRCNN, weights: Path | None, resume: bool) -> None:
    """Load ImageNet weights into the backbone; refuse to train one whose frozen parts would stay random."""
    if weights is not None and is_published(weights):
        load_imagenet(model.backbone.resnet, imagenet_state(*split_source(weights)), model.res5)
    elif weights is not None:
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # a file of another kind can fail in any way inside the reader
            raise ValueError(f"{weights} is not a PyTorch weights file: {str(error).splitlines()[0]}") from error
        load_imagenet(model.backbone.resnet, state, model.res5)
    elif model.config.backbone.norm == "frozen" and not resume:
        raise ValueError(
            "this backbone has frozen parts that need ImageNet weights: give torchvision's file with --backbone, or "
            "train all of it from scratch with --model.backbone.norm batch --model.backbone.frozen-stages 0"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate
# ---------------------------------------------------------------------------------------------------------------------


def evaluate(options: Evaluate) -> None:
    """Measure trained weights on COCO-format data."""
    with connected(options.device) as world:
        with world.together():
            model, categories, config = open_weights(options.weights, options.min_size, options.max_size)
            model.to(choose_device(options.device, world))
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

    The categories must be those of the weights; for published weights, which know more, be among them.
    """
    if (options.images is None) != (options.annotations is None):
        raise ValueError("--images and --annotations belong together: give both or neither")
    if options.images is None:
        images, annotations = find_split(options.folder, options.split, model.config.keypoint is not None)
    else:
        images, annotations = options.images, options.annotations
    dataset = open_dataset(images, annotations, options.strict)
    if is_published(options.weights):
        return dataset, label_table(categories, dataset.categories)
    if dataset.categories.to_json() != categories.to_json():
        raise ValueError(
            f"the weights know {categories.names}, {annotations} has {dataset.categories.names}; "
            "the categories, their ids and their order must be the same"
        )
    return dataset, None


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


def open_weights(
    path: Path, min_size: int | None, max_size: int | None
) -> tuple[MaskRCNN | Unshared, CategoryMap, DataConfig]:
    """A trained model, its categories, and the size at which it should see images; stages end in one model or two."""
    if is_published(path):
        model, categories = load_published(*split_source(path))
        data = DataConfig()
    else:
        if (path / "stages.json").exists():
            model, categories = load_stages(path)
            beside = path / last_stage(path) / "config.json"
        else:
            path = path / "weights.safetensors" if path.is_dir() else path
            model, categories = load_model(path)
            beside = path.with_name("config.json")
        data = read_config(beside).data if beside.exists() else DataConfig()
    data = replace(data, max_size=max_size or max(data.max_size, min_size or 0), min_size=(1,))
    return model, categories, replace(data, test_size=min_size or data.test_size)


# ---------------------------------------------------------------------------------------------------------------------
# Predict
# ---------------------------------------------------------------------------------------------------------------------


def predict(options: Predict) -> None:
    """Find the instances in pictures; one that cannot be read is named at the end and does not stop the others."""
    paths = find_pictures(options.images)
    model, categories, config = open_weights(options.weights, options.min_size, options.max_size)
    model.to(choose_device(options.device))
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


def find_pictures(patterns: tuple[str, ...]) -> list[Path]:
    """The picture files that are meant, each once, in order; everything named must exist."""
    if not patterns:
        raise ValueError('no pictures: name files, folders or patterns such as "photos/*.jpg"')
    paths: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        elif path.exists():
            found = [path]
        else:
            found = sorted(Path(file) for file in glob.glob(pattern, recursive=True) if Path(file).is_file())
        if not found:
            raise FileNotFoundError(f"no picture at {pattern}")
        paths += found
    return list(dict.fromkeys(paths))


def picture_names(paths: list[Path]) -> tuple[dict[Path, str], dict[Path, str]]:
    """Each picture's name below the folder that holds them all, and the same without its suffix where that suffices."""
    full = {path: path.resolve() for path in paths}
    top = Path(os.path.commonpath([path.parent for path in full.values()]))
    names = {path: where.relative_to(top) for path, where in full.items()}
    counts = Counter(name.with_suffix("") for name in names.values())
    plain = {path: name.with_suffix("") if counts[name.with_suffix("")] == 1 else name for path, name in names.items()}
    return {path: name.as_posix() for path, name in names.items()}, {path: str(name) for path, name in plain.items()}


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
