"""Checkpoints: what is saved comes back to the bit, and no damage, kill or full disk costs more than the newest."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from mrcnn_edu.config import Config, DataConfig, MaskHeadConfig, ModelConfig, TrainConfig
from mrcnn_edu.conventions import PAPER
from mrcnn_edu.training import checkpoint
from mrcnn_edu.training.checkpoint import Run
from mrcnn_edu.training.randomness import rng_state, seed_rng, set_rng_state
from mrcnn_edu.training.schedule import WeightAverage, build_optimiser

CONFIG = Config(train=TrainConfig(iterations=8, average=0.9, optimiser="adamw"))


@dataclass
class Categories:
    names: tuple[str, ...]

    def to_json(self) -> list[str]:
        return list(self.names)


CATEGORIES = Categories(("circle", "square"))


def make_run(seed: int = 0, width: int = 4, config: Config = CONFIG) -> Run:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
    average = WeightAverage(model, config.train.average) if config.train.average else None
    run = Run(model, build_optimiser(model, config.train, PAPER), torch.amp.GradScaler("cpu", enabled=False), average)
    return run


def step(run: Run) -> None:
    loss = run.model(torch.randn(2, 3, 8, 8)).square().sum()
    run.optimiser.zero_grad()
    loss.backward()
    run.optimiser.step()
    run.average.update(run.model)
    run.iteration += 1


def capture(run: Run, config: Config = CONFIG, categories: Categories = CATEGORIES, data: str = "data") -> dict:
    return checkpoint.capture(run, config, categories, data, [rng_state()])


def restore(run: Run, state: dict, config: Config = CONFIG, categories: Categories = CATEGORIES, data="data") -> None:
    checkpoint.restore(run, state, config, categories, data)


def saved(folder: Path, iterations: int = 1) -> list[Path]:
    """Checkpoints after 1, 2, ... iterations, as far as they were kept; the furthest first."""
    run = make_run()
    for _ in range(iterations):
        step(run)
        checkpoint.save(folder, capture(run))
    return checkpoint.checkpoints(folder)


def flip_bit(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


# Round trip ----------------------------------------------------------------------------------------------------------


def test_restored_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    one = make_run()
    for _ in range(3):
        step(one)
    checkpoint.save(tmp_path, capture(one))
    for _ in range(3):
        step(one)

    two = make_run(seed=5)
    state, _ = checkpoint.load(tmp_path)
    restore(two, state)
    set_rng_state(state["rng"][0])
    assert two.iteration == 3
    for _ in range(3):
        step(two)
    for ours, theirs in [(one.model, two.model), (one.average.model, two.average.model)]:
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    assert one.average.updates == two.average.updates == 6


def test_random_generators_come_back(tmp_path: Path) -> None:
    run = make_run()
    seed_rng(7)
    checkpoint.save(tmp_path, capture(run))
    drawn = [random.random(), numpy.random.rand(), torch.rand(1).item()]
    seed_rng(8)
    set_rng_state(checkpoint.load(tmp_path)[0]["rng"][0])
    assert drawn == [random.random(), numpy.random.rand(), torch.rand(1).item()]


def test_a_gpu_that_has_come_or_gone_is_told(caplog: pytest.LogCaptureFixture) -> None:
    other = [] if rng_state()["cuda"] else [torch.zeros(16, dtype=torch.uint8)]
    set_rng_state(rng_state() | {"cuda": other})
    assert "draws other numbers" in caplog.text


def test_processes_of_a_run_draw_other_numbers() -> None:
    drawn = []
    for rank in (0, 1, 2, 0):
        seed_rng(5, rank)
        drawn.append((random.random(), numpy.random.rand(), torch.rand(1).item()))
    assert len(set(drawn)) == 3 and drawn[0] == drawn[3]
    torch.manual_seed(5)
    assert torch.rand(1).item() == drawn[0][2]


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    paths = saved(tmp_path, 5)
    assert [checkpoint.iteration_of(path) for path in paths] == [5, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)


def test_it_is_an_ordinary_torch_file(tmp_path: Path) -> None:
    (path,) = saved(tmp_path)
    assert torch.load(path, weights_only=True)["iteration"] == 1


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "garbage"])
def test_falls_back_to_the_older(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    newest, older = saved(tmp_path, 2)
    if damage == "bit":
        flip_bit(newest)
    else:
        content = {"cut": newest.read_bytes()[:-100], "empty": b"", "garbage": os.urandom(5000)}[damage]
        newest.write_bytes(content)
    state, path = checkpoint.load(tmp_path)
    assert (path, state["iteration"]) == (older, 1)
    assert str(newest) in caplog.text
    assert "damaged" in caplog.text


@pytest.mark.parametrize("place", [0.0, 0.1, 0.37, 0.73, 0.9999])
def test_no_flipped_bit_passes(tmp_path: Path, place: float) -> None:
    (path,) = saved(tmp_path)
    flip_bit(path, place)
    with pytest.raises(ValueError, match="damaged") as raised:
        checkpoint.read(path)
    assert str(path) in str(raised.value)


def test_nothing_whole_is_left(tmp_path: Path) -> None:
    for path in saved(tmp_path, 2):
        flip_bit(path)
    with pytest.raises(ValueError, match=r"no checkpoint can be read: .*00000002.*00000001"):
        checkpoint.load(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        checkpoint.load(tmp_path)


def test_a_damaged_newer_one_does_not_push_out_the_good(tmp_path: Path) -> None:
    """5 and 4 exist, 5 is damaged; the run goes on from 4 and saves 5 again: both good ones stay, the damaged goes."""
    damaged, good = saved(tmp_path, 5)
    flip_bit(damaged)
    run = make_run()
    restore(run, checkpoint.load(tmp_path)[0])
    step(run)
    path = checkpoint.save(tmp_path, capture(run))
    assert path != damaged
    assert checkpoint.checkpoints(tmp_path) == [path, good]


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint-00000001.pt", "weights.pt"])
def test_a_file_without_a_checksum_in_its_name_is_refused(tmp_path: Path, name: str) -> None:
    (path,) = saved(tmp_path)
    with pytest.raises(ValueError, match="cannot be checked"):
        checkpoint.read(path.rename(tmp_path / name))


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize("content", [{"model": Trap()}, {"model": {}}, [1, 2], None])
def test_other_content_under_a_true_checksum(tmp_path: Path, content, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forged file has a right checksum; it must neither run code nor be taken for a checkpoint."""
    monkeypatch.chdir(tmp_path)
    torch.save(content, "forged.pt")
    digest = checkpoint.hashlib.sha256(Path("forged.pt").read_bytes()).hexdigest()[:16]
    path = Path("forged.pt").rename(f"checkpoint-00000001-{digest}.pt")
    with pytest.raises(ValueError, match="not a checkpoint of this package"):
        checkpoint.read(path)
    assert not Path("trapped").exists()


