"""Loading of a base. Oracles: the stock pipeline's weights, and a table of what would load silently wrong."""

import importlib.util
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from huggingface_hub import constants

from pixart_ft.config.train import Quantization
from pixart_ft.errors import UserError
from pixart_ft.model import loading, place
from pixart_ft.model.base import Base
from pixart_ft.model.place import resolve_base
from pixart_ft.model.text import encode_captions
from pixart_ft.model.vae import LatentScale
from tests.helpers.tiny import build_tiny_pipeline, edit


def test_loads_what_the_stock_pipeline_loads_frozen_and_in_the_dtype_asked_for(tiny: Path) -> None:
    stock = PixArtSigmaPipeline.from_pretrained(str(tiny))
    transformer = loading.load_transformer(Base.read(tiny), dtype=torch.bfloat16)
    vae = loading.load_vae(Base.read(tiny), dtype=torch.float32)
    tokenizer, encoder = loading.load_text_encoder(Base.read(tiny), dtype=torch.float32)
    for ours, theirs in ((transformer, stock.transformer), (vae, stock.vae), (encoder, stock.text_encoder)):
        assert not ours.training and not any(p.requires_grad for p in ours.parameters())
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, theirs.get_parameter(name).to(parameter.dtype), rtol=0, atol=0)
    assert {p.dtype for p in transformer.parameters()} == {torch.bfloat16}
    assert tokenizer("SKS a red dog").input_ids == stock.tokenizer("SKS a red dog").input_ids
    base = Base.read(tiny)
    assert base.prediction_type == "epsilon"
    torch.testing.assert_close(base.schedule.alpha_bar.float(), stock.scheduler.alphas_cumprod, rtol=1e-5, atol=0)


