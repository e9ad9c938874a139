"""Several processes, one run: who they are, and how they decide, fail and stop together.

Chapter 19 (many GPUs). Paper: Section 3.1 (8 GPUs with 2 images each).

torchrun starts the processes and tells each by environment variables who it is; DDP averages their gradients. What is
left is agreement. A process that leaves the loop alone, because its image is damaged, its loss not finite or a signal
has come, leaves the others waiting for it. So whatever can go wrong in one process is done ``together``: afterwards
all of them know, and all go on or none does.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mrcnn_edu.training.stopping import Stopped

TIMEOUT = timedelta(minutes=10)  # how long a process waits for one that hangs; one that dies is noticed at once
PATIENCE = timedelta(hours=3)  # the same where the first process works alone: writing, counting AP
FAILED = 1000  # above the number of any signal

# How gloo and NCCL say that the other end of a connection is gone.
LOST = re.compile(r"closed by peer|reset by peer|broken pipe|connection refused|timed out|remote process exited", re.I)


class Elsewhere(OSError):
    """Another process of this run failed, which tells of it itself, and this one ends with it."""


@dataclass(frozen=True, eq=False)
class World:
    """The processes of a run; by default this one alone, and then nothing here costs anything.

    rank        the number of this process, 0 to size - 1; process 0 alone writes and prints
    size        how many there are
    local_rank  its number on its host, which is that of its GPU
    quick       a group for agreements ...
    patient     ... and one for what may take long; both exchange by gloo, on the CPU
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    quick: dist.ProcessGroup | None = None
    patient: dist.ProcessGroup | None = None

    @contextmanager
    def together(self, patiently: bool = False) -> Iterator[None]:
        """A block that succeeds in every process or in none.

        When a process leaves it by an error, it raises that error and the others ``Elsewhere``, which quotes it; when
        one leaves it by ``Stopped``, so do all. Every process must enter the block; inside, none may wait for another.
        """
        if self.size == 1:
            yield
            return
        problem: BaseException | None = None
        try:
            yield
        except (Exception, Stopped) as error:
            problem = error
        code = FAILED if isinstance(problem, Exception) else problem.signal if problem is not None else 0
        verdict = torch.tensor([code])
        dist.all_reduce(verdict, dist.ReduceOp.MAX, group=self.patient if patiently else self.quick)
        if verdict.item() == FAILED:
            self._fail(problem if code == FAILED else None)
        elif verdict.item():
            raise Stopped(signal.Signals(verdict.item())) from None

    def _fail(self, problem: Exception | None) -> None:
        told = None if problem is None else str(problem) or type(problem).__name__
        messages = self.gather(told)
        first = next(rank for rank, message in enumerate(messages) if message is not None)
        if first == self.rank:
            raise problem
        raise Elsewhere(f"process {first} of {self.size} failed: {messages[first]}") from None

    def gather(self, value: Any) -> list[Any]:
        """What every process has, by rank, on every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.patient)
        return values

    def to_first(self, value: Any) -> list[Any]:
        """What every process has, by rank, on process 0; nothing on the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self.patient)
        return values or []

    def from_first(self, work: Callable[[], Any]) -> Any:
        """What process 0 gets by doing the work, on every process; an error there is one everywhere."""
        if self.size == 1:
            return work()
        result = [None]
        with self.together(patiently=True):
            if self.rank == 0:
                result = [work()]
        dist.broadcast_object_list(result, src=0, group=self.patient)
        return result[0]

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Numbers averaged over the processes; all must have the same names, in the same order."""
        if self.size == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(total, group=self.quick)
        return dict(zip(values, (total / self.size).tolist()))

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the first one's statistics of batch norms: each has gathered them on images of its own."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)


ALONE = World()


@contextmanager
def connected(device: torch.device | str | None = None) -> Iterator[World]:
    """This process's ``World``: torchrun's, that of an already initialised ``torch.distributed``, or it alone.

    device  where the gradients are: NCCL carries them between GPUs, gloo between CPUs; None: GPUs if there are any

    A process that is lost meanwhile is a ConnectionError that says so in one sentence.
    """
    mine = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if mine:
        gpu = torch.cuda.is_available() and (device is None or str(device).startswith("cuda"))
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=TIMEOUT, **_meeting_place())
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield ALONE
        return
    rank, size = dist.get_rank(), dist.get_world_size()
    quick, patient = (dist.new_group(backend="gloo", timeout=timeout) for timeout in (TIMEOUT, PATIENCE))
    with told_of_loss(rank, size):
        yield World(rank, size, int(os.environ.get("LOCAL_RANK", rank)), quick, patient)
    if mine:  # not after an error, where it could wait for processes that are gone
        dist.destroy_process_group()


def _meeting_place() -> dict[str, Any]:
    """Where the processes find each other: as the environment says, with keys of their own for each of their lives.

    torchrun's own store outlives them. Where it is shared with them, those that were started again would find the
    addresses of the dead. (Several hosts count lives differently: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives them
    a new store each time.)
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    size = int(os.environ["WORLD_SIZE"])
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store = dist.TCPStore(*place, size, is_master=False, timeout=TIMEOUT)
    life = dist.PrefixStore(f"life {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": life, "rank": int(os.environ["RANK"]), "world_size": size}


@contextmanager
def told_of_loss(rank: int, size: int) -> Iterator[None]:
    """Turn what gloo and NCCL say about a process that is gone into one sentence."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or LOST.search(str(error)):
            reason = re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0])[:100]  # without the place in gloo's source
            raise ConnectionError(
                f"process {rank} of {size} has lost another one, which was killed, failed or hangs; "
                f"look for its message above ({reason})"
            ) from error
        raise


def restarted() -> bool:
    """Whether torchrun has started this process again after a failure (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
