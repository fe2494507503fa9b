"""Held-out pictures through the network, once at each chosen step: what every number of the report is made of."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields

import torch
from torch import Tensor

from pixart_ft.diffusion.likelihood import OdeLikelihood, ode_likelihood
from pixart_ft.diffusion.names import PredictionType, Variance
from pixart_ft.diffusion.process import Noised, network_timesteps
from pixart_ft.diffusion.readings import Readings, Steps
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.evaluation.held_out import HeldOutSet, evaluating
from pixart_ft.model.network import network_output
from pixart_ft.model.text import pad_text
from pixart_ft.randomness import normal


def readings_at(
    transformer: torch.nn.Module,
    steps: Steps,
    prediction_type: PredictionType,
    held_out: HeldOutSet,
    *,
    variances: Sequence[Variance],
    batch_size: int,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[Variance, Readings]:
    """The readings (P, G) float64 on the CPU of every picture at its steps, by each variance.

    Picture p at index t of a process always meets the same noise, so two networks differ by themselves alone. Takes
    P * G rows of the network. autocast: half type to run it in. progress is called with the number of rows done.
    """
    pictures, count = steps.t.shape
    kind = torch.device(device).type
    found: dict[Variance, list[Readings]] = {variance: [] for variance in variances}
    with evaluating(transformer):
        for start in range(0, pictures * count, batch_size):
            cells = range(start, min(start + batch_size, pictures * count))
            rows, t = [cell // count for cell in cells], steps.t.flatten()[list(cells)]
            numbers = [p * steps.schedule.num_steps + int(index) for p, index in zip(rows, t, strict=True)]
            eps = normal(held_out.seed, numbers, "held-out bound", tuple(held_out.x0.shape[1:]))
            embeds, mask = (x.to(device) for x in pad_text([held_out.texts[p] for p in rows]))
            noised = Noised.of(steps.schedule, *(x.to(device) for x in (held_out.x0[rows], t, eps)))
            told = network_timesteps(steps.schedule, noised.t)
            with torch.autocast(kind, autocast) if autocast else nullcontext():
                output = network_output(transformer, noised.x_t, told, embeds, mask)
            for variance in variances:
                found[variance].append(Readings.of(steps.schedule, output, noised, prediction_type, variance))
            if progress is not None:
                progress(len(rows))
    return {variance: joined(parts, (pictures, count)) for variance, parts in found.items()}


def joined(parts: Sequence[Readings], shape: Sequence[int]) -> Readings:
    """One after another, (P, G) float64 on the CPU."""
    values = (torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Readings))
    return Readings(*(value.cpu().double().view(*shape) for value in values))


def flow_likelihood(
    transformer: torch.nn.Module,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    held_out: HeldOutSet,
    *,
    tolerance: float,
    device: torch.device | str = "cpu",
) -> OdeLikelihood:
    """The density of each picture's latents by the probability-flow ODE, see `ode_likelihood`, with a random probe.

    Raises ValueError as it does.
    """
    embeds, mask = (x.to(device) for x in pad_text(held_out.texts))
    numbers, shape = range(len(held_out.x0)), tuple(held_out.x0.shape[1:])
    probe = normal(held_out.seed, numbers, "probability flow", shape).sign().to(device)

    def network(x_t: Tensor, timesteps: Tensor) -> Tensor:
        return network_output(transformer, x_t, timesteps, embeds, mask)

    with evaluating(transformer):
        return ode_likelihood(
            schedule,
            network,
            held_out.x0.to(device),
            prediction_type,
            probe=probe,
            rtol=tolerance,
            atol=tolerance,
        )
