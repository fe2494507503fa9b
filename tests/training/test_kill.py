"""Killed at random moments and continued. Oracle: the run that nobody touched, to the bit."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been() -> None:
    line = [sys.executable, str(ROOT / "scripts" / "kill_test.py"), "--kills", "4", "--seed", "1"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("4 of 4 identical\n")
