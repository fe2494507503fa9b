"""Adapters that change what a base draws. Shared."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file

from pixart_ft.adapters.attach import attach
from pixart_ft.adapters.files import LoraSettings
from pixart_ft.adapters.weights import save_adapter
from pixart_ft.config.train import Quantization
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
    quantization: Quantization = "none",
    **changes: Any,
) -> Path:
    """Save an adapter whose B is random, of this standard deviation; `changes` go into its metadata.

    quantization   of the text encoder that its null caption is from
    """
    read = Base.read(base)
    transformer = load_transformer(read, dtype=torch.float32)
    mark = fingerprint(transformer)
    attach(transformer, LoraSettings(rank=4, alpha=alpha), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if ".lora_B." in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    tokenizer, text_encoder = load_text_encoder(read, dtype=torch.float32, quantization=quantization)
    metadata = metadata_of(mark, LoraSettings(rank=4, alpha=alpha), base=str(base))
    null = null_scale * null_caption(text_encoder, tokenizer)
    save_adapter(folder, transformer, replace(metadata, **changes), null)
    return folder


def spoilt(adapter: Path, folder: Path, file: str, change: dict[str, Any]) -> Path:
    """A copy of an adapter, as one from before there were manifests, with other values in one of its JSON files."""
    if folder != adapter:
        shutil.copytree(adapter, folder)
        (folder / "manifest.json").unlink()
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | change))
    return folder


def save_peft(folder: Path, model: PeftModel, fingerprint: str, settings: LoraSettings) -> None:
    """Save what plain peft trained, with what we want to know of it."""
    model.save_pretrained(str(folder))
    about = metadata_of(fingerprint, settings)
    (folder / "pixart_ft.json").write_text(json.dumps(asdict(about)))
    save_file({"null_caption": torch.zeros(1, 32)}, folder / "null_caption.safetensors")


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
