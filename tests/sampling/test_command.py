"""The generate command on the tiny pipeline: files, recipes, and what a second run does.

Oracle: the bytes on the disk, and pictures drawn again from a recipe alone.
"""

import hashlib
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageStat

from pixart_ft.config.generate import GenerateConfig
from pixart_ft.config.samplers import EVERY_SAMPLER
from pixart_ft.data.folders import read_folder
from pixart_ft.errors import UserError
from pixart_ft.pictures.recipes import config_of, read_recipe
from pixart_ft.pictures.sheets import grid
from pixart_ft.sampling.command import run_generation
from pixart_ft.sampling.settings import Settings
from pixart_ft.sampling.text_to_image import TextToImage
from tests.helpers.adapters import make_adapter
from tests.helpers.pictures import path_of

PROMPTS = ("a red circle on grey", "Ein Käfer, über/unter ..\\" + " lang" * 30)


def config(tiny: Path, out: Path, **changes: object) -> GenerateConfig:
    values: dict[str, object] = {
        "model": str(tiny),
        "prompts": PROMPTS,
        "steps": 3,
        "sampler": "ddpm",
        "seed": 5,
        "images_per_prompt": 2,
        "batch_size": 3,
        "device": "cpu",
        "out": out,
    }
    return GenerateConfig(**{**values, **changes})  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny, tmp_path_factory.mktemp("adapter") / "adapter")


