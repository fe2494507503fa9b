"""What a finished run shows: the before/after sheet, the loss curves, and a summary on the terminal."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from pixart_ft.config.evaluate import EvaluateConfig
from pixart_ft.config.hub import Hub
from pixart_ft.config.push import PushConfig
from pixart_ft.config.reading import load
from pixart_ft.config.text import numbered
from pixart_ft.config.train import TrainConfig
from pixart_ft.data.pixels import Fit
from pixart_ft.data.rows import Row
from pixart_ft.errors import UserError, attempted
from pixart_ft.evaluation.command import evaluate
from pixart_ft.evaluation.held_out import Estimate
from pixart_ft.evaluation.places import check_evaluation
from pixart_ft.files import remove_folder, write_file
from pixart_ft.pictures.sheets import loss_curve, term_curves
from pixart_ft.runs.folder import RunFolder
from pixart_ft.runs.results import What, final
from pixart_ft.sharing.push import push
from pixart_ft.training.before_after import before_after
from pixart_ft.training.keeping import lowest_step
from pixart_ft.training.records import Progress
from pixart_ft.training.shell import pasteable
from pixart_ft.training.trainer import Trainer
from pixart_ft.training.watching import Comparison

EVALUATION = "evaluation"  # folder of the report, below that of the results


def finish(
    folder: RunFolder,
    what: What,
    trainer: Trainer,
    prompts: Sequence[str],
    rows: Mapping[str, Sequence[Row]],
) -> None:
    """Write the curves and sheets into `final/`, where the results are, and print the summary.

    what: it trained.
    rows: the pictures that the sheet of before and after sets beside the prompts of the same caption, see there.
    """
    written: dict[str, Path] = {what: folder.path / final(what)["ema"]}
    for sheet_before in folder.final.glob("*.png"):  # of an earlier end: what cannot be made anew must not stand for it
        sheet_before.unlink()
    if (folder.final / EVALUATION).is_dir():
        remove_folder(folder.final / EVALUATION)
    records = folder.log.comparable()
    title = ", ".join(filter(None, [folder.path.name, trainer.objective.where]))
    if any(record.get("train") for record in records):
        with attempted("the loss curve"):
            loss_curve(records, folder.final / "loss.png", title=title)
            written["loss curve"] = folder.final / "loss.png"
            terms = folder.final / "loss_terms.png"
            if term_curves(records, terms, titles=trainer.objective.titles, title=title):
                written["its terms"] = terms
    if prompts:
        with attempted("the sheet of before and after"):
            since = trainer.watch.since
            before, after = (_first_seeds(folder, step, prompts) for step in (since, trainer.step))
            sheet = before_after(prompts, before, after, rows, label=f"step {since}" if since else "before")
            write_file(folder.final / "before_after.png", lambda aside: sheet.save(aside, format="PNG"))
            written["before and after"] = folder.final / "before_after.png"
    with attempted("the summary"):
        print(summary(trainer.progress, trainer.watch.comparison(), trainer.objective.titles, trainer.objective.where))
    for name, path in written.items():
        print(f"  {name:<18}{path}")
    with attempted("the lines to paste"):
        for name, line in commands(folder, what, trainer.step, prompts).items():
            print(f"  {name:<18}{line}")


def commands(folder: RunFolder, what: What, last_step: int, prompts: Sequence[str]) -> dict[str, str]:
    """What can be pasted to draw with the result, and with the lowest held-out loss where that is another step's."""
    example = prompts[0] if prompts else "my prompt"
    option = {"adapter": "--lora", "model": "--model"}[what]
    found = {"draw with it": pasteable("generate", option, folder.path, "--prompt", example)}
    records = folder.log.comparable()
    lowest = lowest_step(records)
    if lowest not in (None, last_step):
        loss = next(r["held_out"]["loss"]["mean"] for r in records if r["step"] == lowest and "held_out" in r)
        found["lowest held-out"] = f"loss {loss:.4f} after step {lowest} of {last_step}"
        if lowest in folder.kept_steps(what):
            found["draw with that"] = pasteable("generate", option, f"{folder.path}@{lowest}", "--prompt", example)
    if steps := folder.kept_steps(what):
        files = (file for step in steps for file in folder.kept_at(what, step).rglob("*") if file.is_file())
        size = sum(file.stat().st_size for file in files)
        found[f"{what}s kept"] = (
            f"of steps {', '.join(map(str, steps))} ({size / 1e6:.0f} MB), as {folder.path}@{steps[0]}"
        )
    return found


