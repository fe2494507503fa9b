"""The real network in the real loop makes nobody wait for the device, in whichever way it is run.

Oracle: a second device that sees every copy and read. The loop's reads of what a step met are in test_trainer.py and
test_guard.py, and on a GPU CUDA's own alarm is in test_gpu.py.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import accelerate
import pytest
import torch
from torch import Tensor

from pixart_ft.diffusion.names import LossSpace, ObjectiveKind, Variance
from pixart_ft.diffusion.process import Noised
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.evaluation.objective import Objective
from pixart_ft.model import loading
from pixart_ft.training.batches import Batch
from pixart_ft.training.trainer import Trainer
from tests.helpers.networks import randn
from tests.helpers.runs import Options, short_run, train
from tests.helpers.second_device import THERE, Far, SecondDevice, second_device


class _Enough(Exception):
    """Enough was seen."""


def on_the_second_device(options: Options, monkeypatch: pytest.MonkeyPatch) -> SecondDevice:
    """Train two steps there; the second is watched, since the first begins what is kept."""
    load, forward, step = loading.load_transformer, Trainer._forward, Trainer._optimizer_step
    with ExitStack() as stack:

        def loaded(*given: Any, **more: Any) -> Any:
            network = load(*given, **more)  # through the name of that device, too
            devices.append(stack.enter_context(second_device()))
            monkeypatch.setattr(accelerate.Accelerator, "device", property(lambda self: THERE))
            return network

        def pinned(self: Trainer, batch: Batch) -> Any:
            devices[0].pin(x for x in vars(batch).values() if x is not None)
            return forward(self, batch)

        def watched(self: Trainer) -> None:
            assert all(isinstance(p, Far) for p in self.transformer.parameters())
            devices[0].watching = self.step > 0
            step(self)
            devices[0].watching = False
            if self.step:
                raise _Enough

        devices: list[SecondDevice] = []
        monkeypatch.setattr(loading, "load_transformer", loaded)
        monkeypatch.setattr(Trainer, "_forward", pinned)
        monkeypatch.setattr(Trainer, "_optimizer_step", watched)
        with pytest.raises(_Enough):
            train(options)
    return devices[0]


@pytest.mark.parametrize(
    "how",
    [
        {
            "diffusion.timestep_range": [200, 700],
            "diffusion.weighting": "min_snr",
            "model.gradient_checkpointing": True,
        },
        {"diffusion.timestep_law": "importance", "adapter.dora": True, "optim.optimizer": "adafactor"},
        {"adapter.kind": "full", "optim.in_backward": True, "optim.clip_norm": 0.0},
    ],
    ids=["range, weights, checkpointing", "importance, dora, adafactor", "full, steps in the backward pass"],
)
def test_a_step_copies_only_its_batch_and_reads_nothing(
    how: Options,
    tiny: Path,
    pictures: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = short_run(tiny, pictures, tmp_path / "run", tmp_path_factory.getbasetemp() / "cache") | {
        "adapter.dropout": 0.0,
        "data.held_out_fraction": 0.0,
        "validation.prompts": [],
        "train.checkpoint_every": 0,
    }
    if how.get("adapter.kind") == "full":
        options = {key: value for key, value in options.items() if not key.startswith("adapter.")}
    assert on_the_second_device(options | how, monkeypatch).waits == []


@pytest.mark.parametrize("kind", get_args(ObjectiveKind))
@pytest.mark.parametrize("prediction_type", ["epsilon", "posterior_mean"])
def test_a_loss_takes_its_tables_to_the_device_once(kind: Any, prediction_type: Any) -> None:
    """In every space, and with every fixed variance; the numbers are those of the CPU."""
    schedule = NoiseSchedule.linear(20)
    plain: list[Objective] = [Objective(schedule, prediction_type, kind)]
    if kind in ("hybrid", "simple"):
        plain = [replace(plain[0], space=space, weighting="min_snr") for space in get_args(LossSpace)]
    if kind == "vlb":
        plain = [replace(plain[0], variance=variance) for variance in get_args(Variance)]
    x0, eps, rest = (randn(2, 4, 2, 2, seed=seed).float() for seed in range(3))
    given = x0, eps, rest, randn(2, 8, 2, 2, seed=3).float(), torch.tensor([3, 19])

    def losses(objective: Objective, x0: Tensor, eps: Tensor, rest: Tensor, output: Tensor, t: Tensor) -> Tensor:
        return objective.terms_of(output, Noised.of(schedule, x0, t, eps), rest)["loss"]

    with second_device() as device:
        there = [x.to(THERE) for x in given]
        for objective in plain:
            losses(objective, *there)
            device.watching = True
            found = losses(objective, *there)
            device.watching = False
            torch.testing.assert_close(found.cpu(), losses(objective, *given), rtol=0, atol=0)
    assert device.waits == []


def test_the_second_device_sees_what_waits() -> None:
    table = torch.arange(4.0)
    with second_device() as device:
        there, flags = table.to(THERE), (table > 1).to(THERE)
        device.watching = True
        table.to(THERE, non_blocking=True)
        table.long().to(THERE)
        there.cpu()
        float(there[0])
        there[torch.tensor([0, 1])]
        there[flags]
        torch.tensor([1.0], device=THERE)
        assert len(device.waits) == 7, device.waits
        device.pin([table])
        table.to(THERE, non_blocking=True)
        there[0] + 1.0 + torch.tensor(2.0)
        torch.where(flags, there, 0.0)
        device.watching = False
        assert len(device.waits) == 7, device.waits
        torch.testing.assert_close((there * 2).cpu(), table * 2, rtol=0, atol=0)
