"""A picture of a process and of what a training makes of it, t for t."""

from pathlib import Path
from typing import Any

from torch import Tensor

from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.files import write_file
from pixart_ft.pictures.lettering import fitting
from pixart_ft.pictures.recipes import chunks

PLOT = "process"  # the key by which the recipe of such a plot is known


def process_plot(
    path: Path, *, title: str, schedule: NoiseSchedule, base: NoiseSchedule, weights: Tensor, law: Tensor
) -> None:
    """Draw a PNG of six panels over t: alpha_bar, SNR, what the network is told, variances of a step, and two tables.

    base: the schedule that the network knows, dashed where it is another; weights (T,) of the squared error of the
    noise, with gaps where they are not finite; law (T,), the probability of each t.
    """
    from matplotlib.figure import Figure  # drawn by Agg; pyplot and its global state are left alone

    figure = Figure(figsize=(13, 7.4), dpi=100, layout="constrained")
    font, shown = fitting(title)
    figure.suptitle(shown, font=Path(font), parse_math=False)
    (signal, snr, told), (steps, weight, probability) = figure.subplots(2, 3)
    other = base.num_steps != schedule.num_steps or not bool((base.alpha_bar == schedule.alpha_bar).all())
    for axes, name, tables in (
        (signal, "alpha_bar", [one.alpha_bar for one in (schedule, base)]),
        (snr, "SNR", [one.snr for one in (schedule, base)]),
        (told, "timestep", [one.timesteps for one in (schedule, base)]),
    ):
        _curve(axes, tables[0], "this process")
        if other:
            _curve(axes, tables[1], "the base's", color="tab:gray", linestyle="--")
            axes.legend(frameon=False, fontsize="small")
        axes.set_ylabel(name)
    signal.set_title("signal: share of the variance")
    snr.set_title("signal-to-noise ratio")
    told.set_title("what the network is told")
    steps.set_title("variance of a step")
    _curve(steps, schedule.betas, "beta")
    _curve(steps, schedule.posterior_variance, "beta tilde", color="tab:orange")
    steps.legend(frameon=False, fontsize="small")
    weight.set_title("weight of the noise's error")
    _curve(weight, weights, "")
    probability.set_title("law of t: probability times T")
    _curve(probability, law * len(law), "", color="tab:green")
    probability.set_ylim(bottom=0)
    for axes in (snr, steps, weight):
        axes.set_yscale("log")
    for axes in figure.axes:
        axes.set_xlabel("t")
        axes.grid(True, alpha=0.25)
    recipe = {"pnginfo": chunks({PLOT: title})}
    write_file(path, lambda file: figure.savefig(file, format="png", pil_kwargs=recipe))


def _curve(axes: Any, table: Tensor, label: str, **style: Any) -> None:
    axes.plot(range(len(table)), table.tolist(), label=label, **style)
