"""A diffusers pipeline that keeps the learned variance: PixArt-Sigma with every sampler of this package."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from diffusers import PixArtSigmaPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from pixart_ft.attention import check_text
from pixart_ft.data.captions import encode_captions, pad_text
from pixart_ft.data.datasets import picture_pixels
from pixart_ft.sampling import Guidance, decode_latents, encode_picture, first_call, sample_latents
from pixart_ft.schedulers import PixArtScheduler

# (pipeline, number of calls made, timestep, {"latents": ...}) -> what of it to replace
OnStep = Callable[["PixArtPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class PixArtPipeline(PixArtSigmaPipeline):
    """`PixArtSigmaPipeline` with another call; `from_pretrained` takes any stock PixArt-Sigma folder.

    Guidance acts on the mean half of the network's output, on all latent channels, and the variance half of the
    conditional branch reaches the scheduler, so that `IDDPMScheduler` works. Latents stay float32 throughout. Any
    scheduler of `pixart_ft.schedulers` or of diffusers fits:

        pipeline = PixArtPipeline.from_pretrained(folder)
        pipeline.scheduler = IDDPMScheduler.from_config(pipeline.scheduler.config)
        pipeline("a red apple", num_inference_steps=50).images[0]
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int = 30,
        guidance_scale: float = 4.5,
        guidance_interval: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        image: Image.Image | None = None,
        strength: float = 0.6,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: Literal["pil", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStep | None = None,
        max_sequence_length: int = 300,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Pictures of prompts, all of the first, then of the next.

        guidance_scale  1 is off; negative prompts are then left aside, as by the stock pipeline
        guidance_interval  timesteps between which guidance acts; None: all
        generator  one for each picture, so that no other changes it, or one for all; on the CPU
        latents    the first noise (N, C, H, W), of unit variance
        image      a picture to start from, cropped to the size; `strength` is the share of the steps that are run
        prompt_embeds, prompt_attention_mask  (N, L, D) and (N, L), as `encode_prompt` gives them, in place of prompts,
            so that the text encoder can be None; likewise the negative ones
        callback_on_step_end  called after each network call; "latents" in what it returns replaces them
        output_type  pil, or latent: float32, in the VAE's scale

        Raises ValueError for sizes, lengths and settings that do not fit.
        """
        if output_type not in ("pil", "latent"):
            raise ValueError(f"unknown output_type {output_type!r}; choose pil or latent")
        if image is not None and latents is not None:
            raise ValueError("image and latents both say what to begin with; give one")
        if guidance_scale == 1 and guidance_interval is not None:
            raise ValueError("guidance_interval is unused at guidance_scale 1; leave it out")
        texts = self._texts(prompt, prompt_embeds, prompt_attention_mask, "prompt", max_sequence_length)
        nulls = texts
        if guidance_scale != 1:
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
        shape = self._shape(height, width)
        device = self._execution_device
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps)
        generators = _generators(generator, len(texts))
        if latents is not None and tuple(latents.shape) != (len(texts), *shape):
            raise ValueError(f"latents must be {(len(texts), *shape)} for these pictures, got {tuple(latents.shape)}")
        start = None if latents is None else latents.to(device, torch.float32) * scheduler.init_noise_sigma
        if image is not None:
            start = self._begin(image, strength, shape, generators)
        timesteps, first = scheduler.timesteps, first_call(scheduler)
        adaptive = scheduler.config.get("tolerance") is not None
        if adaptive and callback_on_step_end is not None:
            raise ValueError("with a tolerance pf_ode has no steps to call callback_on_step_end after; leave it out")

        with self.progress_bar(total=None if adaptive else len(timesteps) - first) as bar:

            def on_call(call: int, sample: Tensor) -> Tensor | None:
                bar.update()
                if callback_on_step_end is None:
                    return None
                timestep = timesteps[min(first + call, len(timesteps)) - 1]
                return (callback_on_step_end(self, call, timestep, {"latents": sample}) or {}).get("latents")

            embeds, mask = pad_text(texts)
            found = sample_latents(
                self.transformer,
                scheduler,
                embeds.to(device),
                mask.to(device),
                [row.to(device) for row in nulls],
                guidance=Guidance(guidance_scale, guidance_interval),
                generators=generators,
                shape=shape,
                start=start,
                on_call=on_call,
            )
        pictures: Any = found if output_type == "latent" else decode_latents(self._safe_vae(), found)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

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

    def _shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Of one picture's latents."""
        config, factor = self.transformer.config, self.vae_scale_factor
        sides = []
        for name, side in (("height", height), ("width", width)):
            side, unit = side or config.sample_size * factor, config.patch_size * factor
            if side < unit or side % unit:
                near = max(unit, round(side / unit) * unit)
                raise ValueError(f"{name} ({side}) must be a multiple of {unit}; try {near}")
            sides.append(side // factor)
        return config.in_channels, sides[0], sides[1]

    def _begin(
        self, image: Image.Image, strength: float, shape: tuple[int, int, int], generators: Sequence[torch.Generator]
    ) -> Tensor:
        """The noised picture that sampling begins with; moves the scheduler to its step."""
        scheduler = self.scheduler
        if not isinstance(scheduler, PixArtScheduler):
            raise ValueError(f"image needs a scheduler of pixart_ft.schedulers, not {type(scheduler).__name__}")
        if scheduler.config.get("tolerance") is not None:
            raise ValueError("image starts at a step, and pf_ode with a tolerance has none; leave out tolerance")
        if not 0 < strength <= 1:
            raise ValueError(f"strength must lie above 0 and at most at 1, got {strength:g}")
        steps = len(scheduler.step_starts)
        scheduler.set_begin_index(scheduler.step_starts[steps - max(1, round(steps * strength))])
        size = (shape[2] * self.vae_scale_factor, shape[1] * self.vae_scale_factor)
        x0 = encode_picture(self._safe_vae(), picture_pixels(image, size)[None], self._execution_device)
        x0 = x0.expand(len(generators), *shape)
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        begin: Tensor = scheduler.add_noise(x0, noise, scheduler.timesteps[[scheduler.begin_index]])
        return begin.to(self._execution_device)

    def _safe_vae(self) -> Any:
        """The VAE, in float32 where its config says that it overflows in float16, as the SDXL VAE does."""
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.to(torch.float32)
        return self.vae


def _generators(given: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[torch.Generator]:
    if given is None:
        seeds = torch.randint(2**62, (count,)).tolist()
        return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    found = [given] * count if isinstance(given, torch.Generator) else list(given)
    if len(found) != count:
        raise ValueError(f"{len(found)} generators for {count} pictures; give one for each, or one for all")
    return found
