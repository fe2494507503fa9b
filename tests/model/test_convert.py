"""The authors' own layout to diffusers and back. Oracles: its network by hand, and the bits of the file."""

import pickle
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixart_ft.cli import main
from pixart_ft.config.export import ConvertConfig
from pixart_ft.errors import UserError
from pixart_ft.model.base import Base
from pixart_ft.model.convert import BESIDE, convert, network_config
from pixart_ft.model.loading import load_transformer
from pixart_ft.model.original import to_diffusers
from tests.helpers.networks import call
from tests.helpers.original import Weights, forward, original_weights, positions


@pytest.fixture(scope="module")
def original() -> Weights:
    return original_weights()


def converted(file: Path, out: Path, **more: Any) -> Path:
    convert(ConvertConfig(file=file, out=out, heads=4, **more))
    return out


def written(weights: Weights, path: Path, form: str = "state_dict") -> Path:
    """A file as the authors, a training on several processes, or ComfyUI leave it."""
    forms: dict[str, dict[str, Any]] = {
        "state_dict": {"state_dict": weights, "epoch": 3},
        "bare": weights,
        "module": {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
        "fsdp": {name.replace(".attn.", "._fsdp_wrapped_module.attn."): value for name, value in weights.items()},
        "comfy": {f"model.diffusion_model.{name}": value for name, value in weights.items()},
    }
    content = forms[form]
    if path.suffix == ".safetensors":
        save_file(content, str(path))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "module")  # as torch before 1.6 did
    return path


