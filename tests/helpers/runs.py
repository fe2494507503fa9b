"""Short training runs on the tiny pipeline, and what tells whether two of them are the same."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from pixart_ft.config.reading import load
from pixart_ft.config.train import TrainConfig
from pixart_ft.training.run import run_training
from pixart_ft.training.trainer import Trainer

STEPS = 6
Options = dict[str, Any]  # dotted keys of a run
STATE_FILES = ("trained.safetensors", "ema.safetensors", "optimizer.safetensors")


def short_run(base: Path, pictures: Path, folder: Path, cache: Path) -> Options:
    """Dotted keys of a short run with everything on."""
    return {
        "run.folder": folder,
        "model.base": base,
        "data.folder": pictures,
        "data.held_out_fraction": 0.3,
        "data.resolution": 64,
        "data.cache": cache,
        "diffusion.timestep_law": "stratified",
        "adapter.rank": 4,
        "adapter.alpha": 8,
        "adapter.dropout": 0.1,
        "optim.learning_rate": 1e-2,
        "optim.warmup_steps": 2,
        "optim.decay": "cosine",
        "train.steps": STEPS,
        "train.batch_size": 4,
        "train.mixed_precision": "no",
        "train.ema_decay": 0.9,
        "train.checkpoint_every": 2,
        "validation.every": 3,
        "validation.timesteps": 4,
        "validation.prompts": ["a red circle"],
        "validation.steps": 2,
        "validation.samples_every": 100,
        "logging.every": 1,
        "logging.trackers": [],
    }


@contextmanager
def blank_curves() -> Iterator[None]:
    """Whatever matplotlib draws inside is a white picture: the curves of a short run take as long as the rest of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "draw", lambda figure, renderer: None)
        yield


def configured(options: Options, **more: Any) -> TrainConfig:
    """The configuration of these options; keyword `run__folder` overrides run.folder."""
    given = options | {key.replace("__", "."): value for key, value in more.items()}
    tree: dict[str, Options] = {}
    for key, value in given.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = str(value) if isinstance(value, Path) else value
    return load(TrainConfig, tree)


def train(options: Options, **more: Any) -> Path:
    """Run with these options, see `configured`.

    curves: draw those in final/, which else are blank.
    resume, init_from, accept_changes: as `run_training` takes them.
    rate: a learning rate that a configuration may not ask for, which makes a run diverge.
    """
    curves = bool(more.pop("curves", False))
    resume = more.pop("resume", None)
    rate = more.pop("rate", None)
    init_from = more.pop("init_from", None)
    accept_changes = bool(more.pop("accept_changes", False))
    config = configured(options, **more)
    if rate is not None:
        config = config.model_copy(update={"optim": config.optim.model_copy(update={"learning_rate": rate})})
    with nullcontext() if curves else blank_curves():
        return run_training(config, resume, init_from, accept_changes=accept_changes)


def losses(run: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [record["train"] for record in records if "train" in record]


def assert_same_end(one: Path, other: Path) -> None:
    """Adapters or models, average, optimizer and every logged loss of two runs are equal bit for bit."""
    files = [sorted(path.relative_to(run) for path in run.glob("final/**/*.safetensors")) for run in (one, other)]
    assert files[0] == files[1] != []
    for file in files[0]:
        a, b = (load_file(run / file) for run in (one, other))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for name in STATE_FILES:
        last, others = ((run / "checkpoints" / f"step-{STEPS:06d}" / name).read_bytes() for run in (one, other))
        assert last == others, name
    assert losses(one) == losses(other)
    assert len(losses(one)) == STEPS


def cut_off(at: int, options: Options, **more: Any) -> None:
    """`train`, dying without warning when it begins step `at`, as with a lost machine."""
    whole = Trainer._optimizer_step

    def dying(self: Trainer) -> None:
        if self.step == at:
            raise RuntimeError("the machine is gone")
        whole(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="the machine is gone"):
        patch.setattr(Trainer, "_optimizer_step", dying)
        train(options, **more)


def command(options: Options, **more: Any) -> list[str]:
    """The command line of a run: an empty configuration file and an override for every option."""
    given = options | {key.replace("__", "."): value for key, value in more.items()}
    empty = Path(str(options["run.folder"])).parent / "empty.yaml"
    empty.write_text("")
    values = {
        k: json.dumps(v) if isinstance(v, list) else str(v).lower() if isinstance(v, bool) else v
        for k, v in given.items()
    }
    return ["--config", str(empty), *(f"--{key}={value}" for key, value in values.items())]
