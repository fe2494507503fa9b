"""The files of a base and of an adapter are read once, whatever is done with them.

Oracles: Python's own audit of opened files, and a Hub that counts what it is asked for.
"""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pixart_ft.cli import main
from tests.helpers.adapters import make_adapter
from tests.helpers.hub import NAME, hub
from tests.helpers.reads import reads_below
from tests.helpers.runs import command, short_run

CONFIGURATIONS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
)


ADAPTER = ("pixart_ft.json", "adapter_config.json", "adapter_model.safetensors", "null_caption.safetensors")


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "base"))


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """What a finished run of three steps leaves of its adapter."""
    return make_adapter(base, tmp_path / "run" / "final" / "adapter", step=3).parent.parent


def check_once(counted: Counter[tuple[str, str]], adapter: tuple[str, ...]) -> None:
    """We read each file once; diffusers reads a part's configuration once more for each time that it loads the part.

    The files of the tokenizer are transformers' own, and the cache's hashes of a base's files another matter.
    """
    readers = ("pixart_ft read_object", "pixart_ft read_tensors")
    ours = {file: n for (file, who), n in counted.items() if who in readers and file.startswith(("base/", "run/"))}
    files = [*(f"base/{name}" for name in CONFIGURATIONS), *(f"run/final/adapter/{name}" for name in adapter)]
    assert ours == dict.fromkeys(files, 1)
    theirs = {file for file, who in counted if not who.startswith("pixart_ft") and file.startswith(("base/", "run/"))}
    parts = {"base/transformer/config.json", "base/vae/config.json"}
    assert {file for file in theirs if "/tokenizer/" not in file} <= parts


def test_a_generation_reads_base_and_adapter_once(base: Path, run: Path, tmp_path: Path) -> None:
    asked = ["--lora", f"{run}@3", "--prompt", "a circle", "--steps", "1", "--device", "cpu"]
    with reads_below(tmp_path) as counted:
        assert main(["generate", *asked, "--out", str(tmp_path / "out")]) == 0
    check_once(counted, ADAPTER)
    assert all(n == 1 for (file, _), n in counted.items() if "/tokenizer/" not in file and not file.startswith("out/"))


def test_a_training_reads_base_and_adapter_once(base: Path, run: Path, pictures: Path, tmp_path: Path) -> None:
    options = short_run(base, pictures, tmp_path / "next", tmp_path / "cache")
    options |= {"train.steps": 1, "train.checkpoint_every": 0, "validation.every": 0, "optim.warmup_steps": 0}
    with reads_below(tmp_path) as counted:
        assert main(["train", *command(options), "--init-from", str(run)]) == 0
    check_once(counted, ADAPTER[:3])  # a training has a null caption of its own
    hashed = [n for (file, who), n in counted.items() if who == "pixart_ft sha256" and file.startswith("base/")]
    assert max(hashed) == 1


LOAD = """
import torch
from pixart_ft.model import loading
from pixart_ft.model.base import Base
base = Base.read("owner/name")
for load in (loading.load_transformer, loading.load_vae, loading.load_text_encoder):
    load(base, dtype=torch.float32)
print(base.commit)
"""


@pytest.mark.slow  # a process of its own, since huggingface_hub reads its address and whether it is offline once
def test_a_hub_base_is_of_one_commit_and_asked_for_once(tiny: Path, tmp_path: Path) -> None:
    with hub() as server:
        server.add(NAME, tiny).moves = True
        given = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path)}
        for offline in ("0", "1"):
            own = os.environ | given | {"HF_HUB_OFFLINE": offline}
            done = subprocess.run([sys.executable, "-c", LOAD], env=own, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip() == f"{1:040x}"
    where, fetched, *others = server.asked
    assert where == ("HEAD", "main", "model_index.json") and fetched == ("GET", "main", "model_index.json")
    assert {revision for _, revision, _ in others} <= {f"{1:040x}", ""}  # main has moved on
    assert max(Counter(others).values()) == 1
