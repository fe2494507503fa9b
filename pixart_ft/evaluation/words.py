"""What an evaluation found, in words: sentences for the terminal, an overview and verdicts for the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from pixart_ft.evaluation.tables import WHOLE

# Of each number by the features of pictures: what it is called, what it says, its digits; LESS is better of these.
LIKENESS = {
    "fd": ("Frechet distance", "to the held-out pictures, extrapolated to infinitely many; less is better", 3),
    "kid": ("kernel distance (KID)", "squared MMD, unbiased; less is better, 0 is no difference", 4),
    "cmmd": ("kernel distance (CMMD)", "1000 times the squared MMD of a Gaussian kernel; less is better", 3),
    "precision": ("precision", "share of drawn pictures that are like real ones", 3),
    "recall": ("recall", "share of real pictures that are like drawn ones", 3),
    "density": ("density", "as precision, by how many real ones are near; 1 where both agree", 3),
    "coverage": ("coverage", "share of real pictures with a drawn one near", 3),
    "clip_score": ("fit to the prompt", "100 times the cosine of picture and prompt; more is better", 2),
    "caption_first": ("right prompt first", "share of pictures that fit no other prompt better", 3),
    "nearer_to_training": ("nearer to training", "share of drawn pictures whose nearest real one was trained on", 3),
    "closer_than_held_out": (
        "closer than held out",
        "how often a drawn picture is closer to the training pictures than a held-out one is; 0.5 by chance",
        3,
    ),
}
LESS = ("fd", "kid", "cmmd")
TELLS_MEMORY = ("nearer_to_training", "closer_than_held_out")  # neither more nor less is better


def summary(found: Mapping[str, Any]) -> list[str]:
    """What came out, a sentence a line."""
    lines = [f"{models_in(found)} on {len(found['data']['pictures'])} held-out pictures"]
    if found["loss"]:
        lines += _compared("error of the noise", found["loss"]["rows"], 5)
    for name, table in found["bpd"].items():
        lines += _compared(f"latent bits/dim, {process_title(name)}", _learned_or_first(table), 4)
    if found["ode"]:
        lines += _compared("latent bits/dim by the probability-flow ODE", found["ode"]["rows"], 4)
    for name, table in found["calibration"].items():
        shown = ", ".join(f"{row['model']} {row['factor']:.3f}" for row in table["rows"])
        lines.append(f"variance wrong by a factor of, {process_title(name)}: {shown}")
    if found["likeness"]:
        name, way = next(iter(found["likeness"]["ways"].items()))
        for metric, rows in way["metrics"].items():
            lines += _compared(f"{LIKENESS[metric][0]} ({name})", rows, LIKENESS[metric][2])
    return lines + [verdict(one) for one in found["verdicts"]] + list(found["notes"])


def verdict(one: Mapping[str, Any]) -> str:
    """Whether a model's learned variance still fits, in a sentence."""
    model, worse = one["model"], one["worse"]
    if not one["tested"]:
        return f"{model}: it has no learned variance, or its base has none, so there is nothing to go stale"
    numbers = "; ".join(
        f"{process_title(name)}: {d['mean']:.4g} ± {d['standard_error']:.2g} bits/dim more to save than the base's"
        for name, d in worse.items()
    )
    if one["trained"] == "stale":
        shows = f"the numbers show it ({numbers})" if worse else "no number here shows it: it still fits as the base's"
        return f"{model}: its variance is stale, since its training left it alone; {shows}"
    if worse:
        return f"{model}: its variance was trained, and yet fits worse than the base's ({numbers})"
    return f"{model}: its variance fits no worse than the base's"


def process_title(name: str) -> str:
    """What the name of a process means."""
    return "whole process" if name == WHOLE else f"{name} steps"


def overview(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A table of the main numbers, a column for each model: each with whether it is better or worse than the base's."""
    lines: list[tuple[str, Sequence[Mapping[str, Any]], int, bool]] = []
    if found["loss"]:
        lines.append(("error of the noise", found["loss"]["rows"], 4, True))
    for name, table in found["bpd"].items():
        lines.append((f"bits/dim, {process_title(name)}", _learned_or_first(table), 3, True))
    for name, way in list(found["likeness"].get("ways", {}).items())[:1]:
        lines += [
            (f"{LIKENESS[metric][0]}, {name}", rows, LIKENESS[metric][2], metric in LESS)
            for metric, rows in way["metrics"].items()
            if metric not in TELLS_MEMORY
        ]
    models = [model["label"] for model in found["models"]]
    table = []
    for title, rows, digits, less in lines:
        said = {row["model"]: f"{row['mean']:.{digits}f}{_better(row, less)}" for row in rows}
        table.append([title, *(said.get(model, "") for model in models)])
    return ["", *models], table


def _better(row: Mapping[str, Any], less: bool) -> str:
    change = row.get("difference")
    if change is None:
        return ""
    if not change["significant"]:
        return " (no difference)"
    return " (better)" if (change["mean"] < 0) == less else " (worse)"


def number(estimate: Mapping[str, Any], digits: int) -> str:
    """A mean and its standard error."""
    return f"{estimate['mean']:.{digits}f} ± {estimate['standard_error']:.{digits}f}"


def chance(d: Mapping[str, Any]) -> str:
    """How likely a difference is by chance."""
    return "p < 0.001" if d["corrected"] < 0.001 else f"p = {d['corrected']:.3f}"


def _compared(what: str, rows: Sequence[Mapping[str, Any]], digits: int) -> list[str]:
    lines = []
    for row in rows:
        if (change := row.get("difference")) is None:
            continue
        sure = "significant" if change["significant"] else "not significant"
        lines.append(
            f"{row['model']}: {what} {row['mean']:.{digits}f}, base {rows[0]['mean']:.{digits}f}: "
            f"{change['mean']:+.{digits}f} ± {change['standard_error']:.{digits}f}, {sure} ({chance(change)})"
        )
    return lines or [f"{row['model']}: {what} {number(row, digits)}" for row in rows]


def models_in(found: Mapping[str, Any]) -> str:
    """How many models there are."""
    count = len(found["models"])
    return "one model" if count == 1 else f"{count} models"


def _learned_or_first(table: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The bound by the learned variance, or by a fixed one where there is none."""
    rows: Sequence[Mapping[str, Any]] = table["variances"].get("learned") or next(iter(table["variances"].values()))
    return rows
