"""Fine-tunes the demo once with each objective and schedule, and writes what each did: docs/objectives_table.md.

    python scripts/objectives_table.py --work ~/objectives

300 short steps of 16 pictures a row, all from the demo base with the quickstart's pictures and LoRA. Every row is
resumable; a finished one is read from its file. All rows are measured on the same held-out pictures at (nearly) the
same noise levels: those of 25 even steps of the base's own schedule. About an hour on two cores.
"""

import argparse
import json
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pixart_ft.adapters.acting import load_adapter
from pixart_ft.adapters.files import Adapter
from pixart_ft.config.train import TrainConfig, load_config
from pixart_ft.diffusion.likelihood import Bound
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.diffusion.sigmas import sigma_to_index
from pixart_ft.evaluation.held_out import (
    HeldOutSet,
    held_out_bound,
    held_out_loss,
    mean_over_pictures,
    paired_difference,
)
from pixart_ft.evaluation.objective import Objective
from pixart_ft.model import loading
from pixart_ft.model.base import Base
from pixart_ft.training.encode import encode_once, read_squares
from pixart_ft.training.objective import build_objective
from pixart_ft.training.run import run_training
from pixart_ft.training.start import accelerator_for

LEVELS = 25


@dataclass(frozen=True)
class Row:
    """One fine-tuning: what the table calls it, and its settings of section `diffusion`."""

    name: str
    settings: dict[str, str]


ROWS = (
    Row("hybrid, base's linear schedule", {}),
    Row("simple", {"objective": "simple"}),
    Row("hybrid, v error", {"loss_space": "v_prediction"}),
    Row("hybrid, x0 error", {"loss_space": "sample"}),
    Row("hybrid, posterior-mean error", {"loss_space": "posterior_mean"}),
    Row("hybrid, Huber", {"error": "huber", "huber_delta": "0.1"}),
    Row("hybrid, min-SNR 5", {"weighting": "min_snr"}),
    Row("hybrid, debiased", {"weighting": "debiased"}),
    Row("vlb, uniform t", {"objective": "vlb", "timestep_law": "uniform"}),
    Row("vlb, variance beta tilde", {"objective": "vlb", "variance": "beta_tilde"}),
    Row("Su raw, su_linear", {"objective": "su_raw", "schedule": "su_linear", "time_conditioning": "snr_matched"}),
    Row("Su reduced, su_linear", {"objective": "su_reduced", "schedule": "su_linear"}),
    Row("hybrid, cosine by index", {"schedule": "cosine"}),
    Row("hybrid, cosine SNR-matched", {"schedule": "cosine", "time_conditioning": "snr_matched"}),
    Row("hybrid, scaled_linear SNR-matched", {"schedule": "scaled_linear", "time_conditioning": "snr_matched"}),
    Row("hybrid, v prediction, zero SNR", {"zero_snr": "true", "prediction_type": "v_prediction"}),
)


def configuration(row: Row, number: int, work: Path, steps: int) -> TrainConfig:
    """The quickstart at a gentler rate, with nothing but the row's settings in section `diffusion`."""
    diffusion = {"weighting": "none", "timestep_law": "stratified"} | row.settings
    return load_config(
        "quickstart",
        {f"diffusion.{key}": value for key, value in diffusion.items()}
        | {
            "run.folder": str(work / f"row-{number:02d}"),
            "data.cache": str(work / "cache"),
            "optim.learning_rate": "1e-3",
            "train.steps": str(steps),
            "train.batch_size": "16",
            "validation.prompts": "[]",
            "validation.every": "0",
            "validation.samples_every": "0",
            "logging.trackers": "[]",
        },
    )


def at_common_levels(schedule: NoiseSchedule) -> NoiseSchedule:
    """The process of the schedule's levels nearest to those of 25 even steps of the linear one."""
    common = NoiseSchedule.linear().respaced(LEVELS).sigmas
    return schedule.respaced(sorted({int(i) for i in sigma_to_index(schedule, common, "nearest_log")}))


def measured(objective: Objective, held_out: HeldOutSet, adapter: Path | None) -> dict[str, Bound]:
    """The bound with the learned and with the fixed variance, of the base or of an adapter on it."""
    transformer = loading.load_transformer(Base.read("demo"), dtype=torch.float32)
    if adapter is not None:
        load_adapter(transformer, Adapter.read(adapter))
    schedule = at_common_levels(objective.schedule)
    return {
        variance: held_out_bound(
            transformer, schedule, objective.prediction_type, held_out, variance=variance, batch_size=20
        )
        for variance in ("learned", "beta_tilde")
    }


