"""kill -9 at random moments: no acknowledged checkpoint may be lost, no torn one loaded, no weight come out different.

The tests run this with a handful of kills. In full, with the figures in benchmarks/results, it is

    PYTHONPATH=. python tests/kill_runs.py saving 50 --record              checkpoints of 2 MB, one after the other
    PYTHONPATH=. python tests/kill_runs.py training 50 --world 2 --record  anywhere in training, its start included
    PYTHONPATH=. python tests/kill_runs.py writing 50 --world 2 --record   in training, while a checkpoint is written

Of two processes one or both are killed; one that is left must end by itself, or by SIGTERM, which torchrun would send.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training_runs import datasets, tiny_model, with_train

from mrcnn_edu.config import Config
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.shapes import write
from mrcnn_edu.training import checkpoint
from mrcnn_edu.training.loop import train

ALONE_FOR = 10  # seconds that a process which has lost another one has before SIGTERM ...
HUNG = 60  # ... and before it counts as hung
STEPS = 3  # checkpoints that a life may reach before it is killed
DAMAGED = 7  # exit status of a process that was told of the loss of another one


def kill_while_saving(folder: Path, kills: int, _: int) -> dict[str, Any]:
    """A child saves as fast as it goes and acknowledges each checkpoint through a pipe; then it is killed."""
    generator, torn = random.Random(0), 0
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
        state = not_lost(folder, last_number(acknowledged + rest(reader)))
        torn += bool(list(folder.glob("*.tmp")))
        if not torch.equal(state["model"], torch.full((500_000,), float(state["iteration"]))):
            raise SystemExit(f"torn: checkpoint {state['iteration']}")
    checkpoint.save(folder, {"iteration": 100_001})
    if list(folder.glob("*.tmp")):
        raise SystemExit("temporary files are left")
    return {"kills": kills, "half-written files": torn}


def save_for_ever(folder: Path, pipe: int) -> None:
    """Checkpoints of 2 MB, one after the other."""
    parts = dict.fromkeys(checkpoint.PARTS) | {"format": checkpoint.FORMAT}
    for iteration in range(1, 100_000):
        content = {"iteration": iteration, "model": torch.full((500_000,), float(iteration))}
        checkpoint.save(folder, parts | content)
        os.write(pipe, f"{iteration} ".encode())


def kill_while_training(folder: Path, kills: int, world: int) -> dict[str, Any]:
    """Kill a run anywhere."""
    return kill_a_run(folder, kills, world, writing=False)


def kill_while_writing(folder: Path, kills: int, world: int) -> dict[str, Any]:
    """Kill a run when it has begun to write a checkpoint."""
    return kill_a_run(folder, kills, world, writing=True)


def kill_a_run(folder: Path, kills: int, world: int, writing: bool) -> dict[str, Any]:
    """A run that is killed at random moments and resumed each time, beside one that is left alone.

    Whatever is found after a kill must be, all of it, what the other run had at that iteration.
    """
    import torch._dynamo  # noqa: F401, seconds that PyTorch would otherwise take in the first step of every child

    write(folder / "data", train=5, val=1, size=64, seed=1)
    data, _ = datasets(folder / "data")
    config = with_train(iterations=(STEPS + 2) * kills, checkpoint_every=1)
    began = time.monotonic()
    lives, reader = start(config, data, folder / "undisturbed", world)
    while not checkpoint.checkpoints(folder / "undisturbed"):
        time.sleep(0.01)
    setting_up = time.monotonic() - began
    told = rest(reader)
    if [os.waitpid(life, 0)[1] for life in lives] != [0] * world:
        raise SystemExit("the undisturbed run failed")
    digests = dict(line.split() for line in told.decode().splitlines())
    step = (time.monotonic() - began - setting_up) / config.train.iterations

    generator, run = random.Random(0), folder / "killed"
    found = {"kills": 0, "before the first step": 0, "half-written files": 0, "processes left": 0, "needed SIGTERM": 0,
             "longest until they ended, s": 0.0}  # fmt: skip
    while found["kills"] < kills:
        at = progress(run)
        lives, reader = start(config, data, run, world)
        wait_for_the_moment(run, at, generator, writing, setting_up, step)
        victims = generator.choice([lives[:1], lives[-1:], lives])
        gone = [kill(life) for life in victims]
        left = [life for life in lives if life not in victims]
        seconds, terminated = wait_for_the_end(left)
        lines = rest(reader).decode().splitlines()
        state = not_lost(run, int(lines[-1].split()[0]) if lines else at)
        if state is not None and digest(state) != digests[str(state["iteration"])]:
            raise SystemExit(f"iteration {state['iteration']} is not that of the undisturbed run")
        found["kills"] += any(gone)
        found["before the first step"] += not lines
        found["half-written files"] += bool(list(run.glob(".checkpoint-*.tmp")))
        found["processes left"] += len(left)
        found["needed SIGTERM"] += terminated
        found["longest until they ended, s"] = max(found["longest until they ended, s"], round(seconds, 1))
    lives, reader = start(config, data, run, world)
    rest(reader)
    if [os.waitpid(life, 0)[1] for life in lives] != [0] * world:
        raise SystemExit("the run could not be finished")
    state = not_lost(run, config.train.iterations)
    if digest(state) != digests[str(config.train.iterations)] or list(run.glob(".checkpoint-*.tmp")):
        raise SystemExit(f"after {found['kills']} kills the last checkpoint differs, or temporary files are left")
    return found | {"iterations": config.train.iterations, "world": world}


def start(config: Config, data: CocoDataset, out: Path, world: int) -> tuple[list[int], int]:
    """Fork the processes of a run; and a pipe with a line for each checkpoint that is written: iteration, digest."""
    reader, writer = os.pipe()
    store = out.parent / f"store-{time.monotonic_ns()}"
    lives = []
    for rank in range(world):
        life = os.fork()
        if life == 0:
            os.close(reader)
            live(config, data, out, rank, world, store, writer)
        lives.append(life)
    os.close(writer)
    return lives, reader


def live(config: Config, data: CocoDataset, out: Path, rank: int, world: int, store: Path, pipe: int) -> None:
    """Train to the end, in a process of its own."""
    save = checkpoint.save

    def acknowledged(folder: Path, state: dict[str, Any]) -> Path:
        path = save(folder, state)
        os.write(pipe, f"{state['iteration']} {digest(state)}\n".encode())
        return path

    checkpoint.save = acknowledged
    try:
        if world > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
            dist.init_process_group(
                "gloo", f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=HUNG)
            )
        train(config, tiny_model(), data, None, out, resume=True, progress=False, device="cpu")
    except (ConnectionError, dist.DistError):
        os._exit(DAMAGED)
    except BaseException as error:
        print(f"process {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def wait_for_the_moment(
    run: Path, at: int, generator: random.Random, writing: bool, setting_up: float, step: float
) -> None:
    """Until a random moment: while a run is set up, or anywhere in or, ``writing``, at the end of its first steps."""
    if not writing and generator.random() < 0.3:
        time.sleep(generator.uniform(0, setting_up))
        return
    goal, waited = at + generator.randrange(STEPS), 0.0
    while progress(run) < goal or (writing and not any(run.glob(f".checkpoint-{goal + 1:08d}*.tmp"))):
        if progress(run) > goal or waited > 2 * HUNG:
            return
        time.sleep(0.0005)
        waited += 0.0005
    time.sleep(generator.uniform(0, 0.003 if writing else step))


def wait_for_the_end(left: list[int]) -> tuple[float, int]:
    """Seconds until processes whose partner was killed are gone, and how many had to be told."""
    began, waited, terminated = time.monotonic(), 0.0, set()  # waited: a machine that stood still proves no hang
    waiting = set(left)
    while waiting:
        for life in list(waiting):
            if os.waitpid(life, os.WNOHANG)[0]:
                waiting.remove(life)
        if waited > HUNG:
            raise SystemExit("a process that had lost another one hangs")
        if waited > ALONE_FOR:
            for life in waiting - terminated:
                os.kill(life, signal.SIGTERM)
            terminated |= waiting
        time.sleep(0.005)
        waited += 0.005
    return time.monotonic() - began, len(terminated)


def not_lost(folder: Path, acknowledged: int) -> dict[str, Any] | None:
    """The last checkpoint, which must be as far as the last acknowledged one; None where there was none."""
    if not acknowledged and not checkpoint.checkpoints(folder):
        return None
    state, _ = checkpoint.load(folder)
    if state["iteration"] < acknowledged:
        raise SystemExit(f"lost: {acknowledged} was acknowledged, {state['iteration']} is left")
    return state


def digest(value: Any) -> str:
    """A digest of all that is in a checkpoint, but for the seconds that were spent."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                if key != "seconds":
                    sha.update(repr(key).encode())
                    add(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                add(part)
        elif isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype} {list(value.shape)}".encode() + value.contiguous().numpy().tobytes())
        else:
            sha.update(repr(value).encode())

    add(value)
    return sha.hexdigest()


