"""A diffusers pipeline that keeps the learned variance: PixArt-Sigma with every sampler of this package."""

import inspect
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from diffusers import PixArtSigmaPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import (
    ASPECT_RATIO_256_BIN,
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
)
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from PIL import Image
from torch import Tensor

from pixart_ft.adapters.acting import loaded
from pixart_ft.adapters.pipelines import fuse, load_lora, set_adapters, set_scale, unload
from pixart_ft.config.train import Weights
from pixart_ft.data.pixels import picture_pixels
from pixart_ft.diffusion.intervals import Interval
from pixart_ft.diffusion.names import unknown_word
from pixart_ft.errors import UserError
from pixart_ft.model.adapter_switch import adapter_intervals
from pixart_ft.model.attention import check_text
from pixart_ft.model.text import encode_captions, pad_text
from pixart_ft.model.vae import decode_to_pixels, encode_pixels, latent_scale_faults, safe_dtype, to_pictures, to_unit
from pixart_ft.sampling.loop import Guidance, sample_latents
from pixart_ft.sampling.pipeline_folder import open_as_stock, own_scheduler
from pixart_ft.sampling.settings import (
    Settings,
    begin_late,
    calls_to_come,
    first_call,
    image_faults,
    interval_faults,
    size_faults,
    warn_of_size,
)
from pixart_ft.schedulers import PixArtScheduler
from pixart_ft.schedulers.stored import process_of

