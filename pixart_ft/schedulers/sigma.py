"""Samplers on noise levels: Euler, Euler ancestral, EDM (Heun and churn), annealed Langevin.

The samples are y = x0 + sigma eps (Karras et al. 2022); the network receives y / sqrt(1 + sigma^2) and the possibly
fractional timestep at which its schedule has that sigma. Levels beyond the schedule's are refused; where churn raises
one above them, the network is told the last timestep.
"""

import math
from collections.abc import Callable, Sequence
from typing import get_args

import torch
from diffusers import SchedulerMixin as SchedulerMixin  # diffusers' loader looks for it beside the class
from torch import Tensor

from pixart_ft.diffusion.names import Lookup, SigmaSpacing, StepPrediction, check, unknown
from pixart_ft.diffusion.process import promoted
from pixart_ft.diffusion.sigmas import (
    eps_at_sigma,
    exponential_sigmas,
    index_to_sigma,
    index_to_timestep,
    karras_sigmas,
    linspace_sigmas,
    sigma_to_index,
    trailing_sigmas,
    x0_at_sigma,
)
from pixart_ft.diffusion.solvers import (
    churn,
    churned_sigma,
    euler_ancestral_step,
    euler_step,
    heun_step,
    langevin_step,
    slope,
)
from pixart_ft.schedulers.base import PixArtScheduler, with_process


