"""Recipes in pictures: read by other programs, and drawn again.

Oracles: the bytes of the picture drawn first; AUTOMATIC1111's `parameters` written by hand.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixart_ft import cli
from pixart_ft.errors import UserError
from pixart_ft.pictures.recipes import RECIPE_KEY, config_of, parameters, read_recipe
from pixart_ft.pictures.sheets import save_png
from pixart_ft.sampling.text_to_image import TextToImage
from tests.helpers.adapters import make_adapter


def draw(*words: object) -> int:
    return cli.main(["generate", *map(str, words)])


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny, tmp_path_factory.mktemp("recipes") / "adapter")


@pytest.mark.parametrize(
    "words",
    [
        ["--sampler", "ddim", "--eta", "0.5", "--negative-prompt", "a square", "--width", "96"],
        ["--sampler", "iddpm", "--guidance", "1", "--aspect-ratio", "2:1"],
        ["--sampler", "edm", "--s-churn", "3", "--s-noise", "1.1", "--rho", "5", "--guidance-interval", "[100, 900]"],
        ["--sampler", "score_sde", "--corrector-steps", "0", "--schedule", "cosine", "--time-conditioning", "index"],
    ],
)
def test_a_picture_is_drawn_again_from_its_recipe(tiny: Path, adapter: Path, tmp_path: Path, words: list[str]) -> None:
    first = [
        "--prompt",
        'red, "circle": Ж 犬',
        "--seed",
        2**40,
        "--steps",
        3,
        "--device",
        "cpu",
        "--out",
        tmp_path / "a",
    ]
    assert draw("--model", tiny, "--lora", adapter, "--lora-scale", "0.7", *first, *words) == 0
    (picture,) = (tmp_path / "a").glob("000-*.png")
    assert draw("--from", picture, "--out", tmp_path / "b") == 0
    assert (tmp_path / "b" / picture.name).read_bytes() == picture.read_bytes()  # the recipe in it too


def test_several_adapters_are_drawn_with_and_drawn_again(
    tiny: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same as in Python, with the adapters in either order; the recipe has all of them."""
    other = make_adapter(tiny, tmp_path / "other", seed=1)
    first = ["--prompt", "a", "--steps", 2, "--device", "cpu", "--model", tiny]
    several = ["--lora", adapter, "--lora", other, "--lora-scale", "0.7", "--lora-scale", "-0.3"]
    assert draw(*first, *several, "--out", tmp_path / "a") == 0
    picture = tmp_path / "a" / "000-a-seed0.png"
    recipe = read_recipe(picture)["adapter"]
    assert [(one["path"], one["scale"]) for one in recipe] == [(str(adapter), 0.7), (str(other), -0.3)]
    with Image.open(picture) as image:
        assert f'Lora: "{adapter}, {other}", Lora scale: "0.7, -0.3"' in image.info["parameters"]
        drawn = image.convert("RGB").tobytes()
    assert draw("--from", picture, "--out", tmp_path / "b") == 0
    assert (tmp_path / "b" / picture.name).read_bytes() == picture.read_bytes()
    model = TextToImage.load(tiny, lora=[adapter, other], lora_scale=[1.0, 1.0])
    model.set_lora_scale([0.7, -0.3])
    assert model.generate("a", steps=2, progress=False)[0].tobytes() == drawn
    assert f"lora={str(adapter)!r} at 0.7, lora={str(other)!r} at -0.3, " in repr(model)

    assert draw("--from", picture, "--lora", adapter, "--out", tmp_path / "c") == 0  # one in place of both, as trained
    assert read_recipe(tmp_path / "c" / picture.name)["adapter"]["scale"] == 1
    capsys.readouterr()
    assert draw(*first, *several, "--lora-scale", "1", "--out", tmp_path / "d") == 2
    assert "lora_scale is [0.7, -0.3, 1] for the adapters " in (said := capsys.readouterr().err)
    assert "give one number for each, or one for all" in said
    make_adapter(tiny, tmp_path / "v", prediction_type="v_prediction")
    assert draw(*first, "--lora", adapter, "--lora", tmp_path / "v", "--out", tmp_path / "d") == 2
    assert f"lora: {adapter} and {tmp_path / 'v'} were trained on another prediction" in capsys.readouterr().err
    make_adapter(tiny, tmp_path / "null", null_scale=2.0)
    with pytest.raises(UserError, match="were trained with different null captions"):
        TextToImage.load(tiny, lora=[adapter, tmp_path / "null"])
    assert not (tmp_path / "d").exists()


