"""The loop: learning, exact resumption, what it leaves, and how it ends when something goes wrong."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_runs
from training_runs import CONFIG, ENVIRONMENT, IMAGES, MODEL, tiny_model, with_train

from mrcnn_edu.config import Config, KeypointHeadConfig
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.shapes import write
from mrcnn_edu.evaluation import measure
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.training import checkpoint, loop
from mrcnn_edu.training.export import load_model
from mrcnn_edu.training.loop import train

Datasets = tuple[CocoDataset, CocoDataset]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("shapes") / "data", train=IMAGES, val=3, size=64, seed=1)


@pytest.fixture(scope="module")
def data(folder: Path) -> Datasets:
    return training_runs.datasets(folder)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(config: Config, data: Datasets, out: Path, validate: bool = False, model: MaskRCNN | None = None, **options):
    """Train the tiny model quietly on the CPU; the model and what ``train`` returned."""
    model = model or tiny_model()
    options = {"progress": False, "device": "cpu"} | options
    return model, train(config, model, data[0], data[1] if validate else None, out, **options)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def state(out: Path) -> dict:
    return checkpoint.load(out)[0]


def assert_same(left, right, path: str = "state") -> None:
    """Equal to the bit, whatever it is made of."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for index, (a, b) in enumerate(zip(left, right)):
            assert_same(a, b, f"{path}[{index}]")
    else:
        assert left == right, path


def assert_same_end(one: Path, two: Path) -> None:
    """The last checkpoints of two runs agree in everything that training changes."""
    parts = ("iteration", "model", "average", "optimiser", "scaler", "sampler", "rng")
    assert_same(*({part: state(out)[part] for part in parts} for out in (one, two)))


@pytest.fixture(scope="module")
def undisturbed(data: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight iterations in one go."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(CONFIG, data, out)
    return out


def stop_at(model: MaskRCNN, iteration: int, action) -> MaskRCNN:
    """The model, doing something when it computes the losses of an iteration, counted from 1."""
    losses, count = model.losses, 0

    def patched(*arguments):
        nonlocal count
        count += 1
        values = losses(*arguments)
        return action(values) or values if count == iteration else values

    model.losses = patched
    return model


# What a run does -----------------------------------------------------------------------------------------------------


def test_it_learns(data: Datasets, tmp_path: Path) -> None:
    config = with_train(iterations=30, schedule="step", steps=(), learning_rate=5e-3, average=0.0, log_every=5)
    run(config, data, tmp_path / "run")
    # The keypoint loss is left out: which of five images happen to have a figure decides about it
    losses = [line["total"] - line["losses"]["keypoint"] for line in lines(tmp_path / "run")]
    assert losses[-1] < 0.85 * losses[0]


def test_what_it_leaves(data: Datasets, tmp_path: Path) -> None:
    out = tmp_path / "new" / "run"
    model, summary = run(with_train(validate_every=3, evaluate_every=5), data, out, validate=True)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "metrics.jsonl", "metrics.json", "tensorboard", "weights.safetensors"} < names
    assert [checkpoint.iteration_of(path) for path in checkpoint.checkpoints(out)] == [8, 4]
    assert len(names) == 7
    assert next((out / "tensorboard").iterdir()).stat().st_size > 0
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(summary))

    training = [line for line in lines(out) if "losses" in line]
    assert [line["iteration"] for line in training] == [2, 4, 6, 8]
    assert set(training[0]["losses"]) == {"objectness", "rpn_box", "classification", "box", "mask", "keypoint"}
    for line in training:
        assert line["total"] == pytest.approx(sum(line["losses"].values()))
        assert line["images_per_second"] > 0 and line["loading_seconds"] >= 0 and line["gradient_norm"] > 0
        assert line["memory_mib"] > 10
    assert training[-1]["seconds_left"] == 0
    assert training[-1]["learning_rate"] == loop.learning_rate(7, CONFIG.train)
    assert [line["iteration"] for line in lines(out) if "validation" in line] == [3, 6, 8]
    assert [line["iteration"] for line in lines(out) if "evaluation" in line] == [5, 8]
    assert summary["evaluation"]["box"]["AP"] >= 0
    assert summary["validation"]["total"] > 0

    # The model holds the averaged weights, which are those of the file
    loaded, categories = load_model(out / "weights.safetensors")
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert_same(dict(model.state_dict()), dict(state(out)["average"]["model"]))
    assert categories.names == data[0].categories.names
    assert not model.training


