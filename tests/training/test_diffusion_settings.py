"""Short runs of every way to set the diffusion, from the configuration to a picture. Oracles: the process that the
trainer used, bit equality after a resume, and a history of losses kept here by hand."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor

from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.errors import UserError
from pixart_ft.evaluation.objective import Objective
from pixart_ft.sampling.text_to_image import TextToImage
from pixart_ft.training import trainer as trainer_module
from pixart_ft.training.batches import Batch
from pixart_ft.training.nested import load_nested
from pixart_ft.training.trainer import Trainer
from tests.helpers.runs import Options, cut_off, losses, train

STEPS, BATCH, SEED = 9, 8, 3
FEW = 3  # training timesteps of a base on which importance sampling knows enough within a few steps


@pytest.fixture
def options(tiny: Path, pictures: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Dotted keys of a short run that is measured and not watched; the cache is shared by the module's tests."""
    return {
        "run.folder": tmp_path / "run",
        "run.seed": SEED,
        "model.base": tiny,
        "data.folder": pictures,
        "data.held_out_fraction": 0.2,
        "data.resolution": 64,
        "data.cache": tmp_path_factory.getbasetemp() / "cache",
        "adapter.rank": 4,
        "optim.learning_rate": 1e-3,
        "train.steps": 2,
        "train.batch_size": 4,
        "train.mixed_precision": "no",
        "train.ema_decay": 0.9,
        "train.checkpoint_every": 0,
        "validation.every": 0,
        "validation.timesteps": 4,
        "logging.every": 1,
        "logging.trackers": [],
    }


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[Objective]:
    """The objective of every run there has been."""
    seen: list[Objective] = []
    whole = Trainer.run

    def run(self: Trainer) -> object:
        seen.append(self.objective)
        return whole(self)

    monkeypatch.setattr(Trainer, "run", run)
    return seen


COSINE, LINEAR = {"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": "linear", "beta_end": 0.02}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "cosine matched": ({"schedule": "cosine", "time_conditioning": "snr_matched"}, COSINE, "trained"),
    "zero SNR": (
        {"zero_snr": True, "prediction_type": "v_prediction", "objective": "simple"},
        LINEAR | {"rescale_betas_zero_snr": True},
        "stale",
    ),
    "fixed bound": ({"objective": "vlb", "variance": "beta_tilde"}, LINEAR, "stale"),
    "learned bound": ({"objective": "vlb", "timestep_law": "importance"}, LINEAR, "trained"),
    "Su": ({"objective": "su_raw", "schedule": "su_linear"}, LINEAR | {"beta_start": 2e-5}, "stale"),
    "weighted": (
        {"weighting": "min_snr", "loss_space": "v_prediction", "error": "huber", "timestep_law": "logit_normal"},
        LINEAR,
        "trained",
    ),
    "shorter, its index rescaled": (
        {"schedule": "linear", "num_steps": 50, "time_conditioning": "rescaled", "timestep_law": "stratified"},
        {"num_train_timesteps": 50, "beta_schedule": "linear", "beta_start": 2e-3, "beta_end": 0.4},
        "trained",
    ),
    "another offset": (
        {"schedule": "cosine", "num_steps": 40, "cosine_offset": 0.1, "time_conditioning": "snr_matched"},
        {"num_train_timesteps": 40, "trained_betas": NoiseSchedule.cosine(40, offset=0.1).betas.tolist()},
        "trained",
    ),
    "step noise": (
        {"prediction_type": "step_noise", "objective": "su_noises", "schedule": "su_linear"},
        LINEAR,
        "stale",
    ),
    "score": ({"prediction_type": "score", "weighting": "constant"}, LINEAR, "trained"),
    "logarithm": ({"variance": "direct"}, LINEAR, "direct"),
    "posterior": ({"prediction_type": "posterior_mean", "objective": "simple"}, LINEAR, "stale"),
}


