"""An adapter of another program, taken in for a base: what its file says, and what nobody can check."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixart_ft.adapters.dialects import Foreign, read
from pixart_ft.adapters.files import (
    UNKNOWN_BASE,
    Adapter,
    ForeignPlace,
    LoraSettings,
    Taken,
    acting_interval,
    read_settings,
)
from pixart_ft.errors import UserError
from pixart_ft.files import read_object
from pixart_ft.model.base import Base
from pixart_ft.model.convert import tensors_in
from pixart_ft.model.text import TEXT_PREPARATION
from pixart_ft.runs.metadata import AdapterMetadata, some

_SIGMA_TOKENS = 300


def taken_in(
    found: Sequence[Adapter | ForeignPlace],
    trained_as: Callable[[], AdapterMetadata],
    alpha: float | None,
    text_preparation: str | None = None,
) -> list[Adapter]:
    """These adapters, with those of other programs taken in for a base.

    trained_as: what is taken to be true of those, which say nothing themselves; the others as of `_adopt`. Raises
    UserError, also where an alpha or a way of preparing captions is told and every adapter says its own.
    """
    adapters = [
        one if isinstance(one, Adapter) else _adopt(one, trained_as(), alpha, text_preparation) for one in found
    ]
    needed = {
        "lora_alpha": (alpha, any(one.taken and one.taken.lora_alpha for one in adapters)),
        "text_preparation": (text_preparation, any(one.taken for one in adapters)),
    }
    for key, (value, is_needed) in needed.items():
        if value is not None and not is_needed:
            says = "says its own" if len(found) == 1 else "say their own"
            told = f"{', '.join(one.name for one in found)} {says}" if found else "there is no adapter"
            raise UserError(f"{key} is {value}, and {told}; leave it out")
    return adapters


def like_base(base: Base) -> AdapterMetadata:
    """What is taken to be true of an adapter that says nothing: that it was trained as this base was."""
    has_variance = base.variance != "none"
    return assumed(base.name, base.prediction_type, base.schedule_config, has_variance=has_variance)


def assumed(base: str, prediction_type: Any, schedule: Mapping[str, Any], *, has_variance: bool) -> AdapterMetadata:
    """Metadata in place of those that another program's adapter lacks.

    A learned variance counts as stale: such programs train the error of the noise alone.
    """
    return AdapterMetadata(
        base=base,
        base_fingerprint=UNKNOWN_BASE,
        prediction_type=prediction_type,
        schedule=schedule,
        variance="stale" if has_variance else "none",
        rank=None,
        alpha=None,
        max_tokens=_SIGMA_TOKENS,
        text_preparation=TEXT_PREPARATION,
        weights="raw",
        samples_seen=0,
        kind="peft",
    )


def _adopt(
    place: ForeignPlace, metadata: AdapterMetadata, alpha: float | None, text_preparation: str | None
) -> Adapter:
    """The adapter there, with what is taken to be true of it; warns of all that could not be checked.

    alpha: of all its layers, where its file says none; text_preparation: how its captions were prepared, if known.
    Raises UserError for a file that holds no adapter of a known dialect, and for captions prepared otherwise.
    """
    found = _read(place, alpha)
    if text_preparation not in (None, TEXT_PREPARATION):
        raise UserError(
            f"text_preparation: the captions of {place.name} were prepared by {text_preparation}, and this version "
            f"prepares them by {TEXT_PREPARATION}"
        )
    taken_for_granted = [
        f"that it was trained on this base, to predict {metadata.prediction_type} on the base's schedule",
        *([] if text_preparation else [f"that its captions were prepared by {TEXT_PREPARATION}, as they are here"]),
        "that the base's own empty caption stood for none",
    ]
    remarks = "".join(f"; {remark}" for remark in found.remarks)
    warnings.warn(
        f"{place.name} is another program's adapter ({found.dialect} names){remarks}. It says nothing of its training, "
        f"so this is taken for granted: {'; '.join(taken_for_granted)}",
        stacklevel=4,
    )
    if isinstance(found.settings, LoraSettings):
        metadata = replace(metadata, kind="lora", rank=found.settings.rank, alpha=found.settings.alpha)
    interval = acting_interval(metadata, place.interval)
    taken = Taken(place.file, found.weights, alpha if found.needs_alpha else None)
    return Adapter(place.name, place.file.parent, metadata, found.settings, interval, taken)


def _read(place: ForeignPlace, alpha: float | None) -> Foreign:
    tensors = tensors_in(place.file, "adapter")
    if strange := [
        str(key) for key, value in tensors.items() if not (isinstance(key, str) and isinstance(value, Tensor))
    ]:
        raise UserError(
            f"adapter: {place.file} holds more than tensors by their names ({some(strange)}); save the adapter's "
            "state_dict alone"
        )
    header: dict[str, str] = {}
    if place.file.suffix == ".safetensors":
        try:
            with safe_open(str(place.file), "pt") as file:
                header = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise UserError(f"adapter: cannot read {place.file} ({error}); copy the adapter again") from error
    if place.config is None:
        return read(tensors, header, None, alpha)
    if all(key.startswith("base_model.model.") for key in tensors):  # plain peft, which its configuration describes
        return Foreign("peft", tensors, read_settings(place.config.parent))
    return read(tensors, header, read_object(place.config, "adapter", "copy the adapter again"), alpha)
