"""A base with its adapter, ready to draw: prompts and seeds to pictures, and the recipe of each."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Self

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from pixart_ft import models
from pixart_ft.adapters import AdapterMetadata, find_adapter, load_adapter
from pixart_ft.data.captions import encode_captions, null_caption, pad_text
from pixart_ft.diffusion.process import PredictionType
from pixart_ft.diffusion.respacing import Spacing
from pixart_ft.diffusion.schedules import NoiseSchedule, conditioned
from pixart_ft.diffusion.solvers import Variance
from pixart_ft.environment import versions
from pixart_ft.errors import UserError
from pixart_ft.models import VarianceState
from pixart_ft.samplers import SAMPLERS
from pixart_ft.sampling import decode_latents, sample_latents


@dataclass(frozen=True)
class Settings:
    """How pictures are sampled; together with the model, a prompt and a seed it fixes a picture."""

    sampler: str = "ddim"
    steps: int = 30
    guidance: float = 4.5
    negative_prompt: str = ""  # in place of the null caption, unless empty
    eta: float = 0.0  # DDIM alone
    spacing: Spacing = "iddpm"
    variance: Variance | Literal["auto"] = "auto"  # DDPM alone; auto: learned if trained, else beta_tilde
    width: int | None = None  # pixels; None: the size the model was trained at
    height: int | None = None


@dataclass(frozen=True)
class Adapter:
    """The adapter on the transformer."""

    path: str
    scale: float
    sha256: str  # of the weights, which may be trained anew at the same path
    metadata: AdapterMetadata


@dataclass(frozen=True)
class TextToImage:
    """A PixArt-Sigma ready to draw: `TextToImage.load("demo", lora="runs/mine").generate("an apple")`."""

    transformer: PixArtTransformer2DModel
    vae: AutoencoderKL
    tokenizer: PreTrainedTokenizerBase
    text_encoder: T5EncoderModel
    schedule: NoiseSchedule
    prediction_type: PredictionType
    variance_state: VarianceState
    null_caption: Tensor  # (1, D)
    max_tokens: int
    base: str
    revision: str | None
    fingerprint: str  # of the base's transformer
    adapter: Adapter | None
    dtype: torch.dtype

    @classmethod
    def load(
        cls,
        base: str | Path = "demo",
        *,
        lora: str | Path | None = None,
        lora_scale: float = 1.0,
        weights: Literal["ema", "raw"] = "ema",
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Load base and adapter.

        base: "demo", a diffusers folder, or a Hub id.
        lora: an adapter folder or a run folder; lora_scale multiplies its effect, 1 as trained; weights
            chooses between the averaged and the last weights of a run.
        dtype: float32, bfloat16, or float16, under which the transformer's weights stay float32.

        Raises UserError when a part is missing, or the adapter is for another base or lacks a key.
        """
        place = models.resolve_base(str(base))
        held = torch.float32 if dtype == torch.float16 else dtype
        transformer = models.load_transformer(place, dtype=held, revision=revision)
        schedule, prediction_type = models.load_schedule(place, revision=revision)
        variance_state, max_tokens = models.variance_of(transformer), 300
        tokenizer, text_encoder = models.load_text_encoder(place, dtype=dtype, revision=revision)
        text_encoder.to(device)
        adapter = None
        if lora is None:
            null = null_caption(text_encoder, tokenizer)
        else:
            folder = find_adapter(lora, weights=weights)
            metadata, null = load_adapter(transformer, folder, scale=lora_scale)
            trained_on = NoiseSchedule.from_diffusers_config(metadata.schedule)
            schedule = conditioned(trained_on, schedule, metadata.time_conditioning)
            prediction_type, variance_state = metadata.prediction_type, metadata.variance
            max_tokens = metadata.max_tokens
            file = (folder / "adapter_model.safetensors").read_bytes()
            adapter = Adapter(str(lora), lora_scale, hashlib.sha256(file).hexdigest(), metadata)
        return cls(
            transformer=transformer.to(device),
            vae=models.decoder_only(models.load_vae(place, dtype=dtype, revision=revision)).to(device),
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            schedule=schedule,
            prediction_type=prediction_type,
            variance_state=variance_state,
            null_caption=null,
            max_tokens=max_tokens,
            base=str(base),
            revision=revision,
            fingerprint=models.fingerprint(transformer),
            adapter=adapter,
            dtype=dtype,
        )

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        sampler: str = "ddim",
        steps: int = 30,
        guidance: float = 4.5,
        seeds: Sequence[int] = (0,),
        negative_prompt: str = "",
        eta: float = 0.0,
        spacing: Spacing = "iddpm",
        variance: Variance | Literal["auto"] = "auto",
        width: int | None = None,
        height: int | None = None,
        batch_size: int = 4,
    ) -> list[Image.Image]:
        """One picture for every prompt and seed: all seeds of the first prompt, then of the next.

        Arguments as in `Settings`; batch_size pictures are drawn at once. Raises UserError as `settled` does.
        """
        settings = Settings(sampler, steps, guidance, negative_prompt, eta, spacing, variance, width, height)
        jobs = list(itertools.product([prompts] if isinstance(prompts, str) else prompts, seeds))
        return list(self.draw(jobs, self.settled(settings), batch_size=batch_size))

    def settled(self, settings: Settings) -> Settings:
        """The settings with this model's own size and variance filled in.

        Raises UserError with everything that is wrong: an unknown sampler, a setting that it does not use,
        steps or a size that the model cannot give, a learned variance that is not there or was not trained.
        """
        faults = []
        if settings.sampler not in SAMPLERS:
            faults.append(f"sampler: unknown {settings.sampler!r}; choose from {', '.join(SAMPLERS)}")
        if settings.eta != 0 and settings.sampler != "ddim":
            faults.append(f"eta ({settings.eta:g}) is for DDIM, not for sampler {settings.sampler}; remove it")
        if not 0 <= settings.eta <= 1:
            faults.append(f"eta must lie between 0 and 1, got {settings.eta:g}")
        if settings.variance != "auto" and settings.sampler != "ddpm":
            faults.append(f"variance ({settings.variance}) is for DDPM, not for {settings.sampler}; remove it")
        if not 1 <= settings.steps <= self.schedule.num_steps:
            faults.append(f"steps must lie between 1 and {self.schedule.num_steps}, got {settings.steps}")
        unit = self.transformer.config.patch_size * self._vae_factor
        native = self.transformer.config.sample_size * self._vae_factor
        width, height = settings.width or native, settings.height or native
        for key, size in (("width", width), ("height", height)):
            if size < unit or size % unit:
                near = max(unit, round(size / unit) * unit)
                faults.append(f"{key} ({size}) must be a multiple of {unit} (patch size times VAE factor); try {near}")
        if settings.negative_prompt and settings.guidance == 1:
            faults.append("negative_prompt is unused at guidance 1; raise guidance or remove it")
        if settings.variance == "learned" and self.variance_state != "trained":
            faults.append(_untrained_variance(self.variance_state, self.adapter))
        if faults:
            raise UserError("\n".join(faults))
        variance = settings.variance
        if settings.sampler == "ddpm" and variance == "auto":
            variance = "learned" if self.variance_state == "trained" else "beta_tilde"
        return replace(settings, variance=variance, width=width, height=height)

    def draw(
        self,
        jobs: Sequence[tuple[str, int]],
        settings: Settings,
        *,
        batch_size: int = 4,
        progress: Callable[[int], object] | None = None,
    ) -> Iterator[Image.Image]:
        """The picture of each (prompt, seed) in turn, `batch_size` at once; `settings` must be `settled`.

        A seed means what it does in diffusers: torch.Generator("cpu").manual_seed(seed) draws the noise.
        `progress` is called after each step with the number of pictures it moved on.
        """
        assert settings.width is not None and settings.height is not None
        device = next(self.transformer.parameters()).device
        unique = list(dict.fromkeys(prompt for prompt, _ in jobs))
        texts = dict(zip(unique, self._encode(unique), strict=True))
        null = self._encode([settings.negative_prompt])[0] if settings.negative_prompt else self.null_caption
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            embeds, mask = pad_text([texts[prompt] for prompt, _ in batch])
            latents = sample_latents(
                self.transformer,
                self.schedule,
                self.prediction_type,
                embeds.to(device),
                mask.to(device),
                null.to(device),
                sampler=settings.sampler,
                steps=settings.steps,
                guidance=settings.guidance,
                generators=[torch.Generator("cpu").manual_seed(seed) for _, seed in batch],
                shape=(
                    self.transformer.config.in_channels,
                    settings.height // self._vae_factor,
                    settings.width // self._vae_factor,
                ),
                eta=settings.eta,
                variance="beta_tilde" if settings.variance == "auto" else settings.variance,
                spacing=settings.spacing,
                autocast=None if self.dtype == torch.float32 else self.dtype,
                progress=None if progress is None else partial(progress, len(batch)),
            )
            yield from decode_latents(self.vae, latents)

    def recipe(self, prompt: str, seed: int, settings: Settings) -> dict[str, object]:
        """All that a picture follows from, as plain JSON values."""
        adapter = None if self.adapter is None else asdict(self.adapter)
        values = {
            "prompt": prompt,
            "seed": seed,
            **asdict(settings),
            "model": self.base,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "adapter": adapter,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": next(self.transformer.parameters()).device.type,
            "versions": versions(),
        }
        plain: dict[str, object] = json.loads(json.dumps(values))
        return plain

    @property
    def _vae_factor(self) -> int:
        return models.vae_factor(self.vae)

    def _encode(self, captions: Sequence[str]) -> list[Tensor]:
        return encode_captions(self.text_encoder, self.tokenizer, captions, max_tokens=self.max_tokens)


def _untrained_variance(state: VarianceState, adapter: Adapter | None) -> str:
    if state == "none":
        return "variance: learned needs variance channels, and this network has none; use beta_tilde or auto"
    by = f"the adapter {adapter.path}" if adapter else "this model"
    return (
        f"variance: learned needs a trained variance, and {by} was trained by an objective that leaves it "
        "stale; use beta_tilde or auto, or train with diffusion.objective hybrid"
    )