def test_pictures_grid_and_summary(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = run_generation(config(tiny, tmp_path / "out"))
    names = [path.name for path in paths]
    assert names == [
        "000-a-red-circle-on-grey-seed5.png",
        "000-a-red-circle-on-grey-seed6.png",
        "001-ein-k-fer-ber-unter-lang-lang-lang-lang-seed5.png",
        "001-ein-k-fer-ber-unter-lang-lang-lang-lang-seed6.png",
    ]
    assert list(contents(tmp_path / "out")) == [*names, "grid.png"]
    pictures = [Image.open(path) for path in paths]
    labels: dict[str, Any] = {"row_labels": PROMPTS, "column_labels": ["seed 5", "seed 6"]}
    expected = grid([pictures[:2], pictures[2:]], cell=64, **labels)
    assert Image.open(tmp_path / "out" / "grid.png").tobytes() == expected.tobytes()
    printed = capsys.readouterr().out
    assert "pictures drawn: 4 in" in printed
    assert "each batch: 3 ddpm steps, 3 network calls, with and without the prompt\n" in printed
    assert str(tmp_path / "out" / "grid.png") in printed


def test_captions_beside_the_pictures_make_a_folder_to_train_on(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What data.prior wants; a caption that was edited stays when the command is run again."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    asked = config(tiny, tmp_path / "out", prompts=(), prompts_file=tmp_path / "prompts.txt", captions=True)
    paths = run_generation(asked)
    assert [(path_of(row), row.caption) for row in read_folder(tmp_path / "out")] == [
        (path, PROMPTS[number // 2]) for number, path in enumerate(paths)
    ]
    paths[0].with_suffix(".txt").write_text("a circle")
    run_generation(asked)
    assert [row.caption for row in read_folder(tmp_path / "out")] == ["a circle", PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert "each with its caption: --data.prior or --data.folder takes it" in capsys.readouterr().out


def test_same_command_twice_is_bit_identical(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_generation(config(tiny, tmp_path / name, lora=(adapter,)))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"sampler": "iddpm", "guidance_interval": (100.0, 900.0), "negative_prompt": "black"},
        {"sampler": "edm", "s_churn": 1.5, "rho": 5.0, "schedule": "cosine", "time_conditioning": "index"},
        {"sampler": "score_sde", "corrector_first": True, "corrector_steps": 2, "aspect_ratio": "2:1"},
        {"sampler": "ddim", "image": "003.png", "strength": 0.4, "inversion": True},
        {"sampler": "dpm++_sde", "spacing": "karras", "schedule": "cosine", "steps": 4},
    ],
    ids=lambda choices: choices.get("sampler", "ddpm"),
)
def test_recipe_is_enough_to_draw_the_picture_again(
    tiny: Path,
    adapter: Path,
    pictures: Path,
    tmp_path: Path,
    choices: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "image" in choices:
        choices = choices | {"image": pictures / choices["image"]}
    asked = config(tiny, tmp_path / "out", lora=(adapter,), lora_scale=(0.7,), prompts=("a circle",), **choices)
    path = run_generation(asked)[1]
    assert ("aspect_ratio 2:1: 96 x 48 pixels\n" in capsys.readouterr().out) == ("aspect_ratio" in choices)
    recipe: dict[str, Any] = read_recipe(path)
    model = TextToImage.load(
        recipe["model"],
        lora=recipe["adapter"]["path"],
        lora_scale=recipe["adapter"]["scale"],
    )
    assert recipe["fingerprint"] == model.fingerprint
    assert recipe["versions"]["torch"]
    shared = [
        "sampler",
        "steps",
        "guidance",
        "negative_prompt",
        "schedule",
        "time_conditioning",
        "strength",
        "inversion",
    ]
    assert all(recipe[key] == getattr(asked, key) for key in shared)
    assert recipe["guidance_interval"] == (asked.guidance_interval and list(asked.guidance_interval))
    values = {field.name: recipe[field.name] for field in fields(Settings)}
    assert tuple(values["options"]) == EVERY_SAMPLER[values["sampler"]].options  # as used, and none of another's
    assert values["options"].items() >= Settings.of(asked).options.items()
    values["image"] = None if values["image"] is None else Path(values["image"])
    settings = Settings(**values)
    assert (settings.width, settings.height) == ((96, 48) if "aspect_ratio" in choices else (64, 64))
    again = model.generate(recipe["prompt"], seeds=[5, recipe["seed"]], settings=settings)[1]
    assert again.tobytes() == Image.open(path).tobytes()
    assert ("image_sha256" in recipe) == ("image" in choices)


def test_kernels_are_timed_once_said_and_part_of_the_recipe(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pictures are the same to rounding, and a recipe names what was asked for."""
    drawn = {}
    for name in ("by_shape", "headwise", "auto"):
        path = run_generation(config(tiny, tmp_path / name, attention=name))[0]
        drawn[name] = np.asarray(Image.open(path), dtype=int)
        assert read_recipe(path).get("attention", "by_shape") == name
        assert config_of(path).get("attention", "by_shape") == name
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("attention: ")]
        assert len(lines) == (name == "auto")
    # both branches of a batch of three pictures, 16 tokens each, forward alone
    assert "; forward of 6 x 16 tokens, " in lines[0]
    assert all(abs(picture - drawn["by_shape"]).max() <= 1 for picture in drawn.values())


def test_kernels_that_do_not_run_are_refused_first(weightless: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="attention xformers cannot run on cpu here"):
        run_generation(config(weightless, tmp_path / "out", attention="xformers"))
    assert not (tmp_path / "out").exists()


def test_second_run_draws_only_what_is_missing(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = config(tiny, tmp_path, batch_size=1)  # so that a batch is the same in both runs
    paths = run_generation(same)
    first = contents(tmp_path)
    paths[2].unlink()
    kept = {path: path.stat().st_mtime_ns for path in paths if path.exists()}
    capsys.readouterr()
    run_generation(same)
    assert "pictures drawn: 1 in" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(tmp_path) == first
    run_generation(same)
    assert "pictures drawn: 0 in" in capsys.readouterr().out


def test_pictures_of_another_recipe_are_never_replaced(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    paths = run_generation(config(tiny, tmp_path))
    Image.new("RGB", (8, 8)).save(paths[3])  # the user's own picture by that name
    paths[1].unlink()
    before = contents(tmp_path)
    with pytest.raises(UserError) as caught:
        run_generation(config(tiny, tmp_path, steps=4, lora=(adapter,)))
    report = str(caught.value)
    assert f"{paths[0]} was made by another recipe: steps 3 (now 4), another adapter" in report
    assert str(paths[2]) in report and f"{paths[3]} holds no recipe" in report and "--out" in report
    assert contents(tmp_path) == before


@pytest.fixture(scope="module")
def weightless(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that is refused as soon as any weights are loaded."""
    base = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("weightless") / "base"))
    for path in base.rglob("*.safetensors"):
        path.unlink()
    return base


def test_destinations_are_tried_before_any_weights_are_loaded(weightless: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out, reason in (
        (tmp_path / "file", "a file is in the way of a folder"),
        (tmp_path / "file" / "below", "a part of this path is a file"),
        (tmp_path / "new" / ("x" * 300), "the name is too long"),
        (tmp_path / ("x" * 300), "the name is too long"),
        (Path("/proc/out"), "there is no such file or folder"),
    ):
        with pytest.raises(UserError, match=f"^out: {re.escape(str(out))} cannot be written: {reason}"):
            run_generation(config(weightless, out))
    with pytest.raises(UserError, match="cannot load text_encoder"):
        run_generation(config(weightless, tmp_path / "new"))
    assert contents(tmp_path) == {"file": b""}


def test_a_grid_of_the_users_own_is_never_overwritten(weightless: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    before = contents(tmp_path)
    with pytest.raises(
        UserError, match=r"grid\.png is there and is no sheet by pixart_ft\nthey are left as they are; choose"
    ):
        run_generation(config(weightless, tmp_path))
    assert contents(tmp_path) == before


def test_adapter_trained_anew_at_the_same_path_is_another_recipe(tiny: Path, tmp_path: Path) -> None:
    lora = make_adapter(tiny, tmp_path / "adapter")
    run_generation(config(tiny, tmp_path / "out", lora=(lora,)))
    make_adapter(tiny, lora, seed=1)
    with pytest.raises(UserError, match="another adapter"):
        run_generation(config(tiny, tmp_path / "out", lora=(lora,)))


def test_prompts_of_a_file(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n a black circle \n\na blue square\n")
    paths = run_generation(config(tiny, tmp_path, prompts=("a circle",), prompts_file=file, images_per_prompt=1))
    assert [read_recipe(path)["prompt"] for path in paths] == ["a circle", "a black circle", "a blue square"]
    file.write_text("\n\n")
    with pytest.raises(UserError, match=r"prompts_file \(.*prompts\.txt\) holds none"):
        run_generation(config(tiny, tmp_path, prompts=(), prompts_file=file))
    with pytest.raises(UserError, match=r"prompts_file: there is no file .*absent\.txt"):
        run_generation(config(tiny, tmp_path, prompts_file=tmp_path / "absent.txt"))


def test_device_and_settings_that_cannot_be_used_leave_nothing(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="device: 'gpu' cannot be used here"):
        run_generation(config(tiny, tmp_path / "out", device="gpu"))
    with pytest.raises(UserError, match="sampler ddpm does not use eta"):
        run_generation(config(tiny, tmp_path / "out", eta=0.5))
    with pytest.raises(UserError, match="sigma_max 200 must lie in order within this schedule's noise levels"):
        run_generation(config(tiny, tmp_path / "out", sampler="euler", sigma_max=200.0))
    with pytest.raises(UserError, match="aspect_ratio is 'wide'; write width:height"):
        run_generation(config(tiny, tmp_path / "out", aspect_ratio="wide"))
    with pytest.raises(UserError, match=r"image: there is no file .*absent\.png"):
        run_generation(config(tiny, tmp_path / "out", image=tmp_path / "absent.png"))
    assert not (tmp_path / "out").exists()


def test_a_picture_to_start_from_is_part_of_the_recipe(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    """Not its name alone: another picture at the same path is another recipe."""
    photo = tmp_path / "photo.png"
    photo.write_bytes((pictures / "003.png").read_bytes())
    asked = config(tiny, tmp_path / "out", prompts=("a circle",), steps=5, image=photo, strength=0.4)
    paths = run_generation(asked)
    assert read_recipe(paths[0])["image_sha256"] == hashlib.sha256(photo.read_bytes()).hexdigest()
    photo.write_bytes((pictures / "004.png").read_bytes())
    with pytest.raises(UserError, match="was made by another recipe: image_sha256 '"):
        run_generation(asked)


@pytest.mark.parametrize(
    ("choices", "cost"),
    [
        ({"sampler": "edm", "guidance": 1.0}, "each batch: 3 edm steps, 5 network calls"),
        ({"sampler": "ddim", "steps": 5, "image": "003.png", "strength": 0.6, "inversion": True},
         "each batch: 5 ddim steps, 5 network calls, with and without the prompt"),
    ],
    ids=["edm", "inversion"],
)  # fmt: skip
def test_the_cost_is_printed(
    tiny: Path, pictures: Path, tmp_path: Path, choices: dict[str, Any], cost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = {key: pictures / value if key == "image" else value for key, value in choices.items()}
    run_generation(config(tiny, tmp_path / "out", **choices))
    assert cost in capsys.readouterr().out.splitlines()


def test_the_calls_of_an_adaptive_solver_are_counted(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = {"sampler": "pf_ode", "steps": 30, "tolerance": 0.5, "prompts": ("a circle",)}
    run_generation(config(tiny, tmp_path / "out", **choices))
    printed = capsys.readouterr().out
    found = re.search(r"^each picture: pf_ode to tolerance 0\.5, about (\d+) network calls, with and", printed, re.M)
    assert found, printed
    model, inputs = TextToImage.load(tiny), []
    model.transformer.register_forward_pre_hook(lambda _, args: inputs.append(len(args[0])))
    settings = Settings(sampler="pf_ode", options={"tolerance": 0.5})
    model.generate("a circle", seeds=[5, 6], settings=settings)
    assert int(found[1]) == round(len(inputs) / 2) > 10
    run_generation(config(tiny, tmp_path / "out", **choices))  # nothing left to draw, nothing known of the cost
    assert "each picture: pf_ode to tolerance 0.5\n" in capsys.readouterr().out


def test_tiles_are_decoded_to_nearly_the_same_picture(tiny: Path, tmp_path: Path) -> None:
    choices: dict[str, Any] = {"prompts": ("a circle",), "images_per_prompt": 1, "width": 128, "height": 128}
    whole, tiled = (
        Image.open(run_generation(config(tiny, tmp_path / str(tiling), tiling=tiling, **choices))[0])
        for tiling in (False, True)
    )
    assert tiled.size == (128, 128) and tiled.tobytes() != whole.tobytes()
    away = ImageStat.Stat(ImageChops.difference(tiled, whole)).mean
    assert max(away) < 0.5 * max(ImageStat.Stat(whole).stddev)


def test_a_grid_has_no_more_cells_than_room(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pixart_ft.sampling.command.GRID_PIXELS", 64)  # two cells of the least size
    run_generation(config(tiny, tmp_path, prompts=("a", "red", "blue"), steps=1, images_per_prompt=3, sampler="ddim"))
    shown = ["000-a-seed5.png", "000-a-seed6.png", "001-red-seed5.png", "001-red-seed6.png"]
    assert read_recipe(tmp_path / "grid.png") == {"pictures": shown}
    cells = [
        [Image.open(tmp_path / name).resize((32, 32), Image.Resampling.LANCZOS) for name in row]
        for row in (shown[:2], shown[2:])
    ]
    labels: dict[str, Any] = {"row_labels": ["a", "red"], "column_labels": ["seed 5", "seed 6"]}
    assert Image.open(tmp_path / "grid.png").size == grid(cells, cell=32, **labels).size
