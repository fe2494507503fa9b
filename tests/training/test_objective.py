"""From settings and a base to the loss. Oracles: the schedules' own constructors, diffusers' schedulers for what is
written down, and expected messages. The bases here have configurations and not one weight: none is ever read."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from pixart_ft.config.samplers import SAMPLERS
from pixart_ft.config.train import TrainConfig, load_config
from pixart_ft.diffusion.intervals import WHOLE
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.errors import UserError
from pixart_ft.evaluation.objective import Objective
from pixart_ft.model.base import Base
from pixart_ft.runs.metadata import AdapterMetadata
from pixart_ft.training.objective import abilities_after, build_objective, warn_of_relearning
from pixart_ft.training.run import run_training
from tests.helpers.tiny import edit

BETAS = [0.1, 0.2, 0.4]


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    """The tiny base's configurations without its weights."""
    return Path(shutil.copytree(tiny, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors")))


def configured(base: Path, validation: dict[str, Any] | None = None, **diffusion: Any) -> TrainConfig:
    return load_config(
        {
            "run": {"folder": str(base.parent / "run")},
            "model": {"base": str(base)},
            "data": {"folder": str(base), "cache": str(base.parent / "cache")},
            "diffusion": diffusion,
            "validation": validation or {},
            "train": {"mixed_precision": "no"},
        }
    )


def built(base: Path, **diffusion: Any) -> tuple[Objective, dict[str, Any]]:
    return build_objective(configured(base, **diffusion), Base.read(base))


def faults(base: Path, validation: dict[str, Any] | None = None, **diffusion: Any) -> list[str]:
    """The refusals of a whole run, which must leave nothing behind."""
    with pytest.raises(UserError) as caught:
        run_training(configured(base, validation, **diffusion))
    assert sorted(path.name for path in base.parent.iterdir()) == ["base"]
    head, *found = str(caught.value).split("\n  - ")
    assert head == f"diffusion: these settings do not work with {base}:"
    return found


HYBRID = (
    "diffusion.objective hybrid trains a learned variance, and this base has no variance channels; "
    "set diffusion.objective simple"
)
VLB = (
    "diffusion.objective vlb trains a learned variance, and this base has no variance channels; "
    "set diffusion.objective vlb with diffusion.variance beta_tilde"
)
ZERO_SNR = (
    "the schedule leaves no signal at its last step (zero SNR), where the noise says nothing of the picture; "
    "set diffusion.prediction_type v_prediction or sample, or train on a schedule without it"
)
INFINITE = (
    "diffusion.weighting: weighting elbo is infinite on the epsilon error where this schedule leaves no signal; "
    "choose another loss_space or weighting"
)


@pytest.mark.parametrize(
    ("channels", "diffusion", "expected"),
    [
        (4, {}, [HYBRID]),
        (4, {"objective": "vlb"}, [VLB]),
        (8, {"zero_snr": True}, [ZERO_SNR]),
        (8, {"zero_snr": True, "schedule": "cosine", "prediction_type": "epsilon"}, [ZERO_SNR]),
        (8, {"zero_snr": True, "prediction_type": "sample", "loss_space": "epsilon", "weighting": "elbo"}, [INFINITE]),
        (4, {"zero_snr": True, "weighting": "elbo"}, [HYBRID, ZERO_SNR, INFINITE]),
    ],
)
def test_what_makes_no_sense_is_refused_all_at_once(
    base: Path, channels: int, diffusion: dict[str, Any], expected: list[str]
) -> None:
    edit(base / "transformer/config.json", out_channels=channels)
    assert faults(base, **diffusion) == expected


def test_more_sampling_steps_than_the_process_has_are_refused(base: Path) -> None:
    edit(base / "scheduler/scheduler_config.json", trained_betas=BETAS, num_train_timesteps=3)
    refusal = "validation.sampler ddim with validation.steps 4: cannot take 4 steps of a process of 3; choose 1 to 3"
    assert faults(base, {"prompts": ["a"], "steps": 4}) == [refusal]
    for allowed in ({"prompts": ["a"], "steps": 3}, {"steps": 4}):
        assert build_objective(configured(base, allowed), Base.read(base))[0].schedule.num_steps == 3


@pytest.mark.parametrize("objective", ["simple", "su_noises", "vlb"])
def test_the_learned_variance_is_not_sampled_with_unless_it_is_trained(base: Path, objective: str) -> None:
    fixed = {"variance": "beta_tilde"} if objective == "vlb" else {}
    refusal = (
        f"validation.sampler iddpm steps by the learned variance, which diffusion.objective {objective} leaves stale; "
        "set validation.sampler ddpm or ddim, or diffusion.objective hybrid"
    )
    drawn = {"prompts": ["a"], "sampler": "iddpm"}
    assert faults(base, drawn, objective=objective, **fixed) == [refusal]
    for allowed in ({"sampler": "iddpm"}, drawn | {"sampler": "ddpm"}):  # no prompts, no grid
        build_objective(configured(base, allowed, objective=objective, **fixed), Base.read(base))
    for trains in ("hybrid", "vlb"):
        build_objective(configured(base, drawn, objective=trains), Base.read(base))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.filterwarnings("ignore:the base predicts")
def test_a_sampler_that_cannot_walk_the_schedule_is_refused_before_any_weight(base: Path, sampler: str) -> None:
    drawn = {"prompts": ["a"], "sampler": sampler}
    zero = {"zero_snr": True, "prediction_type": "v_prediction"}
    mean = {"prediction_type": "posterior_mean"}
    space, with_steps = SAMPLERS[sampler].space, f"validation.sampler {sampler} with validation.steps 25"
    if space == "index":
        build_objective(configured(base, drawn, **zero), Base.read(base))
    else:
        assert faults(base, drawn, **zero) == [
            f"{with_steps}: sampler {sampler} divides by the signal, and this schedule has zero terminal SNR (no "
            "signal at its last step); use ddim, ddpm or iddpm, or a schedule without rescale_betas_zero_snr"
        ]
    if space == "sigma":
        assert faults(base, drawn, **mean) == [
            f"{with_steps}: sampler {sampler} steps between the timesteps, where a prediction of one "
            "step (posterior_mean) has no meaning"
        ]
    else:
        build_objective(configured(base, drawn, **mean), Base.read(base))


@pytest.mark.parametrize(
    ("channels", "diffusion"),
    [
        (4, {"objective": "simple"}),
        (4, {"objective": "su_noises"}),
        (4, {"objective": "vlb", "variance": "beta_tilde"}),
        (8, {"zero_snr": True, "prediction_type": "v_prediction", "weighting": "min_snr"}),
        (8, {"zero_snr": True, "prediction_type": "posterior_mean"}),
    ],
)
@pytest.mark.filterwarnings("ignore:the base predicts")
def test_the_remedies_work(base: Path, channels: int, diffusion: dict[str, Any]) -> None:
    edit(base / "transformer/config.json", out_channels=channels)
    assert built(base, **diffusion)[0].schedule.num_steps == 1000


@pytest.mark.parametrize("num_steps", [1000, 60])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("base", lambda steps: NoiseSchedule.linear(steps, beta_start=2e-4, beta_end=0.03)),
        ("linear", NoiseSchedule.linear),
        ("scaled_linear", NoiseSchedule.scaled_linear),
        ("cosine", NoiseSchedule.cosine),
        ("su_linear", NoiseSchedule.su_linear),
    ],
)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_schedules_by_name(
    base: Path, name: str, make: Callable[[int], NoiseSchedule], num_steps: int, zero_snr: bool
) -> None:
    """Their tables, and what is written down: diffusers, too, makes this process of it."""
    ends = {"beta_start": 2e-4, "beta_end": 0.03}  # of the base, and no other schedule's
    edit(base / "scheduler/scheduler_config.json", num_train_timesteps=num_steps, prediction_type="sample", **ends)
    objective, described = built(base, schedule=name, zero_snr=zero_snr)
    expected = make(num_steps).zero_terminal_snr() if zero_snr else make(num_steps)
    assert objective.schedule.has_zero_snr == zero_snr
    torch.testing.assert_close(objective.schedule.alpha_bar, expected.alpha_bar, rtol=1e-11, atol=0)
    assert torch.equal(objective.schedule.timesteps, torch.arange(num_steps))
    again = NoiseSchedule.from_diffusers_config(json.loads(json.dumps(described)))
    assert torch.equal(again.alpha_bar, objective.schedule.alpha_bar)
    theirs = DDIMScheduler.from_config(described).alphas_cumprod
    torch.testing.assert_close(theirs, expected.alpha_bar.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("diffusion", "expected", "told"),
    [
        ({"schedule": "linear"}, NoiseSchedule.linear(250, rescale=True), [0, 1, 249]),
        ({"schedule": "su_linear"}, NoiseSchedule.su_linear(250, rescale=True), [0, 1, 249]),
        ({"schedule": "cosine", "cosine_offset": 0.02}, NoiseSchedule.cosine(250, offset=0.02), [0, 1, 249]),
        ({"schedule": "cosine", "time_conditioning": "rescaled"}, NoiseSchedule.cosine(250), [0, 4, 996]),
    ],
)
def test_another_count_of_steps_and_another_offset_reach_the_process(
    base: Path, diffusion: dict[str, Any], expected: NoiseSchedule, told: list[int]
) -> None:
    objective, described = built(base, num_steps=250, **diffusion)
    torch.testing.assert_close(objective.schedule.alpha_bar, expected.alpha_bar, rtol=1e-11, atol=0)
    assert objective.schedule.timesteps[[0, 1, -1]].tolist() == told and objective.vlb_scale == 0.25
    again = NoiseSchedule.from_diffusers_config(json.loads(json.dumps(described)))
    assert torch.equal(again.betas, objective.schedule.betas)
    whole, _ = built(base, num_steps=250, timestep_range=(0, told[-1]), **diffusion)
    assert whole.interval == WHOLE


