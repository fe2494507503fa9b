"""The plot of a process. Oracle: the tables that the lines of the figure hold."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.pictures.process_plot import process_plot


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.cosine(100).counted_as(1000)])
def test_every_panel_shows_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: NoiseSchedule) -> None:
    figures: list[Figure] = []

    def saved(figure: Figure, path: Path, **_: Any) -> None:
        figures.append(figure)
        Image.new("RGB", (2, 2)).save(path, format="PNG")

    monkeypatch.setattr(Figure, "savefig", saved)
    base, steps = NoiseSchedule.linear(), schedule.num_steps
    weights, law = torch.rand(steps), torch.full((steps,), 1 / steps)
    process_plot(tmp_path / "plot.png", title="a $b$ c", schedule=schedule, base=base, weights=weights, law=law)
    own = [schedule.alpha_bar, schedule.snr, schedule.timesteps, schedule.betas, weights, law * steps]
    assert (tmp_path / "plot.png").is_file() and len(figures[0].axes) == 6
    for axes, table in zip(figures[0].axes, own, strict=True):
        assert numpy.asarray(axes.lines[0].get_ydata()).tolist() == table.tolist() and axes.get_title()
    others = [numpy.asarray(axes.lines[1].get_ydata()).tolist() for axes in figures[0].axes[:3] if len(axes.lines) > 1]
    expected = [] if steps == 1000 else [base.alpha_bar.tolist(), base.snr.tolist(), base.timesteps.tolist()]
    assert others == expected
