"""The weights of an adapter, from a network into its folder, and from there into a network, each accounted for."""

import copy
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor, nn

from pixart_ft.adapters.attach import parameters_of
from pixart_ft.adapters.files import CONFIG, WEIGHTS, Adapter, LoraSettings
from pixart_ft.errors import UserError, insist
from pixart_ft.files import sha256, write_folder
from pixart_ft.model.adapter_switch import BEGINNING, FIRST
from pixart_ft.model.text import TEXT_PREPARATION
from pixart_ft.model.weights import all_finite, read_tensors
from pixart_ft.runs.manifest import write_manifest
from pixart_ft.runs.metadata import METADATA, NULL_CAPTION, AdapterMetadata, some
from pixart_ft.runs.results import Model

_PEFT_PREFIX = "base_model.model."


def save_adapter(
    folder: Path,
    transformer: PixArtTransformer2DModel,
    metadata: AdapterMetadata,
    null_caption: Tensor,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter attached to `transformer` as a folder, whole or not at all, replacing an earlier one.

    `null_caption` is (1,D). `state` gives other values for the adapter's parameters by their names in
    `transformer`, such as an average's shadows.
    """
    parameters = parameters_of(transformer)
    assert parameters, "no adapter is attached"
    state = parameters if state is None else state
    assert state.keys() == parameters.keys(), "the state is not that of the attached adapter"
    if not all_finite(state.values()):
        raise UserError(f"adapter: {folder} is not written: its weights are not finite, the training diverged")
    weights, config = _in_file(transformer, state), copy.copy(transformer.peft_config[FIRST])
    if isinstance(config, LoraConfig):
        assert (config.r, config.lora_alpha) == (metadata.rank, metadata.alpha), "metadata of another adapter"
    if BEGINNING in transformer.peft_config:
        weights, config = _without_beginning(transformer, weights, config)
        metadata = replace(metadata, rank=config.r, alpha=config.lora_alpha)
    config.base_model_name_or_path, config.inference_mode = metadata.base, True
    config.target_modules = sorted(config.target_modules)  # peft makes it a set, whose order would vary in the file

    def write(aside: Path) -> None:
        copies = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in weights.items()}
        save_file(copies, str(aside / WEIGHTS), metadata={"format": "pt"})  # copies, since layers may share a constant
        config.save_pretrained(str(aside))
        (aside / METADATA).write_text(json.dumps(asdict(metadata), indent=2) + "\n", encoding="utf-8")
        save_file({"null_caption": null_caption.detach().cpu().contiguous()}, str(aside / NULL_CAPTION))
        write_manifest(aside)

    write_folder(folder, write)


def fill_adapter(transformer: PixArtTransformer2DModel, adapter: Adapter, fingerprint_of_base: str) -> None:
    """Give the attached adapter the weights of a saved one, to train them on.

    Raises UserError as `load_adapter` does; the rank and the targets must be the same, alpha may differ.
    """
    check_base(adapter, fingerprint_of_base, transformer.config.get("_name_or_path"))
    take(transformer, read_weights(adapter)[0], adapter.folder)


def check_base(trained: Adapter | Model, fingerprint_of_base: str, given: str | None, *, strict: bool = True) -> None:
    """Raise UserError if this was trained on another base, or on captions of another kind; not strict: warn of it.

    given: the base's name, if any.
    """
    if isinstance(trained, Adapter) and trained.taken is not None:  # nobody knows what it was trained on
        return
    folder, metadata, faults = trained.folder, trained.metadata, []
    if metadata.text_preparation != TEXT_PREPARATION:
        faults.append(
            f"adapter: {folder} was trained on captions prepared by {metadata.text_preparation}, and this version "
            f"prepares them by {TEXT_PREPARATION}; use the version it was trained with"
        )
    if fingerprint_of_base != metadata.base_fingerprint:
        faults.append(
            f"adapter: {folder} was trained on the base {metadata.base} ({metadata.base_fingerprint}), "
            f"not on {given or 'the base given'} ({fingerprint_of_base}); use --model {metadata.base}"
        )
    insist(faults, strict=strict)


def read_weights(adapter: Adapter) -> tuple[dict[str, Tensor], str]:
    """The weights of a saved adapter by their names in its file, and the file's SHA-256.

    Raises UserError where they are damaged, not finite, or of another rank than its configuration says, which would
    else decide how much memory is taken for them.
    """
    (file,) = adapter.files
    saved, mark = read_tensors(file) if adapter.taken is None else (dict(adapter.taken.weights), sha256(file))
    if not all_finite(saved.values()):
        raise UserError(
            f"adapter: the weights in {adapter.folder} are not finite, its training diverged; train it again"
        )
    if isinstance(adapter.settings, LoraSettings):
        _check_ranks(adapter.folder, adapter.settings, saved)
    return saved, mark


def _check_ranks(folder: Path, settings: LoraSettings, saved: Mapping[str, Tensor]) -> None:
    pattern = settings.options.get("rank_pattern", {})
    other = {}
    for key, value in saved.items():
        layer, is_first, _ = key.partition(".lora_A.")
        if is_first and value.ndim:
            said = pattern.get(get_pattern_key(pattern.keys(), layer.removeprefix(_PEFT_PREFIX)), settings.rank)
            if len(value) != said:
                other[key] = f"{key} is of rank {len(value)}, not {said}"
    if other:
        raise UserError(
            f"adapter: {len(other)} weights in {folder} are of another rank than {CONFIG} says: "
            f"{some(other.values())}; copy the adapter again"
        )


def take(transformer: PixArtTransformer2DModel, saved: Mapping[str, Tensor], folder: Path, name: str = FIRST) -> None:
    """Copy saved weights into an attached adapter: all of them and no other, or UserError with lists."""
    places = _in_file(transformer, parameters_of(transformer, name), name)
    shared = saved.keys() & places.keys()
    faults = {
        "in the file but not in the model": saved.keys() - places.keys(),
        "in the model but not in the file": places.keys() - saved.keys(),
        "of another shape (another adapter.rank?)": {k for k in shared if saved[k].shape != places[k].shape},
    }
    if any(faults.values()):
        lines = [f"  - {len(keys)} {what}: {some(keys)}" for what, keys in faults.items() if keys]
        strange = sorted(saved.keys() - places.keys())[:1]
        near = [match for key in strange for match in difflib.get_close_matches(key, places, n=1)]
        lines += [f"  - the nearest to {key} is {match}" for key, match in zip(strange, near, strict=False)]
        fitting = len(shared - faults["of another shape (another adapter.rank?)"])
        raise UserError(
            f"adapter: the weights in {folder} do not fit ({fitting} of {len(saved)} do, {len(places)} are needed):\n"
            + "\n".join(lines)
        )
    with torch.no_grad():
        for key, parameter in places.items():
            parameter.copy_(saved[key])


def _without_beginning(
    transformer: nn.Module, weights: Mapping[str, Tensor], config: LoraConfig
) -> tuple[dict[str, Tensor], LoraConfig]:
    """The adapter less what it began as: s (B A - B' A') = s [B, -B'] [A; A'], a plain one of twice the rank."""
    begun = _in_file(transformer, parameters_of(transformer, BEGINNING), BEGINNING)
    whole = {
        key: torch.cat([value, begun[key]]) if ".lora_A." in key else torch.cat([value, -begun[key]], dim=1)
        for key, value in weights.items()
    }
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    rank = 2 * config.r
    return whole, replace(config, r=rank, lora_alpha=scale * rank, use_rslora=False)


def _in_file(transformer: Any, state: Mapping[str, Tensor], adapter: str = FIRST) -> dict[str, Tensor]:
    """The adapter's values under the names that peft gives them in a file."""
    others = [f".{other}." for other in transformer.peft_config if other != adapter]
    whole = {**transformer.state_dict(), **state}  # some adapters have constants that are no parameters
    whole = {key: value for key, value in whole.items() if not any(other in f"{key}." for other in others)}
    found = get_peft_model_state_dict(transformer, whole, adapter, save_embedding_layers=False)
    return {_PEFT_PREFIX + key: value for key, value in found.items()}
