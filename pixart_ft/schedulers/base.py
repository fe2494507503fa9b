"""What all schedulers share: the process and its configuration, the count of calls, dtypes, and noise."""

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast, get_args

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from pixart_ft.config.samplers import SAMPLERS, SamplerFacts
from pixart_ft.diffusion.names import NoisePrediction, PredictionType, check
from pixart_ft.diffusion.process import promoted
from pixart_ft.diffusion.schedules import NoiseSchedule, interpolate
from pixart_ft.diffusion.sigmas import index_to_sigma
from pixart_ft.schedulers.stored import process_of

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass
class StepOutput(BaseOutput):
    """prev_sample: the input of the next network call; pred_original_sample: the guess of x0 so far."""

    prev_sample: Tensor
    pred_original_sample: Tensor


def _process_keys(
    num_train_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    beta_schedule: str = "linear",
    trained_betas: list[float] | None = None,
    rescale_betas_zero_snr: bool = False,
    prediction_type: str = "epsilon",
    network_timesteps: list[float] | None = None,
    clip_x0: float | None = None,
) -> None:
    """The arguments with which every constructor begins; diffusers' names, but for the last two."""


def with_process(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that states its own options alone: those of the process come first, are kept with them in the
    configuration, and are read before it runs.
    """
    own, process = inspect.signature(init), inspect.signature(_process_keys)
    me, *options = own.parameters.values()
    signature = own.replace(parameters=[me, *process.parameters.values(), *options])

    @functools.wraps(init)
    def whole(self: "PixArtScheduler", *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        self._read_process()
        init(self, **{option.name: given.arguments[option.name] for option in options})

    cast(Any, whole).__signature__ = signature  # what diffusers, help and notebooks ask
    return cast(Callable[..., None], register_to_config(whole))


class PixArtScheduler(SchedulerMixin, ConfigMixin, ABC):
    """A diffusers scheduler around the functions of `diffusion/solvers.py`; it adds state and no formula.

    The process is read from the keys of a diffusers scheduler_config.json (`NoiseSchedule.from_diffusers_config`), so
    `EDMScheduler.from_config(pipeline.scheduler.config)` works, and `network_timesteps`: what the network is told at
    each index, where that is not the index itself (a schedule matched in SNR to the one the network knows).

    clip_x0: the largest value of the guess of x0 that a step is made by, None for any (static thresholding).

    One entry of `timesteps` is one network call, whose input is `scale_model_input(sample)`. `step` computes in
    float32, or float64 if the sample is, and returns the sample's dtype.
    """

    sampler: ClassVar[str]
    takes_variance = True  # `step` understands the network's whole output; stock schedulers want the mean half
    order = 1

    schedule: NoiseSchedule
    prediction_type: PredictionType
    timesteps: Tensor
    init_noise_sigma: float

    @property
    def facts(self) -> SamplerFacts:
        """The row of the table that describes this sampler."""
        return SAMPLERS[self.sampler]

    @classmethod
    def from_schedule(
        cls, schedule: NoiseSchedule, prediction_type: PredictionType, options: Mapping[str, object] | None = None
    ) -> Self:
        """A scheduler for a process however it was made; `options` are further arguments of the class."""
        own = torch.equal(schedule.timesteps, torch.arange(schedule.num_steps))
        arguments: dict[str, Any] = dict(options or {})
        return cls(
            num_train_timesteps=schedule.num_steps,
            trained_betas=schedule.betas.tolist(),
            prediction_type=prediction_type,
            network_timesteps=None if own else schedule.timesteps.tolist(),
            **arguments,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **kwargs: Any) -> Any:
        """As diffusers has it, but of another class's configuration only the process: one's eta is not the other's.

        Raises ValueError where that is not a process on betas (`stored.process_of`).
        """
        name, own = config.get("_class_name"), inspect.signature(cls.__init__).parameters
        foreign = name != cls.__name__ if name else any(not key.startswith("_") and key not in own for key in config)
        if foreign:  # one made in memory names no class, but has options that this one has not
            config = process_of(config) | {"network_timesteps": config.get("network_timesteps")}
        return super().from_config(dict(config), **kwargs)

    def _read_process(self) -> None:
        """Build the tables that the configuration describes."""
        cast(Any, self).register_to_config(_class_name=type(self).__name__)  # else only a saved one says it
        config = cast(Any, self).config
        schedule = NoiseSchedule.from_diffusers_config(config)
        if config.trained_betas is not None:  # as a list, which can be saved, whatever array it came as
            betas = torch.as_tensor(config.trained_betas, dtype=torch.float64)
            cast(Any, self).register_to_config(trained_betas=betas.tolist())
        if config.network_timesteps is not None:
            if len(config.network_timesteps) != schedule.num_steps:
                raise ValueError(
                    f"network_timesteps must give one for each of the {schedule.num_steps} steps, "
                    f"got {len(config.network_timesteps)}"
                )
            whole = all(isinstance(step, int) for step in config.network_timesteps)
            told = torch.tensor(config.network_timesteps, dtype=torch.int64 if whole else torch.float64)
            schedule = NoiseSchedule.from_betas(schedule.betas, told)
        check(config.prediction_type, "prediction_type", PredictionType)
        if schedule.has_zero_snr:
            self._refuse_zero_snr(config.prediction_type)
        if config.clip_x0 is not None and not config.clip_x0 > 0:
            raise ValueError(f"clip_x0 must be positive, got {config.clip_x0:g}")
        self.schedule, self.prediction_type = schedule, config.prediction_type
        self.clip_x0: float | None = config.clip_x0
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = schedule.timesteps.flip(0)
        self._call: int | None = None
        self._begin: int | None = None
        self._step_starts: list[int] = []

    def _refuse_zero_snr(self, prediction_type: str) -> None:
        if self.facts.space != "index":
            raise ValueError(
                f"sampler {self.sampler} divides by the signal, and this schedule has zero terminal SNR (no signal at "
                "its last step); use ddim, ddpm or iddpm, or a schedule without rescale_betas_zero_snr"
            )
        if prediction_type in get_args(NoisePrediction):
            raise ValueError(
                "at zero terminal SNR the noise does not determine x0: this schedule wants a network with "
                f"prediction_type v_prediction or sample, not {prediction_type}"
            )

    def _ready(self, timesteps: Tensor, starts: Sequence[int], device: torch.device | str | None) -> None:
        """`timesteps` of the calls to come, and which of them begin a step; the last thing in `set_timesteps`."""
        whole = timesteps.dtype == torch.int64
        self.timesteps = (timesteps if whole else timesteps.to(torch.float32)).to(device or "cpu")
        self.num_inference_steps, self._step_starts = len(starts), list(starts)
        self._call, self._begin = None, None

    @property
    def step_starts(self) -> list[int]:
        """The position in `timesteps` of the first call of each step."""
        return self._step_starts

    @property
    def begin_index(self) -> int | None:
        """Where `set_begin_index` said that the sampling begins."""
        return self._begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this position in `timesteps`, as image-to-image does; it must be one of `step_starts`."""
        self._check_ready()
        if begin_index not in self._step_starts:
            raise ValueError(f"sampling begins with a step, at a position in {self._step_starts}, not at {begin_index}")
        self._begin = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """What the network receives: the sample as it is, or scaled to unit variance by the sigma samplers."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators = None,
        noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """The next sample from the network's output (N, C or 2C, H, W) at `scale_model_input(sample)` (N, C, H, W).

        timestep: the entry of `timesteps` that the network was called with, in order; a first call may come late.
        generator: one, or one for each sample; unused with `noise` (N, C, H, W), and where no noise is added.
        Raises ValueError for a call out of order, and where the network's output lacks what the sampler needs.
        """
        call = self._position(timestep)
        x = promoted(sample)

        def new_noise() -> Tensor:
            if noise is not None:
                return noise.to(x)
            each = generator if generator is None or isinstance(generator, torch.Generator) else list(generator)
            if isinstance(each, list) and len(each) != len(x):
                raise ValueError(f"{len(each)} generators for {len(x)} samples; give one for each, or one for all")
            return cast(Tensor, randn_tensor(x.shape, generator=each, device=x.device, dtype=x.dtype))

        previous, x0 = self._advance(call, model_output, x, new_noise)
        self._call = call + 1
        previous, x0 = previous.to(sample.dtype), x0.to(sample.dtype)
        return StepOutput(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    def _clipped(self, x0: Tensor) -> Tensor:
        return x0 if self.clip_x0 is None else x0.clamp(-self.clip_x0, self.clip_x0)

    @abstractmethod
    def _advance(self, call: int, output: Tensor, x: Tensor, new_noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """The next sample and the guess of x0, from the promoted sample of call number `call`."""

    def _position(self, timestep: Tensor | float) -> int:
        """The number of this call; its timestep is checked where looking at it does not wait for a GPU."""
        self._check_ready()
        call: int | None = self._begin if self._call is None else self._call
        if call is not None and isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            if call >= len(self.timesteps):
                raise ValueError(f"all {len(self.timesteps)} calls were made; call set_timesteps to begin anew")
            return call
        wanted, known = float(timestep), self.timesteps.tolist()
        if call is None:
            starts = [start for start in self._step_starts if known[start] == wanted]
            if not starts:
                raise ValueError(f"no step begins at timestep {wanted:g}; take them from scheduler.timesteps")
            return starts[0]
        if call >= len(known):
            raise ValueError(f"all {len(known)} calls were made; call set_timesteps to begin anew")
        if known[call] != wanted:
            raise ValueError(f"call {call} is at timestep {known[call]:g}, not {wanted:g}: step takes them in order")
        return call

    def _check_ready(self) -> None:
        if self.num_inference_steps is None:
            raise ValueError(f"sampler {self.sampler} has no steps yet: call set_timesteps first")

    @abstractmethod
    def _call_levels(self) -> Tensor:
        """The sigma (M,) float64 of each call."""

    def levels(self, timesteps: Tensor) -> Tensor:
        """The noise-to-signal ratio sigma (M,) float64 at which the network receives these timesteps."""
        indices = torch.arange(self.schedule.num_steps, dtype=torch.float64)
        index = interpolate(timesteps.to("cpu", torch.float64), self.schedule.timesteps.to(torch.float64), indices)
        return index_to_sigma(self.schedule, index)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the sample is at `timesteps` (N,), (N, C, H, W) in x0's dtype, for original_samples x0.

        sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise; of the sigma samplers, x0 + sigma noise. After `set_begin_index`
        (image-to-image) it is that call's level, since a schedule matched in SNR may tell two levels by one timestep.
        """
        known = self._begin is not None and self._call is None
        sigma = self._call_levels()[self._begin].expand(len(timesteps)) if known else self.levels(timesteps)
        return self._noised(original_samples, noise, sigma)

    def _noised(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        a = (1 + sigma**2).rsqrt()  # 0 at zero SNR
        exact = promoted(x0)
        a, s = (table.to(exact.dtype).to(x0.device).view(-1, 1, 1, 1) for table in (a, (1 - a**2).sqrt()))
        return (a * exact + s * noise.to(exact)).to(x0.dtype)

    def __len__(self) -> int:
        return int(cast(Any, self).config.num_train_timesteps)