def publish(run: Path, hub: Hub) -> None:
    """Push the result where the configuration says; what stands in the way of that is a warning, the run is done."""
    if hub.repo is None:
        return
    try:
        push(PushConfig(run=str(run), **hub.model_dump()))
    except Exception as error:  # of any kind: it must not look as if the training had failed
        later = pasteable("push", run, "--repo", hub.repo)
        warnings.warn(f"hub.repo: {error}. The result is in {run}; to push it later: {later}", stacklevel=2)


def compare_with_base(run: Path, config: TrainConfig, held_out: Sequence[tuple[Row, Fit]], device: str) -> None:
    """The report of `pixart-ft evaluate` into final/evaluation; what stands in its way is a warning."""
    chosen, out = config.validation, run / "final" / EVALUATION
    steps = config.diffusion.num_steps or 1000
    with attempted("the report"):
        asked = {
            "model": config.model.base,
            "revision": config.model.revision,
            "runs": [str(run)],
            "size": config.data.resolution and max(config.data.resolution),
            "aspect": config.data.aspect,
            "pictures": chosen.pictures,
            "metrics": ["loss", "bpd", "calibration", "samples"],
            "respacings": [n for n in EvaluateConfig.model_fields["respacings"].default if n <= steps],
            "samplers": [chosen.sampler],
            "steps": [chosen.steps],
            "guidance": chosen.guidance,
            "seed": config.run.seed,
            "dtype": "float32" if config.train.mixed_precision == "no" else "auto",
            "text_encoder_quantization": config.model.text_encoder_quantization,
            "device": device,
            "out": str(out),
        }
        evaluating = load(EvaluateConfig, asked)
        evaluate(evaluating, check_evaluation(evaluating), None, held_out)


def _first_seeds(folder: RunFolder, step: int, prompts: Sequence[str]) -> list[Image.Image]:
    """The picture of each prompt that was drawn at a step with the first seed.

    Raises UserError where the pictures are no longer in the folder of samples.
    """
    files = sorted(folder.samples_at(step).glob("*.png"))
    if not files or len(files) % len(prompts):
        raise UserError(f"{folder.samples_at(step)} has {len(files)} pictures for {len(prompts)} prompts")
    return [Image.open(file).convert("RGB") for file in files[:: len(files) // len(prompts)]]


def summary(progress: Progress, held_out: Comparison, titles: Mapping[str, str], where: str = "") -> str:
    """By how much the held-out loss changed, with the standard error of the paired difference over pictures.

    where: the part of the process that it is measured at, if not all.
    """
    lines = [f"{numbered(str(progress.step), 'step')}, {numbered(str(progress.samples), 'picture')} seen"]
    if held_out.change and held_out.since:
        lines.append(f"  compared with step {held_out.since}, where the comparison began anew")
    if held_out.change and where:
        lines.append(f"  measured at {where}, where it was trained")
    terms = [name for name in titles if name in held_out.change]
    # "loss", the first, is the sum of the others, and stands for them where there is only one other
    for name in terms if len(terms) > 2 else terms[:1]:
        change = held_out.change[name]
        before, after = held_out.before[name], held_out.after[name]
        title = "held-out loss" if name == "loss" else titles[name]
        lines.append(f"  {title:<22}{before.mean:.4f} -> {after.mean:.4f}   change {_signed(change)}")
    return "\n".join(lines)


def _signed(change: Estimate) -> str:
    if change.standard_error == 0:
        return f"{change.mean:+.4f}"
    errors = abs(change.mean) / change.standard_error
    return f"{change.mean:+.4f} ± {change.standard_error:.4f} ({errors:.1f} standard errors)"
