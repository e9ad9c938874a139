"""The exported program gives what the model gives, in rows that may be empty, after a way through a file as well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import MODEL

from mrcnn_edu.models.mask_rcnn import MaskRCNN, build_model
from mrcnn_edu.ops import compiled
from mrcnn_edu.program import FixedSize, export_program, save_program
from mrcnn_edu.structures import ImageBatch

pytestmark = pytest.mark.skipif(compiled.MISSING is not None, reason="needs the compiled ops")
SIZE = (64, 96)


@pytest.fixture(scope="module")
def model() -> MaskRCNN:
    """Random weights with scores that differ, so that some boxes pass and some do not."""
    torch.manual_seed(0)
    box = replace(MODEL.box, score_threshold=0.3, detections_per_image=20)
    built = build_model(replace(MODEL, keypoint=None, box=box)).eval()
    built.box_head.class_logits.weight.data.mul_(100)
    return built


@pytest.fixture(scope="module")
def file(model: MaskRCNN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    save_program(model, SIZE, path)
    return path


def test_the_program_gives_the_same_boxes_and_masks(model: MaskRCNN, file: Path) -> None:
    program = torch.export.load(file).module()
    generator, counts = torch.Generator().manual_seed(1), []
    for _ in range(4):
        pixels = torch.rand(1, 3, *SIZE, generator=generator)
        with torch.no_grad():
            (found,), given = model(ImageBatch(pixels, [SIZE], [SIZE])), program(pixels)
        count = len(found)
        counts.append(count)
        assert {name: len(value) for name, value in given.items()} == dict.fromkeys(given, 20)
        assert torch.equal(given["labels"][:count], found.labels)
        torch.testing.assert_close(given["scores"][:count], found.scores, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(given["boxes"][:count], found.boxes, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(given["mask_probs"][:count], found.mask_probs, rtol=1e-4, atol=1e-5)
        for name in ("labels", "scores", "boxes"):
            assert not given[name][count:].any()
    assert 0 < max(counts) < 20


def test_nothing_found_is_all_empty_rows(model: MaskRCNN) -> None:
    """Of FixedSize itself, which the program is traced from."""
    strict = replace(model.config, box=replace(model.config.box, score_threshold=1.0))
    other = build_model(strict)
    other.load_state_dict(model.state_dict())
    given = FixedSize(other, SIZE)(torch.rand(1, 3, *SIZE))
    assert not given["scores"].any() and not given["boxes"].any() and not given["labels"].any()


def test_what_cannot_be_exported(model: MaskRCNN) -> None:
    with pytest.raises(ValueError, match="has no keypoints"):
        FixedSize(build_model(MODEL), SIZE)
    with pytest.raises(ValueError, match="multiples of 32, got 60 x 96"):
        export_program(model, (60, 96))
