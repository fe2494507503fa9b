"""The training loop under accelerate: receives built parts, trains the parameters that want gradients.

What a step computes is a function of its draw indices (`batches.py`), so the state of a run is: the trained weights,
their average, the optimizer's moments, the step number, and what was logged so far.

Between two log lines, checkpoints or looks the host waits for no device: a batch is made while the one before is
trained on, and what a step met is read when the next one is under way.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pixart_ft.config.text import numbered
from pixart_ft.errors import UserError, attempted
from pixart_ft.evaluation.held_out import HeldOutSet, evaluating
from pixart_ft.evaluation.objective import Objective
from pixart_ft.model.weights import all_finite
from pixart_ft.pictures.sheets import Sample
from pixart_ft.randomness import generator
from pixart_ft.runs.folder import RunFolder
from pixart_ft.training.ahead import Ahead
from pixart_ft.training.batches import Batch, DrawLaws, TrainingSet, draw_batch
from pixart_ft.training.ema import Ema
from pixart_ft.training.guard import clip_gradients, guarded_step
from pixart_ft.training.importance import Importance
from pixart_ft.training.in_backward import InBackward
from pixart_ft.training.learning_rate import LearningRate
from pixart_ft.training.moving import Moving
from pixart_ft.training.nested import load_nested, save_nested, tensors_of
from pixart_ft.training.optimizers import found_by
from pixart_ft.training.pace import Pace
from pixart_ft.training.records import LossWindow, Progress, Records, Skipped
from pixart_ft.training.screen import Screen
from pixart_ft.training.sharding import Whole, gathered, prepared
from pixart_ft.training.step_numbers import StepNumbers, Underway
from pixart_ft.training.stopping import AllFailed, AllStopped, StopRequest
from pixart_ft.training.watching import Watch


@dataclass(frozen=True)
class Plan:
    """How long and how often. Steps are optimizer steps; `every` fields of 0 mean never."""

    steps: int
    batch_size: int  # pictures per process and micro-batch
    accumulation: int
    clip_norm: float  # 0: no clipping
    in_backward: bool  # step each weight as soon as its gradient is there
    give_up_after: int  # steps in a row that are not finite
    log_every: int
    validate_every: int
    samples_every: int
    checkpoint_every: int
    keep_checkpoints: int


class _Stopped(BaseException):
    """A request to stop, seen in the middle of what is only watched."""


class Trainer:
    """One run: `run()` trains from where the state stands to the end of the plan.

    The state goes to disk before anything is measured or drawn, and nothing that is not finite goes there.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        transformer: torch.nn.Module,
        objective: Objective,
        data: TrainingSet,
        laws: DrawLaws,
        optimizer: torch.optim.Optimizer,
        ema: Ema,
        learning_rate: LearningRate,
        plan: Plan,
        folder: RunFolder,
        whole: Whole | None = None,
        held_out: Sequence[HeldOutSet] = (),
        measure_raw: bool = False,
        draw_samples: Callable[[], list[Sample]] | None = None,
        describe: Callable[[Path], None] = lambda checkpoint: None,
        export: Callable[[Progress], None] = lambda progress: None,
        keep_adapter: Callable[[Progress], None] = lambda progress: None,
    ):
        """`transformer` has its adapter attached; only parameters with requires_grad are trained and saved.

        Where it is in shards, `whole` is the same in one piece, for what one process does.
        `held_out` is measured, and `draw_samples` makes the pictures of the fixed prompts, with the network as it is;
        then `keep_adapter` may keep it. `export` writes the result after the last step, before that is looked at.
        `describe` writes into each checkpoint what else belongs there.
        """
        self.accelerator, self.objective, self.plan = accelerator, objective, plan
        self.data, self.laws = data, laws
        self.folder, self.ema, self.transformer, self.learning_rate = folder, ema, transformer, learning_rate
        self.describe, self.export, self.keep_adapter = describe, export, keep_adapter
        self.whole = whole
        self.records = Records(folder.log, accelerator)
        self.watch = Watch(
            accelerator=accelerator,
            transformer=transformer if whole is None else whole.transformer,
            objective=objective,
            ema=ema if whole is None else whole.ema,
            folder=folder,
            records=self.records,
            batch_size=plan.batch_size,
            held_out=held_out,
            measure_raw=measure_raw,
            draw_samples=draw_samples,
        )
        self.trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
        self.model, self.optimizer = prepared(accelerator, transformer, optimizer)
        parameters = list(self.trained.values())
        self._in_backward = InBackward(self.optimizer.optimizer, parameters) if plan.in_backward else None
        self.step = 0
        self.window = LossWindow()
        self.importance: Importance | None = None
        if laws.timestep_law == "importance":
            self.importance = Importance(objective.schedule.num_steps, objective.within)
        self._ahead = Ahead(self._batch_to_make)
        self._underway: deque[Underway] = deque()  # the numbers of steps that were not read yet, oldest first
        self._norm = math.nan  # of the newest gradient that was read
        self._bad_steps = 0
        self._saved_at = -1
        self._stop = StopRequest()  # to this process
        self._stopping = False  # some process was asked: all know, and stop after the same step

    # What follows from the plan

    @property
    def global_batch(self) -> int:
        """Pictures per optimizer step, over all processes and accumulation steps."""
        return self.plan.batch_size * self.plan.accumulation * self.accelerator.num_processes

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return Progress(self.step, self.step * self.global_batch)

    def draws_of(self, step: int, micro: int) -> range:
        """The draw indices of this process's micro-batch number `micro` of an optimizer step."""
        block = micro * self.accelerator.num_processes + self.accelerator.process_index
        start = step * self.global_batch + block * self.plan.batch_size
        return range(start, start + self.plan.batch_size)

    # The loop

    def run(self) -> None:
        """Train to the last step and leave the result; a `StopRequest` saves a checkpoint first of all and then
        raises KeyboardInterrupt. Before the first step that is one of step 0, with what was measured by then.

        Raises UserError where the training diverged, the disk is full or the data are gone: the last checkpoints are
        then those from before, and it says how to go on from them.
        """
        try:
            with self._stop.caught(), self._ahead:
                self._between_steps()
                self._steps()
        except UserError as error:
            saved = self.folder.saved_steps()
            again = f"continue from step {max(saved)}" if saved else "begin again"
            raise type(error)(f"{error}; then {again} with --resume auto") from error

    def _steps(self) -> None:
        pace = Pace(self.accelerator.device)
        screen = Screen(
            self.plan.steps * self.global_batch, self.progress.samples, show=self.accelerator.is_main_process
        )
        with screen.running():  # from the first step on: its rate is that of steps
            while self.step < self.plan.steps:
                with pace.step(self.global_batch):
                    self._optimizer_step()
                    self.step += 1
                    self._read_numbers(but=0 if self._due(self.plan.log_every) else 1)
                screen.move(self.global_batch)
                if self._due(self.plan.log_every):
                    speed = pace.close(self._ahead.waited)
                    screen.tell(self._log(speed), speed["samples_per_second"])
                if self.step == self.plan.steps:
                    screen.end()
                self._between_steps()

    def _between_steps(self) -> None:
        """What is due between two steps, before the first and after the last.

        The state goes to disk first. Raises KeyboardInterrupt when it has, after a request to stop.
        """
        last, plan = self.step >= self.plan.steps, self.plan
        if last or any(map(self._due, (plan.checkpoint_every, plan.validate_every, plan.samples_every))):
            self._read_numbers()
        if self.accelerator.num_processes == 1:  # several are asked by their numbers, so that all stop after one step
            self._stopping = self._stopping or self._stop.asked
        if last or self._due(plan.checkpoint_every):
            self.save()
        if not self._stopping:
            self._look(last=last)
        if self._stopping:
            self.save()
            raise AllStopped(
                f"stopped after step {self.step}, state saved; the same command with --resume auto continues"
            )

    def _optimizer_step(self) -> None:
        """Give the device one optimizer step over the global batch to do; what it meets is under way then."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate.at(self.step, group.get("initial_lr"))
        mine: list[Tensor] = []
        for micro in range(self.plan.accumulation):
            last = micro == self.plan.accumulation - 1
            batch = self._ahead.take((self.step, micro), self._following(self.step, micro))
            # the adapter's own dropout is the one draw that torch makes by itself
            first = self.draws_of(self.step, micro)[0]
            torch.manual_seed(generator(self.laws.seed, first, "adapter dropout").initial_seed())
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                t, weight, terms = self._forward(batch)
                self.accelerator.backward(terms["loss"].mean() / self.plan.accumulation)
            asked = torch.full_like(terms["loss"], float(self._stop.asked))
            mine.append(torch.stack([asked, t.float(), weight, *terms.values()], dim=1).detach())
        self._update(list(terms), self._everywhere(torch.stack(mine)))

    def _following(self, step: int, micro: int) -> tuple[int, int] | None:
        """The step and number of the micro-batch after this one; None at the end."""
        step, micro = divmod(step * self.plan.accumulation + micro + 1, self.plan.accumulation)
        return (step, micro) if step < self.plan.steps else None

    def _batch_to_make(self, of: tuple[int, int]) -> Callable[[], Batch]:
        """What makes this process's micro-batch of a step and a number in it, in whichever thread."""
        step, micro = of
        law = None if self.importance is None else self.importance.law(step)

        def make() -> Batch:
            batch = draw_batch(
                self.data,
                self.draws_of(step, micro),
                self.laws,
                global_batch=self.global_batch,
                num_steps=self.objective.schedule.num_steps,
                within=self.objective.within,
                law=law,
                two_noises=self.objective.draws_two_noises,
            )
            return batch.pinned() if self.accelerator.device.type == "cuda" else batch

        return make

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """t, the weights that undo its law, and the terms times these weights, each (N,), of a micro-batch."""
        there: dict[str, Any] = {
            name: None if x is None else x.to(self.accelerator.device, non_blocking=True)
            for name, x in vars(batch).items()
        }
        t, weight = there["t"], there.pop("weight")
        with self.accelerator.autocast():
            return t, weight, {name: weight * term for name, term in self.objective.terms(self.model, **there).items()}

    def _everywhere(self, mine: Tensor) -> Tensor:
        """(micro-batch, N, ...) of all processes in the order of the draws, of this one's (micro-batch, n, ...)."""
        rows = self.accelerator.gather(mine).view(self.accelerator.num_processes, *mine.shape)
        return rows.transpose(0, 1).flatten(1, 2)

    def _update(self, names: list[str], rows: Tensor) -> None:
        """Step by the gradients that are there, unless they or a loss in the rows (see `Underway`) are not finite."""
        self.accelerator.unscale_gradients()
        norms, norm = self._norms()
        underway = Underway(self.step, names, rows, norms, norm)
        guarded_step(self.optimizer.optimizer, underway.taken)  # accelerate's own would wait under a scaler
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(underway.taken)
        self._underway.append(underway)

    def _norms(self) -> tuple[Tensor, Tensor]:
        """Of each gradient and of all together, which are clipped now, or were stepped by in the backward pass."""
        if self._in_backward is not None:
            return self._in_backward.norms()
        return clip_gradients(list(self.trained.values()), self.plan.clip_norm or math.inf)

    def _read_numbers(self, but: int = 0) -> None:
        """Read what the steps met that are under way, but for the newest `but` of them.

        Raises UserError where too many steps in a row were not finite.
        """
        while len(self._underway) > but:
            self._take_in(self._underway.popleft().read())

    def _take_in(self, met: StepNumbers) -> None:
        if met.taken:
            self._into_window(met)
        if self.importance is not None:
            t, weight, loss = (
                torch.cat(parts)
                for parts in zip(
                    *((each.t, each.weight, each.terms["loss"]) for each in met.micro_batches), strict=True
                )
            )
            self.importance.add(met.step, t, loss / weight)
        self._norm = met.norm
        self._stopping = self._stopping or met.asked
        self._bad_steps = 0 if met.taken else self._bad_steps + 1
        if not met.taken:
            self._tell_of_skipped(met)
        if self._bad_steps >= self.plan.give_up_after:
            raise self._diverged(
                f"the loss or the gradient was not finite for {numbered(self._bad_steps, 'step')} in a row"
            )

    def _into_window(self, met: StepNumbers) -> None:
        """The losses as they are: a prior's weight is for the gradient."""
        start = met.step * self.global_batch
        for each in met.micro_batches:
            share = torch.ones_like(each.weight)
            if self.data.prior:  # else there is no need to find every row
                rows = [self.data.row(self.laws.seed, draw) for draw in range(start, start + len(each.t))]
                share = self.data.weights(rows)
            terms = {name: values / share for name, values in each.terms.items()}
            self.window.add(terms, each.t, each.weight / share, self.objective.schedule.num_steps)
            start += len(each.t)

    def _tell_of_skipped(self, met: StepNumbers) -> None:
        """Into the log, and as a warning."""
        draws = range(met.step * self.global_batch, (met.step + 1) * self.global_batch)
        skipped = Skipped.of(met, draws, partial(self.data.name_of, self.laws.seed), self.trained)
        # a gradient scaler begins too high on purpose, and comes down by steps that overflow
        expected = self.accelerator.scaler is not None and skipped.what == "gradient"
        self.records.skipped(Progress(met.step + 1, draws.stop), skipped, warn=not expected)

    def _diverged(self, what: str) -> AllFailed:
        scaled = ", or use train.mixed_precision bf16 with --accept-changes" if self.accelerator.scaler else ""
        return AllFailed(
            f"the training diverged: {what} (step {self.step}), and nothing of that was saved. Lower "
            f"optim.learning_rate ({self.learning_rate.peak:g}){scaled}"
        )

    def _check_finite(self) -> None:
        """Raise UserError on all processes unless the state is finite, and the loss that its weights give."""
        moments = tensors_of(self.optimizer.state_dict()["state"])
        weights = [*self.trained.values(), *self.ema.shadows.values()]
        bad = None if all_finite([*weights, *moments]) else "weights or moments are not finite"
        if not self._anywhere(bad is not None):  # each process sees its own shards, and all compute together or none
            for average in (nullcontext(), self.ema.applied())[: 1 + self.ema.is_on]:
                with average, evaluating(self.transformer):
                    loss = self._forward(self._batch_to_make((max(0, self.step - 1), 0))())[2]["loss"]
                bad = bad if all_finite([loss]) else "the loss of these weights is not finite"
        if self._anywhere(bad is not None):
            raise self._diverged(bad or "another process met numbers that are not finite")

    def _anywhere(self, mine: bool) -> bool:
        """Whether something is true for some process."""
        flag = torch.tensor([float(mine)], device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).any())

    def _due(self, every: int) -> bool:
        return every > 0 and self.step > 0 and self.step % every == 0

    def _log(self, speed: Mapping[str, float]) -> float:
        """Close the window: one line of log.jsonl, one point per curve; returns the mean loss."""
        means = self.window.means()
        self.window = LossWindow()
        facts = {"learning_rate": self.learning_rate.at(self.step - 1), "gradient_norm": self._norm}
        facts |= found_by(self.optimizer)
        self.records.train(self.progress, means, facts, speed)
        return means.get("loss", math.nan)  # of no step, if all were skipped

    def _look(self, *, last: bool) -> None:
        """What is due and not done yet at this step: the held-out loss, the sample grid. A request to stop ends it.

        At both ends of the course they are always due; before the last the result is written, since no report may lose
        it. A failure at the beginning is raised, when nothing can be lost; later it is a warning.
        """

        def stop_if_asked(*_: object) -> None:
            if self._stop.asked:
                raise _Stopped

        begin = self.step == self.watch.since
        measuring, drawing = (
            begin or last or self._due(every) for every in (self.plan.validate_every, self.plan.samples_every)
        )
        if not (measuring or drawing):  # at most steps: no log is read, and no process waits for the others
            return
        at_hand = nullcontext() if self.whole is None else self.whole.at_hand()
        # the hook is asked before a network call, so never in the middle of a change of weights
        with at_hand, suppress(_Stopped), self.watch.transformer.register_forward_pre_hook(stop_if_asked):
            if last and self.accelerator.is_main_process:
                self.export(self.progress)
            if begin or last or (measuring and not self.records.has_held_out(self.step)):
                with nullcontext() if begin else attempted("the held-out loss"):
                    self.watch.measure(self.progress)
            if begin or last or (drawing and not self.watch.has_drawn(self.step)):
                with nullcontext() if begin else attempted("the sample grid"):
                    self.watch.draw(self.progress)
            if self.accelerator.is_main_process:
                with attempted("the adapter of this step"):
                    self.keep_adapter(self.progress)
        self._stopping = self._anywhere(self._stop.asked)

    # State

    def save(self) -> None:
        """Write a checkpoint of this step, unless it is there; raises UserError if the state is not finite."""
        if self._saved_at == self.step:
            return
        self._read_numbers()
        self._check_finite()
        state, refused = gathered(self._state(), kept=self.accelerator.is_main_process), None
        if self.accelerator.is_main_process:
            try:
                self.folder.save(self.step, partial(self._write_state, state), keep=self.plan.keep_checkpoints)
            except UserError as error:
                refused = error
        if self._anywhere(refused is not None):
            raise AllFailed(str(refused or "another process could not write the checkpoint"))
        self._saved_at = self.step

    def _write_state(self, state: Mapping[str, Any], folder: Path) -> None:
        for name, tree in state.items():
            save_nested(folder / f"{name}.safetensors", tree)
        self.describe(folder)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds, by the names of its files."""
        scaler = self.accelerator.scaler
        progress = {
            "step": self.step,
            "global_batch": self.global_batch,
            "window": self.window.sums,
            "scaler": scaler.state_dict() if scaler else None,
            "held_out_before": self.watch.before,
            "compared_since": self.watch.since,
            "history": None if self.importance is None else self.importance.state_dict(self.step),
        }
        return {**Moving(self.trained, self.ema, self.optimizer).state(), "progress": progress}

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint that `RunFolder` calls complete.

        Raises UserError if it was written with another set of trained weights or another global batch.
        """
        progress = load_nested(folder / "progress.safetensors")
        if progress["global_batch"] != self.global_batch:
            raise UserError(
                f"{folder} was written with {numbered(progress['global_batch'], 'picture')} per step, this run has "
                f"{self.global_batch}: keep train.batch_size x train.accumulation x processes the same to resume"
            )
        Moving(self.trained, self.ema, self.optimizer).load(folder)
        if self.accelerator.scaler is not None and progress["scaler"]:
            self.accelerator.scaler.load_state_dict(progress["scaler"])
        self.step = self._saved_at = progress["step"]
        self.window.sums = progress["window"]
        self.watch.before, self.watch.since = progress["held_out_before"], progress.get("compared_since", 0)
        if self.importance is not None and progress.get("history") is not None:
            self.importance.load_state_dict(progress["history"], self.step)