def progress(run: Path) -> int:
    """The iterations that the folder's last checkpoint has; 0 where there is none."""
    return max((checkpoint.iteration_of(path) for path in checkpoint.checkpoints(run)), default=0)


def rest(reader: int) -> bytes:
    """What there is in a pipe until all who write to it are gone."""
    told = b""
    while more := os.read(reader, 100_000):
        told += more
    os.close(reader)
    return told


def last_number(told: bytes) -> int:
    return int(told.split()[-1])


def kill(child: int) -> bool:
    """SIGKILL; whether the process was still running."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def record(what: str, found: dict[str, Any]) -> None:
    """Add the figures to those of the other forms, in benchmarks/results."""
    import json

    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import machine

    file = machine.RESULTS / "kills.json"
    forms = json.loads(file.read_text())["forms"] if file.exists() else {}
    report = machine.described()
    forms[what] = found | {"made": machine.in_words(report)}
    page = (
        "# kill -9 at random moments\n\nWritten by tests/kill_runs.py, which says what is done. No acknowledged "
        "checkpoint was lost, no torn one loaded, and every checkpoint, the last one included, was to the bit that of "
        "a run that was left alone; otherwise nothing is written here.\n"
    )
    for name, numbers in forms.items():
        page += f"\n## {name}\n\n" + "".join(f"- {key}: {value}\n" for key, value in numbers.items())
    machine.write("kills", report | {"forms": forms}, page)


WHATS = {"saving": kill_while_saving, "training": kill_while_training, "writing": kill_while_writing}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=WHATS)
    parser.add_argument("kills", type=int)
    parser.add_argument("--world", type=int, default=1, help="processes of the run")
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as where:
        result = WHATS[options.what](Path(where), options.kills, options.world)
    print(", ".join(f"{key}: {value}" for key, value in result.items()))
    if options.record:
        record(options.what, result)
