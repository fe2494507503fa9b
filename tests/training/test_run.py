"""Whole training runs on the tiny pipeline. Oracles: bit equality after a resume, equality to rounding between ways of
cutting the same global batch, and what must not change."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image, ImageChops, ImageStat
from safetensors.torch import load_file

from pixart_ft.adapters.files import Adapter
from pixart_ft.cli import main
from pixart_ft.config.train import load_config
from pixart_ft.data.folders import read_folder
from pixart_ft.data.rows import split
from pixart_ft.errors import UserError
from pixart_ft.model import loading
from pixart_ft.model.base import Base
from pixart_ft.pictures.recipes import read_recipe
from pixart_ft.runs.folder import RunFolder
from pixart_ft.runs.lock import RunLock
from pixart_ft.runs.log import RunLog
from pixart_ft.runs.metadata import read_metadata
from pixart_ft.sampling.text_to_image import TextToImage
from pixart_ft.training import report, watching
from pixart_ft.training import run as run_module
from pixart_ft.training.before_after import HELD_OUT, LEARNED, before_after
from pixart_ft.training.keeping import lowest_step
from pixart_ft.training.nested import load_nested
from pixart_ft.training.records import Progress
from pixart_ft.training.start import dry_run, learning_rate_of
from pixart_ft.training.trainer import Trainer
from tests.helpers.runs import STEPS, Options, assert_same_end, command, cut_off, losses, short_run, train

ROOT = Path(__file__).parents[2]
UNWATCHED: Options = {"data.held_out_fraction": 0.0, "validation.prompts": []}


@pytest.fixture
def options(tiny: Path, pictures: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A short run of this test's own; the cache is shared by all tests."""
    return short_run(tiny, pictures, tmp_path / "run", tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(scope="module")
def straight(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `options` from its beginning to its end; read only."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    return train(short_run(tiny, pictures, folder, tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def finished(options: Options, straight: Path) -> Path:
    """The same in the folder of `options`, for a test that goes on with it."""
    return Path(shutil.copytree(straight, options["run.folder"]))


def test_resumed_run_equals_uninterrupted_run_bit_for_bit(options: Options, straight: Path) -> None:
    """After a death a step behind the checkpoint of 4, whose log line must not stay; and with that one broken."""
    cut_off(5, options)
    again = Path(shutil.copytree(options["run.folder"], options["run.folder"].with_name("again")))
    torch.manual_seed(123)  # whatever the new process has drawn so far
    assert_same_end(straight, train(options, resume="auto"))
    newest = again / "checkpoints" / "step-000004" / "optimizer.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    with pytest.warns(UserWarning, match="optimizer.safetensors"):
        assert_same_end(straight, train(options, run__folder=again, resume="auto"))


def test_a_signal_saves_first_and_loses_nothing(
    options: Options, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trainer._optimizer_step

    def signalled(self: Trainer) -> None:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        whole(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_optimizer_step", signalled)
        with pytest.raises(KeyboardInterrupt, match="step 3"):
            train(options, run__folder=tmp_path / "cut")
    assert (tmp_path / "cut" / "checkpoints" / "step-000003").is_dir()
    assert_same_end(straight, train(options, run__folder=tmp_path / "cut", resume="auto"))


def test_a_run_may_be_trained_in_a_thread(options: Options) -> None:
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(train, options, train__steps=1, optim__warmup_steps=0).result()
    assert (run / "final" / "adapter").is_dir()


def test_two_trainings_of_one_run_at_a_time_are_refused(options: Options, finished: Path) -> None:
    config = (finished / "config.yaml").read_bytes()
    with RunLock(finished) as lock:
        lock.take()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on .* since"):
            train(options, train__steps=STEPS + 1, resume="auto")
    assert (finished / "config.yaml").read_bytes() == config


def test_accumulation_sees_the_same_samples(options: Options, tmp_path: Path) -> None:
    options |= UNWATCHED | {"adapter.dropout": 0.0}  # the one draw that goes by micro-batch
    whole = losses(train(options))
    parts = losses(train(options, run__folder=tmp_path / "parts", train__batch_size=2, train__accumulation=2))
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_validation_and_samples_do_not_move_the_course(options: Options, tmp_path: Path) -> None:
    often = train(options, validation__every=1, validation__samples_every=1)
    never = train(options, run__folder=tmp_path / "other", validation__prompts=[], data__held_out_fraction=0.3)
    assert losses(often) == losses(never)


@pytest.mark.parametrize("sampler", ["iddpm", "edm"])
def test_the_grid_is_drawn_as_generate_draws(options: Options, tiny: Path, sampler: str) -> None:
    """Before the first step the adapter adds nothing: the base's own pictures, by the sampler named."""
    run = train(
        options,
        train__steps=1,
        optim__warmup_steps=0,
        data__held_out_fraction=0.0,
        validation__sampler=sampler,
        validation__steps=4,
        validation__guidance=2.0,
        validation__prompts=["a red circle", "a black square on pink"],
        validation__seeds=[3, 4],
    )
    drawn = [Image.open(path).convert("RGB") for path in sorted((run / "samples" / "step-000000").glob("*.png"))]
    names = [f"{n:04d}-{what}" for n, what in enumerate(("a-red-circle-seed3", "a-red-circle-seed4"))]
    assert [path.stem for path in sorted((run / "samples" / "step-000001").iterdir())][:2] == names
    sheet, recipe = (
        run / "samples" / "step-000001.png",
        read_recipe(run / "samples" / "step-000001" / f"{names[1]}.png"),
    )
    assert recipe == {"prompt": "a red circle", "seed": 4, "run": run.name, "step": 1}
    with Image.open(sheet) as labelled:
        assert labelled.height > 4 + 2 * 68 and read_recipe(sheet) == {"run": run.name, "step": 1}  # labels above
    model = TextToImage.load(tiny)
    expected = model.generate(
        ["a red circle", "a black square on pink"], sampler=sampler, steps=4, guidance=2.0, seeds=[3, 4]
    )
    assert len(drawn) == len(expected) == 4
    for ours, theirs in zip(drawn, expected, strict=True):
        (away,) = ImageStat.Stat(ImageChops.difference(ours, theirs).convert("L")).mean
        assert away < 0.02  # a rounding here and there, of 255 levels; DDIM's pictures are 0.1 away from iDDPM's
    with pytest.raises(UserError, match=r"validation\.sampler iddpm steps by the learned variance"):
        train(options, run__folder=run / "x", validation__sampler="iddpm", diffusion__objective="simple")


def test_what_a_run_leaves(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(options, logging__trackers=["tensorboard"], curves=True)
    final = run / "final"
    assert {p.name for p in final.iterdir()} == {
        "adapter",
        "adapter_raw",
        "before_after.png",
        "loss.png",
        "loss_terms.png",
    }
    for sheet in final.glob("*.png"):
        assert len(Image.open(sheet).convert("RGB").getcolors(1_000_000) or []) > 10, "it is drawn"
    meta = json.loads((final / "adapter" / "pixart_ft.json").read_text())
    raw = json.loads((final / "adapter_raw" / "pixart_ft.json").read_text())
    assert (meta["weights"], raw["weights"]) == ("ema", "raw")
    assert meta["variance"] == "trained" and meta["prediction_type"] == "epsilon"
    assert (meta["rank"], meta["alpha"], meta["samples_seen"]) == (4, 8, STEPS * 4)
    assert meta["schedule"]["beta_schedule"] == "linear"
    averaged, last = (load_file(final / a / "adapter_model.safetensors") for a in ("adapter", "adapter_raw"))
    assert any(not torch.equal(averaged[k], last[k]) for k in averaged)
    assert list(run.glob("**/events.out.tfevents*"))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    printed = capsys.readouterr().out
    assert "held-out loss" in printed and "standard errors" in printed and str(final / "adapter") in printed


def test_the_adapter_alone_is_trained(options: Options, tiny: Path) -> None:
    before = loading.load_transformer(Base.read(tiny), dtype=torch.float32).state_dict()
    run = train(options | UNWATCHED, train__steps=3)
    state = load_nested(run / "checkpoints" / "step-000003" / "trained.safetensors")
    assert state and all(".lora_" in name for name in state)
    assert all(value.abs().max() > 0 for name, value in state.items() if ".lora_B." in name)  # B began at zero
    after = loading.load_transformer(Base.read(tiny), dtype=torch.float32).state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_training_lowers_the_loss_on_its_own_pictures(options: Options, pictures: Path, tmp_path: Path) -> None:
    same = shutil.copytree(pictures, tmp_path / "same")  # the folder itself is refused
    ends: Options = {"validation.every": 0, "validation.prompts": [], "train.checkpoint_every": 0}
    options |= ends | {"data.held_out": same, "data.held_out_fraction": 0.0}
    run = train(options, train__steps=40, train__ema_decay=0.0)
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    held = [record["held_out"]["loss"]["mean"] for record in records if "held_out" in record]
    assert held[-1] < 0.9 * held[0]


@pytest.mark.usefixtures("straight")
def test_nothing_is_encoded_or_loaded_twice(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("T5 was loaded although every caption is cached")

    monkeypatch.setattr(loading, "load_text_encoder", refuse)
    again = train(options, run__folder=tmp_path / "again", train__steps=1, optim__warmup_steps=0)
    assert len(losses(again)) == 1
    with pytest.raises(AssertionError, match="T5 was loaded"):  # the trap works: a new prompt has to be encoded
        train(options, run__folder=tmp_path / "new", validation__prompts=["a caption nobody has encoded yet"])


def test_epsilon_objective_marks_the_variance_stale(options: Options) -> None:
    run = train(options | UNWATCHED, train__steps=3, diffusion__objective="simple", train__ema_decay=0.0)
    meta = json.loads((run / "final" / "adapter" / "pixart_ft.json").read_text())
    assert meta["variance"] == "stale" and meta["weights"] == "raw"
    assert not (run / "final" / "adapter_raw").exists()


def test_cosine_schedule_is_trained_and_recorded(options: Options, straight: Path) -> None:
    run = train(options, diffusion__schedule="cosine")
    meta = json.loads((run / "final" / "adapter" / "pixart_ft.json").read_text())
    assert meta["schedule"]["beta_schedule"] == "squaredcos_cap_v2"
    assert losses(run)[0]["loss"] != losses(straight)[0]["loss"]


def test_gradient_checkpointing_changes_memory_alone(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block, or every second, is run once more in every step, to the same losses."""
    options |= UNWATCHED | {"adapter.dropout": 0.0}
    whole, runs = BasicTransformerBlock.forward, []

    def counted(block: BasicTransformerBlock, *args: Any, **kwargs: Any) -> Any:
        runs.extend([block] * block.training)  # the check before a checkpoint trains nothing
        return whole(block, *args, **kwargs)

    monkeypatch.setattr(BasicTransformerBlock, "forward", counted)
    plain = losses(train(options))
    assert len(runs) == 2 * STEPS  # the tiny transformer has two blocks
    saving = losses(train(options, run__folder=tmp_path / "saving", model__gradient_checkpointing=True))
    assert len(runs) == 2 * STEPS + 4 * STEPS
    half = losses(train(options, run__folder=tmp_path / "half", model__gradient_checkpointing=2))
    assert len(runs) == 2 * STEPS + 4 * STEPS + 3 * STEPS
    assert [a["loss"] for a in plain] == [a["loss"] for a in saving] == [a["loss"] for a in half]


def test_adapter_dropout_acts_in_training_and_not_before_there_is_something_to_drop(
    options: Options, tmp_path: Path
) -> None:
    """B is zero in the first step, so that what A is given does not matter yet."""
    options |= UNWATCHED | {"train.steps": 3}
    never, often = (
        [a["loss"] for a in losses(train(options, run__folder=tmp_path / str(dropout), adapter__dropout=dropout))]
        for dropout in (0.0, 0.5)
    )
    assert often[0] == pytest.approx(never[0], rel=1e-6)
    assert often[2] != pytest.approx(never[2], rel=1e-4)


def test_bf16_trains_a_float32_adapter_on_a_bfloat16_base(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, for the held-out loss and for the samples alike, under autocast."""
    whole, seen = BasicTransformerBlock.forward, set()

    def recorded(block: BasicTransformerBlock, *args: Any, **kwargs: Any) -> Any:
        seen.add((block.norm1.training, block.ff.net[2].weight.dtype, torch.is_autocast_enabled("cpu")))
        return whole(block, *args, **kwargs)

    monkeypatch.setattr(BasicTransformerBlock, "forward", recorded)
    run = train(options, train__steps=3, train__mixed_precision="bf16")
    assert seen == {(training, torch.bfloat16, True) for training in (True, False)}
    state = load_nested(run / "checkpoints" / "step-000003" / "trained.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in losses(run))


def test_init_from_takes_weights_and_not_state(options: Options, tmp_path: Path) -> None:
    options |= {"train.steps": 3, "validation.prompts": []}
    first = train(options, train__ema_decay=0.0)
    second = train(options, run__folder=tmp_path / "second", init_from=str(first), train__ema_decay=0.0)
    records = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (first, second)]
    end, begin = ([r["held_out"]["loss"]["mean"] for r in found if "held_out" in r] for found in records)
    assert begin[0] == end[-1]
    assert losses(second)[0] != losses(first)[0]


def test_the_sheet_of_before_and_after_sets_the_real_pictures_beside(options: Options) -> None:
    rows = read_folder(options["data.folder"])
    learned, held = split(rows, options["data.held_out_fraction"], 7)
    prompts = [held[0].caption, learned[0].caption, "a zebra"]
    run = train(options, run__seed=7, train__steps=3, validation__prompts=prompts, validation__seeds=[1, 2])
    files = [sorted((run / "samples" / f"step-{step:06d}").glob("*.png"))[::2] for step in (0, 3)]
    before, after = [[Image.open(file).convert("RGB") for file in each] for each in files]
    expected = before_after(prompts, before, after, {LEARNED: learned, HELD_OUT: held})
    with Image.open(run / "final" / "before_after.png") as sheet:
        assert sheet.convert("RGB") == expected


def test_a_run_without_prompts_held_out_pictures_or_extras_ends_well(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    for extra in ("bitsandbytes", "xformers", "prodigyopt", "schedulefree"):
        monkeypatch.setitem(sys.modules, extra, None)  # as if it were not installed
    run = train(options | UNWATCHED, train__steps=3)
    assert (run / "final" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (run / "final" / "before_after.png").exists()


def refused(options: Options, match: str, **more: object) -> None:
    """The run is refused with a message that matches, and leaves no run folder."""
    folder = Path(str((options | {k.replace("__", "."): v for k, v in more.items()})["run.folder"]))
    with warnings.catch_warnings(), pytest.raises(UserError, match=match):
        warnings.simplefilter("ignore")
        train(options, **more)
    assert not folder.exists()


def test_places_that_cannot_be_written_are_refused_before_any_weights_are_loaded(
    options: Options, tiny: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    for path in base.rglob("*.safetensors"):
        path.unlink()
    (tmp_path / "file").write_text("")
    options |= {"model.base": base, "data.cache": tmp_path / "cache"}
    long = tmp_path / ("x" * 300)
    for key, place, reason in (
        ("run.folder", tmp_path / "file" / "run", "run.folder: .*run cannot be .*: a part of this path is a file"),
        ("run.folder", long, "the name is too long"),
        ("data.cache", tmp_path / "file" / "cache", "data.cache: .*cache cannot be .*: a part of this path is a file"),
        ("data.cache", long, "the name is too long"),
    ):
        with pytest.raises(UserError, match=reason):
            train(options | {key: place})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "file"]


def test_bad_input_leaves_no_run_behind(options: Options, tmp_path: Path) -> None:
    refused(options, r"absent does not exist.*data\.folder", data__folder=tmp_path / "absent")
    refused(options, r"data\.resolution\[0\] is 88; expected .*multiple of 16", data__resolution=88)
    refused(options, "model.base", model__base=tmp_path / "nothing")
    refused(options, r"adapter\.targets.*'to_quack'", adapter__targets=["to_quack"])
    refused(options, "fp16 needs a CUDA GPU", train__mixed_precision="fp16")
    refused(options, "there is no", init_from=str(tmp_path / "nowhere"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n truncated")
    (broken / "a.txt").write_text("a red circle")
    refused(options, r"a\.png", data__folder=broken, data__held_out_fraction=0.0)


def test_existing_run_is_never_overwritten(options: Options, finished: Path) -> None:
    log = (finished / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"exists already.*--resume auto"):
        train(options)
    assert (finished / "log.jsonl").read_bytes() == log


def test_resume_under_other_settings_is_refused_and_touches_nothing(options: Options, finished: Path) -> None:
    before = (finished / "config.yaml").read_bytes()
    with pytest.raises(
        UserError, match=r"adapter\.alpha was 8\.0, is 64\.0\n  - diffusion|diffusion.*\n  - adapter\.alpha"
    ):
        train(options, adapter__alpha=64, diffusion__vlb_scale=2, optim__learning_rate=1.0, resume="auto")
    with pytest.raises(UserError, match=r"4 pictures per step, this run has 2"):
        train(options, train__batch_size=2, resume="auto")
    assert (finished / "config.yaml").read_bytes() == before


def test_a_finished_run_may_go_on_and_logs_every_step_once(options: Options) -> None:
    options |= {"optim.decay": "constant", "validation.every": 2, "validation.prompts": []}
    train(options, train__steps=4)
    train(options, train__steps=4, resume="auto")  # nothing left to do
    run = train(options, train__steps=5, resume="auto")
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "train" in r] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in records if "held_out" in r] == [0, 2, 4, 5]


def test_resuming_before_the_first_checkpoint_begins_again(options: Options, straight: Path) -> None:
    cut_off(1, options)
    assert_same_end(straight, train(options, resume="auto"))


def test_training_gives_up_when_every_gradient_is_infinite(options: Options) -> None:
    wild = {"optim.clip_norm": 0, "optim.warmup_steps": 0, "train.checkpoint_every": 0}
    with pytest.raises(UserError, match="diverged: the loss or the gradient was not finite for 10 steps in a row"):
        train(options | wild, train__steps=40, rate=1e30)
    assert not (Path(str(options["run.folder"])) / "final").exists()


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("rate", [1e30, 1e12])  # weights that are infinite in the end, or finite and useless
def test_what_diverged_is_neither_kept_nor_exported(options: Options, rate: float, ema_decay: float) -> None:
    """Whether in the last steps or at a checkpoint: the end of a run is not the end of the check."""
    wild = {"optim.clip_norm": 0, "optim.warmup_steps": 0, "train.ema_decay": ema_decay}
    for every in (0, 1):
        options["run.folder"] = Path(str(options["run.folder"])).with_name(f"every{every}")
        with pytest.raises(UserError, match=r"diverged: .*Lower optim\.learning_rate"):
            train(options | wild, train__steps=3, train__checkpoint_every=every, rate=rate)
        run = Path(str(options["run.folder"]))
        assert not (run / "final").exists()
        assert not any((run / "checkpoints").iterdir())


def test_the_state_is_saved_before_anything_is_drawn(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grid that never ends loses nothing: its step is on the disk, and a request to stop ends it."""
    options |= {"train.checkpoint_every": 3, "validation.samples_every": 3}
    straight, cut = train(options), tmp_path / "cut"
    whole = watching.Watch.draw

    def asked(self: watching.Watch, progress: Progress) -> None:
        if (cut / "checkpoints" / "step-000003").is_dir():
            os.kill(os.getpid(), signal.SIGTERM)
        whole(self, progress)

    with monkeypatch.context() as patch:
        patch.setattr(watching.Watch, "draw", asked)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
            train(options, run__folder=cut)
    assert not (cut / "samples" / "step-000003").exists()  # the request came before its first network call
    assert_same_end(straight, train(options, run__folder=cut, resume="auto"))
    logs = [[r | {"time": 0, "speed": 0} for r in RunLog(run / "log.jsonl").records()] for run in (straight, cut)]
    assert logs[0] == logs[1]
    assert (cut / "samples" / "step-000003").is_dir()  # what was due is drawn after all


@pytest.mark.parametrize("harm", ["samples", "held-out loss", "curve", "printing"])
def test_the_adapter_is_there_whatever_a_report_does(
    options: Options, harm: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(str(options["run.folder"]))

    def fail(*given: Any, **more: Any) -> Any:
        if harm == "held-out loss" and not (run / "final" / "adapter").exists():
            return whole(*given, **more)
        raise RuntimeError("a report that fails")

    whole = watching.held_out_loss
    if harm == "samples":
        whole_run = Trainer.run

        def and_delete(self: Trainer) -> None:
            whole_run(self)
            shutil.rmtree(run / "samples")

        monkeypatch.setattr(Trainer, "run", and_delete)
    else:
        place = {"held-out loss": watching, "curve": report, "printing": report}[harm]
        name = {"held-out loss": "held_out_loss", "curve": "loss_curve", "printing": "summary"}[harm]
        monkeypatch.setattr(place, name, fail)
    with pytest.warns(UserWarning, match="could not be made; everything else goes on"):
        train(options, train__steps=3)
    assert {"adapter", "adapter_raw"} <= {path.name for path in (run / "final").iterdir()}
    assert str(run / "final" / "adapter") in capsys.readouterr().out


def test_hybrid_needs_a_variance_half(options: Options, tmp_path: Path) -> None:
    from tests.helpers.tiny import build_tiny_pipeline

    base = build_tiny_pipeline(tmp_path / "four", out_channels=4)
    refused(options, "hybrid trains a learned variance", model__base=base)
    run = train(options | UNWATCHED, train__steps=3, model__base=base, diffusion__objective="simple")
    meta = json.loads((run / "final" / "adapter" / "pixart_ft.json").read_text())
    assert meta["variance"] == "none"


@pytest.mark.slow
def test_killed_process_resumes_bit_for_bit(options: Options, straight: Path, tmp_path: Path) -> None:
    """kill -9 of the real program in the middle, then the same command with --resume auto."""
    line = [sys.executable, str(ROOT / "scripts" / "train.py"), *command(options, run__folder=tmp_path / "cut")]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "cut" / "checkpoints" / "step-000002").is_dir():
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "cut" / "final").exists(), "the run ended before it could be killed"
    subprocess.run([*line, "--resume", "auto"], check=True, stdout=subprocess.DEVNULL)
    assert_same_end(straight, tmp_path / "cut")


@pytest.mark.slow
def test_two_processes_equal_one(options: Options, tmp_path: Path) -> None:
    """torchrun with two gloo processes at the same global batch: the same losses to rounding, one log."""
    options["adapter.dropout"] = 0.0
    one = train(options)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    script = [str(ROOT / "scripts" / "train.py"), *command(options, run__folder=tmp_path / "two", train__batch_size=2)]
    subprocess.run([*launcher, *script], check=True, capture_output=True)
    for a, b in zip(losses(one), losses(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    ours, theirs = (
        load_file(run / "final" / "adapter" / "adapter_model.safetensors") for run in (one, tmp_path / "two")
    )
    for key in ours:
        assert torch.allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-6), key


def test_command_line_and_function_are_the_same_program(options: Options, straight: Path) -> None:
    assert main(["train", *command(options)]) == 0
    assert_same_end(straight, options["run.folder"])
    assert main(["train", *command(options)]) == 2  # it exists now


def test_what_was_trained_can_be_drawn(
    options: Options,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the end of a run to a picture through the command line, with and without naming the base."""
    with monkeypatch.context() as patch:
        patch.chdir(tiny.parent)
        run = train(options | UNWATCHED, train__steps=3, model__base=tiny.name)  # by its whole path
    line = ["generate", "--lora", str(run), "--prompt", "a red circle", "--steps", "3", "--dtype", "float32"]
    assert main([*line, "--out", str(tmp_path / "a")]) == 0
    assert main([*line, "--out", str(tmp_path / "b"), "--model", str(tiny), "--weights", "raw"]) == 0
    averaged, last = (tmp_path / name / "000-a-red-circle-seed0.png" for name in "ab")
    recipe = read_recipe(averaged)
    assert recipe["model"] == str(tiny) and recipe["adapter"]["metadata"]["variance"] == "trained"
    assert averaged.read_bytes() != last.read_bytes()
    trained_on = json.loads((run / "final" / "adapter" / "pixart_ft.json").read_text())["schedule"]
    assert trained_on == {
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "rescale_betas_zero_snr": False,
    }


@pytest.mark.parametrize(("steps", "used"), [(600, 20), (20, 20), (19, 1), (10, 1), (9, 0), (1, 0)])
def test_a_warm_up_never_blocks_a_short_try(steps: int, used: int) -> None:
    """The recipe's warm-up of 20 steps, and a run of any length: a tenth of the run where it would not end."""
    config = load_config("quickstart", {"train.steps": str(steps)})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rate = learning_rate_of(config)
    assert rate.warmup_steps == used
    shown = [f"optim.warmup_steps 20 would not end within train.steps {steps}: {used} are used, a tenth of them"]
    assert [str(warning.message) for warning in told] == ([] if used == 20 else shown)
    assert rate.at(0) == config.optim.learning_rate / max(1, used)


def kept(run: Path) -> dict[str, bytes]:
    """The weights of the adapters kept on the way, by the names of their folders."""
    return {f.name: (f / "adapter_model.safetensors").read_bytes() for f in sorted((run / "adapters").iterdir())}


def test_every_sample_step_keeps_an_adapter_and_so_does_the_lowest_loss(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracles: the average in the checkpoint of the same step, and the lowest loss in the log."""
    often = {"validation__every": 1, "validation__samples_every": 4, "train__checkpoint_every": 4}
    run = train(options, **often)
    means = {r["step"]: r["held_out"]["loss"]["mean"] for r in RunFolder(run).log.records() if "held_out" in r}
    lowest = min(range(1, STEPS + 1), key=means.__getitem__)
    assert sorted(means) == list(range(STEPS + 1))
    assert list(kept(run)) == [f"step-{step:06d}" for step in sorted({4, lowest} - {STEPS})]

    adapter = Adapter.read(f"{run}@4")
    found, metadata = adapter.folder, adapter.metadata
    assert (found, metadata.step, metadata.samples_seen, metadata.weights) == (
        run / "adapters" / "step-000004",
        4,
        16,
        "ema",
    )
    average = load_nested(run / "checkpoints" / "step-000004" / "ema.safetensors")["shadows"]
    saved = load_file(found / "adapter_model.safetensors")
    plain = {name.removeprefix("base_model.model."): value for name, value in saved.items()}
    assert len(plain) == len(average)
    assert all(torch.equal(plain[name.replace(".default.", ".")], value) for name, value in average.items())
    assert Adapter.read(f"{run}@{STEPS}").folder == run / "final" / "adapter"
    assert read_metadata(run / "final" / "adapter").step == STEPS

    printed = capsys.readouterr().out
    assert f"of steps {', '.join(str(s) for s in sorted({4, lowest} - {STEPS}))} (" in printed
    assert (f"loss {means[lowest]:.4f} after step {lowest} of {STEPS}" in printed) is (lowest != STEPS)
    assert (f"generate --lora {run}@{lowest} --prompt 'a red circle'" in printed) is (lowest != STEPS)

    # after the adapter of step 4 or 5, which the resumed run makes again
    cut_off(5, options, run__folder=tmp_path / "cut", **often)
    assert kept(train(options, run__folder=tmp_path / "cut", resume="auto", **often)) == kept(run)

    begun = train(
        options, run__folder=tmp_path / "next", init_from=f"{run}@4", train__steps=1, optim__learning_rate=1e-9
    )
    start = load_file(begun / "final" / "adapter" / "adapter_model.safetensors")
    assert all(torch.allclose(start[name], value, atol=1e-7) for name, value in saved.items())


def test_what_is_no_adapter_of_a_run_is_told_what_is(options: Options) -> None:
    cut_off(5, options, validation__samples_every=2, validation__every=0)
    run = options["run.folder"]
    has = re.escape(f"kept on the way: {run}@2, {run}@4")
    for path, message in {
        run: f"has no final adapter yet: finish it with --resume auto, or take one of its steps \\(.*{has}",
        f"{run}@3": f"the run {run} has no adapter of step 3 \\({has}\\)",
        run / "checkpoints" / "step-000004": f"lies inside the run {run} and is no adapter .*{has}",
        run / "checkpoints" / "step-000040": f"lies inside the run {run} and is no adapter .*{has}",
        run / "samples": f"lies inside the run {run} and is no adapter",
        f"{run}s@3": "there is no .*; did you mean",
    }.items():
        with pytest.raises(UserError, match=message):
            Adapter.read(path)
    with pytest.raises(UserError, match=r"of step 2 the run .* kept only the averaged weights; use --weights ema"):
        Adapter.read(f"{run}@2", weights="raw")
    cut_off(
        3,
        options,
        validation__samples_every=2,
        validation__every=0,
        resume=str(run / "checkpoints" / "step-000002"),
    )
    assert list(kept(run)) == ["step-000002"]  # that of step 4 belonged to a course that was left
    train(options, validation__samples_every=2, validation__every=0, resume="auto")
    assert Adapter.read(f"{run}@6", weights="raw").folder == run / "final" / "adapter_raw"


def test_the_lowest_held_out_loss_is_that_of_a_trained_step() -> None:
    def record(step: int, loss: float) -> Options:
        return {"step": step, "held_out": {"loss": {"mean": loss}}}

    assert lowest_step([]) is None and lowest_step([{"step": 1, "train": {}}, record(0, 0.1)]) is None
    assert lowest_step([record(0, 0.1), record(3, 0.4), record(5, 0.2), record(7, 0.3)]) == 5
    assert lowest_step([record(2, float("nan")), record(3, 0.4), record(4, 0.4)]) == 3


def test_a_dry_run_tells_what_would_run_and_writes_nothing(
    options: Options, pictures: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Oracles: the parameters that a real run trains, and the pictures in the folder."""
    tree = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    config = load_config({}, tree)
    facts = dry_run(config)
    assert not config.run.folder.exists()
    held_out, batch = round(0.3 * 12), 4
    names = ["device", "trained", "pictures", "steps", "length", "in", "picture", "caption", "first"]
    assert [line.split(maxsplit=1)[0] for line in facts[:9]] == names and facts[6].endswith(" 64 x 64")
    assert facts[5] == f"in data.folder     12 pictures: {12 - held_out} trained on, {held_out} measured"
    assert facts[2].split(maxsplit=1)[1] == f"{12 - held_out}, {held_out} held out, 64 x 64 pixels"
    assert facts[3].split()[3:] == ["2,", "of", "4", "pictures", "each"]
    assert facts[4].split(maxsplit=1)[1] == f"{STEPS} steps: each picture {STEPS * batch / (12 - held_out):.4g} times"
    run = train(options)
    assert capsys.readouterr().out.startswith("\n".join(facts))
    assert (run / "contact_sheet.png").is_file()
    saved = load_file(run / "final" / "adapter" / "adapter_model.safetensors")
    assert facts[1].split()[1] == f"{sum(value.numel() for value in saved.values()):,}"
    assert dry_run(config, "auto")[-1].endswith(f"checkpoints/step-{STEPS:06d}")
    for wrong, message in {
        "adapter.targets": "adapter.targets: 'to_z' matches no layer",
        "model.base": "no diffusers model",
        "data.folder": "pictures that cannot be read",
    }.items():
        broken = tmp_path / "broken"
        broken.mkdir(exist_ok=True)
        for number in range(4):
            (broken / f"{number}.png").write_bytes(b"no picture")
            (broken / f"{number}.txt").write_text("a")
        value = ["to_z"] if wrong == "adapter.targets" else str(broken)
        with pytest.raises(UserError, match=message):
            dry_run(load_config({}, tree | {"run.folder": str(tmp_path / "new"), wrong: value}))


def test_a_run_may_end_with_the_report_of_its_evaluation(options: Options, tmp_path: Path) -> None:
    """On the pictures that were held out of the folder, by the settings of the run's own grid."""
    run = train(options | {"validation.report": True, "validation.sampler": "iddpm", "validation.steps": 3})
    found = json.loads((run / "final" / "evaluation" / "report.json").read_text())
    assert [model["label"] for model in found["models"]] == ["base", "run"]
    config = load_config(run / "config.yaml")
    _, held = split(read_folder(str(config.data.folder)), config.data.held_out_fraction, config.run.seed)
    assert found["data"]["pictures"] == [row.name for row in held][: config.validation.pictures]
    assert (found["recipe"]["samplers"], found["recipe"]["steps"]) == (["iddpm"], [3])


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_the_report_holds_t5_in_the_few_bits_of_the_training(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no more of it fits, else the report would fail when the training is done."""
    held, plain = list[str](), loading.load_text_encoder

    def watched(*given: Any, quantization: str = "none", **more: Any) -> Any:
        held.append(quantization)
        return plain(*given, quantization=quantization, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "load_text_encoder", watched)
    few = {"validation.prompts": [], "validation.steps": 2, "validation.pictures": 2, "train.steps": 1}
    train(options | few | {"validation.report": True, "model.text_encoder_quantization": "nf4"})
    assert len(held) > 1 and set(held) == {"nf4"}


def test_the_report_of_an_earlier_end_does_not_stand_for_a_later_one(options: Options) -> None:
    short = {"diffusion.schedule": "cosine", "diffusion.num_steps": 40}  # fewer than the longest respacing
    few = (
        options
        | short
        | {"validation.report": True, "validation.prompts": [], "validation.steps": 2, "validation.pictures": 2}
    )
    written = train(few | {"train.steps": 1}) / "final" / "evaluation" / "report.json"
    before = json.loads(written.read_text())
    train(few | {"train.steps": 2}, resume="auto")
    assert json.loads(written.read_text())["models"] != before["models"]
    assert before["recipe"]["respacings"] == [10, 25]


def test_pictures_that_vanish_once_they_are_encoded_cost_the_contact_sheet_alone(
    options: Options, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, environment = Path(shutil.copytree(pictures, tmp_path / "mine")), run_module._environment

    def late(accelerator: Accelerator) -> dict[str, object]:
        shutil.rmtree(mine)
        return environment(accelerator)

    monkeypatch.setattr(run_module, "_environment", late)
    with pytest.warns(UserWarning, match="the contact sheet could not be made"):
        run = train(options | {"data.folder": mine, "train.steps": 1, "validation.prompts": []})
    assert (run / "final" / "adapter").is_dir() and not (run / "contact_sheet.png").exists()
