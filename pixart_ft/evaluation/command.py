"""The evaluate command: every model on the same pictures, noise, prompts and seeds; report.html and report.json."""

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, get_args

import torch
from accelerate import Accelerator
from tqdm import tqdm

from pixart_ft.config.evaluate import EvaluateConfig
from pixart_ft.config.reading import flat
from pixart_ft.data.pixels import Fit, fitted
from pixart_ft.data.rows import Row
from pixart_ft.diffusion.likelihood import prior_bits
from pixart_ft.diffusion.names import StepPrediction, Variance, VarianceState
from pixart_ft.diffusion.readings import Readings, Steps, strata
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.errors import UserError
from pixart_ft.evaluation.contestants import Contest, Contestant, look
from pixart_ft.evaluation.drawing import Drawn, draw, folder_name, planned, side_by_side
from pixart_ft.evaluation.held_out import HeldOutSet
from pixart_ft.evaluation.likeness import Sight, likeness_tables, neighbour_sheets
from pixart_ft.evaluation.measure import flow_likelihood, joined, readings_at
from pixart_ft.evaluation.page import page
from pixart_ft.evaluation.places import Entry, check_evaluation
from pixart_ft.evaluation.tables import (
    WHOLE,
    Measured,
    Process,
    bound_tables,
    calibration_tables,
    flow_table,
    loss_table,
    verdicts,
)
from pixart_ft.evaluation.words import summary
from pixart_ft.files import versions, write_text
from pixart_ft.model.vae import encode_pixels
from pixart_ft.randomness import uniform
from pixart_ft.sampling.command import device_of, dtype_of
from pixart_ft.sampling.text_to_image import TextToImage

FLOW_TOLERANCE = 1e-3  # relative and absolute, of the ODE's solver
SAME_LATENTS = 1e-3  # of the largest: two copies of a VAE in two precisions differ by less


def run_evaluation(config: EvaluateConfig, accelerator: Accelerator | None = None) -> dict[str, Any]:
    """Measure as `config` says; returns what report.json holds. Raises UserError for whatever the user can mend.

    accelerator: of several processes, which then draw the pictures together; the main one measures.
    """
    return evaluate(config, check_evaluation(config), accelerator)


