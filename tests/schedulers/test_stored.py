"""What a scheduler's configuration says of its process. Oracle: the betas that diffusers' own classes make of it."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy
import pytest
import torch

from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.errors import UserError
from pixart_ft.model.base import Base
from pixart_ft.schedulers import SCHEDULERS, EDMScheduler, RespacedDDIMScheduler
from pixart_ft.schedulers.stored import process_of
from tests.helpers.tiny import edit

KINDS = {
    name: kind
    for name in dir(diffusers.schedulers)
    if inspect.isclass(kind := getattr(diffusers.schedulers, name, None)) and issubclass(kind, diffusers.SchedulerMixin)
    if kind is not diffusers.SchedulerMixin
}
FAMILY = [name for name, kind in KINDS.items() if "beta_start" in inspect.signature(kind.__init__).parameters]
OTHERS = {"RePaintScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"}  # predict nothing named; shift the SNR


@pytest.mark.parametrize("name", sorted(set(FAMILY) - OTHERS))
def test_absent_keys_are_the_defaults_of_the_class_that_is_named(name: str) -> None:
    """From an empty file, a saved one, and a scheduler in memory: the betas of that class, 0.00085 for Heun."""
    stock: Any = KINDS[name]()
    for config in ({"_class_name": name}, json.loads(stock.to_json_string()), stock.config):
        schedule = NoiseSchedule.from_diffusers_config(process_of(config))
        torch.testing.assert_close(schedule.betas.float(), stock.betas, rtol=1e-5, atol=0)
        ours = RespacedDDIMScheduler.from_config(config)
        assert torch.equal(ours.schedule.betas, schedule.betas)


@pytest.mark.parametrize("name", sorted(set(KINDS) - set(FAMILY) - {"UnCLIPScheduler"} | OTHERS))
def test_another_family_is_refused(name: str) -> None:
    left_over = dict(diffusers.DDPMScheduler().config) | {"_class_name": name}
    for config in ({"_class_name": name}, left_over):
        with pytest.raises(ValueError, match=f"a scheduler of class {name} (says no |with .* walks through another)"):
            process_of(config)
        with pytest.raises(ValueError, match=name):
            EDMScheduler.from_config(config)


@pytest.mark.parametrize("kind", [diffusers.EDMEulerScheduler, diffusers.FlowMatchEulerDiscreteScheduler])
def test_another_family_in_memory_names_no_class_and_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"without _class_name says no .*beta_schedule, beta_start, beta_end"):
        RespacedDDIMScheduler.from_config(kind().config)


@pytest.mark.parametrize("key", ["beta_schedule", "beta_start", "beta_end", "prediction_type", "num_train_timesteps"])
def test_an_unknown_class_must_say_everything(key: str) -> None:
    whole = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.03}
    whole |= {"prediction_type": "epsilon", "_class_name": "TheirOwnScheduler"}
    assert process_of(whole)["beta_end"] == 0.03
    with pytest.raises(ValueError, match=f"TheirOwnScheduler says no {key}"):
        process_of({k: v for k, v in whole.items() if k != key})


def test_flow_matching_on_betas_is_refused() -> None:
    config = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction").config
    with pytest.raises(ValueError, match="use_flow_sigmas True walks through another process"):
        process_of(config)


def test_a_base_with_another_familys_scheduler_is_refused(base: Path) -> None:
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(diffusers.EDMEulerScheduler().to_json_string())
    with pytest.raises(UserError, match=r"scheduler_config\.json: a scheduler of class EDMEulerScheduler says no beta"):
        Base.read(base)
    path.write_text(diffusers.HeunDiscreteScheduler().to_json_string())
    edit(path, beta_start=..., beta_end=...)
    schedule = Base.read(base).schedule
    assert schedule.betas[0].item() == pytest.approx(0.00085) and schedule.betas[-1].item() == pytest.approx(0.012)
    assert Base.read(base).schedule_config["beta_end"] == 0.012
    edit(path, network_timesteps=[0.5] * 1000)
    with pytest.raises(UserError, match="network_timesteps"):
        Base.read(base)


@pytest.mark.parametrize("kind", [list, tuple, numpy.array, torch.tensor])
def test_trained_betas_of_any_kind(kind: Any) -> None:
    betas = [0.1, 0.2, 0.5]
    schedule = NoiseSchedule.from_diffusers_config({"trained_betas": kind(betas)})
    torch.testing.assert_close(schedule.betas, torch.tensor(betas, dtype=torch.float64), rtol=1e-7, atol=0)
    for scheduler in SCHEDULERS.values():
        again = scheduler.from_config(scheduler(num_train_timesteps=3, trained_betas=kind(betas)).config)
        assert torch.equal(again.schedule.betas, schedule.betas) and len(again) == 3
        assert json.loads(again.to_json_string())["trained_betas"] == pytest.approx(betas)


def test_trained_betas_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match="trained_betas are 3, num_train_timesteps is 1000; give one for each step"):
        RespacedDDIMScheduler(trained_betas=[0.1, 0.2, 0.3])
