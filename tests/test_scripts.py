"""The script for SLURM, with stand-ins for its commands: what it starts, and that it queues again what was stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "slurm_train.sh"
# srun notes its arguments and waits to be stopped; scancel stops it; scontrol names the hosts and notes what it is told
COMMANDS = {
    "srun": 'echo "$@" > srun.txt; trap "exit 143" TERM; echo $$ > pid; for i in $(seq 200); do sleep 0.05; done',
    "scancel": 'kill -TERM "$(cat pid)"',
    "scontrol": 'if [ "$1" = show ]; then printf "gpu-1\\ngpu-2\\n"; else echo "$@" > scontrol.txt; fi',
}

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs bash")


@pytest.mark.parametrize("again", [False, True])
def test_slurm_script(tmp_path: Path, again: bool) -> None:
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    if again:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text("{}")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7",
                                "SLURM_JOB_NODELIST": "gpu-[1-2]"}  # fmt: skip
    job = subprocess.Popen(["bash", str(SCRIPT), "/data/coco", "run"], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == 143
    started = (tmp_path / "srun.txt").read_text().split()
    assert started[:4] == ["torchrun", "--nnodes=2", "--nproc_per_node=8", "--max-restarts=3"]
    assert "--rdzv-endpoint=gpu-1:29500" in started
    command = started[started.index("mrcnn_edu") :]
    if again:
        assert command == ["mrcnn_edu", "train", "--resume", "--out", "run"]
    else:
        assert command[:5] == ["mrcnn_edu", "train", "/data/coco", "--preset", "maskrcnn_resnet50_fpn"]
        assert command[-4:] == ["--batch", "32", "--out", "run"]
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 7\n"