def test_what_a_shorter_process_cannot_be(base: Path) -> None:
    with pytest.warns(UserWarning, match="the last of 250 steps of the schedule linear leaves 28% of the picture"):
        built(base, schedule="linear", num_steps=250, rescale=False)
    with pytest.raises(
        UserError, match=r"rescaled to 20 steps the last beta would be 1, not below 1; use more than 20"
    ):
        built(base, schedule="linear", num_steps=20)
    with pytest.raises(UserError, match="rescaled of 1000 steps to 1000 is the index; choose index"):
        built(base, schedule="cosine", time_conditioning="rescaled")


def test_the_base_keeps_betas_of_its_own(base: Path) -> None:
    edit(
        base / "scheduler/scheduler_config.json",
        trained_betas=BETAS,
        num_train_timesteps=3,
        prediction_type="v_prediction",
    )
    objective, described = built(base)
    assert objective.schedule.betas.tolist() == BETAS and described["trained_betas"] == BETAS
    assert objective.prediction_type == "v_prediction"
    cosine, described = built(base, schedule="cosine")
    assert "trained_betas" not in described
    assert torch.equal(cosine.schedule.alpha_bar, NoiseSchedule.cosine(3).alpha_bar)


@pytest.mark.parametrize("diffusion", [{"schedule": "cosine"}, {"zero_snr": True, "prediction_type": "v_prediction"}])
@pytest.mark.filterwarnings("ignore:the base predicts", "ignore:of 1000 noise levels")
def test_snr_matched_tells_the_network_where_the_base_saw_that_noise(base: Path, diffusion: dict[str, Any]) -> None:
    by_index, described = built(base, **diffusion)
    with pytest.warns(UserWarning, match=r"of 1000 noise levels, \d+ lie above and \d below"):
        matched, same = built(base, time_conditioning="snr_matched", **diffusion)
    expected = by_index.schedule.matched_to(NoiseSchedule.linear())
    assert torch.equal(matched.schedule.timesteps, expected.timesteps) and same == described
    assert torch.equal(matched.schedule.alpha_bar, by_index.schedule.alpha_bar)
    assert not torch.equal(matched.schedule.timesteps, by_index.schedule.timesteps.double())


