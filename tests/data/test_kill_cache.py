"""Caching killed at random moments and completed. Oracle: the cache that nobody touched."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_cache_whose_making_was_killed_holds_the_same() -> None:
    line = [sys.executable, str(ROOT / "scripts" / "kill_cache.py"), "--kills", "2", "--seed", "1"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("2 of 2 the same\n")
