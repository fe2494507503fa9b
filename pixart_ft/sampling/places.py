"""Whether the folders and files that a generation names are there. No torch: a wrong path is known in an instant."""

from pathlib import Path

from pixart_ft.adapters.files import Adapter, ForeignPlace, find_adapter
from pixart_ft.config.generate import GenerateConfig
from pixart_ft.errors import Mistakes
from pixart_ft.model.place import resolve_base
from pixart_ft.runs.metadata import METADATA


def check_generation(config: GenerateConfig) -> list[Adapter | ForeignPlace]:
    """Raise one UserError with every path of a generation that leads nowhere; returns its adapters."""
    mistakes = Mistakes()
    adapters: list[Adapter | ForeignPlace] = []
    if config.model is not None:
        with mistakes.noted():
            base = resolve_base(config.model, config.weights)
            if config.weights != "ema" and config.lora is None and not (Path(base) / METADATA).is_file():
                mistakes.add(f"weights: {config.model} is no run, with averaged and last weights; remove it")
    ends = config.lora_interval
    for place in config.lora or ():
        with mistakes.noted():
            interval = None if ends is None else (ends[0], ends[1])
            adapters.append(found := find_adapter(place, config.weights, interval))
            if isinstance(found, ForeignPlace) and config.model is None:
                mistakes.add(f"model: {place} is another program's adapter, and does not say its base; give --model")
    for key, file in (("image", config.image), ("prompts_file", config.prompts_file)):
        if file is not None and not file.is_file():
            mistakes.add(f"{key}: there is no file {file}")
    mistakes.raise_if_any()
    return adapters
