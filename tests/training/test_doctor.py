"""The doctor, by what it prints. Oracle: expected output."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from pixart_ft import cli
from pixart_ft.config.train import load_config
from pixart_ft.model.base import Base
from pixart_ft.training import doctor
from pixart_ft.training.start import look, with_precision
from tests.helpers.tiny import edit

MACHINE = ("python", "processor", "precision", "bitsandbytes", "xformers", "compiler", "disk")


@pytest.fixture(scope="module")
def one_block(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with half its blocks, of which the doctor reads no weight; read only."""
    base = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("one_block") / "base"))
    edit(base / "transformer" / "config.json", num_layers=1)
    return base


@pytest.fixture
def plan(tmp_path: Path, one_block: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line for a training that could begin."""
    monkeypatch.chdir(tmp_path)
    return ["doctor", "--model.base", str(one_block), "--data.folder", str(pictures), "--data.resolution=64"]


def printed(capsys: pytest.CaptureFixture[str], line: list[str], code: int = 0) -> tuple[dict[str, str], str]:
    """The facts by their names, and what went to stderr."""
    assert cli.main(line) == code
    out, err = capsys.readouterr()
    lines = [found for found in out.splitlines() if found]
    assert max(map(len, lines)) <= 160
    return {found[:18].strip(): found[18:].strip() for found in lines}, err


def test_without_a_configuration_the_machine_alone_is_looked_at(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, _ = printed(capsys, ["doctor"])
    assert set(MACHINE) <= set(found) and "base" not in found and "memory" not in found
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_fits(capsys: pytest.CaptureFixture[str], plan: list[str]) -> None:
    found, _ = printed(capsys, [*plan, "--prompt", "red circle"])
    assert "64 x 64 pixels" in found["base"] and found["its output"] == "epsilon, a learned variance"
    assert found["pictures"].endswith("64 x 64 pixels") and found["length"].startswith("1,000 steps")
    assert "captions by tokens" in found
    assert all("GiB" in found[stage] for stage in ("captions by T5", "pictures by VAE", "training", "sample grid"))
    assert any(name.startswith("it fits") for name in found)
    assert not Path("runs").exists() and not Path(".cache").exists()


def test_one_that_does_not_says_what_would(capsys: pytest.CaptureFixture[str], plan: list[str]) -> None:
    """On a card whose last 5 MB are not CUDA's own."""
    line = [*plan, "--train.batch_size=128", "--card", "0.505"]
    found, err = printed(capsys, line, code=2)
    assert "an NVIDIA GPU of 0.50 GiB, precision bf16" in found["device"]
    assert "training needs" in err
    fitting = [remedy for remedy in err.splitlines() if " fits " in remedy]
    assert any("--train.batch_size 1 --train.accumulation 128" in remedy for remedy in fitting)


@pytest.mark.parametrize("key", ["folder", "sources"])
def test_pictures_and_captions_are_reported_and_shown(
    capsys: pytest.CaptureFixture[str], plan: list[str], pictures: Path, tmp_path: Path, key: str
) -> None:
    if key == "sources":
        plan[plan.index("--data.folder") :] = ["--data.sources", f"[{{folder: {pictures}}}]", "--data.resolution=64"]
    found, _ = printed(capsys, [*plan, "--sheet", "sheets/mine.png"])
    assert found["picture sizes"] == "64 x 64" and re.match(r"\d+ to \d+, half of them up to", found["caption tokens"])
    assert found["first pairs"] == '000.png: "a red circle on grey"' and found["contact sheet"] == "sheets/mine.png"
    bars = [int(bar.split()[-1]) for name, bar in found.items() if re.fullmatch(r"\d+( to \d+)?", name)]
    assert sum(bars) == 12
    with Image.open(tmp_path / "sheets/mine.png") as sheet:
        assert sheet.width > 1000
    assert cli.main(["doctor", "--sheet=a.png"]) == 2
    assert "--sheet shows the pictures of a training" in capsys.readouterr().err
    (tmp_path / "photo.png").write_bytes(b"of somebody")
    assert cli.main([*plan, "--sheet=photo.png"]) == 2
    assert "photo.png is there and is no sheet by pixart_ft" in capsys.readouterr().err


def test_the_longest_caption_may_be_of_the_prior(plan: list[str], pictures: Path, tiny: Path, tmp_path: Path) -> None:
    prior = tmp_path / "prior"
    shutil.copytree(pictures, prior)
    lines = (prior / "metadata.jsonl").read_text().splitlines()
    long = json.loads(lines[0]) | {"text": "a red circle " * 9}
    (prior / "metadata.jsonl").write_text("\n".join([json.dumps(long), *lines[1:]]))
    own = {"model": {"base": tiny}, "data": {"folder": pictures, "resolution": 64}}
    alone, both = (load_config(own, {"data.prior": more} if more else {}) for more in (None, prior))
    base = Base.read(tiny)
    few, many = (
        doctor._longest(config, base, look(with_precision(config), None).overview(config.data))
        for config in (alone, both)
    )
    assert few is not None and many is not None and many >= few + 9


def test_a_disk_that_is_too_small_is_told_of(
    capsys: pytest.CaptureFixture[str], plan: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = printed(capsys, plan)
    assert "free: checkpoints" in found["disk"] or "free" in found["disk"]
    monkeypatch.setattr(doctor, "_free", lambda place: 1000)
    _, err = printed(capsys, plan, code=2)
    assert "its disk has" in err and "train.keep_checkpoints" in err


def test_processes_are_named(
    capsys: pytest.CaptureFixture[str], plan: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    found, _ = printed(capsys, [*plan, "--card", "8"])
    assert found["memory"].endswith("for one process without shards")


def test_the_process_is_drawn_where_asked(capsys: pytest.CaptureFixture[str], plan: list[str], tmp_path: Path) -> None:
    file = tmp_path / "plots" / "noise.png"
    found, _ = printed(capsys, [*plan, "--plot", str(file), "--diffusion.schedule", "cosine"])
    assert found["plot"] == str(file)
    with Image.open(file) as picture:
        assert picture.format == "PNG" and picture.width > 1000
    stranger = tmp_path / "mine.png"
    Image.new("RGB", (2, 2)).save(stranger)
    assert cli.main([*plan, "--plot", str(stranger)]) == 2
    assert f"{stranger} is there and is no sheet by pixart_ft" in capsys.readouterr().err
    assert cli.main([*plan, "--plot", str(file.with_suffix(".gif"))]) == 2
    assert f"--plot: {file.with_suffix('.gif')} will be a PNG; give a name that ends in .png" in capsys.readouterr().err
    assert cli.main(["doctor", "--plot", str(file)]) == 2
    assert "--plot draws the process of a training: give its --config" in capsys.readouterr().err


def test_pictures_may_come_later_and_every_mistake_is_told(capsys: pytest.CaptureFixture[str], plan: list[str]) -> None:
    found, _ = printed(capsys, plan[:3])
    assert found["pictures"].startswith("none were given") and "sample grid" not in found
    wrong = [*plan[:3], "--data.folder=nowhere", "--run.folder=runs/old"]
    Path("runs/old").mkdir(parents=True)
    Path("runs/old/config.yaml").write_text("")
    found, err = printed(capsys, wrong, code=2)
    assert "nowhere" in err and "runs/old" in err and "training" in found
    _, err = printed(capsys, ["doctor", "--model.base=./nobase", "--data.folder=nowhere"], code=2)
    assert err.startswith("error: 2 problems\n") and err.count("\n  - ") == 2 and err.count("./nobase") == 1
    for card in ("none", "0", "-3"):
        assert cli.main(["doctor", "--card", card]) == 2
        assert "--card is" in capsys.readouterr().err


def test_a_package_that_does_not_run_here_is_told_of(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").write_text("")
    (tmp_path / "xformers" / "ops.py").write_text("raise RuntimeError('no operator')")
    (tmp_path / "xformers-9.0.dist-info").mkdir()
    (tmp_path / "xformers-9.0.dist-info" / "METADATA").write_text("Name: xformers\nVersion: 9.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    found, _ = printed(capsys, ["doctor"])
    assert found["xformers"] == "9.0 does not run here: no operator"
    sys.modules.pop("xformers", None)


def test_a_caption_is_shown_as_t5_sees_it_and_nothing_else(capsys: pytest.CaptureFixture[str], plan: list[str]) -> None:
    base = plan[1:3]
    found, _ = printed(capsys, ["doctor", *base, "--data.max_tokens=5", "--caption", "A red circle on the GREY " * 9])
    assert list(found) == ["caption", "", "T5 sees", "tokens", "cut", "small letters", "diffusers"]
    assert found["tokens"].startswith("5 of at most 5: ") and found["tokens"].endswith("</s>")
    assert printed(capsys, ["doctor", *base, "--caption="])[0]["tokens"] == "1 of at most 300: </s>"
    assert cli.main(["doctor", *base, "--caption=a", "--card=8"]) == 2
    assert "--caption and --card exclude each other" in capsys.readouterr().err
    assert cli.main(["doctor", *base, "--caption=a", "--plot=a.png"]) == 2
    assert "--caption and --plot exclude each other" in capsys.readouterr().err
