"""Fifty files made to do harm: to read or write elsewhere, to run code, or to ask for all the memory there is.

Each is handed to everything that reads files of its kind. Around it stand a picture that nobody may read, and a folder
in which nothing may appear; what a file would run leaves a mark there.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from training_runs import tiny_model

from mrcnn_edu.data.coco import Category, CategoryMap, CocoDataset
from mrcnn_edu.data.images import read_image
from mrcnn_edu.training import checkpoint
from mrcnn_edu.training.export import export_weights, load_model
from mrcnn_edu.training.proposals import SavedProposals
from mrcnn_edu.unpickling import read_weights
from torture.harness import Area, refused

# ---------------------------------------------------------------------------------------------------------------------
# Names that lead elsewhere
# ---------------------------------------------------------------------------------------------------------------------

Attack = Callable[[Path], str | None]  # a word where it was refused; an error of ours says the same

NAMES = ["../secret.png", "a/../../secret.png", "{outside}/secret.png", "./../secret.png", "sub/../../secret.png",
         "..\\secret.png", "C:\\secret.png", "\\\\host\\share\\secret.png", "//{outside}/secret.png",
         "/proc/self/environ", "secret\0.png", "link.png", "linked/secret.png", "loop.png", "%2e%2e/secret.png",
         "..%2fsecret.png", "file://{outside}/secret.png", "~/secret.png", "fifo",
         "https://localhost/secret.png"]  # fmt: skip


def named(name: str) -> Attack:
    """A COCO file whose image has this name, opened both ways."""

    def attack(folder: Path) -> None:
        images, outside = folder / "images", folder / "outside"
        for path in (images / "sub", images / "a"):
            path.mkdir(parents=True)
        (images / "link.png").symlink_to(outside / "secret.png")
        (images / "linked").symlink_to(outside)
        (images / "loop.png").symlink_to(images / "loop.png")
        os.mkfifo(images / "fifo")
        entry = {"id": 1, "file_name": name.replace("{outside}", str(outside)), "height": 4, "width": 4}
        content = {"images": [entry], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
        file = folder / "truth.json"
        file.write_text(json.dumps(content))
        lenient = CocoDataset(images, file, strict=False)
        if len(lenient):
            raise AssertionError(f"lenient reading keeps {name!r}")
        CocoDataset(images, file)[0]

    return attack


# ---------------------------------------------------------------------------------------------------------------------
# Pickles and archives
# ---------------------------------------------------------------------------------------------------------------------


class Call:
    """Pickles to a call of any function."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def marks(folder: Path) -> list[Any]:
    """Objects that, where a pickle is trusted, make a folder or a file ``outside``."""
    mark = str(folder / "outside" / "mark")
    import subprocess

    return [
        Call(os.mkdir, mark), Call(os.system, f"touch {mark}"), Call(eval, f"__import__('os').mkdir({mark!r})"),
        Call(exec, f"open({mark!r}, 'w')"), Call(open, mark, "w"), Call(subprocess.check_output, ["touch", mark]),
        Call(os.symlink, "/etc", mark), {"model": Call(os.mkdir, mark)}, {"model": {"w": Call(os.mkdir, mark)}},
    ]  # fmt: skip


def everything(path: Path) -> str:
    """Hand a file to every reader of weights, checkpoints and proposals; each has to refuse it."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    forged = path.with_name(f"checkpoint-00000001-{digest}.pt")
    forged.write_bytes(path.read_bytes())
    accepted = []
    for read in (read_weights, load_model, SavedProposals, read_image, checkpoint.read):
        for place in (path, path.with_suffix(".pkl"), path.with_suffix(".pth"), forged):
            if not place.exists():
                place.write_bytes(path.read_bytes())
            try:
                read(place)
                accepted.append((read.__name__, place.name))
            except Exception as error:
                refused(error)
    if accepted:
        raise AssertionError(f"read without complaint by {accepted}")
    return "refused by every reader"


def pickled(number: int, protocol: int) -> Attack:
    """One of ``marks`` as a bare pickle."""

    def attack(folder: Path) -> str:
        path = folder / "weights.bin"
        path.write_bytes(pickle.dumps(marks(folder)[number], protocol))
        return everything(path)

    return attack


def saved(number: int, zipped: bool) -> Attack:
    """One of ``marks`` as torch.save writes it."""

    def attack(folder: Path) -> str:
        path = folder / "weights.bin"
        torch.save(marks(folder)[number], path, _use_new_zipfile_serialization=zipped)
        return everything(path)

    return attack


def raw(data: bytes) -> Attack:
    """These very bytes."""

    def attack(folder: Path) -> str:
        path = folder / "weights.bin"
        path.write_bytes(data)
        return everything(path)

    return attack


def archive(change: Callable[[str, bytes], tuple[str, list[bytes]]]) -> Attack:
    """A file of torch.save whose members were changed and are now compressed."""

    def attack(folder: Path) -> None:
        buffer = io.BytesIO()
        torch.save({"model": {"w": torch.zeros(1000)}}, buffer)
        path = folder / "weights.bin"
        with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for member in old.infolist():
                name, pieces = change(member.filename, old.read(member))
                with new.open(name, "w") as file:
                    for piece in pieces:
                        file.write(piece)
        return everything(path)

    return attack


def tar(kind: bytes, name: str, target: str) -> Attack:
    """A tar archive, which torch.load once unpacked, with a member that leads out of it."""

    def attack(folder: Path) -> str:
        path, outside = folder / "weights.bin", str(folder / "outside")
        with tarfile.open(path, "w") as file:
            for member_name in (name, "tensors", "pickle", "sys_info"):
                member = tarfile.TarInfo(member_name.replace("{outside}", outside))
                if member_name == name:
                    member.type, member.linkname = kind, target.replace("{outside}", outside)
                member.size = 4 if member.type == tarfile.REGTYPE else 0
                file.addfile(member, io.BytesIO(b"evil") if member.size else None)
        return everything(path)

    return attack


def tensors(header: dict | bytes, length: int | None = None) -> Attack:
    """A safetensors file with this header, which may lie about its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return raw(struct.pack("<Q", len(text) if length is None else length) + text + bytes(64))


