"""What a saved adapter consists of, and where a path leads to one. No torch: a wrong path is known at once.

An adapter is a folder: adapter_model.safetensors and adapter_config.json, which plain peft reads, pixart_ft.json (what
it was trained on and how) and null_caption.safetensors (the embedding that stands for no caption).
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from pixart_ft.config.train import LARGEST_RANK, Init, Weights
from pixart_ft.diffusion.intervals import WHOLE, Interval, covers, end_faults, or_whole, shown
from pixart_ft.errors import UserError
from pixart_ft.files import read_object
from pixart_ft.runs.metadata import (
    AdapterMetadata,
    check_types,
    is_count,
    is_names,
    is_number,
    is_text,
    read_metadata,
)
from pixart_ft.runs.results import find

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class LoraSettings:
    """W becomes W + (alpha / rank) B A in every Linear or Conv2d whose name is, or ends in, one of `targets`.

    A is (rank, inputs), B is (outputs, rank); `dropout` is the share of the inputs of A zeroed in training.
    rslora   sqrt(rank) in place of rank
    dora     each row of the sum then has a length that is trained too
    init     A and B at the start, which is taken away again: nothing, or of W its largest singular vectors (pissa) or
             its first rows by QR (olora). What is saved is plain, of twice the rank
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = DEFAULT_TARGETS
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: Init = "default"


@dataclass(frozen=True)
class PeftSettings:
    """Any other adapter of peft: its type as peft names it, the layers, and what else its configuration says."""

    peft_type: str
    targets: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Adapter:
    """A saved adapter as it describes itself; `adapters` loads its weights.

    name       as it was given: an adapter folder, a run folder, or RUN@STEP
    folder     the adapter folder that this means
    metadata   what it was trained on and how
    settings   of its LoRA, or of what else of peft's it is
    interval   the network's timesteps that it is to act at, both ends included
    """

    name: str
    folder: Path
    metadata: AdapterMetadata
    settings: LoraSettings | PeftSettings
    interval: Interval = WHOLE

    @property
    def files(self) -> list[Path]:
        """Its weights."""
        return [self.folder / WEIGHTS]

    @classmethod
    def read(cls, path: str | Path, *, weights: Weights = "ema", interval: Interval | None = None) -> Self:
        """The adapter behind `path`: an adapter folder, the final one of a run folder, or what RUN@STEP kept then.

        `weights` as of `find`. `interval`: where it is to act; None: where it was trained.
        Raises UserError if there is no such adapter or interval, or its files are damaged or of another version; warns
        of an interval that goes beyond the training's.
        """
        metadata_of = cache(read_metadata)  # where it is may depend on what is found there
        folder = find(path, "adapter", weights, metadata_of)
        metadata = metadata_of(folder)
        if metadata.kind == "full":
            raise UserError(f"adapter: {folder} is a whole model; give it as the model (--model, model.base)")
        return cls(str(path), folder, metadata, read_settings(folder), acting_interval(metadata, interval))


def acting_interval(metadata: AdapterMetadata, asked: Interval | None) -> Interval:
    """The timesteps at which an adapter is to act: those asked for, else those that it was trained at.

    Raises UserError for an interval that there is not; warns of one that goes beyond the training's.
    """
    last = metadata.last_timestep
    trained_at = or_whole(metadata.interval, last)
    if asked is None:
        return trained_at
    if faults := end_faults("lora_interval", asked, last):
        raise UserError(faults[0])
    if not covers(trained_at, asked):
        warnings.warn(
            f"lora_interval {shown(asked)} goes beyond {shown(trained_at)}, the timesteps that this adapter was "
            "trained at: it never learnt what to do there",
            stacklevel=1,
        )
    return or_whole(asked, last)


def read_settings(folder: Path) -> LoraSettings | PeftSettings:
    """What an adapter folder's adapter_config.json says."""
    path = folder / CONFIG
    content = read_object(path, "adapter", "copy the adapter again")
    if content.get("peft_type") != "LORA":
        check_types(path, content, {"peft_type": is_text, "target_modules": is_names})
        options = {key: value for key, value in content.items() if key not in _NOT_OF_ITS_TYPE}
        return PeftSettings(content["peft_type"], tuple(content["target_modules"]), options)
    check_types(path, content, _CONFIG_TYPES)
    return LoraSettings(
        rank=content["r"],
        alpha=content["lora_alpha"],
        targets=tuple(content["target_modules"]),
        dropout=content["lora_dropout"],
        rslora=bool(content.get("use_rslora")),
        dora=bool(content.get("use_dora")),
    )


# What the configurations of all types of peft have, and what says nothing of the adapter.
_NOT_OF_ITS_TYPE = {
    *("peft_type", "target_modules", "base_model_name_or_path", "inference_mode", "auto_mapping", "revision"),
    *("task_type", "peft_version"),
}
_CONFIG_TYPES: dict[str, Callable[[Any], bool]] = {
    "r": lambda value: is_count(value, 1) and value <= LARGEST_RANK,
    "lora_alpha": lambda value: is_number(value, 0, 1e6),
    "target_modules": is_names,
    "lora_dropout": lambda value: is_number(value, 0, 0.999),
    "use_rslora": (None, False, True).__contains__,
    "use_dora": (None, False, True).__contains__,
}
