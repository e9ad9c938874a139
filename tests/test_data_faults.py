"""Every named inconsistency of a COCO file: refused by strict reading, and dropped, counted and told by lenient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_data_coco import good_file
from torture.coco_files import put_down, read_all
from torture.named import NAMED, Fault, leniently, strictly


def test_there_are_sixty_and_their_names_differ():
    assert len({fault.name for fault in NAMED}) == len(NAMED) >= 60


def test_the_good_file_is_good(tmp_path: Path):
    """Annotation id 0, gaps in the category ids, polygons, run lengths, a crowd of runs and keypoints are no faults."""
    file = put_down(tmp_path, good_file())
    for strict in (True, False):
        dataset = read_all(file, strict)
        assert (len(dataset), len(dataset.target(0)), dataset.report) == (2, 4, [])


@pytest.mark.parametrize("fault", NAMED, ids=lambda fault: fault.name)
def test_strict_reading_refuses(tmp_path: Path, fault: Fault):
    strictly(fault, tmp_path)


@pytest.mark.parametrize("fault", NAMED, ids=lambda fault: fault.name)
def test_lenient_reading_drops_and_reports(tmp_path: Path, fault: Fault):
    leniently(fault, tmp_path)


def test_the_laws_can_be_broken(tmp_path: Path):
    """A fault that is none, one that says something else, and one that leaves something else."""
    none = Fault("none", lambda content: content, ".", (2, 4))
    for law, fault in (
        (strictly, none),
        (leniently, none),
        (strictly, replace(NAMED[0], says="^$")),
        (leniently, replace(next(fault for fault in NAMED if fault.left), left=(7, 7))),
    ):
        with pytest.raises(AssertionError):
            law(fault, tmp_path / f"{law.__name__} {fault.name}")
