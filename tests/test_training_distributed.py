"""Several processes, one run: the gradients of one, decisions taken together, and an end to every way of waiting."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from many_processes import PLAIN_MODEL, SHARED, plain_model
from test_cityscapes import scene
from test_cityscapes import write as write_streets
from training_runs import CONFIG, ENVIRONMENT, IMAGES, datasets, tiny_model, with_train

from mrcnn_edu.config import TrainConfig
from mrcnn_edu.data.shapes import write
from mrcnn_edu.fields import to_json
from mrcnn_edu.models.mask_rcnn import MaskRCNN, build_model
from mrcnn_edu.structures import ImageBatch, Proposals, Target
from mrcnn_edu.training import checkpoint, setup
from mrcnn_edu.training.distributed import ALONE, TIMEOUT, Elsewhere, told_of_loss
from mrcnn_edu.training.loop import train
from mrcnn_edu.training.schedule import in_words, linear_rule
from mrcnn_edu.training.stopping import Stopped

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and gloo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("shapes") / "data", train=IMAGES, val=18, size=64, seed=1)


@pytest.fixture(scope="module")
def scenarios(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scenarios of ``many_processes``, run once."""
    out = tmp_path_factory.mktemp("processes") / "out"
    regions = [[(26000 + n, 10 * n, 20, 10 * n + 25, 45), (24000, 60, n, 85, 30)] for n in range(IMAGES)]
    write_streets(folder / "streets", *[scene(*region) for region in regions], split="train")
    script = [sys.executable, str(Path(__file__).with_name("many_processes.py"))]
    script += [str(folder), str(folder / "streets"), str(out)]
    subprocess.run(script, check=True, env=ENVIRONMENT, timeout=600, capture_output=True)
    return out


def outcomes(scenarios: Path, name: str, size: int = 2) -> list[dict]:
    """What each process returned or raised; a killed one has left nothing."""
    files = [scenarios / name / f"{rank}.pt" for rank in range(size)]
    return [torch.load(file, weights_only=False) if file.exists() else {} for file in files]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run)[0]["model"]


def assert_same_end(one: Path, two: Path) -> None:
    """The last checkpoints of two runs agree to the bit in everything that training changes."""
    left, right = (checkpoint.load(run)[0] for run in (one, two))
    assert left["iteration"] == right["iteration"]
    for name, value in left["model"].items():
        assert torch.equal(value, right["model"][name]), name
    for name, value in left["average"]["model"].items():
        assert torch.equal(value, right["average"]["model"][name]), name
    for a, b in zip(left["rng"], right["rng"], strict=True):
        assert torch.equal(a["torch"], b["torch"]) and a["python"] == b["python"]


# The same gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_processes_and_parts_give_the_gradients_of_one(scenarios: Path, world: int) -> None:
    """Two steps of SGD on the same images, in four parts: in one process, in 2 x 2 and in 4, up to the order of sums.

    Each part is averaged over its own anchors, rois, positives and joints, and the parts equally, as 8 GPUs of 2 images
    do in the paper; so it does not matter which process computes a part.
    """
    start, alone, shared = plain_model().state_dict(), weights(scenarios / "run-1"), weights(scenarios / f"run-{world}")
    moved = 0.0
    for name, before in start.items():
        step = alone[name] - before
        torch.testing.assert_close(shared[name] - before, step, rtol=1e-3, atol=2e-7, msg=name)
        moved = max(moved, step.abs().max().item() if step.is_floating_point() else 0.0)
    assert moved > 1e-2  # thousands of times the tolerance


def drawn(instances: list[int]) -> tuple[list[torch.Tensor], list[Target], list[Proposals]]:
    """Images with so many squares each, and five proposals per image that meet none of them."""
    generator = torch.Generator().manual_seed(0)
    images, targets, proposals = [], [], []
    for count in instances:
        images.append(torch.rand(3, 64, 64, generator=generator))
        corner = torch.arange(count)[:, None] * 20.0 + torch.tensor([2.0, 2.0])
        masks = torch.zeros(count, 64, 64, dtype=torch.bool)
        for mask, (x, y) in zip(masks, corner.int().tolist()):
            mask[y : y + 16, x : x + 12] = True
        joints = torch.cat([corner[:, None].expand(-1, 7, 2) + 4, torch.full((count, 7, 1), 2.0)], dim=2)
        boxes, labels = torch.cat([corner, corner + 16], dim=1), torch.full((count,), 6)
        targets.append(Target(boxes, labels, masks, joints))
        places = torch.rand(5, 2, generator=generator) * 20 + torch.tensor([0.0, 40.0])
        proposals.append(Proposals(torch.cat([places, places + 4], dim=1), torch.ones(5)))
    return images, targets, proposals


def losses_of(model: MaskRCNN, parts: tuple[list, list, list]) -> dict[str, torch.Tensor]:
    images, targets, proposals = parts
    return model(ImageBatch.collate(images), targets, proposals)


