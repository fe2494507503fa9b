"""The evaluate command on the tiny pipeline. Oracle: identities between models, and what is put in."""

import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts"))

import report_tables

from pixart_ft import cli
from pixart_ft.config.evaluate import EvaluateConfig
from pixart_ft.config.reading import load
from pixart_ft.data.folders import read_folder
from pixart_ft.diffusion.likelihood import OdeLikelihood
from pixart_ft.diffusion.names import Variance
from pixart_ft.diffusion.readings import Readings, Steps
from pixart_ft.errors import UserError
from pixart_ft.evaluation import command, drawing, plots
from pixart_ft.evaluation.command import run_evaluation
from pixart_ft.evaluation.contestants import look
from pixart_ft.evaluation.held_out import HeldOutSet
from pixart_ft.evaluation.measure import flow_likelihood, readings_at
from pixart_ft.evaluation.places import check_evaluation
from pixart_ft.pictures.recipes import read_recipe
from tests.helpers.adapters import make_adapter
from tests.helpers.launched import launch
from tests.helpers.tiny import build_tiny_pipeline

SMALL = {"pictures": 3, "timesteps": 2, "respacings": [3], "device": "cpu"}


def config(**changes: Any) -> EvaluateConfig:
    return load(EvaluateConfig, {**SMALL, **changes})


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny, tmp_path_factory.mktemp("evaluated") / "mine")


