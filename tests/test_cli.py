"""The command line: what is understood, what is answered, and the whole way from images to results."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from mrcnn_edu import cli
from mrcnn_edu.config import Config
from mrcnn_edu.data import shapes
from mrcnn_edu.fields import to_json
from mrcnn_edu.presets import PRESETS, preset

# As small as it gets, and still every branch.
TINY = shlex.split(
    "--model.backbone.width 8 --model.backbone.channels 16 --model.box.fc 32 --model.mask.convs 16 "
    "--model.keypoint.convs 16 --model.rpn.pre-nms 40 20 --model.rpn.post-nms 20 10 "
    "--data.min-size 64 --data.max-size 64 --data.test-size 64 --data.workers 0 "
    "--train.iterations 2 --train.batch-size 2 --train.warmup-iterations 0"
)


def run(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shapes.write(tmp_path_factory.mktemp("shapes"), train=4, val=3, size=64)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The run that ``mrcnn-edu train`` leaves."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert cli.main(["train", str(folder), "--out", str(out), *TINY]) == 0
    return out


# ---------------------------------------------------------------------------------------------------------------------
# What is understood
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "train", "evaluate", "predict", "reproduce"])
def test_each_command_explains_itself(capsys, command):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert f"usage: mrcnn-edu {command}" in out and "--out PATH" in out and "--device" in out


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_command_all_are_listed(capsys, arguments):
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert all(f"• {command}" in out for command in cli.COMMANDS)


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, contextlib, io\n"
        "from mrcnn_edu.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(['train', '--help'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "mrcnn_edu", "dmeo"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "mrcnn-edu: unknown command 'dmeo', did you mean 'demo'? "
        "Known: demo, train, evaluate, predict, reproduce, check, convert, export\n"
    )


def test_every_field_of_a_config_is_an_option(capsys):
    _, out, _ = run(capsys, "train", "--help")

    def options(values, prefix):
        for name, value in values.items():
            name = f"{prefix}.{name}".replace("_", "-")
            yield from options(value, name) if isinstance(value, dict) else [name]

    names = [
        name for part in ("model", "data", "train") for name in options(to_json(preset("maskrcnn_shapes"))[part], part)
    ]
    assert len(names) > 90
    assert [name for name in names if f"--{name}" not in out] == []


def test_options_change_the_preset_and_nothing_else():
    start = preset("maskrcnn_shapes")
    for spelling in ("--model.rpn.nms-threshold", "--model.rpn.nms_threshold"):
        options = cli.parse(["train", "x", spelling, "0.5", "--train.iterations=100", "--model.keypoint.joints", "9"])
        model = replace(
            start.model,
            rpn=replace(start.model.rpn, nms_threshold=0.5),
            keypoint=replace(start.model.keypoint, joints=9),
        )
        assert options.model == model
        assert options.train == replace(start.train, iterations=100)
        assert options.data == start.data and options.folder == Path("x")


def test_training_in_stages_and_going_on_with_other_classes(capsys, folder, tmp_path):
    """RPN and heads in turn, resumed when done; then a model of renamed classes that starts from it."""
    out, tiny = tmp_path / "run", [*TINY, "--device", "cpu"]
    status, printed, errors = run(capsys, "train", folder, "--out", out, "--procedure", "stagewise", *tiny)
    assert status == 0, errors
    assert f"its weights: {out}" in printed and (out / "heads" / "weights.safetensors").exists()
    status, _, errors = run(capsys, "train", folder, "--out", out, "--procedure", "stagewise", "--resume")
    assert status == 0, errors
    names = json.loads((folder / "train.json").read_text())
    names["categories"][0]["name"], names["categories"][1]["name"] = "disc", "blob"
    (tmp_path / "train.json").write_text(json.dumps(names))
    (tmp_path / "train").symlink_to(folder / "train")
    start = ["train", tmp_path, "--out", tmp_path / "next", "--start", out, *tiny]
    status, printed, errors = run(capsys, *start, "--rename", "disc=circle")
    assert status == 0, errors
    assert f"5 classes start as in {out}; at random: blob" in printed
    for wrong, message in ((["disc"], "--rename wants our=theirs"), (["disc=ring2"], "did you mean 'ring'")):
        status, _, errors = run(capsys, *start, "--rename", *wrong)
        assert status == 2 and message in errors


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_by_name(name):
    options = cli.parse(["train", "--preset", name, "--conventions", "torchvision"])
    assert Config(options.model, options.data, options.train) == preset(name, "torchvision")


def test_anchor_sizes_are_one_word_per_level():
    options = cli.parse(["train", "--model.rpn.anchor-sizes", "16,20", "40", "80.5"])
    assert options.model.rpn.anchor_sizes == ((16.0, 20.0), (40.0,), (80.5,))
    assert cli.parse(["train"]).model.rpn.anchor_sizes == ((20,), (40,), (80,))


# ---------------------------------------------------------------------------------------------------------------------
# What is answered
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "--preset", "maskrcnn_shape"], "did you mean 'maskrcnn_shapes'?"),
        (["train", "--conventions", "detectron"], "did you mean 'detectron"),
        (["train", "--model.rpn.nms-thresold", "0.5"], "--model.rpn.nms-threshold FLOAT"),
        (["demo", "--sed", "1"], "--seed INT"),
        (["train", "--train.optimiser", "adam"], "Expected one of ('sgd', 'adamw')"),
        (["train", "--model.rpn.nms-threshold", "7"], "RPNConfig.nms_threshold must be 0 to 1, got 7.0"),
        (["train", "--train.iterations", "many"], "--train.iterations INT"),
        (["train"], "no training data: give FOLDER, or --data.train-images and --data.train-annotations"),
        (["train", "nowhere"], "no train data in nowhere; looked for nowhere/train with nowhere/train.json or"),
        (["train", "--config", "nowhere.json"], "nowhere.json: No such file or directory"),
        (["train", "--resume", "--out", "nowhere"], "nowhere/config.json: No such file or directory"),
        (["evaluate", "--weights", "nowhere.safetensors"], "no weights file at nowhere.safetensors"),
        (["predict"], "no pictures: name files, folders or patterns"),
        (["predict", "nowhere/*.png"], "no picture at nowhere/*.png"),
    ],
)
def test_a_mistake_gets_a_sentence_and_status_2(capsys, tmp_path, monkeypatch, arguments, answer):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert answer in " ".join(err.replace("│", "").split())
    assert "Traceback" not in err


def test_one_sentence_is_one_line(capsys):
    _, _, err = run(capsys, "evaluate", "--weights", "nowhere.safetensors")
    assert err == "mrcnn-edu: no weights file at nowhere.safetensors\n"


def test_the_traceback_is_there_for_whoever_wants_it(capsys, monkeypatch):
    monkeypatch.setenv("MRCNN_EDU_DEBUG", "1")
    with pytest.raises(OSError, match="no weights file"):
        cli.main(["evaluate", "--weights", "nowhere.safetensors"])


def test_ctrl_c_ends_without_a_traceback(capsys, monkeypatch):
    from mrcnn_edu import commands

    def stop(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "demo", stop)
    assert run(capsys, "demo") == (130, "", "mrcnn-edu: stopped\n")


def test_a_config_file_is_refused_when_damaged_or_contradicted(capsys, tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{")
    assert f"{file} is not JSON" in run(capsys, "train", "--config", file)[2]
    file.write_text(json.dumps({"modle": {}}))
    assert "did you mean 'model'?" in run(capsys, "train", "--config", file)[2]
    file.write_text(json.dumps(to_json(Config())))
    assert "leave --preset and --conventions out" in run(capsys, "train", "--config", file, "--preset", "x")[2]


def test_random_frozen_backbones_are_not_trained(capsys, folder, tmp_path):
    arguments = ["train", folder, *TINY, "--model.backbone.norm", "frozen", "--out", tmp_path / "run"]
    status, _, err = run(capsys, *arguments)
    assert status == 2 and "give torchvision's file with --backbone" in err
    (tmp_path / "resnet.pth").write_bytes(b"nothing of the sort")
    status, _, err = run(capsys, *arguments, "--backbone", tmp_path / "resnet.pth")
    assert status == 2 and "is not a PyTorch weights file" in err


# ---------------------------------------------------------------------------------------------------------------------
# From images to results
# ---------------------------------------------------------------------------------------------------------------------


def test_train_leaves_a_run(trained):
    config = json.loads((trained / "config.json").read_text())
    assert config["model"]["backbone"]["width"] == 8 and config["train"]["iterations"] == 2
    assert Path(config["data"]["val_annotations"]).name == "val.json"
    metrics = json.loads((trained / "metrics.json").read_text())
    assert 0 <= metrics["evaluation"]["box"]["AP"] <= 1
    assert (trained / "weights.safetensors").exists()


def test_train_goes_on_where_it_was(capsys, folder, trained, tmp_path):
    """With --resume everything comes from the run's own config.json."""
    out = tmp_path / "run"
    shapes_only = [*TINY, "--train.schedule", "step", "--train.steps", "100"]
    assert run(capsys, "train", folder, "--out", out, *shapes_only)[0] == 0
    status, _, err = run(capsys, "train", folder, "--out", out, *shapes_only)
    assert status == 2 and "holds a run already" in err
    assert run(capsys, "train", "--resume", "--out", out, "--train.iterations", "3")[0] == 0
    assert json.loads((out / "metrics.json").read_text())["iterations"] == 3