def test_another_reading_of_the_variance_is_said_aloud(base: Path) -> None:
    with pytest.warns(UserWarning, match="the base's variance channels are not read as diffusion.variance direct"):
        objective, _ = built(base, variance="direct")
    assert objective.variance == "direct" and abilities_after(objective, Base.read(base)).variance == "direct"


def test_another_prediction_type_is_said_aloud(base: Path) -> None:
    with pytest.warns(UserWarning, match="the base predicts epsilon and will be taught v_prediction: it begins wrong"):
        assert built(base, prediction_type="v_prediction")[0].prediction_type == "v_prediction"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in ({}, {"prediction_type": "epsilon"}, {"loss_space": "v_prediction"}):
            assert built(base, **same)[0].prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("validation", "diffusion", "expected"),
    [
        ({}, {"timestep_range": [0.1, 0.9]}, "[0.1, 0.9] holds none of the network's timesteps, 0 to 999; choose"),
        (
            {},
            {"timestep_range": [0, 9], "timestep_law": "logit_normal", "logit_mean": 9, "logit_std": 0.1},
            "mean 9 and deviation 0.1 leaves almost nothing (a share of 0) for t from 0 to 9; choose another",
        ),
        (
            {"prompts": ["a"], "steps": 2, "sampler": "edm"},
            {"timestep_range": [1, 99]},
            "validation.sampler edm with validation.steps 2: the adapter acts at [1, 99] alone, which holds none of "
            "this run's 3 network calls, at timesteps 999 to 0; give another diffusion.timestep_range, more "
            "validation.steps",
        ),
        (
            {"prompts": ["a"]},
            {"timestep_range": [999.5, 1000]},
            "[999.5, 1000] holds none of the network's timesteps, 0 to 999; choose",
        ),
        ({}, {"timestep_range": [0, 1001]}, "[0, 1001] reaches beyond the timesteps"),
        ({"prompts": ["a"]}, {"timestep_range": [-1, 1000]}, "[-1, 1000] reaches beyond the timesteps"),
    ],
)
def test_a_range_in_which_nothing_would_happen_is_refused(
    base: Path, validation: dict[str, Any], diffusion: dict[str, Any], expected: str
) -> None:
    (fault,) = faults(base, validation, **diffusion)
    assert expected in fault


