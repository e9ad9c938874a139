"""Checkpoints under kill -9, on full disks, with flipped bits and cut off: none that was acknowledged is lost.

Before each case the folder holds two checkpoints. Whatever happens then, what is loaded must be whole, unaltered, and
not older than the last one that ``save`` returned from; where the newest is damaged, the older one with a message.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from mrcnn_edu.training import checkpoint
from torture.harness import Area

NUMBERS = 100_000  # of float32 in a checkpoint, so 400 kB
STEPS = ("open", "fsync", "replace", "folder")  # what can fail while a file is written, beside the writing itself


def content(iteration: int) -> dict:
    """A checkpoint's parts, of which the model says which one it is."""
    parts = dict.fromkeys(checkpoint.PARTS) | {"format": checkpoint.FORMAT}
    return parts | {"iteration": iteration, "model": torch.full((NUMBERS,), float(iteration))}


def loaded(folder: Path) -> int:
    """The iteration of what ``load`` gives; AssertionError when it is torn."""
    state, path = checkpoint.load(folder)
    if not torch.equal(state["model"], content(state["iteration"])["model"]):
        raise AssertionError(f"{path.name} was loaded, but is not what was saved")
    return state["iteration"]


def two(folder: Path) -> list[Path]:
    """A folder with the checkpoints 1 and 2; the newer first."""
    folder.mkdir(parents=True, exist_ok=True)
    for iteration in (1, 2):
        checkpoint.save(folder, content(iteration))
    return checkpoint.checkpoints(folder)


def kill(number: int, folder: Path) -> str:
    """A child saves as fast as it goes and says so through a pipe, until it is killed at a random moment."""
    two(folder)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for iteration in range(3, 100_000):
                checkpoint.save(folder, content(iteration))
                os.write(writer, f"{iteration} ".encode())
        finally:
            os._exit(1)
    os.close(writer)
    acknowledged = os.read(reader, 100)  # waits for the first
    time.sleep(random.Random(number).uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reader, 100_000):
        acknowledged += more
    os.close(reader)
    last, left = int(acknowledged.split()[-1]), list(folder.glob(".*.tmp"))
    found = loaded(folder)
    if found < last:
        raise AssertionError(f"{last} was acknowledged, {found} is left")
    checkpoint.save(folder, content(found + 1))
    if list(folder.glob(".*.tmp")) or loaded(folder) != found + 1:
        raise AssertionError("the next save does not clean up")
    return "killed while writing" if left else "killed after a rename" if found > last else "killed between two"


def full_disk(number: int, folder: Path) -> str:
    """No room: at a random byte by the kernel's word, in a step of its own, or on a file system that is really full."""
    before = two(folder)
    kind = ("limit", "step", "disk")[number % 3]
    if kind == "disk":
        return _small_disk(folder / "disk")
    fails = _limited(number) if kind == "limit" else _failing(STEPS[number // 3 % len(STEPS)])
    with fails:
        try:
            checkpoint.save(folder, content(3))
            raise AssertionError("saved without room")
        except OSError as error:
            if "checkpoint-00000003" not in str(error) or error.errno not in (errno.ENOSPC, errno.EFBIG):
                raise AssertionError(f"an unclear error: {error!r}") from error
    found = loaded(folder)
    late = kind == "step" and STEPS[number // 3 % len(STEPS)] == "folder"  # the file was whole and in place by then
    if found != (3 if late else 2) or list(folder.glob(".*.tmp")):
        raise AssertionError(f"{found} is left, with {os.listdir(folder)}")
    if not late and checkpoint.checkpoints(folder) != before:
        raise AssertionError("another checkpoint is missing")
    return f"no room ({kind}), the older one loaded" if not late else "no room (folder), the new one loaded"


@contextmanager
def _limited(number: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (random.Random(number).randrange(4 * NUMBERS), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def _failing(step: str) -> Iterator[None]:
    """One step of writing a file fails for want of room."""
    full, calls = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), []

    def second(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise full

    where = {"open": "builtins.open", "fsync": "os.fsync", "replace": "os.replace", "folder": "os.fsync"}[step]
    with mock.patch(where, second if step == "folder" else mock.Mock(side_effect=full)):
        yield


def _small_disk(folder: Path) -> str:
    """A file system of 1.5 MB, on which two checkpoints have room and a third has not; needs the right to mount one."""
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1M", "torture", str(folder)], capture_output=True
        ).returncode
    )
    if not mounted:
        return "no room (disk) not tried, mounting is not allowed"
    try:
        two(folder)
        for iteration in (3, 4):
            try:
                checkpoint.save(folder, content(iteration))
                raise AssertionError("saved without room")
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        if loaded(folder) != 2 or len(os.listdir(folder)) != 2:
            raise AssertionError(f"{loaded(folder)} is left, with {os.listdir(folder)}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    return "no room (disk), the older one loaded"


def damage(number: int, folder: Path) -> str:
    """The newest with a flipped bit, or cut off, or longer: the older one is taken, and that is said."""
    newest, _ = two(folder)
    draw, data = random.Random(number), bytearray(newest.read_bytes())
    kind = ("bit", "cut", "longer")[0 if number % 5 < 3 else number % 5 - 2]
    if kind == "bit":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[draw.randrange(len(data)) :]
    else:
        data += draw.randbytes(draw.randrange(1, 5000))
    newest.write_bytes(data)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    checkpoint.log.addHandler(handler)
    try:
        found = loaded(folder)
    finally:
        checkpoint.log.removeHandler(handler)
    if found != 1 or not any(str(newest) in sentence and "damaged" in sentence for sentence in said):
        raise AssertionError(f"{kind}: {found} was loaded, said was {said}")
    return f"{kind}, the older one loaded"


KILLS = Area("kills", "kill -9 while a checkpoint is saved", kill, short=25, full=1000, chunk=25)
FULL_DISKS = Area("full disks", "no room while a checkpoint is saved", full_disk, short=24, full=300, chunk=30)
DAMAGE = Area("damage", "checkpoints with one bit flipped, cut off, or longer", damage, short=25, full=500, chunk=50)