def same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("form", ["state_dict", "bare", "module", "fsdp", "comfy"])
def test_the_converted_network_is_the_one_of_the_file(original: Weights, tmp_path: Path, form: str) -> None:
    """To rounding: hundreds of float32 sums of numbers near 1."""
    suffix = ".safetensors" if form == "comfy" else ".pth"
    folder = converted(written(original, tmp_path / f"a{suffix}", form), tmp_path / "out")
    network = PixArtTransformer2DModel.from_pretrained(str(folder), subfolder="transformer").eval()
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 6, 32, generator=draw)
    timestep, lengths = torch.tensor([3, 871]), [6, 2]
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        found = network(x, text, timestep, encoder_attention_mask=mask).sample
    expected = forward(original, x, timestep, text, lengths, heads=4)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_there_and_back_is_the_same_file(original: Weights, tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    weights = {name: value.to(dtype) for name, value in original.items()}
    folder = converted(written(weights, tmp_path / "a.pth"), tmp_path / "out")
    assert load_file(folder / BESIDE).keys() == {"y_embedder.y_embedding", "pos_embed"}
    back = tmp_path / f"back{suffix}"
    convert(ConvertConfig(file=folder, out=back))
    found = load_file(back) if suffix == ".safetensors" else torch.load(back, weights_only=True)["state_dict"]
    same(found, weights)


def test_averaged_weights_are_taken_where_there_are_any(original: Weights, tmp_path: Path) -> None:
    moved = {name: value + (name != "pos_embed") for name, value in original.items()}
    torch.save({"state_dict": original, "state_dict_ema": moved}, tmp_path / "both.pth")
    torch.save({"state_dict_ema": moved}, tmp_path / "ema.pth")
    for file, asked, expected in (("both", "ema", moved), ("both", "raw", original), ("ema", "ema", moved)):
        folder = converted(tmp_path / f"{file}.pth", tmp_path / f"{file}-{asked}", weights=asked)
        same(load_file(folder / BESIDE), {name: expected[name] for name in ("y_embedder.y_embedding", "pos_embed")})
    with pytest.raises(UserError, match=r"weights: .* holds only its averaged weights; use --weights ema"):
        converted(tmp_path / "ema.pth", tmp_path / "no", weights="raw")


def test_with_the_parts_of_a_model_it_is_a_base(original: Weights, tiny: Path, tmp_path: Path) -> None:
    file = written(original, tmp_path / "a.pth")
    folder = converted(file, tmp_path / "out", parts=str(tiny))
    base = Base.read(folder)
    assert base.schedule_config == Base.read(tiny).schedule_config and base.native_size == 64
    assert call(load_transformer(base, dtype=torch.float32)).isfinite().all()
    alone = converted(file, tmp_path / "alone")
    with pytest.raises(UserError, match=r"vae/config\.json is missing"):
        Base.read(alone)


@pytest.mark.parametrize(("side", "scale"), [(256, 0.5), (512, 1.0), (1024, 2.0), (2048, 4.0)])
def test_size_and_scale_are_read_from_the_positions(original: Weights, side: int, scale: float) -> None:
    weights, _ = to_diffusers(original)
    for table in (positions(64, side // 16, scale), positions(64, side // 16, scale).half()[None]):
        config = network_config(weights, table, image_size=None, heads=4)
        assert (config["sample_size"], config["interpolation_scale"]) == (side // 8, scale)
    told = network_config(weights, None, image_size=side, heads=4)
    assert told == config
    other = network_config(weights, positions(64, side // 16, 3.0), image_size=None, heads=4)
    assert other["interpolation_scale"] == pytest.approx(3.0)
    with pytest.raises(UserError, match=f"image_size 128: .* is for {side} pixels"):
        network_config(weights, table, image_size=128, heads=4)


def without(*parts: str) -> Any:
    return lambda w: {name: value for name, value in w.items() if not any(part in name for part in parts)}


def adding(name: str, *shape: int) -> Any:
    return lambda w: w | {name: torch.ones(*shape)}


BROKEN: dict[str, tuple[Any, str]] = {
    "alpha": (adding("csize_embedder.mlp.0.weight", 8, 8), r"micro-conditions: PixArt-alpha.*\(csize_embedder.mlp.0"),
    "kv": (adding("blocks.1.attn.sr.weight", 8, 1, 2, 2), r"kv-compression.*\(blocks\.1\.attn\.sr\.weight\)"),
    "qk": (adding("blocks.0.attn.q_norm.weight", 8), r"qk-norm: .*\(blocks\.0\.attn\.q_norm\.weight\)"),
    "flat": (adding("_flat_param", 8), "one process's share of FSDP; gather"),
    "lora": (adding("blocks.0.attn.qkv.lora_A.weight", 8, 8), r"a LoRA, which is given beside a model \(--lora\)"),
    "strange": (adding("head.weight", 8, 8), r"holds 1 weights that PixArt-Sigma does not have: head\.weight"),
    "twice": (adding("module.pos_embed", 8), "holds pos_embed twice, under other prefixes"),
    "missing": (without("blocks.1.mlp.fc2"), r"2 missing: transformer_blocks\.1\.ff\.net\.2\.bias"),
    "gap": (without("blocks.0."), "holds no PixArt network"),
    "shape": (adding("t_block.1.weight", 8, 8), r"1 of another shape: adaln_single\.linear\.weight"),
    "other": (lambda w: {"conv.weight": torch.ones(3)}, r"holds no PixArt network \(its names are conv\.weight\)"),
    "empty": (lambda w: {}, "holds no weights"),
    "sizeless": (without("pos_embed"), "no table of positions.*give --image-size 256, 512, 1024 or 2048"),
    "diffusers": (lambda w: to_diffusers(w)[0], "has diffusers' names already"),
    "scale": (
        lambda w: w | {"pos_embed": positions(64, 16, 1.0)},
        r"interpolation_scale is 1\.0 \(used as 1\.0\), but",
    ),
    "positions": (lambda w: w | {"pos_embed": w["pos_embed"] + 2}, r"table of positions \(pos_embed\) is damaged"),
    "list": (lambda w: [1, 2], "holds a list"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_such_network_is_refused_by_name(original: Weights, tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    torch.save(change(dict(original)), tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        converted(tmp_path / "a.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_a_hostile_pickle_runs_nothing(original: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark, file = tmp_path / "was-here", tmp_path / "a.pth"
    torch.save({"state_dict": original, "note": Hostile(mark)}, file)
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Hostile(mark)))
    (tmp_path / "c.pth").write_bytes(file.read_bytes()[:5000])
    (tmp_path / "d.safetensors").write_bytes(b"no such file")
    for path in sorted(tmp_path.glob("?.*")):
        assert main(["convert", str(path), "--out", str(tmp_path / "out")]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith(f"error: file: {'cannot read ' if path.stem in 'cd' else ''}{path}")
        assert ("nothing of it was run" in err) == (path.stem in "ab")
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_each_way_has_its_own_settings(
    original: Weights, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(original, tmp_path / "a.pth")
    assert main(["convert", str(file), "--out", str(tmp_path / "out"), "--heads", "4"]) == 0
    assert "2 blocks of width 64, 4 heads, for pictures of 64 pixels" in capsys.readouterr().out
    for arguments, message in (
        ([str(file), "--out", str(tmp_path / "out")], "out: .* is there already"),
        ([str(tiny), "--out", str(tmp_path / "b")], r"end it in \.safetensors or \.pth"),
        ([str(tiny), "--out", str(tmp_path / "b.pth"), "--image-size", "64"], "are for a file of the original layout"),
        ([str(tmp_path / "none.pth"), "--out", str(tmp_path / "b.pth")], "there is no .*none.pth"),
        ([str(file), "--out", str(tmp_path / "b"), "--heads", "5"], "heads 5: the network's width 64 is no multiple"),
    ):
        assert main(["convert", *arguments]) == 2
        assert re.search(message, capsys.readouterr().err)
    convert(ConvertConfig(file=tiny, out=tmp_path / "b.pth"))  # without what the original layout alone has
    found = torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"]
    assert found.keys() == original.keys() - {"y_embedder.y_embedding"}
    torch.testing.assert_close(found["pos_embed"], original["pos_embed"])


@pytest.mark.slow
def test_the_real_size_takes_a_minute_and_six_gigabytes(tmp_path: Path) -> None:
    """2.4 GB of weights there and back, in a process of its own whose time and memory are measured."""
    weights = original_weights(depth=28, width=1152, text=4096, size=128, scale=2.0)
    torch.save({"state_dict": weights}, tmp_path / "a.pth")
    pairs = ((tmp_path / "a.pth", tmp_path / "out"), (tmp_path / "out", tmp_path / "back.pth"))
    for file, out in pairs:
        started = time.perf_counter()
        code = (
            f"from pixart_ft.cli import main; raise SystemExit(main(['convert', {str(file)!r}, '--out', {str(out)!r}]))"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
        assert time.perf_counter() - started < 60
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20 < 6
    back: dict[str, Tensor] = torch.load(tmp_path / "back.pth", weights_only=True, mmap=True)["state_dict"]
    same(back, weights)
