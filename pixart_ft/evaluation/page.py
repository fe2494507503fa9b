"""The report for people: one HTML page that needs no other file, and the lines of it that the terminal shows."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from pixart_ft.evaluation.plots import bound_plot, calibration_plot, loss_plot
from pixart_ft.evaluation.tables import WHOLE

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
body { color: #222; background: #fff }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
table { display: block; overflow-x: auto }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { font-weight: 600; background: #f6f6f6 }
img { max-width: 100%; height: auto } .note { color: #555; font-size: .9rem } li { margin: .3rem 0 }
td.yes { font-weight: 600 } code { background: #f3f3f3; padding: 0 .2rem } details { margin: 1rem 0 }
"""

VARIANCES = {
    "learned": "learned",
    "learned_range": "learned, as other programs read it",
    "beta_tilde": "fixed, smallest (beta tilde)",
    "beta": "fixed, largest (beta)",
}


def summary(found: Mapping[str, Any]) -> list[str]:
    """What came out, a sentence a line."""
    lines = [f"{_models(found)} on {len(found['data']['pictures'])} held-out pictures"]
    if found["loss"]:
        lines += _compared("error of the noise", found["loss"]["rows"], 5)
    for name, table in found["bpd"].items():
        rows = table["variances"].get("learned") or next(iter(table["variances"].values()))
        lines += _compared(f"latent bits/dim, {process_title(name)}", rows, 4)
    if found["ode"]:
        lines += _compared("latent bits/dim by the probability-flow ODE", found["ode"]["rows"], 4)
    for name, table in found["calibration"].items():
        shown = ", ".join(f"{row['model']} {row['factor']:.3f}" for row in table["rows"])
        lines.append(f"variance wrong by a factor of, {process_title(name)}: {shown}")
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


