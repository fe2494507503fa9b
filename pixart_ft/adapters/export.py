"""What a run trained, as other programs read it: `pixart-ft export`."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from pixart_ft.adapters.acting import load_adapter, merge
from pixart_ft.adapters.attach import attach
from pixart_ft.adapters.dialects import (
    Update,
    factors_to_diffusers,
    factors_to_kohya,
    from_peft,
    lora_settings,
    to_comfy,
    to_diffusers,
    to_kohya,
    to_peft,
)
from pixart_ft.adapters.files import Adapter, LoraSettings, PeftSettings
from pixart_ft.adapters.full import save_model
from pixart_ft.adapters.weights import read_weights, save_adapter, take
from pixart_ft.config.export import ExportConfig
from pixart_ft.config.text import numbered
from pixart_ft.diffusion.intervals import WHOLE, shown
from pixart_ft.diffusion.names import StockPrediction
from pixart_ft.diffusion.schedules import NoiseSchedule, shown_config
from pixart_ft.errors import UserError
from pixart_ft.files import probe, write_folder
from pixart_ft.model.base import Base
from pixart_ft.model.convert import write_original
from pixart_ft.model.loading import fingerprint, load_transformer
from pixart_ft.model.weights import read_null_caption
from pixart_ft.runs.results import Model, what_of

_RANK = 64
_FILES = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "comfy": "lora_comfy.safetensors",
    "kohya": "lora_kohya.safetensors",
}
# What other dialects than peft's hold that is no LoRA: the dialect, and the type of peft.
_NATIVE = (("kohya", "LOKR"), ("kohya", "LOHA"), ("diffusers", "LOKR"))


@dataclass(frozen=True)
class _Source:
    """What is exported, and the base that it was trained on."""

    trained: Adapter | Model
    base: Base
    config: ExportConfig

    @property
    def settings(self) -> LoraSettings | PeftSettings | None:
        """Of an adapter; None: a whole model."""
        return self.trained.settings if isinstance(self.trained, Adapter) else None

    def network(self) -> PixArtTransformer2DModel:
        """The trained network, plain, in float32."""
        if isinstance(self.trained, Model):
            return load_transformer(Base.read(self.trained.folder), dtype=torch.float32)
        transformer = load_transformer(self.base, dtype=torch.float32)
        load_adapter(transformer, self.trained)
        merge(transformer)
        return transformer


def export(config: ExportConfig) -> list[str]:
    """Write what the configuration asks for; returns what there is to tell of it.

    Raises UserError, before anything is written, for what the dialect cannot hold, with the reason.
    """
    if config.out.exists():
        raise UserError(f"out: {config.out} is there already; choose another name, or remove it")
    probe(config.out.parent, "out")
    source = _read(config)
    if config.to == "merged":
        return _write_merged(source)
    settings = source.settings
    if config.to == "peft" and settings is not None:
        return _copy(source)
    if isinstance(settings, LoraSettings):
        assert isinstance(source.trained, Adapter)
        if settings.options.get("lora_bias"):
            raise UserError(
                f"to: {config.to} has no place for the biases of this LoRA (lora_bias); choose peft or merged"
            )
        return _write_lora(source, from_peft(read_weights(source.trained)[0], settings), [])
    if isinstance(settings, PeftSettings) and (config.to, settings.peft_type) in _NATIVE:
        return _write_factors(source, settings)
    return _write_lora(source, *_nearest(source, config.rank or _RANK))


def _read(config: ExportConfig) -> _Source:
    """The adapter or the model, and its base. Raises UserError for settings that nothing here uses."""
    trained: Adapter | Model
    if what_of(config.run) == "model":
        trained = Model.read(config.run, weights=config.weights)
    else:
        trained = Adapter.read(config.run, weights=config.weights)
    metadata = trained.metadata
    limited = isinstance(trained, Adapter) and trained.interval != WHOLE
    if limited and config.to != "peft" and not config.everywhere:
        raise UserError(
            f"everywhere: it was trained at the timesteps {shown(metadata.interval)}, and who reads {config.to} lets "
            "it act at all; give --everywhere to have it so, or export it to peft, which this package reads"
        )
    if config.everywhere and not limited:
        raise UserError("everywhere: what was trained acts at all timesteps already; leave it out")
    if config.everywhere and config.to == "peft":
        raise UserError(
            "everywhere: plain peft lets every adapter act at all timesteps, and this package reads from the folder "
            "where it is to act; leave it out"
        )
    if isinstance(trained, Adapter) and limited and config.everywhere:
        trained = replace(trained, interval=WHOLE)
    needs_rank = not isinstance(trained, Adapter) or (
        isinstance(trained.settings, PeftSettings) and (config.to, trained.settings.peft_type) not in _NATIVE
    )
    if config.rank is not None and (not needs_rank or (config.to == "peft" and isinstance(trained, Adapter))):
        raise UserError(f"rank: {config.to} holds this adapter as it is; leave it out")
    base = Base.read(config.base or metadata.base, None if config.base else metadata.revision)
    return _Source(trained, base, config)


def _copy(source: _Source) -> list[str]:
    """The adapter's own folder, which plain peft reads."""
    write_folder(source.config.out, lambda aside: shutil.copytree(source.trained.folder, aside, dirs_exist_ok=True))
    return [f"adapter: {source.config.out}; peft reads it by PeftModel.from_pretrained"]


def _write_lora(source: _Source, updates: Mapping[str, Update], facts: list[str]) -> list[str]:
    to, out = source.config.to, source.config.out
    if to == "peft":  # of what is no adapter: with all that ours says too
        return [*facts, *_write_adapter(source, updates)]
    header = {"format": "pt"}
    if to == "diffusers":
        tensors, header = to_diffusers(updates)
    else:
        tensors = to_comfy(updates) if to == "comfy" else to_kohya(updates)
    return [*facts, *_about_the_process(source), _write_file(out, _FILES[to], tensors, header)]


