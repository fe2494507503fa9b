"""Base plus adapter to pictures on the tiny pipeline.

Oracles: the stock diffusers pipeline with the adapter merged into it, and the base itself.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PixArtSigmaPipeline
from torch import Tensor
from tqdm import tqdm

from pixart_ft.adapters.acting import load_adapter, merge
from pixart_ft.adapters.files import Adapter
from pixart_ft.config.samplers import SAMPLERS
from pixart_ft.errors import UserError
from pixart_ft.model import loading
from pixart_ft.model.base import Base
from pixart_ft.model.loading import load_transformer
from pixart_ft.sampling.settings import Settings
from pixart_ft.sampling.text_to_image import TextToImage
from tests.helpers.adapters import make_adapter
from tests.helpers.rounding import PICTURE, gap
from tests.helpers.tiny import build_tiny_pipeline

PROMPTS = ["a red circle on grey", "A photo of the black triangle on pink "]
SCALING_FACTOR = 0.13025


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="module")
def base(tiny: Path) -> TextToImage:
    return TextToImage.load(tiny)


@pytest.fixture(scope="module")
def adapted(tiny: Path, adapter: Path) -> TextToImage:
    return TextToImage.load(tiny, lora=adapter)


@contextmanager
def decoded(model: TextToImage) -> Iterator[list[Tensor]]:
    """The latents that reach the VAE's decoder, picture by picture, in the scale of sampling."""
    latents: list[Tensor] = []
    hook = model.vae.post_quant_conv.register_forward_pre_hook(
        lambda _, args: latents.append(args[0][0] * SCALING_FACTOR)
    )
    try:
        yield latents
    finally:
        hook.remove()


def sampled(model: TextToImage, *args: object, **settings: object) -> Tensor:
    with decoded(model) as latents:
        model.generate(*args, **settings)  # type: ignore[arg-type]
    return torch.stack(latents)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("negative", ["", "a black square"])
def test_stock_pipeline_with_the_adapter_merged_draws_the_same(
    tiny: Path, adapter: Path, adapted: TextToImage, guidance: float, negative: str
) -> None:
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    load_adapter(transformer, Adapter.read(adapter))
    merge(transformer)
    pipeline = PixArtSigmaPipeline.from_pretrained(str(tiny), transformer=transformer)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        PROMPTS,
        negative_prompt=negative,
        num_inference_steps=25,
        guidance_scale=guidance,
        generator=[torch.Generator("cpu").manual_seed(7) for _ in PROMPTS],
        height=64,
        width=64,
        clean_caption=False,
        use_resolution_binning=False,
        max_sequence_length=300,
        output_type="latent",
    ).images
    unused = {} if guidance == 1 else {"negative_prompt": negative}
    ours = sampled(adapted, PROMPTS, seeds=[7], steps=25, guidance=guidance, options={"spacing": "trailing"}, **unused)
    assert gap(ours, stock) < PICTURE
    assert stock.std() > 0.1


def test_scale_zero_is_the_base_and_scale_one_is_not(tiny: Path, adapter: Path, base: TextToImage) -> None:
    plain = sampled(base, PROMPTS, steps=4)
    assert torch.equal(sampled(TextToImage.load(tiny, lora=adapter, lora_scale=0.0), PROMPTS, steps=4), plain)
    full = sampled(TextToImage.load(tiny, lora=adapter), PROMPTS, steps=4) - plain
    half = sampled(TextToImage.load(tiny, lora=adapter, lora_scale=0.5), PROMPTS, steps=4) - plain
    assert 0 < half.norm() < full.norm()


def test_eight_seeds_at_once_are_eight_runs_of_one(adapted: TextToImage) -> None:
    together = sampled(adapted, PROMPTS[0], seeds=range(8), steps=4, batch_size=8)
    alone = torch.cat([sampled(adapted, PROMPTS[0], seeds=[seed], steps=4) for seed in range(8)])
    assert gap(together, alone) < PICTURE
    assert len({tuple(latents.flatten().tolist()) for latents in alone}) == 8


def test_pictures_come_by_prompt_then_seed(base: TextToImage) -> None:
    pictures = base.generate(PROMPTS, seeds=[0, 1], steps=2, batch_size=3)
    assert [picture.size for picture in pictures] == [(64, 64)] * 4
    alone = sampled(base, PROMPTS[1], seeds=[0], steps=2)[0]
    together = sampled(base, PROMPTS, seeds=[0, 1], steps=2, batch_size=3)
    assert [gap(latents, alone) < PICTURE for latents in together] == [False, False, True, False]


