"""From text embeddings to latents: the sampling loop with classifier-free guidance.

Shapes: N pictures, C latent channels, H W latent height and width, L text tokens, D text width.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart_ft.diffusion.intervals import Interval, holds
from pixart_ft.model.shared_calls import Network, prepared
from pixart_ft.model.text import pad_text
from pixart_ft.sampling.settings import first_call
from pixart_ft.schedulers import ProbabilityFlowScheduler, RespacedDDIMScheduler

# (number of calls made, samples so far) -> samples to go on with, or None for the same; an adaptive solver works on one
# picture at a time and takes no other
OnCall = Callable[[int, Tensor], Tensor | None]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: the mean half becomes u + scale (c - u) on all channels (Ho & Salimans 2022).

    The variance half is the conditional branch's. Up to scale 1, and where the timestep lies outside `interval` (both
    ends included), the unconditional branch is not run (Kynkaanniemi et al. 2024 guide in the middle only).
    """

    scale: float
    interval: Interval | None = None

    @property
    def on(self) -> bool:
        """Whether it acts at all: above 1, as in diffusers; at 0 too the picture follows the prompt."""
        return self.scale > 1

    def applies(self, timestep: float) -> bool:
        """Whether a call at this timestep is guided."""
        return self.on and (self.interval is None or holds(self.interval, timestep))


@torch.no_grad()
def sample_latents(
    transformer: nn.Module,
    scheduler: Any,
    embeds: Tensor,
    mask: Tensor,
    null: Tensor | Sequence[Tensor],
    *,
    guidance: Guidance,
    generators: Sequence[torch.Generator],
    shape: tuple[int, int, int],
    x0: Tensor | None = None,
    start: Tensor | None = None,
    eta: float = 0.0,
    autocast: torch.dtype | None = None,
    on_call: OnCall | None = None,
) -> Tensor:
    """Latents (N, *shape) float32, in the VAE's scale, of the captions `embeds` (N, L, D) with `mask` (N, L).

    scheduler: one of `pixart_ft.schedulers`, or of diffusers, after `set_timesteps`.
    null: (L', D), or N of them, what the unconditional branch sees: the null caption, or negative prompts.
    generators: one CPU generator a picture, for its first noise and every later one.
    x0: latents (1 or N, *shape) of pictures to begin with, noised to the scheduler's begin index; None: noise alone.
    start: the sample (N, *shape) to begin with, already that noisy, in place of both.
    eta: of a scheduler whose `step` takes one, as those of diffusers do.
    autocast: half type to run the network in; the latents stay float32.

    Raises ValueError for a network in training mode, and for settings that the scheduler refuses.
    """
    _check_mode(transformer)
    assert len(generators) == len(embeds)
    device, channels = embeds.device, shape[0]
    if start is None:
        noise = torch.stack([torch.randn(shape, generator=g, dtype=torch.float32) for g in generators]).to(device)
        if x0 is None:
            start = noise * scheduler.init_noise_sigma
        else:
            begin = scheduler.timesteps[[first_call(scheduler)]]
            start = scheduler.add_noise(x0.to(device).expand_as(noise), noise, begin)
    branches = partial(
        guided_network, transformer, guidance=guidance, channels=channels, size=shape[1:], autocast=autocast
    )
    if isinstance(scheduler, ProbabilityFlowScheduler) and scheduler.tolerance is not None:
        return _solved(scheduler, branches, embeds, mask, null, start, on_call)
    timesteps = scheduler.timesteps.cpu()
    x, extra = start, _step_arguments(scheduler, list(generators), eta)
    with branches(embeds, mask, null) as network:
        for made, timestep in enumerate(timesteps[first_call(scheduler) :], start=1):
            output = network(scheduler.scale_model_input(x, timestep), timestep.expand(len(x)))
            if not _takes_variance(scheduler):
                output = output[:, :channels]
            x = scheduler.step(output, timestep, x, return_dict=False, **extra)[0]
            if on_call is not None:
                changed = on_call(made, x)
                x = x if changed is None else changed
    return x


