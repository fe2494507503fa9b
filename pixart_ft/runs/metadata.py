"""What a run says of what it trained, beside the weights: the content of pixart_ft.json. No torch."""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from pixart_ft.config.train import Kind, Weights
from pixart_ft.diffusion.intervals import WHOLE, Interval
from pixart_ft.diffusion.names import PredictionType, TimeConditioning, VarianceState
from pixart_ft.errors import UserError
from pixart_ft.files import read_object

METADATA, NULL_CAPTION = "pixart_ft.json", "null_caption.safetensors"


@dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter, or a whole model, was trained on and how.

    base               as given in model.base; of a whole model the one that its VAE and text encoder come from
    base_fingerprint   `loading.fingerprint` of the network that was trained
    prediction_type    what the network predicts
    schedule           the noise schedule it was trained with, in the words of a diffusers scheduler config
    variance           the state of the learned variance after this training
    rank, alpha        of a LoRA; None: it is none
    max_tokens         longest caption, in tokens
    text_preparation   how captions were prepared before the tokenizer
    weights            whether these are the averaged or the last weights
    samples_seen       pictures drawn in training, repeats included
    step               optimizer steps done; None: made before this was kept
    revision           of a Hub base, if one was asked for
    time_conditioning  what the network is told of another schedule's noise: its index, or where the base met that SNR
    interval           the network's timesteps that it was trained at; an adapter acts there unless told otherwise
    kind               of what was trained, as adapter.kind
    """

    base: str
    base_fingerprint: str
    prediction_type: "PredictionType"
    schedule: Mapping[str, object]
    variance: VarianceState
    rank: int | None
    alpha: float | None
    max_tokens: int
    text_preparation: str
    weights: Weights
    samples_seen: int
    revision: str | None = None
    time_conditioning: "TimeConditioning" = "index"
    step: int | None = None
    interval: Interval = WHOLE
    kind: Kind = "lora"

    @property
    def last_timestep(self) -> int:
        """The one of the most noise, of the process it was trained on."""
        steps = self.schedule.get("num_train_timesteps")
        return (steps if isinstance(steps, int) else 1000) - 1


def read_metadata(folder: Path) -> AdapterMetadata:
    """The content of a folder's pixart_ft.json; UserError if it is damaged or of another version."""
    path = folder / METADATA
    content = read_object(path, "adapter", "copy the adapter again")
    known = {field.name for field in fields(AdapterMetadata)}
    required = {field.name for field in fields(AdapterMetadata) if field.default is MISSING}
    strange = (content.keys() - known) | (required - content.keys())
    if strange:
        raise UserError(f"adapter: {path} is of another version of pixart_ft (fields {some(strange)}); train again")
    check_types(path, content, _METADATA_TYPES)
    return AdapterMetadata(**content | {"interval": tuple(content.get("interval") or WHOLE)})


MetadataOf = Callable[[Path], AdapterMetadata]  # of a folder


def check_types(path: Path, content: Mapping[str, object], types: Mapping[str, Callable[[Any], bool]]) -> None:
    """Raise UserError naming each of the keys whose value cannot be; one that may be absent has been looked for."""
    wrong = [
        f"{key} is {json.dumps(content.get(key))[:60]}"
        for key, is_right in types.items()
        if not is_right(content.get(key))
    ]
    if wrong:
        raise UserError(f"adapter: cannot read {path}: {', '.join(wrong)}; copy the adapter again")


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_count(value: object, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**63


def is_number(value: object, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most  # type: ignore[operator]


def is_interval(value: object) -> bool:
    ends = value if isinstance(value, list) and len(value) == 2 else [2, 1]
    return all(is_number(end, 0, 1e6) for end in ends) and ends[0] <= ends[1]


def is_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_text, value))


_METADATA_TYPES: dict[str, Callable[[Any], bool]] = {
    "base": is_text,
    "base_fingerprint": is_text,
    "prediction_type": ("epsilon", "v_prediction", "sample", "posterior_mean").__contains__,
    "schedule": lambda value: isinstance(value, dict),
    "variance": ("trained", "stale", "none").__contains__,
    "rank": lambda value: value is None or is_count(value, 1),
    "alpha": lambda value: value is None or is_number(value, 0, 1e6),
    "max_tokens": lambda value: is_count(value, 1),
    "text_preparation": is_text,
    "weights": ("ema", "raw").__contains__,
    "samples_seen": is_count,
    "step": lambda value: value is None or is_count(value),
    "revision": lambda value: value is None or is_text(value),
    "time_conditioning": (None, "index", "snr_matched").__contains__,
    "interval": lambda value: value is None or is_interval(value),
    "kind": (None, "lora", "peft", "full").__contains__,
}


def some(names: Any) -> str:
    """The first three names, for messages."""
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
