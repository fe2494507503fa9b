"""The diffusers pipeline on the tiny model: every sampler, the learned variance, and every argument of the call.

Oracles: the stock pipeline; `TextToImage`; iDDPM written out here from its paper; the VAE called by hand; and
properties (a batch is its pictures, one by one).
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline
from PIL import Image
from torch import Tensor

from pixart_ft.errors import UserError
from pixart_ft.pipeline import PixArtPipeline
from pixart_ft.schedulers import SCHEDULERS, EDMScheduler, IDDPMScheduler, RespacedDDIMScheduler
from pixart_ft.text_to_image import Settings, TextToImage
from tests.rounding import PICTURE, gap

PROMPTS = ["a red circle on grey", "A photo of the black triangle on pink "]
NEGATIVES = ["a blue square", "photo"]
SCALING_FACTOR = 0.13025
STOCK: dict[str, tuple[Any, dict[str, Any]]] = {
    "own": (DPMSolverMultistepScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
}


@pytest.fixture(scope="module")
def stock(tiny: Path) -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline.from_pretrained(str(tiny))


@pytest.fixture(scope="module")
def bfloat16(tiny: Path) -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline.from_pretrained(str(tiny), torch_dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def model(tiny: Path) -> TextToImage:
    return TextToImage.load(tiny)


def ours(stock: PixArtSigmaPipeline, scheduler: Any = None, **components: Any) -> PixArtPipeline:
    """Our pipeline of the stock one's parts; DDIM unless told otherwise."""
    scheduler = scheduler or RespacedDDIMScheduler.from_config(stock.scheduler.config)
    return PixArtPipeline(**(stock.components | {"scheduler": scheduler} | components))


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def latents(pipeline: Any, prompts: str | Sequence[str] | None = PROMPTS[0], **arguments: Any) -> Any:
    """What the pipeline gives in 4 steps with seed 7, and 8 for a second picture; without a progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    generator = seeded(7) if isinstance(prompts, str) else seeded(7, 8)
    defaults = {"num_inference_steps": 4, "generator": generator, "output_type": "latent"}
    return pipeline(prompts, **(defaults | arguments)).images


def stock_latents(stock: PixArtSigmaPipeline, scheduler: Any, **arguments: Any) -> Tensor:
    pipeline = PixArtSigmaPipeline(**(stock.components | {"scheduler": scheduler}))
    found: Tensor = latents(pipeline, PROMPTS, clean_caption=False, use_resolution_binning=False, **arguments)
    return found


def difference(found: Tensor, wanted: Tensor) -> float:
    """Relative to the largest value: an untrained network sends latents to some hundreds."""
    assert wanted.std() > 0.1
    return gap(found, wanted)


def watched(pipeline: PixArtPipeline, **arguments: Any) -> tuple[list[tuple[Tensor, float]], Tensor]:
    """The latents and the timestep that each network call sees, and what `latents` gives, without guidance."""
    seen: list[tuple[Tensor, float]] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0], float(kwargs["timestep"][0]))), with_kwargs=True
    )
    found = latents(pipeline, guidance_scale=1.0, **arguments)
    hook.remove()
    return seen, found


def test_a_stock_folder_with_its_own_scheduler(tiny: Path, stock: PixArtSigmaPipeline) -> None:
    pipeline = PixArtPipeline.from_pretrained(str(tiny))
    assert type(pipeline.scheduler) is DPMSolverMultistepScheduler
    assert difference(latents(pipeline, PROMPTS), stock_latents(stock, stock.scheduler)) < PICTURE


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("name", STOCK)
def test_stock_pipeline_with_a_stock_scheduler(stock: PixArtSigmaPipeline, name: str, guidance: float) -> None:
    kind, settings = STOCK[name]
    schedulers = [kind.from_config(stock.scheduler.config, **settings) for _ in range(2)]
    arguments = {"guidance_scale": guidance, "negative_prompt": "a blue square", "width": 96, "height": 32}
    wanted = stock_latents(stock, schedulers[0], **arguments)
    assert difference(latents(ours(stock, schedulers[1]), PROMPTS, **arguments), wanted) < PICTURE


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "iddpm"])
def test_stock_pipeline_with_our_scheduler(stock: PixArtSigmaPipeline, name: str) -> None:
    scheduler = SCHEDULERS[name].from_config(stock.scheduler.config)
    wanted = stock_latents(stock, scheduler, num_inference_steps=3)
    assert difference(latents(ours(stock, scheduler), PROMPTS, num_inference_steps=3), wanted) < PICTURE


@pytest.mark.parametrize("name", SCHEDULERS)
def test_text_to_image_gives_the_same_bytes(stock: Any, model: TextToImage, bfloat16: Any, name: str) -> None:
    """And a pipeline in bfloat16 nearly the same (0.5 to 2 % of the largest latent), its latents in float32."""
    scheduler = SCHEDULERS[name].from_config(stock.scheduler.config)
    wanted = model.latents([(PROMPTS[0], 7)], model.settled(Settings(name, steps=3)))
    found = latents(ours(stock, scheduler), num_inference_steps=3)
    assert torch.equal(found, wanted) and found.dtype == torch.float32
    half = latents(ours(bfloat16, scheduler), num_inference_steps=3)
    assert half.dtype == torch.float32 and 0 < difference(half, wanted) < 0.05


def iddpm_by_hand(stock: Any, steps: int, guidance: float, interval: tuple[float, float], learned: bool) -> Tensor:
    """Nichol & Dhariwal 2021, eqs. 9 to 15, with the learned variance or beta tilde, in float64."""
    text, mask, null, null_mask = stock.encode_prompt(PROMPTS[0], negative_prompt="", clean_caption=False)
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    kept = [round(999 * step / (steps - 1)) for step in range(steps)]
    (generator,) = seeded(7)
    x = torch.randn(1, 4, 8, 8, generator=generator).double()

    def network(embeds: Tensor, mask: Tensor) -> Any:
        time = torch.tensor([kept[step]])
        return stock.transformer(x.float(), embeds, time, encoder_attention_mask=mask)[0].double().chunk(2, dim=1)

    for step in reversed(range(steps)):
        now, before = alpha_bar[kept[step]], alpha_bar[kept[step - 1]] if step else torch.tensor(1.0)
        eps, r = network(text, mask)
        if interval[0] <= kept[step] <= interval[1]:
            unconditional, _ = network(null, null_mask)
            eps = unconditional + guidance * (eps - unconditional)
        beta = 1 - now / before
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x) / (1 - now)
        if step:
            f = (r + 1) / 2 if learned else torch.zeros(())
            log_variance = f * beta.log() + (1 - f) * (beta * (1 - before) / (1 - now)).log()
            x = x + (0.5 * log_variance).exp() * torch.randn(1, 4, 8, 8, generator=generator)
    return x


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(("guidance", "interval"), [(1.0, None), (4.5, None), (4.5, (333, 666)), (0.0, (600, 999))])
def test_iddpm_by_hand(stock: PixArtSigmaPipeline, guidance: float, interval: Any, learned: bool) -> None:
    """Guidance on the mean half and all its channels, inside the interval with its ends; variance from the prompt."""
    variance = "learned" if learned else "beta_tilde"
    pipeline = ours(stock, IDDPMScheduler.from_config(stock.scheduler.config, variance=variance))
    found = latents(pipeline, guidance_scale=guidance, guidance_interval=interval)
    with torch.no_grad():
        wanted, other = (iddpm_by_hand(stock, 4, guidance, interval or (0, 999), how) for how in (learned, not learned))
    assert difference(found, wanted) < PICTURE and difference(found, other) > 1e-3


@pytest.mark.parametrize("name", SCHEDULERS)
def test_eight_pictures_at_once_are_eight_runs_of_one(stock: PixArtSigmaPipeline, name: str) -> None:
    settings = {"s_churn": 1.0} if name in ("euler", "edm") else {"eta": 1.0} if name == "ddim" else {}
    pipeline = ours(stock, SCHEDULERS[name].from_config(stock.scheduler.config, **settings))
    together = latents(pipeline, num_inference_steps=2, num_images_per_prompt=8, generator=seeded(*range(8)))
    assert len(together.unique(dim=0)) == 8
    for row in (0, 3, 7):
        alone = latents(pipeline, num_inference_steps=2, generator=seeded(row))
        assert difference(together[row : row + 1], alone) < PICTURE


def test_pictures_come_by_prompt_with_their_negative_prompts(stock: PixArtSigmaPipeline) -> None:
    pipeline = ours(stock)
    same = latents(pipeline, PROMPTS, negative_prompt="photo")
    assert difference(latents(pipeline, PROMPTS, negative_prompt=["photo"] * 2), same) < PICTURE
    assert difference(latents(pipeline, PROMPTS), same) > 1e-3
    several = {"num_images_per_prompt": 2, "generator": seeded(1, 2, 3, 4)}
    together = latents(pipeline, PROMPTS, negative_prompt=NEGATIVES, **several)
    for row in range(4):
        prompt, negative = PROMPTS[row // 2], NEGATIVES[row // 2]
        alone = latents(pipeline, prompt, negative_prompt=negative, generator=seeded(row + 1))
        assert difference(together[row : row + 1], alone) < PICTURE
    with pytest.raises(ValueError, match="3 negative prompts for 2 prompts; give one, or one for each"):
        latents(pipeline, PROMPTS, negative_prompt=["a", "b", "c"])


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_texts_encoded_before(stock: PixArtSigmaPipeline, guidance: float) -> None:
    embeds, mask, null, null_mask = stock.encode_prompt(PROMPTS, negative_prompt=NEGATIVES, clean_caption=False)
    assert embeds.shape[1] == 300 and len({int(row.sum()) for row in mask}) == 2
    wanted = latents(ours(stock), PROMPTS, negative_prompt=NEGATIVES, guidance_scale=guidance)
    texts = {"prompt_embeds": embeds.masked_fill(mask[..., None] == 0, 99.0), "prompt_attention_mask": mask}
    nulls = {"negative_prompt_embeds": null, "negative_prompt_attention_mask": null_mask} if guidance != 1 else {}
    pipeline = ours(stock, text_encoder=None, tokenizer=None)
    assert difference(latents(pipeline, None, guidance_scale=guidance, **texts, **nulls), wanted) < PICTURE
    with pytest.raises(ValueError, match="this pipeline has no text encoder: give prompt_embeds"):
        latents(pipeline, PROMPTS)
    with pytest.raises(ValueError, match="no text encoder: give negative_prompt_embeds"):
        latents(pipeline, None, **texts)
    with pytest.raises(ValueError, match="give prompt or prompt_embeds"):
        latents(pipeline, None)
    with pytest.raises(ValueError, match="prompt_embeds come with their mask: give prompt_attention_mask"):
        latents(pipeline, None, prompt_embeds=embeds)


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, RespacedDDIMScheduler, EDMScheduler])
def test_latents_are_the_first_noise(stock: PixArtSigmaPipeline, kind: Any) -> None:
    pipeline = ours(stock, kind.from_config(stock.scheduler.config))
    noise = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in seeded(7, 8)])
    assert torch.equal(latents(pipeline, PROMPTS, latents=noise, generator=None), latents(pipeline, PROMPTS))


def test_generators(stock: PixArtSigmaPipeline) -> None:
    """None: new noise at each call, from the global state. One: each picture's noise in turn, as in the stock one."""
    pipeline, pair = ours(stock), [PROMPTS[0]] * 2
    with torch.random.fork_rng(devices=[]):
        drawn = torch.cat([latents(pipeline, pair, generator=None) for _ in range(2)])
        again = [latents(pipeline, generator=torch.manual_seed(3) and None) for _ in range(2)]
    assert len(drawn.unique(dim=0)) == 4 and torch.equal(*again)
    noise = torch.randn(2, 4, 8, 8, generator=seeded(7)[0])
    assert torch.equal(latents(pipeline, pair, generator=seeded(7)[0]), latents(pipeline, pair, latents=noise))
    with pytest.raises(ValueError, match="3 generators for 2 pictures; give one for each, or one for all"):
        latents(pipeline, pair, generator=seeded(1, 2, 3))


