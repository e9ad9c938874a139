"""Loading: one stream whatever cuts it into pieces, and an end to every way of getting stuck."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter, namedtuple
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mrcnn_edu.config import DataConfig
from mrcnn_edu.data import loading, shapes
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.loading import epoch_order, train_loader, val_loader
from mrcnn_edu.structures import Target

COUNT = 17
CONFIG = DataConfig(min_size=(48, 64, 80), max_size=96, test_size=64, flip=0.5, channel_shuffle=0.5, workers=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> CocoDataset:
    folder = shapes.write(tmp_path_factory.mktemp("loading") / "shapes", train=COUNT, val=1, size=64)
    return CocoDataset(folder / "train", folder / "train.json")


def same(a: loading.Batch, b: loading.Batch) -> bool:
    (images, targets, ids), (other_images, other_targets, other_ids) = a, b
    return (
        ids == other_ids
        and images.sizes == other_images.sizes
        and images.original_sizes == other_images.original_sizes
        and torch.equal(images.pixels, other_images.pixels)
        and all(
            torch.equal(getattr(one, field.name), getattr(two, field.name))
            for one, two in zip(targets, other_targets, strict=True)
            for field in fields(Target)
        )
    )


# One stream -----------------------------------------------------------------------------------------


def test_batches_are_what_the_model_takes(dataset):
    images, targets, ids = next(train_loader(dataset, CONFIG, 4, seed=0))
    assert len(images) == len(targets) == len(ids) == 4
    assert images.pixels.dtype == torch.float32 and images.pixels.shape[2] % 32 == 0
    assert images.pixels.min() == 0 and 0.5 < images.pixels.max() <= 1
    assert images.original_sizes == [(64, 64)] * 4
    for (height, width), target, pixels in zip(images.sizes, targets, images.pixels):
        assert target.masks.shape[1:] == (height, width) and height in CONFIG.min_size
        assert not pixels[:, height:].any() and not pixels[:, :, width:].any()


def test_every_image_comes_once_per_epoch(dataset):
    ids = [i for batch in islice(train_loader(dataset, CONFIG, 4, seed=3), 4 * COUNT) for i in batch[2]]
    epochs = [ids[first : first + COUNT] for first in range(0, len(ids), COUNT)]
    assert all(sorted(epoch) == dataset.image_ids[:] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert [dataset.image_ids[i] for i in epoch_order(COUNT, 3, 0)] == epochs[0]


def test_seeds_differ(dataset):
    first, second, again = (next(train_loader(dataset, CONFIG, 8, seed=seed)) for seed in (0, 1, 0))
    assert first[2] != second[2] and same(first, again)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_resuming_is_exact_for_any_number_of_workers(dataset, workers):
    whole = list(islice(train_loader(dataset, CONFIG, 3, seed=1), 12))
    resumed = train_loader(dataset, replace(CONFIG, workers=workers), 3, seed=1, start=5)
    assert all(same(a, b) for a, b in zip(whole[5:], islice(resumed, 7), strict=True))


def test_an_image_looks_different_in_each_epoch(dataset):
    single = train_loader(dataset, replace(CONFIG, channel_shuffle=0.0), COUNT, seed=0)
    looks = []
    for images, _, ids in islice(single, 6):
        row = ids.index(1)
        looks.append((images.sizes[row], images.pixels[row, :, 0, 0].sum().item()))
    assert len(set(looks)) >= 3


@pytest.mark.parametrize("worker", [None, object()], ids=["in the process", "in a worker"])
def test_a_packed_batch_loses_nothing(dataset, worker, monkeypatch):
    """Whether masks are joined for their way between processes or not; a copy stands for page-locked memory."""
    monkeypatch.setattr(loading, "get_worker_info", lambda: worker)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    samples = [(*dataset[index], (64, 64), index, False) for index in range(4)]
    packed = loading.PackedBatch.collate(samples)
    assert isinstance(packed.masks, list) == (worker is None)
    for batch in (packed, packed.pin_memory()):
        images, targets, ids = batch.unpack()
        assert ids == [0, 1, 2, 3] and images.sizes == [(64, 64)] * 4
        for target, (_, wanted, *_) in zip(targets, samples, strict=True):
            for field in fields(Target):
                assert torch.equal(getattr(target, field.name), getattr(wanted, field.name)), field.name


def test_ranks_share_the_batches_of_one(dataset):
    whole = list(islice(train_loader(dataset, CONFIG, 6, seed=2), 9))
    for world in (1, 2, 3):
        parts = [list(islice(train_loader(dataset, CONFIG, 6, seed=2, rank=r, world=world), 9)) for r in range(world)]
        for batch, pieces in zip(whole, zip(*parts)):
            assert batch[2] == [i for piece in pieces for i in piece[2]]
            joined = [target for piece in pieces for target in piece[1]]
            assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(batch[1], joined, strict=True))


@pytest.mark.parametrize("world", [1, 2, 5])
def test_validation_sees_every_image_once(dataset, world):
    loaders = [val_loader(dataset, CONFIG, 3, rank=rank, world=world) for rank in range(world)]
    ids = [[i for batch in loader for i in batch[2]] for loader in loaders]
    assert sorted(image_id for part in ids for image_id in part) == sorted(dataset.image_ids)
    assert [len(list(loader)) for loader in loaders] == [len(loader) for loader in loaders]
    if world == 1:
        assert ids[0] == dataset.image_ids


def test_validation_changes_nothing_but_the_size(dataset):
    image, target = dataset[0]
    images, targets, _ = next(iter(val_loader(dataset, CONFIG, 1)))
    assert torch.equal(images.pixels[0], image / 255)
    assert torch.equal(targets[0].boxes, target.boxes) and torch.equal(targets[0].masks, target.masks)


def test_the_global_random_state_is_left_alone(dataset):
    for workers in (0, 2):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        next(train_loader(dataset, replace(CONFIG, workers=workers), 2, seed=0))
        next(iter(val_loader(dataset, replace(CONFIG, workers=workers), 2)))
        assert torch.equal(before, torch.get_rng_state())


def test_a_batch_larger_than_the_data_set(dataset):
    ids = next(train_loader(dataset, CONFIG, 2 * COUNT, seed=0))[2]
    assert Counter(ids) == {image_id: 2 for image_id in dataset.image_ids}


# Groups of one orientation --------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Only what the order of the training images depends on."""

    sizes: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.sizes)

    def order(self, batch_size: int, batches: int, rank: int = 0, world: int = 1, start: int = 0, group: int = 2):
        """The indices of this rank's part of each batch."""
        share = batch_size // world
        upright = [height > width for height, width in self.sizes]
        stream = loading._TrainOrder(len(self), batch_size, 0, start, rank * share, share, upright, group)
        return [[index for _, index in batch] for batch in islice(stream, batches)]