def test_train_reads_cocos_own_layout(folder, tmp_path):
    from mrcnn_edu.commands import find_split

    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    boxes, people = (tmp_path / f"annotations/{name}_val2017.json" for name in ("instances", "person_keypoints"))
    boxes.touch()
    assert find_split(tmp_path, "val", keypoints=True) == (tmp_path / "val2017", boxes)
    people.touch()
    assert find_split(tmp_path, "val", keypoints=True) == (tmp_path / "val2017", people)
    assert find_split(tmp_path, "val", keypoints=False) == (tmp_path / "val2017", boxes)


def test_train_without_keypoints_says_so(capsys, folder, tmp_path):
    data = json.loads((folder / "train.json").read_text())
    data["categories"] = [{"id": c["id"], "name": c["name"]} for c in data["categories"]]
    for annotation in data["annotations"]:
        annotation.pop("keypoints", None)
        annotation.pop("num_keypoints", None)
    file = tmp_path / "plain.json"
    file.write_text(json.dumps(data))
    status, out, _ = run(
        capsys, "train", "--data.train-images", folder / "train", "--data.train-annotations", file,
        "--out", tmp_path / "run", *TINY,
    )  # fmt: skip
    assert status == 0
    assert "The annotations have no keypoints: the keypoint branch is left out" in out
    assert json.loads((tmp_path / "run/config.json").read_text())["model"]["keypoint"] is None