@pytest.fixture(scope="module")
def scrambled(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with another variance half: in the last layer, every second C of 2C channels of a patch."""
    folder = tmp_path_factory.mktemp("evaluated") / "scrambled"
    shutil.copytree(tiny, folder)
    file = next((folder / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    rows = weights["proj_out.bias"].view(4, 8)
    rows[:, 4:] += 30
    save_file(weights, file)
    return folder


@pytest.fixture(scope="module")
def found(
    tiny: Path, adapter: Path, scrambled: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("evaluated") / "out"
    runs = [str(adapter), str(scrambled)]
    return run_evaluation(config(model=str(tiny), runs=runs, data=str(pictures), out=str(out))), out


def test_the_files_say_what_was_found(found: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]) -> None:
    result, out = found
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json"]
    assert json.loads((out / "report.json").read_text()) == result
    assert [model["label"] for model in result["models"]] == ["base", "mine", "scrambled"]
    assert result["models"][1]["adapters"] and not result["models"][2]["adapters"]
    assert set(result["bpd"]) == set(result["calibration"]) == {"whole", "3"}
    assert list(result["bpd"]["3"]["variances"]) == ["learned", "learned_range", "beta_tilde", "beta"]


def test_the_tables_of_a_report_in_markdown_hold_its_numbers(found: tuple[dict[str, Any], Path]) -> None:
    result, _ = found
    models, bits = ([line.split(" | ") for line in text.splitlines()] for text in report_tables.tables(result))
    assert [line[0] for line in models] == ["| model", "| ---", "| base", "| mine", "| scrambled"]
    row, factor = result["loss"]["rows"][1], result["calibration"]["3"]["rows"][1]["factor"]
    change = row["difference"]
    assert models[3][1:3] == [report_tables.number(row, 4), f"{change['mean']:+.4f} ± {change['standard_error']:.4f}"]
    assert models[3][-1] == f"{factor:.3f} |" and models[2][2] == ""
    of_range = result["bpd"]["3"]["variances"]["learned_range"]
    assert ["| 3 steps", "`learned_range`", *(report_tables.number(row, 3) for row in of_range[:2])] in [
        line[:4] for line in bits
    ]


def test_the_page_needs_no_other_file(found: tuple[dict[str, Any], Path]) -> None:
    page = (found[1] / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "http" not in page
    sources = re.findall(r'src="([^"]{0,22})', page)
    assert len(sources) == 3 and set(sources) == {"data:image/png;base64,"}
    for words in ("In short", "latents", "mine", "scrambled", "95 % interval", "every setting"):
        assert words in page


def test_an_axis_of_less_than_a_decade_has_plain_numbers() -> None:
    figure, (narrow, wide) = plots._figure(2)
    for axes, highest in ((narrow, 1.4), (wide, 140)):
        axes.plot([1, 10], [1.1, highest])
        axes.set(yscale="log")
    plots._plain_numbers([narrow, wide])
    figure.draw_without_rendering()
    labels, of_wide = ({tick.label1.get_text() for tick in axes.yaxis.get_major_ticks()} for axes in (narrow, wide))
    labels |= {tick.label1.get_text() for tick in narrow.yaxis.get_minor_ticks()}
    assert "1.2" in labels and not any("10^" in label for label in labels) and any("10^" in one for one in of_wide)


def test_another_variance_half_changes_the_bound_and_the_calibration_alone(found: tuple[dict[str, Any], Path]) -> None:
    result, _ = found
    _, mine, other = result["loss"]["rows"]
    assert other["difference"]["mean"] == 0 and mine["difference"]["mean"] != 0
    for variance, rows in result["bpd"]["3"]["variances"].items():
        assert (rows[2]["difference"]["mean"] == 0) == variance.startswith("beta"), variance
    before, _, after = result["calibration"]["3"]["rows"]
    assert after["factor"] != pytest.approx(before["factor"], rel=1e-2)


def test_any_subset_of_metrics(tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "FLOW_TOLERANCE", 0.3)
    given = {"model": str(tiny), "data": str(pictures)}
    for metrics in ("loss", "bpd", "calibration", "ode, samples"):
        extra = {"ode_pictures": 2, "steps": 2} if "ode" in metrics else {}
        dropped = {"loss": {"respacings"}, "ode, samples": {"respacings", "timesteps"}}.get(metrics, set())
        asked = {k: v for k, v in SMALL.items() if k not in dropped}
        result: Any = run_evaluation(
            load(EvaluateConfig, {**asked, **given, **extra, "metrics": metrics, "out": tmp_path})
        )
        words = {word.strip() for word in metrics.split(",")}
        assert {name for name in ("loss", "bpd", "ode", "calibration", "samples") if result[name]} == words
        assert (tmp_path / "report.html").is_file()


def test_mistakes_come_all_at_once_and_before_any_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a name in a folder that is here is no Hub id
    words = ["evaluate", "nowhere", "runs/none", "--model", str(tmp_path), "--data", str(tmp_path / "no")]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "4 problems" in told and not (tmp_path / "out").exists()
    for part in (
        f"{tmp_path} has no model_index.json",
        "there is no nowhere",
        "runs/none is no folder here",
        "does not exist",
    ):
        assert part in told
    assert cli.main(["evaluate", "--metrics", "loss,fit", "--respacings", "1", "--lora-scale", "2"]) == 2
    told = capsys.readouterr().err
    assert "metrics[1]" in told and "respacings[0]" in told and "lora_scale" in told


def test_a_run_on_another_schedule_is_measured_at_the_bases_noise_and_in_its_own_process(
    tiny: Path, pictures: Path, tmp_path: Path
) -> None:
    """Told the timesteps at which it knows that noise: fractional ones. With no effect on the network, its loss at the
    same levels is nearly the base's, and the bound of its process is another."""
    words = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    other = make_adapter(tiny, tmp_path / "other", size=0.0, schedule=words)
    result = run_evaluation(
        config(model=str(tiny), runs=[str(other)], data=str(pictures), metrics="loss,bpd", out=str(tmp_path / "out"))
    )
    base, tuned = result["loss"]["rows"]
    assert tuned["sigma"] == base["sigma"]
    assert any(low % 1 for low, _ in tuned["timesteps"]) and not any(low % 1 for low, _ in base["timesteps"])
    base, tuned = result["bpd"]["whole"]["variances"]["beta"]
    assert tuned["sigma"] != base["sigma"] and tuned["timesteps"] == base["timesteps"]


def test_a_last_step_without_signal_is_no_number_in_the_report(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    words = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "rescale_betas_zero_snr": True}
    run = make_adapter(tiny, tmp_path / "zero", prediction_type="v_prediction", schedule=words)
    asked = {"model": str(tiny), "runs": [str(run)], "data": str(pictures), "metrics": "bpd,calibration"}
    result = run_evaluation(config(**asked, pictures=2, out=str(tmp_path / "out")))
    row = result["bpd"]["3"]["variances"]["beta"][1]
    assert row["sigma"][-1] is None and None not in row["sigma"][:-1]
    assert "<td>infinite" in (tmp_path / "out" / "report.html").read_text()


def test_a_network_of_other_steps_alone_has_no_loss_beside_the_bases(
    tiny: Path, pictures: Path, tmp_path: Path
) -> None:
    words = {"num_train_timesteps": 500, "beta_schedule": "linear", "beta_start": 2e-4, "beta_end": 0.04}
    other = make_adapter(tiny, tmp_path / "other", prediction_type="posterior_mean", schedule=words)
    asked = {"model": str(tiny), "runs": [str(other)], "data": str(pictures), "pictures": 2, "metrics": "loss,bpd"}
    result = run_evaluation(config(**asked, out=str(tmp_path / "out")))
    assert [row["model"] for row in result["loss"]["rows"]] == ["base"]
    assert [row["model"] for row in result["bpd"]["whole"]["variances"]["beta"]] == ["base", "other"]
    (note,) = result["notes"]
    assert note.startswith("other: no error of the noise: it predicts posterior_mean")


def test_a_variance_that_was_left_behind_is_read_as_the_bases() -> None:
    assert command._own_variances("stale", "direct") == command._own_variances("direct", "trained") == ("direct",)
    assert command._own_variances("stale", "trained") == ("learned", "learned_range")
    assert command._own_variances("trained", "direct") == ("learned", "learned_range")


def test_a_run_in_a_folder_called_base_is_not_the_base(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more steps given than the run has, which only the bound would walk; and a picture that is left out."""
    monkeypatch.chdir(tmp_path)
    words = {"num_train_timesteps": 500, "beta_schedule": "linear", "beta_start": 2e-4, "beta_end": 0.04}
    make_adapter(tiny, Path("base"), schedule=words)
    shutil.copytree(pictures, "data")
    Image.new("RGB", (64, 64)).save("data/uncaptioned.png")
    asked = config(model=str(tiny), runs=["base"], data="data", respacings=[600], out="out")
    with pytest.raises(UserError, match="respacings: base was trained on 500 steps, and 600 are more"):
        run_evaluation(asked)
    with pytest.warns(UserWarning, match="left out of"):
        contest = look(asked.model_copy(update={"metrics": ("loss",)}), check_evaluation(asked), None)
    assert [one.label for one in contest.contestants] == ["base", "the run base"]
    assert contest.rows


def test_several_processes_take_no_device(tiny: Path, pictures: Path) -> None:
    two: Any = SimpleNamespace(process_index=0, num_processes=2)
    with pytest.raises(UserError, match="device: cpu with 2 processes"):
        run_evaluation(config(model=str(tiny), data=str(pictures)), two)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "give --data, a folder of pictures"),
        ({"runs": ["small", "small"]}, "small is given twice"),
        ({"runs": ["small"]}, "draws 64 x 64 pixels"),
        ({"data": "one"}, "one picture in one"),
        ({"data": "empty"}, "folders without a picture"),
        ({"device": "cuda:77"}, "device"),
        ({"data": "nowhere"}, "is not a folder (data)"),
        ({"data": "one", "out": "one/found"}, "out: one/found lies inside data one"),
        (
            {"data": "one", "train_data": "one", "metrics": "bpd,memorisation"},
            "train_data: one and data one share pictures",
        ),
        ({"metrics": "bpd,samples", "samplers": "ddim,ddim"}, 'samplers ["ddim", "ddim"] names one twice'),
        ({"runs": ["fixed"], "model": "fixed", "metrics": "calibration"}, "is of a learned variance, and these models"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    changes: dict[str, Any], message: str, tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    shutil.copy(pictures / "000.png", tmp_path / "one")
    (tmp_path / "one" / "000.txt").write_text("a circle")
    if "fixed" in changes.values():
        build_tiny_pipeline(tmp_path / "fixed", out_channels=4)
    shutil.copytree(tiny, tmp_path / "small")
    vae = tmp_path / "small" / "vae" / "config.json"
    vae.write_text(vae.read_text().replace("0.13025", "0.5"))
    with pytest.raises(UserError, match=re.escape(message)):
        run_evaluation(config(**{"model": str(tiny), "data": str(pictures), "out": str(tmp_path / "out"), **changes}))
    assert not (tmp_path / "out").exists() and not (tmp_path / "one" / "found").exists()


def test_a_run_trained_on_the_pictures_that_measure_it_is_told_of(
    tiny: Path, adapter: Path, pictures: Path, tmp_path: Path
) -> None:
    """Not where it only measured them, and of an adapter at two strengths each is a row."""
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "final" / "adapter")
    (run / "checkpoints").mkdir()
    asked = config(model=str(tiny), runs=[str(run)], lora=[str(run)], lora_scale=[0.5], data=str(pictures))
    (run / "config.yaml").write_text(f"data: {{folder: elsewhere, held_out: {pictures}}}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [one.name for one in check_evaluation(asked)] == [f"{run} x 0.5", str(run)]
    (run / "config.yaml").write_text(f"data: {{folder: {pictures}}}")
    with pytest.warns(UserWarning, match=f"data: {run} was trained on data.folder {pictures}, which shares pictures"):
        check_evaluation(asked)


def test_a_network_that_gives_no_numbers_is_named(scrambled: Path, pictures: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(scrambled, broken)
    file = next((broken / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    weights["proj_out.bias"][0] = float("nan")
    save_file(weights, file)
    with pytest.raises(UserError, match=f"{broken}: the network gives NaN or infinity"):
        run_evaluation(config(model=str(broken), data=str(pictures), out=str(tmp_path / "out")))


def test_a_model_with_another_vae_is_refused(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    """Same configuration, other weights: only the latents tell."""
    other = build_tiny_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="has another VAE than the base"):
        run_evaluation(
            config(model=str(tiny), runs=[str(other)], data=str(pictures), metrics="loss", respacings=[10, 25, 50])
        )


def test_pictures_are_drawn_once_and_shown_side_by_side(
    tiny: Path,
    adapter: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same noise for both models: where the adapter does nothing they draw the same bytes."""
    words = {"model": str(tiny), "lora": [str(adapter)], "lora_scale": [0.0], "data": str(pictures), "pictures": 2}
    asked = {**words, "metrics": "samples", "samplers": "ddim, iddpm", "steps": [2], "device": "cpu"}
    two = load(EvaluateConfig, {**asked, "out": str(tmp_path), "images_per_prompt": 2, "seed": 7})
    ways: Any = [model["ways"] for model in run_evaluation(two)["samples"]["models"]]
    files = [[tmp_path / name for name in way["pictures"]] for model in ways for way in model]
    assert [(way["sampler"], way["calls"]) for way in ways[0]] == [("ddim", 2), ("iddpm", 2)]
    assert all(len(some) == 4 for some in files) and len({file for some in files for file in some}) == 16
    for ours, theirs in zip(files[:2], files[2:], strict=True):
        assert [open_rgb(file) for file in ours] == [open_rgb(file) for file in theirs]
        assert len({open_rgb(file) for file in ours}) == 4
    recipe = read_recipe(files[2][1])
    assert (recipe["seed"], recipe["sampler"], recipe["adapter"]["scale"]) == (8, "ddim", 0.0)
    before = {file: file.stat().st_mtime_ns for some in files for file in some}
    files[0][0].unlink()
    capsys.readouterr()
    run_evaluation(two)
    assert capsys.readouterr().err.count("generating: 100%") == 1  # no bar where nothing is to be drawn
    after = {file: file.stat().st_mtime_ns for some in files for file in some}
    assert [file for file in before if before[file] != after[file]] == [files[0][0]]
    page = (tmp_path / "report.html").read_text()
    assert len(re.findall('src="data:image/jpeg', page)) == 2 and "Seeds 7 to 8; all 2 prompts" in page
    monkeypatch.setattr(command, "_held_out", lambda *_: pytest.fail("measured before it is refused"))
    with pytest.raises(UserError, match="was made by another recipe: guidance"):
        run_evaluation(two.model_copy(update={"guidance": 2.0}))


def test_two_processes_draw_what_one_does(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    """Each its half, of base and adapter; what is there is kept, and the report is that of one process."""
    make_adapter(tiny, tmp_path / "mine")
    words = ["evaluate", str(tmp_path / "mine"), "--model", str(tiny), "--data", str(pictures), "--pictures", "3"]
    words += ["--metrics", "loss,samples", "--timesteps", "2", "--steps", "2", "--images-per-prompt", "2"]
    assert cli.main([*words, "--device", "cpu", "--out", str(tmp_path / "one")]) == 0
    files = sorted((tmp_path / "one").rglob("*.png"))
    names = [file.relative_to(tmp_path / "one") for file in files]
    assert len(names) == 2 * 3 * 2
    kept = tmp_path / "two" / names[3]
    kept.parent.mkdir(parents=True)
    shutil.copy(files[3], kept)
    before = kept.stat().st_mtime_ns

    def body(rank: int) -> int:
        saved: list[Path] = []
        save = drawing.save_png

        def noted(picture: Image.Image, path: Path, recipe: dict[str, object]) -> None:
            saved.append(path)
            save(picture, path, recipe)

        drawing.save_png = noted  # type: ignore[assignment]  # in this process alone
        code = cli.main([*words, "--out", str(tmp_path / "two")])
        (tmp_path / f"drawn-{rank}.txt").write_text("\n".join(map(str, saved)))
        return code

    launched = launch(body, tmp_path)
    assert launched.end() == [0, 0], launched.said(0) + launched.said(1)
    drawn = [(tmp_path / f"drawn-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert sorted(drawn[0] + drawn[1]) == sorted(str(tmp_path / "two" / name) for name in names if name != names[3])
    assert min(map(len, drawn)) == 5 and kept.stat().st_mtime_ns == before
    for name in names:
        picture, wanted = (tmp_path / folder / name for folder in ("two", "one"))
        apart: Any = ImageChops.difference(Image.open(picture), Image.open(wanted)).getextrema()
        assert max(high for _, high in apart) <= 1, name  # other batch-mates: a sum's rounding, then a level's
        assert read_recipe(picture) == read_recipe(wanted), name
    one, two = (json.loads((tmp_path / folder / "report.json").read_text()) for folder in ("one", "two"))
    assert two["samples"] == one["samples"]
    for ours, theirs in zip(two["loss"]["rows"], one["loss"]["rows"], strict=True):
        assert (ours["model"], ours["mean"]) == (theirs["model"], pytest.approx(theirs["mean"], rel=1e-5))


def open_rgb(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


def test_pictures_are_measured_at_the_sizes_of_their_aspects(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Square ones as without buckets, also beside others, whose numbers come behind theirs."""
    asked: dict[str, Any] = {"model": str(tiny), "data": str(pictures), "metrics": "loss", "aspect": "buckets"}
    asked |= {"respacings": [10, 25, 50]}
    alone = run_evaluation(config(**asked, out=str(tmp_path / "alone")))
    plain = run_evaluation(config(**asked | {"aspect": "square"}, out=str(tmp_path / "plain")))
    assert alone["loss"] == plain["loss"]
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number, row in enumerate(read_folder(pictures)[:3]):
        picture = row.opened().picture
        picture.resize((100, 40) if number == 0 else (64, 64)).save(mixed / f"{number}.png")
        (mixed / f"{number}.txt").write_text(row.caption)
    seen: list[tuple[tuple[int, ...], Tensor]] = []

    def noted(network: Any, steps: Steps, kind: Any, held_out: HeldOutSet, **named: Any) -> dict[Variance, Readings]:
        found = readings_at(network, steps, kind, held_out, **named)
        seen.append((tuple(held_out.x0.shape), steps.total(found["learned"].eps_mse) / steps.schedule.num_steps))
        return found

    monkeypatch.setattr(command, "readings_at", noted)
    flows: list[int] = []

    def flow(network: Any, schedule: Any, kind: Any, held_out: HeldOutSet, **named: Any) -> OdeLikelihood:
        flows.append(len(held_out.x0))
        return flow_likelihood(network, schedule, kind, held_out, **named)

    monkeypatch.setattr(command, "flow_likelihood", flow)
    monkeypatch.setattr(command, "FLOW_TOLERANCE", 0.3)
    asked |= {"data": str(mixed), "metrics": "loss,ode", "ode_pictures": 3}
    found = run_evaluation(config(**asked, out=str(tmp_path / "out")))
    (square, of_square), (wide, of_wide) = seen
    assert square == (2, 4, 8, 8) and wide == (1, 4, 4, 12) and flows == [2, 1]
    assert found["data"]["pictures"] == ["1.png", "2.png", "0.png"]
    mean = float(torch.cat([of_square, of_wide]).mean())
    assert found["loss"]["rows"][0]["mean"] == pytest.approx(mean) and len(found["ode"]["rows"]) == 1
