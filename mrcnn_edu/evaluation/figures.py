"""Pictures of an evaluation: precision over recall, which class is taken for which, and kinds of mistakes.

Chapter 15 (measuring).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from mrcnn_edu.canvas import INK, Picture, palette
from mrcnn_edu.evaluation.analysis import ERRORS
from mrcnn_edu.evaluation.coco import Metrics

RECALL = np.linspace(0, 1, 101)
SHOWN = 12  # classes that get a line or a row of their own; more would not be read


def draw_curves(metrics: Metrics, names: Sequence[str] | None = None) -> Figure:
    """Precision over recall: left the mean over classes for several IoU thresholds, right each class at IoU 0.5.

    names  of the classes shown on the right; None: all, or the first twelve
    """
    figure = Picture(9.0, 3.6)
    left, right = (figure.add_axes((x, 0.15, 0.28, 0.75)) for x in (0.07, 0.52))
    measured = metrics.precision[0].max(axis=0) > -1
    for threshold, colour in zip((0.5, 0.6, 0.7, 0.8, 0.9), palette(5)):
        curves = metrics.precision[round((threshold - 0.5) / 0.05)][:, measured]
        if curves.size:
            left.plot(RECALL, curves.mean(axis=1), color=colour, label=f"IoU {threshold:.1f}")
    classes = list(metrics.per_class)
    chosen = [name for name in (names or classes) if measured[classes.index(name)]][:SHOWN]
    for name, colour in zip(chosen, palette(len(chosen))):
        ap = metrics.per_class[name]["AP50"]
        right.plot(RECALL, metrics.precision[0, :, classes.index(name)], color=colour, label=f"{name} {100 * ap:.0f}")
    for axes, title in ((left, "mean over the classes"), (right, "classes at IoU 0.5, with AP50")):
        axes.set(xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
        axes.set_title(title, fontsize=9, color=INK)
        if axes.lines:
            axes.legend(fontsize=7, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        _gray(axes)
    left.set_ylabel("precision")
    return figure


def draw_confusion(table: np.ndarray, names: Sequence[str]) -> Figure:
    """A table from ``analysis.confusion`` as shares of each true class (row), with the counts in the cells.

    names  of the K classes; of many, those with the most mistakes are shown
    """
    wrong = table.sum(axis=0) + table.sum(axis=1) - 2 * np.diag(table)
    rows = [0, *sorted(np.argsort(-wrong[1:], kind="stable")[:SHOWN] + 1)]
    part = table[np.ix_(rows, rows)]
    shares = part / np.maximum(part.sum(axis=1, keepdims=True), 1)
    shares[0] = 0  # what is found where nothing is has no true class to be a share of
    side = 1.6 + 0.42 * len(rows)
    figure = Picture(side, side)
    axes = figure.add_axes((1.35 / side, 0.1 / side, 1 - 1.45 / side, 1 - 1.45 / side))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*part.nonzero()):
        shade = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(part[row, column]), ha="center", va="center", fontsize=7, color=shade)
    labels = ["nothing", *(names[index - 1] for index in rows[1:])]
    axes.set_xticks(range(len(rows)), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("detected as", fontsize=9)
    axes.set_ylabel("in truth", fontsize=9)
    _gray(axes)
    return figure


def draw_errors(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """The result of ``analysis.errors`` as one bar per class: what its detections are, and what it missed.

    The parts are shares of the class's instances. Of many classes those with the most instances are shown.
    """
    total = {name: sum(found[kind] for kind in ("correct", "missed")) for name, found in counts.items()}
    names = sorted((name for name in counts if total[name]), key=lambda name: -total[name])[:SHOWN]
    figure = Picture(7.5, 1.2 + 0.3 * len(names))
    height = figure.get_size_inches()[1]
    axes = figure.add_axes((0.2, 0.55 / height, 0.58, 1 - 0.75 / height))
    start = np.zeros(len(names))
    for kind, colour in zip(ERRORS, ("#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#808080", "#D55E00")):
        share = np.array([counts[name][kind] / total[name] for name in names])
        begin = np.ones(len(names)) if kind == "missed" else start
        # to the right of 1 what has been missed, to its left what the detections are
        axes.barh(range(len(names)), share, left=begin, color=colour, label=kind, height=0.7)
        start = start + (0 if kind == "missed" else share)
    axes.axvline(1.0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(names)), [f"{name} ({total[name]})" for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("share of the class's instances: its best detections, then what none of them found", fontsize=8)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    _gray(axes)
    return figure


def _gray(axes: Axes) -> None:
    """Frame and writing in the gray that reads on light and dark pages; no ground of their own."""
    axes.set_facecolor("none")
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    for spine in axes.spines.values():
        spine.set_color(INK)
