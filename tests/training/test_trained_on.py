"""A run goes on with what it was trained on, and says where that changed. Oracle: contents that this file changes."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pixart_ft.config.train import load_config
from pixart_ft.data.buckets import Sized
from pixart_ft.data.rows import Row
from pixart_ft.errors import UserError
from pixart_ft.model.base import Base
from pixart_ft.runs.log import RunLog
from pixart_ft.training.encode import text_encoder_id, vae_id
from pixart_ft.training.learning_rate import LearningRate
from pixart_ft.training.nested import load_nested
from pixart_ft.training.objective import build_objective
from pixart_ft.training.trained_on import Part, TrainedOn, changes, trained_on
from tests.helpers.runs import STEPS, Options, cut_off, short_run, train
from tests.helpers.tiny import build_picture_folder


@pytest.fixture(scope="module")
def trained(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """The options of a finished run, with held-out pictures of its own; read only."""
    place = tmp_path_factory.mktemp("trained")
    held_out = build_picture_folder(place / "held_out", 3)
    cache = tmp_path_factory.getbasetemp() / "cache"
    options = short_run(tiny, pictures, place / "run", cache) | {
        "data.held_out": held_out,
        "data.held_out_fraction": 0.0,
        "optim.decay": "constant",
        "optim.warmup_steps": 0,
        "validation.every": 0,
        "train.checkpoint_every": 0,
    }
    train(options)
    return options


def test_all_timesteps_are_the_same_range_however_they_are_written(tiny: Path) -> None:
    def settings(ends: list[float]) -> Mapping[str, object]:
        base = Base.read(tiny)
        plain = {"model": {"base": str(tiny)}, "data": {"folder": "demo"}, "diffusion": {"timestep_range": ends}}
        config = load_config(plain, {"train.mixed_precision": "no"})
        objective, schedule = build_objective(config, base)
        nothing = Sized([], [])
        return trained_on(config, base, nothing, nothing, nothing, [], schedule, objective).settings

    assert settings([0, 999]) == settings([0, 1000]) != settings([0, 600])


@pytest.fixture
def options(trained: Options, tmp_path: Path) -> Options:
    """The same run, and all that it was trained on, moved to another place: two steps are left to do."""
    moved: Options = {"train.steps": STEPS + 2}
    for key in ("run.folder", "model.base", "data.folder", "data.held_out"):
        moved[key] = shutil.copytree(trained[key], tmp_path / f"moved {key}")
    return trained | moved


def change_weights(folder: Path, part: str) -> None:
    """Change the last value of one tensor, which a glance at some values would not see."""
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    name = max(weights, key=lambda key: weights[key].numel())
    weights[name].view(-1)[-1] += 0.5
    save_file(weights, file, metadata={"format": "pt"})


def test_captions_belong_to_their_pictures(tiny: Path, tmp_path: Path) -> None:
    config, base = load_config("quickstart", {"data.cache": tmp_path}), Base.read(tiny)
    objective, schedule = build_objective(config, base)

    def captions(*of_pictures: str) -> Part:
        shares = [(1 / len(said),) * len(said) if len(said) > 1 else () for said in of_pictures]
        rows = [Row(tmp_path, said[0], "", tuple(said[1:]), of) for said, of in zip(of_pictures, shares, strict=True)]
        none = Sized([], [])
        about = trained_on(config, base, Sized.square(rows, 64), none, none, ["", ""], schedule, objective)
        return about.parts["training captions"]

    assert captions("ab", "c") != captions("a", "bc")
    assert captions("a", "b") == Part.of(["a", "b"], "2")  # as runs from before several captions have it


def test_what_encodes_is_named_by_the_commit_that_was_read(tiny: Path, tmp_path: Path) -> None:
    config = load_config("quickstart", {"data.cache": tmp_path})
    base = replace(Base.read(tiny), place="owner/name", revision="v1", commit="abc")
    assert vae_id(config, base) == "owner/name/vae@abc torch.float32"
    assert "owner/name/tokenizer+text_encoder@abc " in text_encoder_id(config, base)


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def add_picture(folder: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(folder / "zzz.png")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "zzz.png", "text": "red"}) + "\n")


def swap_pictures(folder: Path) -> None:
    (folder / "000.png").rename(folder / "x.png")
    (folder / "001.png").rename(folder / "000.png")
    (folder / "x.png").rename(folder / "001.png")


def rename_pictures(folder: Path) -> None:
    """They are taken by name, so in another order."""
    swap_pictures(folder)
    table = folder / "metadata.jsonl"
    text = table.read_text().replace("000.png", "x.png").replace("001.png", "000.png")
    table.write_text(text.replace("x.png", "001.png"))


def other_caption(folder: Path) -> None:
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text().replace("red circle", "blue circle"))


CHANGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a picture more": ("data.folder", add_picture, r"training pictures: 12 before, 13 now"),
    "other pictures": ("data.folder", swap_pictures, r"training pictures: not the same as before"),
    "renamed": ("data.folder", rename_pictures, r"training pictures: the same in another order"),
    "other captions": ("data.folder", other_caption, r"training captions: not the same as before"),
    "a held-out picture more": ("data.held_out", add_picture, r"held-out pictures: 3 before, 4 now"),
    "held-out swapped": ("data.held_out", swap_pictures, r"held-out pictures: not the same as before"),
    "base weights": ("model.base", lambda base: change_weights(base, "transformer"), r"base: .* before, .* now"),
    "VAE": ("model.base", lambda base: change_weights(base, "vae"), r"VAE: not the same as before"),
    "VAE scale": (
        "model.base",
        lambda base: change_json(base / "vae/config.json", scaling_factor=0.5),
        "VAE: not the same as before",
    ),
    "T5": ("model.base", lambda base: change_weights(base, "text_encoder"), r"text encoder: not the same as before"),
    "schedule": (
        "model.base",
        lambda base: change_json(base / "scheduler/scheduler_config.json", beta_end=0.03),
        r"noise schedule: not the same as before",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_content_is_refused_by_its_name_and_touches_nothing(options: Options, name: str) -> None:
    key, change, message = CHANGES[name]
    change(Path(str(options[key])))
    run = Path(str(options["run.folder"]))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match=rf"from step {STEPS}, and these are not as they were:\n(  - .*\n)*  - {message}\n"
    ) as found:
        train(options, resume="auto")
    assert "--accept-changes" in str(found.value) and f"    ({key} was '" in str(found.value)
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert {path: content for path, content in before.items() if path.name != ".lock"} == after


def test_a_prior_that_was_not_there_is_refused(options: Options, tmp_path: Path) -> None:
    prior = build_picture_folder(tmp_path / "prior", 2)
    with pytest.raises(UserError, match=r"prior pictures: 0 before, 2 now"):
        train(options, data__prior=prior, resume="auto")


def test_what_a_schedule_free_average_is_mixed_with_stays() -> None:
    flat = {"optim.optimizer": "schedule_free", "optim.beta1": 0.9, "train.steps": 9}
    rate = LearningRate(1e-3, 0, "constant", 9)
    began, now = (TrainedOn({}, flat | {"optim.beta1": beta}) for beta in (0.9, 0.5))
    with pytest.raises(UserError, match=r"cannot go on: optim\.beta1 was 0\.9, is 0\.5"):
        changes(began, now, rate, 4)


def test_a_moved_folder_of_the_same_content_goes_on(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    train(options, resume="auto")
    out = capsys.readouterr().out
    assert f"continuing {options['run.folder']} from step {STEPS} of {STEPS + 2}\n" in out
    assert f"changed: train.steps was {STEPS}, is {STEPS + 2}\n" in out and out.count("changed:") == 1


def test_other_held_out_pictures_where_accepted_begin_the_comparison_anew(
    options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their number too: what is measured at the end is compared with the same pictures."""
    add_picture(Path(str(options["data.held_out"])))
    run = train(options, resume="auto", accept_changes=True)
    out = capsys.readouterr().out
    assert "changed: held-out pictures: 3 before, 4 now\n" in out
    assert f"compared with step {STEPS}, where the comparison began anew" in out
    records = RunLog(run / "log.jsonl").records()
    (mark,) = (number for number, record in enumerate(records) if "begins_anew" in record)
    assert [r["step"] for r in records[mark:] if "held_out" in r] == [STEPS, STEPS + 2]
    train(options, resume="auto")  # from now on these are its pictures
    assert f"compared with step {STEPS}" in capsys.readouterr().out


