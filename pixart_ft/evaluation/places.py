"""Whether what an evaluation names is there. No torch: a wrong path is known in an instant."""

import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pixart_ft.adapters.files import Adapter, ForeignPlace, find_adapter
from pixart_ft.config.evaluate import EvaluateConfig
from pixart_ft.config.reading import load
from pixart_ft.config.train import TrainConfig
from pixart_ft.data.folders import check_folder, picture_folder, share_pictures
from pixart_ft.data.sources import folder_of
from pixart_ft.errors import Mistakes, UserError
from pixart_ft.model.place import resolve_base
from pixart_ft.runs.folder import RunFolder
from pixart_ft.runs.results import Model, at_step, what_of


@dataclass(frozen=True)
class Entry:
    """What is compared with the base: adapters on it, together, or a whole model.

    name   as it was given, and the strength where that is not 1
    model  a whole model, by its place; None: adapters
    base   the one that it was trained on; None: it does not say
    """

    name: str
    adapters: tuple[Adapter | ForeignPlace, ...] = ()
    scales: tuple[float, ...] = (1.0,)
    model: str | None = None
    base: tuple[str, str | None] | None = None


def check_evaluation(config: EvaluateConfig) -> list[Entry]:
    """Raise one UserError with every path of an evaluation that leads nowhere; returns what is compared."""
    mistakes = Mistakes()
    entries: list[Entry] = []
    if config.model is not None:
        with mistakes.noted():
            resolve_base(config.model, config.weights)
    if config.lora is not None:
        adapters = []
        for place in config.lora:
            with mistakes.noted():
                adapters.append(find_adapter(place, config.weights, None))
        if adapters:
            scales = config.lora_scale if len(config.lora_scale) > 1 else config.lora_scale * len(config.lora)
            scaled = zip(config.lora, scales, strict=True)
            name = " + ".join(f"{place}" if scale == 1 else f"{place} x {scale:g}" for place, scale in scaled)
            entries.append(Entry(name, tuple(adapters), config.lora_scale, base=_base_of(adapters[0])))
    for name in config.runs:
        with mistakes.noted():
            entries.append(_entry(name, config))
    names = [entry.name for entry in entries]
    if twice := {name for name in names if names.count(name) > 1}:
        mistakes.add(f"runs: {', '.join(sorted(twice))} is given twice; give each once")
    if config.model is None:
        for entry in entries[:1]:
            if entry.base is None:
                mistakes.add(f"model: {entry.name} does not say what it was trained on; give --model")
    for key, named, part in (("data", config.data, "held_out"), ("train_data", config.train_data, "train")):
        if named is not None:
            folder = picture_folder(named, part)
            with mistakes.noted():
                check_folder(folder, key)
            if config.out.resolve().is_relative_to(folder.resolve()):
                mistakes.add(
                    f"out: {config.out} lies inside {key} {folder}, so what is drawn would be taken for some of it; "
                    "choose a place outside"
                )
    if config.data is not None and config.train_data is not None:
        held_out, trained = picture_folder(config.data, "held_out"), picture_folder(config.train_data, "train")
        if share_pictures(held_out, trained):
            mistakes.add(f"train_data: {trained} and data {held_out} share pictures; keep them apart")
    if config.prompts_file is not None and not config.prompts_file.is_file():
        mistakes.add(f"prompts_file: there is no file {config.prompts_file}")
    mistakes.raise_if_any()
    if config.data is not None:
        for name in (*config.runs, *map(str, config.lora or ())):
            _warn_of_seen(picture_folder(config.data, "held_out"), name)
    return entries


def _warn_of_seen(held_out: Path, name: str) -> None:
    """Warn where a run that is here was trained on pictures of that folder."""
    place, _ = at_step(Path(name).expanduser()) or (Path(name).expanduser(), 0)
    run = next((folder for folder in (place, *place.parents) if RunFolder(folder).is_run), None)
    if run is None:
        return
    with suppress(UserError):  # of another version of the configuration
        config = load(TrainConfig, RunFolder(run).config_file)
        for key, source in config.data.every_source().items():
            folder = None if source.use == "held_out" else folder_of(source)
            if folder is not None and share_pictures(folder, held_out):
                warnings.warn(
                    f"data: {name} was trained on {key} {folder}, which shares pictures with {held_out}, so what is "
                    "measured is not of new ones; what a training sets aside is measured by validation.report",
                    stacklevel=3,
                )


def _entry(name: str, config: EvaluateConfig) -> Entry:
    if (Path(name) / "model_index.json").is_file() and what_of(Path(name)) != "model":
        return Entry(name, model=resolve_base(name))
    if what_of(Path(name)) == "model":
        found = Model.read(name, weights=config.weights)
        return Entry(name, model=str(found.folder), base=(found.metadata.base, found.metadata.revision))
    adapter = find_adapter(name, config.weights, None)
    return Entry(name, (adapter,), base=_base_of(adapter))


def _base_of(adapter: Adapter | ForeignPlace) -> tuple[str, str | None] | None:
    return (adapter.metadata.base, adapter.metadata.revision) if isinstance(adapter, Adapter) else None