def page(found: Mapping[str, Any], sheets: Mapping[str, Image.Image]) -> str:
    """The whole report; `sheets` are the pictures of all models side by side, by how they were drawn."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Did the fine-tune help?</title><style>{STYLE}</style>",
        "<h1>Did the fine-tune help?</h1>",
        *_introduction(found),
        *_loss(found["loss"]),
        *_bound(found["bpd"], found["ode"]),
        *_calibration(found),
        *_pictures(found["samples"], sheets),
        *_recipe(found),
    ]
    return "\n".join(parts) + "\n"


def _introduction(found: Mapping[str, Any]) -> list[str]:
    pictures, models = found["data"]["pictures"], found["models"]
    return [
        f"<p>{_models(found)} of the PixArt-Sigma kind, which draw pictures from text, are compared here on "
        f"{len(pictures)} captioned pictures that none of them was trained on (<code>{_text(found['data']['origin'])}"
        "</code>). The first is the base; each other one is what a fine-tuning made of it. All of them meet the same "
        "pictures with the same random noise, so that what differs is the models alone. A number after ± is a standard "
        "error over pictures; <i>p</i> is the chance of so large a difference if there were none, after Holm's "
        "correction where several models are compared. Differences in bold have <i>p</i> below 0.05.</p>",
        "<h2>In short</h2>",
        _list(summary(found)[1:]),
        "<h2>The models</h2>",
        _table(
            ["model", "what it is", "predicts", "learned variance"],
            [[m["label"], m["name"], m["prediction_type"], m["variance"]] for m in models],
        ),
    ]


def _loss(loss: Mapping[str, Any]) -> list[str]:
    if not loss:
        return []
    return [
        "<h2>Error on held-out pictures</h2>",
        "<p>A picture is blended with noise, and the network guesses the noise: this is the mean squared error of "
        "the guess, over all strengths of noise alike. Less is better; 1 is the error of guessing nothing. Whatever "
        "a network was trained to predict is turned into a guess of the noise first, at the base's levels of noise, "
        "so that all can be compared.</p>",
        _compared_table(loss["rows"], 5),
        _image(loss_plot(loss["rows"]), "error of the noise by its level"),
        "<p class=note>Each picture is measured at one random step of each part of the process, the same for all "
        "models; the step with the least noise, t = 0, is a part of its own.</p>",
    ]


def _bound(tables: Mapping[str, Any], flow: Mapping[str, Any]) -> list[str]:
    if not tables and not flow:
        return []
    parts = [
        "<h2>Latent bits per dimension</h2>",
        "<p>How many bits the model needs to describe a held-out picture, per number, to a precision that is the "
        "same for all models. Less is better, and below zero is possible, since these are densities. The numbers are "
        "those of the VAE's <b>latents</b>, which the model draws in: they say nothing about bits of pixels, and "
        "compare with no other VAE's. Each is an upper bound (Ho et al. 2020, eq. 5): what the last step leaves of "
        "the picture, a divergence for each step, and the decoder at t = 0. A process of fewer steps, as samplers "
        "walk, has a looser bound.</p>",
    ]
    for name, table in tables.items():
        variances = table["variances"]
        models = [row["model"] for row in next(iter(variances.values()))]
        cells = {(v, row["model"]): row for v, rows in variances.items() for row in rows}
        parts += [
            f"<h3>{process_title(name).capitalize()}</h3>",
            _table(
                ["variance", *models],
                [
                    [VARIANCES[v], *(_number(cells[v, m], 4) if (v, m) in cells else "" for m in models)]
                    for v in variances
                ],
            ),
        ]
        best = variances.get("learned") or next(iter(variances.values()))
        parts.append(_compared_table(best, 4, extra=("prior", "decoder")))
        if name == WHOLE:
            parts.append(_image(bound_plot(best), "terms of the bound by the level of noise"))
    if flow:
        parts += [
            "<h3>By the probability-flow ODE</h3>",
            f"<p>The density of the first {flow['pictures']} pictures' latents, smoothed by the least noise of the "
            "schedule, found by following the noise-free path of sampling backwards. It does not depend on the "
            "variance.</p>",
            _compared_table(flow["rows"], 4),
        ]
    return parts


def _calibration(found: Mapping[str, Any]) -> list[str]:
    tables = found["calibration"]
    if not tables:
        return []
    parts = [
        "<h2>Is the learned variance still right?</h2>",
        "<p>At each step the network says where the next, less noisy picture lies, and by its variance how far off "
        "that may be. <i>Found</i> is how far off it was: the squared distance between the network's mean and the "
        "true one, plus the variance that even the true one leaves (beta tilde), expected over the noise of the "
        "step. Found over predicted is 1 at every step for a variance that is right; above 1 the network is too sure "
        "of itself. A fine-tuning that trains the mean alone leaves the variance behind, which then goes "
        "<i>stale</i>.</p>",
        _image(
            calibration_plot(tables, {name: process_title(name) for name in tables}), "found over predicted variance"
        ),
        "<p><i>Wrong by</i> is the typical factor over the steps (exp of the root mean square of the logarithm), 1 "
        "being right. <i>Bits to save</i> is what the bound above loses by it, with the right factor for a picture "
        "taken from the other pictures: about zero, or a little below, where nothing is wrong.</p>",
    ]
    for name, table in tables.items():
        rows = [[row["model"], f"{row['factor']:.3f}", _number(row, 5), *_difference(row, 5)] for row in table["rows"]]
        parts += [
            f"<h3>{process_title(name).capitalize()}</h3>",
            _table(["model", "wrong by", "bits to save", "more than base", "95 % interval", "p"], rows),
        ]
    steps = [(name, table) for name, table in tables.items() if name != WHOLE] or list(tables.items())
    name, table = steps[0]
    parts.append(f"<details><summary>{process_title(name)}, step by step</summary>{_step_table(table)}</details>")
    return [*parts, _list(verdict(one) for one in found["verdicts"])]


def _step_table(table: Mapping[str, Any]) -> str:
    rows = [
        [row["model"], _span(times), f"{sigma:.4g}", f"{predicted:.3g}", f"{found:.3g}", _number(ratio, 3)]
        for row in table["rows"]
        for times, sigma, predicted, found, ratio in zip(
            row["timesteps"], row["sigma"], row["predicted"], row["empirical"], row["ratio"], strict=True
        )
    ]
    return _table(["model", "timestep", "sigma", "predicted", "found", "found / predicted"], rows)


def _pictures(samples: Mapping[str, Any], sheets: Mapping[str, Image.Image]) -> list[str]:
    if not samples:
        return []
    prompts = "the captions of the held-out pictures" if samples["are_captions"] else "the prompts that were given"
    parts = [
        "<h2>Pictures</h2>",
        f"<p>Every model drew {prompts} from the same random noise, one column each. Seeds "
        f"{samples['seeds'][0]} to {samples['seeds'][-1]}; all {len(samples['prompts']):,} prompts are in the folder "
        "<code>pictures</code> beside this page, each picture with its recipe.</p>",
    ]
    for name, sheet in sheets.items():
        out = io.BytesIO()
        sheet.convert("RGB").save(out, "JPEG", quality=90)
        parts += [f"<h3>{_text(name)}</h3>", _image(out.getvalue(), f"pictures by {name}", "jpeg")]
    return parts


def _recipe(found: Mapping[str, Any]) -> list[str]:
    recipe = {**found["recipe"], **{f"version of {k}": v for k, v in found["recipe"]["versions"].items()}}
    recipe.pop("versions")
    return [
        "<h2>How it was made</h2>",
        f"<p>By <code>pixart-ft evaluate</code> in {found['seconds']:.0f} seconds. The same numbers, with all steps, "
        "are in <code>report.json</code> beside this page.</p>",
        "<details><summary>every setting</summary>",
        _table(["setting", "value"], [[key, str(value)] for key, value in recipe.items()]),
        "</details>",
        "<details><summary>the pictures</summary>",
        _list(found["data"]["pictures"]),
        "</details>",
    ]


def _compared(what: str, rows: Sequence[Mapping[str, Any]], digits: int) -> list[str]:
    base, *others = rows
    lines = []
    for row in others:
        change = row["difference"]
        sure = "significant" if change["significant"] else "not significant"
        lines.append(
            f"{row['model']}: {what} {row['mean']:.{digits}f}, base {base['mean']:.{digits}f}: "
            f"{change['mean']:+.{digits}f} ± {change['standard_error']:.{digits}f}, {sure} ({_chance(change)})"
        )
    return lines or [f"{base['model']}: {what} {_number(base, digits)}"]


def _compared_table(rows: Sequence[Mapping[str, Any]], digits: int, extra: Sequence[str] = ()) -> str:
    head = ["model", "mean", *extra, "minus base", "95 % interval", "p"]
    return _table(
        head,
        [
            [
                row["model"],
                _number(row, digits),
                *(_number(row[key], digits) for key in extra),
                *_difference(row, digits),
            ]
            for row in rows
        ],
    )


def _difference(row: Mapping[str, Any], digits: int) -> list[str]:
    if "difference" not in row:
        return ["", "", ""]
    d = row["difference"]
    number = f"{d['mean']:+.{digits}f} ± {d['standard_error']:.{digits}f}"
    return [
        f"**{number}" if d["significant"] else number,
        f"{d['low']:+.{digits}f} to {d['high']:+.{digits}f}",
        _chance(d),
    ]


def _chance(d: Mapping[str, Any]) -> str:
    return "p < 0.001" if d["corrected"] < 0.001 else f"p = {d['corrected']:.3f}"


def _number(estimate: Mapping[str, Any], digits: int) -> str:
    return f"{estimate['mean']:.{digits}f} ± {estimate['standard_error']:.{digits}f}"


def _span(times: Sequence[float]) -> str:
    low, high = times
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells that begin with ** stand out."""
    lines = ["<table>", "<tr>" + "".join(f"<th>{_text(cell)}" for cell in head)]
    lines += [
        "<tr>" + "".join(f"<td class=yes>{_text(c[2:])}" if c.startswith("**") else f"<td>{_text(c)}" for c in row)
        for row in rows
    ]
    return "\n".join([*lines, "</table>"])


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(item)}" for item in items) + "</ul>"


def _image(data: bytes, what: str, kind: str = "png") -> str:
    return f'<img alt="{_text(what)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _models(found: Mapping[str, Any]) -> str:
    count = len(found["models"])
    return "one model" if count == 1 else f"{count} models"


def _text(value: str) -> str:
    return html.escape(str(value))
