"""Adapters that change what a base draws. Shared."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pixart_ft.adapters.files import LoraSettings
from pixart_ft.adapters.lora import attach, save_adapter
from pixart_ft.model.base import Base
from pixart_ft.model.loading import fingerprint, load_text_encoder, load_transformer
from pixart_ft.model.text import TEXT_PREPARATION, null_caption
from pixart_ft.runs.metadata import AdapterMetadata


def make_adapter(
    base: Path | str,
    folder: Path,
    *,
    seed: int = 0,
    alpha: float = 6.0,
    size: float = 0.2,
    null_scale: float = 1.0,
    **changes: Any,
) -> Path:
    """Save an adapter whose B is random, of this standard deviation; `changes` go into its metadata."""
    read = Base.read(base)
    transformer = load_transformer(read, dtype=torch.float32)
    mark = fingerprint(transformer)
    attach(transformer, LoraSettings(rank=4, alpha=alpha), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if ".lora_B." in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    tokenizer, text_encoder = load_text_encoder(read, dtype=torch.float32)
    metadata = metadata_of(mark, LoraSettings(rank=4, alpha=alpha), base=str(base))
    null = null_scale * null_caption(text_encoder, tokenizer)
    save_adapter(folder, transformer, replace(metadata, **changes), null)
    return folder


def metadata_of(fingerprint: str, settings: LoraSettings, base: str = "demo") -> AdapterMetadata:
    """Of an adapter for the base with this fingerprint."""
    return AdapterMetadata(
        base=base,
        base_fingerprint=fingerprint,
        prediction_type="epsilon",
        schedule={"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        variance="trained",
        rank=settings.rank,
        alpha=settings.alpha,
        max_tokens=300,
        text_preparation=TEXT_PREPARATION,
        weights="raw",
        samples_seen=80,
    )
