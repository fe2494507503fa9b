"""Trackers. Oracle: what the libraries themselves read back; two of them are extras, and tried where they are."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from pixart_ft.config.train import Tracker, load_config
from pixart_ft.errors import UserError
from pixart_ft.runs.log import RunLog
from pixart_ft.training import places, run
from pixart_ft.training.places import check_trackers
from pixart_ft.training.records import Progress, Records
from pixart_ft.training.trackers import begin_trackers
from tests.helpers.runs import short_run, train


def tracked(name: Tracker, folder: Path) -> Accelerator:
    """A run of the name "dog" with one line of the log and a sheet."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    begin_trackers(accelerator, [name], "dog", folder, {"optim.learning_rate": 1e-4, "validation.prompts": ["a"]})
    records = Records(RunLog(folder / "log.jsonl"), accelerator)
    speed = {"samples_per_second": 3.0, "data_wait": 0.0}
    records.train(Progress(5, 20), {"loss": 0.5}, {"learning_rate": 1e-4}, speed)
    records.samples(Progress(5, 20), Image.new("RGB", (8, 4), "red"))
    accelerator.end_training()
    return accelerator


def test_tensorboard_gets_every_number_of_a_line_and_the_sheet(tmp_path: Path) -> None:
    accumulator: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    tracked("tensorboard", tmp_path)
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = {"train/loss": 0.5, "learning_rate": 1e-4, "speed/samples_per_second": 3.0, "speed/data_wait": 0.0}
    assert set(found.Tags()["scalars"]) == set(names) and found.Tags()["images"] == ["samples"]
    for name, value in names.items():
        (point,) = found.Scalars(name)
        assert (point.step, point.value) == (5, pytest.approx(value))
    record = json.loads((tmp_path / "log.jsonl").read_text())
    assert record["speed"] == {"samples_per_second": 3.0, "data_wait": 0.0}


@pytest.mark.parametrize(("name", "left"), [("wandb", "wandb/offline-*/files/media/images/*.png"), ("trackio", "*.db")])
def test_an_extra_is_told_the_same(name: Tracker, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported
    pytest.importorskip(name)
    tracked(name, tmp_path)
    assert list(tmp_path.rglob(left))


def test_one_that_is_not_installed_is_refused_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(UserError, match=r"logging\.trackers: wandb not installed: pip install wandb, or leave it out"):
        check_trackers(["tensorboard", "wandb"])


def test_the_former_key_is_refused_with_the_new_one() -> None:
    with pytest.raises(UserError, match=r"logging\.tensorboard is now logging\.trackers, a list: \[tensorboard\]"):
        load_config({"data": {"folder": "x"}, "logging": {"tensorboard": False}})
    with pytest.raises(UserError, match=r"logging\.tensorboard is now logging\.trackers"):
        load_config({"data": {"folder": "x"}}, {"logging.tensorboard": "false"})


def test_one_that_refuses_leaves_no_run_behind(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as for want of an account: else the same command would be told that the run exists."""
    options = short_run(tiny, pictures, tmp_path / "run", tmp_path / "cache")

    def refuse(*names: object) -> None:
        raise UserError("logging.trackers: wandb cannot begin: no account")

    monkeypatch.setattr(run, "begin_trackers", refuse)
    with pytest.raises(UserError, match="no account"):
        train(options, train__steps=1)
    assert not options["run.folder"].exists()