def _write_factors(source: _Source, settings: PeftSettings) -> list[str]:
    assert isinstance(source.trained, Adapter)
    weights = read_weights(source.trained)[0]
    if source.config.to == "kohya":
        tensors, header = factors_to_kohya(weights, settings.options), {"format": "pt"}
    else:
        tensors, header = factors_to_diffusers(weights, settings)
    file = _write_file(source.config.out, _FILES[source.config.to], tensors, header)
    return [*_about_the_process(source), f"it is a {settings.peft_type}, which old programs do not read", file]


def _write_file(out: Path, name: str, tensors: Mapping[str, Tensor], header: dict[str, str]) -> str:
    copies = {key: value.contiguous().clone() for key, value in tensors.items()}
    write_folder(out, lambda aside: save_file(copies, str(aside / name), metadata=header))
    return f"file: {out / name}, {numbered(len(copies), 'tensor')}"


def _about_the_process(source: _Source) -> list[str]:
    """What the file does not say, and its reader must be told."""
    metadata, base = source.trained.metadata, source.base
    own, other = (NoiseSchedule.from_diffusers_config(x).alpha_bar for x in (metadata.schedule, base.schedule_config))
    if metadata.prediction_type == base.prediction_type and torch.equal(own, other):
        return []
    return [
        f"careful: it predicts {metadata.prediction_type} on {shown_config(metadata.schedule)}, and the base "
        f"{base.prediction_type} on {shown_config(base.schedule_config)}: no file of this kind says so, and the "
        "reader's scheduler has to be set; --to merged sets it"
    ]


@torch.no_grad()
def _nearest(source: _Source, rank: int) -> tuple[dict[str, Update], list[str]]:
    """The LoRA of this rank that comes nearest to what was trained, by SVD of each layer's change, and its error."""
    plain = load_transformer(source.base, dtype=torch.float32)
    if fingerprint(plain) != source.trained.metadata.base_fingerprint:
        raise UserError(
            f"base: {source.base.name} is not the network that {source.trained.name} was trained from "
            f"({source.trained.metadata.base}); give that one as --base"
        )
    before, after = dict(plain.named_parameters()), dict(source.network().named_parameters())
    layers = {f"{n}.weight": n for n, m in plain.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    updates: dict[str, Update] = {}
    whole = missed = outside = 0.0
    left_out = []
    for name, value in before.items():
        change = (after[name] - value).double()
        size = change.square().sum().item()
        if size == 0:
            continue
        whole += size
        if name not in layers:
            left_out.append(name)
            outside += size
            continue
        updates[layers[name]], error = low_rank(change, rank)
        missed += error
    if not updates:
        raise UserError(f"run: {source.trained.name} changed no weight that a LoRA can change; choose merged")
    share = (missed / (whole - outside)) ** 0.5
    facts = [
        f"nearest LoRA of rank {rank} to the change of {numbered(len(updates), 'layer')}: {share:.2%} of the "
        "change is lost (root of the sum of squares); a higher --rank loses less, --to merged nothing"
    ]
    if left_out:
        facts.append(
            f"careful: {len(left_out)} changed weights that no LoRA can hold (biases, tables) are left out, "
            f"{(outside / whole) ** 0.5:.2%} of the change"
        )
    return updates, facts


def low_rank(change: Tensor, rank: int) -> tuple[Update, float]:
    """The update of at most this rank that is nearest to the change of a layer's weight, and the square it misses."""
    u, s, v = torch.linalg.svd(change.double().flatten(1), full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    a, b = root[:, None] * v[:rank], u[:, :rank] * root
    shape = (rank, *change.shape[1:])
    b = b.reshape(len(change), rank, *[1] * (change.ndim - 2))
    return Update(a.reshape(shape).float(), b.float(), 1.0), s[rank:].square().sum().item()


def _write_adapter(source: _Source, updates: Mapping[str, Update]) -> list[str]:
    settings = lora_settings(updates)
    transformer = load_transformer(source.base, dtype=torch.float32)
    metadata = replace(
        source.trained.metadata,
        base_fingerprint=fingerprint(transformer),
        kind="lora",
        rank=settings.rank,
        alpha=settings.alpha,
    )
    attach(transformer, settings, seed=0)
    take(transformer, to_peft(updates), source.trained.folder)
    null = read_null_caption(source.trained.folder, transformer.config.caption_channels)
    save_adapter(source.config.out, transformer, metadata, null)
    return [f"adapter: {source.config.out}; peft and this package read it"]


def _write_merged(source: _Source) -> list[str]:
    metadata, out = source.trained.metadata, source.config.out
    transformer = source.network()
    null = read_null_caption(source.trained.folder, transformer.config.caption_channels)
    full = replace(metadata, kind="full", rank=None, alpha=None)
    save_model(out, transformer, source.base, full, null, whole=True)
    facts = [f"pipeline: {out}; diffusers' PixArtSigmaPipeline and --model read it"]
    if metadata.prediction_type not in get_args(StockPrediction):
        facts.append(
            f"careful: no scheduler of diffusers knows what it predicts ({metadata.prediction_type}), so that only "
            "this package draws with it"
        )
    elif metadata.time_conditioning != "index":
        facts.append(
            "its scheduler is of the schedule that the network keeps time by, not of "
            f"{shown_config(metadata.schedule)}, which it was trained on: no scheduler of diffusers has both"
        )
    if source.config.single_file:
        file = out / "transformer_original.safetensors"
        write_original(file, dict(transformer.state_dict()), {}, transformer.config)
        facts.append(f"transformer in the authors' layout: {file}")
    return facts