def mixed(count: int, upright: float = 0.3) -> Sizes:
    generator = torch.Generator().manual_seed(count)
    return Sizes([(640, 480) if u < upright else (480, 640) for u in torch.rand(count, generator=generator).tolist()])


@given(count=st.integers(1, 60), world=st.integers(1, 8), parts=st.integers(1, 3), group=st.integers(1, 5))
def test_every_world_shares_one_grouped_stream(count: int, world: int, parts: int, group: int) -> None:
    """Whatever the numbers: each epoch has every index once, every rank as many batches, and together they are one."""
    data, share = mixed(count), 2
    batch, epochs = world * share * parts, 3
    batches = -(-epochs * count // batch)
    whole = [i for indices in data.order(batch, batches, group=group) for i in indices]
    for epoch in range(epochs):
        assert sorted(whole[epoch * count : (epoch + 1) * count]) == list(range(count))
    small = [data.order(world * share, batches * parts, rank, world, group=group) for rank in range(world)]
    assert {len(own) for own in small} == {batches * parts}
    assert [i for pieces in zip(*small) for piece in pieces for i in piece] == whole
    later = data.order(batch, max(batches - 2, 0), start=2, group=group)
    assert later == data.order(batch, batches, group=group)[2:]


@given(count=st.integers(1, 60), world=st.integers(1, 8), batch=st.integers(1, 9))
def test_every_world_deals_out_the_batches_of_one(count: int, world: int, batch: int) -> None:
    """For measuring: no image twice, none left out, and each in the batch that one process alone would put it in."""
    orders = [loading._ValOrder(count, batch, rank, world) for rank in range(world)]
    dealt = [[[index for _, index in indices] for indices in order] for order in orders]
    whole = [[index for _, index in indices] for indices in loading._ValOrder(count, batch, 0, 1)]
    assert [dealt[number % world][number // world] for number in range(len(whole))] == whole
    assert sum(map(len, dealt)) == len(whole)
    assert [index for indices in whole for index in indices] == list(range(count))
    assert [order.images for order in orders] == [sum(map(len, part)) for part in dealt]
    assert [len(order) for order in orders] == [len(part) for part in dealt]


@given(count=st.integers(1, 60), group=st.integers(2, 5))
def test_groups_are_of_one_orientation_but_for_a_few(count: int, group: int) -> None:
    """Of the groups of an epoch at most three are mixed: the one it completes and two that end it."""
    data, epochs = mixed(count), 4
    groups = data.order(group, epochs * count // group, group=group)
    assert sum(len({data.sizes[i] for i in indices}) > 1 for indices in groups) <= 3 * epochs


def test_images_of_one_orientation_come_as_they_did() -> None:
    """Squares are never upright, so grouping does not touch their order."""
    square = Sizes([(64, 64)] * 17)
    assert square.order(4, 9, group=3) == square.order(4, 9, group=1)


def test_grouping_saves_padding() -> None:
    """Wide and upright images of 3 : 4 in batches of 2: mixed ones, 0.42 of all, are a third larger."""

    def padded(group: int) -> float:
        data = mixed(1000)
        batches = data.order(2, 500, group=group)
        return sum(
            2 * max(data.sizes[i][0] for i in pair) * max(data.sizes[i][1] for i in pair) for pair in batches
        ) / (1000 * 640 * 480)

    assert padded(1) == pytest.approx(1 + 0.42 / 3, abs=0.02)
    assert padded(2) < 1.002


# Data sets that go wrong ----------------------------------------------------------------------------


class Changed:
    """The data set with another image loaded in place of one."""

    def __init__(self, dataset: CocoDataset, load) -> None:
        self.dataset, self.load = dataset, load
        self.categories, self.joints, self.flip_pairs = dataset.categories, dataset.joints, dataset.flip_pairs
        self.sizes = dataset.sizes

    def __len__(self) -> int:
        return len(self.dataset)

    def image_id(self, index: int) -> int:
        return self.dataset.image_id(index)

    def __getitem__(self, index: int):
        return self.load() if index == 3 else self.dataset[index]


def read_all(dataset, workers: int, **options) -> None:
    for _ in val_loader(dataset, replace(CONFIG, workers=workers), 1, **options):
        pass


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_arrive_as_they_were(dataset, workers):
    def broken():
        raise OSError("cannot read the image a.png: it is damaged")

    with pytest.raises(OSError, match=r"^cannot read the image a\.png: it is damaged$"):
        read_all(Changed(dataset, broken), workers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"boxes": torch.tensor([[5.0, 5, 5, 20]])}, r"image 4.*boxes\[0\]"),
        ({"boxes": torch.full((1, 4), float("nan"))}, r"image 4.*finite"),
        ({"labels": torch.tensor([0])}, r"image 4.*1\.\.6"),
        ({"labels": torch.tensor([7])}, r"image 4.*1\.\.6"),
        ({"masks": torch.ones(1, 9, 9, dtype=torch.bool)}, r"image 4.*masks.*9 x 9"),
        ({"keypoints": torch.zeros(1, 5, 3)}, r"image 4.*7 joints"),
        ({"keypoints": torch.full((1, 7, 3), float("inf"))}, r"image 4.*keypoints must be finite"),
    ],
)
def test_bad_targets_are_refused_before_the_model(dataset, fields, message):
    good = Target(
        torch.tensor([[1.0, 1, 9, 9]]), torch.tensor([1]), torch.ones(1, 64, 64, dtype=torch.bool), torch.zeros(1, 7, 3)
    )
    bad = replace(good, **fields)
    with pytest.raises(ValueError, match=message):
        read_all(Changed(dataset, lambda: (torch.zeros(3, 64, 64), bad)), workers=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_pixels_name_their_image(dataset, workers):
    nothing = Target.empty((64, 64), joints=7)
    with pytest.raises(ValueError, match=r"^image 4 must lie in \[0, 1\] without NaN"):
        read_all(Changed(dataset, lambda: (torch.full((3, 64, 64), float("nan")), nothing)), workers)


def test_a_killed_worker_is_an_error(dataset):
    with pytest.raises(RuntimeError, match="worker died"):
        read_all(Changed(dataset, lambda: os.kill(os.getpid(), signal.SIGKILL)), workers=1)


def test_a_stuck_worker_is_an_error(dataset):
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
        read_all(Changed(dataset, lambda: time.sleep(600)), workers=1, timeout=1)
    assert time.perf_counter() - start < 30


def test_too_little_shared_memory_is_said_before_workers_start(dataset, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda _: usage(2**16, 0, 2**16))
    val_loader(dataset, CONFIG, 4)  # without workers it is not needed
    if Path("/dev/shm").is_dir():
        with pytest.raises(OSError, match=r"/dev/shm has 0 MB free.*--shm-size"):
            val_loader(dataset, replace(CONFIG, workers=2), 4)
        with pytest.raises(OSError, match="--shm-size"):
            train_loader(dataset, replace(CONFIG, workers=2), 4, seed=0)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"batch_size": 3, "world": 2}, {"start": -1}, {"rank": 2, "world": 2}, {"rank": -1}],
)
def test_impossible_numbers_are_refused(dataset, options):
    with pytest.raises(ValueError):
        train_loader(dataset, CONFIG, **{"batch_size": 2, "seed": 0} | options)


def test_an_empty_data_set_is_refused(dataset):
    class Empty(Changed):
        def __len__(self) -> int:
            return 0

    for start in (lambda d: train_loader(d, CONFIG, 2, seed=0), lambda d: val_loader(d, CONFIG, 2)):
        with pytest.raises(ValueError, match="no images"):
            start(Empty(dataset, None))


def test_box_only_data_has_no_masks(tmp_path):
    import json

    folder = shapes.write(tmp_path / "shapes", 3, 0, size=32)
    content = json.loads((folder / "train.json").read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    dataset = CocoDataset(folder / "train", tmp_path / "boxes.json", keypoints=False)
    _, targets, _ = next(train_loader(dataset, CONFIG, 3, seed=0))
    assert all(target.masks is None and target.keypoints is None for target in targets)