def test_prompts_are_told_apart_together_and_encoded_alone(
    base: TextToImage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="'犬' = '猫'"):
        base.generate(["犬", "猫"], steps=1)
    texts = ["a red circle", "a photo of the picture", "a"]
    alone = [base.text.of(text) for text in texts]
    base.text.known.clear()
    monkeypatch.setattr(
        "pixart_ft.model.text_encoder.tqdm",
        lambda *given, **words: tqdm(*given, **words | {"delay": 0, "disable": False}),
    )
    base.text.encode(texts)
    assert all(torch.equal(base.text.of(text), one) for text, one in zip(texts, alone, strict=True))  # to the bit
    assert "prompts encoded: 100%" in capsys.readouterr().err


def test_other_sizes(base: TextToImage) -> None:
    assert base.generate(PROMPTS[0], steps=1, width=96, height=32)[0].size == (96, 32)
    with pytest.raises(UserError, match=r"width \(72\) must be a multiple of 16 .*try 64\nheight \(-16\).*try 16"):
        base.generate(PROMPTS[0], width=72, height=-16)


def test_negative_prompt_replaces_the_null_caption(base: TextToImage) -> None:
    plain = sampled(base, PROMPTS[0], steps=3)
    assert torch.equal(sampled(base, PROMPTS[0], steps=3, negative_prompt=""), plain)
    assert (sampled(base, PROMPTS[0], steps=3, negative_prompt="red") - plain).abs().max() > 0.01
    with pytest.raises(UserError, match="negative_prompt is unused at guidance 1"):
        base.generate(PROMPTS[0], negative_prompt="red", guidance=1.0)


def test_adapter_brings_its_null_caption_schedule_prediction_and_limit(tiny: Path, tmp_path: Path) -> None:
    schedule = {"beta_schedule": "squaredcos_cap_v2"}
    folder = make_adapter(
        tiny,
        tmp_path / "a",
        schedule=schedule,
        prediction_type="v_prediction",
        max_tokens=7,
        variance="stale",
        null_scale=2.0,
    )
    model = TextToImage.load(tiny, lora=folder)
    assert torch.equal(model.text.of(""), 2 * TextToImage.load(tiny).text.of(""))
    able = model.abilities
    assert (able.prediction_type, model.text.max_tokens, able.variance) == ("v_prediction", 7, "stale")
    assert able.schedule.alpha_bar[-1] < 1e-8  # the cosine schedule's; the base's is 4e-5
    with pytest.warns(UserWarning, match="max_tokens 7 and were cut"):
        model.generate("a red circle on a blue picture of pink", steps=1)


def test_raw_weights_lie_beside_the_averaged_ones(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_adapter(tiny, run / "final" / "adapter", weights="ema")
    with pytest.raises(UserError, match="kept only its averaged weights; use --weights ema"):
        TextToImage.load(tiny, lora=run, weights="raw")
    make_adapter(tiny, run / "final" / "adapter_raw", seed=1)
    averaged, last = (TextToImage.load(tiny, lora=run, weights=weights).adapters for weights in ("ema", "raw"))
    assert (averaged[0].metadata.weights, last[0].metadata.weights) == ("ema", "raw")
    assert averaged[0].sha256 != last[0].sha256
    only = make_adapter(tiny, tmp_path / "only")  # a run without averaging
    assert (
        TextToImage.load(tiny, lora=only, weights="ema").adapters
        == TextToImage.load(tiny, lora=only, weights="raw").adapters
    )


def test_the_learned_variance_wants_a_network_whose_variance_was_trained(
    tiny: Path, tmp_path: Path, base: TextToImage
) -> None:
    learned = Settings(sampler="iddpm", steps=3)
    assert base.settled(learned).options["variance"] == "learned"
    fixed = {"variance": "beta_tilde"}
    drawn = [
        sampled(base, PROMPTS[0], sampler=name, options=options, steps=3)
        for name, options in (("iddpm", {}), ("iddpm", {"variance": "learned"}), ("iddpm", fixed), ("ddpm", fixed))
    ]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3])
    assert not torch.equal(drawn[0], drawn[2])
    stale = TextToImage.load(tiny, lora=make_adapter(tiny, tmp_path / "stale", variance="stale"))
    with pytest.raises(UserError, match=r"and .*stale was trained by .* stale; .* or set variance beta_tilde"):
        stale.generate(PROMPTS[0], settings=learned)
    assert torch.equal(
        sampled(stale, PROMPTS[0], sampler="iddpm", steps=3, options=fixed),
        sampled(stale, PROMPTS[0], sampler="ddpm", steps=3),
    )
    four = TextToImage.load(build_tiny_pipeline(tmp_path / "four", out_channels=4))
    for name, options in (("ddpm", {}), ("iddpm", fixed)):
        assert four.generate(PROMPTS[0], sampler=name, options=options, steps=2)[0].size == (64, 64)
    with pytest.raises(UserError, match="this network has no variance channels; use ddpm"):
        four.generate(PROMPTS[0], sampler="iddpm")


