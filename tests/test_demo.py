"""The embedded demo as a stranger meets it: a stock pipeline opens it, ours draws the same, the README's example
runs. Oracle: diffusers' own pipeline; the limits that the package promises."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from transformers import T5EncoderModel

from pixart_ft.adapters.acting import merge
from pixart_ft.data.folders import DEMO_PICTURES, read_folder
from pixart_ft.model.place import DEMO_FOLDER
from pixart_ft.sampling.loop import Guidance, sample_latents
from pixart_ft.sampling.text_to_image import TextToImage
from pixart_ft.schedulers import build_scheduler
from tests.helpers.adapters import make_adapter

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the demo that changes its pictures: alpha is twice the rank, B drawn at random."""
    return make_adapter("demo", tmp_path_factory.mktemp("adapter") / "demo", alpha=8.0, size=0.02)


def test_is_a_small_genuine_pixart_sigma_in_the_standard_layout() -> None:
    pipeline = PixArtSigmaPipeline.from_pretrained(str(DEMO_FOLDER))
    assert isinstance(pipeline.transformer, PixArtTransformer2DModel)
    assert isinstance(pipeline.vae, AutoencoderKL) and isinstance(pipeline.text_encoder, T5EncoderModel)
    config = pipeline.transformer.config
    assert (config.out_channels, config.sample_size, config.interpolation_scale) == (8, 32, 0.5)
    assert config.use_additional_conditions is False
    files = [path for path in DEMO_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 45e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".model"}


def test_a_plain_stock_call_runs() -> None:
    pipeline = PixArtSigmaPipeline.from_pretrained(str(DEMO_FOLDER))
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (256, 256)


def test_fine_tuning_set_is_whole_and_apart_from_its_held_out_pictures() -> None:
    train, held_out = (read_folder(DEMO_PICTURES / part) for part in ("train", "held_out"))
    assert (len(train), len(held_out)) == (240, 60)
    assert not {row.caption for row in train} & {row.caption for row in held_out}
    assert sum(path.stat().st_size for path in DEMO_PICTURES.rglob("*")) <= 4e6


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_stock_pipeline_with_the_merged_adapter_draws_the_same(adapter: Path, guidance: float) -> None:
    """float32 DDIM, trailing spacing, 25 steps, same seed: latents within 1e-4."""
    ours = TextToImage.load("demo", lora=adapter)
    prompt, seed = "Red Apple ", 7
    embeds = ours.text.of(prompt)
    able = ours.abilities
    scheduler = build_scheduler("ddim", able.schedule, able.prediction_type, {"spacing": "trailing"})
    scheduler.set_timesteps(25)
    latents = sample_latents(
        ours.transformer,
        scheduler,
        embeds[None],
        torch.ones(1, len(embeds), dtype=torch.int64),
        ours.text.of(""),
        guidance=Guidance(guidance),
        generators=[torch.Generator().manual_seed(seed)],
        shape=(4, 32, 32),
    )
    merge(ours.transformer)
    stock = PixArtSigmaPipeline.from_pretrained(str(DEMO_FOLDER), transformer=ours.transformer)
    config = {"timestep_spacing": "trailing", "clip_sample": False, "beta_schedule": "linear"}
    stock.scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, **config)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        prompt,
        num_inference_steps=25,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        clean_caption=False,
        use_resolution_binning=False,
        height=256,
        width=256,
        output_type="latent",
    ).images
    assert (latents - expected).abs().max() < 1e-4


def test_the_readme_example_runs(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python block of the README, word for word but for the adapter's place and fewer steps."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(block.strip().splitlines()) <= 12
    code = block.replace('"runs/quickstart"', repr(str(adapter))).replace("steps=30", "steps=2")
    assert code.count(str(adapter)) == 1 and "steps=2" in code
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "red-apple.png").is_file()
    assert len(names["pictures"]) == 4  # type: ignore[arg-type]
