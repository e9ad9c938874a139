"""Image files to RGB tensors, whatever their mode, orientation or state; nothing is decoded before it is measured.

Chapter 2 (a data set we can trust). Pillow decodes: it reports damaged files as errors where other decoders crash.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from mrcnn_edu.structures import Size

MAX_PIXELS = 80_000_000  # of one image; a small file can claim any size, so this is checked before decoding

# Formats that hold one picture and need no helper program to read.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Tensor:
    """One image file as RGB ``[3, H, W]`` uint8, upright.

    path        of a JPEG, PNG, WebP, TIFF, BMP, GIF (its first frame), PPM, JPEG 2000 or AVIF file
    max_pixels  larger images are refused before they are decoded

    The orientation noted by the camera (EXIF) is applied. Gray, palette and CMYK become RGB, 16 bit are scaled to 8,
    what is transparent shows white. Raises OSError naming the path for anything that cannot be read.
    """
    with _opened(Path(path), max_pixels) as image:
        ImageOps.exif_transpose(image, in_place=True)
        array = to_rgb(image)
    return torch.from_numpy(array).permute(2, 0, 1)


def image_size(path: str | Path, max_pixels: int = MAX_PIXELS) -> Size:
    """(height, width) in pixels that ``read_image`` would give an image file, from its first bytes.

    Raises OSError naming the path as ``read_image`` does; damage behind those bytes is not seen.
    """
    with _opened(Path(path), max_pixels) as image:
        width, height = image.size
        told = image.format != "PNG" or "exif" in image.info  # else Pillow looks for it behind the pixels
        turned = told and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """An image whose pixels are counted but not decoded; what goes wrong in the block is an OSError with the path."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise OSError("it is a device or a pipe, no file")  # which might never end, or never begin
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and odd metadata: errors below, or harmless
            with Image.open(path, formats=_known_formats()) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise OSError(f"{width} x {height} pixels are more than the {max_pixels} allowed (max_pixels)")
                yield image
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
        raise OSError(f"cannot read the image {path}: {_reason(error)}") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of a Pillow image of any mode as RGB ``[H, W, 3]`` uint8; ValueError for floating point."""
    if image.mode == "F":
        raise ValueError("it holds floating-point values of unknown range; convert it to 8 or 16 bit")
    if image.mode.startswith("I"):  # 16 bit gray, which Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.int64)
        if values.size and not (values.min() >= 0 and values.max() <= 65535):
            raise ValueError(f"its gray values go from {values.min()} to {values.max()}, beyond 0..65535")
        gray = np.rint(values / 257).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def file_inside(root: Path, name: str) -> Path:
    """The file ``name`` (a relative path with forward slashes) below ``root``, links followed.

    Raises ValueError when it lies elsewhere, so that an annotation file from anywhere cannot open private files.
    """
    check_file_name(name)
    root = root.resolve()
    try:
        path = (root / name).resolve()
    except (OSError, RuntimeError) as error:  # Python 3.13 no longer minds
        raise ValueError(f"file name {name!r} cannot be followed below {root}: {error}") from error
    if not path.is_relative_to(root):
        raise ValueError(f"file name {name!r} leads out of the image folder {root}, to {path}")
    return path


def check_file_name(name: str) -> None:
    """Refuse what is no relative path downwards, without looking at the disk."""
    windows = PureWindowsPath(name)  # knows drives and both slashes, so it covers both worlds
    if not name or "\0" in name or windows.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise ValueError(f"file name {name!r} must be a relative path inside the image folder, without '..'")


def _known_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no image in a known format, or it is damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
