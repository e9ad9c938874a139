"""Two processes, one run: stopped or killed at any moment, both or one of them, and then resumed."""

from __future__ import annotations

import functools
import os
import random
import signal
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from many_processes import at_loss
from torch import Tensor
from training_runs import tiny_model

from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.training import checkpoint
from mrcnn_edu.training.distributed import Elsewhere
from torture.harness import Area
from torture.training import data, run

LOST = 3  # how a process ends that has lost the other one
PATIENCE = 100  # seconds until two processes that do not end count as hung
# What is sent, and to whom: Ctrl-C in a terminal goes to all, a batch system's or a person's kill to one as well.
SENT = [(signal.SIGINT, (0, 1)), (signal.SIGTERM, (1,)), (signal.SIGKILL, (1,)),
        (signal.SIGTERM, (0, 1)), (signal.SIGINT, (0,)), (signal.SIGKILL, (0,))]  # fmt: skip


def two_ranks(images: CocoDataset, out: Path, store: Path, sent: signal.Signals | None = None,
              to: tuple[int, ...] = (), share: float = 0.0, seconds: float = 0.0) -> list[int]:  # fmt: skip
    """How two processes end that train together; some are sent a signal after a share of their usual seconds."""
    begun, begins = os.pipe()
    children = [_started(rank, images, out, store, begins) for rank in (0, 1)]
    os.close(begins)
    waits = [os.read(begun, 1) for _ in children]  # nothing where one has ended before
    os.close(begun)
    if sent is not None and all(waits):
        time.sleep(share * seconds)
        for rank in to:
            os.kill(children[rank], sent)  # none is waited for yet, so its number is still its own
    return _ends(children)


def _started(rank: int, images: CocoDataset, out: Path, store: Path, begins: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        timeout = timedelta(seconds=PATIENCE)
        dist.init_process_group("gloo", f"file://{store}", timeout=timeout, rank=rank, world_size=2)
        model = at_loss(tiny_model(), 1, lambda _: os.write(begins, b".") and None)
        run(images, out, model)
        code = 0
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        code = error.code
    except (Elsewhere, ConnectionError):
        code = LOST
    finally:
        os._exit(code)


def _ends(children: list[int]) -> list[int]:
    ends: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE
    while len(ends) < len(children):
        for child in children:
            if child not in ends and (found := os.waitpid(child, os.WNOHANG))[0]:
                ends[child] = os.waitstatus_to_exitcode(found[1])
        if time.monotonic() > deadline:
            left = [child for child in children if child not in ends]
            for child in left:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise AssertionError(f"{len(left)} of {len(children)} processes hang")
        time.sleep(0.01)
    return [ends[child] for child in children]


@functools.cache
def undisturbed() -> tuple[dict[str, Tensor], float]:
    """The weights at the end of a run that is left alone, and the seconds it takes."""
    with tempfile.TemporaryDirectory() as folder:
        images, began = data(Path(folder)), time.monotonic()
        if two_ranks(images, Path(folder) / "run", Path(folder) / "store") != [0, 0]:
            raise AssertionError("two processes that are left alone fail")
        return checkpoint.load(Path(folder) / "run")[0]["model"], time.monotonic() - began


def case(number: int, folder: Path) -> str:
    """A signal to one or both; both end as documented, and resumed they come to the same weights, to the bit."""
    folder.mkdir()
    weights, seconds = undisturbed()
    images, (sent, to) = data(folder), SENT[number % len(SENT)]
    share = random.Random(number).uniform(0, 0.8)
    ends = two_ranks(images, folder / "run", folder / "store", sent, to, share, seconds)
    stopped = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: LOST}[sent]
    meant = [-9 if sent == signal.SIGKILL and rank in to else stopped for rank in (0, 1)]
    late = all(end in (0, one, -sent) for end, one in zip(ends, meant)) and 0 in ends  # one was at its end, or beyond
    if ends != meant and not late:
        raise AssertionError(f"{sent.name} to {to}: the processes ended with {ends}, not {meant}")
    if two_ranks(images, folder / "run", folder / "again") != [0, 0]:
        raise AssertionError("the run could not be resumed")
    end = checkpoint.load(folder / "run")[0]["model"]
    if different := [name for name, value in weights.items() if not torch.equal(value, end[name])]:
        raise AssertionError(f"after {sent.name} to {to} {different} differ")
    whom = "both" if len(to) == 2 else "one"
    return f"{sent.name} to {whom}, {'too late' if late else 'resumed'}: the same weights"


AREA = Area("ranks", "SIGINT, SIGTERM and SIGKILL to both or one of two processes, then resumed", case,
            short=3, full=60, seconds=3 * PATIENCE, memory=512, chunk=20)  # fmt: skip
