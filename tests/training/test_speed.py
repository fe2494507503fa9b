"""How the network is called in training. Oracle: the run that was never cut off, and what this file lets be fastest."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pixart_ft.errors import UserError
from pixart_ft.model.attention import Kernels
from pixart_ft.model.engine import Calls, where
from pixart_ft.training import speed
from tests.helpers.runs import Options, assert_same_end, cut_off, losses, short_run, train


@pytest.fixture
def options(tiny: Path, pictures: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    cache = tmp_path_factory.getbasetemp() / "cache"
    return short_run(tiny, pictures, tmp_path / "run", cache) | {
        "model.attention": "auto",
        "train.checkpoint_every": 3,
        "data.held_out_fraction": 0.0,
        "validation.prompts": [],
    }


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Calls]:
    """What kernels were timed for; first headwise is the fastest, and from then on plain."""
    asked: list[Calls] = []

    def fastest(transformer: object, calls: Calls) -> tuple[Kernels, str]:
        asked.append(calls)
        kernels = Kernels("headwise", "sdpa") if len(asked) == 1 else Kernels("plain", "plain")
        return kernels, f"{kernels.image} it is"

    monkeypatch.setattr(speed, "fastest_kernels", fastest)
    return asked


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "environment.json").read_text())


def test_a_resumed_run_takes_the_kernels_it_began_with(
    options: Options, tmp_path: Path, timed: list[Calls], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(options)
    assert [(c.rows, c.image, c.dtype, c.backward) for c in timed] == [(4, 16, torch.float32, True)]
    assert 1 < timed[0].text < 30 and "attention          headwise it is\n" in capsys.readouterr().out
    assert record(whole)["attention"] == {"image": "headwise", "text": "sdpa"}
    timed.clear()
    cut_off(4, options, run__folder=tmp_path / "cut")
    assert len(timed) == 1
    assert_same_end(train(options, run__folder=tmp_path / "cut", resume="auto"), whole)
    assert len(timed) == 1, "a record that holds is not timed again"


@pytest.mark.parametrize("lost", ["processor", "record"])
def test_kernels_are_chosen_anew_on_another_processor(options: Options, timed: list[Calls], lost: str) -> None:
    cut_off(1, options)
    path = options["run.folder"] / "environment.json"
    kept = record(options["run.folder"])
    assert kept["attention_timed_on"] == where(torch.device("cpu"))
    path.write_text("{}" if lost == "record" else json.dumps(kept | {"attention_timed_on": "another"}))
    cut_off(1, options, resume="auto")
    assert len(timed) == 2 and record(options["run.folder"])["attention"] == {"image": "plain", "text": "plain"}


def test_named_kernels_are_not_timed(options: Options, tmp_path: Path, timed: list[Calls]) -> None:
    """And give the same losses to rounding."""
    one, other = (
        losses(train(options, run__folder=tmp_path / name, model__attention=name, train__steps=2))
        for name in ("sdpa", "headwise")
    )
    assert not timed
    assert [a["loss"] for a in one] == pytest.approx([b["loss"] for b in other], rel=1e-4)


def test_kernels_that_do_not_run_are_refused_before_anything_is_made(options: Options) -> None:
    with pytest.raises(UserError, match=r"model\.attention xformers cannot run on cpu here"):
        train(options, model__attention="xformers")
    assert not Path(options["run.folder"]).exists()
