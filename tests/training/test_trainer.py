"""The training loop itself, on a toy network. Oracles: one process for two, the average for what is drawn.

Whole runs are in test_training_run.py, the numbers of the first steps by hand in test_training_wiring.py.
"""

import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.distributed.tensor import DTensor

from pixart_ft.config.optimizers import OPTIMIZERS
from pixart_ft.config.train import Group, Optim
from pixart_ft.pictures.sheets import Sample
from pixart_ft.training import ema, guard
from pixart_ft.training.nested import load_nested
from pixart_ft.training.step_numbers import StepNumbers, Underway
from tests.helpers.launched import launch
from tests.helpers.toy_run import RATE, Toy, toy_trainer
from tests.helpers.waits import no_lists_of_shards, no_waiting

STEPS = 12
SAMPLE = Sample("a toy", 0, Image.new("RGB", (8, 8)))


def state(run: Path, name: str) -> Any:
    return load_nested(run / "checkpoints" / f"step-{STEPS:06d}" / f"{name}.safetensors")


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("shards", [False, True], ids=["copies", "shards"])
def test_two_processes_are_one(shards: bool, tmp_path: Path) -> None:
    """Two gloo processes that accumulate draw, learn, slow down, average, log and remember what one process does.

    All weights are trained, each process having them, or a part of each.
    """
    toy_trainer(tmp_path / "one", tmp_path / "data", batch_size=4, clip_norm=0.5).run()

    def body(rank: int) -> None:
        data = tmp_path / f"data-{rank}"
        trainer = toy_trainer(tmp_path / "two", data, shards=shards, batch_size=1, accumulation=2, clip_norm=0.5)
        assert {isinstance(p, DTensor) for p in trainer.trained.values()} == {shards}
        with no_lists_of_shards():
            trainer.run()

    launched = launch(body, tmp_path, environment={"ACCELERATE_USE_CPU": "true"})
    assert launched.end() == [0, 0], launched.said(0) + launched.said(1)
    one, two = tmp_path / "one", tmp_path / "two"
    histories = [state(run, "progress")["history"] for run in (one, two)]
    assert histories[1]["counts"].tolist() == histories[0]["counts"].tolist() == [10, 10, 10]
    torch.testing.assert_close(histories[1]["losses"], histories[0]["losses"], rtol=1e-4, atol=1e-6)
    for name in ("trained", "ema"):
        torch.testing.assert_close(state(two, name), state(one, name), rtol=1e-4, atol=1e-6)
    assert len(log(one)) == len(log(two)) == STEPS
    for a, b in zip(log(one), log(two), strict=True):
        assert (a["step"], a["samples"]) == (b["step"], b["samples"])
        assert a["learning_rate"] == b["learning_rate"] == RATE.at(a["step"] - 1)  # once a step, not once a process
        assert b["train"] == pytest.approx(a["train"], rel=1e-4)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-4)


def test_what_a_checkpoint_holds_continues_everything(tmp_path: Path) -> None:
    """Importance law, average, moments and a half-full window of the log: the same to the bit as without a break."""
    straight = toy_trainer(tmp_path / "straight", tmp_path / "data", log_every=5)
    straight.run()
    toy_trainer(tmp_path / "cut", tmp_path / "data", log_every=5, steps=8).run()
    resumed = toy_trainer(tmp_path / "cut", tmp_path / "data", log_every=5)
    resumed.load(tmp_path / "cut" / "checkpoints" / "step-000008")
    resumed.run()
    counts = state(tmp_path / "straight", "progress")["history"]["counts"]
    assert counts.tolist() == [10, 10, 10], "the history must be full, and its law not uniform"
    for name in ("trained", "ema", "optimizer", "progress"):
        whole, cut = (tmp_path / run / "checkpoints" / f"step-{STEPS:06d}" for run in ("straight", "cut"))
        assert (whole / f"{name}.safetensors").read_bytes() == (cut / f"{name}.safetensors").read_bytes(), name
    logs = [[(r["step"], r["train"]) for r in log(tmp_path / run)] for run in ("straight", "cut")]
    assert logs[0] == logs[1] and [step for step, _ in logs[0]] == [5, 10]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "muon"])  # the toy has no matrix
