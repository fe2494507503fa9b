"""Whether the folders and files that a generation names are there. No torch: a wrong path is known in an instant."""

from pathlib import Path

from pixart_ft.adapters.files import Adapter
from pixart_ft.config.generate import GenerateConfig
from pixart_ft.errors import Mistakes
from pixart_ft.model.place import resolve_base
from pixart_ft.runs.metadata import METADATA


def check_generation(config: GenerateConfig) -> Adapter | None:
    """Raise one UserError with every path of a generation that leads nowhere; returns its adapter."""
    mistakes, adapter = Mistakes(), None
    if config.model is not None:
        with mistakes.noted():
            place = resolve_base(config.model, config.weights)
            if config.weights != "ema" and config.lora is None and not (Path(place) / METADATA).is_file():
                mistakes.add(f"weights: {config.model} is no run, with averaged and last weights; remove it")
    if config.lora is not None:
        with mistakes.noted():
            ends = config.lora_interval
            interval = None if ends is None else (ends[0], ends[1])
            adapter = Adapter.read(config.lora, weights=config.weights, interval=interval)
    for key, file in (("image", config.image), ("prompts_file", config.prompts_file)):
        if file is not None and not file.is_file():
            mistakes.add(f"{key}: there is no file {file}")
    mistakes.raise_if_any()
    return adapter
