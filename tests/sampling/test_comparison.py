"""The sheet of samplers times steps on the tiny pipeline. Oracles: pictures drawn one by one, the network's own calls,
and the ink on the sheet."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from pixart_ft.cli import main
from pixart_ft.config.generate import GenerateConfig
from pixart_ft.config.samplers import SAMPLERS
from pixart_ft.errors import UserError
from pixart_ft.pictures.recipes import read_recipe
from pixart_ft.pictures.sheets import grid
from pixart_ft.sampling import comparison
from pixart_ft.sampling.command import run_generation
from pixart_ft.sampling.settings import Settings
from pixart_ft.sampling.text_to_image import TextToImage
from tests.helpers.tiny import build_tiny_pipeline

PROMPTS = ("a red circle", "a black square on pink")
ROWS, COLUMNS = ("iddpm", "edm", "annealed_langevin"), (1, 3)
CALLS = {"iddpm": (1, 3), "edm": (1, 5), "annealed_langevin": (4, 10)}


def config(base: Path, out: Path, **changes: Any) -> GenerateConfig:
    values: dict[str, Any] = {
        "model": str(base),
        "prompts": PROMPTS,
        "seed": 5,
        "device": "cpu",
        "dtype": "float32",
        "out": out,
        "compare": True,
        "compare_samplers": ROWS,
        "compare_steps": COLUMNS,
    }
    return GenerateConfig(**values | changes)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is laid out on each sheet from now on, beside its pictures."""
    sheets: list[dict[str, Any]] = []

    def kept(rows: Sequence[Sequence[Image.Image]], **labels: Any) -> Image.Image:
        sheets.append(labels | {"rows": rows})
        return grid(rows, **labels)

    monkeypatch.setattr(comparison, "grid", kept)
    return sheets