def test_all_wrong_settings_are_named_at_once(base: TextToImage) -> None:
    with pytest.raises(UserError) as caught:
        base.generate(PROMPTS[0], sampler="dpm", steps=0, width=8, negative_prompt="red", guidance=1.0)
    report = str(caught.value)
    assert [line.split()[0] for line in report.splitlines()] == ["width", "negative_prompt", "steps", "sampler:"]
    assert f"choose {', '.join(SAMPLERS)}" in report


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_the_same_bytes_twice_and_alone(base: TextToImage, sampler: str) -> None:
    """Bytes of the same call; to rounding, three seeds at once and one by one. All network calls are foretold."""
    settings = base.settled(Settings(sampler=sampler, steps=3))
    inputs: list[int] = []
    hook = base.transformer.register_forward_pre_hook(lambda _, args: inputs.append(len(args[0])))
    moved: list[int] = []
    jobs = [(PROMPTS[0], seed) for seed in (3, 4, 5)]
    with decoded(base) as latents:
        first = list(base.draw(jobs, settings, progress=moved.append))
    hook.remove()
    assert [picture.tobytes() for picture in base.generate(PROMPTS[0], seeds=[3, 4, 5], settings=settings)] == [
        picture.tobytes() for picture in first
    ]
    assert {picture.size for picture in first} == {(64, 64)} and len({p.tobytes() for p in first}) == 3
    assert inputs == [6] * (base.calls(settings) or 0) and moved == [3] * len(inputs)
    for job, together in zip(jobs, latents, strict=True):
        (alone,) = base.latents([job], settings)
        assert alone.isfinite().all()
        assert gap(together, alone) < PICTURE


def test_an_adaptive_solver_tells_of_all_its_network_calls(base: TextToImage) -> None:
    settings = base.settled(Settings(sampler="pf_ode", options={"tolerance": 0.5}))
    inputs: list[int] = []
    hook = base.transformer.register_forward_pre_hook(lambda _, args: inputs.append(len(args[0])))
    moved: list[int] = []
    base.latents([(PROMPTS[0], 0), (PROMPTS[1], 1)], settings, progress=moved.append)
    hook.remove()
    assert base.calls(settings) is None
    assert sum(moved) == len(inputs)  # each call moves on one picture


@pytest.mark.parametrize("how", ["index", "snr_matched"])
@pytest.mark.filterwarnings("ignore:of 1000 noise levels")
def test_another_schedule_reaches_the_network(base: TextToImage, how: str) -> None:
    told: list[float] = []
    hook = base.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["timestep"][0].item()), with_kwargs=True
    )
    settings = base.settled(Settings(steps=3, schedule="cosine", time_conditioning=how))  # type: ignore[arg-type]
    drawn = base.latents([(PROMPTS[0], 0)], settings)
    hook.remove()
    # By numpy: at index 500 cosine has sigma 1.01555, which the linear schedule reaches at 261.03.
    assert told == ([999, 500, 0] if how == "index" else pytest.approx([999, 261.03, 0], abs=0.01))
    plain = base.latents([(PROMPTS[0], 0)], base.settled(Settings(steps=3)))
    assert (drawn - plain).abs().max() > 1e-3 * plain.abs().max()


def test_guidance_may_act_in_the_middle_alone(base: TextToImage) -> None:
    rows: list[int] = []
    hook = base.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    base.generate(PROMPTS[0], settings=Settings(steps=5, guidance_interval=(200, 600)))
    hook.remove()
    assert rows == [1, 1, 2, 2, 1]  # at 999, 749, 500, 250, 0


