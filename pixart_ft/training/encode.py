"""The data of a run: rows from the folders, everything that T5 and the VAE are needed for encoded once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from pixart_ft.config.train import TrainConfig
from pixart_ft.data.cache import CachedPictures, TensorStore, cache_captions, cache_pictures, component_id
from pixart_ft.data.datasets import Row, picture_folder, read_folder, split
from pixart_ft.errors import UserError
from pixart_ft.evaluation.held_out import HeldOutSet
from pixart_ft.model import loading
from pixart_ft.model.base import Base
from pixart_ft.model.vae import LatentScale

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype that train.mixed_precision, which is settled by now, computes in."""
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.mixed_precision]


def read_rows(config: TrainConfig) -> tuple[list[Row], list[Row]]:
    """Training and held-out pictures; every problem of the two folders is reported by `read_folder`."""
    rows = read_folder(picture_folder(config.data.folder, "train"))
    if config.data.held_out is not None:
        held = read_folder(picture_folder(config.data.held_out, "held_out"))
    else:
        rows, held = split(rows, config.data.held_out_fraction, config.run.seed)
    if not rows:
        raise UserError(f"data.held_out_fraction {config.data.held_out_fraction} leaves nothing to train on; lower it")
    return rows, held[: config.validation.pictures]


def read_prior(config: TrainConfig) -> list[Row]:
    """The pictures of data.prior, if there is one; problems are reported by `read_folder`."""
    return [] if config.data.prior is None else read_folder(picture_folder(config.data.prior, "train"))


def vae_id(config: TrainConfig, base: Base) -> str:
    """Names the VAE by its content, see `component_id`."""
    return _component_id(config, base, "vae", dtype=torch.float32)


def text_encoder_id(config: TrainConfig, base: Base) -> str:
    """Names the tokenizer, T5 and the dtype it runs in, see `component_id`."""
    return _component_id(config, base, "tokenizer", "text_encoder", dtype=text_dtype(config))


def _component_id(config: TrainConfig, base: Base, *subfolders: str, dtype: torch.dtype) -> str:
    memo = config.data.cache / "files.json"
    whole = base.whole
    return component_id(whole.place, *subfolders, dtype=dtype, commit=whole.commit, memo=memo)


def text_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype that T5 encodes in."""
    return DTYPES.get(config.model.text_encoder_dtype) or compute_dtype(config)


@dataclass(frozen=True)
class Encoded:
    """Everything that T5 and the VAE are needed for, made before the transformer is loaded."""

    train: CachedPictures
    held_out: HeldOutSet | None
    null_caption: Tensor
    prompts: list[Tensor]
    scale: LatentScale


def encode_once(
    config: TrainConfig,
    base: Base,
    rows: list[Row],
    held: list[Row],
    resolution: int,
    accelerator: Accelerator,
    digests: Sequence[str] | None = None,
) -> Encoded:
    """Fill the cache on the main process, then read it on all; what it holds already is not encoded again.

    Pictures go first, since one that cannot be read should be known before T5 is even downloaded. `digests` are those
    of the pictures of `rows`, then of `held`, where they are known.
    """
    device = accelerator.device

    def text_encoder() -> tuple[PreTrainedTokenizerBase, T5EncoderModel]:
        tokenizer, encoder = loading.load_text_encoder(base, dtype=text_dtype(config))
        return tokenizer, encoder.to(device)

    def vae() -> AutoencoderKL:
        return loading.load_vae(base, dtype=torch.float32).to(device)

    def fill() -> tuple[TensorStore, list[str], list[str]]:
        show = accelerator.is_main_process
        store = TensorStore(config.data.cache)
        picture_keys = cache_pictures(
            store,
            rows + held,
            load_vae=vae,
            vae_id=vae_id(config, base),
            digests=digests,
            size=resolution,
            progress=show,
        )
        texts = [row.caption for row in rows + held] + list(config.validation.prompts) + [""]
        text_keys = cache_captions(
            store,
            texts,
            load_text_encoder=text_encoder,
            encoder_id=text_encoder_id(config, base),
            max_tokens=config.data.max_tokens,
            progress=show,
        )
        return store, text_keys, picture_keys

    with accelerator.main_process_first():
        store, text_keys, picture_keys = fill()
    count = len(rows)
    measured = CachedPictures(store, picture_keys[count:], text_keys[count : len(rows + held)])
    held_out = None
    if held:
        everything = list(range(len(held)))
        held_out = HeldOutSet(
            x0=base.latent_scale.scaled(measured.latents(everything)[0]),
            texts=measured.texts(everything),
            timestep_count=config.validation.timesteps,
            seed=config.run.seed,
        )
    return Encoded(
        train=CachedPictures(store, picture_keys[:count], text_keys[:count]),
        held_out=held_out,
        null_caption=store.get(text_keys[-1]),
        prompts=[store.get(key) for key in text_keys[len(rows + held) : -1]],
        scale=base.latent_scale,
    )
