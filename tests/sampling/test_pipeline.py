"""The diffusers pipeline on the tiny model: every sampler, the learned variance, and every argument of the call.

Oracles: the stock pipeline; `TextToImage`; iDDPM written out here from its paper; the VAE called by hand; and
properties (a batch is its pictures, one by one).
"""

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy
import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
)
from PIL import Image
from torch import Tensor

from pixart_ft.errors import UserError
from pixart_ft.model.base import Base
from pixart_ft.sampling.pipeline import PixArtPipeline
from pixart_ft.sampling.text_to_image import Settings, TextToImage
from pixart_ft.schedulers import SCHEDULERS, EDMScheduler, IDDPMScheduler, RespacedDDIMScheduler
from tests.helpers.rounding import PICTURE, gap

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


def iddpm_by_hand(stock: Any, steps: int, guidance: float, interval: tuple[float, float], variance: str) -> Tensor:
    """Nichol & Dhariwal 2021, eqs. 9 to 15, and Bao et al. 2022, theorem 1, in float64."""
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
            f = torch.zeros(()) if variance == "beta_tilde" else (r + 1) / 2
            taken = between(now, before, f)
            if variance == "learned":
                own = alpha_bar[kept[step] - 1]
                error = (between(now, own, f) - between(now, own, 0 * f)) / weight_of_x0(now, own) ** 2
                error = error.clamp(min=0).minimum((1 - now) / now)
                taken = between(now, before, 0 * f) + weight_of_x0(now, before) ** 2 * error
            x = x + taken.sqrt() * torch.randn(1, 4, 8, 8, generator=generator)
    return x


def between(now: Tensor, before: Tensor, f: Tensor) -> Tensor:
    """The variance at the fraction f between beta tilde and beta of the step from alpha_bar `now` to `before`."""
    beta = 1 - now / before
    return (f * beta.log() + (1 - f) * (beta * (1 - before) / (1 - now)).log()).exp()


def weight_of_x0(now: Tensor, before: Tensor) -> Tensor:
    """Of x0 in the posterior's mean."""
    return before.sqrt() * (1 - now / before) / (1 - now)


