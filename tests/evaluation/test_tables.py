"""From measurements to statements. Oracle: what was put in, and Gaussian statistics."""

import math
from dataclasses import replace

import pytest
import torch

from pixart_ft.diffusion.names import VarianceState
from pixart_ft.diffusion.readings import Readings, Steps
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.evaluation.tables import (
    Measured,
    Process,
    bound_tables,
    calibration_tables,
    loss_table,
    rows_of,
    verdicts,
)
from pixart_ft.evaluation.words import _compared, overview, verdict

PICTURES, DIMENSIONS = 30, 200


def measured(
    label: str, seed: int, *, off: float = 1.0, error: float = 1.0, variance: VarianceState = "trained"
) -> Measured:
    """A model on a process of 10 steps whose variances are `off` times the right ones, with Gaussian errors."""
    draw = torch.Generator().manual_seed(seed)
    steps = Steps.every(NoiseSchedule.linear().respaced(10), PICTURES)
    squares = torch.randn(PICTURES, 10, DIMENSIONS, generator=draw, dtype=torch.float64).square().mean(dim=2)
    ratio = squares / off
    bits = 0.5 * (math.log(off) + ratio) / math.log(2)
    readings = Readings(bits, squares, error * squares, torch.full_like(ratio, off), squares, ratio)
    process = Process(
        steps, {"learned": readings, "beta_tilde": replace(readings, bits=bits + 1)}, torch.zeros(PICTURES)
    )
    return Measured(label, variance, process, {"10": process}, None)


def test_a_model_with_scrambled_variances_is_called_so_and_its_error_is_not() -> None:
    base, tuned = measured("base", 0), measured("tuned", 0, off=1.5)
    (row, other) = loss_table([base, tuned])["rows"]
    assert row["mean"] == other["mean"] and other["difference"]["corrected"] == 1
    rows = bound_tables([base, tuned])["10"]["variances"]["learned"]
    lost = 10 * 0.5 * (1 / 1.5 - 1 + math.log(1.5)) / math.log(2)
    assert rows[1]["difference"]["mean"] == pytest.approx(lost, rel=0.05) and rows[1]["difference"]["significant"]
    before, after = calibration_tables([base, tuned])["10"]["rows"]
    assert before["factor"] == pytest.approx(1, abs=0.02) and after["factor"] == pytest.approx(1.5, abs=0.03)
    assert after["mean"] == pytest.approx(lost, rel=0.05) and after["difference"]["significant"]
    (found,) = verdicts([base, tuned])
    assert list(found["worse"]) == ["10"] and "fits worse than the base's (10 steps" in verdict(found)


def test_a_variance_that_fits_better_than_the_bases_is_not_stale() -> None:
    (found,) = verdicts([measured("base", 0, off=1.5), measured("tuned", 1)])
    assert not found["worse"] and verdict(found) == "tuned: its variance fits no worse than the base's"


def test_a_stale_variance_is_named_with_its_number_or_without() -> None:
    base = measured("base", 0)
    words = {off: verdict(verdicts([base, measured("mse", 1, off=off, variance="stale")])[0]) for off in (1.0, 1.5)}
    assert all(
        text.startswith("mse: its variance is stale, since its training left it alone; ") for text in words.values()
    )
    assert words[1.0].endswith("no number here shows it: it still fits as the base's")
    assert "the numbers show it (10 steps: 0." in words[1.5]


def test_two_seeds_of_one_model_seldom_differ() -> None:
    """Nothing but chance: at most 5 % of the comparisons call anything significant, to four deviations."""
    trials, called = 60, {"loss": 0, "bits": 0, "stale": 0}
    for trial in range(trials):
        pair = [measured("base", 2 * trial), measured("again", 2 * trial + 1)]
        called["loss"] += loss_table(pair)["rows"][1]["difference"]["significant"]
        called["bits"] += bound_tables(pair)["10"]["variances"]["learned"][1]["difference"]["significant"]
        called["stale"] += bool(verdicts(pair)[0]["worse"])
    assert all(count < 0.05 * trials + 4 * math.sqrt(0.05 * 0.95 * trials) for count in called.values()), called


def test_the_overview_says_what_is_better() -> None:
    """Less error is better, more fit to the prompt is better; what chance explains is neither."""
    models = [measured("base", 0), measured("tuned", 0, error=0.5), measured("again", 1)]
    rows = [
        {"model": name, "mean": mean} | ({"difference": {"significant": significant, "mean": change}} if change else {})
        for name, mean, significant, change in (
            ("base", 20.0, False, 0),
            ("tuned", 21.0, True, 1),
            ("again", 19, False, -1),
        )
    ]
    likeness = {"ways": {"ddim, 25 steps": {"metrics": {"clip_score": rows, "nearer_to_training": rows}}}}
    found = {
        "loss": loss_table(models),
        "bpd": {},
        "likeness": likeness,
        "models": [{"label": m.label} for m in models],
    }
    head, (error, fit) = overview(found)
    assert [error[0], fit[0]] == ["error of the noise", "fit to the prompt, ddim, 25 steps"]
    base, tuned, again = zip(head[1:], error[1:], fit[1:], strict=True)
    assert base[0] == "base" and base[2] == "20.00" and "(" not in base[1]
    assert tuned[1].endswith(" (better)") and tuned[2] == "21.00 (better)"
    assert again[1].endswith(" (no difference)") and again[2] == "19.00 (no difference)"


def test_without_the_base_nothing_is_compared() -> None:
    values = {"one": torch.zeros(5), "two": torch.ones(5)}
    rows = rows_of(values, {})
    assert [row["mean"] for row in rows] == [0, 1] and not any("difference" in row for row in rows)
    assert _compared("KID", rows, 1) == ["one: KID 0.0 ± 0.0", "two: KID 1.0 ± 0.0"]
    assert "difference" in rows_of({"base": values["one"], **values}, {})[1]


def test_means_are_over_the_whole_process() -> None:
    """Steps that stand for more weigh more: 0.9 of the error is at the one that stands for nine."""
    one = measured("base", 0)
    steps = Steps(NoiseSchedule.linear(10), torch.tensor([[0, 5], [0, 3]]), torch.tensor([1.0, 9.0]).double())
    values = torch.tensor([[2.0, 1.0], [4.0, 3.0]]).double()
    process = Process(steps, {"learned": Readings(*[values] * 6)}, torch.tensor([0.5, 1.5]))
    model = replace(one, levels=process, processes={"whole": process})
    (row,) = loss_table([model])["rows"]
    assert row["mean"] == pytest.approx(((2 + 9 * 1) / 10 + (4 + 9 * 3) / 10) / 2)
    assert row["per_t"][1] == {"mean": 2.0, "standard_error": pytest.approx(1.0)}
    assert row["timesteps"] == [[0, 0], [3, 5]]
    (row,) = bound_tables([model])["whole"]["variances"]["learned"]
    assert row["mean"] == pytest.approx((2 + 9 + 0.5 + 4 + 27 + 1.5) / 2)
    assert (row["decoder"]["mean"], row["prior"]["mean"]) == (3.0, 1.0)