def huge_model(folder: Path) -> None:
    """A small file that describes a model of thousands of millions of weights."""
    path = export_weights(tiny_model(), folder / "good.safetensors", CategoryMap(tuple(
        Category(i, f"class {i}") for i in range(1, 7))))  # fmt: skip
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    config = json.loads(header["__metadata__"]["config"])
    config["backbone"]["width"], config["box"]["fc"] = 2**20, [2**30, 2**30]
    header["__metadata__"]["config"] = json.dumps(config)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    load_model(path)


def strange_tensors(kind: str) -> Attack:
    """A checkpoint whose weights have the right names, shapes and types, but are no ordinary tensors."""

    def attack(folder: Path) -> None:
        folder = folder / "run"
        folder.mkdir()
        model = torch.nn.Linear(3, 3)
        make = {"meta": lambda w: w.to("meta"), "sparse": lambda w: w.to_sparse()}[kind]
        state = {name: make(value) for name, value in model.state_dict().items()}
        content = dict.fromkeys(checkpoint.PARTS) | {"format": checkpoint.FORMAT, "iteration": 1, "model": state}
        read = checkpoint.read(checkpoint.save(folder, content))
        checkpoint.check_state(model.state_dict(), read["model"], "the checkpoint")

    return attack


def bomb(member: str, start: bytes, then: bytes) -> Callable[[str, bytes], tuple[str, list[bytes]]]:
    """Two hundred million bytes in place of one member."""
    return lambda name, old: (name, [start, *[then * 1_000_000] * 200] if name.endswith(member) else [old])


ATTACKS: dict[str, Attack] = {
    **{f"name {name}": named(name) for name in NAMES},
    **{f"pickle {number}": pickled(number, 2 + number % 3) for number in range(9)},
    **{f"torch.save {number}": saved(number, zipped=number % 2 == 0) for number in range(6)},
    "pickle, memo of 2^27 places": raw(b"\x80\x04}r" + struct.pack("<I", 2**27) + b"."),
    "pickle, 2^40 bytes": raw(b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc."),
    "pickle, a number of 2^31 digits": raw(b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"abc."),
    "pickle, nesting": raw(b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b"."),
    "pickle, an extension": raw(b"\x80\x04\x82\x01."),
    "pickle, a dotted name": raw(b"\x80\x04\x8c\x05numpy\x8c\x0fdtype.__class__\x93."),
    "zip, a large program": archive(bomb("data.pkl", b"\x80\x02]", b"N")),
    "zip, large weights": archive(bomb("data/0", b"", b"\0")),
    "zip, names that lead out": archive(lambda name, data: (f"../../outside/{name}", [data])),
    "tar, a link out": tar(tarfile.SYMTYPE, "storages", "{outside}/secret.png"),
    "tar, a file out": tar(tarfile.REGTYPE, "../outside/mark", ""),
    "tar, an absolute file": tar(tarfile.REGTYPE, "{outside}/mark", ""),
    "safetensors, a header of 2^62 bytes": tensors({}, 2**62),
    "safetensors, a tensor of 2^60 numbers": tensors(
        {"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 64]}}
    ),
    "safetensors, a negative shape": tensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 64]}}),
    "safetensors, beyond the end": tensors({"a": {"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}}),
    "safetensors, nesting": tensors(b'{"a":' + b"[" * 100_000),
    "a model of thousands of millions of weights": huge_model,
    "a checkpoint of tensors without data": strange_tensors("meta"),
    "a checkpoint of sparse tensors": strange_tensors("sparse"),
}


def case(number: int, folder: Path) -> str:
    """One attack: refused in our own words, with nothing read, written or run elsewhere."""
    outside = folder / "outside"
    outside.mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(outside / "secret.png")
    before = _tree(folder.parent)
    name, attack = list(ATTACKS.items())[number]
    try:
        word = attack(folder)
    except Exception as error:
        word = refused(error)
    if word is None:
        raise AssertionError(f"{name}: accepted")
    new = [path for path in _tree(folder.parent) - before if not path.is_relative_to(folder)]
    if os.listdir(outside) != ["secret.png"] or new:
        raise AssertionError(f"{name}: left {os.listdir(outside)} and {new}")
    return word


def _tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


AREA = Area(
    "attacks", "files that would read, write or run something elsewhere, or take all memory", case,
    short=len(ATTACKS), full=len(ATTACKS), memory=128, chunk=10,
)  # fmt: skip