def test_a_range_that_ends_before_it_begins_or_leaves_the_scale_is_refused(base: Path) -> None:
    for ends, expected in (([600, 0], "ends before it begins"), ([5], r"is \[5\]; expected two numbers LOW HIGH$")):
        with pytest.raises(UserError, match=expected):
            configured(base, timestep_range=ends)
    assert built(base, timestep_range=[0, 600])[0].within == range(601)
    for everywhere in ([0, 999], [0, 1000]):
        objective, _ = built(base, timestep_range=everywhere)
        assert objective.interval == WHOLE and objective.where == "" and objective.within == range(1000)


def test_a_range_of_a_longer_process_reaches_its_own_end(base: Path) -> None:
    edit(base / "scheduler/scheduler_config.json", num_train_timesteps=2000)
    assert built(base, timestep_range=[1200, 1999])[0].within == range(1200, 2000)
    assert built(base, timestep_range=[0, 1999])[0].interval == WHOLE
    assert built(base)[0].within == range(2000)
    assert "from 0 (the least noise) to 1999" in faults(base, timestep_range=[0, 2001])[0]


def test_every_setting_of_the_loss_arrives(base: Path) -> None:
    settings = {
        "objective": "hybrid", "vlb_scale": 2.5, "loss_space": "sample", "error": "huber", "huber_delta": 0.3,
        "weighting": "min_snr", "min_snr_gamma": 3.0,
    }  # fmt: skip
    objective, _ = built(base, **settings)
    given = Objective(objective.schedule, "epsilon", "hybrid", 2.5, "sample", "huber", 0.3, "min_snr", 3.0)
    assert objective == given
    other, _ = built(base, objective="simple", weighting="p2", p2_gamma=0.7)
    assert other == Objective(other.schedule, "epsilon", "simple", weighting="p2", p2_gamma=0.7)
    third, _ = built(base, objective="vlb", variance="beta")
    assert third == Objective(third.schedule, "epsilon", "vlb", variance="beta")


def test_starting_from_weights_of_another_process_is_said_aloud() -> None:
    schedule = {"beta_schedule": "linear"}
    given = AdapterMetadata("base", "0", "epsilon", schedule, "trained", 4, 4.0, 300, "strip", "ema", 0)
    objective = Objective(NoiseSchedule.linear(), "epsilon", "hybrid")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_relearning(given, objective, "index")
    cosine = replace(given, prediction_type="sample", schedule={"beta_schedule": "squaredcos_cap_v2"})
    with pytest.warns(UserWarning, match="they predict sample, not epsilon; they know another noise schedule$"):
        warn_of_relearning(cosine, objective, "index")
    with pytest.warns(UserWarning, match="relearn: they were told its steps by index, not snr_matched$"):
        warn_of_relearning(given, objective, "snr_matched")
    part = replace(given, interval=(0, 600))
    with pytest.warns(UserWarning, match=r"they were trained at timesteps \[0, 600\], not \[0, 1000\]$"):
        warn_of_relearning(part, objective, "index")