def evaluate(
    config: EvaluateConfig,
    entries: Sequence[Entry],
    accelerator: Accelerator | None,
    held_out: Sequence[tuple[Row, Fit]] | None = None,
) -> dict[str, Any]:
    """As `run_evaluation`, once `check_evaluation` has found what is compared.

    held_out   in place of the folder's: pictures and how each is fitted, those of one size after each other
    """
    started = time.perf_counter()
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    if processes > 1 and config.device != "auto":
        raise UserError(f"device: {config.device} with {processes} processes, which have a device each; leave it out")
    contest = look(config, entries, held_out)
    device = device_of(config.device) if accelerator is None or processes == 1 else accelerator.device
    dtype = dtype_of(config.dtype, device)
    sight = Sight.of(config, contest, device) if rank == 0 else None
    measured: list[Measured] = []
    drawn: list[list[Drawn]] = []
    facts, before = [], list[HeldOutSet]()
    jobs = [(prompt, config.seed + n) for prompt in contest.prompts for n in range(config.images_per_prompt)]
    for one in contest.contestants:
        model = TextToImage.of(
            one.base,
            one.adapters,
            one.scales,
            dtype=dtype,
            device=device,
            prompts=[*(row.caption for row in contest.rows), *contest.prompts],
            text_encoder_quantization=config.text_encoder_quantization,
        )
        plans = planned(model, one.ways, jobs, config.out / "pictures" / folder_name(one.label))
        if rank == 0:
            before = _held_out(config, model, contest, before, one.name)
            measured.append(_measure(config, one, model, before, contest.contestants[0].base.schedule))
            facts.append(_facts(one, model))
        part = slice(rank, None, processes)
        drawn.append(draw(model, one.ways, jobs, plans, batch_size=config.batch_size, part=part))
        del model
    if accelerator is not None:
        accelerator.wait_for_everyone()
    if rank > 0:
        return {}
    by_model = dict(zip([one.label for one in contest.contestants], drawn, strict=True))
    likeness = {} if sight is None else likeness_tables(sight, by_model, config.images_per_prompt)
    found = _found(config, contest, measured, drawn) | {
        "likeness": likeness,
        "models": facts,
        "recipe": flat(config) | {"device": str(device), "dtype": str(dtype), "versions": versions()},
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_text(config.out / "report.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    real = contest.rows if config.prompts_file is None else []
    sheets = side_by_side(by_model, contest.prompts, config.images_per_prompt, real)
    near = {} if sight is None else neighbour_sheets(sight, by_model, likeness, contest.rows)
    write_text(config.out / "report.html", page(found, sheets, near))
    print("\n".join(summary(found)))
    print(f"report: {config.out / 'report.html'}\nits numbers: {config.out / 'report.json'}")
    return found


def _found(
    config: EvaluateConfig, contest: Contest, measured: Sequence[Measured], drawn: Sequence[Sequence[Drawn]]
) -> dict[str, Any]:
    """The tables of what was asked for, plain as JSON has them."""
    asked = set(config.metrics)
    return {
        "data": {
            "origin": contest.origin,
            "pictures": [row.name for row in contest.rows],
            "captions": [row.caption for row in contest.rows],
        },
        "loss": loss_table(measured) if "loss" in asked else {},
        "bpd": bound_tables(measured) if "bpd" in asked else {},
        "ode": flow_table(measured),
        "calibration": calibration_tables(measured) if "calibration" in asked else {},
        "verdicts": verdicts(measured) if "calibration" in asked else [],
        "samples": _samples(config, contest, drawn) if any(drawn) else {},
        "notes": [f"{one.label}: {note}" for one in measured for note in one.notes],
    }


def _samples(config: EvaluateConfig, contest: Contest, drawn: Sequence[Sequence[Drawn]]) -> dict[str, Any]:
    """What was drawn: by model, each way with its pictures, as places below `out`."""
    return {
        "prompts": list(contest.prompts),
        "seeds": [config.seed + n for n in range(config.images_per_prompt)],
        "are_captions": config.prompts_file is None,
        "models": [
            {
                "model": one.label,
                "ways": [
                    {
                        "sampler": way.settings.sampler,
                        "steps": way.settings.steps,
                        "calls": way.calls,
                        "pictures": [path.relative_to(config.out).as_posix() for path in way.paths],
                    }
                    for way in ways
                ],
            }
            for one, ways in zip(contest.contestants, drawn, strict=True)
        ],
    }


def _held_out(
    config: EvaluateConfig, model: TextToImage, contest: Contest, before: Sequence[HeldOutSet], name: str
) -> list[HeldOutSet]:
    """The pictures' latents and captions as this model has them. Raises UserError for others than those `before`."""
    pixels = (fitted(row.opened().picture, fit)[None] for row, fit in zip(contest.rows, contest.fits, strict=True))
    x0 = [encode_pixels(model.vae, one)[0] for one in pixels]
    found = HeldOutSet.of_sizes(x0, [model.text.of(row.caption) for row in contest.rows], config.timesteps, config.seed)
    pairs = [(was.x0, now.x0) for was, now in zip(before, found, strict=bool(before))]
    if not all((was - now).abs().max() <= SAME_LATENTS * was.abs().max() for was, now in pairs):
        raise UserError(
            f"runs: {name} has another VAE than the base, and what is measured is in its latents; evaluate it by "
            "itself, as --model"
        )
    return found


def _own_variances(state: VarianceState, of_base: VarianceState) -> tuple[Variance, ...]:
    """How to read a network's learned variance; one that was left behind is the base's."""
    match of_base if state == "stale" else state:
        case "none":
            return ()
        case "direct":
            return ("direct",)
    return ("learned", "learned_range")


def _measure(
    config: EvaluateConfig, one: Contestant, model: TextToImage, held_out: Sequence[HeldOutSet], levels: NoiseSchedule
) -> Measured:
    """What was asked for of one model; the loss is measured at the noise of the schedule `levels`.

    held_out   the pictures of each size
    """
    counts = [len(part.x0) for part in held_out]
    abilities, asked, notes = model.abilities, set(config.metrics), list(one.refused)
    variances = (*_own_variances(abilities.variance, one.base.variance), "beta_tilde", "beta")
    of_loss = _loss_schedule(model, levels) if "loss" in asked else None
    if "loss" in asked and of_loss is None:
        notes.append(
            f"no error of the noise: it predicts {abilities.prediction_type}, of the steps of its own process alone, "
            "and those have other noise than the base's"
        )
    wanted = _wanted(config, model.abilities.schedule, of_loss, sum(counts))
    processes = {}
    total = sum(steps.t.numel() for steps in wanted.values())
    with tqdm(total=total, desc=one.label, unit=" calls", dynamic_ncols=True, disable=None) as bar:
        for name, steps in wanted.items():
            parts = [
                readings_at(
                    model.transformer,
                    replace(steps, t=t),
                    abilities.prediction_type,
                    part,
                    variances=variances,
                    batch_size=config.batch_size,
                    device=model.device,
                    autocast=None if model.dtype == torch.float32 else model.dtype,
                    progress=bar.update,
                )
                for part, t in zip(held_out, steps.t.split(counts), strict=True)
            ]
            readings: dict[Variance, Readings] = {
                "learned" if how == "direct" else how: joined([part[how] for part in parts], steps.t.shape)
                for how in variances
            }
            if not all(bool(one_of.bits.isfinite().all()) for one_of in readings.values()):
                raise UserError(f"{one.name}: the network gives NaN or infinity in {model.dtype}; use dtype float32")
            prior = torch.cat([prior_bits(steps.schedule, part.x0.double()) for part in held_out])
            processes[name] = Process(steps, readings, prior)
    at_levels = processes.pop("levels", processes.get(WHOLE)) if of_loss is not None else None
    flow = None
    if "ode" in asked:
        before = zip(held_out, accumulate(counts, initial=0), strict=False)
        some = [part.first(config.ode_pictures - start) for part, start in before if start < config.ode_pictures]
        try:
            likelihoods = [
                flow_likelihood(
                    model.transformer,
                    abilities.schedule,
                    abilities.prediction_type,
                    part,
                    tolerance=FLOW_TOLERANCE,
                    device=model.device,
                )
                for part in some
            ]
            flow = torch.cat([likelihood.bits_per_dim for likelihood in likelihoods])
        except ValueError as error:
            notes.append(f"no likelihood by the probability-flow ODE: {error}")
    for note in notes:
        warnings.warn(f"{one.label}: {note}", stacklevel=2)
    return Measured(one.label, abilities.variance, at_levels, processes, flow, notes)


def _loss_schedule(model: TextToImage, levels: NoiseSchedule) -> NoiseSchedule | None:
    """Where a model's loss is measured: at the base's `levels`. None for a network that has only its own, others."""
    own = model.abilities.schedule
    if torch.equal(own.alpha_bar, levels.alpha_bar) and torch.equal(own.timesteps, levels.timesteps):
        return own
    return None if model.abilities.prediction_type in get_args(StepPrediction) else levels.matched_to(own)


def _wanted(
    config: EvaluateConfig, schedule: NoiseSchedule, of_loss: NoiseSchedule | None, count: int
) -> dict[str, Steps]:
    """The steps of each process at which `count` pictures are measured; "levels" is the loss's, where it is another."""
    bounds = bool({"bpd", "calibration"} & {*config.metrics})
    wanted = {}
    if bounds or of_loss is schedule:
        wanted[WHOLE] = _drawn(schedule, config, count)
    if of_loss is not None and of_loss is not schedule:
        wanted["levels"] = _drawn(of_loss, config, count)
    if bounds:
        wanted |= {str(n): Steps.every(schedule.respaced(n), count) for n in config.respacings}
    return wanted


def _drawn(schedule: NoiseSchedule, config: EvaluateConfig, count: int) -> Steps:
    """A step of each part of a process for every picture, by the same shares for all models."""
    parts = strata(schedule.num_steps, config.timesteps)
    shares = uniform(config.seed, range(count * len(parts)), "evaluated steps").view(count, len(parts))
    return Steps.drawn(schedule, parts, shares)


def _facts(one: Contestant, model: TextToImage) -> dict[str, Any]:
    """What a model is, for the report."""
    return {
        "label": one.label,
        "name": one.name,
        "base": one.base.name,
        "fingerprint": model.fingerprint,
        "adapters": json.loads(json.dumps([adapter.recipe for adapter in model.adapters])),
        "prediction_type": model.abilities.prediction_type,
        "variance": model.abilities.variance,
    }
