"""Image files of every kind, damaged ones and hostile ones."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mrcnn_edu.data.images import check_file_name, file_inside, image_size, read_image, to_rgb

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5  # 6 high, 8 wide


def saved(folder: Path, image: Image.Image, name: str = "image.png", **options) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


def test_rgb_pixels_come_as_they_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = read_image(saved(tmp_path, Image.fromarray(pixels)))
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("mode", "extension"),
    [(mode, "png") for mode in ("1", "L", "P", "LA", "RGBA", "I;16")]
    + [(mode, "tif") for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "I", "YCbCr")],
)
def test_every_mode_becomes_rgb(tmp_path, mode, extension):
    if mode in ("I;16", "I"):
        source = Image.fromarray(RAMP.astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    elif mode == "P":
        source = Image.fromarray(RAMP).quantize(64)
    else:
        source = Image.fromarray(RAMP).convert("RGB").convert(mode)
    image = read_image(saved(tmp_path, source, f"image.{extension}"))
    assert image.shape == (3, 6, 8) and image.dtype == torch.uint8
    if mode != "1":
        assert (image.int() - torch.from_numpy(RAMP).int()).abs().max() <= 3


def test_cmyk_jpeg(tmp_path):
    colour = Image.new("RGB", (16, 16), (200, 40, 90))
    image = read_image(saved(tmp_path, colour.convert("CMYK"), "image.jpg", quality=95))
    assert (image.float().mean((1, 2)) - torch.tensor([200.0, 40.0, 90.0])).abs().max() < 4


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    image = read_image(saved(tmp_path, Image.fromarray(ramp)))
    assert abs(image.float().mean() - 127.5) < 1
    assert image.amin() == 0 and image.amax() == 255


def test_transparent_shows_white(tmp_path):
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    image = read_image(saved(tmp_path, Image.fromarray(pixels)))
    assert image[:, 0, 0].tolist() == [10, 20, 30]
    assert image[:, 1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cameras_orientation_is_applied(tmp_path, orientation):
    upright = np.zeros((4, 6, 3), dtype=np.uint8)
    upright[0, 0] = 255  # top left
    # what a camera turned that way stores: the inverse of what a viewer has to do
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), exif=exif))
    assert torch.equal(image, torch.from_numpy(upright).permute(2, 0, 1))


def test_floating_point_is_refused(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.ones((3, 3), dtype=np.float32)), "image.tif")
    with pytest.raises(OSError, match=r"image\.tif.*floating-point"):
        read_image(path)


def test_gray_values_beyond_sixteen_bits_are_refused():
    with pytest.raises(ValueError, match="65535"):
        to_rgb(Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)))


def huge_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 60_000, 2_000_000])
def test_too_many_pixels_are_an_error_before_decoding(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(huge_png(side, side))
    with pytest.raises(OSError, match=r"bomb\.png"):
        read_image(path)


def test_the_pixel_limit_is_a_parameter(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (10, 10)))
    read_image(path, max_pixels=100)
    with pytest.raises(OSError, match="10 x 10 pixels are more than the 99 allowed"):
        read_image(path, max_pixels=99)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_an_error_with_the_path(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"cannot read the image .*broken\.png"):
        read_image(path)


def test_missing_files_and_folders_are_errors_with_the_path(tmp_path):
    with pytest.raises(OSError, match=r"missing\.png.*No such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(OSError, match=str(tmp_path)):
        read_image(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_or_device_is_an_error_and_no_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(OSError, match=f"{path}: it is a device or a pipe"):
            read_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_is_known_before_the_pixels(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.new("RGB", (30, 20)), f"image.{kind}", exif=exif)
    assert image_size(path) == tuple(read_image(path).shape[1:]) == ((30, 20) if orientation > 4 else (20, 30))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(OSError, match=f"cannot read the image {path}"):
        image_size(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_truncated_and_damaged_files_are_errors_or_images(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    whole, generator, path = buffer.getvalue(), random.Random(0), tmp_path / f"image.{kind}"
    for attempt in range(60):
        damaged = bytearray(whole)
        if attempt % 2:
            damaged = damaged[: generator.randrange(len(damaged))]
        else:
            for _ in range(3):
                damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            image = read_image(path, max_pixels=10**6)
        except OSError as error:
            assert str(path) in str(error)
        else:
            assert image.shape[0] == 3 and image.dtype == torch.uint8


def test_damaged_metadata_does_not_cost_the_picture(tmp_path):
    path = saved(tmp_path, Image.fromarray(RAMP), "image.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f broken")
    try:
        assert read_image(path).shape == (3, 6, 8)
    except OSError as error:
        assert str(path) in str(error)


# File names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "a/../../b.png",
        "/etc/passwd",
        "C:\\x.png",
        "..\\x.png",
        "\\\\host\\x.png",
        "\\x.png",
        "",
        "a\0b",
    ],
)
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(ValueError, match="relative path"):
        check_file_name(name)


def test_links_that_lead_elsewhere_are_refused(tmp_path):
    root, other = tmp_path / "images", tmp_path / "private"
    root.mkdir()
    other.mkdir()
    saved(other, Image.new("RGB", (2, 2)), "secret.png")
    saved(root, Image.new("RGB", (2, 2)), "fine.png")
    os.symlink(other / "secret.png", root / "link.png")
    os.symlink(other, root / "folder")
    os.symlink(root / "fine.png", root / "inside.png")
    for name in ("link.png", "folder/secret.png"):
        with pytest.raises(ValueError, match="leads out of the image folder"):
            file_inside(root, name)
    assert file_inside(root, "inside.png") == (root / "fine.png").resolve()


def test_the_image_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "images")
    saved(tmp_path / "real", Image.new("RGB", (2, 2)), "a.png")
    assert read_image(file_inside(tmp_path / "images", "a.png")).shape == (3, 2, 2)
