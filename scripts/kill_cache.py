"""Kills two processes that encode at random moments, lets two others complete the cache, and compares it.

    python scripts/kill_cache.py [--kills 20] [--seed 0]

A tiny PixArt-Sigma with random weights encodes 48 pictures, in shards of two. Every trial ends one process or both by
SIGKILL, at a moment drawn evenly over the time that they take or when so many shards are there, the continuation too at
times, and then lets `pixart-ft cache` complete what is there. What it holds must be what a cache holds that nobody
touched: the same keys, each in one shard, and the same tensors (to the rounding of other batches; the largest
difference is printed). Exit code 0: all were; 1: one was not.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402
import multiprocessing

from safetensors import safe_open

import pixart_ft.training.caching  # noqa: F401  # what they import, once here: every process is forked from this one
from pixart_ft.cli import main as command_line
from pixart_ft.config.yaml_text import dump
from pixart_ft.data import store
from pixart_ft.files import write_text
from tests.helpers.launched import Launched, launch
from tests.helpers.tiny import build_picture_folder, build_tiny_pipeline

store._SHARD_ITEMS = 2


def start(folder: Path, cache: Path) -> Launched:
    """The command `pixart-ft cache` in two processes."""
    line = ["cache", "--config", str(folder / "run.yaml"), "--data.cache", str(cache)]

    def body(_: int) -> int:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return command_line(line)

    return launch(body, cache.with_suffix(".said"))


def complete(folder: Path, cache: Path) -> None:
    """Let two processes encode what is missing."""
    launched = start(folder, cache)
    codes = launched.end(within=3600)
    assert codes == [0, 0], f"exit {codes}: {launched.said(0)}{launched.said(1)}"


def keys_of(cache: Path) -> list[str]:
    """Those in all shards; one that stands in two is there twice."""
    found: list[str] = []
    for path in cache.glob("*.safetensors"):
        if path.name != store.INDEX:
            with safe_open(path, "pt") as shard:
                found += shard.keys()
    return sorted(found)


def trial(folder: Path, cache: Path, length: float, draw: random.Random) -> str:
    """Kill once or more and complete; returns what was done."""
    done: list[str] = []
    while not done or draw.random() < 0.4:
        launched, moment, shards = start(folder, cache), draw.uniform(0, length), draw.choice([99, draw.randint(1, 48)])
        begun = time.perf_counter()
        while time.perf_counter() - begun < (moment if shards == 99 else length):
            if len(list(cache.glob("*.safetensors"))) >= shards:
                break
            time.sleep(0.001)
        victims = draw.choice([[0], [1], [0, 1]])
        for victim in victims:
            launched.processes[victim].kill()
        stopped = f"killed {' and '.join(map(str, victims))} after {time.perf_counter() - begun:.2f} s"
        launched.end(within=10)  # as a launcher ends what still waits for them
        there = len(keys_of(cache)) if cache.exists() else 0
        done.append(f"{stopped} with {there} there")
    complete(folder, cache)
    return ", ".join(done)


def main() -> int:
    """Run the trials; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="trials")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    draw, bad = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_picture_folder(folder / "pictures", 48)
        builder = multiprocessing.get_context("fork").Process(target=build_tiny_pipeline, args=(folder / "base",))
        builder.start()
        builder.join()
        data = {"folder": str(folder / "pictures"), "resolution": 64}
        write_text(folder / "run.yaml", dump({"model": {"base": str(folder / "base")}, "data": data}))
        begun = time.perf_counter()
        complete(folder, folder / "untouched")
        length = time.perf_counter() - begun
        expected, whole = keys_of(folder / "untouched"), store.TensorStore(folder / "untouched")
        assert len(expected) == len(set(expected)) == len(whole)
        print(f"an untouched cache: {length:.1f} s, {len(expected)} encodings", flush=True)
        for number in range(options.kills):
            cache = folder / f"trial-{number:03d}"
            done = trial(folder, cache, length, draw)
            found, same = store.TensorStore(cache), keys_of(cache) == expected
            gap = (
                max(float((found.get(key) - whole.get(key)).abs().max()) for key in expected) if same else float("inf")
            )
            bad += gap > 1e-5
            print(f"{number + 1:3d}  {done}: {'the same' if gap <= 1e-5 else 'DIFFERS'}, to {gap:.1e}", flush=True)
            shutil.rmtree(cache)
        print(f"{options.kills - bad} of {options.kills} the same")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