def test_a_text_encoder_in_few_bits_draws_nearly_the_same_and_is_in_the_recipe(
    tiny: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    asked = ["--prompt", "a red circle", "--steps", 2, "--device", "cpu", "--model", tiny, "--lora", adapter]
    drawn = {}
    for how in ("none", "nf4"):
        assert draw(*asked, "--text-encoder-quantization", how, "--out", tmp_path / how) == 0
        (picture,) = (tmp_path / how).glob("000-*.png")
        drawn[how] = np.asarray(Image.open(picture), dtype=int)
    assert 0 < np.abs(drawn["nf4"] - drawn["none"]).max() < 64
    assert read_recipe(picture)["text_encoder_quantization"] == "nf4"
    assert draw("--from", picture, "--out", tmp_path / "again") == 0
    assert (tmp_path / "again" / picture.name).read_bytes() == picture.read_bytes()
    model = TextToImage.load(tiny, lora=adapter, text_encoder_quantization="nf4")
    assert np.array_equal(np.asarray(model.generate("a red circle", steps=2)[0], dtype=int), drawn["nf4"])

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert draw(*asked, "--text-encoder-quantization", "nf4", "--out", tmp_path / "no") == 2
    assert "text_encoder_quantization nf4 needs bitsandbytes: pip install" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    with pytest.raises(UserError, match="text_encoder_quantization int8 needs bitsandbytes"):
        TextToImage.load(tiny, text_encoder_quantization="int8")


def test_adapters_whose_text_encoder_was_in_few_bits_go_with_others(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    """Their null captions are the same to rounding."""
    pytest.importorskip("bitsandbytes")
    other = make_adapter(tiny, tmp_path / "other", quantization="nf4")
    assert len(TextToImage.load(tiny, lora=[adapter, other]).adapters) == 2


def test_other_options_win_and_what_they_leave_without_use_is_set_aside(tiny: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a" / "000-a-circle-seed3.png"
    words = [
        "--sampler",
        "edm",
        "--spacing",
        "exponential",
        "--s-churn",
        "2",
        "--negative-prompt",
        "b",
        "--width",
        "96",
    ]
    assert (
        draw("--model", tiny, "--prompt", "a circle", "--seed", 3, "--steps", 2, "--out", picture.parent, *words) == 0
    )
    recipe = read_recipe(picture)

    def again(*words: object) -> dict[str, Any]:
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        assert draw("--from", picture, "--out", tmp_path / "b", *words) == 0
        return read_recipe(next((tmp_path / "b").glob("[0c]*.png")))

    changed = again("--sampler", "ddpm", "--guidance", 1, "--aspect-ratio", "1:1")
    assert (
        changed["options"] == {"spacing": "iddpm", "clip_x0": None, "variance": "beta_tilde"}
        and changed["negative_prompt"] == ""
    )
    assert (changed["prompt"], changed["seed"], changed["steps"], changed["width"]) == ("a circle", 3, 2, 64)
    assert again("--guidance", 3) == recipe | {"guidance": 3.0}
    assert again("--spacing", "karras")["options"] == recipe["options"] | {"spacing": "karras", "rho": 7.0}
    (tmp_path / "prompts.txt").write_text("another")
    assert again("--prompts-file", tmp_path / "prompts.txt") == recipe | {"prompt": "another"}
    sheet = again("--compare", "--compare-samplers", "[ddim]", "--compare-steps", "[1]", "--device", "cpu")
    assert (sheet["sampler"], sheet["steps"]) == (["ddim"], [1])
    values = config_of(tmp_path / "b" / "compare-000.png")
    assert (values["compare"], values["compare_samplers"], values["compare_steps"]) == (True, ["ddim"], [1])
    assert "sampler" not in values and "steps" not in values


def test_what_is_wrong_with_a_recipe_is_one_message(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, recipe = tmp_path / "a.png", {"prompt": "a", "model": str(tiny), "steps": 1}

    def error(*words: str, **changes: object) -> str:
        save_png(Image.new("RGB", (8, 8)), file, {k: v for k, v in (recipe | changes).items() if v is not None})
        assert draw("--from", file, "--out", tmp_path / "out", *words) == 2
        lines = capsys.readouterr().err
        assert "Traceback" not in lines and not (tmp_path / "out").exists()
        return lines

    assert f"error: {file}: 2 problems" in (found := error(steps="many", sampler="dimm"))
    assert '  - steps is "many"; expected integer' in found and '  - sampler is "dimm"; expected ddpm' in found
    assert "prompts[0] is null; expected [text, ...]" in error(prompt=None)
    assert "lora[0] is 7; expected [path, ...]" in error(adapter={"path": 7, "scale": 1.0})
    assert "lora_scale is null; expected [number" in error(adapter={"path": "x"})
    assert f"{file} is a sheet of several pictures" in error(pictures=["b.png"])
    assert f"{file} was drawn while the run mine trained, at step 5; give --lora" in error(run="mine", step=5)
    assert "--config and --from exclude each other" in (found := error("--config", "x", "--stpes", "3"))
    assert "stpes: unknown key; did you mean steps?" in found
    assert "out of bounds" not in error(options=[1, 2], steps=0) and error(steps=0).count("\n") == 1
    for damaged in ("[]", "7", '"text"', "{", "[" * 10_000):
        chunk = PngInfo()
        chunk.add_text("pixart_ft", damaged)
        Image.new("RGB", (8, 8)).save(file, pnginfo=chunk)
        assert draw("--from", file) == 2 and "a.png holds no recipe" in capsys.readouterr().err
    assert draw("--from", tmp_path / "absent.png") == 2 and "absent.png: no such picture" in capsys.readouterr().err


def test_what_changed_since_a_picture_was_drawn_is_told(tiny: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    lora = make_adapter(base, tmp_path / "lora")
    words = ("--prompt", "a", "--steps", 1, "--model", base, "--lora", lora, "--out", tmp_path / "a")
    assert draw(*words) == 0
    picture = tmp_path / "a" / "000-a-seed0.png"
    shutil.rmtree(lora)
    make_adapter(base, lora, seed=1)
    with pytest.warns(UserWarning, match=r"a-seed0.png may come out otherwise: the adapter's weights changed since"):
        draw("--from", picture, "--out", tmp_path / "b")
    old = read_recipe(picture)
    save_png(Image.open(picture), picture, old | {"versions": old["versions"] | {"torch": "1.0"}})
    with pytest.warns(UserWarning, match=r"the adapter's weights, torch \(1\.0, now 2"):
        draw("--from", picture, "--out", tmp_path / "c")


def test_an_older_picture_keeps_the_variance_that_it_was_drawn_by(tmp_path: Path) -> None:
    """It names no format of its recipe; `learned` meant then what `learned_range` means now."""

    def kept(name: str, recipe: dict[str, Any]) -> Path:
        chunk = PngInfo()
        chunk.add_text(RECIPE_KEY, json.dumps(recipe))
        Image.new("RGB", (8, 8)).save(tmp_path / name, pnginfo=chunk)
        return tmp_path / name

    now = {"prompt": "red", "sampler": "iddpm", "options": {"spacing": "iddpm", "variance": "learned"}}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "new.png", now)
    assert read_recipe(tmp_path / "new.png") == now and config_of(tmp_path / "new.png")["variance"] == "learned"
    assert config_of(kept("old.png", now))["variance"] == "learned_range"
    fixed = now | {"options": {"variance": "beta_tilde"}}
    assert read_recipe(kept("fixed.png", fixed)) == fixed
    sheet = kept("sheet.png", now | {"sampler": ["ddim", "iddpm"], "steps": [4], "options": {}})
    with pytest.warns(UserWarning, match=r"the row iddpm of .*sheet\.png was drawn by what is variance learned_range"):
        assert "variance" not in config_of(sheet)


def test_other_programs_read_the_parameters(tiny: Path, tmp_path: Path) -> None:
    recipe = {
        "prompt": "a red apple,\non wood 犬",
        "negative_prompt": "blur: bad",
        "steps": 30,
        "sampler": "ddim",
        "guidance": 4.5,
        "seed": 7,
        "width": 96,
        "height": 64,
        "fingerprint": "0123abcd",
        "model": "my models, old",
        "adapter": {"path": "runs/x", "scale": 0.5},
        "image": None,
        "strength": 0.6,
        "versions": {"pixart_ft": "0.1.0"},
    }
    text = (
        "a red apple,\non wood 犬\nNegative prompt: blur: bad\n"
        "Steps: 30, Sampler: ddim, CFG scale: 4.5, Seed: 7, Size: 96x64, Model hash: 0123abcd, "
        'Model: "my models, old", Lora: runs/x, Lora scale: 0.5, Version: pixart_ft 0.1.0'
    )
    assert parameters(recipe) == text
    assert "Denoising strength: 0.6" in parameters(recipe | {"image": "a.png"})
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", recipe)
    with Image.open(tmp_path / "a.png") as stored:
        chunks = stored.text  # type: ignore[attr-defined]
    assert chunks["parameters"] == text and json.loads(chunks["pixart_ft"]) == recipe
    save_png(Image.new("RGB", (8, 8)), tmp_path / "grid.png", {"pictures": ["a.png"]})
    with Image.open(tmp_path / "grid.png") as stored:
        assert "parameters" not in stored.text  # type: ignore[attr-defined]
    assert parameters({"prompt": "caf\udce9", "seed": 0}) == "caf\\udce9\nSeed: 0"


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"text\.png holds no recipe"):
        config_of(tmp_path / "text.png")