@pytest.mark.filterwarnings("ignore:the base predicts", "ignore:of .* noise levels", "ignore:the base's variance")
@pytest.mark.parametrize("name", SETTINGS)
def test_what_was_trained_is_what_is_drawn(options: Options, trained_on: list[Objective], name: str) -> None:
    diffusion, schedule, variance = SETTINGS[name]
    run = train(options | {f"diffusion.{key}": value for key, value in diffusion.items()})
    (objective,) = trained_on
    numbers = [number for record in losses(run) for number in record.values()]
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    numbers += [term["mean"] for record in records for term in record.get("held_out", {}).values()]
    assert len(losses(run)) == 2 and torch.tensor(numbers).isfinite().all()

    meta = json.loads((run / "final" / "adapter" / "pixart_ft.json").read_text())
    assert meta["prediction_type"] == diffusion.get("prediction_type", "epsilon") == objective.prediction_type
    assert meta["time_conditioning"] == diffusion.get("time_conditioning", "index")
    assert {key: meta["schedule"].get(key) for key in schedule} == schedule
    assert meta["variance"] == variance

    drawing = TextToImage.load(options["model.base"], lora=run)
    able = drawing.abilities
    assert able.prediction_type == objective.prediction_type
    assert torch.equal(able.schedule.alpha_bar, objective.schedule.alpha_bar)
    assert torch.equal(able.schedule.timesteps, objective.schedule.timesteps)
    (picture,) = drawing.generate("a red circle", steps=2)  # it refuses what is not finite
    assert picture.size == (64, 64)
    if variance in ("trained", "direct"):
        drawing.generate("a red circle", steps=2, sampler="iddpm")
    else:
        with pytest.raises(UserError, match="trained by an objective that leaves it stale"):
            drawing.generate("a red circle", steps=2, sampler="iddpm")


# Importance sampling


@dataclass
class Record:
    """What happened in a run, micro-batch by micro-batch."""

    laws: list[Tensor] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    raw: list[Tensor] = field(default_factory=list)  # the losses as the objective gave them
    minimised: list[float] = field(default_factory=list)


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Iterator[Record]:
    seen = Record()
    draw_batch, terms, backward = trainer_module.draw_batch, Objective.terms, accelerate.Accelerator.backward

    def drawing(*args: Any, law: Tensor, **more: Any) -> Batch:
        batch = draw_batch(*args, law=law, **more)
        if torch.is_grad_enabled():  # a look at the loss before a checkpoint is no step
            seen.laws.append(law)
            seen.batches.append(batch)
        return batch

    def terms_of(self: Objective, *args: Any, **more: Any) -> dict[str, Tensor]:
        found = terms(self, *args, **more)
        if torch.is_grad_enabled():  # the held-out loss is no part of the history
            seen.raw.append(found["loss"].detach().clone())
        return found

    def minimising(self: accelerate.Accelerator, loss: Tensor, **more: Any) -> None:
        seen.minimised.append(loss.item())
        backward(self, loss, **more)

    monkeypatch.setattr(trainer_module, "draw_batch", drawing)
    monkeypatch.setattr(Objective, "terms", terms_of)
    monkeypatch.setattr(accelerate.Accelerator, "backward", minimising)
    yield seen


@pytest.fixture
def few(tiny: Path, options: Options, tmp_path: Path) -> Options:
    """Options of importance sampling over `FEW` timesteps."""
    base = Path(shutil.copytree(tiny, tmp_path / "few"))
    file = base / "scheduler" / "scheduler_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"num_train_timesteps": FEW, "trained_betas": [0.02, 0.3, 0.9]})
    )
    return options | {
        "model.base": base,
        "diffusion.timestep_law": "importance",
        "train.steps": STEPS,
        "train.batch_size": BATCH,
        "train.checkpoint_every": 2,
    }


