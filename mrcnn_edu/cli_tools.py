"""What can be typed after ``mrcnn-edu check``, ``convert`` and ``export``; ``cli`` has the other commands.

Chapter 18 (your own data). Nothing here imports PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

Flag = FlagCreatePairsOff[bool]
DEMO_WEIGHTS = Path("runs/demo/weights.safetensors")


@dataclass(frozen=True)
class Check:
    """Look at a data set before training on it: counts, sizes, classes, broken files, suspicious annotations, pictures.

    FOLDER is laid out as for train. Ends with an error where an image or an annotation is broken.
    """

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]  # images and annotations
    split: tuple[str, ...] = ()  # which parts; none: train and val, as far as they are there
    keypoints: Flag = False  # of COCO, the annotations of persons with keypoints
    images: int | None = None  # look at about so many of each part; None: all of them
    sheet: bool = True  # draw some images with their annotations
    out: Path = Path("runs/check")  # folder for the pictures


@dataclass(frozen=True)
class Convert:
    """Bring published weights into a file of ours, or weights of ours into one that torchvision's models load.

    mrcnn-edu convert torchvision:maskrcnn_resnet50_fpn coco.safetensors
    mrcnn-edu convert detectron2:maskrcnn_resnet50_fpn:model_final_f10217.pkl coco.safetensors
    mrcnn-edu convert runs/train/weights.safetensors mine.pth
    """

    source: Annotated[
        Positional[Path], arg(metavar="SOURCE")
    ]  # torchvision:NAME, torchvision:NAME:FILE, detectron2:NAME:FILE, or of a run
    target: Annotated[Positional[Path], arg(metavar="TARGET")]  # .safetensors of ours, or .pth of torchvision's


@dataclass(frozen=True)
class Export:
    """Make trained weights a torch.export program for images of one size, with boxes and masks in tensors of one size.

    The program uses the compiled ops, so "import mrcnn_edu.ops" must stand before torch.export.load.
    """

    weights: Path = DEMO_WEIGHTS  # of a run: weights.safetensors or its folder; or torchvision:maskrcnn_resnet50_fpn
    out: Path = Path("model.pt2")  # the program
    height: int = 800  # px, of the image; a multiple of 32
    width: int = 1344  # px; a multiple of 32