def test_evaluate_measures_what_train_measured(capsys, folder, trained, tmp_path):
    status, out, _ = run(capsys, "evaluate", folder, "--weights", trained, "--out", tmp_path)
    assert status == 0
    assert "mask" in out and "keypoint" in out
    again, before = (json.loads((path / "metrics.json").read_text()) for path in (tmp_path, trained))
    assert again == before["evaluation"]
    truth = COCO(str(folder / "val.json"))
    for name in ("bbox", "segm", "keypoints"):
        if results := json.loads((tmp_path / f"results-{name}.json").read_text()):
            truth.loadRes(results)


def test_evaluate_finds_the_same_with_an_optimised_model(capsys, folder, trained, tmp_path):
    found = {}
    for name, options in (("plain", []), ("fast", ["--optimize", "fp32"])):
        out = tmp_path / name
        assert run(capsys, "evaluate", folder, "--weights", trained, "--out", out, *options)[0] == 0
        found[name] = sorted(result["score"] for result in json.loads((out / "results-bbox.json").read_text()))
    assert len(found["plain"]) > 0 and found["fast"] == pytest.approx(found["plain"], abs=1e-3)


def test_evaluate_refuses_other_categories(capsys, folder, trained, tmp_path):
    data = json.loads((folder / "val.json").read_text())
    data["categories"][0]["name"] = "disc"
    (tmp_path / "val.json").write_text(json.dumps(data))
    where = ["--images", folder / "val", "--annotations", tmp_path / "val.json"]
    status, _, err = run(capsys, "evaluate", *where, "--weights", trained, "--out", tmp_path / "out")
    assert status == 2 and "disc" in err and "circle" in err
    status, _, err = run(capsys, "evaluate", *where[:2], "--weights", trained)
    assert status == 2 and "--images and --annotations belong together" in err