@torch.no_grad()
def invert_latents(
    transformer: nn.Module,
    scheduler: RespacedDDIMScheduler,
    x0: Tensor,
    embeds: Tensor,
    mask: Tensor,
    *,
    calls: int,
    autocast: torch.dtype | None = None,
    on_call: OnCall | None = None,
) -> Tensor:
    """The noise that DDIM (eta 0, unguided) turns into the latents x0, to first order: x at kept step `calls`.

    x0 (N, C, H, W) is taken for the sample at the least noise (Song et al. 2021a, sec. 4.3); the scheduler has its
    timesteps. Raises ValueError for a network in training mode.
    """
    _check_mode(transformer)
    x, rising = x0.float(), scheduler.timesteps.cpu().flip(0)
    unguided, channels, size = Guidance(1.0), x0.shape[1], x0.shape[2:]
    with guided_network(
        transformer, embeds, mask, embeds[0], guidance=unguided, channels=channels, size=size, autocast=autocast
    ) as network:
        for index in range(calls):
            output = network(x, rising[index].expand(len(x)))
            x = scheduler.encode(output, index, x)
            if on_call is not None:
                on_call(index + 1, x)
    return x


@contextmanager
def guided_network(
    transformer: nn.Module,
    embeds: Tensor,
    mask: Tensor,
    null: Tensor | Sequence[Tensor],
    *,
    guidance: Guidance,
    channels: int,
    size: Sequence[int],
    autocast: torch.dtype | None,
) -> Iterator[Network]:
    """The guided network of these texts: (x_t (N, C, H, W), timesteps (N,) on any device) -> output (N, C or 2C, H, W).

    Arguments as in `sample_latents`; both branches go through the network in one batch.
    """
    device = embeds.device
    if guidance.on:
        embeds, mask = _with_unconditional(embeds, mask, null)
    with prepared(transformer, embeds, mask, (size[0], size[1])) as network:

        def guided(x: Tensor, timesteps: Tensor) -> Tensor:
            applies = guidance.applies(float(timesteps[0]))
            timesteps = timesteps.to(device)
            with nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast):
                if not applies:
                    return network(x, timesteps)
                both = network(x.repeat(2, 1, 1, 1), timesteps.repeat(2))
            return _guide(both, channels, guidance.scale)

        yield guided


def _solved(
    scheduler: ProbabilityFlowScheduler,
    branches: Callable[[Tensor, Tensor, Tensor | Sequence[Tensor]], AbstractContextManager[Network]],
    embeds: Tensor,
    mask: Tensor,
    null: Tensor | Sequence[Tensor],
    start: Tensor,
    on_call: OnCall | None,
) -> Tensor:
    """Each picture of `start` by itself, since the steps follow from its error."""
    found: list[Tensor] = []
    for row in range(len(start)):
        part = slice(row, row + 1)
        with branches(embeds[part], mask[part], null if isinstance(null, Tensor) else null[part]) as network:
            made = itertools.count(1)

            def watched(x: Tensor, timesteps: Tensor, network: Network = network, made: Any = made) -> Tensor:
                output = network(x, timesteps)
                if on_call is not None:
                    on_call(next(made), x)
                return output

            found.append(scheduler.solve(watched, start[part])[0])
    return torch.cat(found)


def _check_mode(transformer: nn.Module) -> None:
    """Refuse a network that drops; a linear layer has no mode, and those of `fuse_qkv_projections` come in training."""
    if any(module.training for module in transformer.modules() if not isinstance(module, nn.Linear)):
        raise ValueError("the network is in training mode: its dropout would alter the pictures; call .eval()")


def _step_arguments(scheduler: Any, generators: list[torch.Generator], eta: float) -> dict[str, Any]:
    """What `step` takes beside the usual: some of diffusers' draw no noise and take no generator, few take eta."""
    takes = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in (("generator", generators), ("eta", eta)) if name in takes}


def _takes_variance(scheduler: Any) -> bool:
    """Whether `step` wants the network's variance half: our schedulers, and diffusers' with a learned variance."""
    learned = str(scheduler.config.get("variance_type", "")).startswith("learned")
    return bool(getattr(scheduler, "takes_variance", learned))


def _with_unconditional(embeds: Tensor, mask: Tensor, null: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Text and mask of 2N rows: the unconditional ones, then the given, all padded to one length."""
    rows = [null] * len(embeds) if isinstance(null, Tensor) else null
    length = max(embeds.shape[1], *(len(row) for row in rows))
    null_embeds, null_mask = pad_text([row.to(embeds) for row in rows], length)
    missing = length - embeds.shape[1]
    return (
        torch.cat([null_embeds, F.pad(embeds, (0, 0, 0, missing))]),
        torch.cat([null_mask.to(mask), F.pad(mask, (0, missing))]),
    )


def _guide(both: Tensor, channels: int, guidance: float) -> Tensor:
    """Guided output (N, ...) from the unconditional and the conditional half of `both` (2N, ...)."""
    without, given = both.chunk(2)
    mean = without[:, :channels] + guidance * (given[:, :channels] - without[:, :channels])
    return torch.cat([mean, given[:, channels:]], dim=1)
