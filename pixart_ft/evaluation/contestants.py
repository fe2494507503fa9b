"""What an evaluation compares and on what, read and checked before a weight is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

from pixart_ft.adapters.adopting import like_base, taken_in
from pixart_ft.adapters.files import Adapter
from pixart_ft.config.evaluate import LIKENESS, EvaluateConfig, draws
from pixart_ft.config.train import HUB_BASE
from pixart_ft.data.buckets import Shapes, Sized, square, table
from pixart_ft.data.folders import picture_folder, survey
from pixart_ft.data.pixels import Fit
from pixart_ft.data.rows import Row
from pixart_ft.data.seen import verified
from pixart_ft.errors import Mistakes, UserError
from pixart_ft.evaluation.drawing import settings_of
from pixart_ft.evaluation.places import Entry
from pixart_ft.evaluation.tables import BASE
from pixart_ft.files import probe
from pixart_ft.model.base import Base
from pixart_ft.model.place import DEMO_FOLDER
from pixart_ft.model.quantized import check_quantization
from pixart_ft.sampling.command import device_of, prompts_of
from pixart_ft.sampling.settings import Settings
from pixart_ft.sampling.text_to_image import abilities_of


@dataclass(frozen=True)
class Contestant:
    """A model of the report, before its weights are loaded.

    label   what the report calls it; name: as it was given
    ways    how it draws, and `refused` why not otherwise
    """

    label: str
    name: str
    base: Base
    adapters: Sequence[Adapter] = ()
    scales: Sequence[float] = (1.0,)
    ways: Sequence[Settings] = ()
    refused: Sequence[str] = ()


@dataclass(frozen=True)
class Contest:
    """What is compared, and on what.

    contestants     the models, the base first
    rows, fits      the held-out pictures and how each is fitted, those of one size after each other
    origin, size    where they are from; the side of a square of as many pixels
    prompts         that are drawn, if any
    features        the name of what sees pictures, if anything is to
    training        the pictures that memorisation asks for
    """

    contestants: Sequence[Contestant]
    rows: Sequence[Row]
    fits: Sequence[Fit]
    origin: str
    size: int
    prompts: Sequence[str]
    features: str | None
    training: Sequence[Row]


def look(config: EvaluateConfig, entries: Sequence[Entry], held_out: Sequence[tuple[Row, Fit]] | None) -> Contest:
    """Raises one UserError with all that can be refused by now. `held_out`: pictures in place of the folder's."""
    base = _base(config, entries)
    size = config.size or base.native_size
    contestants, mistakes = list[Contestant](), Mistakes()
    with mistakes.noted():
        contestants.append(_contestant(BASE, Entry(base.name), base, config))
    for label, entry in zip(_labels([entry.name for entry in entries]), entries, strict=True):
        with mistakes.noted():
            contestants.append(_contestant(label, entry, base, config))
    held, prompts, origin = list[tuple[Row, Fit]](), list[str](), "held out by the training"
    with mistakes.noted():
        if held_out is None:
            what = "a folder of pictures with captions that none of the models has seen"
            origin = _or_demo(config.data, base, "data", what)
            rows = survey(picture_folder(origin, "held_out")).usable(strict=False)
        else:
            rows = [row for row, _ in held_out]
        if len(rows) < 2:
            raise UserError(f"data: one picture in {origin}; an error, and so any comparison, takes two or more")
        seen = verified(rows[: config.pictures])
        if held_out is None:
            sizes = table(size, base.size_unit) if config.aspect == "buckets" else square(size)
            sized = Sized.by(Shapes((sizes,)), rows[: len(seen)], [one.size for one in seen])
            held_out = [(row, Fit(size)) for row, size in zip(sized.rows, sized.sizes, strict=True)]
        held = list(held_out[: len(seen)])
    rows = [row for row, _ in held]
    with mistakes.noted():
        if rows and draws(config.metrics):
            captions = [row.caption for row in rows] if config.prompts_file is None else []
            prompts = prompts_of(captions, config.prompts_file, config.images_per_prompt)
    features, training = None, list[Row]()
    with mistakes.noted():
        if {*LIKENESS} & {*config.metrics}:
            features = _or_demo(config.features, base, "features", "a network of transformers that sees pictures")
    with mistakes.noted():
        if "memorisation" in config.metrics:
            chosen = _or_demo(config.train_data, base, "train_data", "the folder of pictures that was trained on")
            training = survey(picture_folder(chosen, "train")).usable(strict=False)
            verified(training)
    if {*config.metrics} == {"calibration"} and contestants and all(one.base.variance == "none" for one in contestants):
        mistakes.add("metrics: calibration is of a learned variance, and these models have none; take another metric")
    with mistakes.noted():
        device_of(config.device)
    with mistakes.noted():
        check_quantization("text_encoder_quantization", config.text_encoder_quantization)
    with mistakes.noted():
        probe(config.out, "out")
    mistakes.raise_if_any()
    return Contest(contestants, rows, [fit for _, fit in held], origin, size, prompts, features, training)


def _base(config: EvaluateConfig, entries: Sequence[Entry]) -> Base:
    """The base asked for, else what the first run was trained on, else the Hub's."""
    trained_on = next((entry.base for entry in entries), None)
    if config.model is None and trained_on is not None:
        return Base.read(*trained_on)
    return Base.read(config.model or HUB_BASE, config.revision, config.weights)


def _contestant(label: str, entry: Entry, base: Base, config: EvaluateConfig) -> Contestant:
    adapters = taken_in(entry.adapters, lambda: like_base(base), None)
    model = base if entry.model is None else Base.read(entry.model)
    if model.native_size != base.native_size or model.latent_scale != base.latent_scale:
        raise UserError(
            f"runs: {entry.name} draws {model.native_size} x {model.native_size} pixels with latents scaled by "
            f"{model.latent_scale.scale:g}, and the base {base.name} {base.native_size} x {base.native_size} by "
            f"{base.latent_scale.scale:g}; evaluate it by itself, as --model"
        )
    abilities = abilities_of(model, adapters)
    most, there = max(config.respacings, default=0), abilities.schedule.num_steps
    if most > there and {"bpd", "calibration"} & {*config.metrics}:
        raise UserError(f"respacings: {entry.name} was trained on {there} steps, and {most} are more; leave them out")
    ways, refused = settings_of(config, abilities, entry.name) if draws(config.metrics) else ([], [])
    if refused and not ways:
        raise UserError("\n".join(f"{entry.name}: {fault}" for fault in refused))
    return Contestant(label, entry.name, model, adapters, entry.scales, ways, refused)


def _labels(names: Sequence[str]) -> list[str]:
    """The last parts of paths, where they tell them apart; none is called as the base is."""
    short = [" + ".join(part.rstrip("/").rpartition("/")[2] for part in name.split(" + ")) for name in names]
    if len({*short, BASE}) == len(short) + 1:
        return short
    return [f"the run {BASE}" if name == BASE else name for name in names]


def _or_demo(value: str | None, base: Base, key: str, what: str) -> str:
    """The value of a key that has one of its own for the demo alone."""
    if value is None and base.place != str(DEMO_FOLDER):
        raise UserError(f"{key}: give --{key.replace('_', '-')}, {what}")
    return value or "demo"
