"""Generated hostile calls, in a process of their own so that a crash is a failed test. More: tests/hostile_ops.py."""

import subprocess
import sys
from pathlib import Path


def test_two_thousand_hostile_calls():
    script = Path(__file__).parent / "hostile_ops.py"
    done = subprocess.run([sys.executable, str(script), "--calls", "2000"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "none crashed" in done.stdout
