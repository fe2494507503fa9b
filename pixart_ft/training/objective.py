"""From the diffusion settings and a base to the loss it is trained with; what makes no sense is refused, with reasons.

Reads the base's configurations alone, so that every refusal comes before any weight and any encoding.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

import torch

from pixart_ft.config.train import Diffusion, TrainConfig, Validation
from pixart_ft.diffusion.intervals import adapter_interval_faults, covers, end_faults, or_whole, shown
from pixart_ft.diffusion.names import NoisePrediction, PredictionType, TimeConditioning, VarianceState
from pixart_ft.diffusion.schedules import NoiseSchedule, conditioned, named_config
from pixart_ft.diffusion.weighting import logit_normal_timesteps
from pixart_ft.errors import UserError
from pixart_ft.evaluation.objective import Objective
from pixart_ft.model.base import Base
from pixart_ft.runs.metadata import AdapterMetadata
from pixart_ft.sampling.settings import Abilities, Settings, calls_to_come, scheduler_for

MOST_SIGNAL = 0.1  # of the picture's amplitude after the last step: Stable Diffusion's schedule leaves 0.07


def build_objective(config: TrainConfig, base: Base) -> tuple[Objective, dict[str, object]]:
    """The loss, and the noise schedule of its process in the words of a diffusers scheduler config.

    Raises UserError with everything that does not fit the base or itself.
    """
    choice, native, native_prediction = config.diffusion, base.schedule, base.prediction_type
    try:
        described = _described(choice, base.schedule_config, native.num_steps)
        schedule = conditioned(NoiseSchedule.from_diffusers_config(described), native, choice.time_conditioning)
    except ValueError as error:
        raise UserError(f"diffusion.schedule {choice.schedule} with zero_snr {choice.zero_snr}: {error}") from error
    prediction_type: PredictionType = native_prediction if choice.prediction_type == "base" else choice.prediction_type
    objective = Objective(
        schedule=schedule,
        prediction_type=prediction_type,
        kind=choice.objective,
        vlb_scale=choice.vlb_scale,
        space=None if choice.loss_space == "prediction" else choice.loss_space,
        norm=choice.error,
        huber_delta=choice.huber_delta,
        weighting=choice.weighting,
        min_snr_gamma=choice.min_snr_gamma,
        p2_gamma=choice.p2_gamma,
        variance=choice.variance,
        interval=or_whole(choice.timestep_range, schedule.last_timestep),
    )
    faults = _faults(objective, learned_variance=base.variance != "none")
    range_faults = _range_faults(choice, objective)
    faults += range_faults
    if config.validation.prompts:
        abilities = abilities_after(objective, base)
        abilities = replace(abilities, intervals=()) if range_faults else abilities  # one mistake is told once
        faults += _sampling_faults(config.validation, objective, abilities)
    if faults:
        raise UserError("\n  - ".join([f"diffusion: these settings do not work with {config.model.base}:", *faults]))
    if choice.num_steps and (left := schedule.signal[-1].item()) > MOST_SIGNAL:
        warnings.warn(
            f"the last of {schedule.num_steps} steps of the schedule {choice.schedule} leaves {left:.0%} of the "
            "picture, and sampling begins with noise alone, which is no match; use more diffusion.num_steps, or "
            "diffusion.rescale",
            stacklevel=2,
        )
    if objective.trains_variance and (objective.variance == "direct") != (base.variance == "direct"):
        warnings.warn(
            f"the base's variance channels are not read as diffusion.variance {choice.variance} reads them: they begin "
            "wrong and must relearn",
            stacklevel=2,
        )
    if prediction_type != native_prediction:
        warnings.warn(
            f"the base predicts {native_prediction} and will be taught {prediction_type}: it begins wrong "
            "and must relearn; diffusion.loss_space trains by another error and keeps what it predicts",
            stacklevel=2,
        )
    return objective, described


def abilities_after(objective: Objective, base: Base, size: int | None = None) -> Abilities:
    """What can be drawn with what is trained: on its process, at the size of its pictures (pixels; None: the base's).

    An objective without the learned variance leaves it to a network that has moved on.
    """
    trained: VarianceState = "direct" if objective.variance == "direct" else "trained"
    variance = trained if objective.trains_variance else "stale"
    return Abilities(
        objective.schedule,
        objective.prediction_type,
        "none" if base.variance == "none" else variance,
        base.native_size if size is None else size,
        base.size_unit,
        (objective.interval,),
    )


def variance_stands_still(objective: Objective, base: Base) -> bool:
    """Whether the base has rows in its last layer, for the variance, that this objective does not train."""
    return base.variance != "none" and not objective.trains_variance


def warn_of_relearning(adapter: AdapterMetadata, objective: Objective, time_conditioning: TimeConditioning) -> None:
    """Warn where the weights a run starts from were trained to another meaning of input or output."""
    schedule = NoiseSchedule.from_diffusers_config(adapter.schedule)
    changes = []
    if adapter.prediction_type != objective.prediction_type:
        changes.append(f"they predict {adapter.prediction_type}, not {objective.prediction_type}")
    if not torch.equal(schedule.alpha_bar, objective.schedule.alpha_bar):
        changes.append("they know another noise schedule")
    if objective.trains_variance and (objective.variance == "direct") != (adapter.variance == "direct"):
        changes.append(f"their variance is not read as {objective.variance}")
    if adapter.time_conditioning != time_conditioning:
        changes.append(f"they were told its steps by {adapter.time_conditioning}, not {time_conditioning}")
    if not covers(or_whole(adapter.interval, adapter.last_timestep), objective.interval):
        changes.append(f"they were trained at timesteps {shown(adapter.interval)}, not {shown(objective.interval)}")
    if changes:
        warnings.warn(f"--init-from: these weights begin wrong and must relearn: {'; '.join(changes)}", stacklevel=2)


def _described(choice: Diffusion, base: Mapping[str, object], num_steps: int) -> dict[str, object]:
    described = dict(base)
    if choice.schedule != "base":
        rescale = choice.rescale and choice.num_steps is not None
        described = named_config(
            choice.schedule, choice.num_steps or num_steps, rescale=rescale, offset=choice.cosine_offset
        )
    return described | ({"rescale_betas_zero_snr": True} if choice.zero_snr else {})


def _sampling_faults(choice: Validation, objective: Objective, abilities: Abilities) -> list[str]:
    """Why the sample grids cannot be drawn as asked."""
    if choice.sampler == "iddpm" and not objective.trains_variance:
        return [
            f"validation.sampler iddpm steps by the learned variance, which diffusion.objective {objective.kind} "
            "leaves stale; set validation.sampler ddpm or ddim, or diffusion.objective hybrid"
        ]
    try:
        calls = calls_to_come(scheduler_for(Settings.of(choice), abilities))
        remedy = "give another diffusion.timestep_range, more validation.steps or no validation.prompts"
        faults = adapter_interval_faults(abilities.intervals, calls, remedy)
    except ValueError as error:
        faults = [str(error)]
    return [f"validation.sampler {choice.sampler} with validation.steps {choice.steps}: {fault}" for fault in faults]


def _range_faults(choice: Diffusion, objective: Objective) -> list[str]:
    """Why nothing, or almost nothing, can be drawn in the range of timesteps."""
    if faults := end_faults("diffusion.timestep_range", objective.interval, objective.schedule.last_timestep):
        return faults
    try:
        within, num_steps = objective.within, objective.schedule.num_steps
        if choice.timestep_law == "logit_normal":
            middle = torch.tensor([0.5], dtype=torch.float64)
            logit_normal_timesteps(middle, num_steps, mean=choice.logit_mean, std=choice.logit_std, within=within)
    except ValueError as error:
        return [f"diffusion.timestep_range: {error}; choose another"]
    return []


def _faults(objective: Objective, *, learned_variance: bool) -> list[str]:
    faults = []
    if objective.trains_variance and not learned_variance:
        remedy = "simple" if objective.kind == "hybrid" else "vlb with diffusion.variance beta_tilde"
        faults.append(
            f"diffusion.objective {objective.kind} trains a learned variance, and this base has no variance channels; "
            f"set diffusion.objective {remedy}"
        )
    if objective.schedule.has_zero_snr and objective.prediction_type in get_args(NoisePrediction):
        faults.append(
            "the schedule leaves no signal at its last step (zero SNR), where the noise says nothing of the picture; "
            "set diffusion.prediction_type v_prediction or sample, or train on a schedule without it"
        )
    try:
        assert len(objective.weights) == objective.schedule.num_steps
    except ValueError as error:
        faults.append(f"diffusion.weighting: {error}; choose another loss_space or weighting")
    return faults
