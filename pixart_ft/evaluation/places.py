"""Whether what an evaluation names is there. No torch: a wrong path is known in an instant."""

from dataclasses import dataclass
from pathlib import Path

from pixart_ft.adapters.files import Adapter, ForeignPlace, find_adapter
from pixart_ft.config.evaluate import EvaluateConfig
from pixart_ft.data.folders import check_folder, picture_folder
from pixart_ft.errors import Mistakes
from pixart_ft.model.place import resolve_base
from pixart_ft.runs.results import Model, what_of


@dataclass(frozen=True)
class Entry:
    """What is compared with the base: adapters on it, together, or a whole model.

    name   as it was given
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
            name = " + ".join(map(str, config.lora))
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
    for folder, part in ((config.data, "held_out"), (config.train_data, "train")):
        if folder is not None:
            with mistakes.noted():
                check_folder(picture_folder(folder, part))
    if config.prompts_file is not None and not config.prompts_file.is_file():
        mistakes.add(f"prompts_file: there is no file {config.prompts_file}")
    mistakes.raise_if_any()
    return entries


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
