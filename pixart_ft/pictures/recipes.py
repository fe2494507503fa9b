"""Recipes: what a picture was drawn by, in its PNG file; for this package, for other programs, and to draw it again."""

import json
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from pixart_ft.config.samplers import OPTIONS
from pixart_ft.diffusion.intervals import WHOLE, shown
from pixart_ft.errors import UserError

RECIPE_KEY = "pixart_ft"  # the text chunk that holds the recipe, as JSON
PARAMETERS_KEY = "parameters"  # the one that other programs read
FORMAT_KEY = "pixart_ft_format"  # the one that says which words the recipe is in
FORMAT = "2"  # where none is said, iddpm's variance `learned` was what `learned_range` is now
# Keys of a recipe that `pixart-ft generate` knows by the same name.
_SAME = (
    "seed",
    "sampler",
    "steps",
    "guidance",
    "guidance_interval",
    "negative_prompt",
    "schedule",
    "time_conditioning",
    "image",
    "strength",
    "inversion",
    "width",
    "height",
    "model",
    "revision",
    "dtype",
    "text_encoder_quantization",
    "attention",
    "compile",
)


def chunks(recipe: Mapping[str, object]) -> PngImagePlugin.PngInfo:
    """The text chunks of a picture: its recipe, and where it has a prompt the same for other programs."""
    found = PngImagePlugin.PngInfo()
    found.add_text(RECIPE_KEY, json.dumps(recipe, allow_nan=False))
    found.add_text(FORMAT_KEY, FORMAT)
    if "prompt" in recipe:
        found.add_text(PARAMETERS_KEY, parameters(recipe))
    return found


