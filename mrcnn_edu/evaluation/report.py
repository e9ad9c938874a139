"""An evaluation as tables to read and as JSON to keep.

Chapter 15 (measuring). Paper: Section 4, the columns of Tables 1 to 6.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from mrcnn_edu.evaluation.coco import Evaluation, Number

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
CLASS_COLUMNS = ("AP", "AP50", "AP75")


def as_text(evaluation: Evaluation, per_class: bool = True) -> str:
    """Tables in percent for a terminal: one row per kind, then one row per class; "-" where nothing was to be found.

    per_class  with the second table
    """
    lines = [
        f"{evaluation.images} images, {evaluation.instances} instances; percent, AP over IoU 0.50:0.95, "
        f"counted by {evaluation.counter}"
    ]
    if evaluation.size_limits:
        small, large = (f"{limit:g}" for limit in evaluation.size_limits)
        lines.append(f"small is under {small} x {small} pixels, large over {large} x {large}")
    lines.append("")
    rows = []
    for kind, metrics in evaluation.kinds.items():
        # keypoints have a single recall, of at most 20 detections per image
        values = [metrics.numbers.get(name) for name in COLUMNS[:-1]]
        rows.append([kind, *map(_percent, values), _percent(metrics.numbers.get("AR100", metrics.numbers.get("AR")))])
    lines += _table(["", *COLUMNS[:-1], "AR"], rows)
    if per_class and evaluation.kinds:
        kinds = list(evaluation.kinds)
        names = max((metrics.per_class for metrics in evaluation.kinds.values()), key=len)
        rows = []
        for name in names:
            numbers = [
                evaluation[kind].per_class.get(name, {}).get(column) for kind in kinds for column in CLASS_COLUMNS
            ]
            rows.append([name, *map(_percent, numbers)])
        heads = [f"{kind} AP" if column == "AP" else column for kind in kinds for column in CLASS_COLUMNS]
        lines += ["", *_table(["class", *heads], rows)]
    return "\n".join(lines)


def save_json(path: str | os.PathLike, evaluation: Evaluation) -> None:
    """Write every number to a JSON file; null stands where nothing was to be found."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(evaluation.to_json(), file, indent=2, allow_nan=False)
        file.write("\n")


def _percent(value: Number) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(max(width, 5)) for cell, width in zip(row[1:], widths[1:]))]
        return "  ".join(cells).rstrip()

    rule = "-" * len(line([*head[:1], *("x" * width for width in widths[1:])]))
    return [line(head), rule, *map(line, rows)]