def test_prompts_known_at_loading_free_the_text_encoder_and_draw_the_same(
    tiny: Path, adapter: Path, adapted: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders: list[Any] = []
    load, load_network = loading.load_text_encoder, loading.load_transformer

    def loaded(*args: Any, **kwargs: Any) -> Any:
        tokenizer, encoder = load(*args, **kwargs)
        encoders.append(weakref.ref(encoder))
        return tokenizer, encoder

    def after(*args: Any, **kwargs: Any) -> Any:
        assert [found() for found in encoders] == [None], "both T5 and the transformer are in memory"
        return load_network(*args, **kwargs)

    monkeypatch.setattr(loading, "load_text_encoder", loaded)
    monkeypatch.setattr(loading, "load_transformer", after)
    model = TextToImage.load(tiny, lora=adapter, prompts=[*PROMPTS, "black"])
    assert model.text.encoder is None
    choices: list[dict[str, Any]] = [{}, {"negative_prompt": "black"}]
    for settings in choices:
        ours, theirs = (m.generate(PROMPTS, steps=2, **settings) for m in (model, adapted))
        assert [picture.tobytes() for picture in ours] == [picture.tobytes() for picture in theirs]
    assert model.generate(f" {PROMPTS[0].upper()}", steps=1)  # the same text once prepared
    new = r"the text encoder was freed before 'a new one' was encoded; give load\(\) all prompts"
    with pytest.raises(ValueError, match=new):
        model.generate("a new one", steps=1)
    with pytest.raises(ValueError, match=new):
        model.generate(PROMPTS[0], negative_prompt="a new one", steps=1)


def test_bfloat16_draws_nearly_the_same(tiny: Path, adapter: Path, adapted: TextToImage) -> None:
    half = sampled(TextToImage.load(tiny, lora=adapter, dtype=torch.bfloat16), PROMPTS, steps=4)
    exact = sampled(adapted, PROMPTS, steps=4)
    assert 0 < (half - exact).norm() < 0.1 * exact.norm()


def test_base_of_another_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was trained on the base"):
        TextToImage.load(build_tiny_pipeline(tmp_path / "other", seed=1), lora=adapter)


def test_same_call_gives_the_same_bytes(adapted: TextToImage) -> None:
    first, again = (adapted.generate(PROMPTS, sampler="ddpm", seeds=[3], steps=3) for _ in range(2))
    assert [picture.tobytes() for picture in first] == [picture.tobytes() for picture in again]


def test_an_argument_replaces_what_the_settings_say(base: TextToImage, tmp_path: Path) -> None:
    five = Settings(steps=5, sampler="ddim", options={"eta": 1.0})
    assert torch.equal(sampled(base, "a", settings=five, steps=3), sampled(base, "a", steps=3, options={"eta": 1.0}))
    assert torch.equal(sampled(base, "a", settings=five, sampler="euler"), sampled(base, "a", sampler="euler", steps=5))
    assert torch.equal(sampled(base, "a", steps=2, seeds=3), sampled(base, "a", steps=2, seeds=[3]))
    picture = base.generate("a red circle", steps=2, progress=False)[0]
    picture.save(tmp_path / "start.png")
    from_file = sampled(base, "a", steps=2, image=str(tmp_path / "start.png"), strength=0.5)
    assert torch.equal(sampled(base, "a", steps=2, image=picture, strength=0.5), from_file)
    assert not torch.equal(sampled(base, "a", steps=2), from_file)
    with pytest.raises(UserError, match="strength must lie above 0"):
        base.generate("a", image=picture, strength=0.0)


def test_the_adapter_is_scaled_anew_after_loading(tiny: Path, adapter: Path, base: TextToImage) -> None:
    model = TextToImage.load(tiny, lora=adapter, lora_scale=0.3)
    for scale in (0.0, 0.5, 1.0, 0.5):  # not on top of one another
        model.set_lora_scale(scale)
        expected = sampled(TextToImage.load(tiny, lora=adapter, lora_scale=scale), "a", steps=2)
        assert torch.equal(sampled(model, "a", steps=2), expected)
        assert model.recipe("a", 0, Settings())["adapter"]["scale"] == scale  # type: ignore[index]
    with pytest.raises(UserError, match="lora_scale: this model has no adapter"):
        base.set_lora_scale(0.5)


def test_what_is_printed_of_a_model_is_a_line(adapted: TextToImage, tiny: Path, adapter: Path) -> None:
    shown = repr(adapted)
    assert f"TextToImage({str(tiny)!r}, lora={str(adapter)!r} at 1, 64 px, predicts epsilon" in shown
    assert "\n" not in shown and shown.endswith("float32 on cpu)")
    for part in (adapted.text, adapted.adapters, adapted.abilities, adapted.abilities.schedule):
        assert len(repr(part)) < 300, type(part)


def test_a_bar_is_shown_unless_it_is_not_wanted(base: TextToImage, capsys: pytest.CaptureFixture[str]) -> None:
    base.generate("a", steps=3)
    assert "generating: 100%" in (shown := capsys.readouterr().err) and "3/3" in shown
    base.generate("a", steps=3, progress=False)
    assert capsys.readouterr().err == ""
