"""From a data set to batches: in which order, with which chance, by how many processes.

Chapter 13 (training) and Chapter 19 (many GPUs). Paper: Section 3.1 (16 images per mini-batch).

The training stream is one endless list of positions 0, 1, 2, ... that belongs to the seed alone: position p lies in
epoch p // n, at place p % n of that epoch's permutation, and has its own random numbers. Batches, workers and ranks
only cut the list into pieces, so training resumes exactly wherever it stopped, with any number of workers. Images of
one orientation come in groups, since a batch is padded to its largest height and width.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mrcnn_edu.config import DataConfig
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.transforms import Augment, resized
from mrcnn_edu.structures import ImageBatch, Size, Target, check_image, check_target

Batch = tuple[ImageBatch, list[Target], list[int]]  # images, their targets, their ids

Sample = tuple[Tensor, Target, Size, int, bool]  # image, target, size before the resize, image id, mirrored

TIMEOUT = 300.0  # seconds a batch may take before a stuck worker is called an error
PREFETCH = 2  # batches each worker prepares ahead


def train_loader(
    dataset: CocoDataset,
    config: DataConfig,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    timeout: float = TIMEOUT,
) -> Iterator[Batch]:
    """Endless shuffled and augmented batches; every image comes once per epoch.

    dataset      a CocoDataset, or anything with its items, ``image_id``, ``sizes``, ``categories``, ``joints`` and
                 ``flip_pairs``
    batch_size   images per iteration over all processes; a multiple of ``world``
    start        batches already consumed: the stream goes on after them, to the bit
    rank, world  this process among how many; each gets its own part of every batch
    timeout      seconds after which a worker that delivers nothing is an error

    Raises ValueError for an empty data set or for numbers that do not fit together, OSError for too little shared
    memory, RuntimeError for a worker that died or hangs.
    """
    if batch_size < 1 or batch_size % world:
        raise ValueError(f"batch_size {batch_size} must be a positive multiple of the {world} processes")
    if start < 0:
        raise ValueError(f"start must be 0 or more batches, got {start}")
    _check_dataset(dataset, rank, world)
    share = batch_size // world
    augment = Augment.for_training(config, dataset.flip_pairs)
    upright = [height > width for height, width in dataset.sizes]
    order = _TrainOrder(len(dataset), batch_size, seed, start, rank * share, share, upright, config.group)
    _check_shared_memory(dataset, augment, share, config.workers)
    return _unpacked(_loader(_Samples(dataset, augment, seed), order, config.workers, timeout))


def val_loader(
    dataset: CocoDataset, config: DataConfig, batch_size: int, rank: int = 0, world: int = 1, timeout: float = TIMEOUT
) -> ValLoader:
    """All images once, in order, resized to ``config.test_size`` and otherwise as they are.

    batch_size   images per batch of this process
    rank, world  this process gets batches rank, rank + world, ... of those that one alone would see; none comes twice
    returns      something to iterate over, any number of times, with a length in batches
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    _check_dataset(dataset, rank, world)
    augment = Augment.for_testing(config)
    order = _ValOrder(len(dataset), batch_size, rank, world)
    _check_shared_memory(dataset, augment, batch_size, config.workers)
    return ValLoader(_loader(_Samples(dataset, augment, seed=0), order, config.workers, timeout), order.images)


@dataclass(frozen=True)
class ValLoader:
    """Finite batches in order, of so many images."""

    loader: DataLoader
    images: int

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return _unpacked(self.loader)


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------


def epoch_order(count: int, seed: int, epoch: int, upright: list[bool] | None = None, group: int = 1) -> Tensor:
    """The indices 0..count - 1 in the order of one epoch, [count] int64.

    upright  which images are taller than wide; None: nobody asks
    group    positions 0..group - 1 of the whole stream, and each ``group`` after them, hold images of one orientation

    An epoch need not begin with a group: its first indices complete the last group of the epoch before, and what
    remains of both orientations ends it. These groups may be mixed, at most three per epoch.
    """
    generator = torch.Generator().manual_seed(_mix(seed, 0, epoch))
    order = torch.randperm(count, generator=generator)
    if upright is None or group == 1:
        return order
    chosen, waiting = order.tolist(), ([], [])
    grouped = chosen[: -epoch * count % group]
    for index in chosen[len(grouped) :]:
        members = waiting[upright[index]]
        members.append(index)
        if len(members) == group:
            grouped += members
            members.clear()
    return torch.tensor(grouped + waiting[0] + waiting[1])


