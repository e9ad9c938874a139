"""Image files: every kind that is read, and JPEG, PNG and WebP files with a few bytes changed, cut off or added."""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mrcnn_edu.data.images import image_size, read_image
from torture.harness import Area, refused

SIDE = (41, 53)  # px


@functools.cache
def good_files() -> list[bytes]:
    """A noisy picture in every form that the mutations begin with."""
    pixels = np.random.default_rng(0).integers(0, 256, (*SIDE, 3), dtype=np.uint8)
    picture = Image.fromarray(np.kron(pixels[::4, ::4], np.ones((4, 4, 1), np.uint8))[: SIDE[0], : SIDE[1]])
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    deep = Image.fromarray((np.arange(SIDE[0] * SIDE[1]).reshape(SIDE) * 29).astype(np.uint16))
    forms = [
        (picture, "JPEG", {}), (picture, "JPEG", {"progressive": True, "exif": exif}),
        (picture, "JPEG", {"quality": 1}), (picture.convert("L"), "JPEG", {}), (picture.convert("CMYK"), "JPEG", {}),
        (picture, "PNG", {}), (picture, "PNG", {"exif": exif}), (picture.quantize(16), "PNG", {}), (deep, "PNG", {}),
        (picture.convert("RGBA"), "PNG", {}), (picture.convert("LA"), "PNG", {}), (picture.convert("1"), "PNG", {}),
        (picture, "WEBP", {}), (picture, "WEBP", {"lossless": True, "exif": exif}),
        (picture.convert("RGBA"), "WEBP", {}),
    ]  # fmt: skip
    files = []
    for image, kind, options in forms:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


def mutated(draw: random.Random) -> bytes:
    """One of the good files with a few changes; a PNG at times with right checksums, so that the decoder sees them."""
    data = bytearray(draw.choice(good_files()))
    for _ in range(draw.choice([1, 1, 2, 4, 16])):
        place, how = draw.randrange(len(data)), draw.random()
        place = draw.randrange(min(len(data), 100)) if draw.random() < 0.4 else place  # headers matter most
        if how < 0.5:
            data[place] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
        elif how < 0.7:
            data[place] ^= 1 << draw.randrange(8)
        elif how < 0.8:
            data[place : place + 4] = struct.pack(">I", draw.choice([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1]))
        elif how < 0.9:
            del data[place : place + draw.choice([1, 4, 100, len(data)])]
        else:
            data[place:place] = data[draw.randrange(len(data) + 1) :][:200]
        if not data:
            break
    return _checked(data) if draw.random() < 0.5 else bytes(data)


def _checked(data: bytearray) -> bytes:
    """A PNG with the checksums of its chunks put right, as far as they can be followed."""
    place = 8
    while data[:4] == b"\x89PNG" and place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        end = place + 8 + length
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[place + 4 : end]))
        place = end + 4
    return bytes(data)


@functools.cache
def bombs() -> dict[str, bytes]:
    """Small files that claim to be large, or grow while they are read."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(width: int, height: int, *extra: bytes) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        body = b"".join(extra) + chunk(b"IDAT", zlib.compress(b"\0" * 10_000)) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body

    stream, million = zlib.compressobj(), bytes(1_000_000)
    megabytes = b"".join(stream.compress(million) for _ in range(300)) + stream.flush()
    jpeg = bytearray(good_files()[0])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    return {
        "60000 x 60000 PNG": png(60_000, 60_000),
        "two thousand million pixels wide": png(2**31 - 1, 1),
        "a text that grows": png(8, 8, chunk(b"zTXt", b"note\0\0" + megabytes)),
        "a colour profile that grows": png(8, 8, chunk(b"iCCP", b"profile\0\0" + megabytes)),
        "pixels that grow": png(8, 8)[:33] + chunk(b"IDAT", megabytes) + chunk(b"IEND", b""),
        "65500 x 65500 JPEG": bytes(jpeg),
        "65535 x 65535 GIF": b"GIF89a\xff\xff\xff\xff\x80\0\0" + b"\0" * 6 + b",\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;",
        "2^31 x 2^31 BMP": b"BM" + struct.pack("<IHHI", 100, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0),
        "10^9 x 10^9 PPM": b"P6 1000000000 1000000000 255\n" + b"\0" * 100,
    }  # fmt: skip


def case(number: int, folder: Path) -> str:
    """One file: an image, or an error with its path; bombs first, then mutations."""
    folder.mkdir()
    named = list(bombs().values()) if number < 9 else []
    path = folder / "image.bin"
    path.write_bytes(named[number] if number < len(named) else mutated(random.Random(number)))
    sizes, words = [], []
    for look in (read_image, image_size):
        try:
            found = look(path)
        except OSError as error:
            words.append(refused(error))
            if str(path) not in str(error):
                raise AssertionError(f"an error without the path: {error}") from error
        else:
            words.append("read")
            sizes.append(found if isinstance(found, tuple) else tuple(found.shape[1:]))
            if isinstance(found, torch.Tensor) and (found.dtype != torch.uint8 or found.shape[0] != 3):
                raise AssertionError(f"{found.dtype} {list(found.shape)}")
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        if sizes[0] != sizes[1][::-1]:
            raise AssertionError(f"read as {sizes[0]}, said to be {sizes[1]}")
        return "read, the orientation behind the pixels"
    return words[0]


AREA = Area(
    "images",
    "JPEG, PNG and WebP files changed at random, and bombs",
    case,
    short=400,
    full=10_009,
    memory=1024,
    chunk=500,
)