@pytest.mark.parametrize("variance", ["learned", "learned_range", "beta_tilde"])
@pytest.mark.parametrize(("guidance", "interval"), [(1.0, None), (4.5, None), (4.5, (333, 666))])
def test_iddpm_by_hand(stock: PixArtSigmaPipeline, guidance: float, interval: Any, variance: str) -> None:
    """Guidance on the mean half and all its channels, inside the interval with its ends; variance from the prompt."""
    other = {"learned": "learned_range", "learned_range": "beta_tilde", "beta_tilde": "learned"}[variance]
    pipeline = ours(stock, IDDPMScheduler.from_config(stock.scheduler.config, variance=variance))
    found = latents(pipeline, guidance_scale=guidance, guidance_interval=interval)
    with torch.no_grad():
        wanted, unlike = (iddpm_by_hand(stock, 4, guidance, interval or (0, 999), how) for how in (variance, other))
    assert difference(found, wanted) < PICTURE and difference(found, unlike) > 1e-3


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
        with pytest.raises(ValueError, match=f"strength must lie above 0 .* and at most at 1 .*, got {strength:g}"):
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
        return {0: {}, 1: {"latents": torch.zeros(1, 4, 8, 8)}}.get(call)

    seen, found = watched(pipeline, num_inference_steps=3, callback_on_step_end=note)
    times = [timestep for _, timestep in seen]
    assert times == pipeline.scheduler.timesteps.tolist() and told == list(enumerate(times))
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
    note: dict[str, Any] = {"callback_on_step_end": lambda _, call, *__: told.append(call)}
    pipeline(PROMPTS[0], num_inference_steps=4, image=picture(), strength=0.5, **note)
    assert "3/3" in capsys.readouterr().err
    latents(pipeline)
    assert capsys.readouterr().err == ""
    assert told == [0, 1, 2]


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
        ({"output_type": "jpg"}, "unknown output_type 'jpg'; choose pil, np, pt or latent"),
        ({"clean_caption": True}, "clean_caption rewrites captions .* leave it False"),
        ({"timesteps": [999, 0], "sigmas": [9.0]}, "timesteps and sigmas both say the steps; give one"),
        ({"sigmas": [9.0, 1.0]}, "RespacedDDIMScheduler takes no sigmas; give num_inference_steps"),
        (
            {"eta": 0.5},
            r"takes no eta at a call; RespacedDDIMScheduler\.from_config\(.*, eta=0\.5",
        ),
        ({"use_resolution_binning": True}, "sizes for sample_size 32, 64, 128, 256, not 8; leave it out"),
        (
            {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]},
            "latents alone; prompt_embeds",
        ),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number, got nan"),
        ({"guidance_scale": 0.0, "guidance_interval": (0, 9)}, "unused at guidance_scale 0; leave it out"),
        (
            {"guidance_interval": (0.2, 0.8)},
            r"guidance_interval \[0\.2, 0\.8\] holds none of this run's 2",
        ),
        ({"guidance_interval": (2000, 3000)}, "reaches beyond the timesteps; it is in the network's timesteps, from 0"),
        ({"guidance_interval": (9, 1)}, "ends before it begins; it is in the network's timesteps"),
        ({"prompt_embeds": torch.zeros(1, 3, 32), "prompt_attention_mask": torch.ones(1, 3)}, "replace prompt"),
    ],
)
def test_what_would_be_ignored_is_refused(stock: PixArtSigmaPipeline, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(stock)("a red circle", num_inference_steps=2, **arguments)


def test_output_and_sizes(stock: PixArtSigmaPipeline) -> None:
    pipeline = ours(stock)
    size: dict[str, Any] = {"width": 96, "height": 32}
    (pictures,) = pipeline(PROMPTS, num_inference_steps=4, generator=seeded(7, 8), return_dict=False, **size)
    assert [picture.size for picture in pictures] == [(96, 32)] * 2
    wanted = decoded(stock.vae, latents(pipeline, PROMPTS, **size))
    assert (numpy.stack(pictures) != wanted).mean() < 1e-3  # roundings of a batch
    for name, side, near in (("width", 72, 64), ("height", -16, 16), ("height", 100, 96)):
        wrong: dict[str, Any] = {name: side}
        with pytest.raises(ValueError, match=rf"{name} \({side}\) must be a multiple of 16 .*; try {near}"):
            latents(pipeline, **wrong)


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


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_saved_pipeline_opens_as_a_stock_one_and_in_ours_as_it_was(stock: Any, tmp_path: Path, name: str) -> None:
    """With a scheduler of diffusers on the same betas; ours takes its own again, and its options."""
    more = {"s_churn": 1.0, "spacing": "exponential"} if name == "edm" else {}
    pipeline = ours(stock, SCHEDULERS[name].from_config(stock.scheduler.config, **more))
    pipeline.save_pretrained(tmp_path)
    kinds = [AutoPipelineForText2Image, PixArtSigmaPipeline] if name == "ddim" else []
    for kind in (*kinds, DiffusionPipeline):
        opened = kind.from_pretrained(str(tmp_path))
        assert type(opened) is PixArtSigmaPipeline and type(opened.scheduler).__module__.startswith("diffusers.")
    torch.testing.assert_close(opened.scheduler.betas, stock.scheduler.betas)
    assert not opened.scheduler.config.get("clip_sample")
    plain: dict[str, Any] = {"clean_caption": False, "use_resolution_binning": False}
    drawn = latents(opened, **plain)
    if name in ("ddim", "ddpm"):  # what deviates there is the spacing alone
        assert difference(latents(ours(stock, opened.scheduler)), drawn) < 1e-5
    assert drawn.isfinite().all()
    loaded = PixArtPipeline.from_pretrained(str(tmp_path))
    assert (
        type(loaded.scheduler) is SCHEDULERS[name] and dict(loaded.config)["scheduler"][1] == SCHEDULERS[name].__name__
    )
    assert [loaded.scheduler.config[key] for key in more] == list(more.values())
    assert torch.equal(latents(loaded), latents(pipeline))
    assert Base.read(tmp_path).schedule.num_steps == 1000  # a base like any other


def test_what_was_saved_over_a_pipeline_counts(stock: Any, tmp_path: Path) -> None:
    pipeline = ours(stock)
    pipeline.save_pretrained(tmp_path)
    other = PixArtSigmaPipeline.from_pretrained(str(tmp_path))
    other.scheduler = diffusers.UniPCMultistepScheduler.from_config(other.scheduler.config)
    other.save_pretrained(tmp_path)
    assert type(PixArtPipeline.from_pretrained(str(tmp_path)).scheduler) is diffusers.UniPCMultistepScheduler
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    assert type(PixArtPipeline.from_pretrained(str(tmp_path)).scheduler) is DPMSolverMultistepScheduler
    given = PixArtPipeline.from_pretrained(str(tmp_path), scheduler=other.scheduler)
    assert given.scheduler is other.scheduler


def test_a_pipeline_that_no_stock_scheduler_can_draw_says_so(stock: Any, tmp_path: Path) -> None:
    scheduler = RespacedDDIMScheduler.from_config(stock.scheduler.config, network_timesteps=[0.5] * 1000)
    with pytest.warns(UserWarning, match="opens only where pixart_ft is installed"):
        ours(stock, scheduler).save_pretrained(tmp_path)
    loaded = PixArtPipeline.from_pretrained(str(tmp_path))
    assert loaded.scheduler.config.network_timesteps == [0.5] * 1000


def test_arguments_stand_where_the_stock_pipeline_has_them() -> None:
    theirs, own = (
        list(inspect.signature(kind.__call__).parameters.values()) for kind in (PixArtSigmaPipeline, PixArtPipeline)
    )
    last = [p.name for p in theirs].index("return_dict")
    assert [(p.name, p.default) for p in own[: last + 1]] == [(p.name, p.default) for p in theirs[: last + 1]]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in own[last + 1 :])


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0])
def test_guidance_up_to_one_is_off(stock: PixArtSigmaPipeline, scale: float) -> None:
    """As in the stock pipeline: the picture is the prompt's, not the unconditional one."""
    found = latents(ours(stock), PROMPTS, guidance_scale=scale)
    wanted = stock_latents(stock, RespacedDDIMScheduler.from_config(stock.scheduler.config), guidance_scale=scale)
    assert difference(found, wanted) < 1e-5
    assert torch.equal(found, latents(ours(stock), PROMPTS, guidance_scale=1.0))


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        (diffusers.DDPMScheduler, {"timesteps": [900, 500, 100]}),
        (diffusers.EulerDiscreteScheduler, {"sigmas": [100.0, 5.0, 0.5]}),
        (diffusers.EulerDiscreteScheduler, {"timesteps": [900, 500, 100]}),
        (RespacedDDIMScheduler, {"timesteps": [900, 500, 100]}),
        (EDMScheduler, {"sigmas": [100.0, 5.0, 0.5]}),
    ],
)
def test_steps_of_the_users_own(stock: PixArtSigmaPipeline, kind: Any, steps: dict[str, list[float]]) -> None:
    more = {"clip_sample": False} if kind is diffusers.DDPMScheduler else {}
    schedulers = [kind.from_config(stock.scheduler.config, **more) for _ in range(2)]
    found = latents(ours(stock, schedulers[0]), PROMPTS, **steps)
    assert difference(found, stock_latents(stock, schedulers[1], **steps)) < 1e-5
    assert difference(found, latents(ours(stock, schedulers[0]), PROMPTS)) > 1e-3


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", [diffusers.DDIMScheduler, diffusers.TCDScheduler])
def test_eta_reaches_the_schedulers_that_take_it(stock: PixArtSigmaPipeline, kind: Any, eta: float) -> None:
    """TCD's own default is 0.3 and the stock pipeline's 0."""
    schedulers = [kind.from_config(stock.scheduler.config, clip_sample=False) for _ in range(2)]
    arguments = {} if eta == 0 else {"eta": eta}
    wanted = stock_latents(stock, schedulers[0], **arguments)
    assert difference(latents(ours(stock, schedulers[1]), PROMPTS, **arguments), wanted) < 1e-5