def test_the_joined_batch_where_images_have_as_much_to_learn() -> None:
    """With as many anchors, rois, positives and joints in each image, the mean of two halves is the loss, and the
    gradient, of the four images in one batch."""
    conventions = replace(PLAIN_MODEL.conventions, rpn_loss_divisor="batch")
    torch.manual_seed(0)
    model, parts = build_model(replace(PLAIN_MODEL, conventions=conventions)), drawn([2, 2, 2, 2])
    joined, gradients = losses_of(model, parts), []
    sum(joined.values()).backward()
    gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    halves = [losses_of(model, tuple(part[first : first + 2] for part in parts)) for first in (0, 2)]
    (sum(sum(half.values()) for half in halves) / 2).backward()
    gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for name, loss in joined.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, loss, msg=name)
    for whole, mean in zip(*gradients, strict=True):
        torch.testing.assert_close(mean, whole, rtol=1e-3, atol=1e-6)


def test_each_process_counts_alike_where_they_have_not() -> None:
    """One image with one instance, one with three: a batch of both weighs every mask alike, two processes the images.

    So it is with 8 GPUs in the paper and in every released code; what stays the same whatever the number of processes
    is the number of images that are averaged over at once.
    """
    torch.manual_seed(0)
    model, parts = build_model(PLAIN_MODEL), drawn([1, 3])
    one, three = (losses_of(model, tuple(part[n : n + 1] for part in parts))["mask"] for n in (0, 1))
    torch.testing.assert_close(losses_of(model, parts)["mask"], (one + 3 * three) / 4)
    assert abs(one - three) > 1e-5


def test_processes_have_random_numbers_of_their_own(scenarios: Path) -> None:
    first, second = checkpoint.load(scenarios / "run")[0]["rng"]
    assert not torch.equal(first["torch"], second["torch"])


# Stopping and resuming -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "world"), [("coco", 4), ("streets", 2)])
def test_eight_steps_are_four_and_four_more(scenarios: Path, format: str, world: int) -> None:
    """To the bit, by several processes, on files of COCO's format and of Cityscapes'."""
    for name, steps in (("eight", 8), ("four", 4), ("four-more", 8)):
        assert [outcome.get("result") for outcome in outcomes(scenarios, f"{format}-{name}", world)] == [steps] * world
    assert_same_end(scenarios / f"{format}-eight-run", scenarios / f"{format}-four-run")


def test_a_signal_to_one_process_stops_all_and_loses_nothing(scenarios: Path) -> None:
    """SIGTERM to the second of two during iteration 2: both leave with its status, both are resumed, to the bit."""
    assert [outcome["message"] for outcome in outcomes(scenarios, "stopped")] == ["143", "143"]
    assert [outcome["result"] for outcome in outcomes(scenarios, "resumed")] == [6, 6]
    assert_same_end(scenarios / "run", scenarios / "stopped-run")


def test_only_the_first_process_writes(scenarios: Path) -> None:
    lines = [json.loads(line) for line in (scenarios / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    assert json.loads((scenarios / "run" / "config.json").read_text()) == json.loads(json.dumps(to_json(SHARED)))


def test_another_number_of_processes_goes_on(scenarios: Path) -> None:
    assert [outcome["result"] for outcome in outcomes(scenarios, "joined-later")] == [6, 6]


# Failing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "who", "kind", "message"),
    [
        ("bad_loss", 1, "FloatingPointError", "a loss is not finite: .*mask nan.*iteration 2, images"),
        ("bad_image", 1, "OSError", "cannot read the image a.png: it is damaged"),
        ("other_settings", 1, "ValueError", r"process 0 has train.learning_rate = 0.001, this one 0.5"),
        ("uneven", 0, "ValueError", r"train.batch_size 5 cannot be divided by 2 processes x 1 parts"),
        ("no-folder", 0, "NotADirectoryError", "cannot make the folder /dev/null/run"),
    ],
)
def test_one_fails_and_all_end_with_its_message(scenarios: Path, name: str, who: int, kind: str, message: str) -> None:
    ends = outcomes(scenarios, name)
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(ends[who]["message"])
    assert ends[who]["kind"] == kind
    other = ends[1 - who]
    assert other["kind"] == "Elsewhere"
    assert other["message"] == f"process {who} of 2 failed: {ends[who]['message']}"
    assert max(end["seconds"] for end in ends) < 30


def test_a_killed_process_ends_the_other_with_one_sentence(scenarios: Path) -> None:
    survivor, killed = outcomes(scenarios, "killed")
    assert killed == {}
    assert survivor["kind"] == "ConnectionError"
    assert survivor["message"].startswith("process 0 of 2 has lost another one, which was killed, failed or hangs")
    assert survivor["seconds"] < 30


def test_an_error_of_our_own_is_no_loss() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), told_of_loss(0, 2):
        raise RuntimeError("shapes differ")