def _mix(*numbers: int) -> int:
    """One 64-bit seed out of several numbers; near ones give unrelated seeds."""
    state = np.random.SeedSequence([abs(number) * 2 + (number < 0) for number in numbers])
    return int(state.generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class _TrainOrder:
    """Endless lists of (position, index), one list per batch: this rank's share of it."""

    count: int
    batch_size: int
    seed: int
    start: int
    offset: int
    share: int
    upright: list[bool]
    group: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, []
        first = self.start * self.batch_size + self.offset
        while True:
            batch = []
            for position in range(first, first + self.share):
                if position // self.count != epoch:
                    epoch = position // self.count
                    order = epoch_order(self.count, self.seed, epoch, self.upright, self.group).tolist()
                batch.append((position, order[position % self.count]))
            yield batch
            first += self.batch_size


@dataclass(frozen=True)
class _ValOrder:
    """All indices in batches, of which this rank has every ``world``-th; a position is the index itself.

    Whole batches are shared out, not images: the padding of an image, and so its result to the last bit, depends on
    those it is batched with.
    """

    count: int
    batch_size: int
    rank: int
    world: int

    @property
    def images(self) -> int:
        return sum(min(self.batch_size, self.count - first) for first in self._firsts())

    def __len__(self) -> int:
        return len(self._firsts())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in self._firsts():
            yield [(index, index) for index in range(first, min(first + self.batch_size, self.count))]

    def _firsts(self) -> range:
        return range(self.rank * self.batch_size, self.count, self.world * self.batch_size)


# ---------------------------------------------------------------------------------------------------------------------
# Samples and batches
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Samples(Dataset):
    """The data set with augmentation: the item (position, index) has the random numbers of (seed, position)."""

    dataset: CocoDataset
    augment: Augment
    seed: int

    def __getitem__(self, item: tuple[int, int]) -> Sample | Exception:
        try:
            return self._load(*item)
        except (OSError, TypeError, ValueError) as error:
            return error  # to be raised by the main process; DataLoader would bury its sentence in a traceback

    def _load(self, position: int, index: int) -> Sample:
        image, target = self.dataset[index]
        image_id = self.dataset.image_id(index)
        original_size = (image.shape[1], image.shape[2])
        check_image(image, f"image {image_id}")
        joints = self.dataset.joints or None
        check_target(target, original_size, len(self.dataset.categories), joints, f"target of image {image_id}")
        generator = torch.Generator().manual_seed(_mix(self.seed, 1, position))
        drawn = self.augment.draw(generator)
        return (*self.augment.apply(image, target, drawn), original_size, image_id, drawn.mirrored)


@dataclass(frozen=True)
class PackedBatch:
    """A batch in a handful of tensors: each costs a file handle on its way between two processes."""

    images: ImageBatch
    rows: Target  # of all images, one after the other, without masks
    masks: Tensor | list[Tensor] | None  # all pixels of all masks, one after the other; without a worker as they are
    counts: list[int]  # instances per image
    image_ids: list[int]

    @classmethod
    def collate(cls, samples: list[Sample | Exception]) -> PackedBatch | Exception:
        """Put samples together; an error among them takes their place."""
        for sample in samples:
            if isinstance(sample, Exception):
                return sample
        images, targets, original_sizes, image_ids, mirrored = zip(*samples)
        batch = replace(ImageBatch.collate(list(images), list(original_sizes)), mirrored=list(mirrored))
        masks = None
        if targets[0].masks is not None:
            masks = [target.masks for target in targets]
            if get_worker_info() is not None:
                masks = torch.cat([part.reshape(-1) for part in masks])
        rows = Target.cat([Target(t.boxes, t.labels, None, t.keypoints, t.crowd) for t in targets])
        return cls(batch, rows, masks, [len(target) for target in targets], list(image_ids))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory."""
        masks = [part.pin_memory() for part in self.masks] if isinstance(self.masks, list) else self.masks
        masks = masks.pin_memory() if isinstance(masks, Tensor) else masks
        return PackedBatch(self.images.pin_memory(), self.rows.pin_memory(), masks, self.counts, self.image_ids)

    def unpack(self) -> Batch:
        """The images, one Target per image, and the image ids."""
        targets, row, pixel = [], 0, 0
        for image, (count, (height, width)) in enumerate(zip(self.counts, self.images.sizes)):
            part = self.rows[row : row + count]
            masks = self.masks[image] if isinstance(self.masks, list) else None
            if isinstance(self.masks, Tensor):
                masks = self.masks[pixel : pixel + count * height * width].reshape(count, height, width)
            targets.append(Target(part.boxes, part.labels, masks, part.keypoints, part.crowd))
            row, pixel = row + count, pixel + count * height * width
        return self.images, targets, self.image_ids


def _loader(samples: _Samples, order: Any, workers: int, timeout: float) -> DataLoader:
    return DataLoader(
        samples,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=PackedBatch.collate,
        timeout=timeout if workers else 0,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=torch.cuda.is_initialized(),  # for a model on a GPU; asking for more would start one
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(0),  # else the loader draws from, and so moves, the global generator
    )


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)  # the workers are the threads
    gc.freeze()  # the collector would write into every page that is shared with the parent


def _unpacked(loader: DataLoader) -> Iterator[Batch]:
    batches, failure = iter(loader), ""
    while not failure:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:  # a dying worker may break its pipe before it is missed
            if loader.num_workers == 0:
                raise
            failure = str(error) or type(error).__name__
        else:
            if isinstance(batch, Exception):
                raise batch
            yield batch.unpack()
    del batches  # ends the other workers now, not when somebody lets go of the exception
    raise RuntimeError(
        f"a loader worker died, hangs or failed: {failure}. Killed workers mostly mean too little memory; "
        "data.workers=0 loads without worker processes and shows what happens"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def _check_dataset(dataset: CocoDataset, rank: int, world: int) -> None:
    if len(dataset) == 0:
        raise ValueError("the data set has no images")
    if not 0 <= rank < world:
        raise ValueError(f"rank must lie in 0..{world - 1}, got {rank}")


def _check_shared_memory(
    dataset: CocoDataset, augment: Augment, batch_size: int, workers: int, folder: str = "/dev/shm"
) -> None:
    """Workers hand batches over in shared memory; when that runs out, Linux kills them without a word."""
    if workers == 0 or not Path(folder).is_dir():
        return
    sizes = (resized(size, max(augment.min_sizes), augment.max_size) for size in set(dataset.sizes))
    image = 3 * 4 * max(height * width for height, width in sizes)  # bytes of the largest, in float32
    needed, free = workers * PREFETCH * batch_size * image, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 2**20:.0f} MB free, but {workers} workers with batches of {batch_size} may need "
            f"{needed / 2**20:.0f} MB: start the container with --shm-size={needed * 2 / 2**30:.1f}g, use fewer "
            f"data.workers, or none with data.workers=0"
        )
