"""The numbers a run leaves, by hand, and the lines a resumed run drops."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mrcnn_edu.config import TrainConfig
from mrcnn_edu.training.record import Record, clock, drop_after, peak_memory_mib


def test_a_line_by_hand(tmp_path: Path) -> None:
    """Two iterations of 4 images, one and three seconds long: means over the two, and 8 more of 2 seconds to go."""
    with Record(tmp_path, TrainConfig(iterations=10, log_every=2), 0, progress=False) as record:
        record.step(SimpleNamespace(iteration=1, seconds=1.0), {"box": 1.0, "mask": 3.0}, 0.1, 5.0, 4, 1.0, 0.25)
        record.step(SimpleNamespace(iteration=2, seconds=4.0), {"box": 2.0, "mask": 4.0}, 0.2, 7.0, 4, 3.0, 0.75)
        record.result(2, "validation", {"box": 0.5})
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first.pop("memory_mib") == pytest.approx(peak_memory_mib(), rel=0.5)
    assert first == {
        "iteration": 2,
        "losses": {"box": 1.5, "mask": 3.5},
        "total": 5.0,
        "learning_rate": 0.2,
        "gradient_norm": 6.0,
        "images_per_second": 2.0,
        "loading_seconds": 0.5,
        "seconds": 4.0,
        "seconds_left": 16.0,
    }
    assert second == {"iteration": 2, "validation": {"box": 0.5}}


def test_skipped_steps_have_no_norm(tmp_path: Path) -> None:
    """A gradient that overflowed in half precision must not make the file unreadable: JSON has no infinity."""
    with Record(tmp_path, TrainConfig(iterations=2, log_every=1), 0, progress=False) as record:
        record.step(SimpleNamespace(iteration=1, seconds=1.0), {"box": 1.0}, 0.1, float("inf"), 4, 1.0, 0.0)
        assert record.last["gradient_norm"] is None


def test_drop_after(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 2}\n{"iteration": 4}\n{"iteration": 6}\n{"itera')
    drop_after(path, 4)
    assert path.read_text() == '{"iteration": 2}\n{"iteration": 4}\n'
    path.write_text("not ours\n")
    with pytest.raises(ValueError, match="no metrics: 'not ours"):
        drop_after(path, 4)
    assert path.read_text() == "not ours\n"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (247, "4:07"), (43447, "12:04:07")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
