"""The folder of a diffusers pipeline: a network of ours, and what stands beside it."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers import PixArtTransformer2DModel
from huggingface_hub import save_torch_state_dict, snapshot_download
from torch import Tensor

from pixart_ft.model.base import Base
from pixart_ft.model.weights import readable

LARGEST_SHARD = "5GB"
_WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"
# The parts beside the transformer, as the index of a pipeline names their classes.
_OTHERS = {
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
}


def write_pipeline(
    folder: Path,
    transformer: PixArtTransformer2DModel,
    weights: Mapping[str, Tensor],
    scheduler: Any,
    lender: Base | None,
) -> None:
    """Fill an empty folder with a pipeline whose network has these weights, in shards above 5 GB.

    transformer: its configuration counts alone; lender: whose VAE, text encoder and tokenizer are copied, None: none.
    """
    transformer.save_config(str(folder / "transformer"))
    save_torch_state_dict(
        dict(weights), str(folder / "transformer"), filename_pattern=_WEIGHTS, max_shard_size=LARGEST_SHARD
    )
    scheduler.save_pretrained(str(folder / "scheduler"))
    others: list[str] = []
    if lender is not None:
        others = [part for part in _OTHERS if part == "vae" or lender.text_encoder is not None]
        source = _at_hand(lender.whole, others)
        for part in others:
            shutil.copytree(source / part, folder / part)
    index = {
        "_class_name": "PixArtSigmaPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "transformer": ["diffusers", type(transformer).__name__],
        **{part: kind if part in others else [None, None] for part, kind in _OTHERS.items()},
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _at_hand(base: Base, parts: Sequence[str]) -> Path:
    """The folder that these parts of a base are in, downloaded if it is the Hub's."""
    if (folder := Path(base.place)).is_dir():
        return folder
    with readable(base.place, ", ".join(parts)):
        patterns = [f"{part}/*" for part in parts]
        return Path(snapshot_download(base.place, revision=base.commit, allow_patterns=patterns))