def test_every_optimizer_goes_on_from_a_checkpoint_to_the_bit(name: str, tmp_path: Path) -> None:
    """In the middle of the second visit to the pictures."""
    if package := OPTIMIZERS[name].package:
        pytest.importorskip(package)
    choice = Optim.model_validate({"optimizer": name, "learning_rate": 1.0 if name == "prodigy" else 0.05})
    toy_trainer(tmp_path / "whole", tmp_path / "data", choice=choice).run()
    toy_trainer(tmp_path / "cut", tmp_path / "data", choice=choice, steps=5).run()
    resumed = toy_trainer(tmp_path / "cut", tmp_path / "data", choice=choice)
    resumed.load(tmp_path / "cut" / "checkpoints" / "step-000005")
    resumed.run()
    found = log(tmp_path / "whole")[-1].get("step_size")
    assert found == (resumed.optimizer.param_groups[0]["d"] if name == "prodigy" else None)
    for file in ("trained", "ema", "optimizer"):
        whole, cut = (tmp_path / run / "checkpoints" / f"step-{STEPS:06d}" for run in ("whole", "cut"))
        assert (whole / f"{file}.safetensors").read_bytes() == (cut / f"{file}.safetensors").read_bytes(), file


def test_a_group_follows_the_schedule_from_a_peak_of_its_own(tmp_path: Path) -> None:
    choice = Optim(learning_rate=0.1, decay="cosine", groups=(Group(pattern="*.bias", learning_rate=0.02),))
    trainer = toy_trainer(tmp_path / "run", tmp_path / "data", choice=choice, steps=6)
    trainer.run()
    common, own = (group["lr"] for group in trainer.optimizer.param_groups)
    assert common == trainer.learning_rate.at(5) < 0.1 and own == pytest.approx(common / 5, rel=1e-12)


def test_every_micro_batch_has_a_random_state_of_its_own(tmp_path: Path) -> None:
    """From which torch draws the adapter's dropout; it follows from the draws, not from what was drawn before."""
    seeds: list[list[int]] = []
    for steps in ([0, 1, 2], [2]):
        trainer = toy_trainer(tmp_path / str(steps), tmp_path / "data", steps=3, batch_size=2, accumulation=2)
        found: list[int] = []
        trainer.step = steps[0]
        trainer.transformer.get_submodule("layer").register_forward_hook(
            lambda layer, *_, found=found: found.append(torch.initial_seed()) if torch.is_grad_enabled() else None
        )
        torch.manual_seed(len(steps))
        trainer.run()
        seeds.append(found)
    assert len(set(seeds[0])) == len(seeds[0]) == 6 and seeds[1] == seeds[0][4:]