class SigmaScheduler(PixArtScheduler):
    """The grid of noise levels, the sigma_hat of each step, and what the network is told of each.

    sigmas: the levels of the steps and 0 at the end (steps + 1,) float64; sigma_hats: where churn takes each of them.
    """

    spacing: SigmaSpacing
    lookup: Lookup
    grid: tuple[float, float, float]  # sigma_min, sigma_max, rho
    churning: tuple[float, float, float, float]  # s_churn, s_min, s_max, s_noise
    sigmas: Tensor
    sigma_hats: list[float]
    calls: list[float]  # the level at which the network is called

    def _read_grid(
        self,
        spacing: SigmaSpacing,
        sigma_min: float | None,
        sigma_max: float | None,
        rho: float,
        lookup: Lookup = "interpolated",
        churn: tuple[float, float, float | None, float] = (0.0, 0.0, None, 1.0),
    ) -> None:
        """Check the options of the grid against the process, which must have been read."""
        if self.prediction_type in get_args(StepPrediction):
            raise ValueError(
                f"sampler {self.sampler} steps between the timesteps, where a prediction of one step "
                f"({self.prediction_type}) has no meaning"
            )
        check(spacing, "spacing", SigmaSpacing)
        own = self.schedule.sigmas[0].item(), self.schedule.sigmas[-1].item()
        if spacing in ("linspace", "trailing") and (sigma_min, sigma_max) != (None, None):
            raise ValueError(f"sigma_min and sigma_max are for spacing karras and exponential, not for {spacing}")
        low = own[0] if sigma_min is None else sigma_min
        high = own[1] if sigma_max is None else sigma_max
        if not own[0] * (1 - 1e-6) <= low < high <= own[1] * (1 + 1e-6):
            raise ValueError(
                f"sigma_min {low:g} and sigma_max {high:g} must lie in order within this schedule's noise levels, "
                f"{own[0]:.4g} to {own[1]:.5g}, the only ones that the network knows"
            )
        s_churn, s_min, s_max, s_noise = churn
        if min(s_churn, s_min, s_noise) < 0:
            raise ValueError(
                f"s_churn, s_min and s_noise must not be negative, got {s_churn:g}, {s_min:g}, {s_noise:g}"
            )
        if s_max is not None and s_max < s_min:
            raise ValueError(f"churn acts from s_min to s_max: s_max {s_max:g} is below s_min {s_min:g}")
        self.spacing, self.lookup, self.grid = spacing, lookup, (low, high, rho)
        self.churning = (s_churn, s_min, math.inf if s_max is None else s_max, s_noise)
        self.init_noise_sigma = high

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the levels: a number of them, spaced as configured, or the falling levels themselves.

        A closing 0 may be among them or not. Raises ValueError for levels that do not fall or that the schedule lacks.
        """
        if (num_inference_steps is None) == (sigmas is None):
            raise ValueError("give either num_inference_steps or sigmas")
        levels = self._explicit(sigmas) if sigmas is not None else self._spaced(num_inference_steps or 0)
        levels = self._rounded(levels)
        self.sigmas = torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
        s_churn, s_min, s_max, _ = self.churning
        sigma_hat = [churned_sigma(sigma, len(levels), s_churn, s_min, s_max) for sigma in levels.tolist()]
        self.sigma_hats = self._rounded(torch.tensor(sigma_hat, dtype=torch.float64)).tolist()
        # The noise that churn adds before the first call is part of the start's.
        self.init_noise_sigma = math.hypot(levels[0].item(), self._churn_noise(0))
        self.calls, starts = self._listed()
        index = sigma_to_index(self.schedule, torch.tensor(self.calls, dtype=torch.float64), self.lookup)
        self._ready(index_to_timestep(self.schedule, index), starts, device)

    def _spaced(self, count: int) -> Tensor:
        low, high, rho = self.grid
        match self.spacing:
            case "karras":
                return karras_sigmas(count, low, high, rho)
            case "exponential":
                return exponential_sigmas(count, low, high)
            case "linspace":
                return linspace_sigmas(self.schedule, count)
            case "trailing":
                return trailing_sigmas(self.schedule, count)
        raise unknown(self.spacing, "spacing", SigmaSpacing)

    def _explicit(self, sigmas: Sequence[float]) -> Tensor:
        values = torch.tensor([float(sigma) for sigma in sigmas], dtype=torch.float64)
        values = values[:-1] if len(values) > 1 and values[-1] == 0 else values
        low, high = self.schedule.sigmas[0] * (1 - 1e-6), self.schedule.sigmas[-1] * (1 + 1e-6)
        if len(values) == 0 or bool((values.diff() >= 0).any()) or not bool(((values >= low) & (values <= high)).all()):
            raise ValueError(f"sigmas must fall, from at most {high:.5g} to at least {low:.4g}, got {values.tolist()}")
        return values

    def _rounded(self, sigmas: Tensor) -> Tensor:
        """With lookup `nearest`, the schedule's own levels, as Karras et al.'s code for VP networks has it."""
        if self.lookup != "nearest":
            return sigmas
        return index_to_sigma(self.schedule, sigma_to_index(self.schedule, sigmas, "nearest"))

    def _listed(self) -> tuple[list[float], list[int]]:
        """The level of each call, and the calls that begin a step."""
        return self.sigma_hats, list(range(len(self.sigma_hats)))

    def _churn_noise(self, step: int) -> float:
        """Standard deviation of the noise that takes the sample to this step's sigma_hat; 0 without churn."""
        if step >= len(self.sigma_hats):
            return 0.0
        sigma, sigma_hat = self.sigmas[step].item(), self.sigma_hats[step]
        return self.churning[3] * math.sqrt(max(0.0, sigma_hat**2 - sigma**2))

    def _churned(self, y: Tensor, step: int, new_noise: Callable[[], Tensor]) -> Tensor:
        """y, which arrived at the level of `step`, at its sigma_hat: added now, since the network sees that one."""
        if self._churn_noise(step) == 0:
            return y
        return churn(y, self.sigmas[step].item(), self.sigma_hats[step], self.churning[3], new_noise())

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """sample / sqrt(1 + sigma^2), of unit variance; `timestep` as in `step`."""
        if timestep is None:
            raise ValueError(f"sampler {self.sampler} scales by the noise level: pass the timestep")
        position = self._position(timestep)
        return (promoted(sample) / math.sqrt(1 + self.calls[position] ** 2)).to(sample.dtype)

    def _x0(self, output: Tensor, y: Tensor, sigma: float) -> Tensor:
        return self._clipped(x0_at_sigma(output, y, sigma, self.prediction_type))

    def _call_levels(self) -> Tensor:
        return torch.tensor(self.calls, dtype=torch.float64)

    def _noised(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        exact = promoted(x0)
        return (exact + sigma.to(exact.dtype).to(x0.device).view(-1, 1, 1, 1) * noise.to(exact)).to(x0.dtype)


class EulerScheduler(SigmaScheduler):
    """Euler's method (Karras et al. 2022, Alg. 2 without its second order); with s_churn, stochastic.

    diffusers' Euler adds churn's noise after the network call that should have seen it: 1.2 off on unit latents, and
    looks sigma up linearly, not in its logarithm.
    """

    sampler = "euler"

    @with_process
    def __init__(
        self,
        spacing: SigmaSpacing = "karras",
        rho: float = 7.0,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float | None = None,
        s_noise: float = 1.0,
        lookup: Lookup = "interpolated",
    ) -> None:
        self._read_grid(spacing, sigma_min, sigma_max, rho, lookup, (s_churn, s_min, s_max, s_noise))

    def _advance(self, call: int, output: Tensor, x: Tensor, new_noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        sigma, after = self.calls[call], self.sigmas[call + 1].item()
        x0 = self._x0(output, x, sigma)
        return self._churned(euler_step(x, x0, sigma, after), call + 1, new_noise), x0


class EulerAncestralScheduler(SigmaScheduler):
    """Euler below the next level and noise back up to it; eta 1 is DDPM with beta tilde on the same levels."""

    sampler = "euler_ancestral"

    @with_process
    def __init__(
        self,
        spacing: SigmaSpacing = "karras",
        rho: float = 7.0,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        eta: float = 1.0,
        lookup: Lookup = "interpolated",
    ) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be 0 (no noise) to 1 (as much as DDPM), got {eta:g}")
        self._read_grid(spacing, sigma_min, sigma_max, rho, lookup)
        self.eta = eta

    def _advance(self, call: int, output: Tensor, x: Tensor, new_noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        sigma, after = self.calls[call], self.sigmas[call + 1].item()
        x0 = self._x0(output, x, sigma)
        noise = new_noise() if self.eta > 0 and after > 0 else None
        return euler_ancestral_step(x, x0, sigma, after, eta=self.eta, noise=noise), x0


class EDMScheduler(SigmaScheduler):
    """Heun's method with churn (Karras et al. 2022, Algs. 1 and 2): two calls a step, one at the last.

    `timesteps` lists the sigma_hat of each step, then the next step's level. Churn's noise is added at the end of the
    step before, and the first step's is in `init_noise_sigma`. diffusers' EDM schedulers are for
    networks preconditioned for sigma_data 0.5, and its Heun has no churn.
    """

    sampler = "edm"
    order = 2

    @with_process
    def __init__(
        self,
        spacing: SigmaSpacing = "karras",
        rho: float = 7.0,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float | None = None,
        s_noise: float = 1.0,
        lookup: Lookup = "interpolated",
    ) -> None:
        self._read_grid(spacing, sigma_min, sigma_max, rho, lookup, (s_churn, s_min, s_max, s_noise))
        self._first: tuple[Tensor, Tensor] | None = None  # where the step began, and the slope there

    def _listed(self) -> tuple[list[float], list[int]]:
        after = self.sigmas[1:-1].tolist()
        calls = [level for pair in zip(self.sigma_hats, after, strict=False) for level in pair] + self.sigma_hats[-1:]
        self._first = None
        return calls, list(range(0, len(calls), 2))

    def _advance(self, call: int, output: Tensor, x: Tensor, new_noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        (step, second), sigma = divmod(call, 2), self.calls[call]
        x0 = self._x0(output, x, sigma)
        # The slope dy/dsigma; (y - x0) / sigma would lose the digits that y and x0 share where sigma is small.
        eps = eps_at_sigma(output, x / math.hypot(1, sigma), sigma, self.prediction_type)
        eps = eps if self.clip_x0 is None else slope(x, x0, sigma)
        here, after = self.sigma_hats[step], self.sigmas[step + 1].item()
        if not second:
            self._first = None if after == 0 else (x, eps)
            return euler_step(x, x0, here, after), x0
        assert self._first is not None
        y = heun_step(*self._first, eps, here, after)
        return self._churned(y, step + 1, new_noise), x0


class AnnealedLangevinScheduler(SigmaScheduler):
    """Langevin dynamics at each noise level in turn, `langevin_steps` times, and a last denoising (the guess of x0).

    Song & Ermon 2019, Alg. 1: y + e score + sqrt(2 e) noise with e = langevin_step_size sigma^2, so that a step forgets
    that share of what it came with; they have 0.1 of it, 100 times at each of ten levels.
    """

    sampler = "annealed_langevin"

    @with_process
    def __init__(
        self,
        spacing: SigmaSpacing = "karras",
        rho: float = 7.0,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        langevin_steps: int = 3,
        langevin_step_size: float = 0.3,
    ) -> None:
        if langevin_steps < 1 or not 0 < langevin_step_size < 2:
            raise ValueError(
                "langevin_steps must be at least 1 and langevin_step_size between 0 and 2, where it diverges; got "
                f"{langevin_steps} and {langevin_step_size:g}"
            )
        self._read_grid(spacing, sigma_min, sigma_max, rho)
        self.langevin_steps, self.langevin_step_size = langevin_steps, langevin_step_size
        self.order = langevin_steps

    def _listed(self) -> tuple[list[float], list[int]]:
        calls = [sigma for sigma in self.sigmas[:-1].tolist() for _ in range(self.langevin_steps)]
        return [*calls, calls[-1]], list(range(0, len(calls), self.langevin_steps))

    def _advance(self, call: int, output: Tensor, x: Tensor, new_noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        sigma = self.calls[call]
        x0 = self._x0(output, x, sigma)
        if call == len(self.calls) - 1:
            return x0, x0
        return langevin_step(x, (x0 - x) / sigma**2, self.langevin_step_size * sigma**2, new_noise()), x0