def test_other_training_pictures_where_accepted_keep_the_comparison(
    options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    add_picture(Path(str(options["data.folder"])))
    train(options, resume="auto", accept_changes=True)
    out = capsys.readouterr().out
    assert "changed: training pictures: 12 before, 13 now\n" in out and "anew" not in out


def test_settings_are_checked_without_the_file_of_settings(options: Options) -> None:
    (Path(str(options["run.folder"])) / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"adapter\.alpha was 8\.0, is 64\.0"):
        train(options, adapter__alpha=64, resume="auto")


def test_settings_of_an_earlier_version_have_their_present_names(tmp_path: Path) -> None:
    written = {"parts": {}, "settings": {"lora.rank": 4, "optim.decay": "cosine"}}
    (tmp_path / "run.json").write_text(json.dumps(written))
    assert TrainedOn.read(tmp_path).settings == {"adapter.rank": 4, "optim.decay": "cosine"}


def test_words_that_mean_the_same_are_no_change(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    """The run goes on, and only its new length is announced."""
    train(
        options,
        diffusion__schedule="linear",
        diffusion__prediction_type="epsilon",
        model__dtype="float32",
        model__text_encoder_dtype="float32",
        validation__pictures=50,
        resume="auto",
    )
    changes = [line for line in capsys.readouterr().out.splitlines() if "changed:" in line]
    assert changes == ["  changed: train.steps was 6, is 8"]


def test_a_checkpoint_of_an_earlier_version_has_to_be_accepted(
    options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = (Path(str(options["run.folder"])) / "checkpoints").iterdir()
    (folder / "run.json").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["run.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="what it was trained on is not recorded"):
        train(options, resume="auto")
    train(options, resume="auto", accept_changes=True)


def test_the_advice_after_a_divergence_can_be_followed(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    """What diverged leaves the checkpoint and the result from before; a lower rate goes on from there."""
    run = Path(str(options["run.folder"]))
    adapter = (run / "final" / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(
        UserError, match=rf"diverged.*Lower .*learning_rate \(1e\+30\); then continue from step {STEPS} with"
    ):
        train(options, rate=1e30, optim__clip_norm=0, train__checkpoint_every=1, resume="auto")
    assert (run / "final" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{STEPS:06d}"]
    stale = [run / "samples" / f"step-{STEPS + 1:06d}", run / "adapters" / f"step-{STEPS + 1:06d}"]
    for folder in stale:  # of the course that is left now
        folder.mkdir(parents=True)
    train(options, optim__learning_rate=1e-3, optim__weight_decay=0.25, resume="auto")
    assert not any(folder.exists() for folder in stale)
    (group,) = load_nested(run / "checkpoints" / f"step-{STEPS + 2:06d}" / "optimizer.safetensors")["param_groups"]
    assert group["weight_decay"] == 0.25  # the moments are the checkpoint's, the settings are not
    out = capsys.readouterr().out
    assert "changed: optim.learning_rate was 0.01, is 0.001\n" in out
    assert "changed: the learning rate was 0.01 and goes on at 0.001\n" in out
    assert (run / "final" / "adapter" / "adapter_model.safetensors").read_bytes() != adapter


def test_fewer_steps_than_done_are_refused(options: Options) -> None:
    with pytest.raises(UserError, match=rf"train\.steps is 3, and this run has done {STEPS} steps already"):
        train(options, train__steps=3, resume="auto")


def test_a_result_without_a_checkpoint_is_not_begun_again(options: Options) -> None:
    shutil.rmtree(Path(str(options["run.folder"])) / "checkpoints")
    with pytest.raises(UserError, match="has a result and no whole checkpoint"):
        train(options, resume="auto")


def test_a_checkpoint_that_is_not_finite_is_refused(options: Options) -> None:
    (folder,) = (Path(str(options["run.folder"])) / "checkpoints").iterdir()
    weights = load_file(folder / "trained.safetensors")
    with (folder / "trained.safetensors").open("r+b") as file:  # the last value becomes NaN; the manifest lets it be
        file.seek(-4, 2)
        file.write(torch.tensor([float("nan")]).numpy().tobytes())
    (folder / "manifest.json").write_text("{}")
    assert weights
    with pytest.raises(UserError, match="not finite: give an earlier checkpoint"):
        train(options, resume="auto")


def test_init_from_is_not_forgotten_before_the_first_checkpoint(options: Options, tmp_path: Path) -> None:
    """A run that began with another's weights and dies in its first step goes on with them."""
    first, new = Path(str(options["run.folder"])), {"run.folder": tmp_path / "new", "train.steps": 1}
    cut_off(0, options | new, init_from=str(first))
    state = load_file(tmp_path / "new" / "checkpoints" / "step-000000" / "trained.safetensors")
    trained = load_file(first / "checkpoints" / f"step-{STEPS:06d}" / "ema.safetensors")
    shadows = sorted(trained.items())  # in the same order; the exported adapter is the average
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(sorted(state.items()), shadows, strict=True))
    train(options | new, resume="auto")


# The rules, without a run

RATE = LearningRate(peak=1.0, warmup_steps=0, decay="cosine", steps=100)


def settings(rate: LearningRate) -> Options:
    optim = {"learning_rate": rate.peak, "warmup_steps": rate.warmup_steps, "decay": rate.decay}
    return {"train.steps": rate.steps} | {f"optim.{name}": value for name, value in optim.items()}


def found(step: int = 100, **more: Any) -> tuple[list[str], list[str]]:
    """Said and refused when RATE, after `step` steps, goes on with these fields changed."""
    rate = replace(RATE, **more)
    result = changes(TrainedOn({}, settings(RATE)), TrainedOn({}, settings(rate)), rate, step)
    return list(result.said), list(result.refused)


def test_a_rate_that_would_jump_up_is_refused_and_another_change_of_it_is_said() -> None:
    said, refused = found(steps=200)  # the cosine is at its middle again: 0.5, after 1/2 (1 + cos(0.99 pi)) = 0.000247
    assert said == ["train.steps was 100, is 200"]
    assert refused == [
        "the learning rate was 0.000247 and goes on at 0.5: train.steps stretches the cosine decay",
    ]
    said, refused = found(steps=200, peak=0.1)
    assert not refused and said[-1] == "the learning rate was 0.000247 and goes on at 0.05"
    said, refused = found(step=50, steps=60)  # down from 0.516 to 1/2 (1 + cos(50/60 pi)) = 0.067
    assert not refused and said[-1] == "the learning rate was 0.516 and goes on at 0.067"
    assert found(step=50) == ([], [])
    assert found() == ([], [])


def test_what_would_make_another_run_is_refused() -> None:
    """The course hangs on the seed as on the loss; names, places and how a run is watched are no matter."""

    def refused(key: str) -> list[str]:
        began, now = (TrainedOn({}, settings(RATE) | {key: value}) for value in (1, 2))
        return list(changes(began, now, RATE, 10).refused)

    for key in ("run.seed", "diffusion.objective", "diffusion.caption_dropout", "train.ema_decay", "adapter.alpha"):
        assert refused(key) == [f"{key} was 1, is 2"]
    for key in ("run.name", "run.folder", "data.cache", "train.keep_checkpoints", "validation.every"):
        assert refused(key) == []


def test_another_order_of_the_pictures_is_refused_and_keeps_the_comparison() -> None:
    """Checkpoints from before the order had a name were shuffled by a table."""
    now = TrainedOn({"training order": Part.of(["b"], "b")}, settings(RATE))
    found = changes(TrainedOn({}, settings(RATE)), now, RATE, 3)
    assert list(found.refused) == ["training order: a shuffled table before, b now"] and not found.begins_anew
    assert not changes(now, now, RATE, 3).refused


def test_a_warm_up_that_was_cut_is_no_change_of_the_rate() -> None:
    """Settings keep the warm-up as asked for; a short try of a recipe with a longer one can be resumed."""
    short = replace(RATE, steps=10, warmup_steps=1, decay="constant")
    as_asked = TrainedOn({}, settings(replace(short, warmup_steps=50)))
    result = changes(as_asked, as_asked, short, 5)
    assert (result.said, result.refused) == ([], [])


def test_the_comparison_begins_anew_only_where_it_depends_on_the_change() -> None:
    def anew(name: str) -> bool:
        began = TrainedOn({name: Part.of([1])}, settings(RATE))
        return changes(began, TrainedOn({name: Part.of([2])}, settings(RATE)), RATE, 10).begins_anew

    assert [anew(n) for n in ("training pictures", "training captions")] == [False, False]
    parts = ("held-out pictures", "held-out captions", "base", "VAE", "text encoder", "noise schedule")
    assert all(anew(name) for name in parts)


def test_parts_depend_on_order_and_content_alone() -> None:
    assert Part.of(["a", "b"]) != Part.of(["b", "a"])
    assert Part.of(["ab"]) != Part.of(["a", "b"])
    assert Part.of(iter("ab"), "2") == Part.of(["a", "b"], "2")