@pytest.mark.parametrize(
    "changes",
    [
        {"optimiser": "sgd", "average": 0.0, "clip_norm": None, "channels_last": False},
        {"precision": "bf16"},
        {"precision": "fp16"},
    ],
)
def test_other_settings_run(data: Datasets, tmp_path: Path, changes: dict) -> None:
    run(with_train(iterations=2, **changes), data, tmp_path / "run")
    assert state(tmp_path / "run")["iteration"] == 2


def test_frozen_weights_stay(data: Datasets, tmp_path: Path) -> None:
    model = tiny_model()
    model.backbone.requires_grad_(False)
    before = {name: value.clone() for name, value in model.backbone.named_parameters()}
    run(with_train(iterations=2, average=0.0), data, tmp_path / "run", model=model)
    assert_same(before, dict(model.backbone.named_parameters()))


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_four_and_four_are_eight_to_the_bit(data: Datasets, tmp_path: Path, undisturbed: Path, workers: int) -> None:
    """Stopped by a signal after four of eight iterations, resumed by a process that drew other numbers in between."""
    out = tmp_path / "run"
    config = replace(CONFIG, data=replace(CONFIG.data, workers=workers))
    model = stop_at(tiny_model(), 4, lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="stopped after iteration 4"):
        run(config, data, out, model=model)
    assert state(out)["iteration"] == 4
    torch.rand(3)
    run(config, data, out, model=tiny_model(seed=9), resume=True)
    assert_same_end(out, undisturbed)
    assert [line["iteration"] for line in lines(out)] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    "changes", [{"optimiser": "sgd", "schedule": "step"}, {"precision": "bf16"}, {"precision": "fp16"}]
)
def test_other_settings_resume_to_the_bit(data: Datasets, tmp_path: Path, changes: dict) -> None:
    config = with_train(iterations=4, checkpoint_every=2, **changes)
    run(config, data, tmp_path / "one")
    checkpoint.checkpoints(tmp_path / "one")[0].rename(tmp_path / "last")
    (tmp_path / "two").mkdir()
    for path in checkpoint.checkpoints(tmp_path / "one"):
        path.rename(tmp_path / "two" / path.name)
    (tmp_path / "last").rename(tmp_path / "one" / f"checkpoint-00000004-{digest(tmp_path / 'last')}.pt")
    run(config, data, tmp_path / "two", resume=True)
    assert_same_end(tmp_path / "one", tmp_path / "two")


def digest(path: Path) -> str:
    return checkpoint.hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def test_measuring_changes_nothing(data: Datasets, tmp_path: Path, undisturbed: Path) -> None:
    run(with_train(validate_every=1, evaluate_every=3, checkpoint_every=1), data, tmp_path / "run", validate=True)
    assert_same_end(tmp_path / "run", undisturbed)


def test_the_validation_loss_has_no_chance_in_it(data: Datasets, tmp_path: Path) -> None:
    """With weights that do not move, it is the same number each time."""
    config = with_train(iterations=3, validate_every=1, average=0.0, learning_rate=1e-30, weight_decay=0.0)
    model = tiny_model()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._NormBase):
            module.momentum = 0.0
    run(config, data, tmp_path / "run", validate=True, model=model)
    totals = {line["validation"]["total"] for line in lines(tmp_path / "run") if "validation" in line}
    assert len(totals) == 1


def test_more_iterations_of_a_step_schedule(data: Datasets, tmp_path: Path) -> None:
    config = with_train(iterations=4, schedule="step", steps=(5,))
    run(config, data, tmp_path / "run")
    longer = replace(config, train=replace(config.train, iterations=8))
    run(longer, data, tmp_path / "run", resume=True)
    run(longer, data, tmp_path / "straight")
    assert_same_end(tmp_path / "run", tmp_path / "straight")


