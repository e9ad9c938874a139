"""kill -9 at random moments: no acknowledged checkpoint may be lost, no torn one loaded, no weight come out different.

The tests run this with a handful of kills, ``python tests/kill_runs.py saving <folder> 10``; in full it is

    PYTHONPATH=. python tests/kill_runs.py saving  /tmp/saving   50    # while a checkpoint is written
    PYTHONPATH=. python tests/kill_runs.py training /tmp/training 50   # anywhere in training, from start to resumption
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from training_runs import datasets, tiny_model, with_train

from mrcnn_edu.data.shapes import write
from mrcnn_edu.training import checkpoint
from mrcnn_edu.training.loop import train


def kill_while_saving(folder: Path, kills: int) -> None:
    """A child saves as fast as it goes and acknowledges each checkpoint through a pipe; then it is killed."""
    generator = random.Random(0)
    for _ in range(kills):
        for path in folder.iterdir():
            path.unlink()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(folder, writer)
        os.close(writer)
        acknowledged = os.read(reader, 100)  # waits for the first
        time.sleep(generator.uniform(0, 0.1))
        kill(child)
        while more := os.read(reader, 100_000):
            acknowledged += more
        os.close(reader)
        state, _ = checkpoint.load(folder)
        if state["iteration"] < int(acknowledged.split()[-1]):
            raise SystemExit(f"lost: {acknowledged.split()[-1]} was acknowledged, {state['iteration']} is left")
        if not torch.equal(state["model"], torch.full((500_000,), float(state["iteration"]))):
            raise SystemExit(f"torn: checkpoint {state['iteration']}")
    checkpoint.save(folder, {"iteration": 100_001})
    if list(folder.glob("*.tmp")):
        raise SystemExit("temporary files are left")


def save_for_ever(folder: Path, pipe: int) -> None:
    """Checkpoints of 2 MB, one after the other."""
    parts = dict.fromkeys(checkpoint.PARTS) | {"format": checkpoint.FORMAT}
    for iteration in range(1, 100_000):
        content = {"iteration": iteration, "model": torch.full((500_000,), float(iteration))}
        checkpoint.save(folder, parts | content)
        os.write(pipe, f"{iteration} ".encode())


def kill_while_training(folder: Path, kills: int) -> None:
    """A run that is killed at random moments and resumed each time, beside one that is left alone."""
    import torch._dynamo

    write(folder / "data", train=5, val=1, size=64, seed=1)
    data, _ = datasets(folder / "data")
    config, generator, killed = with_train(iterations=3 * kills, checkpoint_every=1), random.Random(0), 0

    def run(out: Path) -> None:
        train(config, tiny_model(), data, None, out, resume=True, progress=False, device="cpu")

    while killed < kills:
        child = os.fork()
        if child == 0:
            run(folder / "killed")
            os._exit(0)
        time.sleep(generator.uniform(0, 1.0))
        killed += kill(child)
        reached = [checkpoint.iteration_of(path) for path in checkpoint.checkpoints(folder / "killed")]
        if reached and reached[0] == config.train.iterations:
            break
    for name in ("killed", "undisturbed"):
        if (child := os.fork()) == 0:
            run(folder / name)
            os._exit(0)
        os.waitpid(child, 0)
    ends = [checkpoint.load(folder / name)[0] for name in ("killed", "undisturbed")]
    different = [name for name, value in ends[0]["model"].items() if not torch.equal(value, ends[1]["model"][name])]
    if different or ends[0]["iteration"] != config.train.iterations:
        raise SystemExit(f"after {killed} kills iteration {ends[0]['iteration']} differs in {different[:3]}")
    print(f"killed {killed} times on the way to iteration {config.train.iterations}: the same weights to the bit")


def kill(child: int) -> bool:
    """SIGKILL; whether the process was still running."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


if __name__ == "__main__":
    what, where, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    where.mkdir(parents=True, exist_ok=True)
    {"saving": kill_while_saving, "training": kill_while_training}[what](where, count)
    print(f"{what}: {count} kills, nothing lost")