def result(row: Row, number: int, work: Path, steps: int) -> dict[str, object]:
    """Train and measure one row, or read it where that was done."""
    file = work / f"row-{number:02d}.json"
    if file.is_file():
        found: dict[str, object] = json.loads(file.read_text())
        return found
    config = configuration(row, number, work, steps)
    base = Base.read("demo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rows ask for what is warned of
        objective, _ = build_objective(config, base)
        run_training(config, resume="auto" if config.run.folder.is_dir() else None)
        held_out = encoded_held_out(config, base)
    before, after = (measured(objective, held_out, a) for a in (None, config.run.folder))
    fixed_before, fixed_after = before["beta_tilde"], after["beta_tilde"]
    learned = after["learned"]
    found = {
        "name": row.name,
        "eps_before": vars(mean_over_pictures(fixed_before.eps_mse)),
        "eps_after": vars(mean_over_pictures(fixed_after.eps_mse)),
        "eps_change": vars(paired_difference(fixed_before.eps_mse, fixed_after.eps_mse)),
        "bits_learned_before": vars(mean_over_pictures(before["learned"].total[:, None])),
        "bits_learned": vars(mean_over_pictures(learned.total[:, None])),
        "bits_change": vars(paired_difference(before["learned"].total[:, None], learned.total[:, None])),
        "bits_fixed": vars(mean_over_pictures(fixed_after.total[:, None])),
        "log2_calibration": (learned.predicted_variance.mean(0) / learned.empirical_variance.mean(0)).log2().tolist(),
    }
    file.write_text(json.dumps(found) + "\n")
    return found


def encoded_held_out(config: TrainConfig, base: Base) -> HeldOutSet:
    """The held-out pictures as the training sees them."""
    (held_out,) = encode_once(config, base, *read_squares(config, 256), accelerator_for(config)).held_out
    return held_out


def variance_effect(work: Path) -> str:
    """What the hybrid's second term did beyond the simple loss, on the 1000-step process that it acts on."""
    file = work / "variance-effect.md"
    if file.is_file():
        return file.read_text()
    config, base = configuration(ROWS[0], 0, work, 300), Base.read("demo")
    objective, _ = build_objective(config, base)
    held_out = replace(encoded_held_out(config, base), timestep_count=LEVELS)
    bits = {}
    for name, number in (("base", None), ("hybrid", 0), ("simple", 1), ("vlb, learned", 8), ("vlb, beta tilde", 9)):
        transformer = loading.load_transformer(base, dtype=torch.float32)
        if number is not None:
            load_adapter(transformer, Adapter.read(work / f"row-{number:02d}"))
        terms = held_out_loss(transformer, objective, held_out, batch_size=20)["vlb"]
        bits[name] = terms * objective.schedule.num_steps
    pairs = [(name, "base") for name in bits if name != "base"]
    pairs += [("hybrid", "simple"), ("vlb, learned", "vlb, beta tilde")]
    lines = []
    for after, before in pairs:
        found = paired_difference(bits[before], bits[after])
        lines.append(f"| {after} | {before} | {found.mean:+.4f} ± {found.standard_error:.4f} |")
    start = mean_over_pictures(bits["base"])
    head = [
        f"bits/dim of the 1000-step bound, {LEVELS} values of t; base: {start.mean:.3f} ± {start.standard_error:.3f}",
        "",
        "| bits/dim of | minus those of | |",
        "|---|---|---|",
    ]
    text = "\n".join([*head, *lines]) + "\n"
    file.write_text(text)
    return text


def table(rows: list[dict[str, object]], steps: int) -> str:
    """The Markdown of all finished rows."""

    def shown(estimate: object, digits: int, sign: str = "") -> str:
        assert isinstance(estimate, dict)
        return f"{estimate['mean']:{sign}.{digits}f} ± {estimate['standard_error']:.{digits}f}"

    lines = [
        f"<!-- written by scripts/objectives_table.py, {steps} steps a row -->",
        "| objective, schedule | eps error before | change | bits/dim before | change | after, with beta tilde | "
        "calibration |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        calibration = row["log2_calibration"]
        assert isinstance(calibration, list)
        off = math.sqrt(sum(x * x for x in calibration) / len(calibration))
        lines.append(
            f"| {row['name']} | {shown(row['eps_before'], 4)} | {shown(row['eps_change'], 4, '+')} | "
            f"{shown(row['bits_learned_before'], 3)} | {shown(row['bits_change'], 3, '+')} | "
            f"{shown(row['bits_fixed'], 3)} | {2**off:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and finished rows")
    parser.add_argument("--out", type=Path, default=Path("docs/objectives_table.md"), help="the table")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, nargs="*", default=range(len(ROWS)), help="only these (several at once)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for number in args.rows:
        result(ROWS[number], number, args.work, args.steps)
        finished = [json.loads(file.read_text()) for file in sorted(args.work.glob("row-*.json"))]
        text = table(finished, args.steps)
        if len(finished) == len(ROWS):
            text += "\n" + variance_effect(args.work)
        args.out.write_text(text)
        print(f"{len(finished)} of {len(ROWS)} rows are in {args.out}", flush=True)


if __name__ == "__main__":
    main()