def test_loading_makes_no_noise_and_leaves_the_libraries_settings(
    tiny: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log

    def settings() -> list[object]:
        return [f() for m in (diffusers_log, transformers_log) for f in (m.get_verbosity, m.is_progress_bar_enabled)]

    before = settings()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loading.load_transformer(Base.read(tiny), dtype=torch.float32)
        loading.load_text_encoder(Base.read(tiny), dtype=torch.float32)
    assert capfd.readouterr() == ("", "")
    assert settings() == before


def test_base_names(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_base(str(tiny)) == str(tiny)
    assert resolve_base("PixArt-alpha/PixArt-Sigma-XL-2-512-MS") == "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"
    monkeypatch.setattr(place, "DEMO_FOLDER", tiny)
    assert resolve_base("demo") == str(tiny)
    monkeypatch.setattr(place, "DEMO_FOLDER", tmp_path / "absent")
    with pytest.raises(UserError, match=r"lacks the demo \(.*absent\); reinstall"):
        resolve_base("demo")
    for name in ("nowhere", "./no/where", "/no/where", "a/b/c", ""):
        with pytest.raises(UserError, match=r"model\.base: .*set model.base to \"demo\", a folder"):
            resolve_base(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no model_index\.json"):
        resolve_base(str(tmp_path / "empty"))


def test_a_hub_base_that_is_not_here_gives_one_message_offline() -> None:
    with pytest.raises(UserError, match=r"cannot load model_index\.json of someone/some-model; check the name and the"):
        loading.load_transformer(Base.read("someone/some-model"), dtype=torch.float32)


def test_files_of_a_hub_base_that_cannot_be_reached_are_reported_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--owner--name"
    snapshot = model / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(snapshot.name)
    shutil.copy(tiny / "model_index.json", snapshot)
    with pytest.raises(
        UserError, match=r"^model\.base: cannot load transformer/config\.json of owner/name; check"
    ) as e:
        Base.read("owner/name")
    assert str(e.value).count("cannot load") == 1
    shutil.copytree(tiny, snapshot, dirs_exist_ok=True)
    edit(snapshot / "transformer" / "config.json", patch_size="two")
    (snapshot / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"(?s)2 problems.*patch_size is 'two'.*cannot load vae/config"):
        Base.read("owner/name")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": 32, "interpolation_scale": 0.5}, None),
        ({"sample_size": 32, "interpolation_scale": 1}, "of sample_size 32 has 0.5"),
        ({"sample_size": 32, "interpolation_scale": ...}, "None .used as 1., but .* 32 has 0.5"),
        ({"sample_size": 64, "interpolation_scale": ...}, None),
        ({"sample_size": 96, "interpolation_scale": None}, "used as 1.* 96 has 1.5"),
        (
            {"sample_size": 96, "interpolation_scale": 1},
            None,
        ),  # an own size may have an own scale, if it says so
        ({"sample_size": 128, "interpolation_scale": 1}, "128 has 2: write"),
        ({"sample_size": 128, "interpolation_scale": 2}, None),
        ({"sample_size": 128, "interpolation_scale": 2, "use_additional_conditions": ...}, "PixArt-alpha's"),
        ({"sample_size": 256, "interpolation_scale": 4}, None),
        ({"use_additional_conditions": True}, "use_additional_conditions is true, which is PixArt-alpha's"),
        ({"out_channels": 6}, "out_channels 6 is neither"),
        ({"patch_size": 3}, "sample_size 8 is no multiple of patch_size 3"),
        ({"_class_name": "SD3Transformer2DModel"}, "its transformer is a SD3Transformer2DModel"),
        ({"_class_name": "Transformer2DModel"}, None),
        ({"caption_channels": 64}, "takes text of width 64 and the text encoder gives 32"),
        ({"in_channels": 8, "out_channels": 16}, "takes 8 latent channels and the VAE makes 4"),
    ],
)
def test_transformer_configurations(base: Path, changes: dict[str, Any], message: str | None) -> None:
    edit(base / "transformer" / "config.json", **changes)
    if message is None:
        Base.read(base)
    else:
        with pytest.raises(UserError, match=message):
            loading.load_transformer(Base.read(base), dtype=torch.float32)


def test_all_faults_of_a_base_come_in_one_report(base: Path) -> None:
    edit(
        base / "transformer" / "config.json",
        sample_size=64,
        use_additional_conditions=True,
        caption_channels=4096,
    )
    edit(base / "vae" / "config.json", scaling_factor=...)
    edit(base / "scheduler" / "scheduler_config.json", prediction_type="flow")
    with pytest.raises(UserError) as caught:
        Base.read(base)
    begins = ["use_addi", "interpol", "vae/conf", "the tran", "schedule"]
    assert [line[4:12] for line in str(caught.value).splitlines()[1:]] == begins


def test_all_damaged_files_of_a_base_come_in_one_report(base: Path) -> None:
    (base / "vae" / "config.json").unlink()
    edit(base / "transformer" / "config.json", patch_size="two")
    (base / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(UserError, match="3 problems") as caught:
        Base.read(base)
    for what in ("patch_size is 'two'", r"vae/config.json is missing", "scheduler_config.json: it is no JSON"):
        assert what in str(caught.value)


def test_other_pipelines_and_incomplete_folders_are_refused(base: Path) -> None:
    edit(base / "model_index.json", _class_name="PixArtAlphaPipeline")
    with pytest.raises(UserError, match="it is PixArt-alpha"):
        loading.load_transformer(Base.read(base), dtype=torch.float32)
    edit(base / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(UserError, match="says FluxPipeline, not PixArtSigmaPipeline"):
        loading.load_transformer(Base.read(base), dtype=torch.float32)
    edit(base / "model_index.json", _class_name="PixArtSigmaPipeline")
    shutil.rmtree(base / "vae")
    with pytest.raises(UserError, match=r"vae/config\.json is missing \(the folder holds model_index.json, sched"):
        loading.load_vae(Base.read(base), dtype=torch.float32)


def test_a_base_without_a_text_encoder_says_so_when_it_is_wanted(base: Path) -> None:
    edit(base / "model_index.json", text_encoder=[None, None])
    shutil.rmtree(base / "text_encoder")
    shutil.rmtree(base / "tokenizer")
    loading.load_vae(Base.read(base), dtype=torch.float32)
    with pytest.raises(UserError, match=r"base: .*base comes without a text encoder, .* give a whole diffusers PixArt"):
        loading.load_text_encoder(Base.read(base), dtype=torch.float32)


def test_missing_unknown_and_truncated_weights_are_refused(base: Path) -> None:
    edit(base / "transformer" / "config.json", num_layers=3)
    with pytest.raises(UserError, match=r"\d+ weights missing, such as transformer_blocks\.2\."):
        loading.load_transformer(Base.read(base), dtype=torch.float32)
    edit(base / "transformer" / "config.json", num_layers=1)
    with pytest.raises(UserError, match=r"\d+ unknown weights, such as transformer_blocks\.1\."):
        loading.load_transformer(Base.read(base), dtype=torch.float32)
    edit(base / "text_encoder" / "config.json", num_layers=3)
    with pytest.raises(UserError, match=r"weights missing, such as encoder\.block\.2\."):
        loading.load_text_encoder(Base.read(base), dtype=torch.float32)
    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cannot load vae of .*copy or download the model again"):
        loading.load_vae(Base.read(base), dtype=torch.float32)


def test_schedule_of_another_kind_is_refused_by_name(base: Path) -> None:
    edit(base / "scheduler" / "scheduler_config.json", beta_schedule="sigmoid")
    with pytest.raises(UserError, match=r"scheduler_config\.json: .*sigmoid"):
        Base.read(base)
    edit(base / "scheduler" / "scheduler_config.json", beta_schedule="linear", prediction_type="flow")
    with pytest.raises(UserError, match="unknown prediction_type 'flow'"):
        Base.read(base)


def test_facts_read_without_weights(base: Path) -> None:
    assert Base.read(base).size_unit == 16
    assert (Base.read(base).vae_factor, Base.read(base).native_size) == (8, 64)
    assert Base.read(base).latent_scale == LatentScale(0.13025, 0.0)
    assert Base.read(base).schedule_config["beta_end"] == 0.02
    edit(base / "vae" / "config.json", shift_factor=0.5)
    assert Base.read(base).latent_scale == LatentScale(0.13025, 0.5)


@pytest.mark.parametrize(
    ("vae", "message"),
    [
        ({"scaling_factor": ...}, r"has no scaling_factor \(the SDXL VAE's is 0\.13025\); add it"),
        ({"scaling_factor": 0.0}, "scaling_factor 0.0 is no positive number"),
        ({"scaling_factor": float("nan")}, "scaling_factor nan is no positive number"),
        ({"shift_factor": "0.1"}, "shift_factor '0.1' is no number"),
        ({"latents_mean": [0.1] * 4}, "one shift and one scale for all channels"),
    ],
)
def test_a_vae_that_does_not_say_how_its_latents_are_scaled_is_refused(base: Path, vae: Any, message: str) -> None:
    edit(base / "vae" / "config.json", **vae)
    with pytest.raises(UserError, match=message):
        Base.read(base)


def test_float16_where_it_is_safe(base: Path) -> None:
    with pytest.raises(UserError, match="float16 arithmetic use float32 weights under autocast"):
        loading.load_transformer(Base.read(base), dtype=torch.float16)
    with pytest.warns(UserWarning, match="overflows in float16"):
        assert loading.load_vae(Base.read(base), dtype=torch.float16).dtype == torch.float32
    edit(base / "vae" / "config.json", force_upcast=False)
    assert loading.load_vae(Base.read(base), dtype=torch.float16).dtype == torch.float16


def test_t5_whose_wo_overflows_float16_encodes_like_float32(base: Path) -> None:
    # The hidden activations of the feed-forward layers exceed 65504 here; only `wo` in float32 survives that.
    _, encoder = loading.load_text_encoder(Base.read(base), dtype=torch.float32)
    with torch.no_grad():
        for block in encoder.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(3e5)
            block.layer[1].DenseReluDense.wi_1.weight.mul_(10)
    encoder.save_pretrained(str(base / "text_encoder"))
    _, half = loading.load_text_encoder(Base.read(base), dtype=torch.float16)
    ids, mask = torch.tensor([[98, 104, 112, 1]]), torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        expected = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        got = half(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        cast = half.half()(input_ids=ids, attention_mask=mask).last_hidden_state.float()

    def error(x: torch.Tensor) -> float:
        return ((x - expected).norm() / expected.norm()).item()

    assert error(got) < 0.02
    assert not error(cast) < 0.02  # what a cast T5 does, or this test would not test anything


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("how", "kind", "rounding"), [("nf4", "Linear4bit", 1 / 4), ("int8", "Linear8bitLt", 1 / 32)])
def test_t5_in_few_bits_says_nearly_the_same(
    base: Path, how: Quantization, kind: str, rounding: float, dtype: torch.dtype, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every linear layer but `wo` is held so. Steps are up to 0.3 of the largest of 64 weights, or 1/127."""
    read = Base.read(base)
    tokenizer, encoder = loading.load_text_encoder(read, dtype=dtype)
    _, short = loading.load_text_encoder(read, dtype=dtype, quantization=how)
    layers = {n: type(m).__name__ for n, m in short.named_modules() if isinstance(m, torch.nn.Linear)}
    assert layers == {n: "Linear" if n.endswith(".wo") else kind for n in layers} and len(layers) == 2 * 7
    plain = {n: p.dtype for n, p in encoder.named_parameters()}
    assert {n: p.dtype for n, p in short.named_parameters() if p.is_floating_point()}.items() <= plain.items()
    whole, few = (encode_captions(one, tokenizer, ["a red apple on a plate", ""]) for one in (encoder, short))
    for one, other in zip(whole, few, strict=True):
        assert one.dtype == other.dtype == dtype
        assert 0 < (one - other).float().norm() < rounding * one.float().norm()
    assert "cast" not in capfd.readouterr().err  # bitsandbytes says at each call that it computes in float16


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_t5_in_8_bits_keeps_what_overflows_float16(base: Path) -> None:
    """Such layers compute in float16, and `wo` is none of them."""
    tokenizer, encoder = loading.load_text_encoder(Base.read(base), dtype=torch.float32)
    with torch.no_grad():
        for block in encoder.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(3e5)
            block.layer[1].DenseReluDense.wi_1.weight.mul_(10)
    encoder.save_pretrained(str(base / "text_encoder"))
    _, short = loading.load_text_encoder(Base.read(base), dtype=torch.bfloat16, quantization="int8")
    (whole,), (few,) = (encode_captions(one, tokenizer, ["a red apple"]) for one in (encoder, short))
    assert (whole - few).norm() < whole.norm() / 16
    with torch.no_grad():
        for block in encoder.encoder.block:
            block.layer[1].DenseReluDense.wi_1.weight.mul_(1e5)
    encoder.save_pretrained(str(base / "text_encoder"))
    _, short = loading.load_text_encoder(Base.read(base), dtype=torch.bfloat16, quantization="int8")
    with pytest.raises(UserError, match=r"NaN or infinity .* load it in bfloat16 or float32, and not in 8 bits"):
        encode_captions(short, tokenizer, ["a red apple"])


def test_decoder_only_decodes_the_same_without_the_encoder(tiny: Path) -> None:
    vae = loading.load_vae(Base.read(tiny), dtype=torch.float32)
    count = sum(p.numel() for p in vae.parameters())
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(latents).sample
    assert torch.equal(loading.decoder_only(vae).decode(latents).sample, expected)
    assert sum(p.numel() for p in vae.parameters()) < 0.7 * count
    with pytest.raises(AttributeError, match="encoder"):
        vae.encode(expected)


def test_fingerprint_names_the_weights_and_not_the_dtype_or_the_place(base: Path, tmp_path: Path) -> None:
    transformer = loading.load_transformer(Base.read(base), dtype=torch.float32)
    print_of_base = loading.fingerprint(transformer)
    assert len(print_of_base) == 16 and int(print_of_base, 16) >= 0
    assert loading.fingerprint(loading.load_transformer(Base.read(base), dtype=torch.bfloat16)) == print_of_base
    edit(base / "transformer" / "config.json", _name_or_path="elsewhere", _diffusers_version="0.1.0")
    assert loading.fingerprint(loading.load_transformer(Base.read(base), dtype=torch.float32)) == print_of_base
    other = build_tiny_pipeline(tmp_path / "other", seed=1)
    assert loading.fingerprint(loading.load_transformer(Base.read(other), dtype=torch.float32)) != print_of_base
    with torch.no_grad():
        transformer.transformer_blocks[1].attn2.to_k.bias.add_(0.01)
    assert loading.fingerprint(transformer) != print_of_base
    edit(base / "transformer" / "config.json", interpolation_scale=1)
    assert loading.fingerprint(loading.load_transformer(Base.read(base), dtype=torch.float32)) != print_of_base


def test_variance_of_a_stock_base(tiny: Path, tmp_path: Path) -> None:
    assert Base.read(tiny).variance == "trained"
    four = build_tiny_pipeline(tmp_path / "four", out_channels=4)
    assert Base.read(four).variance == "none"


@pytest.mark.parametrize("sharded", [False, True])
def test_a_base_saved_as_a_variant_is_the_same_base(tiny: Path, tmp_path: Path, sharded: bool) -> None:
    more = {"max_shard_size": "60KB"} if sharded else {}
    folder = tmp_path / "base"
    PixArtSigmaPipeline.from_pretrained(str(tiny)).save_pretrained(str(folder), variant="fp16", **more)
    names = [path.name for path in folder.rglob("*.safetensors")]
    assert all("fp16" in name for name in names) and (len(names) > 6) == sharded
    Base.read(folder)
    pairs = [
        (
            loading.load_transformer(Base.read(place), dtype=torch.float32),
            loading.load_vae(Base.read(place), dtype=torch.float32),
            loading.load_text_encoder(Base.read(place), dtype=torch.float32)[1],
        )
        for place in (folder, tiny)
    ]
    for ours, plain in zip(*pairs, strict=True):
        assert loading.fingerprint(ours) == loading.fingerprint(plain)


def test_two_variants_are_refused_and_a_plain_file_is_taken_first(base: Path) -> None:
    plain = base / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(plain, plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    loading.load_vae(Base.read(base), dtype=torch.float32)
    plain.rename(plain.with_name("diffusion_pytorch_model.bf16.safetensors"))
    with pytest.raises(UserError, match="vae holds its weights as bf16, fp16, none of them plain; keep one"):
        loading.load_vae(Base.read(base), dtype=torch.float32)


def test_a_revision_of_a_folder_is_refused(base: Path) -> None:
    with pytest.raises(UserError, match=r"model\.revision 'v1' chooses among the versions of a Hub model, and .* is a"):
        Base.read(base, revision="v1")
