"""What ``mrcnn-edu reproduce`` does: list the paper's experiments, say what they cost, run them, show what came out.

Chapter 17 (the ablations).
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from mrcnn_edu.cli import Reproduce
from mrcnn_edu.comparison import as_text, draw
from mrcnn_edu.data import flat
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.layouts import find_split, open_dataset
from mrcnn_edu.data.parts import Subset, with_keypoints
from mrcnn_edu.experiments import ROWS, TABLES, find
from mrcnn_edu.planning import plan
from mrcnn_edu.published import start_backbone
from mrcnn_edu.recipes import TOY_SIDE, Experiment
from mrcnn_edu.reproduce import Datasets, Setting, run
from mrcnn_edu.training.checkpoint import write_json
from mrcnn_edu.training.distributed import World, connected

TOY_DATA = Path(f"data/flat-{TOY_SIDE}")
TOY_LABELS = (1, 2, 3, 4, 5, 6, 6)  # figures twice as often: in photographs, too, people are the most frequent class
TOY_VAL = 10  # one image to measure on for so many to train on


def reproduce(options: Reproduce) -> None:
    """List all experiments, or plan, run and show those that are named."""
    if not options.names:
        print(listing())
        return
    if options.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {options.seeds}")
    rows = [row for name in options.names for row in find(name)]
    if options.plan:
        for row in rows:
            where = str(options.data or "DATA")
            print(f"{row.name}: {row.note}" if row.config is None else plan(row, options.gpus, options.gpu, where))
        return
    with connected(options.device) as world:
        setting = setting_of(options, world)
        for row in [] if options.table else rows:
            for seed in range(options.seeds if row.config is not None else 0):
                print(f"{row.name}, seed {seed}")
                run(row, setting, seed)
        for table in dict.fromkeys(row.table for row in rows):
            chosen = [row for row in rows if row.table == table]
            world.from_first(lambda: show(chosen, setting))  # noqa: B023, called at once


def listing() -> str:
    """All experiments, table by table, with the number by which they are compared."""
    lines = []
    for table in TABLES:
        lines.append(table)
        for row in ROWS:
            if row.table == table:
                number = row.paper.get(row.measure)
                stated = f"{row.measure} {number}" if number is not None else ""
                quoted = "  (quoted)" if row.config is None else ""
                lines.append(f"  {row.name:30} {row.title:46} {stated}{quoted}")
    return "\n".join(lines)


def setting_of(options: Reproduce, world: World) -> Setting:
    """Where the data, the weights and the results of the runs are."""

    def data(row: Experiment) -> Datasets:
        return toy_data(row, options, world) if options.scale == "toy" else full_data(row, options)

    command = shlex.join(["mrcnn-edu", *sys.argv[1:]])
    backbone = None
    if options.scale == "coco":

        def backbone(model: Any) -> None:
            start_backbone(model, options.backbone, resume=False)

    return Setting(
        options.scale,
        options.out,
        data,
        backbone,
        options.iterations,
        options.device,
        command,
        world=world,
    )


def toy_data(row: Experiment, options: Reproduce, world: World) -> Datasets:
    """Drawn images, written if need be; few of them where the row is about having few, the rest then unlabelled."""
    folder, count = options.data or TOY_DATA, max(options.images // TOY_VAL, 1)
    train, val = world.from_first(lambda: draw_toys(folder, options.images, count))
    train, val = CocoDataset(*train), CocoDataset(*val)
    if row.few is None:
        return Datasets(train, val)
    few = min(row.few, len(train) // 2)
    return Datasets(Subset(train, range(few)), val, Subset(train, range(few, len(train))))


def draw_toys(folder: Path, train: int, val: int) -> list[tuple[Path, Path]]:
    """Images to train on and to measure on, and their annotations, drawn unless the very same are there already."""
    made = {"made_by": "mrcnn_edu.data.flat", "train": train, "val": val, "size": TOY_SIDE, "labels": list(TOY_LABELS)}
    stamp, splits = folder / "stamp.json", ("train", "val")
    found = json.loads(stamp.read_text()) if stamp.exists() else {}
    if found == made | {"complete": True}:
        return [(folder / split / "images", folder / split / "instances.json") for split in splits]
    if found.get("made_by") != made["made_by"] and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files; choose a new or an empty folder for the drawn images")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(stamp, made | {"complete": False})  # if we are stopped now, the folder is known as ours
    written = [
        flat.write(folder / split, made[split], seed, TOY_SIDE, labels=TOY_LABELS) for seed, split in enumerate(splits)
    ]
    write_json(stamp, made | {"complete": True})
    return written


def full_data(row: Experiment, options: Reproduce) -> Datasets:
    """The images of a row, laid out as COCO's; those of Cityscapes converted to its format."""
    folder = options.coco if options.coco is not None and row.data != "cityscapes" else options.data
    if folder is None:
        raise ValueError("coco scale needs the images: name their folder, laid out as for train, with --data")
    people = row.data == "coco-person"
    parts = [open_dataset(*find_split(folder, split, people), strict=True) for split in ("train", "val")]
    if row.config.model.keypoint is None and not people:
        return Datasets(*parts)
    unlabelled = None
    if row.distil is not None and options.unlabelled is not None:
        unlabelled = CocoDataset(options.unlabelled.with_suffix(""), options.unlabelled, keypoints=False)
    # Section 5: "all COCO trainval35k images that contain annotated keypoints"; Table 5: all rows on the same
    return Datasets(with_keypoints(parts[0]), parts[1], unlabelled)


def show(rows: list[Experiment], setting: Setting) -> None:
    """Print and draw the results that are there, and leave the figure beside them."""
    results = {row.name: read_results(row, setting) for row in rows}
    table = rows[0].table
    print(f"\n{table}, {setting.scale} scale")
    print(as_text(rows, results))
    if any(results.values()):
        path = setting.out / setting.scale / f"{table}.png"
        draw(rows, results, table).savefig(path, dpi=150)
        print(f"Figure: {path}")


def read_results(row: Experiment, setting: Setting) -> list[dict[str, Any]]:
    """The results of one experiment with as many iterations as asked for, by seed."""
    folder = setting.out / setting.scale / row.name
    pattern = "seed-*.json" if setting.iterations is None else f"seed-*-of-{setting.iterations}.json"
    paths = [path for path in folder.glob(pattern) if setting.iterations is not None or "-of-" not in path.name]
    return [json.loads(path.read_text()) for path in sorted(paths)]
