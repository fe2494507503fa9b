"""The training loop under accelerate: receives built parts, trains the parameters that want gradients.

What a step computes is a function of its draw indices (`draws.py`), so the state of a run is: the trained weights,
their average, the optimizer's moments, the step number, and what was logged so far.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pixart_ft.checkpoint import RunFolder, load_nested, save_nested
from pixart_ft.diffusion.weighting import LossHistory
from pixart_ft.draws import Plan, TrainingSet, draw_batch
from pixart_ft.ema import Ema
from pixart_ft.errors import UserError
from pixart_ft.evaluation import (
    Estimate,
    HeldOutSet,
    evaluating,
    held_out_loss,
    mean_over_pictures,
    paired_difference,
)
from pixart_ft.files import write_file
from pixart_ft.loss_window import LossWindow
from pixart_ft.objective import Objective
from pixart_ft.pictures import grid
from pixart_ft.randomness import generator
from pixart_ft.stopping import StopRequest

# Consecutive steps with a non-finite gradient before training gives up. A gradient scaler needs 17 to come down from
# 65536 to 1/2, so under float16 some are part of a healthy start.
MAX_BAD_STEPS, MAX_BAD_STEPS_SCALED = 10, 40


@dataclass(frozen=True)
class Result:
    """What a finished run reports: held-out losses by term, and the paired change since before the first step."""

    steps: int
    samples_seen: int
    held_out_before: dict[str, Estimate]
    held_out_after: dict[str, Estimate]
    change: dict[str, Estimate]


class Trainer:
    """One run: `run()` trains from where the state stands to the end of the plan."""

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        transformer: torch.nn.Module,
        objective: Objective,
        data: TrainingSet,
        optimizer: torch.optim.Optimizer,
        ema: Ema,
        plan: Plan,
        folder: RunFolder,
        held_out: HeldOutSet | None = None,
        draw_samples: Callable[[], list[Image.Image]] | None = None,
    ):
        """`transformer` has its adapter attached; only parameters with requires_grad are trained and saved.

        `draw_samples` makes the pictures of the fixed prompts with the network as it stands.
        """
        self.accelerator, self.objective, self.data, self.plan = accelerator, objective, data, plan
        self.folder, self.held_out, self.draw_samples, self.ema = folder, held_out, draw_samples, ema
        self.transformer = transformer
        self.trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
        assert all(p.dtype == torch.float32 for p in self.trained.values()), "trained weights are kept in float32"
        self.model, self.optimizer = accelerator.prepare(transformer, optimizer)
        self.step = 0
        self.window = LossWindow()
        importance = plan.timestep_law == "importance"
        self.history = LossHistory.empty(objective.schedule.num_steps) if importance else None
        self.held_out_before: dict[str, Tensor] = {}
        self.held_out_last: dict[str, Tensor] = {}
        self._bad_steps = 0
        self._stop = StopRequest()  # to this process
        self._stopping = False  # some process was: all know, and stop after the same step

    # What follows from the plan

    @property
    def global_batch(self) -> int:
        """Pictures per optimizer step, over all processes and accumulation steps."""
        return self.plan.batch_size * self.plan.accumulation * self.accelerator.num_processes

    def draws_of(self, step: int, micro: int) -> range:
        """The draw indices of this process's micro-batch number `micro` of an optimizer step."""
        block = micro * self.accelerator.num_processes + self.accelerator.process_index
        start = step * self.global_batch + block * self.plan.batch_size
        return range(start, start + self.plan.batch_size)

    # The loop

    def run(self) -> Result:
        """Train to the last step; SIGTERM or Ctrl-C saves a checkpoint first and then raises KeyboardInterrupt."""
        if self.step == 0:
            self._validate()
            self._sample()
        with self._stop.caught(), self._progress() as bar:
            while self.step < self.plan.steps:
                norm = self._optimizer_step()
                self.step += 1
                bar.update(self.global_batch)
                if self._due(self.plan.log_every):
                    bar.set_postfix_str(f"loss {self._log(norm):.4f}")
                if self._due(self.plan.validate_every) and self.step < self.plan.steps:
                    self._validate()
                if self._due(self.plan.samples_every) and self.step < self.plan.steps:
                    self._sample()
                if self._due(self.plan.checkpoint_every) or self.step == self.plan.steps or self._stopping:
                    self._save()
                if self._stopping:
                    raise KeyboardInterrupt(
                        f"stopped after step {self.step}, state saved; the same command with --resume auto continues"
                    )
        self._validate()
        self._sample()
        return self._result()

    def _optimizer_step(self) -> float:
        """One optimizer step over the global batch; returns the norm of the gradient before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate_at(self.step)
        num_steps = self.objective.schedule.num_steps
        law = None if self.history is None else self.history.probabilities()
        seen = []
        for micro in range(self.plan.accumulation):
            last = micro == self.plan.accumulation - 1
            draws = self.draws_of(self.step, micro)
            # The adapter's own dropout is the one draw that torch makes by itself.
            torch.manual_seed(generator(self.plan.seed, draws[0], "adapter dropout").initial_seed())
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                t, weight, terms = self._forward(draws, law)
                self.accelerator.backward(terms["loss"].mean() / self.plan.accumulation)
            # one gather and one copy: each would make the host wait for the device
            asked = torch.full_like(terms["loss"], float(self._stop.asked))
            mine = torch.stack([t.float(), asked, weight, *terms.values()], dim=1).detach()
            t_all, asked_all, weight_all, *values = self.accelerator.gather(mine).cpu().unbind(1)
            everywhere = dict(zip(terms, values, strict=True))
            self.window.add(everywhere, t_all.long(), weight_all, num_steps)
            seen.append((t_all.long(), everywhere["loss"] / weight_all))
            self._stopping = self._stopping or bool(asked_all.any())
        if self.history is not None:  # all at once, so that the law is the same for every micro-batch of a step
            for t_all, losses in seen:
                self.history = self.history.updated(t_all, losses)
        return self._update()

    def _forward(self, draws: range, law: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """t, the weights that undo its law, and the terms times these weights, each (N,), of a micro-batch."""
        num_steps, device = self.objective.schedule.num_steps, self.accelerator.device
        batch = draw_batch(
            self.data,
            draws,
            self.plan,
            global_batch=self.global_batch,
            num_steps=num_steps,
            law=law,
            two_noises=self.objective.draws_two_noises,
        )
        there: dict[str, Any] = {
            name: None if x is None else x.to(device, non_blocking=True) for name, x in vars(batch).items()
        }
        weight = there.pop("weight")
        with self.accelerator.autocast():
            terms = self.objective.terms(self.model, **there)
        return there["t"], weight, {name: weight * term for name, term in terms.items()}

    def _update(self) -> float:
        limit = self.plan.clip_norm or math.inf
        norm = float(self.accelerator.clip_grad_norm_(list(self.trained.values()), limit))
        scaled = self.accelerator.scaler is not None  # the scaler skips its own overflows
        if math.isfinite(norm) or scaled:
            self.optimizer.step()
        skipped = not math.isfinite(norm) or self.accelerator.optimizer_step_was_skipped
        self.optimizer.zero_grad(set_to_none=True)
        self._bad_steps = self._bad_steps + 1 if skipped else 0
        if not skipped:
            self.ema.update()
        if self._bad_steps >= (MAX_BAD_STEPS_SCALED if scaled else MAX_BAD_STEPS):
            raise UserError(
                f"the gradient was not finite for {self._bad_steps} steps in a row (now step {self.step}); lower "
                f"optim.learning_rate ({self.plan.learning_rate:g}) or use train.mixed_precision bf16, and continue "
                f"from the last checkpoint in {self.folder.path / 'checkpoints'}"
            )
        return norm

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    # Watching

    def _progress(self) -> tqdm:
        return tqdm(
            total=self.plan.steps * self.global_batch,
            initial=self.step * self.global_batch,
            unit=" pictures",
            desc="training",
            dynamic_ncols=True,
            disable=not self.accelerator.is_main_process,
        )

    def _log(self, norm: float) -> float:
        """Close the window: one line of log.jsonl, one point per curve; returns the mean loss."""
        means = self.window.means()
        self.window = LossWindow()
        facts = {"learning_rate": self.plan.learning_rate_at(self.step - 1), "gradient_norm": norm}
        self._record({"train": means, **facts})
        self.accelerator.log({**{f"train/{k}": v for k, v in means.items()}, **facts}, step=self.step)
        return means["loss"]

    def _record(self, facts: Mapping[str, object]) -> None:
        if self.accelerator.is_main_process:
            place = {"step": self.step, "samples": self.step * self.global_batch, "time": round(time.time(), 3)}
            self.folder.log.append(place | dict(facts))

    def _validate(self) -> None:
        """Held-out loss of the averaged weights, on the main process; leaves modes and random state as they were."""
        if self.held_out is None:
            return
        if self.accelerator.is_main_process:
            with self.ema.applied(), self.accelerator.autocast():
                losses = held_out_loss(
                    self.transformer,
                    self.objective,
                    self.held_out,
                    batch_size=self.plan.batch_size,
                    device=self.accelerator.device,
                )
            self.held_out_before = self.held_out_before or losses
            self.held_out_last = losses
            means = {name: mean_over_pictures(values) for name, values in losses.items()}
            if not any(
                "held_out" in r and r["step"] == self.step for r in self.folder.log.records()
            ):  # resumed at its end
                self._record({"held_out": {name: vars(estimate) for name, estimate in means.items()}})
            self.accelerator.log({f"held_out/{name}": e.mean for name, e in means.items()}, step=self.step)
        self.accelerator.wait_for_everyone()

    def _sample(self) -> None:
        """Pictures of the fixed prompts by the averaged weights, into samples/step-XXXXXX/."""
        if self.draw_samples is None:
            return
        if self.accelerator.is_main_process:
            with self.ema.applied(), evaluating(self.transformer):
                pictures = self.draw_samples()
            place = self.folder.samples_at(self.step)
            for number, picture in enumerate(pictures):
                write_file(place / f"{number:04d}.png", partial(picture.save, format="PNG"))
            sheet = grid([pictures])
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    image = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
                    image = image.view(1, sheet.height, sheet.width, 3)
                    tracker.log_images({"samples": image.numpy()}, step=self.step, dataformats="NHWC")
        self.accelerator.wait_for_everyone()

    def _result(self) -> Result:
        before, last = self.held_out_before, self.held_out_last
        return Result(
            steps=self.step,
            samples_seen=self.step * self.global_batch,
            held_out_before={name: mean_over_pictures(values) for name, values in before.items()},
            held_out_after={name: mean_over_pictures(values) for name, values in last.items()},
            change={name: paired_difference(before[name], last[name]) for name in last},
        )

    # State

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            self.folder.save(self.step, self._write_state, keep=self.plan.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _write_state(self, folder: Path) -> None:
        save_nested(folder / "trained.safetensors", {name: p.detach() for name, p in self.trained.items()})
        save_nested(folder / "ema.safetensors", self.ema.state_dict())
        save_nested(folder / "optimizer.safetensors", self.optimizer.state_dict())
        scaler = self.accelerator.scaler
        progress = {
            "step": self.step,
            "global_batch": self.global_batch,
            "window": self.window.sums,
            "scaler": scaler.state_dict() if scaler else None,
            "held_out_before": self.held_out_before,
            "history": None if self.history is None else vars(self.history),
        }
        save_nested(folder / "progress.safetensors", progress)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint that `RunFolder` calls complete.

        Raises UserError if it was written with another set of trained weights or another global batch.
        """
        progress = load_nested(folder / "progress.safetensors")
        if progress["global_batch"] != self.global_batch:
            raise UserError(
                f"{folder} was written with {progress['global_batch']} pictures per step, this run has "
                f"{self.global_batch}: keep train.batch_size x train.accumulation x processes the same to resume"
            )
        saved = load_nested(folder / "trained.safetensors")
        if saved.keys() != self.trained.keys():
            raise UserError(f"{folder} holds other trained weights than this run's adapter: check lora.targets")
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(saved[name])
        self.ema.load_state_dict(load_nested(folder / "ema.safetensors"))
        self.optimizer.load_state_dict(load_nested(folder / "optimizer.safetensors"))
        if self.accelerator.scaler is not None and progress["scaler"]:
            self.accelerator.scaler.load_state_dict(progress["scaler"])
        self.step = progress["step"]
        self.window.sums = progress["window"]
        self.held_out_before = progress["held_out_before"]
        if progress.get("history") is not None:
            self.history = LossHistory(**progress["history"])
