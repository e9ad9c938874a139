"""Random ground truths and results against pycocotools, number by number; its traps: ``test_evaluation_traps.py``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from test_evaluation import NAMES, numbers, oracle, random_set

from mrcnn_edu.evaluation.coco import evaluate_results
from torture.harness import Area


def case(number: int, folder: Path) -> str:
    """One set, of which one kind is measured."""
    folder.mkdir()
    kind = NAMES[number % len(NAMES)]
    dataset, results = random_set(folder, number, count=2 + number % 9)
    if not results[kind]:
        return "no results, which pycocotools cannot count"
    ours = numbers(evaluate_results(dataset, {kind: results[kind]}, counter="pycocotools")[kind].numbers)
    theirs = oracle(folder, results[kind], kind, (90,) if kind == "keypoint" else (3, 90))
    if not np.allclose(ours, theirs, rtol=0, atol=1e-9):
        raise AssertionError(f"{kind}: {ours} is not pycocotools' {theirs.tolist()}")
    return f"{kind}: equal"


AREA = Area("evaluation", "random sets, equal to pycocotools to 1e-9", case, short=60, full=1000, chunk=100)