def picture(width: int = 64, height: int = 64) -> Image.Image:
    values = torch.randint(256, (height // 8, width // 8, 3), generator=seeded(0)[0]).to(torch.uint8)
    return Image.fromarray(values.numpy()).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("strength", [0.01, 0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "churn"), [("ddim", {}), ("iddpm", {}), ("edm", {}), ("euler", {"s_churn": 1.0}), ("score_sde", {})]
)
def test_image_starts_noised_at_its_step(stock: Any, name: str, churn: dict[str, float], strength: float) -> None:
    """The network first sees sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise, whichever space the sampler works in."""
    pipeline = ours(stock, SCHEDULERS[name].from_config(stock.scheduler.config, **churn))
    seen, _ = watched(pipeline, image=picture(), strength=strength)
    begin = pipeline.scheduler.step_starts[-max(1, round(4 * strength))]
    assert [timestep for _, timestep in seen] == pipeline.scheduler.timesteps[begin:].tolist()
    alpha_bar = (1 - numpy.linspace(1e-4, 0.02, 1000)).cumprod()
    sigma = numpy.exp(numpy.interp(seen[0][1], numpy.arange(1000), 0.5 * numpy.log(1 / alpha_bar - 1)))
    with torch.no_grad():
        pixels = torch.from_numpy(numpy.array(picture())).permute(2, 0, 1)[None] / 127.5 - 1
        x0 = stock.vae.encode(pixels).latent_dist.mean * SCALING_FACTOR
    wanted = (x0 + sigma * torch.randn(4, 8, 8, generator=seeded(7)[0])) / numpy.hypot(1, sigma)
    torch.testing.assert_close(seen[0][0], wanted, rtol=0, atol=5e-4)  # churn: the highest level is beyond timestep 999


def test_image_is_cropped_to_the_size_and_shared_by_the_pictures(stock: PixArtSigmaPipeline) -> None:
    pipeline, wide = ours(stock), picture(128, 64)
    cropped = latents(pipeline, PROMPTS, image=wide.crop((32, 0, 96, 64)))
    assert torch.equal(latents(pipeline, PROMPTS, image=wide), cropped)
    assert difference(latents(pipeline, PROMPTS[1], image=wide, generator=seeded(8)), cropped[1:]) < PICTURE
    assert latents(pipeline, image=picture(), width=96, height=32).shape == (1, 4, 4, 12)


def test_image_is_refused_where_it_has_no_meaning(stock: PixArtSigmaPipeline) -> None:
    with pytest.raises(ValueError, match=r"scheduler of pixart_ft\.schedulers, not DPMSolverMultistepScheduler"):
        latents(ours(stock, stock.scheduler), image=picture())
    for strength in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match=f"strength must lie above 0 and at most at 1, got {strength:g}"):
            latents(ours(stock), image=picture(), strength=strength)
    adaptive = SCHEDULERS["pf_ode"].from_config(stock.scheduler.config, tolerance=0.1)
    with pytest.raises(ValueError, match="tolerance"):  # it chooses its own steps, all the way from pure noise
        latents(ours(stock, adaptive), image=picture())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_callback_sees_every_call_and_may_replace_the_latents(stock: PixArtSigmaPipeline, name: str) -> None:
    pipeline = ours(stock, SCHEDULERS[name].from_config(stock.scheduler.config))
    told: list[tuple[int, float]] = []
    samples: list[Tensor] = []

    def note(given: PixArtPipeline, call: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor] | None:
        assert given is pipeline
        told.append((call, float(timestep)))
        samples.append(values["latents"])
        return {1: {}, 2: {"latents": torch.zeros(1, 4, 8, 8)}}.get(call)

    seen, found = watched(pipeline, num_inference_steps=3, callback_on_step_end=note)
    times = [timestep for _, timestep in seen]
    assert times == pipeline.scheduler.timesteps.tolist() and told == list(enumerate(times, start=1))
    assert [bool((x == 0).all()) for x, _ in seen] == [call == 2 for call in range(len(seen))]
    assert torch.equal(samples[-1], found)


def test_callback_of_an_adaptive_solver_is_refused(stock: PixArtSigmaPipeline) -> None:
    pipeline = ours(stock, SCHEDULERS["pf_ode"].from_config(stock.scheduler.config, tolerance=0.1))
    with pytest.raises(ValueError, match="no steps to call callback_on_step_end after"):
        latents(pipeline, callback_on_step_end=lambda *_: None)


def test_progress_bar_and_callback_count_calls(stock: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline, told = ours(stock, EDMScheduler.from_config(stock.scheduler.config)), []
    pipeline(PROMPTS[0], num_inference_steps=4)
    assert "7/7" in capsys.readouterr().err
    note = {"callback_on_step_end": lambda _, call, *__: told.append(call)}
    pipeline(PROMPTS[0], num_inference_steps=4, image=picture(), strength=0.5, **note)
    assert "3/3" in capsys.readouterr().err
    latents(pipeline)
    assert capsys.readouterr().err == ""
    assert told == [1, 2, 3]


def decoded(vae: Any, found: Tensor) -> numpy.ndarray:
    with torch.no_grad():
        image = vae.decode(found / SCALING_FACTOR).sample
    return ((image / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).byte().numpy()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": Image.new("RGB", (64, 64)), "latents": torch.zeros(1, 4, 8, 8)}, "both say what to begin with"),
        ({"latents": torch.zeros(1, 4, 12, 12)}, r"latents must be \(1, 4, 8, 8\) for these pictures"),
        ({"guidance_scale": 1.0, "guidance_interval": (0, 9)}, "unused at guidance_scale 1"),
        ({"output_type": "np"}, "unknown output_type 'np'; choose pil or latent"),
        ({"prompt_embeds": torch.zeros(1, 3, 32), "prompt_attention_mask": torch.ones(1, 3)}, "replace prompt"),
    ],
)
def test_what_would_be_ignored_is_refused(stock: PixArtSigmaPipeline, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(stock)("a red circle", num_inference_steps=2, **arguments)


def test_output_and_sizes(stock: PixArtSigmaPipeline) -> None:
    pipeline, size = ours(stock), {"width": 96, "height": 32}
    (pictures,) = pipeline(PROMPTS, num_inference_steps=4, generator=seeded(7, 8), return_dict=False, **size)
    assert [picture.size for picture in pictures] == [(96, 32)] * 2
    wanted = decoded(stock.vae, latents(pipeline, PROMPTS, **size))
    assert (numpy.stack(pictures) != wanted).mean() < 1e-3  # roundings of a batch
    for name, side, near in (("width", 72, 64), ("height", -16, 16), ("height", 100, 96)):
        with pytest.raises(ValueError, match=rf"{name} \({side}\) must be a multiple of 16; try {near}"):
            latents(pipeline, **{name: side})


def test_float16_vae_is_run_in_float32_where_it_would_overflow(stock: PixArtSigmaPipeline) -> None:
    vae = copy.deepcopy(stock.vae)
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(1e4)
        vae.encoder.conv_in.weight.mul_(1e5)
    vae.half()
    wanted = decoded(copy.deepcopy(vae).float(), latents(ours(stock)))
    assert numpy.array_equal(numpy.stack(latents(ours(stock, vae=copy.deepcopy(vae)), output_type="pil")), wanted)
    assert latents(ours(stock, vae=copy.deepcopy(vae)), image=picture()).isfinite().all()
    vae.register_to_config(force_upcast=False)
    for start in (None, picture()):
        with pytest.raises(UserError, match=r"the VAE gave NaN or infinity in torch\.float16"):
            latents(ours(stock, vae=vae), output_type="pil", image=start)


def test_saved_and_loaded_with_one_of_our_schedulers(stock: PixArtSigmaPipeline, tmp_path: Path) -> None:
    pipeline = ours(stock, EDMScheduler.from_config(stock.scheduler.config, s_churn=1.0, spacing="exponential"))
    pipeline.save_pretrained(tmp_path)
    loaded = PixArtPipeline.from_pretrained(str(tmp_path))
    assert type(loaded.scheduler) is EDMScheduler and loaded.scheduler.config.s_churn == 1.0
    assert torch.equal(latents(loaded), latents(pipeline))