def test_arrays_and_tensors_of_pictures(stock: PixArtSigmaPipeline) -> None:
    pipeline = ours(stock)
    theirs = PixArtSigmaPipeline(**pipeline.components)
    plain: dict[str, Any] = {"clean_caption": False, "use_resolution_binning": False}
    for kind in ("np", "pt"):
        found, wanted = (
            latents(pipeline, PROMPTS, output_type=kind),
            latents(theirs, PROMPTS, output_type=kind, **plain),
        )
        assert type(found) is type(wanted) and found.shape == wanted.shape and found.dtype == wanted.dtype
        assert abs(found - wanted).max() < 1e-3 and found.std() > 0.01
    drawn = numpy.stack(latents(pipeline, PROMPTS, output_type="pil"))
    assert numpy.array_equal(drawn, (latents(pipeline, PROMPTS, output_type="np") * 255).round().astype("uint8"))


def test_resolution_binning_draws_a_size_of_the_training_and_cuts_it(stock: PixArtSigmaPipeline) -> None:
    """As the stock pipeline does; left out, the size asked for is drawn."""
    config = stock.transformer.config
    transformer = type(stock.transformer).from_config({**config, "sample_size": 32, "interpolation_scale": 0.5}).eval()
    with torch.no_grad():
        pipeline = ours(stock, transformer=transformer)
        theirs = PixArtSigmaPipeline(**pipeline.components)
        size: dict[str, Any] = {"height": 200, "width": 300, "num_inference_steps": 1, "use_resolution_binning": True}
        found = latents(pipeline, output_type="np", **size)
        wanted = latents(theirs, output_type="np", clean_caption=False, **size)
    assert found.shape == (1, 200, 300, 3) and abs(found - wanted).max() < 1e-3
    with pytest.raises(ValueError, match=r"height \(200\) must be a multiple of 16 .*; try 192"):
        latents(pipeline, **(size | {"use_resolution_binning": False}))