def law_of(history: list[list[float]]) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 18, with a share of 1/1000 for the uniform law."""
    if min(map(len, history)) < 10:
        return torch.full((FEW,), 1 / FEW, dtype=torch.float64)
    root = torch.tensor([sum(x * x for x in newest[-10:]) / 10 for newest in history], dtype=torch.float64).sqrt()
    return 0.999 * root / root.sum() + 0.001 / FEW


def acts(law: Tensor) -> bool:
    """Whether it is far from uniform."""
    return bool(law.max() > 1.3 * law.min())


def test_importance_sampling_by_hand(few: Options, record: Record) -> None:
    """The law follows the losses of the steps up to the third before, and what is minimised and logged undoes it."""
    steps = STEPS + 4  # the last laws are of losses that were drawn by laws far from uniform
    logged = losses(train(few, train__steps=steps))
    assert len(record.laws) == len(logged) == steps
    history: list[list[float]] = [[] for _ in range(FEW)]
    later: list[list[list[float]]] = []  # of each step, what the laws do not know yet
    for step, (law, batch, raw) in enumerate(zip(record.laws, record.batches, record.raw, strict=True)):
        torch.testing.assert_close(law, law_of(history), rtol=1e-5, atol=0)
        weight = (1 / (FEW * law))[batch.t]
        torch.testing.assert_close(batch.weight, weight.float())
        assert record.minimised[step] == pytest.approx((weight * raw).mean().item(), rel=1e-5)
        assert logged[step]["loss"] == pytest.approx((weight * raw).mean().item(), rel=1e-5)
        for t in range(FEW):  # each t is a quartile of its own
            here = raw[batch.t == t].double()
            if len(here):
                assert logged[step][f"loss_q{t * 4 // FEW + 1}"] == pytest.approx(here.mean().item(), rel=1e-5)
        later.append([raw[batch.t == t].tolist() for t in range(FEW)])
        if step >= 2:
            history = [known + new for known, new in zip(history, later.pop(0), strict=True)]
    assert min(map(len, history)) > 10 and acts(record.laws[steps - 5]), "the law must act for this test to see it"


def test_importance_sampling_resumes_bit_for_bit(few: Options, tmp_path: Path) -> None:
    straight = train(few)
    cut_off(STEPS - 1, few, run__folder=tmp_path / "cut")
    name = f"step-{STEPS - 1:06d}"
    saved = load_nested(tmp_path / "cut" / "checkpoints" / name / "progress.safetensors")["history"]
    assert (saved["counts"] == 10).all() and acts(law_of(saved["losses"].tolist())), "or this test cannot see it"
    cut = train(few, run__folder=tmp_path / "cut", resume="auto")
    assert losses(straight) == losses(cut) and len(losses(cut)) == STEPS
    for file in ("trained", "ema", "optimizer", "progress"):
        one, other = (run / "checkpoints" / f"step-{STEPS:06d}" / f"{file}.safetensors" for run in (straight, cut))
        assert one.read_bytes() == other.read_bytes(), file


def test_importance_sampling_is_the_same_in_parts(few: Options, record: Record, tmp_path: Path) -> None:
    train(few)
    whole, parts = record.laws[:], record.batches[:]
    train(few, run__folder=tmp_path / "parts", train__batch_size=BATCH // 2, train__accumulation=2)
    laws, batches = record.laws[STEPS:], record.batches[STEPS:]
    assert len(laws) == 2 * STEPS and acts(whole[-1])
    for step in range(STEPS):
        for micro in (2 * step, 2 * step + 1):
            torch.testing.assert_close(laws[micro], whole[step], rtol=1e-4, atol=0)
        assert torch.equal(torch.cat([batches[2 * step].t, batches[2 * step + 1].t]), parts[step].t)


def test_starting_from_weights_of_another_process_is_said_aloud(options: Options, tmp_path: Path) -> None:
    first = train(options, train__steps=1)
    with pytest.warns(UserWarning, match="--init-from: these weights begin wrong .* they know another noise schedule"):
        train(options, run__folder=tmp_path / "second", init_from=str(first), diffusion__schedule="cosine")
