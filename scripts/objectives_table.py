"""Fine-tunes the demo once with each objective and schedule, and evaluates all: docs/objectives_table.md.

    python scripts/objectives_table.py --work ~/objectives

300 short steps of 16 pictures a row, all from the demo base with the quickstart's pictures and LoRA; a finished row is
kept. Then one `pixart-ft evaluate` of all rows. About an hour on two cores.
"""

import argparse
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from report_tables import summary

from pixart_ft.config.evaluate import EvaluateConfig
from pixart_ft.config.reading import load
from pixart_ft.config.train import TrainConfig, load_config
from pixart_ft.evaluation.command import run_evaluation
from pixart_ft.training.run import run_training

LEVELS = 25  # steps of the respaced process whose bound is read


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


def configuration(row: Row, work: Path, steps: int) -> TrainConfig:
    """The quickstart at a gentler rate, with nothing but the row's settings in section `diffusion`."""
    diffusion = {"weighting": "none", "timestep_law": "stratified"} | row.settings
    return load_config(
        "quickstart",
        {f"diffusion.{key}": value for key, value in diffusion.items()}
        | {
            "run.folder": str(work / re.sub(r"\W+", "-", row.name)),
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


def trained(row: Row, work: Path, steps: int) -> Path:
    """The folder of the row's run, made or gone on with where it is not finished."""
    config = configuration(row, work, steps)
    if not (config.run.folder / "final").is_dir():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the rows ask for what is warned of
            run_training(config, resume="auto" if config.run.folder.is_dir() else None)
    return config.run.folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and the report")
    parser.add_argument("--out", type=Path, default=Path("docs/objectives_table.md"), help="the table")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, nargs="*", default=range(len(ROWS)), help="only these (several at once)")
    parser.add_argument("--pictures", type=int, default=60, help="held out, that all are measured on")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    runs = [str(trained(ROWS[number], args.work, args.steps)) for number in args.rows]
    asked = {"model": "demo", "runs": runs, "respacings": [LEVELS], "pictures": args.pictures}
    found = run_evaluation(load(EvaluateConfig, asked | {"out": str(args.work / "evaluation")}))
    head = f"<!-- written by scripts/objectives_table.py, {args.steps} steps a row -->"
    args.out.write_text(f"{head}\n{summary(found)}\n")


if __name__ == "__main__":
    main()
