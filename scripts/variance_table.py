"""Bits per dimension of held-out pictures by the demo on few steps, by each reading of its variance: docs/samplers.md.

    python scripts/variance_table.py --work ~/variance

The quickstart's held-out pictures and the base as it comes; about a minute on two cores.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from pixart_ft.config.train import load_config
from pixart_ft.diffusion.names import Variance
from pixart_ft.evaluation.held_out import held_out_bound, mean_over_pictures, paired_difference
from pixart_ft.model import loading
from pixart_ft.model.base import Base
from pixart_ft.training.encode import encode_once, read_squares
from pixart_ft.training.start import accelerator_for, with_precision

STEPS = (10, 25, 50)
VARIANCES: tuple[Variance, ...] = ("beta_tilde", "beta", "learned_range", "learned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the encoded pictures")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--noises", type=int, default=1, help="drawn for each picture and step")
    args = parser.parse_args()
    config = with_precision(
        load_config("quickstart", {"run.folder": str(args.work / "run"), "data.cache": str(args.work / "cache")})
    )
    base = Base.read("demo")
    (held_out,) = encode_once(config, base, *read_squares(config, 256), accelerator_for(config)).held_out
    held_out = replace(held_out, x0=held_out.x0[: args.pictures], texts=held_out.texts[: args.pictures])
    transformer = loading.load_transformer(base, dtype=torch.float32)
    print(f"{len(held_out.x0)} pictures; calibration: predicted over empirical variance, least to most over the steps")
    print("| steps | variance | bits/dim | minus those of learned_range | calibration |\n|---|---|---|---|---|")
    for steps in STEPS:
        schedule = base.schedule.respaced(steps)
        bounds = {
            variance: held_out_bound(
                transformer,
                schedule,
                base.prediction_type,
                held_out,
                variance=variance,
                batch_size=16,
                noises=args.noises,
            )
            for variance in VARIANCES
        }
        literal = bounds["learned_range"].total[:, None]
        for variance, bound in bounds.items():
            bits, change = mean_over_pictures(bound.total[:, None]), paired_difference(literal, bound.total[:, None])
            ratio = bound.predicted_variance.mean(0) / bound.empirical_variance.mean(0)
            print(
                f"| {steps} | `{variance}` | {bits.mean:.3f} ± {bits.standard_error:.3f} | {change.mean:+.3f} ± "
                f"{change.standard_error:.3f} | {ratio.min():.2f} to {ratio.max():.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
