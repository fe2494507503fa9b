"""Kills a short training at random moments, continues it with --resume auto, and compares its end to the bit.

    python scripts/kill_test.py [--kills 40] [--seed 0] [--kind lora|pissa|full] [--folder FOLDER]

A tiny PixArt-Sigma with random weights is trained for a few seconds with everything on: held-out loss, samples,
checkpoints, an average, dropout. Every trial kills that run at a moment drawn evenly over its length, by SIGKILL or
SIGTERM, the continuation too at times, and then lets it end. What it leaves, average, optimizer, samples and every
number of the log must be those of a run that nobody touched. Exit code 0: all were; 1: one was not.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402
import matplotlib.figure  # noqa: F401  # what a run imports, once here: every run is forked from this process

import pixart_ft.training.run  # noqa: F401
from pixart_ft.cli import main as command_line
from pixart_ft.config.yaml_text import dump
from pixart_ft.files import write_text
from pixart_ft.runs.log import RunLog
from tests.helpers.tiny import build_picture_folder, build_tiny_pipeline

STEPS = 12
KINDS: dict[str, dict[str, object]] = {
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "pissa": {"rank": 4, "init": "pissa", "targets": "all-linear"},
    "full": {"kind": "full"},
}
PATIENCE = 120  # seconds a run may take to end after SIGTERM


def configuration(folder: Path, kind: str) -> dict[str, object]:
    """A run in which something is due all the time."""
    return {
        "model": {"base": str(folder / "base")},
        "data": {"folder": str(folder / "pictures"), "held_out_fraction": 0.3, "resolution": 64},
        "diffusion": {"timestep_law": "importance"},
        "adapter": KINDS[kind],
        "optim": {"learning_rate": 1e-2, "warmup_steps": 2, "decay": "cosine"},
        "train": {"steps": STEPS, "batch_size": 4, "mixed_precision": "no", "ema_decay": 0.9, "checkpoint_every": 3},
        "validation": {"every": 2, "timesteps": 2, "prompts": ["a red circle"], "steps": 2, "samples_every": 4},
        "logging": {"every": 1, "trackers": []},
    }


def start(folder: Path, run: Path, cache: Path) -> BaseProcess:
    """The command `pixart-ft train ... --resume auto` in a process of its own."""
    line = ["--config", folder / "run.yaml", "--run.folder", run, "--data.cache", cache, "--resume", "auto"]

    def body() -> None:
        run.parent.mkdir(exist_ok=True)
        with (run.parent / "run.txt").open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.exit(command_line(["train", *map(str, line)]))

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def end(run: Path) -> dict[str, object]:
    """Everything that must be the same, by name: contents of files, and the log without its times."""
    places = ("final/*/**/*", "adapters/*/*", "models/*/**/*", "samples/**/*.png")
    files = [path for place in places for path in run.glob(place) if path.is_file()]
    files += run.glob(f"checkpoints/step-{STEPS:06d}/*.safetensors")  # a signal leaves an earlier one of its own
    found: dict[str, object] = {str(path.relative_to(run)): path.read_bytes() for path in files}
    return found | {"log": [record | {"time": 0, "speed": 0} for record in RunLog(run / "log.jsonl").records()]}


def trial(folder: Path, name: str, length: float, draw: random.Random) -> tuple[str, Path]:
    """Kill a run once or more and let it end; returns what was done, and its folder."""
    run, done = folder / name / "run", []
    cache = folder / ("cache" if draw.random() < 0.75 else f"cache-{name}")  # at times it has to encode first
    for kills in range(4):
        process, moment = start(folder, run, cache), draw.uniform(0, length)
        if kills == 3 or (kills > 0 and draw.random() < 0.6):
            process.join()
            if process.exitcode:
                done.append(f"FAILED to go on, exit {process.exitcode}, see {run.parent}/run.txt")
            break
        time.sleep(moment)
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)
        process.join(PATIENCE)
        records = RunLog(run / "log.jsonl").records()
        place = f"step {records[-1]['step']}" if records else "before the first step"
        done.append(f"{signal.Signals(number).name} after {moment:.2f} s ({place}, exit {process.exitcode})")
    return ", ".join(done), run


def main() -> int:
    """Run the trials; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="trials")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--kind", choices=KINDS, default="lora", help="what is trained")
    parser.add_argument("--folder", type=Path, help="keep everything here; else a temporary folder")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        build_picture_folder(folder / "pictures", 12)
        builder = multiprocessing.get_context("fork").Process(target=build_tiny_pipeline, args=(folder / "base",))
        builder.start()
        builder.join()
        write_text(folder / "run.yaml", dump(configuration(folder, options.kind)))
        for name in ("encode", "untouched"):  # the first fills the cache, the second is timed
            begun = time.perf_counter()
            process = start(folder, folder / name / "run", folder / "cache")
            process.join()
            assert process.exitcode == 0, (folder / name / "run.txt").read_text()
        length, expected = time.perf_counter() - begun, end(folder / "untouched" / "run")
        assert len(expected) > 15 and end(folder / "encode" / "run") == expected, "a run is not its own twin"
        print(f"an untouched run: {length:.1f} s; to compare: its log and {len(expected) - 1} files", flush=True)
        bad = 0
        for number in range(options.kills):
            done, run = trial(folder, f"trial-{number:03d}", length, draw)
            found = end(run)
            different = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
            verdict = "DIFFERS in " + ", ".join(different) if different else "identical"
            print(f"{number + 1:3d}  {done}: {verdict}", flush=True)
            bad += bool(different)
            if not different:
                shutil.rmtree(run.parent)
        print(f"{options.kills - bad} of {options.kills} identical")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
