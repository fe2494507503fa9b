"""Another program's adapter in our commands and pipelines. Oracle: the same adapter as ours, from its own folder."""

import io
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixart_ft.adapters.export import export
from pixart_ft.adapters.pipelines import load_lora, unload
from pixart_ft.cli import main
from pixart_ft.config.export import ExportConfig
from pixart_ft.errors import UserError
from pixart_ft.model.base import Base
from pixart_ft.model.loading import load_transformer
from pixart_ft.model.text import TEXT_PREPARATION
from pixart_ft.sampling.text_to_image import TextToImage
from tests.helpers.adapters import make_adapter
from tests.helpers.networks import call
from tests.helpers.tiny import edit


@pytest.fixture(scope="module")
def own(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder of ours, of rank 4 and alpha 6."""
    return make_adapter(tiny, tmp_path_factory.mktemp("own") / "adapter")


@pytest.fixture(scope="module")
def expected(tiny: Path, own: Path) -> Tensor:
    return call(TextToImage.load(tiny, lora=own).transformer)


@pytest.mark.parametrize("to", ["diffusers", "comfy", "kohya"])
def test_a_file_of_another_program_is_loaded_as_ours_is(
    tiny: Path, own: Path, expected: Tensor, tmp_path: Path, to: str
) -> None:
    export(ExportConfig(run=own, to=to, out=tmp_path / "out"))  # type: ignore[arg-type]
    (file,) = (tmp_path / "out").iterdir()
    for place in (file, tmp_path / "out"):
        with pytest.warns(
            UserWarning, match=rf"another program's adapter \({to} names\).*taken for granted: that it was"
        ):
            model = TextToImage.load(tiny, lora=place)
        torch.testing.assert_close(call(model.transformer), expected, rtol=1e-5, atol=1e-5)
    assert model.abilities.variance == "stale" and model.adapters[0].metadata.rank == 4


def test_a_folder_of_plain_peft_says_its_alpha_and_not_its_base(
    tiny: Path, own: Path, expected: Tensor, tmp_path: Path
) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "plain").mkdir(exist_ok=True)
        shutil.copy(own / name, tmp_path / "plain" / name)
    pipeline = PixArtSigmaPipeline.from_pretrained(str(tiny))
    before = call(pipeline.transformer)
    with pytest.warns(
        UserWarning, match=f"another program's adapter.*its captions were prepared by {re.escape(TEXT_PREPARATION)}"
    ):
        load_lora(pipeline, tmp_path / "plain")
    torch.testing.assert_close(call(pipeline.transformer), expected, rtol=1e-5, atol=1e-5)
    unload(pipeline)
    assert torch.equal(call(pipeline.transformer), before)
    with pytest.raises(UserError, match=r"text_preparation: the captions of .* were prepared by clean_caption"):
        load_lora(pipeline, tmp_path / "plain", text_preparation="clean_caption")
    assert torch.equal(call(pipeline.transformer), before)
    edit(tmp_path / "plain" / "adapter_config.json", fan_in_fan_out=True)
    with pytest.raises(UserError, match=r"fan_in_fan_out is True: peft draws otherwise for it"):
        load_lora(pipeline, tmp_path / "plain")
    with pytest.raises(UserError, match=r"lora_alpha is 8, and .* says its own; leave it out"):
        load_lora(pipeline, own, alpha=8)


def test_an_alpha_that_no_file_says_is_assumed_and_may_be_given(tiny: Path, own: Path, tmp_path: Path) -> None:
    """The script of PixArt's authors, whose alpha is peft's 8 whatever the rank."""
    tensors = load_file(own / "adapter_model.safetensors")
    save_file(
        {key.replace("base_model.model.", "unet."): value for key, value in tensors.items()}, tmp_path / "a.safetensors"
    )
    base = call(load_transformer(Base.read(tiny), dtype=torch.float32))
    changes = {}
    for alpha in (None, 8.0, 4.0):
        with pytest.warns(
            UserWarning, match="assumed 8.*--lora-alpha 4" if alpha is None else r"\(script names\)\. It says"
        ):
            changes[alpha] = (
                call(TextToImage.load(tiny, lora=tmp_path / "a.safetensors", lora_alpha=alpha).transformer) - base
            )
    assert torch.equal(changes[None], changes[8.0])
    assert 1.5 < changes[8.0].norm() / changes[4.0].norm() < 2.5


def test_the_command_asks_for_the_base_and_draws(
    tiny: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(ExportConfig(run=own, to="kohya", out=tmp_path / "kohya"))
    draw = ["generate", "--prompt", "a circle", "--steps", "2", "--width", "64", "--height", "64"]
    place = str(tmp_path / "kohya")
    assert main([*draw, "--lora", place, "--out", str(tmp_path / "no")]) == 2
    assert "another program's adapter, and does not say its base; give --model" in capsys.readouterr().err
    assert main([*draw, "--lora", str(own), "--lora-alpha", "8", "--out", str(tmp_path / "no")]) == 2
    assert f"lora_alpha is 8.0, and {own} says its own; leave it out" in capsys.readouterr().err
    assert main(["export", place, "--to", "comfy", "--out", str(tmp_path / "no")]) == 2
    assert f"{place} has no pixart_ft.json, so it was not made here" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    for lora, out in ((place, "theirs"), (str(own), "ours")):
        with warnings.catch_warnings(record=True) as told:
            assert main([*draw, "--lora", lora, "--model", str(tiny), "--out", str(tmp_path / out)]) == 0
        assert any("another program's" in str(one.message) for one in told) == (out == "theirs")
    assert all(list((tmp_path / out).glob("000*.png")) for out in ("theirs", "ours"))


@pytest.mark.filterwarnings("ignore:.*another program's adapter")
def test_a_picture_of_an_alpha_that_was_told_is_drawn_again(tiny: Path, own: Path, tmp_path: Path) -> None:
    """Beside one of ours, whose alpha is its own."""
    tensors = load_file(own / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    draw = ["generate", "--steps", "2", "--width", "64", "--height", "64", "--device", "cpu"]
    adapters = ["--lora", str(tmp_path / "bare.safetensors"), "--lora", str(own), "--model", str(tiny)]
    for alpha in ("3", "6"):
        out = ["--prompt", "a", "--lora-alpha", alpha, "--out", str(tmp_path / alpha)]
        assert main([*draw, *adapters, *out]) == 0
    (first,), (other,) = ((tmp_path / alpha).glob("000*.png") for alpha in ("3", "6"))
    assert main(["generate", "--from", str(first), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / first.name).read_bytes() == first.read_bytes() != other.read_bytes()


def test_of_several_files_in_a_folder_one_is_to_be_given(tiny: Path, own: Path, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(own / "adapter_model.safetensors", tmp_path / name)
    with pytest.raises(UserError, match=r"holds 2 files of weights \(a\.safetensors, b\.safetensors\) and nothing"):
        TextToImage.load(tiny, lora=tmp_path)
    shutil.copytree(own, tmp_path / "damaged")
    (tmp_path / "damaged" / "pixart_ft.json").unlink()
    with pytest.raises(UserError, match=r"has no pixart_ft\.json, so it was not made here"):
        TextToImage.load(tiny, lora=tmp_path / "damaged")


class Program:
    """Is a program when it is read as a pickle."""

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return pytest.fail, ("it ran",)


def pickled(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"nothing", "cannot read .*a.safetensors"),
        ("a.bin", b"nothing", "a.bin is no file of weights, or holds more than tensors"),
        ("a.pt", pickled({"a": 1}), r"a\.pt holds more than tensors by their names \(a\)"),
        ("a.pt", pickled({3: torch.ones(1)}), r"a\.pt holds more than tensors by their names \(3\)"),
        ("a.pt", pickled([torch.ones(1)]), "a.pt holds a list, where weights by their names are expected"),
        ("a.pt", pickled(Program()), "holds more than tensors; reading that could run any program"),
        ("a.txt", b"nothing", "is neither an adapter folder nor a run folder"),
    ],
)
def test_a_damaged_file_is_no_adapter(tiny: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        TextToImage.load(tiny, lora=tmp_path / name)
