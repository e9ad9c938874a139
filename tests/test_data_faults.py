"""Every named inconsistency of a COCO file: refused by strict reading, and dropped, counted and told by lenient."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_data_coco import good_file
from torture.coco_files import FILE, NAMED, Fault, put_down, read_all


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
    file = put_down(tmp_path, fault.change(good_file()))
    with pytest.raises((ValueError, OSError)) as caught:
        read_all(file, strict=True)
    assert re.search(fault.says, str(caught.value), re.DOTALL)
    assert FILE in str(caught.value) or str(tmp_path / "images") in str(caught.value)


@pytest.mark.parametrize("fault", NAMED, ids=lambda fault: fault.name)
def test_lenient_reading_drops_and_reports(tmp_path: Path, fault: Fault):
    file = put_down(tmp_path, fault.change(good_file()))
    if fault.left is None:
        with pytest.raises(ValueError, match=fault.says):
            read_all(file, strict=False)
        return
    dataset = read_all(file, strict=False)
    assert (len(dataset), sum(len(dataset.target(index)) for index in range(len(dataset)))) == fault.left
    assert 1 <= len(dataset.report) <= 2  # a polygon, and with the last one its annotation
    assert all(FILE in sentence for sentence in dataset.report)
    assert re.search(fault.says, dataset.report[0], re.DOTALL)
