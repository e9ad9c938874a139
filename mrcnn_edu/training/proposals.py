"""Proposals kept in a file between two stages of training, and brought back into the pixels of an augmented batch.

Chapter 13 (training). Paper: Section 3.1, "RPN is trained separately and does not share features with Mask R-CNN".

The file is safetensors, so it holds tensors and strings and no code:

image_ids  [I] int64, ids of the data set's images, all different
first      [I + 1] int64, where each image's rows begin; first[0] = 0, first[I] = N
boxes      [N, (x1, y1, x2, y2)] float32, pixels of the original image, best first within an image
scores     [N] float32, probability that the box holds an object

and in its metadata ``format`` "mrcnn_edu proposals 1". It is read through the page cache, an image at a time: the
proposals of COCO's training images take gigabytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from mrcnn_edu import __version__
from mrcnn_edu import boxes as box_ops
from mrcnn_edu.augmentation import into_view
from mrcnn_edu.config import DataConfig
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.loading import val_loader
from mrcnn_edu.inference import evaluating
from mrcnn_edu.losses import HEAD_LOSSES, any_of
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.structures import ImageBatch, Proposals
from mrcnn_edu.training.checkpoint import write_atomically

FORMAT = "mrcnn_edu proposals 1"
TENSORS = {"image_ids": "I64", "first": "I64", "boxes": "F32", "scores": "F32"}


def save_proposals(path: Path | str, proposals: Mapping[int, Proposals]) -> Path:
    """Write proposals by image id, in the pixels of the original images; the file's path.

    Raises ValueError when there are none to write, FloatingPointError when they are not finite, OSError when the file
    cannot be written.
    """
    path = Path(path)
    if not proposals:
        raise ValueError(f"there are no images to write proposals of to {path}")
    parts = list(proposals.values())
    boxes = torch.cat([part.boxes for part in parts]).cpu().contiguous()
    scores = torch.cat([part.scores for part in parts]).float().cpu().contiguous()
    if not (boxes.isfinite().all() and scores.isfinite().all()):
        raise FloatingPointError(f"the proposals for {path} are not finite; look for NaN in the RPN's weights")
    counts = torch.tensor([0, *map(len, parts)])
    tensors = {"image_ids": torch.tensor(list(proposals)), "first": counts.cumsum(0), "boxes": boxes, "scores": scores}
    write_atomically(path, to_bytes(tensors, {"format": FORMAT, "mrcnn_edu": __version__}))
    return path


class SavedProposals:
    """The proposals in one or more files that ``save_proposals`` wrote, by image id.

    Several files are the shares of several processes; no image may be in two of them. Names, types, shapes and row
    ranges are checked here, an image's numbers when they are read. Raises OSError for a file that cannot be read,
    ValueError for one that is damaged or of another kind.
    """

    def __init__(self, *paths: Path | str) -> None:
        if not paths:
            raise ValueError("SavedProposals needs at least one file")
        self.paths = tuple(map(Path, paths))
        self._files: list = []
        self._rows: dict[int, tuple[int, int, int]] = {}  # image id: file, first row, row after the last
        for path in self.paths:
            image_ids, first = self._open(path)
            for image_id, start, stop in zip(image_ids, first[:-1], first[1:]):
                if image_id in self._rows:
                    raise ValueError(f"{path}: the proposals of image {image_id} are there already")
                self._rows[image_id] = (len(self._files) - 1, start, stop)

    def _open(self, path: Path) -> tuple[list[int], list[int]]:
        if not path.is_file():
            raise FileNotFoundError(f"no proposal file at {path}")
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a proposal file: {error}") from error
        if (file.metadata() or {}).get("format") != FORMAT or set(file.keys()) != set(TENSORS):
            raise ValueError(f"{path} is not a proposal file: its format is not {FORMAT!r}")
        image_ids, first = file.get_tensor("image_ids"), file.get_tensor("first")
        boxes, scores = (tuple(file.get_slice(name).get_shape()) for name in ("boxes", "scores"))
        types = {name: file.get_slice(name).get_dtype() for name in TENSORS}
        rows = scores[0] if scores else 0
        fits = types == TENSORS and first.shape == (len(image_ids) + 1,) and boxes == (rows, 4) and scores == (rows,)
        if not fits or first[0] != 0 or first[-1] != rows or (first.diff() < 0).any():
            raise ValueError(
                f"{path} is damaged: {len(image_ids)} images, {len(first)} row marks, boxes {list(boxes)} and scores "
                f"{list(scores)} do not fit together"
            )
        self._files.append(file)
        return image_ids.tolist(), first.tolist()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, image_id: int) -> Proposals:
        """One image's proposals, in its original pixels."""
        if image_id not in self._rows:
            raise ValueError(f"{self._named()} has no proposals for image {image_id}; make them for this data set")
        file, start, stop = self._rows[image_id]
        boxes, scores = (self._files[file].get_slice(name)[start:stop] for name in ("boxes", "scores"))
        if not (boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all() and scores.isfinite().all()):
            raise ValueError(f"{self.paths[file]} is damaged: a proposal of image {image_id} is no box")
        return Proposals(boxes, scores)

    def check_covers(self, image_ids: Iterable[int]) -> None:
        """Raise ValueError unless every one of these images has proposals, or at least an empty list of them."""
        missing = [image_id for image_id in image_ids if image_id not in self._rows]
        if missing:
            raise ValueError(
                f"{self._named()} lacks {len(missing)} of the images, the first is {missing[0]}; the proposals are of "
                "another data set"
            )

    def of_batch(self, batch: ImageBatch, image_ids: list[int]) -> list[Proposals]:
        """The proposals of a batch's images, where the batch is and in its pixels: resized and mirrored as it was."""
        mirrored = batch.mirrored or [False] * len(batch)
        found = []
        for image_id, size, original, mirror in zip(image_ids, batch.sizes, batch.original_sizes, mirrored):
            proposals = self[image_id]
            boxes = into_view(proposals.boxes, original, size, mirror)
            found.append(Proposals(boxes, proposals.scores).to(batch.pixels.device))
        return found

    def _named(self) -> str:
        return ", ".join(map(str, self.paths))


