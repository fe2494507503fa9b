"""A base with its adapter, ready to draw: prompts and seeds to pictures, and the recipe of each."""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pixart_ft.adapters.acting import Attached, limit_adapter, load_adapter, loaded, scale_adapter
from pixart_ft.adapters.adopting import like_base, taken_in
from pixart_ft.adapters.files import UNKNOWN_BASE, Adapter, acting_interval, find_adapter
from pixart_ft.config.train import Attention, Quantization, Weights
from pixart_ft.data.pixels import load_picture, picture_pixels
from pixart_ft.diffusion.intervals import WHOLE, Interval, shown
from pixart_ft.diffusion.schedules import NoiseSchedule, conditioned
from pixart_ft.errors import UserError
from pixart_ft.files import sha256, versions
from pixart_ft.model import loading
from pixart_ft.model.attention import Kernels, use_kernels
from pixart_ft.model.base import Base
from pixart_ft.model.engine import Calls, check_engine, fastest_kernels
from pixart_ft.model.quantized import check_quantization
from pixart_ft.model.repeated import compile_blocks
from pixart_ft.model.text import pad_text
from pixart_ft.model.text_encoder import TextEncoder
from pixart_ft.model.vae import decode_to_pictures, encode_pixels
from pixart_ft.model.weights import read_null_caption
from pixart_ft.runs.metadata import AdapterMetadata
from pixart_ft.sampling.loop import Guidance, invert_latents, sample_latents
from pixart_ft.sampling.settings import (
    Abilities,
    Settings,
    calls_to_come,
    inversion_calls,
    recipe_of,
    scheduler_for,
    settled,
)
from pixart_ft.schedulers import RespacedDDIMScheduler

NULL_ROUNDING = 2**-2  # of a null caption from a text encoder in 4 bits, some layers deep


def abilities_of(base: Base, adapters: Sequence[Adapter] = ()) -> Abilities:
    """What a base, with adapters, can draw. Raises UserError for adapters that were trained on different processes."""
    schedule, prediction_type, variance = base.schedule, base.prediction_type, base.variance
    if metadata := adapters[0].metadata if adapters else base.metadata:
        schedule, prediction_type, variance = _process_of(metadata, base), metadata.prediction_type, metadata.variance
    for other in adapters[1:]:
        about, process = other.metadata, _process_of(other.metadata, base)
        same = {
            "base": _of_one_base(adapters[0], other),
            "prediction type": about.prediction_type == prediction_type,
            "schedule": torch.equal(process.alpha_bar, schedule.alpha_bar),
            "conditioning on the timestep": torch.equal(process.timesteps, schedule.timesteps),
        }
        if apart := [what for what, is_same in same.items() if not is_same]:
            raise UserError(f"lora: {adapters[0].name} and {other.name} were trained on another {', '.join(apart)}")
        variance = variance if about.variance == variance else "stale"  # they share the network's channels
    intervals = tuple(adapter.interval for adapter in adapters)
    return Abilities(schedule, prediction_type, variance, base.native_size, base.size_unit, intervals)