def test_lines_of_lost_iterations_go(data: Datasets, tmp_path: Path, undisturbed: Path) -> None:
    """The newest checkpoint is damaged: iterations 5 to 8 are done, and told, again; a line cut off by a crash goes."""
    out = tmp_path / "run"
    run(CONFIG, data, out)
    newest = checkpoint.checkpoints(out)[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 9, "los')
    run(CONFIG, data, out, resume=True)
    assert [line["iteration"] for line in lines(out)] == [2, 4, 6, 8]
    assert_same_end(out, undisturbed)


def test_resuming_a_finished_run_measures_again(data: Datasets, tmp_path: Path, undisturbed: Path) -> None:
    out = tmp_path / "run"
    run(CONFIG, data, out)
    _, summary = run(CONFIG, data, out, resume=True, validate=True)
    assert summary["iterations"] == 8
    assert summary["evaluation"]["images"] == 3
    assert_same_end(out, undisturbed)


def test_resuming_nothing_starts_and_says_so(
    data: Datasets, tmp_path: Path, undisturbed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run(CONFIG, data, tmp_path / "run", resume=True)
    assert "starting from the first iteration" in caplog.text
    assert_same_end(tmp_path / "run", undisturbed)


# Ending early --------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(data: Datasets, tmp_path: Path) -> None:
    """NaN in iteration 6: an error that names it, and the checkpoint of iteration 4 stays and continues."""
    model = stop_at(tiny_model(), 6, lambda losses: losses | {"mask": losses["mask"] * float("nan")})
    with pytest.raises(FloatingPointError, match=r"a loss is not finite: .*mask nan") as raised:
        run(CONFIG, data, tmp_path / "run", model=model)
    message = str(raised.value)
    assert "iteration 6, images [" in message
    assert any(str([a, b]) in message for a in data[0].image_ids for b in data[0].image_ids)
    assert str(tmp_path / "run" / "checkpoint-00000004") in message
    assert state(tmp_path / "run")["iteration"] == 4
    assert all(value.isfinite().all() for value in state(tmp_path / "run")["model"].values())


def test_a_gradient_that_is_not_finite(data: Datasets, tmp_path: Path) -> None:
    """A square root at zero: the loss is 0, its gradient is not finite; no weight may see it."""
    model = tiny_model()
    weight = next(model.mask_head.parameters())
    before = []

    def poison(losses: dict) -> dict:
        before.append({name: value.clone() for name, value in model.named_parameters()})
        return losses | {"mask": (weight * 0).sum().sqrt()}

    stop_at(model, 2, poison)
    with pytest.raises(
        FloatingPointError, match=r"the gradient is not finite, first in mask_head.*iteration 2, images"
    ):
        run(with_train(clip_norm=None), data, tmp_path / "run", model=model)
    assert_same(before[0], dict(model.named_parameters()))
    assert not checkpoint.checkpoints(tmp_path / "run")


def test_half_precision_that_overflows_for_ever_stops(data: Datasets, tmp_path: Path) -> None:
    """fp16 skips steps whose gradient overflows; when the loss scale is used up the run ends in place of idling."""
    model = tiny_model()
    losses = model.losses

    def overflowing(*arguments):
        return {name: loss * 1e30 for name, loss in losses(*arguments).items()}

    model.losses = overflowing
    with pytest.raises(FloatingPointError, match="the gradient is not finite"):
        run(with_train(iterations=40, precision="fp16"), data, tmp_path / "run", model=model)


def test_a_signal_while_evaluating(data: Datasets, tmp_path: Path, undisturbed: Path, monkeypatch) -> None:
    """Ctrl-C during the evaluation after iteration 3 does not wait for its end, and loses nothing."""
    predict = measure.predict_dataset

    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(measure, "predict_dataset", interrupted)
    config = with_train(evaluate_every=3)
    with pytest.raises(KeyboardInterrupt, match="stopped after iteration 3"):
        run(config, data, tmp_path / "run", validate=True)
    monkeypatch.setattr(measure, "predict_dataset", predict)
    run(config, data, tmp_path / "run", validate=True, resume=True)
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
def test_sigterm_to_all_processes_of_a_run(folder: Path, data: Datasets, tmp_path: Path) -> None:
    """As batch systems do: the loader's workers get the signal and die, and the run still ends in order."""
    out = tmp_path / "run"
    script = [sys.executable, training_runs.__file__, "endless", str(folder), str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(script, start_new_session=True, env=ENVIRONMENT, **pipes)
    try:
        deadline = time.monotonic() + 60
        while not ((out / "metrics.jsonl").exists() and len(lines_so_far(out)) > 3):
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(child.pid, signal.SIGTERM)
        printed, errors = child.communicate(timeout=30)
    finally:
        if child.poll() is None:
            child.kill()
    assert "resume continues from it" in printed, errors
    assert child.returncode == 143
    assert state(out)["iteration"] == lines_so_far(out)[-1]["iteration"]
    assert "DataLoader worker" not in errors


def lines_so_far(out: Path) -> list[dict]:
    whole = [line for line in (out / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_run_killed_three_times_ends_at_the_same_weights(
    folder: Path, data: Datasets, tmp_path: Path, undisturbed: Path
) -> None:
    out = tmp_path / "run"
    script = [sys.executable, training_runs.__file__, "kill", str(folder), str(out), "1", "3", "5"]
    subprocess.run(script, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT, timeout=120)
    run(with_train(checkpoint_every=1), data, out, resume=True)
    assert_same_end(out, undisturbed)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_refused(data: Datasets, undisturbed: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in undisturbed.iterdir()}
    with pytest.raises(FileExistsError, match="holds a run already; resume it, or choose another folder"):
        run(CONFIG, data, undisturbed)
    assert before == {path.name: path.stat().st_mtime_ns for path in undisturbed.iterdir()}


@pytest.mark.parametrize("place", ["file/run", "/proc/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_made(data: Datasets, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot make the folder"):
        run(CONFIG, data, tmp_path / place)


def test_resuming_with_another_config_changes_nothing(data: Datasets, tmp_path: Path, undisturbed: Path) -> None:
    model = tiny_model(seed=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"cannot resume: .*train.learning_rate = 0.001, now it is 0.5"):
        run(with_train(learning_rate=0.5), data, undisturbed, model=model, resume=True)
    assert_same(before, dict(model.state_dict()))
    assert json.loads((undisturbed / "config.json").read_text())["train"]["learning_rate"] == 0.001


def test_what_does_not_fit_together(data: Datasets, tmp_path: Path) -> None:
    out = tmp_path / "run"
    boxes_only = replace(MODEL, mask=None)
    with pytest.raises(
        ValueError, match=r"the model was built with mask.pooled_size = 4, but config.model says 'absent'"
    ):
        run(replace(CONFIG, model=boxes_only), data, out)
    wide = replace(MODEL, classes=7)
    with pytest.raises(ValueError, match=r"data have 6 categories, the model 7 classes; set model.classes to 6"):
        run(replace(CONFIG, model=wide), data, out, model=loop_model(wide))
    jointed = replace(MODEL, keypoint=KeypointHeadConfig(joints=5, labels=(6,), convs=(8,), pooled_size=4))
    with pytest.raises(ValueError, match="data have 7 joints per keypoint class, the model 5"):
        run(replace(CONFIG, model=jointed), data, out, model=loop_model(jointed))
    assert not out.exists()


def loop_model(config) -> MaskRCNN:
    from mrcnn_edu.models.mask_rcnn import build_model

    return build_model(config)


def test_a_layout_that_crashes_is_refused(data: Datasets, tmp_path: Path) -> None:
    narrow = replace(MODEL, backbone=replace(MODEL.backbone, width=4))
    with pytest.raises(
        ValueError, match=r"shortcut.0 has a stride and only 4 channels.* set train.channels_last to False"
    ):
        run(replace(CONFIG, model=narrow), data, tmp_path / "run", model=loop_model(narrow))


def test_a_device_that_is_not_there(data: Datasets, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="PyTorch finds no GPU"):
        run(CONFIG, data, tmp_path / "run", device="cuda")


@pytest.mark.parametrize("device", ["", "gpu", [], 3.5, ("cpu",)], ids=repr)
def test_a_device_that_is_none(data: Datasets, tmp_path: Path, device: object) -> None:
    with pytest.raises(ValueError, match="device must be None or a name such as 'cpu'"):
        train(CONFIG, tiny_model(), data[0], None, tmp_path / "run", device=device)
    assert not (tmp_path / "run").exists()


# What it prints ------------------------------------------------------------------------------------------------------


def test_a_few_lines_without_a_terminal(data: Datasets, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(with_train(iterations=21, log_every=1), data, tmp_path / "run", progress=True)
    printed = capsys.readouterr()
    shown = printed.out.splitlines()
    assert 10 <= len(shown) <= 22
    assert "iteration 21/21" in shown[-1] and "images/s" in shown[-1] and "0:00 left" in shown[-1]
    assert printed.err == ""
    run(with_train(iterations=1), data, tmp_path / "quiet", progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(data: Datasets, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run(with_train(iterations=4), data, tmp_path / "run", progress=True)
    printed = capsys.readouterr().out
    assert "4/4" in printed and "loss" in printed and "images/s" in printed