def test_alone_nothing_is_changed() -> None:
    for error in (ValueError("a"), Stopped(signal.SIGINT)):
        with pytest.raises(type(error)), ALONE.together():
            raise error
    assert ALONE.gather(1) == ALONE.to_first(1) == [1] and ALONE.from_first(lambda: 2) == 2
    assert ALONE.mean({"a": 0.1}) == {"a": 0.1}
    assert TIMEOUT.total_seconds() <= 600 and issubclass(Elsewhere, OSError)


# Measuring -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ap_is_the_same_for_any_number_of_processes(scenarios: Path, world: int) -> None:
    """18 images in batches of 8 are three batches: two processes share unevenly, the last of four has none."""
    alone = outcomes(scenarios, "evaluating-1", 1)[0]["result"]
    assert alone["images"] == 18 and alone["box"]["AP"] > 0 and alone["detections"]["mask"] > 18
    for outcome in outcomes(scenarios, f"evaluating-{world}", world):
        assert outcome["result"] == alone
    for file in ("results-bbox.json", "results-segm.json", "results-keypoints.json"):
        assert (scenarios / f"results-{world}" / file).read_text() == (scenarios / "results-1" / file).read_text()


def test_cityscapes_ap_is_the_same_for_two_processes(scenarios: Path) -> None:
    alone = outcomes(scenarios, "streets-evaluating-1", 1)[0]["result"]
    assert alone["images"] == IMAGES and alone["detections"]["mask"] > 0
    for outcome in outcomes(scenarios, "streets-evaluating-2"):
        assert outcome["result"] == alone
    first, second = ((scenarios / f"streets-results-{n}" / "results-segm.json").read_text() for n in (1, 2))
    assert first == second


# torchrun ------------------------------------------------------------------------------------------------------------


def test_torchrun_restarts_from_the_checkpoint_and_ends_at_the_same_weights(
    folder: Path, scenarios: Path, tmp_path: Path
) -> None:
    """The documented command line; one of two processes is killed in the fourth iteration, and all start again."""
    out, settings = tmp_path / "run", tmp_path / "config.json"
    settings.write_text(json.dumps(to_json(replace(SHARED, train=replace(SHARED.train, checkpoint_every=2)))))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command = [str(Path(__file__).with_name("killed_once.py")), "train", str(folder)]
    options = ["--config", str(settings), "--out", str(out), "--device", "cpu"]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([*torchrun, *command, *options], env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("6 classes (circle") == 2  # in both lives, and by the first process only
    assert run.stdout.count("6 iterations of 4 images (2 processes x 1 x 2)") == 2
    assert run.stderr.count("mrcnn-edu: process 0 of 2 has lost another one") <= 1  # torchrun may be faster
    assert "exitcode: -9" in run.stderr  # the one cause, as torchrun tells it
    assert_same_end(scenarios / "run", out)
    assert [json.loads(line)["iteration"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [
        2,
        4,
        6,
        6,
        6,
    ]


# The schedule --------------------------------------------------------------------------------------------------------


def test_the_linear_rule_by_hand() -> None:
    """The paper's 160k iterations of 16 images at 0.02, on one GPU of 2 images: an eighth of the rate, 8 x as long."""
    small = linear_rule(TrainConfig(), 2)
    assert (small.batch_size, small.learning_rate, small.iterations) == (2, 0.0025, 1_280_000)
    assert (small.steps, small.warmup_iterations) == ((960_000,), 8000)
    assert linear_rule(small, 16) == TrainConfig()
    assert linear_rule(TrainConfig(), 64).learning_rate == 0.08
    with pytest.raises(ValueError, match="rule is one of SGD, not of adamw"):
        linear_rule(CONFIG.train, 4)


def test_what_a_run_says_of_itself() -> None:
    assert in_words(TrainConfig(accumulate=4), 118_287, 2) == (
        "160000 iterations of 16 images (2 processes x 4 x 2), 21.6 passes over 118287 images; sgd, rate 0.02 after "
        "1000 iterations, times 0.1 from 120000 on"
    )


# Norms and compilation -----------------------------------------------------------------------------------------------


def test_batch_norms_over_all_processes_need_gpus(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.sync_norm needs GPUs"):
        train(with_train(sync_norm=True), tiny_model(), datasets(folder)[0], None, tmp_path / "run", device="cpu")


def test_batch_norms_over_all_processes_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """All batch norms are PyTorch's synchronised ones, and files written with and without them are the same."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)  # there may be no GPU to go to
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    setup.prepare(model, with_train(sync_norm=True).train, torch.device("cuda"))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 10 and all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(value, after[name]) for name, value in before.items())


def test_compiled_parts_give_the_same_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that traces but does not rewrite, so that seconds suffice; the names in files do not change."""
    monkeypatch.setattr(setup, "COMPILER", "eager")
    data, plain = datasets(folder)[0], with_train(iterations=2)
    options = {"progress": False, "device": "cpu"}
    for compile in (False, True):
        config = replace(plain, train=replace(plain.train, compile=compile))
        train(config, tiny_model(), data, None, tmp_path / str(compile), **options)
    left, right = weights(tmp_path / "False"), weights(tmp_path / "True")
    assert list(left) == list(right)
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, msg=name)
