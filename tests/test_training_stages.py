"""Procedures of several stages: each trains what it says and nothing else, and all of it can be resumed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_runs
from stages_together import TOGETHER
from training_runs import CONFIG, ENVIRONMENT, tiny_model, with_train

from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.shapes import write
from mrcnn_edu.inference import predict_dataset
from mrcnn_edu.losses import ALL_LOSSES, HEAD_LOSSES, RPN_LOSSES
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.structures import ImageBatch, Proposals
from mrcnn_edu.training.export import load_model
from mrcnn_edu.training.proposals import SavedProposals, propose_dataset, save_proposals
from mrcnn_edu.training.stages import (
    END_TO_END,
    FOUR_STEP,
    STAGEWISE,
    Stage,
    Unshared,
    check_stages,
    load_stages,
    part_of,
    proposer,
    train_stages,
)

SHORT = with_train(iterations=3, warmup_iterations=0, average=0.0, checkpoint_every=0)
QUIET = {"progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[CocoDataset, CocoDataset]:
    folder = write(tmp_path_factory.mktemp("shapes") / "data", train=5, val=2, size=64, seed=1)
    return training_runs.datasets(folder)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(out: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_model(out / stage / "weights.safetensors")[0].state_dict()


def changed(before: dict, after: dict) -> set[str]:
    """The parts of the model that differ."""
    return {part_of(name) for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def four_steps(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("four") / "run"
    train_stages(FOUR_STEP, SHORT, tiny_model(), *data, out, **QUIET)
    return out


# What the procedures are -------------------------------------------------------------------------------------------


def test_the_default_of_section_3_1_shares_nothing(data, tmp_path: Path) -> None:
    """ "RPN is trained separately and does not share features with Mask R-CNN": two backbones from one start."""
    out, model = tmp_path / "run", tiny_model()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    summaries = train_stages(STAGEWISE, SHORT, model, *data, out, **QUIET)
    rpn, heads = weights(out, "rpn"), weights(out, "heads")
    assert changed(start, rpn) == {"backbone", "rpn"}
    assert changed(start, heads) == {"backbone", "heads"}
    assert set(summaries["rpn"]["evaluation"]) == {"proposals"}
    assert {"box", "mask", "keypoint"} <= set(summaries["heads"]["evaluation"])
    assert set(summaries["rpn"]["training"]["losses"]) == set(RPN_LOSSES)
    assert set(summaries["heads"]["training"]["losses"]) == set(HEAD_LOSSES)

    # Both networks together are what was measured: the second on the first one's proposals
    trained, categories = load_stages(out)
    assert isinstance(trained, Unshared) and categories.names == data[0].categories.names
    together = predict_dataset(trained, data[1], CONFIG.data, batch_size=1)
    saved = SavedProposals(out / "rpn" / "proposals-val.safetensors")
    apart = predict_dataset(trained.detector, data[1], CONFIG.data, batch_size=1, proposals=saved)
    for image_id, found in together.items():
        assert torch.allclose(found.boxes, apart[image_id].boxes, atol=1e-3)
    counts = [len(SavedProposals(out / "rpn" / "proposals-train.safetensors")[i]) for i in data[0].image_ids]
    assert 0 < max(counts) <= CONFIG.model.rpn.post_nms[0]


def test_the_four_steps_of_section_4_4_share_the_backbone(data, four_steps: Path) -> None:
    start = tiny_model().state_dict()
    one, two, three, four = (weights(four_steps, stage.name) for stage in FOUR_STEP)
    assert changed(start, one) == {"backbone", "rpn"}
    assert changed(start, two) == {"backbone", "heads"}
    assert changed(two, three) == {"rpn", "heads"}  # its heads are those of the start
    assert changed(one, three) == {"backbone", "rpn"}
    assert changed(three, four) == {"heads"}
    assert changed(two, four) == {"rpn", "heads"}
    trained, _ = load_stages(four_steps)
    assert isinstance(trained, MaskRCNN)
    assert changed(trained.state_dict(), four) == set()


def test_end_to_end_is_the_plain_loop(data, tmp_path: Path) -> None:
    from mrcnn_edu.training.loop import train

    train_stages(END_TO_END, SHORT, tiny_model(), *data, tmp_path / "stages", **QUIET)
    train(SHORT, tiny_model(), *data, tmp_path / "plain", **QUIET)
    plain = load_model(tmp_path / "plain" / "weights.safetensors")[0].state_dict()
    assert changed(weights(tmp_path / "stages", "joint"), plain) == set()
    assert isinstance(load_stages(tmp_path / "stages")[0], MaskRCNN)


def test_who_must_propose() -> None:
    assert proposer(STAGEWISE) == "rpn"
    assert proposer(FOUR_STEP) is None
    assert proposer(END_TO_END) is None
    assert proposer(FOUR_STEP[:2]) == "rpn-1"


# Resuming ------------------------------------------------------------------------------------------------------------


def test_stopped_in_the_second_stage_and_resumed(data, tmp_path: Path, four_steps: Path) -> None:
    out, model = tmp_path / "run", tiny_model()
    second, count = model.second_stage, 0

    def interrupt(*arguments):
        nonlocal count
        count += 1
        if count == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return second(*arguments)

    model.second_stage = interrupt
    with pytest.raises(KeyboardInterrupt, match="stopped after iteration 2"):
        train_stages(FOUR_STEP, SHORT, model, *data, out, **QUIET)
    written = (out / "rpn-1" / "weights.safetensors").stat().st_mtime_ns
    train_stages(FOUR_STEP, SHORT, tiny_model(), *data, out, resume=True, **QUIET)
    assert (out / "rpn-1" / "weights.safetensors").stat().st_mtime_ns == written
    for stage in FOUR_STEP:
        assert changed(weights(out, stage.name), weights(four_steps, stage.name)) == set(), stage.name


def test_a_finished_run_is_left_alone(data, four_steps: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in four_steps.rglob("*.safetensors")}
    model = tiny_model(seed=5)
    summaries = train_stages(FOUR_STEP, SHORT, model, *data, four_steps, resume=True, **QUIET)
    assert {path: path.stat().st_mtime_ns for path in four_steps.rglob("*.safetensors")} == times
    assert list(summaries) == [stage.name for stage in FOUR_STEP]
    assert changed(model.state_dict(), weights(four_steps, "heads-4")) == set()
    with pytest.raises(FileExistsError, match="holds a run already"):
        train_stages(FOUR_STEP, SHORT, tiny_model(), *data, four_steps, **QUIET)
    with pytest.raises(FileExistsError, match="begun with other stages"):
        train_stages(STAGEWISE, SHORT, tiny_model(), *data, four_steps, resume=True, **QUIET)


# Several processes ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="needs fork and gloo")
def test_two_processes_share_the_proposals(tmp_path: Path) -> None:
    """Each makes those of its own images; both go through the stages together, and one alone goes on from there."""
    folder, out = write(tmp_path / "data", train=10, val=2, size=64, seed=1), tmp_path / "out"  # two batches of 8
    data = training_runs.datasets(folder)
    script = [sys.executable, str(Path(__file__).with_name("stages_together.py")), str(folder), str(out)]
    subprocess.run(script, check=True, env=ENVIRONMENT, timeout=300, capture_output=True)
    summaries = [torch.load(out / "both" / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert list(summaries[0]["result"]) == ["rpn", "heads"], summaries
    assert summaries[0]["result"] == summaries[1]["result"]
    shares = sorted((out / "run" / "rpn").glob("proposals-train*"))
    assert [path.name for path in shares] == [f"proposals-train-{rank}-of-2.safetensors" for rank in (0, 1)]
    parts = [SavedProposals(path) for path in shares]
    assert sum(map(len, parts)) == len(data[0]) and all(len(part) for part in parts)
    found = propose_dataset(load_model(out / "run" / "rpn" / "weights.safetensors")[0], data[0], SHORT.data, True)
    together = SavedProposals(*shares)
    assert all(torch.allclose(together[i].boxes, found[i].boxes, atol=1e-3) for i in data[0].image_ids)
    times = {path: path.stat().st_mtime_ns for path in (out / "run").rglob("*.safetensors")}
    again = train_stages(STAGEWISE, TOGETHER, tiny_model(), *data, out / "run", resume=True, **QUIET)
    assert again == summaries[0]["result"]
    assert times == {path: path.stat().st_mtime_ns for path in (out / "run").rglob("*.safetensors")}


def test_proposals_that_a_stopped_process_left_half_are_made_anew(data, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_stages(STAGEWISE[:1], SHORT, tiny_model(), data[0], None, out, **QUIET)
    half = {image_id: Proposals(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1)) for image_id in data[0].image_ids[:2]}
    save_proposals(out / "rpn" / "proposals-train-0-of-2.safetensors", half)
    (out / "stages.json").unlink()
    shutil.copytree(out / "rpn", tmp_path / "both" / "rpn")
    with pytest.raises(FileExistsError):  # that folder was not begun with these stages
        train_stages(STAGEWISE, SHORT, tiny_model(), data[0], None, tmp_path / "both", **QUIET)
    train_stages(STAGEWISE, SHORT, tiny_model(), data[0], None, tmp_path / "both", resume=True, **QUIET)
    left = sorted(path.name for path in (tmp_path / "both" / "rpn").glob("proposals*"))
    assert left == ["proposals-train.safetensors"]
    SavedProposals(tmp_path / "both" / "rpn" / left[0]).check_covers(data[0].image_ids)


# Parts and losses ----------------------------------------------------------------------------------------------------


def batch_of(data: CocoDataset):
    image, target = data[0]
    return ImageBatch.collate([image]), [target]


def test_only_the_losses_asked_for(data) -> None:
    model, (batch, targets) = tiny_model(), batch_of(data[0])
    torch.manual_seed(0)
    everything = model(batch, targets)
    assert set(everything) == set(ALL_LOSSES)
    torch.manual_seed(0)
    model.box_head.forward = None  # would fail if it ran
    first = model(batch, targets, only=RPN_LOSSES)
    assert {name: loss.item() for name, loss in first.items()} == {n: everything[n].item() for n in RPN_LOSSES}
    assert set(model(batch, targets, only=("rpn_box",))) == {"rpn_box"}

    model = tiny_model()
    model.rpn.forward = None
    given = [Proposals(targets[0].boxes, torch.ones(len(targets[0])))]
    assert set(model(batch, targets, given, HEAD_LOSSES)) == set(HEAD_LOSSES)
    model.eval()
    assert len(model(batch, proposals=given)) == 1


def test_frozen_parts_stay_but_train_again_afterwards(data, tmp_path: Path) -> None:
    model = tiny_model()
    model.backbone.resnet.freeze(2)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    stages = (Stage("a", ("rpn",), RPN_LOSSES), Stage("b", ("heads",), HEAD_LOSSES, proposals="a", init={"rpn": "a"}))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train_stages(stages, SHORT, model, data[0], None, tmp_path / "run", **QUIET)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert changed(start, model.state_dict()) == {"rpn", "heads"}  # no batch norm of the backbone has moved


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "at least one stage"),
        ((Stage("a"), Stage("a")), "a name of its own"),
        ((Stage("start"),), "a name of its own"),
        ((Stage("a", ("neck",)),), "parts are backbone, rpn, heads"),
        ((Stage("a", init={"neck": "a"}),), "parts are"),
        ((Stage("a", losses=("masks",)),), "losses are objectness"),
        ((Stage("a", losses=()),), "losses are objectness"),
        ((Stage("a", proposals="b"),), "must name earlier stages"),
        ((Stage("a", init={"rpn": "a"}),), "must name earlier stages"),
        ((Stage("a", ("backbone",), RPN_LOSSES),), "'rpn' and the losses of the RPN"),
        ((Stage("a", ("rpn", "heads"), RPN_LOSSES),), "'heads' and the losses of the heads"),
    ],
)
def test_procedures_that_cannot_be_run(stages, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_stages(stages)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        load_stages(tmp_path)
    for text in ("{}", "nonsense", '{"stages": [{"nme": "rpn"}]}'):
        (tmp_path / "stages.json").write_text(text)
        with pytest.raises(ValueError, match="describes no stages of training"):
            load_stages(tmp_path)


def test_both_networks_are_evaluated_from_the_command_line(data, tmp_path: Path, capsys) -> None:
    from mrcnn_edu import cli

    out = tmp_path / "run"
    train_stages(STAGEWISE, SHORT, tiny_model(), data[0], None, out, **QUIET)
    folder = data[1].images_dir.parent
    arguments = ["evaluate", str(folder), "--weights", str(out), "--out", str(tmp_path / "results"), "--device", "cpu"]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    assert cli.main([*arguments, "--scales", "56", "64", "--mirror"]) == 0, capsys.readouterr().err
    assert {path.name for path in (tmp_path / "results").iterdir()} >= {"metrics.json", "results-segm.json"}


def test_another_model_cannot_continue(data, four_steps: Path) -> None:
    from mrcnn_edu.models.mask_rcnn import build_model

    other = replace(SHORT, model=replace(SHORT.model, keypoint=None))
    with pytest.raises(ValueError, match="belongs to another model"):
        train_stages(FOUR_STEP, other, build_model(other.model), *data, four_steps, resume=True, **QUIET)
