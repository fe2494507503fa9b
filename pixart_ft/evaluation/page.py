"""The report for people: one HTML page that needs no other file."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from pixart_ft.config.text import numbered
from pixart_ft.evaluation.plots import bound_plot, calibration_plot, loss_plot, quality_plot
from pixart_ft.evaluation.tables import WHOLE
from pixart_ft.evaluation.words import LIKENESS, chance, models_in, number, overview, process_title, verdict

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
body { color: #222; background: #fff }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
table { display: block; overflow-x: auto }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap }
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


def page(found: Mapping[str, Any], sheets: Mapping[str, Image.Image], near: Mapping[str, Image.Image]) -> str:
    """The whole report.

    sheets   the pictures of all models side by side, by how they were drawn
    near     by model, pictures with their nearest real ones
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Did the fine-tune help?</title><style>{STYLE}</style>",
        "<h1>Did the fine-tune help?</h1>",
        *_introduction(found),
        *_loss(found["loss"]),
        *_bound(found["bpd"], found["ode"]),
        *_calibration(found),
        *_pictures(found["samples"], sheets),
        *_likeness(found["likeness"], near),
        *_recipe(found),
    ]
    return "\n".join(parts) + "\n"


def _introduction(found: Mapping[str, Any]) -> list[str]:
    pictures, models = found["data"]["pictures"], found["models"]
    return [
        f"<p>{models_in(found)} of the PixArt-Sigma kind, which draws pictures from text, compared on {len(pictures)} "
        f"captioned pictures that are to be new to all of them (<code>{_text(found['data']['origin'])}</code>). The "
        "first is the base; each other one is what a fine-tuning made of it. All of them meet the same pictures with "
        "the same random noise, so that what differs is the models alone. A number after ± is a standard error over "
        "pictures; <i>p</i> is the chance of so large a difference if there were none, after Holm's correction where "
        "several models are compared. Differences in bold have <i>p</i> below 0.05.</p>",
        "<h2>In short</h2>",
        _table(*overview(found)),
        _list([*(verdict(one) for one in found["verdicts"]), *found["notes"]]),
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
                    [VARIANCES[v], *(number(cells[v, m], 4) if (v, m) in cells else "" for m in models)]
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
        "<i>stale</i>. In the whole process nearly all of what is found is beta tilde, the same for all; the fewer the "
        "steps, the more of it is the network's error.</p>",
        _image(
            calibration_plot(tables, {name: process_title(name) for name in tables}), "found over predicted variance"
        ),
        "<p><i>Wrong by</i> is the typical factor over the steps (exp of the root mean square of the logarithm), 1 "
        "being right. <i>Bits to save</i> is what the bound above loses by it, with the right factor for a picture "
        "taken from the other pictures: about zero, or a little below, where nothing is wrong. Each table is a "
        "family of tests of its own; the verdicts below take all of them as one, and so ask for more.</p>",
    ]
    for name, table in tables.items():
        rows = [[row["model"], f"{row['factor']:.3f}", number(row, 5), *_difference(row, 5)] for row in table["rows"]]
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
        [
            row["model"],
            _span(times),
            "infinite" if sigma is None else f"{sigma:.4g}",
            f"{predicted:.3g}",
            f"{found:.3g}",
            number(ratio, 3),
        ]
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
    first, last = samples["seeds"][0], samples["seeds"][-1]
    seeds = f"Seed {first}" if first == last else f"Seeds {first} to {last}"
    parts = [
        "<h2>Pictures</h2>",
        f"<p>Every model drew {prompts} from the same random noise, one column each. {seeds}; all "
        f"{len(samples['prompts']):,} prompts are in the folder "
        "<code>pictures</code> beside this page, each picture with its recipe.</p>",
    ]
    for name, sheet in sheets.items():
        parts += [f"<h3>{_text(name)}</h3>", _sheet(sheet, f"pictures by {name}")]
    return parts


def _likeness(likeness: Mapping[str, Any], near: Mapping[str, Image.Image]) -> list[str]:
    if not likeness:
        return []
    features, ways = likeness["features"], likeness["ways"]
    parts = [
        "<h2>How like the real ones</h2>",
        f"<p>Pictures are compared by {features['numbers']} numbers that the network "
        f"<code>{_text(features['name'])}</code> ({features['digest']}) makes of each: what it does not see, these "
        f"figures do not say, and with another network they are others. There are {features['real']} held-out pictures"
        + (f" and {features['training']} that were trained on" if features["training"] else "")
        + ". Errors are by leaving out parts of the pictures.</p>",
    ]
    for name, way in ways.items():
        parts.append(f"<h3>{_text(name)}</h3>")
        for metric, rows in way["metrics"].items():
            title, what, digits = LIKENESS[metric]
            parts += [f"<p><b>{title}</b>: {what}.</p>", _compared_table(rows, digits)]
    if len(ways) > 1:
        parts.append("<h3>Quality and cost</h3>")
        shown = [m for m in ("fd", "kid", "cmmd", "clip_score") if m in next(iter(ways.values()))["metrics"]]
        parts += [_image(quality_plot(m, LIKENESS[m][0], ways), f"{LIKENESS[m][0]} by network calls") for m in shown]
    for model, sheet in near.items():
        chance = next(iter(ways.values()))["neighbours"][model]["chance"]
        parts += [
            f"<h3>Nearest neighbours, {_text(model)}</h3>",
            "<p>The drawn pictures that are nearest to one of the training, with their distances. Where nothing is "
            f"memorised, {chance:.0%} of all drawn pictures are nearer to a training picture than to a held-out "
            "one.</p>",
            _sheet(sheet, f"nearest neighbours of {model}"),
        ]
    return parts


def _sheet(sheet: Image.Image, what: str) -> str:
    out = io.BytesIO()
    sheet.convert("RGB").save(out, "JPEG", quality=90)
    return _image(out.getvalue(), what, "jpeg")


def _recipe(found: Mapping[str, Any]) -> list[str]:
    recipe = {**found["recipe"], **{f"version of {k}": v for k, v in found["recipe"]["versions"].items()}}
    recipe.pop("versions")
    spent = numbered(f"{found['seconds']:.0f}", "second")
    return [
        "<h2>How it was made</h2>",
        f"<p>By <code>pixart-ft evaluate</code> in {spent}. The same numbers, with all steps, "
        "are in <code>report.json</code> beside this page.</p>",
        "<details><summary>every setting</summary>",
        _table(["setting", "value"], [[key, str(value)] for key, value in recipe.items()]),
        "</details>",
        "<details><summary>the pictures</summary>",
        _list(found["data"]["pictures"]),
        "</details>",
    ]


def _compared_table(rows: Sequence[Mapping[str, Any]], digits: int, extra: Sequence[str] = ()) -> str:
    head = ["model", "mean", *extra, "minus base", "95 % interval", "p"]
    return _table(
        head,
        [
            [
                row["model"],
                number(row, digits),
                *(number(row[key], digits) for key in extra),
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
        chance(d),
    ]


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


def _text(value: str) -> str:
    return html.escape(str(value))
