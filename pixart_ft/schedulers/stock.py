"""diffusers' own schedulers as samplers, on whatever process the network knows: see `config.samplers`."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import diffusers
import torch
from torch import Tensor

from pixart_ft.config.samplers import StockFacts
from pixart_ft.diffusion.names import PredictionType, StockPrediction, unknown_word
from pixart_ft.diffusion.schedules import DIFFUSERS_KEYS, NoiseSchedule
from pixart_ft.diffusion.sigmas import index_to_timestep
from pixart_ft.schedulers.base import PixArtScheduler

# Sampler -> the class of diffusers that does the same, or nearly; without one, PixArt-Sigma's own choice.
_TWINS = {
    "ddpm": "DDPMScheduler",
    "iddpm": "DDPMScheduler",  # the stock pipeline throws the learned variance away
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "edm": "HeunDiscreteScheduler",
}


class StockScheduler:
    """One of diffusers' schedulers with the interface that sampling wants of ours; it adds no formula.

    inner: the scheduler, which walks on the indices of the schedule; `timesteps` is what the network is told at them.
    """

    takes_variance = False

    def __init__(
        self,
        facts: StockFacts,
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
        options: Mapping[str, object] | None = None,
    ) -> None:
        spacing = str((options or {}).get("spacing") or facts.spacings[0])
        if spacing not in facts.spacings:
            raise ValueError(unknown_word(spacing, "spacing", facts.spacings))
        if prediction_type not in get_args(StockPrediction):
            raise ValueError(f"sampler {facts.name} is diffusers', where no network predicts {prediction_type}")
        if schedule.has_zero_snr:
            raise ValueError(
                f"sampler {facts.name} divides by the signal, and this schedule has zero terminal SNR (no signal at "
                "its last step); use ddim, ddpm or iddpm, or a schedule without rescale_betas_zero_snr"
            )
        chosen = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
        self.facts, self.schedule, self.config = facts, schedule, {"spacing": spacing}
        self.inner: Any = getattr(diffusers, facts.kind)(
            num_train_timesteps=schedule.num_steps,
            trained_betas=schedule.betas.tolist(),
            prediction_type=prediction_type,
            **chosen,
            **facts.arguments,
        )
        self.order = facts.calls_per_step
        self._takes_generator = "generator" in inspect.signature(self.inner.step).parameters

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose a number of steps, spaced as configured.

        Raises ValueError for a number that the schedule does not have, or that gives noise levels that are no numbers.
        """
        if not 1 <= num_inference_steps <= self.schedule.num_steps:
            raise ValueError(
                f"cannot take {num_inference_steps} steps of a process of {self.schedule.num_steps}; "
                f"choose 1 to {self.schedule.num_steps}"
            )
        self.inner.set_timesteps(num_inference_steps)
        walked = self.inner.timesteps
        first = 0 if self.facts.stochastic else 1  # dpm2 never reads the first, and none reads those beyond its calls
        between = getattr(self.inner, "sigmas_interpol", walked)[first : len(walked)]
        if not between.isfinite().all():
            raise ValueError(
                f"sampler {self.facts.name} cannot reach the end of this schedule in {num_inference_steps} steps (a "
                "noise level of theirs is no number); take more, or spacing trailing"
            )
        told = index_to_timestep(self.schedule, walked)
        self.timesteps = told.to(torch.float32 if walked.is_floating_point() or (told % 1).any() else torch.int64)
        if len(walked) == num_inference_steps * self.order - self.order + 1:  # the last of two calls is left out
            self.step_starts = list(range(0, len(walked), self.order))
        else:  # PNDM calls twice in its first step
            self.step_starts = [0, *range(len(walked) - num_inference_steps + 1, len(walked))]
        self.init_noise_sigma = float(self.inner.init_noise_sigma)
        self.set_begin_index(0)

    @property
    def begin_index(self) -> int:
        """The position in `timesteps` that sampling begins at."""
        return self._begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this one of `step_starts`. Raises ValueError where a step needs those before it."""
        if begin_index > 0 and not self.facts.begins_late:
            raise ValueError(
                f"sampler {self.facts.name} steps by what it saw before, so it cannot start from a picture; use dpm++, "
                "or ddim"
            )
        if hasattr(self.inner, "set_begin_index"):
            self.inner.set_begin_index(begin_index)
        self._begin = self._call = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """What the network receives at the next call."""
        scaled: Tensor = self.inner.scale_model_input(sample, self.inner.timesteps[self._call])
        return scaled

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Sequence[torch.Generator] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The next sample from the network's mean half; calls come in the order of `timesteps`."""
        noise = {"generator": generator} if self._takes_generator else {}
        walked = self.inner.timesteps[self._call]
        self._call += 1
        return (self.inner.step(model_output, walked, sample, return_dict=False, **noise)[0],)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x0 with the noise of the call that sampling begins at."""
        walked = self.inner.timesteps[[self._begin]].expand(len(original_samples))
        noised: Tensor = self.inner.add_noise(original_samples, noise, walked)
        return noised


def stock_twin(scheduler: PixArtScheduler) -> Any:
    """The scheduler of diffusers that comes nearest, on the same process; None where none can know that process."""
    config: Any = scheduler.config
    if config.network_timesteps is not None or config.prediction_type not in get_args(StockPrediction):
        return None
    kind = getattr(diffusers, _TWINS.get(scheduler.sampler, "DPMSolverMultistepScheduler"))
    wanted = {key: config[key] for key in (*DIFFUSERS_KEYS, "prediction_type")}
    # iddpm's spacing is linspace there, which diffusers' DDIM takes wrong steps of
    wanted["timestep_spacing"] = config.spacing if config.spacing in ("trailing", "leading") else "linspace"
    if scheduler.sampler == "ddim" and wanted["timestep_spacing"] == "linspace":
        wanted["timestep_spacing"] = "trailing"
    wanted["use_karras_sigmas"] = config.spacing == "karras"
    wanted["use_exponential_sigmas"] = config.spacing == "exponential"
    wanted |= {
        "clip_sample": config.clip_x0 is not None,
        "clip_sample_range": config.clip_x0 or 1.0,
        "variance_type": "fixed_large" if config.get("variance") == "beta" else "fixed_small",
    }
    takes = inspect.signature(kind.__init__).parameters
    if "algorithm_type" in takes:  # its variance_type is the network's, which the stock pipeline cuts off
        wanted["variance_type"] = None
    return kind(**{key: value for key, value in wanted.items() if key in takes})