# Another model, configuration or data --------------------------------------------------------------------------------


def test_another_model_names_the_first_difference() -> None:
    state = capture(make_run())
    other = make_run(seed=3, width=5)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"another model: 0\.weight is \[4, 3, 3, 3\].*\[5, 3, 3, 3\].* 3 more"):
        restore(other, state)
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())


def test_missing_and_additional_keys() -> None:
    state = capture(make_run())
    state["model"]["extra"] = state["model"].pop("0.bias")
    with pytest.raises(ValueError, match=r"0\.bias is missing; extra is not part of the model"):
        restore(make_run(), state)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (replace(CONFIG, model=ModelConfig(classes=3)), "model.classes = 80, now it is 3"),
        (replace(CONFIG, model=ModelConfig(mask=MaskHeadConfig(convs=(8,)))), "model.mask.convs"),
        (replace(CONFIG, model=ModelConfig(mask=None)), "model.mask.pooled_size = 14, now it is 'absent'"),
        (replace(CONFIG, train=replace(CONFIG.train, learning_rate=1.0)), "train.learning_rate = 0.02, now it is 1.0"),
        (replace(CONFIG, train=replace(CONFIG.train, seed=1)), "train.seed"),
        (replace(CONFIG, data=DataConfig(flip=0.0)), "data.flip"),
    ],
)
def test_a_changed_config_is_refused_by_name(config: Config, named: str) -> None:
    with pytest.raises(ValueError, match="cannot resume") as raised:
        restore(make_run(), capture(make_run()), config)
    assert named in str(raised.value)


def test_what_may_change() -> None:
    """Logging, workers and the place of the data; more iterations under steps, never under a cosine."""
    train = replace(CONFIG.train, log_every=1, evaluate_every=3, validate_every=2, checkpoint_every=7, iterations=9)
    config = replace(CONFIG, train=train, data=DataConfig(train_images="elsewhere", workers=0))
    restore(make_run(), capture(make_run()), config)
    cosine = replace(CONFIG, train=replace(CONFIG.train, schedule="cosine"))
    with pytest.raises(ValueError, match=r"train\.iterations = 8, now it is 9"):
        restore(make_run(), capture(make_run(), cosine), replace(cosine, train=replace(cosine.train, iterations=9)))


def test_fewer_iterations_than_were_made() -> None:
    run = make_run()
    for _ in range(3):
        step(run)
    with pytest.raises(ValueError, match=r"has 3 iterations, more than train\.iterations = 2"):
        restore(make_run(), capture(run), replace(CONFIG, train=replace(CONFIG.train, iterations=2)))


def test_other_categories_and_other_data() -> None:
    state = capture(make_run())
    with pytest.raises(ValueError, match="other categories"):
        restore(make_run(), state, categories=Categories(("circle", "star")))
    with pytest.raises(ValueError, match="other data: data; now it is more data"):
        restore(make_run(), state, data="more data")


def test_weights_that_are_not_finite_are_not_saved() -> None:
    run = make_run()
    nn.init.constant_(run.model[0].bias, float("nan"))
    with pytest.raises(FloatingPointError, match=r"0\.bias"):
        capture(run)


# Crashes -------------------------------------------------------------------------------------------------------------


def test_a_failing_disk_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved(tmp_path, 2)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = make_run()
    run.iteration = 9
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*checkpoint-00000009.*No space left") as raised:
        checkpoint.save(tmp_path, capture(run))
    assert raised.value.errno == errno.ENOSPC
    assert checkpoint.checkpoints(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoint.load(tmp_path)[0]["iteration"] == 2


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
@pytest.mark.parametrize("form", [("saving", "10"), ("writing", "2", "--world", "2")])
def test_a_kill_loses_no_acknowledged_checkpoint(form: tuple[str, ...]) -> None:
    """kill -9 at ten moments while saving, and twice while one of two processes in training writes a checkpoint.

    What was acknowledged, or a later one, loads whole; and the run that was killed ends as one that was not.
    """
    script = Path(__file__).with_name("kill_runs.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, str(script), *form], check=True, env=environment, capture_output=True, timeout=240)