@dataclass(frozen=True)
class Task:
    """What one run of the loop trains: which losses, and on whose proposals.

    losses           names out of those of ``MaskRCNN.forward``; None: all that the model has
    train_proposals  for the training images; None: the RPN's own
    val_proposals    for the validation images
    """

    losses: tuple[str, ...] | None = None
    train_proposals: SavedProposals | None = None
    val_proposals: SavedProposals | None = None

    @property
    def trains_heads(self) -> bool:
        """Is anything beyond the RPN trained?"""
        return self.losses is None or any_of(HEAD_LOSSES, self.losses)

    def training(self, batch: ImageBatch, image_ids: list[int]) -> list[Proposals] | None:
        """The given proposals of a training batch, or None for the RPN's own."""
        return None if self.train_proposals is None else self.train_proposals.of_batch(batch, image_ids)

    def validation(self, batch: ImageBatch, image_ids: list[int]) -> list[Proposals] | None:
        """The given proposals of a validation batch, or None for the RPN's own."""
        return None if self.val_proposals is None else self.val_proposals.of_batch(batch, image_ids)


EVERYTHING = Task()


def propose_dataset(
    model: MaskRCNN,
    dataset: CocoDataset,
    config: DataConfig,
    training: bool = False,
    batch_size: int = 8,
    rank: int = 0,
    world: int = 1,
) -> dict[int, Proposals]:
    """What the RPN proposes in every image of a data set, by image id, in the original images' pixels, on the CPU.

    config       gives the size (``test_size``, ``max_size``) and the number of loader processes
    training     as many per image as training uses (``rpn.post_nms``), not as many as inference
    batch_size   images at a time
    rank, world  only every ``world``-th batch, for this process among how many

    Raises FloatingPointError where the RPN's outputs are not finite.
    """
    found: dict[int, Proposals] = {}
    for batch, _, image_ids in val_loader(dataset, config, batch_size, rank, world):
        with evaluating(model), torch.inference_mode():
            batch = batch.to(model.pixel_mean.device)
            features = model.backbone(model.normalise(batch))
            proposals = model.propose(model.rpn(features, batch.pixels.shape[-2:]), batch, training)
        for image_id, part, size, original in zip(image_ids, proposals, batch.sizes, batch.original_sizes):
            part = part.to("cpu")
            boxes = box_ops.clip(box_ops.resize(part.boxes, size, original), original)
            kept = box_ops.area(boxes) > 0  # rounding may push a sliver onto the border
            found[image_id] = Proposals(boxes[kept], part.scores[kept])
    return found
