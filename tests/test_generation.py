"""The generate command on the tiny pipeline: files, recipes, and what a second run does.

Oracle: the bytes on the disk, and pictures drawn again from a recipe alone.
"""

from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from pixart_ft.config import GenerateConfig
from pixart_ft.errors import UserError
from pixart_ft.generation import run_generation
from pixart_ft.pictures import grid, read_recipe
from pixart_ft.text_to_image import Settings, TextToImage
from tests.test_text_to_image import make_adapter

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
    labels = {"row_labels": PROMPTS, "column_labels": ["seed 5", "seed 6"]}
    expected = grid([pictures[:2], pictures[2:]], cell=64, **labels)
    assert Image.open(tmp_path / "out" / "grid.png").tobytes() == expected.tobytes()
    printed = capsys.readouterr().out
    assert "pictures drawn: 4 in" in printed and "3 network calls, with and without the prompt" in printed
    assert str(tmp_path / "out" / "grid.png") in printed


def test_same_command_twice_is_bit_identical(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_generation(config(tiny, tmp_path / name, lora=adapter))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_recipe_is_enough_to_draw_the_picture_again(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    path = run_generation(config(tiny, tmp_path / "out", lora=adapter, lora_scale=0.7, prompts=("a circle",)))[1]
    recipe = read_recipe(path)
    model = TextToImage.load(
        recipe["model"],  # type: ignore[arg-type]
        lora=recipe["adapter"]["path"],  # type: ignore[index]
        lora_scale=recipe["adapter"]["scale"],  # type: ignore[index]
    )
    assert recipe["fingerprint"] == model.fingerprint
    assert recipe["versions"]["torch"]  # type: ignore[index]
    settings = {field.name: recipe[field.name] for field in fields(Settings)}
    assert (settings["variance"], settings["width"]) == ("learned", 64)  # as used, not "auto"
    again = model.generate(recipe["prompt"], seeds=[0, recipe["seed"]], **settings)[1]  # type: ignore[arg-type,list-item]
    assert again.tobytes() == Image.open(path).tobytes()


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
        run_generation(config(tiny, tmp_path, steps=4, lora=adapter))
    report = str(caught.value)
    assert f"{paths[0]} was made by another recipe: steps 3 (now 4), another adapter" in report
    assert str(paths[2]) in report and f"{paths[3]} holds no recipe" in report and "--out" in report
    assert contents(tmp_path) == before


def test_adapter_trained_anew_at_the_same_path_is_another_recipe(tiny: Path, tmp_path: Path) -> None:
    lora = make_adapter(tiny, tmp_path / "adapter")
    run_generation(config(tiny, tmp_path / "out", lora=lora))
    make_adapter(tiny, lora, seed=1)
    with pytest.raises(UserError, match="another adapter"):
        run_generation(config(tiny, tmp_path / "out", lora=lora))


def test_prompts_of_a_file(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n a black circle \n\na blue square\n")
    paths = run_generation(config(tiny, tmp_path, prompts=("a circle",), prompts_file=file, images_per_prompt=1))
    assert [read_recipe(path)["prompt"] for path in paths] == ["a circle", "a black circle", "a blue square"]
    file.write_text("\n\n")
    with pytest.raises(UserError, match=r"prompts_file \(.*prompts\.txt\) holds none"):
        run_generation(config(tiny, tmp_path, prompts=(), prompts_file=file))
    with pytest.raises(UserError, match=r"prompts_file: cannot read .*absent\.txt"):
        run_generation(config(tiny, tmp_path, prompts_file=tmp_path / "absent.txt"))


def test_device_and_settings_that_cannot_be_used_leave_nothing(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="device: 'gpu' cannot be used here"):
        run_generation(config(tiny, tmp_path / "out", device="gpu"))
    with pytest.raises(UserError, match=r"eta .* is for DDIM"):
        run_generation(config(tiny, tmp_path / "out", eta=0.5))
    assert not (tmp_path / "out").exists()
