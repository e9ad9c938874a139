"""The ``mrcnn-edu`` command: what can be typed, and how it is understood; ``HOMES`` says who does it.

Chapter 18 (your own data). Every field of a configuration is an option: ``--model.rpn.nms-threshold 0.5``.

Nothing here imports PyTorch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg
from tyro.extras import subcommand_cli_from_dict

from mrcnn_edu.cli_tools import DEMO_WEIGHTS, Check, Convert, Export, Flag
from mrcnn_edu.config import Config, DataConfig, ModelConfig, TrainConfig
from mrcnn_edu.conventions import CONVENTIONS
from mrcnn_edu.fields import from_json, lookup
from mrcnn_edu.presets import PRESETS, preset

DESCRIPTION = """Mask R-CNN, exact and readable: train it, measure it, use it.

Begin with "mrcnn-edu demo". Each command explains itself: "mrcnn-edu train --help"."""


@dataclass(frozen=True)
class Demo:
    """Train a small Mask R-CNN on drawn shapes, measure it on images it has not seen, and show what it finds.

    Takes minutes on two cores. Writes the data set, the run, metrics.json and sheet.png. A run that was stopped goes on
    where it was; one that is complete is only measured again.

    Without a GPU two processes are faster than two threads, which is what make demo starts:
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 -m mrcnn_edu demo
    """

    out: Path = Path("runs/demo")  # folder of the run
    data: Path | None = None  # folder of the drawn images; None: data/shapes, or inside the run's folder with --smoke
    seed: int = 0  # of weights and training; the images are always the same
    iterations: int | None = None  # of 4 images each; None: what the preset says
    smoke: Flag = False  # only check that everything runs, with few images and iterations
    device: str | None = None  # cpu, cuda, cuda:1, ...; None: the GPU if there is one


@dataclass(frozen=True)
class Train:
    """Train on your own images with COCO-format annotations.

    FOLDER holds train/ and train.json, and for validation val/ and val.json; or train2017/ and
    annotations/instances_train2017.json as COCO does (2014 as well); or leftImg8bit/ and gtFine/ as Cityscapes does.
    Anything else is named with --data.train-images and so on. Classes and keypoints are those of the annotations.

    On several GPUs: torchrun --standalone --nproc_per_node=8 -m mrcnn_edu train FOLDER ...
    --train.batch-size changes the batch and nothing else; --batch derives the learning rate, the iterations, the steps
    and the warm-up from it and says what they become.
    """

    folder: Annotated[Positional[Path | None], arg(metavar="FOLDER")] = None  # images and annotations
    preset: Annotated[str, arg(metavar="NAME", help="what to start from: " + ", ".join(PRESETS))] = "maskrcnn_shapes"
    conventions: Annotated[  # None keeps the preset's
        str | None, arg(metavar="NAME", help="whose details: " + ", ".join(CONVENTIONS))
    ] = None
    config: Path | None = None  # start from this config.json of a run instead of from a preset
    out: Path = Path("runs/train")  # folder of the run
    batch: int | None = None  # images per iteration over all processes; rate, iterations and steps follow (linear rule)
    plan: Flag = False  # only say what it would take: schedule, global batch, memory, hours and cost, on ...
    gpus: int = 8  # ... so many GPUs ...
    gpu: Literal["v100", "a100", "h100"] = "h100"  # ... of this kind ...
    price: float | None = None  # ... at this price of one of them for an hour
    resume: Flag = False  # continue from the last checkpoint in --out, with the config.json there
    backbone: Path | None = None  # torchvision's ImageNet weights of the ResNet: a .pth file, or torchvision:resnet50
    start: Path | None = None  # start from the model of this run, class by class as far as the names agree
    rename: tuple[str, ...] = ()  # our=theirs, such as mcycle=motorcycle: classes that --start has under other names
    procedure: Literal["end-to-end", "stagewise", "four-step"] = "end-to-end"  # RPN and heads jointly or in turn
    device: str | None = None  # cpu, cuda, cuda:1, ...; None: the GPU if there is one
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Evaluate:
    """Measure the AP of trained weights as COCO does: boxes, masks and keypoints.

    Prints a table and writes metrics.json and results-*.json, which the COCO server reads as well. The images are
    shared among processes: torchrun --standalone --nproc_per_node=8 -m mrcnn_edu evaluate FOLDER ...

    Published weights are torchvision:NAME, or torchvision:NAME:FILE where there is no network: maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2, fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2, keypointrcnn_resnet50_fpn. Files of
    the other zoos are detectron2:NAME:FILE and detectron1:NAME:FILE, with NAME a preset such as maskrcnn_resnet50_fpn.
    """

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")] = Path("data/shapes")  # laid out as for train
    split: str = "val"  # which images of the folder; of COCO also minival, val2014, test-dev, ...
    images: Path | None = None  # the folder of images, where FOLDER is laid out in another way ...
    annotations: Path | None = None  # ... and their COCO-format file
    weights: Path = DEMO_WEIGHTS  # of a run: weights.safetensors or its folder; or torchvision:maskrcnn_resnet50_fpn
    out: Path = Path("runs/evaluate")  # folder for the results
    figures: Flag = False  # draw precision over recall, the confusion of classes and the kinds of mistakes
    min_size: int | None = None  # px, shorter side the network sees; None: as in the run's config.json, else 800
    max_size: int | None = None  # px, longer side; None: as in the run's config.json, else 1333 (with --scales 2000)
    scales: tuple[int, ...] = ()  # px; combine what is found at several shorter sides, 400 500 ... 1200 in the paper
    mirror: Flag = False  # combine it with what is found in the mirror image
    vote: float | None = None  # IoU of box voting among all that is combined, 0.9 in Detectron; None: no voting
    optimize: Literal["fp32", "bf16"] | None = None  # the same detections in less time; bf16 rounds them a little
    strict: bool = True  # refuse an inconsistent annotation file; --no-strict drops the faulty parts and reports them
    device: str | None = None  # cpu, cuda, cuda:1, ...; None: the GPU if there is one


@dataclass(frozen=True)
class Predict:
    """Find the instances in pictures.

    Writes images.json and results-*.json in COCO's format, and pictures of what was found.
    """

    images: Annotated[
        Positional[tuple[str, ...]],
        arg(metavar="PICTURE ...", help_behavior_hint="", help='files, folders or patterns such as "photos/*.jpg"'),
    ]
    weights: Path = DEMO_WEIGHTS  # of a run: weights.safetensors or its folder; or torchvision:maskrcnn_resnet50_fpn
    out: Path = Path("runs/predict")  # folder for the results
    score: float = 0.5  # draw, and write masks of, detections of at least this score; results-*.json has all
    overlays: bool = True  # write overlays/<picture>.png with what was found
    masks: Flag = False  # write masks/<picture>-<number>-<class>.png for each instance, white on black
    min_size: int | None = None  # px, shorter side the network sees; None: as in the run's config.json, else 800
    max_size: int | None = None  # px, longer side; None: as in the run's config.json, else 1333 (with --scales 2000)
    scales: tuple[int, ...] = ()  # px; combine what is found at several shorter sides, 400 500 ... 1200 in the paper
    mirror: Flag = False  # combine it with what is found in the mirror image
    vote: float | None = None  # IoU of box voting among all that is combined, 0.9 in Detectron; None: no voting
    optimize: Literal["fp32", "bf16"] | None = None  # the same detections in less time; bf16 rounds them a little
    device: str | None = None  # cpu, cuda, cuda:1, ...; None: the GPU if there is one


@dataclass(frozen=True)
class Reproduce:
    """Run the paper's experiments: any row of any table, small on drawn shapes or in full on COCO and Cityscapes.

    Without a name all experiments are listed. A name is that of a row, table2c/roialign-mean, or of a table, table2c. A
    result is kept as one JSON file per seed; what is there already is not run again, what was stopped goes on. At the
    end our numbers stand beside the paper's, as a table and as a figure.

    At full scale: torchrun --standalone --nproc_per_node=8 -m mrcnn_edu reproduce table2a --scale coco --data ...
    """

    names: Annotated[
        Positional[tuple[str, ...]],
        arg(metavar="NAME ...", help_behavior_hint="", help="rows or tables; none: list all"),
    ] = ()
    scale: Literal["toy", "coco"] = "toy"  # minutes on drawn shapes, or the paper's schedule on its data
    seeds: int = 1  # run each with the seeds 0, 1, ...
    plan: Flag = False  # only say what to type at coco scale, and how many hours and how much memory it takes
    gpus: int = 8  # for --plan: how many ...
    gpu: Literal["v100", "a100", "h100"] = "h100"  # ... of which kind
    table: Flag = False  # only show the results that are there
    out: Path = Path("runs/reproduce")  # folder of all runs and results
    data: Path | None = None  # folder of the images, laid out as for train; toy: where to draw them, data/flat-96
    coco: Path | None = None  # folder of COCO's images, where a row of Cityscapes starts from a model of COCO's
    unlabelled: Path | None = None  # COCO-format file of unlabelled images, beside their folder of the same name
    backbone: Path | None = None  # coco: torchvision's ImageNet weights of the ResNet, a .pth file
    iterations: int | None = None  # fewer or more than the experiment's; kept apart from its other results
    images: int = 2000  # toy: drawn images to train on; a tenth as many to measure on
    device: str | None = None  # cpu, cuda, cuda:1, ...; None: the GPU if there is one


HOMES = {"Reproduce": "reproducing", "Check": "checking", "Convert": "converting", "Export": "converting"}
COMMANDS = {
    "demo": Demo, "train": Train, "evaluate": Evaluate, "predict": Predict, "reproduce": Reproduce,
    "check": Check, "convert": Convert, "export": Export,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns its exit status: 0, 2 for anything wrong with what was asked, 130 for Ctrl-C.

    An error is one sentence on stderr; with MRCNN_EDU_DEBUG set in the environment it is the whole traceback.
    """
    # Waiting threads that spin make training several times slower as soon as another program wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        name = type(options).__name__
        run = getattr(import_module(f"mrcnn_edu.{HOMES.get(name, 'commands')}"), name.lower())
        with first_process_speaks():
            run(options)
    except KeyboardInterrupt:
        print("mrcnn-edu: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if os.environ.get("MRCNN_EDU_DEBUG"):
            raise
        if type(error).__name__ != "Elsewhere" or is_first():  # else it has been told where it happened
            print(f"mrcnn-edu: {sentence(error)}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def first_process_speaks() -> Iterator[None]:
    """Of the processes that torchrun has started only the first prints; an error is told by whoever has it."""
    with contextlib.ExitStack() as stack:
        if not is_first():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


def is_first() -> bool:
    """Is this the first, or the only, process of a run?"""
    return os.environ.get("RANK", "0") == "0"


def sentence(error: Exception) -> str:
    """What an exception says, with the file first where the system's own message has none of our words."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def parse(arguments: list[str]) -> Any:
    """What a command line asks for; exits after --help (0) and after a mistake (2), naming the nearest right option."""
    if not arguments or arguments[0].startswith("-"):
        about = arguments or ["--help"]
        return subcommand_cli_from_dict(COMMANDS, prog="mrcnn-edu", description=DESCRIPTION, args=about)
    name, rest = arguments[0], arguments[1:]
    if name in ("train", "evaluate") and "--data" in rest[:-1]:  # the same as FOLDER
        place = rest.index("--data")
        rest = [rest[place + 1], *rest[:place], *rest[place + 2 :]]
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(nested_sizes)
    return tyro.cli(
        lookup("command", COMMANDS, name),
        default=_train_defaults(rest) if name == "train" else None,
        prog=f"mrcnn-edu {name}",
        args=rest,
        config=(tyro.conf.AvoidSubcommands,),
        registry=registry,
    )


def _train_defaults(arguments: list[str]) -> Train:
    start = starting_config(arguments)
    return Train(model=start.model, data=start.data, train=start.train)


def starting_config(arguments: list[str]) -> Config:
    """What ``train``'s other options change: a named preset, a run's config.json, or with --resume that of --out."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "conventions", "config", "out"):
        early.add_argument(f"--{name}", nargs="?")
    early.add_argument("--resume", action="store_true")
    chosen, _ = early.parse_known_args(arguments)
    file = chosen.config
    if chosen.resume and file is None:
        file = Path(chosen.out or Train.out) / "config.json"
    if file is None:
        return preset(chosen.preset or Train.preset, chosen.conventions)
    if chosen.preset or chosen.conventions:
        raise ValueError(f"{file} already says everything; leave --preset and --conventions out")
    return read_config(Path(file))


def read_config(file: Path) -> Config:
    """The configuration that a run has left in its folder."""
    try:
        return from_json(Config, json.loads(file.read_text()), str(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def nested_sizes(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """How a field like ``anchor_sizes`` is typed: one word per level, with commas between the numbers of one level."""
    if info.type != tuple[tuple[float, ...], ...]:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="SIZE,...",
        instance_from_str=lambda words: tuple(tuple(float(size) for size in word.split(",")) for word in words),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(level, tuple) for level in value),
        str_from_instance=lambda value: [",".join(f"{size:g}" for size in level) for level in value],
    )
