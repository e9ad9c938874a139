"""Saved proposals: the file, what is refused, and that they follow their images through resizing and mirroring."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training_runs
from safetensors.torch import load_file, save_file
from training_runs import DATA, tiny_model

from mrcnn_edu.augmentation import into_view
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.loading import train_loader
from mrcnn_edu.data.shapes import write
from mrcnn_edu.evaluation.proposals import recall
from mrcnn_edu.structures import ImageBatch, Proposals
from mrcnn_edu.training.proposals import FORMAT, SavedProposals, Task, propose_dataset, save_proposals

TWO = {
    7: Proposals(torch.tensor([[0.0, 0, 4, 2], [1, 1, 3, 3]]), torch.tensor([0.9, 0.1])),
    3: Proposals(torch.zeros(0, 4), torch.zeros(0)),
    5: Proposals(torch.tensor([[2.0, 0, 4, 2]]), torch.tensor([0.5])),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    folder = write(tmp_path_factory.mktemp("shapes") / "data", train=5, val=1, size=(64, 48), seed=1)
    return training_runs.datasets(folder)[0]


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    saved = SavedProposals(save_proposals(tmp_path / "p.safetensors", TWO))
    assert len(saved) == 3
    for image_id, proposals in TWO.items():
        assert torch.equal(saved[image_id].boxes, proposals.boxes)
        assert torch.equal(saved[image_id].scores, proposals.scores)
    saved.check_covers([3, 5])
    with pytest.raises(ValueError, match="lacks 1 of the images, the first is 4"):
        saved.check_covers([3, 4])
    with pytest.raises(ValueError, match="no proposals for image 4"):
        saved[4]


def test_the_documented_format_by_hand(tmp_path: Path) -> None:
    tensors = load_file(save_proposals(tmp_path / "p.safetensors", TWO))
    assert {name: value.tolist() for name, value in tensors.items() if name != "scores"} == {
        "image_ids": [7, 3, 5],
        "first": [0, 2, 2, 3],
        "boxes": [[0, 0, 4, 2], [1, 1, 3, 3], [2, 0, 4, 2]],
    }


def test_shares_of_several_processes(tmp_path: Path) -> None:
    paths = [save_proposals(tmp_path / f"{i}.safetensors", {i: TWO[i]}) for i in TWO]
    assert torch.equal(SavedProposals(*paths)[5].boxes, TWO[5].boxes)
    with pytest.raises(ValueError, match="image 7 are there already"):
        SavedProposals(paths[0], paths[1], paths[0])


def good() -> dict:
    return {
        "image_ids": torch.tensor([1, 2]),
        "first": torch.tensor([0, 1, 2]),
        "boxes": torch.tensor([[0.0, 0, 1, 1], [0, 0, 2, 2]]),
        "scores": torch.tensor([0.5, 0.5]),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.zeros(1)}, "do not fit together"),
        ({"first": torch.tensor([0, 3, 2])}, "do not fit together"),
        ({"first": torch.tensor([1, 1, 2])}, "do not fit together"),
        ({"first": torch.tensor([0, 1, 3])}, "do not fit together"),
        ({"first": torch.tensor([0, 2])}, "do not fit together"),
        ({"boxes": torch.zeros(2, 4, dtype=torch.float64)}, "do not fit together"),
        ({"boxes": torch.zeros(2, 5)}, "do not fit together"),
        ({"image_ids": torch.tensor([1, 1])}, "image 1 are there already"),
        ({"more": torch.zeros(1)}, "is not a proposal file"),
    ],
)
def test_damaged_files(tmp_path: Path, changes: dict, message: str) -> None:
    save_file(good() | changes, tmp_path / "p.safetensors", {"format": FORMAT})
    with pytest.raises(ValueError, match=message):
        SavedProposals(tmp_path / "p.safetensors")


@pytest.mark.parametrize("box", [[0.0, 0, float("nan"), 1], [1.0, 0, 1, 1], [0.0, 2, 1, 1]])
def test_numbers_that_are_no_box_are_found_when_read(tmp_path: Path, box: list[float]) -> None:
    save_file(good() | {"boxes": torch.tensor([[0.0, 0, 1, 1], box])}, tmp_path / "p", {"format": FORMAT})
    saved = SavedProposals(tmp_path / "p")
    assert len(saved[1]) == 1
    with pytest.raises(ValueError, match="a proposal of image 2 is no box"):
        saved[2]


def test_what_is_no_proposal_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no proposal file"):
        SavedProposals(tmp_path / "p")
    (tmp_path / "text").write_text("nonsense")
    with pytest.raises(ValueError, match="is not a proposal file"):
        SavedProposals(tmp_path / "text")
    save_file(good(), tmp_path / "other")
    with pytest.raises(ValueError, match="its format is not"):
        SavedProposals(tmp_path / "other")
    with pytest.raises(FloatingPointError, match="not finite"):
        save_proposals(tmp_path / "p", {1: Proposals(torch.full((1, 4), torch.inf), torch.ones(1))})
    with pytest.raises(ValueError, match="no images"):
        save_proposals(tmp_path / "p", {})
    with pytest.raises(ValueError, match="at least one file"):
        SavedProposals()


def test_into_view_by_hand() -> None:
    """10 x 20 pixels (height x width) at twice the size, 20 x 40, then mirrored: x becomes 40 - 2 x."""
    boxes = torch.tensor([[1.0, 2, 5, 4]])
    assert into_view(boxes, (10, 20), (20, 40), mirrored=False).tolist() == [[2, 4, 10, 8]]
    assert into_view(boxes, (10, 20), (20, 40), mirrored=True).tolist() == [[30, 4, 38, 8]]


def test_proposals_go_where_their_objects_go(data: CocoDataset, tmp_path: Path) -> None:
    """With the true boxes as proposals, those of every augmented batch are the true boxes of that batch."""
    truth = {}
    for index, image_id in enumerate(data.image_ids):
        boxes = data.target(index).boxes
        truth[image_id] = Proposals(boxes, torch.ones(len(boxes)))
    saved = SavedProposals(save_proposals(tmp_path / "p", truth))
    batches, seen = train_loader(data, DATA, 2, seed=3), set()
    for _ in range(12):
        batch, targets, image_ids = next(batches)
        seen |= set(batch.mirrored)
        for proposals, target in zip(Task(train_proposals=saved).training(batch, image_ids), targets):
            assert torch.allclose(proposals.boxes, target.boxes, atol=1e-4)
    assert seen == {False, True}


def test_what_the_rpn_proposes_for_a_data_set(data: CocoDataset) -> None:
    """The same boxes as the model itself takes, brought to the image's pixels and back."""
    model = tiny_model().eval()
    found = propose_dataset(model, data, DATA, batch_size=1)
    assert list(found) == data.image_ids
    image, _ = data[0]
    # test_size is 64, the shorter side has 48: twice the image would pass max_size, so it is seen as it is
    with torch.inference_mode():
        batch = ImageBatch.collate([image])
        live = model.propose(model.rpn(model.backbone(model.normalise(batch)), batch.pixels.shape[-2:]), batch)[0]
    assert torch.allclose(found[data.image_id(0)].boxes, live.boxes, atol=1e-4)
    more = propose_dataset(model, data, DATA, batch_size=1, rank=1, world=2)
    assert list(more) == data.image_ids[1::2]


def test_recall_by_hand(data: CocoDataset) -> None:
    truth = {}
    for index, image_id in enumerate(data.image_ids):
        target = data.target(index)
        boxes = target.boxes[~target.crowd]
        truth[image_id] = Proposals(boxes, torch.ones(len(boxes)))
    assert recall(data, truth) == {"AR100": 1.0, "AR1000": 1.0}
    assert recall(data, {}) == {"AR100": 0.0, "AR1000": 0.0}
    # 0.72 of each object covered passes five of the ten thresholds: 0.50, 0.55, 0.60, 0.65, 0.70
    narrow = {}
    for image_id, proposals in truth.items():
        x1, y1, x2, y2 = proposals.boxes.unbind(1)
        narrow[image_id] = Proposals(torch.stack([x1, y1, x1 + 0.72 * (x2 - x1), y2], dim=1), proposals.scores)
    assert recall(data, narrow, counts=(100,)) == {"AR100": pytest.approx(0.5)}
    # The best proposals come first: with one proposal an image, those of the least score do not count
    total = sum(map(len, truth.values()))
    assert recall(data, truth, counts=(1,))["AR1"] <= sum(len(p) > 0 for p in truth.values()) / total + 1e-6
