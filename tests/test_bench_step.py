"""The benchmark of a training step. Oracle: the operations that torch counts while a small network is trained."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from pixart_ft.adapters.attach import attach
from pixart_ft.adapters.files import LoraSettings
from pixart_ft.model.attention import Kernels, use_kernels
from pixart_ft.model.network import network_output

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

# ruff: noqa: E402
from step_arithmetic import counter, least_flops

ROWS, SIDE, TEXT, RANK = 2, 8, 6, 3


@pytest.mark.parametrize("rank", [RANK, None])
def test_the_least_arithmetic_is_what_torch_counts(tiny: Path, rank: int | None) -> None:
    """Of a network that does nothing twice; the last block's padding and biases are no matrix products."""
    transformer = PixArtTransformer2DModel.from_pretrained(str(tiny), subfolder="transformer")
    transformer.requires_grad_(rank is None)
    if rank is not None:
        attach(transformer, LoraSettings(rank=rank, alpha=1.0), seed=0)
    use_kernels(transformer, Kernels("sdpa", "sdpa"))
    text, mask = torch.randn(ROWS, TEXT, 32), torch.ones(ROWS, TEXT, dtype=torch.int64)
    with counter() as count:
        x, t = torch.randn(ROWS, 4, SIDE, SIDE), torch.tensor([3, 500])
        network_output(transformer.train(), x, t, text, mask).square().mean().backward()
    least = least_flops(transformer.config, rows=ROWS, side=SIDE, text=TEXT, rank=rank)
    assert count.get_total_flops() == least


@pytest.mark.slow
def test_both_subjects_make_steps_of_the_same_loss(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    command = [sys.executable, "scripts/bench_step.py", "--model", str(tiny), "--steps", "2", "--json"]
    command += ["--work", str(tmp_path), "--option", f"data.folder={pictures}", "--option", "train.mixed_precision=no"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"speedup", "memory_ratio", "flops_ratio", "peak_share", "loss_difference"}
    assert found["loss_difference"] < 1e-5, "padded and trimmed text give one loss"
    assert found["flops_ratio"] == pytest.approx(1, abs=0.02)
    assert 0 < found["peak_share"] < 1 and 0 < found["memory_ratio"] < 2
