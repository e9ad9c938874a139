"""Published weights: torchvision's very architectures at random weights, their files, checksums and categories."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from test_weights import randomise, spread_out
from tiny_models import images, shrink
from torchvision.models import get_weight

from mrcnn_edu import published
from mrcnn_edu.cli import main
from mrcnn_edu.data.coco import CategoryMap
from mrcnn_edu.data.coco_json import Category
from mrcnn_edu.models.mask_rcnn import MaskRCNN, build_model
from mrcnn_edu.ops import paste_masks
from mrcnn_edu.presets import MODELS
from mrcnn_edu.published import PUBLISHED, imagenet_state, label_table, load_published, open_published, split_source
from mrcnn_edu.structures import ImageBatch
from mrcnn_edu.weights import to_detectron2, to_torchvision

V2 = "maskrcnn_resnet50_fpn_v2"


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.endswith("legacy")])
def test_names_and_shapes_are_torchvisions(name: str) -> None:
    """Without memory, for the models exactly as they are published: 91 slots for COCO, 17 joints for persons."""
    with torch.device("meta"):
        theirs = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None).state_dict()
        ours = to_torchvision(build_model(PUBLISHED[name].model))
    shapes = [{k: v.shape for k, v in state.items() if "num_batches" not in k} for state in (ours, theirs)]
    assert shapes[0] == shapes[1]
    stated = get_weight(PUBLISHED[name].entry).meta
    assert sum(v.numel() for k, v in theirs.items() if "running" not in k and "num_batches" not in k) == pytest.approx(
        stated["num_params"], abs=0 if "v2" in name else 200_000
    )  # the norms of the first version are frozen, so theirs are buffers and not counted


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_torchvision_states(name: str) -> None:
    """AP as in its entries; its loaders set eps to 0 for the first weights of each kind, and for these only."""
    entry = get_weight(PUBLISHED[name].entry)
    metrics = {key: value for part in entry.meta["_metrics"].values() for key, value in part.items()}
    assert sorted(PUBLISHED[name].ap.values()) == sorted(metrics.values())
    first = "V2" not in PUBLISHED[name].entry and entry.name == "COCO_V1"
    assert (PUBLISHED[name].model.conventions.frozen_norm_eps == 0.0) == first
    assert len(entry.meta["categories"]) == PUBLISHED[name].model.classes + 1
    assert len(published.digest_in(entry.url)) == 8


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    """torchvision's second Mask R-CNN with random weights that find something, and fewer proposals."""
    torch.manual_seed(5)
    model = torchvision.models.detection.maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, rpn_pre_nms_top_n_test=100, rpn_post_nms_top_n_test=20
    )
    randomise(model)
    model.transform.resize = lambda image, target: (image, target)
    for name, value in model.named_parameters():  # 91 classes: larger factors than for five
        if "cls_score.weight" in name:
            value.data.mul_(30)
    return spread_out(model).eval()


