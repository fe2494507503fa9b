"""From measurements to the numbers of the report, plain as JSON has them. What they mean is said in `page`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from pixart_ft.diffusion.names import Variance, VarianceState
from pixart_ft.diffusion.readings import Readings, Steps, bits_to_save
from pixart_ft.evaluation.held_out import mean_over_pictures
from pixart_ft.evaluation.statistics import Difference, differences

BASE = "base"  # the label of the model that the others are compared with
WHOLE = "whole"  # the key of the process of all steps; others are numbers of steps


@dataclass(frozen=True, eq=False)
class Process:
    """A process of a model, measured at some steps of every picture."""

    steps: Steps
    readings: Mapping[Variance, Readings]
    prior: Tensor  # (P,) bits per dimension


@dataclass(frozen=True, eq=False)
class Measured:
    """A row of the report: a model with what was measured of it; a metric that was not asked for leaves its part empty.

    levels     at the base's levels of noise, for the loss
    processes  its own, by name
    flow       (Q,) bits per dimension of the first pictures by the probability-flow ODE
    notes      what could not be measured, and why
    """

    label: str
    variance: VarianceState
    levels: Process | None
    processes: Mapping[str, Process]
    flow: Tensor | None
    notes: Sequence[str] = ()


def loss_table(models: Sequence[Measured]) -> dict[str, Any]:
    """The error of the noise over all t, what the others exceed the first model's by, and its curve."""
    levels = {one.label: one.levels for one in models if one.levels is not None}
    values = {label: process.steps.total(_any(process).eps_mse) / _count(process) for label, process in levels.items()}
    parts = {label: _axis(process) | {"per_t": _per_step(_any(process).eps_mse)} for label, process in levels.items()}
    return {"rows": rows_of(values, parts)} if values else {}


def bound_tables(models: Sequence[Measured]) -> dict[str, Any]:
    """By process: the bound of every model by each variance, and its parts."""
    found: dict[str, Any] = {}
    for name in _process_names(models):
        processes = {one.label: one.processes[name] for one in models if name in one.processes}
        variances = list(dict.fromkeys(v for process in processes.values() for v in process.readings))
        by_variance = {}
        for variance in variances:
            here = {label: process for label, process in processes.items() if variance in process.readings}
            totals = {label: p.steps.total(p.readings[variance].bits) + p.prior for label, p in here.items()}
            parts = {
                label: _axis(p)
                | {
                    "prior": _estimate(p.prior),
                    "decoder": _estimate(p.readings[variance].bits[:, 0]),
                    "per_t": _per_step(p.readings[variance].bits),
                }
                for label, p in here.items()
            }
            by_variance[variance] = rows_of(totals, parts)
        found[name] = {"variances": by_variance}
    return found


def flow_table(models: Sequence[Measured]) -> dict[str, Any]:
    """The likelihood by the probability-flow ODE."""
    values = {one.label: one.flow for one in models if one.flow is not None}
    return {"pictures": len(next(iter(values.values()))), "rows": rows_of(values, {})} if values else {}


def calibration_tables(models: Sequence[Measured]) -> dict[str, Any]:
    """By process: the learned variance against what it stands for, step by step, and two numbers that sum it up.

    factor        by which the variance is typically wrong: exp of the root mean square of log ratio over the steps
    bits_to_save  what the bound loses by that
    """
    found: dict[str, Any] = {}
    for name in _process_names(models):
        here = {one.label: one.processes[name] for one in models if _learned(one, name) is not None}
        if not here:
            continue
        readings = {label: process.readings["learned"] for label, process in here.items()}
        saved = {label: here[label].steps.total(bits_to_save(r.ratio)) for label, r in readings.items()}
        parts = {
            label: _axis(here[label])
            | {
                "factor": _factor(r.ratio, here[label].steps),
                "predicted": r.predicted.mean(dim=0).tolist(),
                "empirical": r.empirical.mean(dim=0).tolist(),
                "ratio": _per_step(r.ratio),
            }
            for label, r in readings.items()
        }
        found[name] = {"rows": rows_of(saved, parts)}
    return found


def verdicts(models: Sequence[Measured]) -> list[dict[str, Any]]:
    """Of every model but the first: whether its learned variance is stale, by its training and by the numbers.

    The numbers show it where the bound would gain more by another variance than the base's would, in any process, by
    more than chance (all processes and models of the report are one family).
    """
    base, *others = models
    changes: dict[tuple[str, str], Tensor] = {}
    for one in others:
        for name in one.processes:
            before, after = _learned(base, name), _learned(one, name)
            if before is not None and after is not None:
                changes[one.label, name] = one.processes[name].steps.total(bits_to_save(after.ratio)) - base.processes[
                    name
                ].steps.total(bits_to_save(before.ratio))
    tested = differences(changes)
    found = []
    for one in others:
        of_it = {name: tested[label, name] for label, name in tested if label == one.label}
        worse = {name: asdict(d) for name, d in of_it.items() if d.is_significant and d.mean > 0}
        found.append({"model": one.label, "trained": one.variance, "worse": worse, "tested": list(of_it)})
    return found


def rows_of(values: Mapping[str, Tensor], parts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model: the mean of its values (P,), and the difference from the base's, where that has any."""
    others = [label for label in values if label != BASE] if BASE in values else []
    compared = differences({label: values[label] - values[BASE] for label in others})
    rows = []
    for label, value in values.items():
        row = {"model": label, **_estimate(value), **parts.get(label, {})}
        rows.append(row | ({"difference": _plain(compared[label])} if label in compared else {}))
    return rows


def _plain(difference: Difference) -> dict[str, Any]:
    return asdict(difference) | {"significant": difference.is_significant}


def _estimate(values: Tensor) -> dict[str, float]:
    return asdict(mean_over_pictures(values.double()))


def _per_step(values: Tensor) -> list[dict[str, float]]:
    return [_estimate(column) for column in values.T]


def _axis(process: Process) -> dict[str, Any]:
    """Where the steps are: the least and the most timestep of each, and the noise-to-signal ratio in their middle.

    None where no signal is left, since JSON has no infinity.
    """
    steps = process.steps
    low, high = steps.t.min(dim=0).values, steps.t.max(dim=0).values
    told = steps.schedule.timesteps
    return {
        "steps": steps.schedule.num_steps,
        "timesteps": [[told[a].item(), told[b].item()] for a, b in zip(low, high, strict=True)],
        "sigma": [s if math.isfinite(s) else None for s in steps.schedule.sigmas[(low + high) // 2].tolist()],
    }


def _factor(ratio: Tensor, steps: Steps) -> float:
    squares = ratio.mean(dim=0).log() ** 2
    return math.exp(math.sqrt(float(squares @ steps.stands_for) / steps.schedule.num_steps))


def _any(process: Process) -> Readings:
    return next(iter(process.readings.values()))


def _count(process: Process) -> int:
    return process.steps.schedule.num_steps


def _learned(model: Measured, name: str) -> Readings | None:
    return model.processes[name].readings.get("learned") if name in model.processes else None


def _process_names(models: Sequence[Measured]) -> list[str]:
    return list(dict.fromkeys(name for one in models for name in one.processes))
