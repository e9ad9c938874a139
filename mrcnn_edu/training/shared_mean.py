"""Gradients averaged in memory that all processes of a machine see.

Chapter 19 (many GPUs). Paper: Section 3.1 (8 GPUs with 2 images each).

Without GPUs, DDP sends gradients through sockets even to the next process, which takes a small model a fifteenth of its
step. On one machine each process can write them where the others read: half the time and, since they are added up by
rank and not by who was first, the same bits however DDP has parted them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mrcnn_edu.training.distributed import World

MEMORY = Path("/dev/shm")  # on Linux a folder that is memory


class SharedMean:
    """What DDP is to do with a bucket of gradients: the hook is ``average``, this its state.

    Two areas take turns. Whoever writes into one again has met all others at the other one since, so they have read it.
    """

    def __init__(self, world: World, areas: torch.Tensor) -> None:
        self.world, self.areas, self.turn = world, areas, 0  # areas [2, processes, numbers] float32, shared

    def average(self, bucket):  # without types: DDP compares them, and those of this file are text
        gradients = bucket.buffer()
        area = self.areas[self.turn % 2, :, : len(gradients)]
        self.turn += 1
        area[self.world.rank] = gradients
        dist.barrier(group=self.world.quick)
        gradients.copy_(area[0])
        for row in area[1:]:
            gradients += row
        gradients /= self.world.size
        done = torch.futures.Future()
        done.set_result(gradients)
        return done


def share_gradients(replica: DistributedDataParallel, world: World) -> bool:
    """Let DDP average in shared memory where all processes are on this machine, and it has room; whether it does."""
    numbers = sum(parameter.numel() for parameter in replica.parameters() if parameter.requires_grad)
    wanted = os.environ.get("LOCAL_WORLD_SIZE") == str(world.size) and _fits(replica)
    path = world.from_first(lambda: _reserve(2 * world.size * numbers * 4) if wanted else None)
    if path is None:
        return False
    with world.together():
        areas = torch.from_file(path, shared=True, size=2 * world.size * numbers).view(2, world.size, numbers)
    if world.rank == 0:
        os.unlink(path)  # all have it by now, and keep the memory as long as they live
    replica.register_comm_hook(SharedMean(world, areas), SharedMean.average)
    return True


def _fits(model: nn.Module) -> bool:
    return all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def _reserve(size: int) -> str | None:
    """A file of so many bytes of memory; None where there is no such memory, or too little."""
    try:
        descriptor, path = tempfile.mkstemp(dir=MEMORY)
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, size)  # else writing into memory that is not there would be a crash
    except OSError:
        os.unlink(path)
        return None
    finally:
        os.close(descriptor)
    return path
