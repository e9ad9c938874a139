"""Our numbers beside the paper's: read from the results of ``reproduce``, as a table and as a figure.

Chapter 17 (the ablations).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import mean, stdev
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from mrcnn_edu.recipes import Experiment

Results = Mapping[str, Sequence[Mapping[str, Any]]]  # by experiment, one per seed
INSIDE = {"mask": ("mask_iou", "mask IoU"), "keypoint": ("oks", "OKS")}
TOY_PERSON = "figure"  # the class that stands for people among the drawn shapes


class Spread(NamedTuple):
    """One number over several seeds: its mean, its standard deviation (0 for a single seed), and all of them."""

    mean: float
    deviation: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        """The spread of those that were measured; None if none was."""
        known = tuple(value for value in values if value is not None)
        return cls(mean(known), stdev(known) if len(known) > 1 else 0.0, known) if known else None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.deviation:.1f}" if len(self.values) > 1 else "")


class Order(NamedTuple):
    """Two rows that the paper puts in an order: do ours agree, and by more than the seeds differ?"""

    lower: str
    higher: str
    paper: float  # how far apart, percent
    ours: float
    clear: bool

    @property
    def agrees(self) -> bool:
        return self.ours > 0


def number(result: Mapping[str, Any], experiment: Experiment, name: str) -> float | None:
    """One of a result's numbers under the paper's name, in percent unless the name says otherwise; None if absent."""
    if name == "ms per image":
        return 1000 * result["seconds"]["prediction"] / result["images"]["val"]
    if name == "training hours":
        return result["seconds"]["training"] / 3600
    kind, column, *rest = name.split()
    numbers = result["evaluation"].get(kind)
    if numbers is None or column == "test":
        return None
    people = experiment.data == "coco-person" and result["scale"] == "toy"
    wanted = rest[0] if rest else TOY_PERSON if people else None
    numbers = numbers if wanted is None else numbers["per_class"].get(wanted, {})
    value = numbers.get(column)
    return None if value is None else 100 * value


def spread(results: Results, experiment: Experiment, name: str) -> Spread | None:
    """One number of an experiment over its seeds."""
    return Spread.of([number(result, experiment, name) for result in results.get(experiment.name, ())])


def inside(results: Results, experiment: Experiment) -> Spread | None:
    """What the compared branch draws into true boxes: mean mask IoU or keypoint similarity, percent."""
    key, _ = INSIDE.get(experiment.measure.split()[0], (None, None))
    values = [result["inside"].get(key) for result in results.get(experiment.name, ())]
    return Spread.of([None if value is None else 100 * value for value in values])


def orders(rows: Sequence[Experiment], results: Results) -> list[Order]:
    """For each two rows that the paper ranks, and that we have run, whether ours are ranked alike.

    clear  the means are further apart than twice the standard error of their difference; never with a single seed
    """
    found = []
    for one, other in combinations(rows, 2):
        name = one.measure
        ours = [spread(results, row, name) for row in (one, other)]
        if name != other.measure or not all(ours) or one.paper.get(name) == other.paper.get(name):
            continue
        if name not in one.paper or name not in other.paper:
            continue
        (low, a), (high, b) = sorted(zip((one, other), ours), key=lambda pair: pair[0].paper[name])
        gap, seeds = b.mean - a.mean, min(len(a.values), len(b.values))
        error = (a.deviation**2 / len(a.values) + b.deviation**2 / len(b.values)) ** 0.5
        clear = seeds > 1 and abs(gap) > 2 * error
        found.append(Order(low.name, high.name, high.paper[name] - low.paper[name], gap, clear))
    return found


def as_text(rows: Sequence[Experiment], results: Results) -> str:
    """A table's rows with the paper's numbers and ours, and in words whether the order is the same."""
    lines = [["", "measure", "paper", "ours", "inside boxes", "seeds"]]
    for row in rows:
        for name in row.paper or {row.measure: None}:
            ours = spread(results, row, name)
            if ours is None and name != row.measure:
                continue
            paper = f"{row.paper[name]:.1f}" if name in row.paper else "-"
            drawn = inside(results, row) if name == row.measure else None
            seeds = str(len(ours.values)) if ours else "-"
            title = row.title if name == row.measure else ""
            own = str(ours) if ours else "quoted" if row.config is None else "not run"
            lines.append([title, name, paper, own, str(drawn) if drawn else "-", seeds])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    text.insert(1, "-" * len(text[0]))
    text += ["", *order_in_words(orders(rows, results))]
    text += [f"{row.title}: {row.note}" for row in rows if row.note and row.config is not None]
    return "\n".join(text)


def order_in_words(pairs: Sequence[Order]) -> list[str]:
    """Whether our order agrees with the paper's, pair by pair where it does not."""
    if not pairs:
        return ["Too little has been run to compare the order with the paper's."]
    agreeing = sum(pair.agrees for pair in pairs)
    lines = [f"The order agrees with the paper's in {agreeing} of {len(pairs)} pairs of rows."]
    for pair in pairs:
        if not pair.agrees or not pair.clear:
            verdict = "agrees" if pair.agrees else "does not agree"
            sure = "clearly" if pair.clear else "within the spread of the seeds"
            gaps = f"{pair.paper:+.1f} in the paper, {pair.ours:+.1f} here"
            lines.append(f"{pair.lower} < {pair.higher}: {gaps} ({verdict}, {sure})")
    return lines


def draw(rows: Sequence[Experiment], results: Results, title: str = "") -> Figure:
    """The paper's numbers on the left, ours on the right: a bar for the mean, a dot for each seed. One line per row."""
    name = next((row.measure for row in rows if row.config is not None), rows[0].measure)
    shown = [row for row in rows if row.measure == name]
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(shown)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(shown))
    left.barh(places, [row.paper.get(name, 0) for row in shown], color="#9aa5b1", height=0.62)
    for place, row in zip(places, shown):
        if name in row.paper:
            left.annotate(f"{row.paper[name]:.1f}", (row.paper[name], place), (-4, 0), textcoords="offset points",
                          ha="right", va="center", color="white")  # fmt: skip
        ours = spread(results, row, name)
        if ours is not None:
            right.barh(place, ours.mean, color="#2f6f9f", height=0.62)
            right.plot(ours.values, [place] * len(ours.values), "o", color="#f2a900", markersize=5, zorder=3)
        else:
            right.annotate("quoted" if row.config is None else "not run", (0, place), (4, 0),
                           textcoords="offset points", va="center", color="#667")  # fmt: skip
    left.set_yticks(places, [row.title for row in shown])
    left.invert_yaxis()
    scale = next((result["scale"] for row in shown for result in results.get(row.name, ())), "")
    for axes, heading in ((left, f"paper, {name}"), (right, f"here ({scale}), {name}" if scale else f"here, {name}")):
        axes.set_title(heading, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    figure.suptitle(title)
    return figure
