"""Building: without torch or with the compiled part switched off, the package installs and says what it lacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_setup(prepare: str, wanted: str = "auto") -> subprocess.CompletedProcess:
    code = f"import sys; {prepare}; sys.argv = ['setup.py', '--name']; exec(open('setup.py').read())"
    environment = os.environ | {"MRCNN_EDU_EXTENSION": wanted}
    return subprocess.run(
        [sys.executable, "-c", f"__file__ = 'setup.py'\n{code}"],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
    )


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="only in a checkout")
def test_without_torch():
    hidden = "sys.modules['torch'] = None"  # as in pip's isolated build environment
    done = run_setup(hidden)
    assert done.returncode == 0 and "mrcnn_edu" in done.stdout, done.stderr
    assert "compiled ops left out: torch cannot be imported" in done.stderr
    assert "--no-build-isolation" in done.stderr
    assert run_setup(hidden, "require").returncode != 0


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="only in a checkout")
def test_switched_off():
    done = run_setup("pass", "none")
    assert done.returncode == 0 and "mrcnn_edu" in done.stdout, done.stderr
    assert "must be one of" in run_setup("pass", "perhaps").stderr
