"""The real network in the real loop makes nobody wait for the device, in whichever way it is run.

The loop itself, with the optimizer's step, is in test_trainer.py and test_guard.py.
"""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from pixart_ft.training.batches import Batch
from pixart_ft.training.trainer import Trainer
from tests.helpers.runs import Options, short_run, train
from tests.helpers.waits import no_waiting


@pytest.mark.parametrize(
    "how",
    [
        {"model.gradient_checkpointing": True, "train.mixed_precision": "bf16"},
        {"diffusion.timestep_range": [200, 700], "diffusion.weighting": "min_snr"},
    ],
    ids=["checkpointing in bf16", "a range and weights"],
)
def test_forward_and_backward_read_nothing_of_a_tensor(
    how: Options,
    tiny: Path,
    pictures: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = short_run(tiny, pictures, tmp_path / "run", tmp_path_factory.getbasetemp() / "cache")
    whole, back = Trainer._forward, accelerate.Accelerator.backward
    met: list[str] = []

    def forward(self: Trainer, batch: Batch) -> Any:
        if not torch.is_grad_enabled():  # a look at the loss before a checkpoint
            return whole(self, batch)
        met.append("forward")
        assert not self.objective.schedule.has_zero_snr  # asked of the host's table, and once
        with no_waiting():
            return whole(self, batch)

    def backward(self: accelerate.Accelerator, loss: torch.Tensor, **more: Any) -> None:
        met.append("backward")
        with no_waiting():
            back(self, loss, **more)

    monkeypatch.setattr(Trainer, "_forward", forward)
    monkeypatch.setattr(accelerate.Accelerator, "backward", backward)
    train(options | how, train__steps=2, validation__prompts=[], data__held_out_fraction=0.0)
    assert met == ["forward", "backward"] * 2
