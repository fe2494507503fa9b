"""Predicted memory against measured: trainings in processes of their own, on this machine's processor.

    python scripts/memory_table.py --work /tmp/memory

prints predicted and measured bytes and their ratio. Of each training the peak of what it has for itself (anonymous
pages, and weights that lie mapped from their file; read every few milliseconds) is taken, less what it begins with. A
first run fills the cache, so that the measured one has the stage of training alone. MALLOC_MMAP_THRESHOLD_=65536 lets
glibc give back what is freed; without it a process keeps holes. Linux only.
"""

import argparse
import contextlib
import importlib
import os
import sys
import time
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone needs no installation

from pixart_ft import cli
from pixart_ft.config.train import TrainConfig, load_config
from pixart_ft.data.folders import picture_folder, read_folder
from pixart_ft.model.base import Base
from pixart_ft.model.loading import load_tokenizer
from pixart_ft.model.place import DEMO_FOLDER
from pixart_ft.model.text import token_ids
from pixart_ft.training.encode import read_squares
from pixart_ft.training.memory import Case, training
from pixart_ft.training.start import with_precision

STEPS = 2  # the second has the optimizer's state from its beginning
DEMO = {"model.base": "demo", "train.batch_size": 32}
MIDDLE = {"model.base": "WORK/middle", "train.batch_size": 4}
CHECKPOINTED = {"model.gradient_checkpointing": True}
HALF = {"train.mixed_precision": "bf16"}
ONE = {"train.batch_size": 1}
FULL = {"adapter.kind": "full"}
CASES: dict[str, dict[str, object]] = {
    "30 M, LoRA, float32, batch 4": MIDDLE,
    "30 M, LoRA, float32, batch 4, checkpointing": MIDDLE | CHECKPOINTED,
    "30 M, full, float32, batch 1": MIDDLE | ONE | FULL,
    "demo, LoRA, float32, batch 32": DEMO,
    "demo, full, float32, batch 32": DEMO | FULL,
    "30 M, LoRA, bf16, batch 4": MIDDLE | HALF,
    "30 M, full, bf16, batch 1, checkpointing": MIDDLE | HALF | ONE | CHECKPOINTED | FULL,
}


def build_middle(folder: Path) -> None:
    """The demo with a transformer of 12 blocks and 384 wide, weights drawn at random."""
    if (folder / "model_index.json").is_file():
        return
    folder.mkdir(parents=True)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"):
        (folder / part).symlink_to(DEMO_FOLDER / part)
    own = PixArtTransformer2DModel.load_config(str(DEMO_FOLDER), subfolder="transformer")
    torch.manual_seed(0)
    wide = {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64, "cross_attention_dim": 384}
    PixArtTransformer2DModel.from_config({**own, **wide}).save_pretrained(str(folder / "transformer"))


def build_pictures(folder: Path) -> None:
    """Four of the demo's."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in read_folder(picture_folder("demo", "train"))[:4]:
        path = folder / Path(row.name).name
        path.write_bytes(row.content())
        path.with_suffix(".txt").write_text(row.caption)


def settings(changes: dict[str, object], work: Path, steps: int) -> dict[str, object]:
    """Of a run that trains, and does nothing else."""
    quiet = {
        "validation.every": 0,
        "validation.samples_every": 0,
        "validation.timesteps": 1,
        "logging.trackers": "[]",
    }
    places = {
        "data.folder": str(work / "pictures"),
        "data.cache": str(work / "cache"),
        "run.folder": str(work / f"run-{time.time_ns()}"),
        "train.steps": steps,
    }
    told = (
        {"data.resolution": 256, "train.mixed_precision": "no", "train.checkpoint_every": 0} | quiet | places | changes
    )
    return {key: value.replace("WORK", str(work)) if isinstance(value, str) else value for key, value in told.items()}


def own_memory(process: int) -> int:
    """Bytes that a process has for itself, the pages of mapped weights included; 0 when it has ended."""
    found, counts = 0, False
    try:
        for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
            if "-" in line.split(maxsplit=1)[0]:
                counts = line.endswith(".safetensors")
            elif line.startswith("Rss:" if counts else "Anonymous:"):
                found += int(line.split()[1]) * 1024
    except OSError:
        pass
    return found


def measured(options: dict[str, object]) -> int:
    """Bytes at the peak of a training in a child of this process, beside what the child begins with."""
    words = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()]
    if (child := os.fork()) == 0:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            code = cli.main(["train", *words])
        os._exit(code)
    before = peak = own_memory(child)
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0):
        peak = max(peak, own_memory(child))
        time.sleep(0.01)
    assert status[1] == 0, options
    return peak - before


def predicted(config: TrainConfig) -> int:
    """Bytes, as the doctor tells them."""
    config, base = with_precision(config), Base.read(config.model.base)
    rows = [row.caption for part in read_squares(config, 256) for row in part.rows]
    longest = max(map(len, token_ids(load_tokenizer(base), rows, config.data.max_tokens)))
    return training(Case.of(config, base, tokens=longest, on_gpu=False)).bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model, the cache and the runs")
    parser.add_argument("--only", default="", help="a part of the names of those to measure")
    args = parser.parse_args()
    build_pictures(args.work / "pictures")
    if (builder := os.fork()) == 0:
        build_middle(args.work / "middle")
        os._exit(0)
    os.waitpid(builder, 0)
    for library in ("pixart_ft.training.run", "matplotlib.pyplot"):  # in memory before anything is measured
        importlib.import_module(library)
    chosen = {name: changes for name, changes in CASES.items() if args.only in name}
    measured(settings(DEMO | ONE, args.work, 1))  # fills the cache
    found = {}
    for name, changes in chosen.items():
        found[name] = measured(settings(changes, args.work, STEPS))
        print(f"{name}: {found[name] / 2**20:.0f} MiB", file=sys.stderr, flush=True)
    print("| training | predicted, MiB | measured, MiB | ratio |\n|---|---|---|---|")
    for name, changes in chosen.items():
        told = predicted(load_config({}, settings(changes, args.work, STEPS)))
        print(f"| {name} | {told / 2**20:.0f} | {found[name] / 2**20:.0f} | {told / found[name]:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