def test_evaluate_measures_some_of_the_classes(capsys, folder, trained, tmp_path):
    """Data with fewer classes than the weights know, in another order; what they lack is dropped from the results."""
    data = json.loads((folder / "val.json").read_text())
    data["categories"] = data["categories"][:1:-1]
    kept = {category["id"] for category in data["categories"]}
    data["annotations"] = [one for one in data["annotations"] if one["category_id"] in kept]
    (tmp_path / "val.json").write_text(json.dumps(data))
    where = ["--images", folder / "val", "--annotations", tmp_path / "val.json", "--out", tmp_path / "out"]
    assert run(capsys, "evaluate", *where, "--weights", trained)[0] == 0
    found = json.loads((tmp_path / "out/results-bbox.json").read_text())
    assert found and {result["category_id"] for result in found} <= kept


def test_predict_writes_results_overlays_and_masks(capsys, folder, trained, tmp_path):
    pictures = tmp_path / "pictures"
    (pictures / "more").mkdir(parents=True)
    Image.open(folder / "val/000001.png").save(pictures / "a.png")
    Image.open(folder / "val/000002.png").save(pictures / "a.jpg")
    Image.new("L", (50, 30)).save(pictures / "more/gray one.png")
    (pictures / "notes.txt").write_text("not a picture")
    out = tmp_path / "out"
    arguments = [pictures, f"{pictures}/*/*.png", pictures / "a.png", "--weights", trained, "--out", out]
    status, said, _ = run(capsys, "predict", *arguments, "--masks", "--score", "0.05")
    assert status == 0 and "in 3 pictures" in said

    listing = COCO(str(out / "images.json"))
    assert [image["file_name"] for image in listing.dataset["images"]] == ["a.jpg", "a.png", "more/gray one.png"]
    assert listing.imgs[3]["width"] == 50 and listing.imgs[3]["height"] == 30
    names = {"a.jpg.png", "a.png.png", "more/gray one.png"}  # the suffix stays only where it is needed
    assert {path.relative_to(out / "overlays").as_posix() for path in (out / "overlays").rglob("*.png")} == names
    boxes = json.loads((out / "results-bbox.json").read_text())
    segments = json.loads((out / "results-segm.json").read_text())
    assert len(boxes) == len(segments) > 0
    kept = [result for result in boxes if result["score"] >= 0.05]
    masks = sorted((out / "masks").rglob("*.png"))
    assert len(masks) == len(kept)
    mask = np.asarray(Image.open(masks[0]))
    assert mask.ndim == 2 and set(np.unique(mask)) <= {0, 255}


def test_predict_names_what_it_cannot_read_and_does_the_rest(capsys, folder, trained, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG but no more")
    out = tmp_path / "out"
    status, said, err = run(
        capsys, "predict", tmp_path / "bad.png", folder / "val/000001.png", "--weights", trained, "--out", out,
        "--no-overlays",
    )  # fmt: skip
    assert status == 2
    assert "in 1 pictures" in said
    assert "1 of 2 pictures could not be read" in err and "bad.png" in err
    assert [image["id"] for image in json.loads((out / "images.json").read_text())["images"]] == [2]
    assert not (out / "overlays").exists()


def test_an_interrupted_predict_keeps_what_it_found(capsys, folder, trained, tmp_path, monkeypatch):
    from mrcnn_edu import commands

    done = []

    def second_time(path):
        if done:
            raise KeyboardInterrupt
        done.append(path)
        return read_image(path)

    read_image = commands.read_image
    monkeypatch.setattr(commands, "read_image", second_time)
    status, _, err = run(capsys, "predict", folder / "val", "--weights", trained, "--out", tmp_path, "--no-overlays")
    assert status == 130 and "stopped" in err
    assert len(json.loads((tmp_path / "images.json").read_text())["images"]) == 1


def test_the_demo_from_end_to_end(capsys, tmp_path):
    status, out, _ = run(capsys, "demo", "--smoke", "--iterations", "2", "--out", tmp_path, "--seed", "3")
    assert status == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["seed"] == 3 and metrics["iterations"] == 2
    for kind in ("box", "mask", "keypoint"):
        assert 0 <= metrics["evaluation"][kind]["AP"] <= 1
    assert 0 < metrics["seconds"]["training"] < metrics["seconds"]["total"]
    assert metrics["backend"] and metrics["versions"]["torch"]
    for name in ("sheet.png", "metrics.json", "weights.safetensors"):
        assert (tmp_path / name).stat().st_size > 0 and str(tmp_path / name) in out