@pytest.fixture(scope="module")
def file(theirs: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "v2.pth"
    torch.save(theirs.state_dict(), path)
    return path


@pytest.fixture
def trusted(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file, under the checksum of its content."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(published, "digest_in", lambda url: digest)
    return file


def test_the_second_version_finds_what_torchvision_finds(theirs: torch.nn.Module, trusted: Path) -> None:
    model, categories = load_published(V2, trusted)
    assert categories.names[:3] == ["person", "bicycle", "car"] and categories.names[11] == "N/A"
    object.__setattr__(model.config.rpn, "pre_nms", (100, 100))  # as the other model; the preset stays as published
    object.__setattr__(model.config.rpn, "post_nms", (20, 20))
    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        (found,), (expected,) = model(ImageBatch.collate([image])), theirs([image])
    assert len(found) == len(expected["scores"]) > 5
    assert torch.equal(found.labels, expected["labels"])
    torch.testing.assert_close(found.scores, expected["scores"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.boxes, expected["boxes"], rtol=1e-4, atol=1e-2)
    masks = paste_masks(found.mask_probs, found.boxes, (96, 128), rule="integer")
    assert (masks != (expected["masks"][:, 0] >= 0.5)).float().mean() < 1e-3


def test_another_file_is_refused_by_its_checksum(file: Path) -> None:
    with pytest.raises(
        ValueError, match=r"v2\.pth is not the published file: its SHA-256 begins with .*, not 73cbd019"
    ):
        load_published(V2, file)


def test_no_network_says_where_the_file_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", unreachable)
    with pytest.raises(OSError, match=r"cannot download https.*Name or service.*torchvision:NAME:FILE.*checkpoints"):
        load_published("maskrcnn_resnet50_fpn")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"maskrcnn_resnet50_fpn_coco-bf2d0c1e\.pth is not the published file"):
        load_published("maskrcnn_resnet50_fpn")


def test_names_and_sources() -> None:
    with pytest.raises(ValueError, match="did you mean 'maskrcnn_resnet50_fpn'"):
        load_published("maskrcnn_resnet_50_fpn")
    with pytest.raises(ValueError, match="publishes no weights of 'resnet10'"):
        imagenet_state("resnet10")
    assert split_source("torchvision:a") == ("a", None)
    assert split_source(Path("torchvision:a:/b/c.pth")) == ("a", Path("/b/c.pth"))


def test_imagenet_weights_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"fc.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "resnet50.pth")
    digest = hashlib.sha256((tmp_path / "resnet50.pth").read_bytes()).hexdigest()[:8]
    seen = []
    monkeypatch.setattr(published, "digest_in", lambda url: seen.append(url) or digest)
    assert torch.equal(imagenet_state("resnet50", tmp_path / "resnet50.pth")["fc.weight"], state["fc.weight"])
    assert seen == ["https://download.pytorch.org/models/resnet50-0676ba61.pth"]


def test_labels_by_category_id() -> None:
    known = CategoryMap((Category(1, "person"), Category(2, "N/A"), Category(3, "car")))
    assert label_table(known, CategoryMap((Category(3, "car"), Category(1, "person")))).tolist() == [0, 2, 0, 1]
    for wrong in (Category(3, "bus"), Category(7, "train")):
        with pytest.raises(ValueError, match="the data have the category"):
            label_table(known, CategoryMap((wrong,)))
    jointed = CategoryMap((Category(1, "person", ("nose", "hand")),))
    assert label_table(jointed, CategoryMap((Category(1, "person"),))).tolist() == [0, 1]
    with pytest.raises(ValueError, match="the joints of 'person'"):
        label_table(jointed, CategoryMap((Category(1, "person", ("hand", "nose")),)))


@pytest.mark.parametrize("kind", ["maskrcnn", "keypointrcnn"])
def test_a_file_of_detectron2s_zoo(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow, in the zoo's format, for COCO's classes or its persons; the full shapes are tested with the tables."""
    name, preset = f"{kind}_resnet50_fpn", f"{kind}_resnet50_fpn_detectron2"
    full = MODELS[preset]
    monkeypatch.setitem(MODELS, preset, replace(shrink(full), classes=full.classes))
    torch.manual_seed(0)
    model = build_model(preset).eval()
    file = tmp_path / "model_final.pkl"
    state = {key: value.numpy() for key, value in to_detectron2(model).items()}
    file.write_bytes(pickle.dumps({"model": state, "__author__": "detectron2"}))
    loaded, categories = open_published(Path(f"detectron2:{name}:{file}"))
    with torch.no_grad():
        (found, _), (expected, _) = loaded(images()), model(images())
    assert len(found) and torch.equal(found.boxes, expected.boxes) and torch.equal(found.labels, expected.labels)
    ids = [category.id for category in categories.categories]
    if kind == "maskrcnn":
        assert len(ids) == 80 and ids[-1] == 90 and categories.names[11] == "stop sign"
    else:
        assert ids == [1] and len(categories.categories[0].keypoints) == 17
    assert main(["convert", f"detectron2:{name}:{file}", str(tmp_path / "ours.safetensors")]) == 0
    with pytest.raises(ValueError, match=f"nothing is downloaded: name its file as detectron2:{name}:FILE"):
        open_published(f"detectron2:{name}")
    with pytest.raises(ValueError, match="unknown model of detectron2 'maskrcnn_resnet50', did you mean"):
        open_published(f"detectron2:maskrcnn_resnet50:{file}")


def test_the_command_as_documented(trusted: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """``evaluate --weights torchvision:... --data ...`` on a folder laid out as COCO, with two of its 80 classes."""
    images = [{"id": 5, "file_name": "5.jpg", "width": 64, "height": 48}]
    annotations = [{"id": 9, "image_id": 5, "category_id": 3, "bbox": [4, 4, 30, 20], "area": 600, "iscrowd": 0,
                    "segmentation": [[4, 4, 34, 4, 34, 24, 4, 24]]}]  # fmt: skip
    categories = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    Image.effect_noise((64, 48), 90).convert("RGB").save(tmp_path / "val2017" / "5.jpg")
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    status = main(["evaluate", "--weights", f"torchvision:{V2}:{trusted}", "--data", str(tmp_path), "--figures",
                   "--out", str(tmp_path / "out"), "--min-size", "96", "--device", "cpu"])  # fmt: skip
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "1 images, 1 instances" in printed.out and "car" in printed.out
    found = json.loads((tmp_path / "out" / "results-bbox.json").read_text())
    assert {result["category_id"] for result in found} <= {1, 3}
    for name in ("curves-box", "confusion-mask", "errors-box"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000


def test_the_model_is_one_of_ours() -> None:
    with torch.device("meta"):
        assert isinstance(build_model(PUBLISHED["keypointrcnn_resnet50_fpn_legacy"].model), MaskRCNN)
