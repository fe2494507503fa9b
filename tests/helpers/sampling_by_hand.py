"""Sampling by hand: networks whose answer is known, and the loop's arguments in short. Shared by tests."""

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from pixart_ft.diffusion.process import q_posterior
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.model.text import pad_text
from pixart_ft.sampling.loop import Guidance, sample_latents
from pixart_ft.schedulers import PixArtScheduler, build_scheduler

SHAPE = (4, 8, 8)
SCHEDULE = NoiseSchedule.linear()
NULL = torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
# For each option of any sampler a value that is not its default, and what makes it matter.
OPTION_VALUES: dict[str, dict[str, object]] = {
    "clip_x0": {"clip_x0": 0.5},
    "variance": {"variance": "beta"},
    "eta": {"eta": 0.5},
    "rho": {"rho": 3.0},
    "sigma_min": {"sigma_min": 0.5},
    "sigma_max": {"sigma_max": 20.0},
    "s_churn": {"s_churn": 1.0},
    "s_min": {"s_churn": 1.0, "s_min": 1.0},
    "s_max": {"s_churn": 1.0, "s_max": 1.0},
    "s_noise": {"s_churn": 1.0, "s_noise": 1.1},
    "predictor": {"predictor": "euler_maruyama"},
    "corrector_steps": {"corrector_steps": 2},
    "corrector_snr": {"corrector_snr": 0.3},
    "corrector_first": {"corrector_first": True},
    "langevin_steps": {"langevin_steps": 2},
    "langevin_step_size": {"langevin_step_size": 0.2},
    "tolerance": {"tolerance": 0.1},
}


def alpha_bar_at(timestep: Tensor) -> Tensor:
    """alpha_bar (N, 1, 1, 1) float64 of the linear schedule, at fractions linear in log sigma."""
    levels = numpy.interp(timestep.double().numpy(), numpy.arange(1000), SCHEDULE.sigmas.log().numpy())
    return 1 / (1 + torch.from_numpy(numpy.exp(2 * levels)).view(-1, 1, 1, 1))


class Oracle(nn.Module):
    """Answers with the exact prediction for one x0, at the noise level of the timestep it is given."""

    def __init__(self, x0: Tensor, prediction_type: str) -> None:
        super().__init__()
        self.x0, self.kind, self.weight = x0, prediction_type, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
        alpha_bar = alpha_bar_at(timestep)
        a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        eps = (x - a * self.x0) / s
        mean = {
            "epsilon": lambda: eps,
            "v_prediction": lambda: a * eps - s * self.x0,
            "sample": lambda: self.x0.expand_as(x),
            "posterior_mean": lambda: q_posterior(SCHEDULE, self.x0.double(), x.double(), timestep).mean,
        }[self.kind]()
        return (torch.cat([mean, torch.zeros_like(x)], dim=1).float(),)


class NormalData(nn.Module):
    """The exact network for data that are normal with this mean and standard deviation: as smooth as they come."""

    def __init__(self, mean: Tensor, std: float) -> None:
        super().__init__()
        self.mean, self.variance, self.weight = mean, std**2, nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
        alpha_bar = alpha_bar_at(timestep)
        a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return (s * (x - a * self.mean) / (alpha_bar * self.variance + s**2),)


class WithVariance(nn.Module):
    """A network whose variance half is one number everywhere, or (None) the mean of the text it is given."""

    def __init__(self, network: nn.Module, value: float | None) -> None:
        super().__init__()
        self.network, self.value = network, value

    def forward(self, *args: object, **kwargs: Any) -> tuple[Tensor]:
        mean = self.network(*args, **kwargs)[0][:, : SHAPE[0]]
        if self.value is not None:
            return (torch.cat([mean, torch.full_like(mean, self.value)], dim=1),)
        return (torch.cat([mean, text_value(kwargs["encoder_hidden_states"]).expand_as(mean)], dim=1),)


def text_value(embeds: Tensor) -> Tensor:
    """A number (N, 1, 1, 1) in -1..1 that padding does not change."""
    return embeds.sum(dim=(1, 2)).sin().view(-1, 1, 1, 1)


def texts(lengths: Sequence[int]) -> list[Tensor]:
    """Embeddings of captions of these lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, 32, generator=generator) for length in lengths]


def ready(
    sampler: str = "ddim", steps: int = 5, prediction_type: str = "epsilon", **options: object
) -> PixArtScheduler:
    scheduler = build_scheduler(sampler, SCHEDULE, prediction_type, options)  # type: ignore[arg-type]
    assert isinstance(scheduler, PixArtScheduler)
    scheduler.set_timesteps(steps)
    return scheduler


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(
    network: nn.Module,
    seeds: Sequence[int] = (0,),
    *,
    captions: Sequence[Tensor] | None = None,
    null: Tensor | Sequence[Tensor] = NULL,
    scheduler: Any = None,
    guidance: float = 4.5,
    interval: tuple[float, float] | None = None,
    loop: dict[str, Any] | None = None,
    **settings: Any,
) -> Tensor:
    """Latents; `settings` make the scheduler, `loop` holds further arguments of `sample_latents`."""
    embeds, mask = pad_text(captions or texts([3 + seed % 4 for seed in seeds]))
    return sample_latents(
        network,
        scheduler or ready(**settings),
        embeds,
        mask,
        null,
        guidance=Guidance(guidance, interval),
        generators=generators(seeds),
        shape=SHAPE,
        **loop or {},
    )


def seen(network: nn.Module, *args: Any, **settings: Any) -> tuple[list[dict[str, Tensor]], Tensor]:
    """The network's inputs, call by call, and the latents."""
    calls: list[dict[str, Tensor]] = []
    hook = network.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append({"x": args[0], **kwargs}), with_kwargs=True
    )
    try:
        return calls, sample(network, *args, **settings)
    finally:
        hook.remove()
