"""Exported weights: one file holds the whole model, and a file that is not one is refused before memory is spent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from training_runs import MODEL, tiny_model

from mrcnn_edu.conventions import TORCHVISION
from mrcnn_edu.data.coco import Category, CategoryMap
from mrcnn_edu.fields import to_json
from mrcnn_edu.models.mask_rcnn import MaskRCNN, build_model
from mrcnn_edu.structures import ImageBatch
from mrcnn_edu.training.export import export_weights, load_model

NAMES = ("circle", "square", "triangle", "star", "ring", "figure")
CATEGORIES = CategoryMap(tuple(Category(3 * index + 1, name) for index, name in enumerate(NAMES)))


@pytest.fixture(scope="module")
def model() -> MaskRCNN:
    torch.manual_seed(1)
    return build_model(replace(MODEL, conventions=TORCHVISION))


@pytest.fixture
def path(model: MaskRCNN, tmp_path: Path) -> Path:
    return export_weights(model, tmp_path / "weights.safetensors", CATEGORIES)


def rewrite(path: Path, tensors: dict | None = None, **metadata: str | None) -> None:
    """The file with some of its tensors or metadata replaced, or left out where None."""
    with safe_open(path, framework="pt") as file:
        old = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        words = file.metadata() | metadata
    new = {name: value for name, value in (old | (tensors or {})).items() if value is not None}
    save_file(new, path, {name: value for name, value in words.items() if value is not None})


def test_round_trip(model: MaskRCNN, path: Path) -> None:
    loaded, categories = load_model(path)
    assert loaded.config == model.config
    assert categories == CATEGORIES
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    batch = ImageBatch.collate([torch.rand(3, 64, 64)])
    with torch.no_grad():
        ours, theirs = model.eval()(batch)[0], loaded(batch)[0]
    assert torch.equal(ours.scores, theirs.scores) and torch.equal(ours.boxes, theirs.boxes)


def test_channels_last_weights_come_back(tmp_path: Path) -> None:
    model = tiny_model().to(memory_format=torch.channels_last)
    loaded, _ = load_model(export_weights(model, tmp_path / "weights.safetensors", CATEGORIES))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_metadata_can_be_read_without_us(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"])["classes"] == 6
    assert [category["name"] for category in json.loads(metadata["categories"])] == list(NAMES)


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    model = tiny_model()
    torch.nn.init.constant_(next(model.parameters()), float("inf"))
    with pytest.raises(FloatingPointError):
        export_weights(model, tmp_path / "weights.safetensors", CATEGORIES)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_read(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        name = next(name for name in file.keys() if name.startswith("box_head"))  # noqa: SIM118
        value = file.get_tensor(name)
    rewrite(path, {name: torch.full_like(value, float("nan"))})
    with pytest.raises(FloatingPointError, match=name):
        load_model(path)


def test_another_shape_or_name(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        name = next(iter(file.keys()))
    rewrite(path, {name: None, "surplus": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"another model: {name} is missing; surplus is not part") as raised:
        load_model(path)
    assert str(path) in str(raised.value)


def config_json(**changes) -> str:
    return json.dumps(to_json(MODEL) | changes)


@pytest.mark.parametrize(
    "metadata",
    [
        {"config": None},
        {"categories": None},
        {"config": "{"},
        {"config": "[" * 50_000},
        {"config": "[]"},
        {"config": "null"},
        {"config": "{}" + " " * 100_000},
        {"config": config_json(classes=7)},
        {"config": config_json(classes=-1)},
        {"config": config_json(classes="6")},
        {"config": config_json(clases=6)},
        {"config": config_json(classes=10**9)},
        {"config": config_json(classes=10**30)},
        {"config": config_json(box={"fc": [10**9, 10**9]})},
        {"config": config_json(box={"fc": 3})},
        {"config": config_json(backbone={"levels": 5})},
        {"config": config_json(rpn=[1])},
        {"categories": "[]"},
        {"categories": "{}"},
        {"categories": '[{"id": 1}]'},
        {"categories": '["circle"]'},
        {"categories": "17"},
    ],
)
def test_metadata_that_describe_no_such_model(path: Path, metadata: dict) -> None:
    rewrite(path, **metadata)
    with pytest.raises(ValueError) as raised:
        load_model(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 100, b"PK\x03\x04 zip", b"\x02\0\0\0\0\0\0\0{}"])
def test_garbage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a weights file of this package") as raised:
        load_model(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.999])
def test_cut_off(path: Path, part: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match="not a weights file of this package"):
        load_model(path)


def test_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights file at"):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights file at"):
        load_model(tmp_path)
