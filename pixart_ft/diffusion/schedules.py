"""Noise schedules: how much noise each step of the forward process adds. Symbols: `pixart_ft.diffusion`."""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from pixart_ft.diffusion.names import COSINE_OFFSET, ScheduleName, TimeConditioning, unknown, unknown_word
from pixart_ft.diffusion.respacing import kept_indices

# The keys of a diffusers scheduler_config.json that define the process; the others are a sampler's business.
DIFFUSERS_KEYS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True, eq=False)
class LearnedSteps:
    """What a network says of a step, at the steps that it was trained on: tables of (T,) float64.

    The fraction f between log beta tilde and log beta of such a step means Var[x0 | x_t] = scale expm1(f span), since
    beta tilde exp(f span) = beta tilde + w^2 Var[x0 | x_t] for the weight w of x0 in the posterior's mean (Bao et al.
    2022, theorem 1). At the first step beta tilde is 0, w is 1, and Var[x0 | x_t] is the variance itself.

    span   log(beta / beta tilde); at the first step, beta tilde is the clipped one
    scale  beta tilde / w^2; at the first step, the clipped beta tilde
    first  1 at the first step, else 0
    top    the f that means sigma^2, the error of who reads the noise as x0
    least  the clipped beta tilde, everywhere: no variance of the process is smaller
    low    log beta tilde, clipped at the first step

    The others are those of `NoiseSchedule`, for a network that predicts something of the step.
    """

    span: Tensor
    scale: Tensor
    first: Tensor
    top: Tensor
    least: Tensor
    low: Tensor
    posterior_x0_weight: Tensor
    posterior_x_t_weight: Tensor
    step_noise: Tensor

    @classmethod
    def of(cls, schedule: "NoiseSchedule") -> Self:
        """All steps of a process."""
        before, noise, betas = schedule.alpha_bar_prev[1:], 1 - schedule.alpha_bar[1:], schedule.betas[1:]
        clipped, later = schedule.posterior_log_variance[:1].exp(), torch.zeros_like(betas)
        excess = before * betas / (1 - before)  # beta / beta tilde - 1, with all its digits where it is small
        scale = noise / excess
        top = (noise / schedule.alpha_bar[1:] / scale).log1p() / excess.log1p()
        return cls(
            span=torch.cat([(schedule.betas[:1] / clipped).log(), excess.log1p()]),
            scale=torch.cat([clipped, scale]),
            first=torch.cat([torch.ones_like(clipped), later]),
            top=torch.cat([torch.ones_like(clipped), top]),
            least=clipped.expand(schedule.num_steps),
            low=schedule.posterior_log_variance,
            posterior_x0_weight=schedule.posterior_x0_weight,
            posterior_x_t_weight=schedule.posterior_x_t_weight,
            step_noise=schedule.step_noise,
        )

    def at(self, indices: Tensor) -> Self:
        """Those of the indices."""
        return type(self)(*(getattr(self, table.name)[indices] for table in dataclasses.fields(self)))


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The tables of one forward process, each (T,), float64, on the CPU. Index 0 is the least noise.

    betas                   variance that the step adds
    alpha_bar               cumulative product of 1 - betas
    alpha_bar_prev          the same one step earlier, starting with 1
    posterior_variance      beta tilde = betas (1 - alpha_bar_prev) / (1 - alpha_bar) (Ho et al. 2020, eq. 7)
    posterior_log_variance  its logarithm, with entry 1 in place of entry 0, where the variance is 0
    snr                     alpha_bar / (1 - alpha_bar)
    sigmas                  sqrt((1 - alpha_bar) / alpha_bar); infinite where alpha_bar is 0
    timesteps               what the network receives for each index, in the count of the process it was trained
                            on: int64, or float64 (fractional) after `matched_to` and `counted_as`
    learned                 the steps that the network learned, where it was not trained on these but on those of the
                            process that they were `respaced` from; None: on these
    """

    betas: Tensor
    alpha_bar: Tensor
    alpha_bar_prev: Tensor
    posterior_variance: Tensor
    posterior_log_variance: Tensor
    snr: Tensor
    sigmas: Tensor
    timesteps: Tensor
    learned: LearnedSteps | None = None

    def __repr__(self) -> str:
        return f"NoiseSchedule({self.num_steps} steps, alpha_bar {self.alpha_bar[0]:.4g} to {self.alpha_bar[-1]:.4g})"

    @property
    def num_steps(self) -> int:
        """T, the number of steps of this process."""
        return len(self.betas)

    @property
    def last_timestep(self) -> int:
        """The highest timestep that an interval of the network's may end at; no call is above it."""
        return max(self.num_steps - 1, math.ceil(self.timesteps[-1]))

    # Tables made of these, each made once: whoever looks one up keeps what it took to a device by the table itself.

    @cached_property
    def alphas(self) -> Tensor:
        """1 - betas: the variance of the signal that each step keeps."""
        return 1 - self.betas

    @cached_property
    def signal(self) -> Tensor:
        """sqrt(alpha_bar), what x0 is multiplied by in x_t."""
        return self.alpha_bar.sqrt()

    @cached_property
    def noise(self) -> Tensor:
        """sqrt(1 - alpha_bar), what eps is multiplied by in x_t."""
        return (1 - self.alpha_bar).sqrt()

    @cached_property
    def signal_before(self) -> Tensor:
        """`signal` one step earlier."""
        return self.alpha_bar_prev.sqrt()

    @cached_property
    def noise_before(self) -> Tensor:
        """`noise` one step earlier."""
        return (1 - self.alpha_bar_prev).sqrt()

    @cached_property
    def step_signal(self) -> Tensor:
        """sqrt(alphas), what x_{t-1} is multiplied by in x_t."""
        return self.alphas.sqrt()

    @cached_property
    def step_noise(self) -> Tensor:
        """sqrt(betas), what the noise of the step is multiplied by."""
        return self.betas.sqrt()

    @cached_property
    def log_betas(self) -> Tensor:
        """log betas."""
        return self.betas.log()

    @cached_property
    def large_log_variance(self) -> Tensor:
        """log betas with entry 0 of `posterior_log_variance`: beta alone would be wrong for data of the last step."""
        return torch.cat([self.posterior_log_variance[:1], self.betas[1:].log()])

    @cached_property
    def posterior_x0_weight(self) -> Tensor:
        """The weight of x0 in the posterior's mean: sqrt(alpha_bar_prev) beta / (1 - alpha_bar)."""
        return self.signal_before * self.betas / (1 - self.alpha_bar)

    @cached_property
    def posterior_x_t_weight(self) -> Tensor:
        """The weight of x_t there: sqrt(alpha) (1 - alpha_bar_prev) / (1 - alpha_bar)."""
        return self.step_signal * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)

    @cached_property
    def noise_kept(self) -> Tensor:
        """sqrt(alphas (1 - alpha_bar_prev)), what the noise of x_{t-1} is multiplied by in x_t."""
        return (self.alphas * (1 - self.alpha_bar_prev)).sqrt()

    @property
    def log_sigmas(self) -> Tensor:
        """log sigma, which is -1/2 log SNR: the scale on which noise levels are looked up; infinite at zero SNR."""
        return self.sigmas.log()

    @cached_property
    def has_zero_snr(self) -> bool:
        """Whether the last step leaves no signal at all, so that noise cannot be told from x0 there."""
        return bool(self.alpha_bar[-1] == 0)

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float], timesteps: Tensor | None = None) -> Self:
        """Derive all tables from the betas; `timesteps` defaults to 0..T-1.

        Raises ValueError unless every beta lies in (0, 1); the last alone may be 1 (zero terminal SNR).
        """
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas must be a non-empty list of numbers, got shape {tuple(betas.shape)}")
        if not bool(((betas > 0) & (betas <= 1)).all()) or bool((betas[:-1] == 1).any()):
            low, high = betas.min().item(), betas.max().item()
            raise ValueError(f"betas must lie between 0 and 1 (only the last may be 1), got {low:g} .. {high:g}")
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)
        # A process of one step has no entry 1 to borrow; beta is then the only variance there is.
        first = variance[1:2] if len(betas) > 1 else betas
        return cls(
            betas=betas,
            alpha_bar=alpha_bar,
            alpha_bar_prev=alpha_bar_prev,
            posterior_variance=variance,
            posterior_log_variance=torch.cat([first, variance[1:]]).log(),
            snr=alpha_bar / (1 - alpha_bar),
            sigmas=((1 - alpha_bar) / alpha_bar).sqrt(),
            timesteps=torch.arange(len(betas)) if timesteps is None else timesteps,
        )

    @classmethod
    def linear(
        cls, num_steps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02, rescale: bool = False
    ) -> Self:
        """Betas in a straight line (Ho et al. 2020, sec. 4): PixArt-Sigma's own schedule.

        `rescale` multiplies both ends by 1000 / num_steps: about the same noise in all, whatever num_steps.
        """
        scale = _rescaling(num_steps, beta_end) if rescale else 1.0
        return cls.from_betas(
            torch.linspace(beta_start * scale, beta_end * scale, _checked(num_steps), dtype=torch.float64)
        )

    @classmethod
    def scaled_linear(cls, num_steps: int = 1000, *, beta_start: float = 0.00085, beta_end: float = 0.012) -> Self:
        """Square roots of the betas in a straight line (latent diffusion, Rombach et al. 2022)."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, _checked(num_steps), dtype=torch.float64)
        return cls.from_betas(roots**2)

    @classmethod
    def cosine(cls, num_steps: int = 1000, *, offset: float = COSINE_OFFSET, max_beta: float = 0.999) -> Self:
        """alpha_bar along cos^2(((t/T + offset) / (1 + offset)) pi/2) (Nichol & Dhariwal 2021, eq. 17).

        The betas are capped and alpha_bar recomputed from them, so it does not reach 0.
        """
        t = torch.arange(_checked(num_steps) + 1, dtype=torch.float64) / num_steps
        f = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
        return cls.from_betas((1 - f[1:] / f[:-1]).clamp(max=max_beta))

    @classmethod
    def su_linear(cls, num_steps: int = 1000, *, rescale: bool = False) -> Self:
        """Amplitude sqrt(1 - 0.02 t/T) per step (Su, eq. 1.17), so beta = 0.02 t/T for t = 1..T.

        `rescale` as in `linear`.
        """
        scale = _rescaling(num_steps, 0.02) if rescale else 1.0
        t = torch.arange(1, _checked(num_steps) + 1, dtype=torch.float64)
        return cls.from_betas(0.02 * scale * t / num_steps)

    @classmethod
    def from_diffusers_config(cls, config: Mapping[str, object]) -> Self:
        """The process that a diffusers scheduler_config.json describes; absent keys as diffusers has them.

        Only `DIFFUSERS_KEYS` are read. Raises ValueError for any other beta_schedule than
        linear, scaled_linear and squaredcos_cap_v2.
        """
        num_steps = int(_number(config, "num_train_timesteps", 1000))
        start, end = _number(config, "beta_start", 1e-4), _number(config, "beta_end", 0.02)
        trained, name = config.get("trained_betas"), config.get("beta_schedule", "linear")
        if trained is not None:
            schedule = cls.from_betas(_numbers(trained))
            if config.get("num_train_timesteps", schedule.num_steps) != schedule.num_steps:
                raise ValueError(
                    f"trained_betas are {schedule.num_steps}, num_train_timesteps is {config['num_train_timesteps']}; "
                    "give one for each step"
                )
        elif name == "linear":
            schedule = cls.linear(num_steps, beta_start=start, beta_end=end)
        elif name == "scaled_linear":
            schedule = cls.scaled_linear(num_steps, beta_start=start, beta_end=end)
        elif name == "squaredcos_cap_v2":
            schedule = cls.cosine(num_steps)
        else:
            words = ("linear", "scaled_linear", "squaredcos_cap_v2")
            raise ValueError(unknown_word(name, "beta_schedule", words))
        return schedule.zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule

    def zero_terminal_snr(self) -> Self:
        """Shift and scale sqrt(alpha_bar): the last becomes 0, the first stays (Lin et al. 2023, Alg. 1).

        At the last step x0 cannot be computed from eps, so train it with v or x0 prediction only.
        Raises ValueError for a process of one step.
        """
        if self.num_steps == 1:
            raise ValueError("a process of one step cannot keep its first and zero its last signal; use more steps")
        a = self.alpha_bar.sqrt()
        return self._with_alpha_bar(((a - a[-1]) * a[0] / (a[0] - a[-1])) ** 2, self.timesteps)

    def respaced(self, spec: int | str | Sequence[int]) -> Self:
        """Keep some steps: same alpha_bar there, new betas, old timesteps (Nichol & Dhariwal 2021, sec. 4).

        `spec` is a count (20 or "20", both ends kept), counts for equal sections of the process ("10,10,10"),
        "ddim20" (the integer stride from 0 that gives 20 steps), or the kept indices themselves, increasing.
        A count of 1 keeps index 0, as the authors' code does. Raises ValueError for what cannot be kept.
        """
        kept = torch.tensor(kept_indices(self.num_steps, spec))
        learned = self.learned or LearnedSteps.of(self)
        fewer = self._with_alpha_bar(self.alpha_bar[kept], self.timesteps[kept])
        return dataclasses.replace(fewer, learned=learned.at(kept))

    def matched_to(self, reference: "NoiseSchedule") -> Self:
        """The same process for a network trained on `reference`: it gets the timestep at which it saw this SNR.

        Timesteps become fractional, interpolated in log SNR, as the network's embedding allows. Noise levels
        that `reference` never reached get its nearest end; a UserWarning says how many.
        """
        found = interpolate(self.log_sigmas, reference.log_sigmas, reference.timesteps.to(torch.float64))
        below = int((self.sigmas < reference.sigmas[0] * (1 - 1e-12)).sum())
        above = int((self.sigmas > reference.sigmas[-1] * (1 + 1e-12)).sum())
        if below or above:
            warnings.warn(
                f"of {self.num_steps} noise levels, {above} lie above and {below} below those of the schedule the "
                f"network knows (sigma {reference.sigmas[0]:.3g} to {reference.sigmas[-1]:.4g}); it is told its ends",
                stacklevel=2,
            )
        return dataclasses.replace(self, timesteps=found)

    def counted_as(self, num_steps: int) -> Self:
        """The same process for a network that counts to another T: it gets index * num_steps / T, fractional.

        guided-diffusion's rescale_timesteps, where num_steps is 1000. Raises ValueError for as many steps as it has.
        """
        if num_steps == self.num_steps:
            raise ValueError(
                f"time_conditioning rescaled of {num_steps} steps to {num_steps} is the index; choose index"
            )
        told = torch.arange(self.num_steps, dtype=torch.float64) * (num_steps / self.num_steps)
        return dataclasses.replace(self, timesteps=told)

    @classmethod
    def _with_alpha_bar(cls, alpha_bar: Tensor, timesteps: Tensor) -> Self:
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        return cls.from_betas(1 - alpha_bar / previous, timesteps)


def named_config(
    name: ScheduleName, num_steps: int = 1000, *, rescale: bool = False, offset: float = COSINE_OFFSET
) -> dict[str, object]:
    """A schedule in the words of a diffusers scheduler config, with its own defaults but for what is given.

    rescale is of linear and su_linear, offset of cosine: see there. Raises ValueError for another name, and as those.
    """
    if name == "cosine":
        words: dict[str, object] = {"num_train_timesteps": num_steps, "beta_schedule": "squaredcos_cap_v2"}
        if offset == COSINE_OFFSET:
            return words
        return words | {"trained_betas": NoiseSchedule.cosine(num_steps, offset=offset).betas.tolist()}
    if name == "linear":
        line, start, end = "linear", 1e-4, 0.02
    elif name == "scaled_linear":
        line, start, end, rescale = "scaled_linear", 0.00085, 0.012, False
    elif name == "su_linear":  # his betas 0.02 t / T are a straight line too
        line, start, end = "linear", 0.02 / num_steps, 0.02
    else:
        raise unknown(name, "schedule", ScheduleName)
    scale = _rescaling(num_steps, end) if rescale else 1.0
    return {
        "num_train_timesteps": num_steps,
        "beta_schedule": line,
        "beta_start": start * scale,
        "beta_end": end * scale,
    }


def shown_config(config: Mapping[str, object]) -> str:
    """The words of a schedule for messages: betas of its own are counted."""
    betas = config.get("trained_betas")
    return str(dict(config) | ({"trained_betas": f"{len(betas)} numbers"} if isinstance(betas, list) else {}))


def conditioned(schedule: NoiseSchedule, native: NoiseSchedule, time_conditioning: TimeConditioning) -> NoiseSchedule:
    """`schedule` as a network trained on `native` is told of it, see `TimeConditioning`.

    Raises ValueError for another word, and where rescaled is no other count.
    """
    if time_conditioning == "index":
        return schedule
    if time_conditioning == "rescaled":
        return schedule.counted_as(native.num_steps)
    if time_conditioning == "snr_matched":
        return schedule.matched_to(native)
    raise unknown(time_conditioning, "time_conditioning", TimeConditioning)


def interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (knots, values), constant beyond the ends; `knots` (K,) increasing float64.

    The last knot may be infinite, as log sigma is at zero SNR: it is met by an infinite x alone.
    """
    if len(knots) == 1:
        return torch.full_like(x, values[0].item())
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    share = (x - knots[left]) / (knots[right] - knots[left])
    between = values[left] + share * (values[right] - values[left])
    return torch.where(x <= knots[left], values[left], torch.where(x >= knots[right], values[right], between))


def _checked(num_steps: int) -> int:
    if num_steps < 1:
        raise ValueError(f"a process needs at least one step, got num_steps {num_steps}")
    return num_steps


def _rescaling(num_steps: int, beta_end: float) -> float:
    scale = 1000 / _checked(num_steps)
    if beta_end * scale >= 1:
        raise ValueError(
            f"rescaled to {num_steps} steps the last beta would be {beta_end * scale:g}, not below 1; "
            f"use more than {1000 * beta_end:g} steps"
        )
    return scale


def _numbers(values: object) -> Tensor:
    """A list of numbers, or an array or tensor of any library, as float64 (N,)."""
    try:
        found = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        found = torch.zeros(())
    if found.ndim != 1:
        raise ValueError(f"trained_betas must be a list of numbers, got {type(values).__name__}")
    return found


def _number(config: Mapping[str, object], key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float):
        raise ValueError(f"{key} must be a number, got {value!r}")
    return value