def _of_one_base(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters were trained on the same base, as far as is known: another program's says nothing."""
    bases = {adapter.metadata.base_fingerprint for adapter in (one, other)}
    return len(bases - {UNKNOWN_BASE}) < 2


def names_of(paths: Iterable[str]) -> str | None:
    """The adapters of a model, for messages; None: it has none."""
    return ", ".join(paths) or None


def scales_of(adapters: Sequence[object], scales: Sequence[float]) -> list[float]:
    """A scale for each adapter, of one for all or one for each. Raises UserError for any other number of them."""
    if len(scales) not in (1, len(adapters)):
        raise UserError(
            f"lora_scale: {len(scales)} numbers for {len(adapters)} adapters; give one for each, or one for all"
        )
    return list(scales) * (len(adapters) if len(scales) == 1 else 1)


def _process_of(metadata: AdapterMetadata, base: Base) -> NoiseSchedule:
    """The schedule that a network of this base was trained with, and what it is told of it."""
    schedule = NoiseSchedule.from_diffusers_config(metadata.schedule)
    return conditioned(schedule, base.schedule, metadata.time_conditioning)


def _check_nulls(nulls: Mapping[str, Tensor]) -> None:
    """Raise UserError where adapters, by name, were trained with null captions that differ by more than rounding."""
    (first, usual), *others = nulls.items()
    for name, null in others:
        if (null - usual).abs().max() > NULL_ROUNDING * usual.abs().max():
            raise UserError(
                f"lora: {first} and {name} were trained with different null captions, so with other text encoders"
            )


@dataclass(eq=False, repr=False)
class TextToImage:
    """A PixArt-Sigma ready to draw: `TextToImage.load("demo", lora="runs/mine").generate("an apple")`."""

    transformer: PixArtTransformer2DModel
    vae: AutoencoderKL
    text: TextEncoder
    abilities: Abilities
    base: Base
    fingerprint: str  # of the base's transformer
    dtype: torch.dtype
    attention: Attention = "by_shape"
    compiled: bool = False
    _kernels_chosen: bool = False

    @classmethod
    def load(
        cls,
        base: str | Path = "demo",
        *,
        lora: str | Path | Sequence[str | Path] | None = None,
        lora_scale: float | Sequence[float] = 1.0,
        lora_interval: Interval | None = None,
        lora_alpha: float | None = None,
        weights: Weights = "ema",
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prompts: Sequence[str] | None = None,
        attention: Attention = "by_shape",
        compile: bool = False,
        text_encoder_quantization: Quantization = "none",
    ) -> Self:
        """Load base and adapters.

        base: "demo", a diffusers folder, a Hub id, or a run that trained the whole network.
        lora: an adapter folder or a run folder, or several, whose updates add up; lora_scale multiplies its effect, 1
            as trained, one number for all or one for each; weights chooses between the averaged and the last weights
            of a run.
        lora_interval: the network's timesteps that the adapters act at, both ends included; (0, 1000) is all, None
            where each was trained.
        lora_alpha: of another program's adapter whose file says none.
        dtype: float32, bfloat16, or float16, under which the transformer's weights stay float32.
        prompts: all that will be drawn, negative ones too: they are encoded first, and the text encoder, larger than
            the transformer, is freed before that is loaded.
        attention: the kernels of attention; auto times them at the first picture, takes the fastest, and says which.
        compile: compile the transformer's blocks, at the first picture, which then takes minutes.
        text_encoder_quantization: nf4 or int8 holds T5 in 4 or 8 bits.

        Raises UserError when a part is missing, or the adapter is for another base or lacks a key.
        """
        read = Base.read(base, revision, weights)
        names = [] if lora is None else [lora] if isinstance(lora, str | Path) else list(lora)
        found = [find_adapter(name, weights, lora_interval) for name in names]
        adapters = taken_in(found, lambda: like_base(read), lora_alpha)
        check_engine(attention, compile, torch.device(device), dtype)
        check_quantization("text_encoder_quantization", text_encoder_quantization)
        return cls.of(
            read,
            adapters,
            [lora_scale] if isinstance(lora_scale, int | float) else lora_scale,
            dtype=dtype,
            device=device,
            prompts=prompts,
            attention=attention,
            compiled=compile,
            text_encoder_quantization=text_encoder_quantization,
        )

    @classmethod
    def of(
        cls,
        base: Base,
        adapters: Sequence[Adapter],
        scales: Sequence[float],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        prompts: Sequence[str] | None,
        attention: Attention = "by_shape",
        compiled: bool = False,
        text_encoder_quantization: Quantization = "none",
    ) -> Self:
        """As `load`, of a base and adapters that are read, once what it checks has no fault."""
        each = scales_of(adapters, scales)
        abilities = abilities_of(base, adapters)
        longest = [adapter.metadata.max_tokens for adapter in adapters]
        if not longest:
            longest = [300 if base.metadata is None else base.metadata.max_tokens]
        text = TextEncoder.load(
            base, dtype=dtype, device=device, max_tokens=min(longest), quantization=text_encoder_quantization
        )
        if prompts is not None:
            text.encode_and_free(prompts)
        held = torch.float32 if dtype == torch.float16 else dtype
        transformer = loading.load_transformer(base, dtype=held)
        nulls: dict[str, Tensor] = {}  # another program's adapter has none
        for adapter, one in zip(adapters, each, strict=True):
            if (null := load_adapter(transformer, adapter, scale=one)[1]) is not None:
                nulls[adapter.name] = null
        if base.metadata is not None and not nulls:
            nulls = {base.name: read_null_caption(Path(base.place), transformer.config.caption_channels)}
        if nulls:
            _check_nulls(nulls)
            text.known[""] = next(iter(nulls.values()))
        if attention != "auto":
            use_kernels(transformer, Kernels(attention, attention))
        if compiled:
            compile_blocks(transformer)
        return cls(
            transformer=transformer.to(device),
            vae=loading.load_vae(base, dtype=dtype).to(device),
            text=text,
            abilities=abilities,
            base=base,
            fingerprint=loading.fingerprint(transformer),
            dtype=dtype,
            attention=attention,
            compiled=compiled,
        )

    def __repr__(self) -> str:
        lora = "".join(
            f", lora={one.path!r} at {one.scale:g}" + (f" in {shown(one.interval)}" if one.interval != WHOLE else "")
            for one in self.adapters
        )
        place = f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        can = f"{self.abilities.size} px, predicts {self.abilities.prediction_type}, variance {self.abilities.variance}"
        return f"TextToImage({self.base.name!r}{lora}, {can}, {place})"

    @property
    def adapters(self) -> tuple[Attached, ...]:
        """The adapters that are loaded, in their order."""
        return tuple(loaded(self.transformer).values())

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    def set_lora_scale(self, scale: float | Sequence[float]) -> None:
        """Multiply the adapters' effect by `scale` from now on, one for all or one for each: 1 as trained, 0 nothing.

        Raises UserError if the model has no adapter.
        """
        names = list(loaded(self.transformer))
        if not names:
            raise UserError("lora_scale: this model has no adapter; load it with lora=")
        for name, one in zip(
            names, scales_of(names, [scale] if isinstance(scale, int | float) else scale), strict=True
        ):
            scale_adapter(self.transformer, one, name)

    def set_lora_interval(self, interval: Interval | None) -> None:
        """Let the adapters act at these of the network's timesteps from now on; as lora_interval of `load`.

        Raises UserError if the model has no adapter, and for an interval that there is not.
        """
        if not self.adapters:
            raise UserError("lora_interval: this model has no adapter; load it with lora=")
        for name, one in loaded(self.transformer).items():
            limit_adapter(self.transformer, acting_interval(one.metadata, interval), name)
        self.abilities = replace(self.abilities, intervals=tuple(one.interval for one in self.adapters))

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: int | Sequence[int] = 0,
        sampler: str | None = None,
        steps: int | str | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        width: int | None = None,
        height: int | None = None,
        image: str | Path | Image.Image | None = None,
        strength: float | None = None,
        options: Mapping[str, object] | None = None,
        settings: Settings | None = None,
        batch_size: int = 4,
        progress: bool = True,
    ) -> list[Image.Image]:
        """One picture for every prompt and seed: all seeds of the first prompt, then of the next.

        settings: everything as a `Settings`; an argument that is given replaces what it says there, and what is not
        said at all has its default there. options: the sampler's own settings, as {"eta": 0.5}. image: a picture to
        start from, cropped to the size. batch_size pictures are drawn at once; progress shows a bar on the terminal.
        Raises UserError as `settled` does.
        """
        settings = settings or Settings()
        if options is None and sampler not in (None, settings.sampler):
            options = {}  # those of the settings are another sampler's
        said = {
            "sampler": sampler,
            "steps": steps,
            "guidance": guidance,
            "negative_prompt": negative_prompt,
            "width": width,
            "height": height,
            "image": Path(image) if isinstance(image, str) else image,
            "strength": strength,
            "options": options,
        }
        given: dict[str, Any] = {key: value for key, value in said.items() if value is not None}
        settings = self.settled(replace(settings, **given))
        prompts = [prompts] if isinstance(prompts, str) else prompts
        jobs = list(itertools.product(prompts, [seeds] if isinstance(seeds, int) else seeds))
        self.text.encode([*prompts, settings.negative_prompt])  # all at once: warnings name them together
        with self.progress_bar(len(jobs), settings, show=progress) as bar:
            return list(self.draw(jobs, settings, batch_size=batch_size, progress=bar.update))

    def progress_bar(self, count: int, settings: Settings, *, show: bool = True) -> tqdm:
        """A bar over the network calls of `count` pictures; its `update` is for `draw`."""
        calls = self.calls(settings)
        total = None if calls is None else count * calls
        return tqdm(total=total, desc="generating", unit=" calls", dynamic_ncols=True, disable=not show)

    def settled(self, settings: Settings) -> Settings:
        """The settings with this model's own size and the sampler's own options; see `settings.settled`."""
        return settled(settings, self.abilities, names_of(one.path for one in self.adapters))

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
        `progress` is called after each network call with the number of pictures it moved on.
        """
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            yield from decode_to_pictures(self.vae, self.latents(batch, settings, progress=progress))

    def latents(
        self,
        jobs: Sequence[tuple[str, int]],
        settings: Settings,
        *,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """The latents (N, C, H, W) float32 of (prompt, seed) pairs, all at once; arguments as in `draw`."""
        assert settings.width is not None and settings.height is not None
        device = self.device
        factor = self.base.vae_factor
        shape = (self.transformer.config.in_channels, settings.height // factor, settings.width // factor)
        embeds, mask = (x.to(device) for x in pad_text([self.text.of(prompt) for prompt, _ in jobs]))
        self._choose_kernels(settings, len(jobs), shape, embeds.shape[1])
        generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in jobs]
        scheduler = scheduler_for(settings, self.abilities)
        autocast = None if self.dtype == torch.float32 else self.dtype

        def on_call(call: int, sample: Tensor) -> None:
            if progress is not None:
                progress(len(sample))

        x0 = start = None
        if settings.image is not None:
            image, size = settings.image, (settings.width, settings.height)
            pixels = picture_pixels(image, size) if isinstance(image, Image.Image) else load_picture(image, size)
            x0 = encode_pixels(self.vae, pixels[None]).to(device).expand(len(jobs), *shape)
        if x0 is not None and settings.inversion:
            assert isinstance(scheduler, RespacedDDIMScheduler)
            calls = inversion_calls(settings, scheduler)
            start = invert_latents(
                self.transformer, scheduler, x0, embeds, mask, calls=calls, autocast=autocast, on_call=on_call
            )
        return sample_latents(
            self.transformer,
            scheduler,
            embeds,
            mask,
            self.text.of(settings.negative_prompt).to(device),
            guidance=Guidance(settings.guidance, settings.guidance_interval),
            generators=generators,
            shape=shape,
            x0=x0,
            start=start,
            autocast=autocast,
            on_call=on_call,
        )

    def _choose_kernels(self, settings: Settings, rows: int, shape: tuple[int, int, int], text: int) -> None:
        """For auto, at the first pictures: what is the fastest for them is used for all."""
        if self.attention != "auto" or self._kernels_chosen:
            return
        calls = Calls(
            rows=rows * (1 + (settings.guidance > 1)),  # both branches of guidance go in one batch
            image=math.prod(shape[1:]) // self.transformer.config.patch_size**2,
            text=text,
            dtype=self.dtype,
            device=self.device,
            backward=False,
        )
        kernels, line = fastest_kernels(self.transformer, calls)
        use_kernels(self.transformer, kernels)
        self._kernels_chosen = True
        tqdm.write(f"attention: {line}")

    def calls(self, settings: Settings) -> int | None:
        """The network calls that one picture takes, guidance's second branch not counted; None if it decides itself."""
        scheduler = scheduler_for(settings, self.abilities)
        calls = calls_to_come(scheduler)
        return None if calls is None else len(calls) + inversion_calls(settings, scheduler)

    def recipe(self, prompt: str, seed: int, settings: Settings) -> dict[str, object]:
        """All that a picture follows from, as plain JSON values."""
        return {"prompt": prompt, "seed": seed} | self.circumstances(settings)

    def circumstances(self, settings: Settings) -> dict[str, object]:
        """The part of a recipe that all pictures of these settings share."""
        adapters = [one.recipe for one in self.adapters]
        values = {
            **recipe_of(settings),
            "model": self.base.name,
            "revision": self.base.revision,
            "fingerprint": self.fingerprint,
            "adapter": adapters if len(adapters) > 1 else next(iter(adapters), None),
            **({} if self.base.metadata is None else {"weights": self.base.metadata.weights}),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "versions": versions(),
        }
        if self.attention != "by_shape":
            values["attention"] = self.attention
        if self.compiled:
            values["compile"] = True
        if self.text.quantization != "none":
            values["text_encoder_quantization"] = self.text.quantization
        if settings.image is not None:
            image = settings.image
            values["image_sha256"] = sha256(image if isinstance(image, Path) else image.tobytes())
        plain: dict[str, object] = json.loads(json.dumps(values))
        return plain
