"""mrcnn-edu check, convert and export, train --plan and --batch: what they print, leave and refuse."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from test_cityscapes import scene, write
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from training_runs import MODEL

from mrcnn_edu import published
from mrcnn_edu.checking import suspicious
from mrcnn_edu.cli import main
from mrcnn_edu.config import BackboneConfig, Config, ModelConfig, TrainConfig
from mrcnn_edu.conventions import TORCHVISION
from mrcnn_edu.data import shapes
from mrcnn_edu.data.coco import CategoryMap
from mrcnn_edu.data.coco_json import Category
from mrcnn_edu.models.mask_rcnn import build_model
from mrcnn_edu.ops import compiled
from mrcnn_edu.planning import training_plan
from mrcnn_edu.structures import Target
from mrcnn_edu.training.export import export_weights, load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shapes.write(tmp_path / "shapes", train=6, val=2, size=64, seed=1)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


# check ---------------------------------------------------------------------------------------------------------------


def test_a_good_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("check", folder, "--out", tmp_path / "check") == 0
    printed = capsys.readouterr().out
    truth = json.loads((folder / "train.json").read_text())
    single = sum(not annotation["iscrowd"] for annotation in truth["annotations"])
    assert "6 images, 6 looked at" in printed and "64 to 64 px wide" in printed
    assert f"{single} instances" in printed and "6 classes" in printed and "0 broken" in printed
    assert (tmp_path / "check" / "train.png").stat().st_size > 10_000
    assert (tmp_path / "check" / "val.png").exists()


def test_what_is_broken_is_listed_and_ends_in_an_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content = json.loads((folder / "train.json").read_text())
    content["annotations"][0]["bbox"] = [5, 5, -3, 4]
    (folder / "train.json").write_text(json.dumps(content))
    names = [image["file_name"] for image in content["images"]]
    (folder / "train" / names[1]).write_bytes((folder / "train" / names[1]).read_bytes()[:80])
    (folder / "train" / names[2]).unlink()
    assert run("check", folder, "--split", "train", "--out", tmp_path / "check") == 2
    printed = capsys.readouterr()
    assert "3 broken" in printed.out and "positive width and height" in printed.out
    assert names[1] in printed.out and names[2] in printed.out
    assert printed.err == "mrcnn-edu: 3 broken images or annotations; they are listed above\n"
    assert run("check", tmp_path) == 2 and "neither train nor val" in capsys.readouterr().err
    assert run("check", folder, "--split", "test-dev") == 2 and "no test-dev data" in capsys.readouterr().err


def test_what_is_suspicious_by_hand() -> None:
    masks = torch.zeros(5, 40, 50, dtype=torch.bool)
    masks[0, :40, :50] = True
    masks[1, 10:20, 10:20] = masks[2, 10:20, 10:20] = True
    masks[3, 0:3, 0:3] = True
    boxes = torch.tensor([[0.0, 0, 50, 40], [10, 10, 20, 20], [10, 10, 20, 20], [0, 0, 3, 3], [30, 30, 40, 40]])
    target = Target(boxes, torch.tensor([1, 2, 2, 1, 1]), masks)
    found = suspicious(target, (40, 50))
    assert found == [
        "box [0.0, 0.0, 50.0, 40.0] is the whole image",
        "box [10.0, 10.0, 20.0, 20.0] is there twice with the same class",
        "box [0.0, 0.0, 3.0, 3.0] has 9 square pixels",
        "the mask in box [30.0, 30.0, 40.0, 40.0] has no pixel",
    ]
    wide = replace(target, boxes=boxes + torch.tensor([0.0, 0, 5, 0]))[1:2]
    assert suspicious(wide, (40, 50)) == [
        "box [10.0, 10.0, 25.0, 20.0] is not that of its mask, [10.0, 10.0, 20.0, 20.0]"
    ]
    assert suspicious(replace(wide, crowd=torch.tensor([True])), (40, 50)) == []


def test_cityscapes_are_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, scene((26000, 0, 0, 20, 20), (24, 40, 0, 60, 20)))
    assert run("check", tmp_path, "--out", tmp_path / "check") == 0
    printed = capsys.readouterr().out
    assert "1 instances and 1 crowd regions" in printed and "car 1" in printed
    assert "none of person, rider" in printed


# convert and export --------------------------------------------------------------------------------------------------


def test_convert_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A file of ours for torchvision's model, and back as a published one: the same weights, but for unused slots."""
    small = ModelConfig(classes=2, conventions=TORCHVISION, backbone=BackboneConfig(architecture="resnet18"), mask=None)
    model = build_model(small)
    categories = CategoryMap((Category(1, "a"), Category(2, "b")))
    ours, theirs, again = tmp_path / "weights.safetensors", tmp_path / "theirs.pth", tmp_path / "again.safetensors"
    export_weights(model, ours, categories)
    assert run("convert", ours, theirs) == 0
    assert "num_classes=3" in capsys.readouterr().out
    body = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    other = torchvision.models.detection.FasterRCNN(body, num_classes=3)
    other.load_state_dict(torch.load(theirs, weights_only=True))

    entry = published.Published("FasterRCNN_ResNet50_FPN_Weights.COCO_V1", small, {})
    digest = hashlib.sha256(theirs.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(published.PUBLISHED, "mine", entry)
    monkeypatch.setattr(published, "digest_in", lambda url: digest)
    meta = {"categories": ["background", "a", "b"]}
    read = published.read_entry
    monkeypatch.setattr(published, "read_entry", lambda *arguments: (read(*arguments)[0], meta))
    assert run("convert", f"torchvision:mine:{theirs}", again) == 0
    loaded, names = load_model(again)
    assert names.names == ["a", "b"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert run("convert", ours, tmp_path / "x.safetensors") == 2 and "become a .pth file" in capsys.readouterr().err
    assert run("convert", f"torchvision:mine:{theirs}", theirs) == 2 and ".safetensors" in capsys.readouterr().err


@pytest.mark.skipif(compiled.MISSING is not None, reason="needs the compiled ops")
def test_export_refuses_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What it does when all is well is test_program's."""
    categories = CategoryMap(tuple(Category(number, str(number)) for number in range(1, 7)))
    export_weights(build_model(MODEL), tmp_path / "weights.safetensors", categories)
    assert run("export", "--weights", tmp_path, "--out", tmp_path / "model.pt2") == 2
    assert "has no keypoints" in capsys.readouterr().err


# plan ----------------------------------------------------------------------------------------------------------------


def test_a_plan_by_hand() -> None:
    """160k iterations of 0.261 s on 8 V100 are 11.6 h; on 4 of them with 2 parts the same work takes twice as long."""
    plan = training_plan(Config(), 118_287, 8, "v100", price=2.0)
    assert "(8 processes x 1 x 2), 21.6 passes over 118287 images" in plan
    assert "about 3.4 GB per GPU with 2 images" in plan and "about 11.6 h on 8 V100: 93 GPU hours, 186 at 2" in plan
    parts = Config(train=TrainConfig(accumulate=2))
    assert "about 23.2 h on 4 V100: 93 GPU hours" in training_plan(parts, 118_287, 4, "v100")
    assert "no rate is published" in training_plan(Config(MODEL), 100, 1, "h100")
    with pytest.raises(ValueError, match="3 GPUs x 1 parts"):
        training_plan(Config(), 100, 3, "h100")


def test_plan_and_batch_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    preset = ("train", "--data", folder, "--preset", "maskrcnn_resnet50_fpn", "--out", out)
    assert run(*preset, "--batch", 4, "--plan", "--gpus", 2) == 0
    printed = capsys.readouterr().out
    assert "learning_rate 0.02 -> 0.005" in printed and "iterations 160000 -> 640000" in printed
    assert "640000 iterations of 4 images (2 processes x 1 x 2)" in printed and "GPU hours" in printed
    assert not out.exists()
    assert run("train", folder, "--batch", 8) == 2 and "rule is one of SGD" in capsys.readouterr().err