def test_a_sheet_for_each_prompt_with_labels_and_cost(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sheets = spied(monkeypatch)
    paths = run_generation(config(tiny, tmp_path / "out"))
    assert [path.name for path in paths] == ["compare-000.png", "compare-001.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [path.name for path in paths]
    printed = capsys.readouterr().out
    model = TextToImage.load(tiny)
    for prompt, path, sheet in zip(PROMPTS, paths, sheets, strict=True):
        assert f"{prompt}: {path}\n" in printed
        assert sheet["row_labels"] == ["iDDPM", "EDM (Heun)", "Annealed Langevin"]
        assert sheet["column_labels"] == ["1 step", "3 steps"]
        for row, name in enumerate(ROWS):
            for column, steps in enumerate(COLUMNS):
                shown = sheet["rows"][row][column]
                (alone,) = model.generate(prompt, sampler=name, steps=steps, seeds=[5])
                assert shown.tobytes() == alone.tobytes()
                assert re.fullmatch(rf"{CALLS[name][column]} calls, \d+\.\d s", sheet["captions"][row][column])
        recipe = read_recipe(path)
        assert (recipe["prompt"], recipe["seed"], recipe["model"]) == (prompt, 5, str(tiny))
        assert (recipe["sampler"], recipe["steps"], recipe["options"]) == (list(ROWS), list(COLUMNS), {})
        stored = Image.open(path)
        labels = {key: sheet[key] for key in ("row_labels", "column_labels", "captions")} | {"title": prompt}
        assert stored.tobytes() == grid(sheet["rows"], cell=64, **labels).tobytes()
        assert ImageChops.difference(stored, Image.new("RGB", stored.size, "white")).getbbox()


def test_the_cost_is_what_the_network_was_called(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell of every prompt, and one call before the clock starts."""
    inputs: list[int] = []
    of = TextToImage.of.__func__  # type: ignore[attr-defined]

    def watched(*args: Any, **kwargs: Any) -> TextToImage:
        model: TextToImage = of(TextToImage, *args, **kwargs)
        model.transformer.register_forward_pre_hook(lambda _, args: inputs.append(len(args[0])))
        return model

    monkeypatch.setattr(TextToImage, "of", watched)
    run_generation(config(tiny, tmp_path))
    cells = sum(sum(calls) for calls in CALLS.values())
    assert inputs == [2] * (1 + len(PROMPTS) * cells)


def test_settings_that_samplers_share_reach_every_cell(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheets = spied(monkeypatch)
    shared: dict[str, Any] = {"guidance": 1.0, "image": pictures / "003.png", "strength": 0.5, "aspect_ratio": "2:1"}
    run_generation(config(tiny, tmp_path, prompts=PROMPTS[:1], compare_steps=(4,), **shared))
    (sheet,) = sheets
    size: dict[str, Any] = {"width": 96, "height": 48}
    model = TextToImage.load(tiny)
    for name, (shown,), (caption,) in zip(ROWS, sheet["rows"], sheet["captions"], strict=True):
        settings = Settings(sampler=name, steps=4, guidance=1.0, image=shared["image"], strength=0.5, **size)
        (alone,) = model.generate(PROMPTS[0], seeds=[5], settings=settings)
        assert shown.size == (96, 48) and shown.tobytes() == alone.tobytes()
        calls = {"iddpm": 2, "edm": 3, "annealed_langevin": 7}[name]
        assert caption.startswith(f"{calls} calls, ")


def test_cells_that_cannot_be_drawn_are_all_named_before_any_is(tmp_path: Path) -> None:
    four = build_tiny_pipeline(tmp_path / "four", out_channels=4)
    with pytest.raises(UserError) as caught:
        steps = {"compare_steps": (0, 3, 1001)}  # past the bounds of the configuration
        run_generation(config(four, tmp_path / "out").model_copy(update=steps))
    bare = "sampler iddpm steps by a learned variance, and this network has no variance channels; use ddpm"
    assert str(caught.value).splitlines() == [
        "iddpm with 0 steps: steps must be at least 1, got 0",
        bare,
        f"iddpm with 3 steps: {bare}",
        f"iddpm with 1001 steps: {bare}",
        "sampler iddpm: cannot take 1001 steps of a process of 1000; choose 1 to 1000",
        "edm with 0 steps: steps must be at least 1, got 0",
        "annealed_langevin with 0 steps: steps must be at least 1, got 0",
        "leave these out of compare_samplers or compare_steps",
    ]
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"^edm with 1 steps: inversion is DDIM backwards"):
        photo = tmp_path / "photo.png"
        Image.new("RGB", (64, 64)).save(photo)
        rows = {"compare_samplers": ("ddim", "edm"), "compare_steps": (1,)}
        run_generation(config(four, tmp_path / "out", image=photo, inversion=True, **rows))


def test_the_command_line_compares_every_sampler_there_is(tiny: Path, tmp_path: Path) -> None:
    line = ["generate", "--prompt", PROMPTS[0], "--model", str(tiny), "--device", "cpu", "--out", str(tmp_path)]
    names = f"[{', '.join(SAMPLERS)}]"
    assert main([*line, "--compare", "--compare-samplers", names, "--compare-steps", "[2]"]) == 0
    sheet = Image.open(tmp_path / "compare-000.png")
    assert sheet.height > len(SAMPLERS) * 64
    assert sheet.width < 5 * 64


def test_a_sheet_that_is_there_is_never_overwritten_by_another(tiny: Path, tmp_path: Path) -> None:
    small = {"compare_samplers": ("ddim",), "compare_steps": (1,)}
    out = tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (8, 8)).save(out / "compare-001.png")
    mine = (out / "compare-001.png").read_bytes()
    with pytest.raises(UserError, match=r"compare-001\.png is there and is no sheet by pixart_ft"):
        run_generation(config(tiny, out, **small))
    assert [path.name for path in out.iterdir()] == ["compare-001.png"]
    assert (out / "compare-001.png").read_bytes() == mine
    (out / "compare-001.png").unlink()
    for _ in range(2):  # the same again is measured anew
        run_generation(config(tiny, out, **small))
    with pytest.raises(UserError, match=r"compare-000\.png was made by another recipe: seed 5 \(now 6\)"):
        run_generation(config(tiny, out, **small, seed=6))
