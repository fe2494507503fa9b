"""What goes wrong in the middle of a run: the message, and what is left. The system itself refuses.

Whole runs that diverge are in test_run.py.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pixart_ft.errors import UserError
from pixart_ft.files import explained
from pixart_ft.randomness import permuted
from pixart_ft.training.trainer import Trainer
from tests.helpers.toy_run import LAWS, toy_trainer

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs the device that is always full")


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def goes_on_from(step: int, run: Path, data: Path) -> None:
    """The checkpoint of this step is whole, the newest, and the run ends well from it."""
    again = toy_trainer(run, data)
    newest = again.folder.newest()
    assert newest is not None and newest.name == f"step-{step:06d}"
    again.load(newest)
    again.run()
    assert again.step == 12


def spoil(trainer: Trainer, name: str, steps: set[int]) -> None:
    """Make the gradient of this parameter infinite in these steps."""
    trainer.transformer.get_parameter(name).register_hook(lambda g: g * (math.inf if trainer.step in steps else 1.0))


def test_a_skipped_step_says_what_it_met(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "run", tmp_path / "data", steps=6, accumulation=2, batch_size=2)
    spoil(trainer, "layer.weight", {4})
    with pytest.warns(
        UserWarning, match=r"step 5 was skipped: the gradient of .* is not finite \(first in layer\.weight"
    ):
        trainer.run()
    (record,) = (record for record in log(tmp_path / "run") if "skipped" in record)
    draws = list(range(16, 20))
    rows = [permuted(LAWS.seed, d // 6, "epoch order", 6, d % 6) for d in draws]
    pictures = [f"picture {row}" for row in rows]
    expected = {"what": "gradient", "draws": draws, "pictures": pictures, "layer": "layer.weight"}
    assert (record["step"], record["samples"], record["skipped"]) == (5, 20, expected)
    assert [record["step"] for record in log(tmp_path / "run") if "train" in record] == [1, 2, 3, 4, 5, 6]


def test_a_picture_whose_loss_is_not_finite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the layer: the first on the way back, which is the last on the way there."""
    trainer = toy_trainer(tmp_path / "run", tmp_path / "data", steps=2)
    object.__setattr__(trainer.data, "names", [f"{n}.png" for n in range(6)])
    terms = type(trainer.objective).terms

    def one_infinite(self: Any, network: torch.nn.Module, **given: Any) -> dict[str, torch.Tensor]:
        found = terms(self, network, **given)
        here = trainer.step == 1 and torch.is_grad_enabled()
        loud = torch.tensor([1.0, 1.0, math.inf, 1.0]) if here else torch.ones(len(found["loss"]))
        return {**found, "loss": found["loss"] * loud}

    monkeypatch.setattr(type(trainer.objective), "terms", one_infinite)
    with pytest.warns(
        UserWarning, match=r"step 2 was skipped: the loss of \d.png is not finite \(first in layer.bias\)"
    ):
        trainer.run()
    (record,) = (record for record in log(tmp_path / "run") if "skipped" in record)
    name = f"{permuted(LAWS.seed, 1, 'epoch order', 6, 0)}.png"
    assert record["skipped"] == {"what": "loss", "draws": [6], "pictures": [name], "layer": "layer.bias"}


@pytest.mark.filterwarnings("ignore:step .* was skipped")
def test_so_many_skipped_steps_in_a_row_end_it_and_not_one_less(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "run", tmp_path / "data", give_up_after=3, checkpoint_every=2, log_every=5)
    spoil(trainer, "layer.bias", {2, 3, 5, 6, 7})
    with pytest.raises(UserError, match=r"for 3 steps in a row .*; then continue from step 6 with --resume auto"):
        trainer.run()
    assert trainer.step == 8  # whose checkpoint was due, and not written any more
    goes_on_from(6, tmp_path / "run", tmp_path / "data")


@needs_full
def test_a_disk_that_is_full_when_a_checkpoint_is_written_costs_no_earlier_one(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "run", tmp_path / "data", checkpoint_every=4)

    def fill(checkpoint: Path) -> None:
        if trainer.step == 8:
            FULL.write_text("the rest")

    trainer.describe = fill
    message = r"step-000008 cannot be written: no space is left .*; then continue from step 4"
    with pytest.raises(UserError, match=message):
        trainer.run()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000004"]
    goes_on_from(4, tmp_path / "run", tmp_path / "data")


@needs_full
def test_a_disk_that_is_full_when_a_line_of_the_log_is_written(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "run", tmp_path / "data", checkpoint_every=4, log_every=6)
    (tmp_path / "run" / "log.jsonl").symlink_to(FULL)
    with pytest.raises(UserError, match=r"log\.jsonl cannot be written: no space .*; then continue from step 4"):
        trainer.run()
    (tmp_path / "run" / "log.jsonl").unlink()
    goes_on_from(4, tmp_path / "run", tmp_path / "data")


@pytest.fixture
def ordinary_user(tmp_path: Path) -> Iterator[None]:
    """Root may write everywhere, so its place is given up for the test; its temporary folders are opened for that."""
    user = os.geteuid()
    if user == 0:
        for place in (tmp_path, *tmp_path.parents):
            if place == Path(tempfile.gettempdir()):
                break
            place.chmod(0o755)
        os.seteuid(65534)
    yield
    os.seteuid(user)
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        place.chmod(0o755)


def test_a_run_folder_that_became_read_only(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    trainer = toy_trainer(tmp_path / "run", tmp_path / "data", checkpoint_every=4)

    def lock(checkpoint: Path) -> None:
        for place in (checkpoint.parent, tmp_path / "run"):
            place.chmod(0o555)
        request.getfixturevalue("ordinary_user")

    trainer.describe = lambda checkpoint: None if trainer.step < 8 else lock(checkpoint)
    with pytest.raises(UserError, match=r"cannot be written: permission denied; .*; then continue from step 4"):
        trainer.run()
    request.getfixturevalue("ordinary_user")
    assert trainer.folder.saved_steps() == [4]


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_data_file_that_is_lost(tmp_path: Path, harm: str) -> None:
    """The worker meets it; the run ends with the message, where that batch would be trained on."""
    trainer = toy_trainer(tmp_path / "run", tmp_path / "data", checkpoint_every=4)
    whole = trainer._optimizer_step

    def step() -> None:
        if trainer.step == 6:
            trainer._ahead._begun[6, 0].result()  # the worker is done with this step's batch
            for shard in (tmp_path / "data").iterdir():
                os.truncate(shard, shard.stat().st_size // 2) if harm == "cut" else shard.unlink()
        whole()

    trainer._optimizer_step = step  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"data\.cache: .*safetensors (has|is gone).*; then continue from step 4 with"):
        trainer.run()
    assert trainer.step == 7  # the batch of step 6 was made before
    for shard in (tmp_path / "data").iterdir():
        shard.unlink()
    goes_on_from(4, tmp_path / "run", tmp_path / "data")


def test_what_the_system_refuses_a_worker_is_told_as_anywhere(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "run", tmp_path / "data", checkpoint_every=4)
    whole = trainer._batch_to_make

    def job(of: tuple[int, int]) -> Any:
        def make() -> Any:
            with explained(tmp_path / "absent", "read"):
                (tmp_path / "absent").read_bytes()

        return make if of[0] == 6 else whole(of)

    trainer._ahead._job = job
    with pytest.raises(UserError, match=r"absent cannot be read: there is no such file .*; then continue from step 4"):
        trainer.run()
    assert trainer.step == 6