def parameters(recipe: Mapping[str, Any]) -> str:
    """The text that AUTOMATIC1111's web interface writes into its PNG files, and ComfyUI's and Civitai's readers know.

    The prompt, the negative one, and a line of `Name: value`; a value with a comma or a colon is in quotation marks.
    """
    adapters = _adapters(recipe)
    limits = [one.get("interval") for one in adapters]
    size = f"{recipe['width']}x{recipe['height']}" if recipe.get("width") and recipe.get("height") else None
    facts = {
        "Steps": recipe.get("steps"),
        "Sampler": recipe.get("sampler"),
        "CFG scale": recipe.get("guidance"),
        "Seed": recipe.get("seed"),
        "Size": size,
        "Model hash": recipe.get("fingerprint"),
        "Model": recipe.get("model"),
        "Lora": _listed(one.get("path") for one in adapters),
        "Lora scale": _listed(one.get("scale") for one in adapters),
        "Lora interval": _listed(shown(limit) for limit in limits if limit not in (None, list(WHOLE))),
        "Denoising strength": recipe.get("strength") if recipe.get("image") else None,
        "Version": "pixart_ft " + recipe["versions"]["pixart_ft"] if "versions" in recipe else None,
    }
    negative = recipe.get("negative_prompt")
    lines = [recipe["prompt"], *([f"Negative prompt: {negative}"] if negative else [])]
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in facts.items() if value is not None))
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe in a PNG file, in today's words, so that an older picture is drawn again as it was.

    A sheet of samplers does not say their variances: where an older one has iddpm, a warning.
    Raises UserError when there is no such file, or no recipe in it.
    """
    try:
        with Image.open(path) as image:
            texts = getattr(image, "text", {})
            recipe, words = json.loads(texts[RECIPE_KEY]), texts.get(FORMAT_KEY)
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture") from None
    except Exception:  # a broken file makes Pillow raise almost anything
        recipe = words = None
    if not isinstance(recipe, dict):
        raise UserError(
            f"{path} holds no recipe: it is not a PNG by pixart_ft, or a program that drops metadata saved it"
        )
    if words != FORMAT:
        if _inside(recipe, ("options", "variance")) == "learned":
            recipe["options"]["variance"] = "learned_range"
        if isinstance(recipe.get("sampler"), list) and "iddpm" in recipe["sampler"]:
            warnings.warn(
                f"the row iddpm of {path} was drawn by what is variance learned_range now; today's is by learned",
                stacklevel=2,
            )
    return recipe


def config_of(path: Path, given: Collection[str] = ()) -> dict[str, Any]:
    """What a `GenerateConfig` must say to draw the picture again, without what makes no sense beside the keys `given`.

    Raises UserError for a picture without a recipe, one of several pictures, and one drawn while a run trained.
    """
    recipe = read_recipe(path)
    if "pictures" in recipe:
        raise UserError(f"{path} is a sheet of several pictures; give one of them, from its folder")
    if "run" in recipe and not {"lora", "model"} & set(given):
        where = f"the run {recipe['run']} trained, at step {recipe.get('step')}"
        raise UserError(f"{path} was drawn while {where}; give --lora and an adapter of that run, or --model")
    values = {key: recipe[key] for key in _SAME if recipe.get(key) not in (None, "")}
    values["prompts"] = [recipe.get("prompt")]
    if recipe.get("device") == "cpu":  # everywhere; other devices only where they are
        values["device"] = "cpu"
    if "weights" in recipe and "model" not in given:  # of the run that trained the model
        values["weights"] = recipe["weights"]
    if adapters := _adapters(recipe):
        told = {"lora": "path", "lora_scale": "scale"}
        values |= {key: _alone([adapter.get(name) for adapter in adapters]) for key, name in told.items()}
        if "lora" not in given:  # which weights of it, and where it acted, is nothing to another
            intervals = [adapter.get("interval") for adapter in adapters]
            weights = [_inside(adapter, ("metadata", "weights")) for adapter in adapters]
            values["lora_alpha"] = next((one["lora_alpha"] for one in adapters if "lora_alpha" in one), None)
            values["lora_interval"] = intervals[0] if intervals == intervals[:1] * len(intervals) else None
            values["weights"] = weights[0] if weights == weights[:1] * len(weights) else "ema"
        elif len(adapters) > 1:
            values.pop("lora_scale")  # of others, or of another number of them
    options = recipe.get("options")
    if isinstance(options, dict) and not {"sampler", "compare"} & set(given):
        values |= {key: options[key] for key in OPTIONS if options.get(key) is not None}
    if isinstance(recipe.get("sampler"), list):  # a sheet of samplers
        values |= {"compare": True, "compare_samplers": values.pop("sampler")}
        values["compare_steps"] = values.pop("steps", None)
    if "model" in given:
        values.pop("revision", None)
    if "prompts_file" in given:
        values.pop("prompts")
    return values


def changes(recipe: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed, under the same names, since a picture was drawn: its recipe against one of today."""
    found = []
    for what, name, mark in (
        ("the base's weights", ("model",), ("fingerprint",)),
        ("the start picture", ("image",), ("image_sha256",)),
    ):
        if _inside(recipe, name) == _inside(now, name) and _inside(recipe, mark) != _inside(now, mark):
            found.append(what)
    marks = {adapter.get("path"): adapter.get("sha256") for adapter in _adapters(now)}
    if any(marks.get(one.get("path"), one.get("sha256")) != one.get("sha256") for one in _adapters(recipe)):
        found.append("the adapter's weights")
    versions = _inside(now, ("versions",)) or {}
    found += [
        f"{name} ({version}, now {versions[name]})"
        for name, version in (_inside(recipe, ("versions",)) or {}).items()
        if versions.get(name, version) != version
    ]
    return found


def _adapters(recipe: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a recipe says of each adapter: it holds one as it is, several as a list."""
    found = recipe.get("adapter")
    return [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, Mapping)]


def _alone(values: list[Any]) -> Any:
    """A list of one as that one."""
    return values[0] if len(values) == 1 else values


def _listed(values: Iterable[Any]) -> Any:
    """The values, for one line of text; None where there is none."""
    found = list(values)
    return found[0] if len(found) == 1 else ", ".join(map(str, found)) or None


def _inside(recipe: Any, names: Collection[str]) -> Any:
    for name in names:
        recipe = recipe.get(name) if isinstance(recipe, Mapping) else None
    return recipe


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text
