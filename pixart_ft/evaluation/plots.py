"""The plots of a report, as PNG bytes. What is drawn is read from the tables of `tables`."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#444444", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d")
NOISE = "noise over signal, sigma (least noise on the left)"


def loss_plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The error of the noise by the level of noise, and what each model's is to the first one's."""
    figure, (left, right) = _figure(2)
    first = [point["mean"] for point in rows[0]["per_t"]]
    for colour, row in zip(_colours(rows), rows, strict=True):
        means, errors = ([point[key] for point in row["per_t"]] for key in ("mean", "standard_error"))
        left.errorbar(_sigma(row), means, errors, color=colour, label=row["model"], **_POINTS)
        right.plot(_sigma(row), [m / f for m, f in zip(means, first, strict=True)], "o-", color=colour, markersize=3)
    left.set(title="squared error of the noise", yscale="log")
    right.set(title=f"the same over that of {rows[0]['model']}")
    left.legend(frameon=False, fontsize="small")
    _plain_numbers([left])
    return _png(figure)


def bound_plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The terms of the bound by the level of noise, a step's worth."""
    figure, (axes,) = _figure(1)
    for colour, row in zip(_colours(rows), rows, strict=True):
        means, errors = ([point[key] for point in row["per_t"]] for key in ("mean", "standard_error"))
        axes.errorbar(_sigma(row)[1:], means[1:], errors[1:], color=colour, label=row["model"], **_POINTS)
    axes.set(title="bits per dimension of one step, t = 0 left out", yscale="log")
    axes.legend(frameon=False, fontsize="small")
    return _png(figure)


def calibration_plot(tables: Mapping[str, Any], titles: Mapping[str, str]) -> bytes:
    """Found over predicted variance by the level of noise, a panel for each process; 1 is right."""
    figure, panels = _figure(len(tables))
    for axes, (name, table) in zip(panels, tables.items(), strict=True):
        axes.axhline(1, color="black", linewidth=0.8)
        for colour, row in zip(_colours(table["rows"]), table["rows"], strict=True):
            means, errors = ([point[key] for point in row["ratio"]] for key in ("mean", "standard_error"))
            axes.errorbar(_sigma(row), means, errors, color=colour, label=row["model"], **_POINTS)
        axes.set(title=titles[name], yscale="log")
    panels[0].legend(frameon=False, fontsize="small")
    _plain_numbers(panels)
    return _png(figure)


def quality_plot(metric: str, title: str, ways: Mapping[str, Any]) -> bytes:
    """A metric, which `title` names, by the network calls of a picture: a line for each model and sampler."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), dpi=130, layout="constrained")
    axes = figure.subplots()
    models = [row["model"] for row in next(iter(ways.values()))["metrics"][metric]]
    samplers = list(dict.fromkeys(name.rpartition(",")[0] for name in ways))
    for colour, model in zip(_colours(models), models, strict=True):
        for style, sampler in zip(itertools.cycle(("-", "--", ":", "-.")), samplers, strict=False):
            points = [
                (way["calls"], row["mean"], row["standard_error"])
                for name, way in ways.items()
                for row in way["metrics"][metric]
                if row["model"] == model and name.rpartition(",")[0] == sampler and way["calls"]
            ]
            if points:
                x, y, error = zip(*sorted(points), strict=True)
                label = f"{model}, {sampler}"
                axes.errorbar(x, y, error, color=colour, label=label, **_POINTS | {"fmt": f"o{style}"})
    axes.set(xscale="log", xlabel="network calls for a picture", title=title)
    calls = sorted({way["calls"] for way in ways.values() if way["calls"]})
    axes.set_xticks(calls, map(str, calls))
    axes.minorticks_off()
    axes.grid(True, which="major", alpha=0.25)
    axes.legend(frameon=False, fontsize="small")
    return _png(figure)


_POINTS: dict[str, Any] = {"fmt": "o-", "markersize": 3, "capsize": 2, "linewidth": 1.2}


def _sigma(row: Mapping[str, Any]) -> list[float]:
    """With NaN, which is not drawn, where no signal is left."""
    return [math.nan if sigma is None else sigma for sigma in row["sigma"]]


def _figure(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # drawn by Agg; pyplot and its global state are left alone

    figure = Figure(figsize=(4.6 * max(panels, 1.4), 3.8), dpi=130, layout="constrained")
    found = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in found:
        axes.set(xscale="log", xlabel=NOISE if panels < 3 else "sigma")
        axes.grid(True, which="major", alpha=0.25)
    return figure, found


def _plain_numbers(panels: Sequence[Any]) -> None:
    """Those at a logarithmic y axis of less than a decade as 1.2, not as a power of ten."""
    for axes in panels:
        low, high = axes.get_ylim()
        if axes.get_yscale() == "log" and high < 10 * low:
            for of_axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                of_axis(lambda value, place: f"{value:g}")


def _colours(rows: Sequence[object]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(rows))]


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