@pytest.mark.parametrize("kind", [diffusers.EDMEulerScheduler, diffusers.FlowMatchEulerDiscreteScheduler])
def test_a_scheduler_of_another_family_is_refused(stock: PixArtSigmaPipeline, kind: Any) -> None:
    with pytest.raises(ValueError, match=rf"a scheduler of class {kind.__name__} says no .*beta_schedule"):
        latents(ours(stock, kind()))


def test_all_that_is_wrong_is_named_at_once_and_before_the_text_is_read(stock: PixArtSigmaPipeline) -> None:
    vae = copy.deepcopy(stock.vae)
    vae.register_to_config(latents_mean=[0.1] * 4)
    wrong: dict[str, Any] = {
        "width": 72,
        "clean_caption": True,
        "eta": 1.0,
        "guidance_scale": 1.0,
        "guidance_interval": (0, 9),
    }
    wrong |= {"num_inference_steps": 0, "num_images_per_prompt": 0, "prompt": None}
    with pytest.raises(ValueError, match="width") as caught:
        ours(stock, vae=vae)(**wrong)
    first = [line.split()[0] for line in str(caught.value).splitlines()]
    counts = ["num_inference_steps", "num_images_per_prompt"]
    assert first == ["width", "clean_caption", "RespacedDDIMScheduler", "vae/config.json", *counts, "guidance_interval"]


def test_a_size_far_from_the_trainings_is_warned_of(stock: PixArtSigmaPipeline) -> None:
    with pytest.warns(UserWarning, match="128 x 128 pixels are far from the 64 x 64 that this model was trained on"):
        latents(ours(stock), width=128, height=128, num_inference_steps=1)


def test_callback_without_tensors(stock: PixArtSigmaPipeline) -> None:
    told: list[dict[str, Tensor]] = []
    note: dict[str, Any] = {
        "callback_on_step_end": lambda *given: told.append(given[3]),
        "callback_on_step_end_tensor_inputs": [],
    }
    latents(ours(stock), **note)
    assert told == [{}] * 4