@pytest.mark.filterwarnings("ignore:step 2 was skipped")
@pytest.mark.parametrize("known", [True, False])
def test_a_step_whose_gradient_is_not_finite_leaves_the_weights(
    tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one begins with those that this one began with, and no gradient; the average stays as it was too."""
    for module in (guard, ema):
        monkeypatch.setattr(module, "is_known", lambda flag: known)
    trainer = toy_trainer(tmp_path / "run", tmp_path / "data", steps=3)
    found: list[list[torch.Tensor]] = []
    averages: list[torch.Tensor] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        assert trainer.transformer.get_parameter("layer.bias").grad is None
        found.append([x.detach().clone() for x in trainer.trained.values()])
        averages.append(trainer.ema.shadows["layer.bias"].clone())
        return gradient * (math.nan if len(found) == 2 else 1.0)

    trainer.transformer.get_parameter("layer.bias").register_hook(spoil)
    trainer.run()
    torch.testing.assert_close(found[2], found[1], rtol=0, atol=0)
    assert not torch.equal(found[1][0], found[0][0])
    assert torch.equal(averages[2], averages[1]) and not torch.equal(averages[1], averages[0])
    lines = [json.loads(line, parse_constant=pytest.fail) for line in trainer.folder.log.path.read_text().splitlines()]
    assert ["loss" in line["train"] for line in lines if "train" in line] == [True, False, True]


@pytest.mark.filterwarnings("ignore:step 1 was skipped")
def test_a_loss_that_is_not_finite_skips_its_step_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though every gradient is finite."""
    trainer = toy_trainer(tmp_path / "run", tmp_path / "data", steps=1)
    terms = trainer.objective.terms

    def infinite(network: Toy, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        found = terms(network, **given)
        return {**found, "loss": found["loss"] + (math.inf if torch.is_grad_enabled() else 0)}

    monkeypatch.setattr(type(trainer.objective), "terms", lambda self, *a, **given: infinite(*a, **given))
    before = [p.detach().clone() for p in trainer.trained.values()]
    trainer.run()
    torch.testing.assert_close([p.detach() for p in trainer.trained.values()], before, rtol=0, atol=0)


def test_the_host_waits_for_no_device_between_two_log_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step queues reads nothing of a tensor; what it met is read once, one step later, or where it is due."""
    for module in (guard, ema):
        monkeypatch.setattr(module, "is_known", lambda flag: False)
    trainer = toy_trainer(tmp_path / "run", tmp_path / "data", steps=6, log_every=4, batch_size=2, accumulation=2)
    trainer.laws, trainer.importance = replace(trainer.laws, timestep_law="uniform"), None  # that law is the host's
    assert not trainer.objective.schedule.has_zero_snr  # asked of the host's table, and once
    whole, read = trainer._optimizer_step, Underway.read
    order: list[tuple[str, int]] = []

    def step() -> None:
        order.append(("queued", trainer.step))
        with no_waiting():
            whole()

    def reading(self: Underway) -> StepNumbers:
        order.append(("read", self.step))
        return read(self)

    monkeypatch.setattr(trainer, "_optimizer_step", step)
    monkeypatch.setattr(Underway, "read", reading)
    trainer.run()
    queued, late = [("queued", n) for n in range(6)], [("read", n) for n in range(6)]
    due = [queued[0], queued[1], late[0], queued[2], late[1], queued[3], late[2], late[3]]  # a log line is of four
    assert order == [*due, queued[4], queued[5], late[4], late[5]]  # and the end of all


def test_samples_are_drawn_by_the_average(tmp_path: Path) -> None:
    """In eval mode too; the weights that are trained come back, in the mode they had."""
    drawn: list[tuple[bool, dict[str, torch.Tensor]]] = []
    averages: list[dict[str, torch.Tensor]] = []

    def draw(network: Toy) -> list[Sample]:
        drawn.append((network.training, {name: value.clone() for name, value in network.state_dict().items()}))
        averages.append({name: value.clone() for name, value in trainer.ema.shadows.items()})
        return [SAMPLE]

    trainer = toy_trainer(tmp_path / "run", tmp_path / "data", draw, steps=5, samples_every=4)
    trainer.run()
    assert [training for training, _ in drawn] == [False] * 3 and trainer.transformer.training  # after 0, 4, 5 steps
    torch.testing.assert_close([weights for _, weights in drawn], averages, rtol=0, atol=0)
    assert all(not torch.equal(averages[2][name], weights) for name, weights in trainer.trained.items())


def test_a_step_with_nothing_to_look_at_keeps_nothing(tmp_path: Path) -> None:
    """Whether an adapter is kept is asked of the whole log, which grows: only where something was measured or drawn."""
    trainer = toy_trainer(tmp_path / "run", tmp_path / "data", steps=7, validate_every=3, samples_every=0)
    asked: list[int] = []
    trainer.keep_adapter = lambda progress: asked.append(progress.step)
    trainer.run()
    assert asked == [0, 3, 6, 7]


def test_the_state_is_saved_then_the_result_and_then_the_end_is_looked_at_once(tmp_path: Path) -> None:
    """In this order, since what comes later may fail, or never end."""
    met: list[tuple[str, int]] = []

    def draw(network: Toy) -> list[Sample]:
        met.append(("drawn", trainer.step))
        return [SAMPLE]

    trainer = toy_trainer(tmp_path / "run", tmp_path / "data", draw, steps=2, checkpoint_every=1)
    trainer.describe = lambda folder: met.append(("saved", trainer.step))
    trainer.export = lambda progress: met.append(("exported", progress.step))
    trainer.keep_adapter = lambda progress: met.append(("kept", progress.step))
    trainer.run()
    begin, end = [("drawn", 0), ("kept", 0), ("saved", 1)], [("exported", 2), ("drawn", 2), ("kept", 2)]
    assert met == [*begin, ("saved", 2), *end]

    again = toy_trainer(tmp_path / "run", tmp_path / "data", draw, steps=2)
    again.load(tmp_path / "run" / "checkpoints" / "step-000002")
    trainer, met[:] = again, []
    again.describe = lambda folder: met.append(("saved", again.step))
    again.export = lambda progress: met.append(("exported", progress.step))
    again.run()  # nothing to train, nothing new to save; what the end leaves is made anew
    assert met == [("exported", 2), ("drawn", 2)]


def test_the_bar_stands_between_what_is_drawn_at_both_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    def draw(network: Toy) -> list[Sample]:
        print("drawn", file=sys.stderr)
        return [SAMPLE]

    toy_trainer(tmp_path / "run", tmp_path / "data", draw, steps=2).run()
    nothing, bar, end = capsys.readouterr().err.split("drawn\n")
    assert (nothing, end) == ("", "") and bar.startswith("\rtraining:   0%") and bar.endswith("\n")


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As `nohup` has it, under which a closed terminal ends nothing."""

    def draw(network: Toy) -> list[Sample]:
        os.kill(os.getpid(), signal.SIGHUP)
        return [SAMPLE]

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = toy_trainer(tmp_path / "run", tmp_path / "data", draw, steps=2)
        trainer.run()
        assert trainer.step == 2 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    except KeyboardInterrupt:
        pytest.fail("stopped by what was ignored")
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_request_to_stop_before_the_first_step_is_heeded_after_the_state_is_saved(tmp_path: Path, asked: int) -> None:
    def draw(network: Toy) -> list[Sample]:
        for _ in range(2 if asked == signal.SIGHUP else 1):  # a terminal that closes says it twice
            os.kill(os.getpid(), asked)
        return [SAMPLE]

    trainer = toy_trainer(tmp_path / "run", tmp_path / "data", draw, steps=2)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 0, state saved"):
        trainer.run()
    again = toy_trainer(tmp_path / "run", tmp_path / "data", steps=2)
    again.load(tmp_path / "run" / "checkpoints" / "step-000000")
    assert again.step == 0
    again.run()


def test_the_weight_of_a_prior_is_not_in_the_losses_that_are_told(tmp_path: Path) -> None:
    """The mean and the quartiles are of the losses themselves: two weights give the same numbers at the first step."""
    told = []
    for weight in (1.0, 0.25):
        run = tmp_path / str(weight)
        trainer = toy_trainer(run / "run", run / "data", steps=1, log_every=1)
        trainer.data = replace(trainer.data, prior=1, prior_weight=weight)
        trainer.run()
        told.append(next(r["train"] for r in trainer.folder.log.records() if "train" in r))
    assert told[0] == pytest.approx(told[1], rel=1e-6)