OutputType = Literal["pil", "np", "pt", "latent"]
# (pipeline, number of calls before this one, timestep, {"latents": ...}) -> what of it to replace
OnStep = Callable[["PixArtPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]

# The sizes that a network of this sample_size was trained at.
_BINS = {32: ASPECT_RATIO_256_BIN, 64: ASPECT_RATIO_512_BIN, 128: ASPECT_RATIO_1024_BIN, 256: ASPECT_RATIO_2048_BIN}


class PixArtPipeline(PixArtSigmaPipeline):
    """`PixArtSigmaPipeline` with another call; `from_pretrained` takes any stock PixArt-Sigma folder.

    Guidance acts on the mean half of the network's output, on all latent channels, and the variance half of the
    conditional branch reaches the scheduler, so that `IDDPMScheduler` works. Latents stay float32 throughout. Any
    scheduler of `pixart_ft.schedulers` or of diffusers fits:

        pipeline = PixArtPipeline.from_pretrained(folder)
        pipeline.scheduler = IDDPMScheduler.from_config(pipeline.scheduler.config)
        pipeline("a red apple", num_inference_steps=50).images[0]
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """As diffusers has it; a folder that this class saved comes with the scheduler it had, unless one is given."""
        pipeline: Self = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if "scheduler" not in kwargs:
            own = own_scheduler(pretrained_model_name_or_path, pipeline.scheduler, kwargs)
            pipeline.scheduler = own or pipeline.scheduler
        return pipeline

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As diffusers has it; UserError while an adapter is attached, whose layers no pipeline could open."""
        if hasattr(self.transformer, "adapter_switch"):
            raise UserError(
                f"adapter: {save_directory} is not written: the folder of a pipeline cannot hold an adapter; keep the "
                "adapter's folder beside the base, or add it to the weights (fuse)"
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write model_index.json so that the folder opens in the stock pipeline and in this one.

        `save_pretrained` calls it last. Warns where diffusers has no scheduler for what this one does.
        """
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        open_as_stock(Path(save_directory), self.config_name, self.scheduler)

    def load_lora(
        self,
        path: str | Path,
        scale: float = 1.0,
        name: str | None = None,
        *,
        strict: bool = True,
        weights: Weights = "ema",
        interval: Interval | None = None,
    ) -> str:
        """Load an adapter of this package; `pixart_ft.load_lora` says what each argument is."""
        return load_lora(self, path, scale, name, strict=strict, weights=weights, interval=interval)

    def load_lora_weights(self, pretrained_model_name_or_path: str | Path, adapter_name: str | None = None) -> None:
        """`load_lora`, as diffusers' other pipelines call it."""
        self.load_lora(pretrained_model_name_or_path, name=adapter_name)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Let these adapters act, at these scales, and the others not; as diffusers' other pipelines call it."""
        set_adapters(self, adapter_names, 1.0 if adapter_weights is None else adapter_weights)

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """`fuse`, each adapter's scale times `lora_scale`; as diffusers' other pipelines call it."""
        for name, one in loaded(self.transformer).items():
            set_scale(self, one.scale * lora_scale, name)
        fuse(self)

    def unload_lora_weights(self) -> None:
        """`unload`, as diffusers' other pipelines call it."""
        unload(self)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int = 20,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = Settings.guidance,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        *,
        clean_caption: bool = False,
        use_resolution_binning: bool = False,
        max_sequence_length: int = 300,
        guidance_interval: tuple[float, float] | None = None,
        image: Image.Image | None = None,
        strength: float = Settings.strength,
        callback_on_step_end: OnStep | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Pictures of prompts, all of the first, then of the next. The arguments up to `return_dict` stand where the
        stock pipeline has them and mean the same, with its defaults.

        timesteps, sigmas  the steps themselves, of a scheduler whose `set_timesteps` takes them
        guidance_scale  up to 1 it is off, as in the stock pipeline; negative prompts are then left aside
        eta        of diffusers' DDIM and TCD; our schedulers have it from their constructor
        generator  one for each picture, so that no other changes it, or one for all; on the CPU
        latents    the first noise (N, C, H, W), of unit variance
        prompt_embeds, prompt_attention_mask  (N, L, D) and (N, L), as `encode_prompt` gives them, in place of prompts,
            so that the text encoder can be None; likewise the negative ones
        output_type  pil; np (N, H, W, 3) and pt (N, 3, H, W), float32 in 0..1; or latent: float32, in the VAE's scale
        clean_caption  only False: the network was trained on captions that were stripped and lowered alone
        use_resolution_binning  draw the nearest size that the network was trained at and cut it to the one asked for;
            False draws what is asked for, since another size is another picture
        guidance_interval  timesteps between which guidance acts; None: all
        image      a picture to start from, cropped to the size; `strength` is the share of the steps that are run
        callback_on_step_end  called after each network call with (pipeline, the calls before it, timestep, values);
            "latents" in what it returns replaces them. callback_on_step_end_tensor_inputs: () leaves the values empty

        Raises ValueError with all that does not fit.
        """
        height, width, wanted = *self._size(height, width, use_resolution_binning), (height, width)
        guidance = Guidance(guidance_scale, guidance_interval)
        faults = [
            *size_faults(width, height, self.transformer.config.patch_size * self.vae_scale_factor),
            *self._unsupported(output_type, clean_caption, eta, callback_on_step_end_tensor_inputs),
            *latent_scale_faults(self.vae.config),
            *(
                f"{name} must be at least 1, got {count}"
                for name, count in (
                    ("num_inference_steps", num_inference_steps),
                    ("num_images_per_prompt", num_images_per_prompt),
                )
                if count < 1
            ),
        ]
        try:
            process_of({**self.scheduler.config, "_class_name": type(self.scheduler).__name__})
        except ValueError as error:
            faults.append(str(error))
        if not math.isfinite(guidance_scale):
            faults.append(f"guidance_scale must be a number, got {guidance_scale}")
        elif not guidance.on and guidance_interval is not None:
            faults.append(f"guidance_interval is unused at guidance_scale {guidance_scale:g}; leave it out")
        if image is not None:
            faults += [*self._image_faults(latents), *image_faults(strength, self.scheduler.config.get("tolerance"))]
        if self._adaptive and callback_on_step_end is not None:
            faults.append("with a tolerance pf_ode has no steps to call callback_on_step_end after; leave it out")
        _refuse(faults)
        warn_of_size(width, height, self.transformer.config.sample_size * self.vae_scale_factor)
        self._set_timesteps(num_inference_steps, timesteps, sigmas)
        scheduler = self.scheduler
        if image is not None:
            begin_late(scheduler, strength)
        guided, last = guidance.interval if guidance.on else None, scheduler.config.num_train_timesteps - 1
        if isinstance(scheduler, PixArtScheduler):
            last = scheduler.schedule.last_timestep
        _refuse(interval_faults(guided, adapter_intervals(self.transformer), calls_to_come(scheduler), last))

        texts = self._texts(prompt, prompt_embeds, prompt_attention_mask, "prompt", max_sequence_length)
        nulls = texts
        if guidance.on:
            nulls = self._texts(
                negative_prompt,
                negative_prompt_embeds,
                negative_prompt_attention_mask,
                "negative_prompt",
                max_sequence_length,
            )
            nulls = nulls * len(texts) if len(nulls) == 1 else nulls
        if len(nulls) != len(texts):
            raise ValueError(f"{len(nulls)} negative prompts for {len(texts)} prompts; give one, or one for each")
        texts, nulls = ([row for row in rows for _ in range(num_images_per_prompt)] for rows in (texts, nulls))
        shape = (self.transformer.config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        device = self._execution_device
        generators = _generators(generator, len(texts))
        if latents is not None and tuple(latents.shape) != (len(texts), *shape):
            raise ValueError(f"latents must be {(len(texts), *shape)} for these pictures, got {tuple(latents.shape)}")
        start = None if latents is None else latents.to(device, torch.float32) * scheduler.init_noise_sigma
        x0 = None
        if image is not None:
            x0 = encode_pixels(self._safe_vae(), picture_pixels(image, (width, height))[None], device)
        to_come = scheduler.timesteps[first_call(scheduler) :]

        with self.progress_bar(total=None if self._adaptive else len(to_come)) as bar:

            def on_call(call: int, sample: Tensor) -> Tensor | None:
                bar.update()
                if callback_on_step_end is None:
                    return None
                values = {"latents": sample} if callback_on_step_end_tensor_inputs else {}
                return (callback_on_step_end(self, call - 1, to_come[call - 1], values) or {}).get("latents")

            embeds, mask = pad_text(texts)
            found = sample_latents(
                self.transformer,
                scheduler,
                embeds.to(device),
                mask.to(device),
                [row.to(device) for row in nulls],
                guidance=guidance,
                generators=generators,
                shape=shape,
                x0=x0,
                start=start,
                eta=eta,
                on_call=on_call,
            )
        pictures = found if output_type == "latent" else self._decoded(found, output_type, wanted)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    @property
    def _adaptive(self) -> bool:
        return self.scheduler.config.get("tolerance") is not None

    def _size(self, height: int | None, width: int | None, binning: bool) -> tuple[int, int]:
        """The size to draw, in pixels."""
        native = self.transformer.config.sample_size
        height, width = (native * self.vae_scale_factor if side is None else side for side in (height, width))
        if not binning:
            return height, width
        if native not in _BINS:
            known = ", ".join(str(size) for size in _BINS)
            raise ValueError(f"use_resolution_binning knows sizes for sample_size {known}, not {native}; leave it out")
        binned: tuple[int, int] = self.image_processor.classify_height_width_bin(height, width, ratios=_BINS[native])
        return binned

    def _unsupported(self, output_type: str, clean_caption: bool, eta: float, values: Sequence[str]) -> list[str]:
        """What a user of the stock pipeline may ask for and cannot have."""
        faults = []
        if output_type not in get_args(OutputType):
            faults.append(unknown_word(output_type, "output_type", get_args(OutputType)))
        if clean_caption:
            faults.append(
                "clean_caption rewrites captions (links, digits, punctuation), which training here does not, so the "
                "network would see other words; leave it False"
            )
        if eta != 0 and "eta" not in inspect.signature(self.scheduler.step).parameters:
            ours = isinstance(self.scheduler, PixArtScheduler) and "eta" in self.scheduler.config
            kind = type(self.scheduler).__name__
            remedy = f"{kind}.from_config(pipeline.scheduler.config, eta={eta:g})" if ours else "leave it out"
            faults.append(f"{kind} takes no eta at a call; {remedy}")
        if others := [name for name in values if name != "latents"]:
            faults.append(f"callback_on_step_end sees latents alone; {', '.join(others)} cannot be had or changed")
        return faults

    def _image_faults(self, latents: Tensor | None) -> list[str]:
        """What keeps the pipeline from beginning with a picture."""
        faults = []
        if latents is not None:
            faults.append("image and latents both say what to begin with; give one")
        if not isinstance(self.scheduler, PixArtScheduler):
            faults.append(f"image needs a scheduler of pixart_ft.schedulers, not {type(self.scheduler).__name__}")
        return faults

    def _set_timesteps(self, count: int, timesteps: Sequence[int] | None, sigmas: Sequence[float] | None) -> None:
        """The scheduler's steps: a number of them, or themselves where it takes them."""
        given = {name: list(x) for name, x in (("timesteps", timesteps), ("sigmas", sigmas)) if x is not None}
        if len(given) == 2:
            raise ValueError("timesteps and sigmas both say the steps; give one")
        for name, steps in given.items():
            if name not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(f"{type(self.scheduler).__name__} takes no {name}; give num_inference_steps")
            self.scheduler.set_timesteps(**{name: steps})
        if not given:
            self.scheduler.set_timesteps(count)

    def _decoded(self, latents: Tensor, output_type: str, wanted: tuple[int | None, int | None]) -> Any:
        """Pictures of latents, cut to the size that was asked for where another was drawn."""
        pixels = decode_to_pixels(self._safe_vae(), latents)
        height, width = (asked or side for asked, side in zip(wanted, pixels.shape[2:], strict=True))
        if (height, width) != tuple(pixels.shape[2:]):
            pixels = self.image_processor.resize_and_crop_tensor(pixels, width, height)
        pixels = to_unit(pixels)
        if output_type == "pil":
            return to_pictures(pixels)
        return pixels if output_type == "pt" else pixels.permute(0, 2, 3, 1).cpu().numpy()

    def _texts(
        self, prompt: str | Sequence[str] | None, embeds: Tensor | None, mask: Tensor | None, name: str, limit: int
    ) -> list[Tensor]:
        """The embedding (L, D) of each prompt, real tokens only."""
        if embeds is not None:
            if mask is None:
                raise ValueError(f"{name}_embeds come with their mask: give {name}_attention_mask too")
            if prompt:
                raise ValueError(f"{name}_embeds replace {name}: give one of them")
            check_text(embeds, mask)
            if not bool(mask.any(dim=1).all()):
                raise ValueError(f"{name}_attention_mask leaves no token of a prompt")
            return [row[real.bool()] for row, real in zip(embeds, mask, strict=True)]
        if prompt is None or (not isinstance(prompt, str) and len(prompt) == 0):
            raise ValueError(f"give {name} or {name}_embeds")
        if self.text_encoder is None:
            raise ValueError(f"this pipeline has no text encoder: give {name}_embeds")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        return encode_captions(self.text_encoder, self.tokenizer, prompts, max_tokens=limit)

    def _safe_vae(self) -> Any:
        """The VAE, in float32 where its config says that it overflows in float16, as the SDXL VAE does."""
        safe = safe_dtype(self.vae.config, self.vae.dtype)
        return self.vae if safe == self.vae.dtype else self.vae.to(safe)


def _generators(given: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[torch.Generator]:
    if given is None:
        seeds = torch.randint(2**62, (count,)).tolist()
        return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    found = [given] * count if isinstance(given, torch.Generator) else list(given)
    if len(found) != count:
        raise ValueError(f"{len(found)} generators for {count} pictures; give one for each, or one for all")
    return found


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise ValueError("\n".join(faults))
