"""A training step of ours beside that of a plain script: time, peak memory, arithmetic, and the same loss.

    python scripts/bench_step.py --model xl2-512 --steps 3 --json
    python scripts/bench_step.py --model demo --kind full --option model.attention=auto
    python scripts/bench_step.py --to-loss

The plain script does what the usual ones for a LoRA do: the base in float32 under autocast, all texts padded to 300
tokens, diffusers' own forward, the squared error of the noise. Both train on the same draws, each in a process of its
own, a step of one after a step of the other, and between them matrix products of this network's largest layer tell what
the machine can do. Prints seconds and samples per second, the peak memory of each process, the arithmetic that torch
counts in a step beside the least that the recipe allows, and the share of the machine's matrix products that a step
comes to. xl2-512 and xl2-1024 are the real architecture with random weights (1.2 GB in --work); a folder is any
PixArt-Sigma. --to-loss trains both on the demo with the quickstart's recipe: the seconds until both reach one held-out
loss, where ours has its law of t, weights and average, and the other has none.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone needs no installation

from real_size import build_model, build_pictures
from step_arithmetic import BUSY, CLOCK, counter, least_flops, matrix_peak, synchronize

from pixart_ft.adapters.targets import named
from pixart_ft.config.train import TARGETS, TrainConfig, load_config
from pixart_ft.evaluation.held_out import HeldOutSet, held_out_loss
from pixart_ft.evaluation.objective import Objective
from pixart_ft.model.base import Base
from pixart_ft.training.batches import TrainingSet, draw_batch
from pixart_ft.training.encode import compute_dtype, encode_once
from pixart_ft.training.memory import Case, training
from pixart_ft.training.run import run_training
from pixart_ft.training.start import accelerator_for, look, resolution_of, with_precision
from pixart_ft.training.trainer import Trainer

TEXT = 300  # tokens that the plain script pads to
SIDES = {"xl2-512": 512, "xl2-1024": 1024}
MEASURED_EVERY = 50  # steps, with --to-loss
TRACED = 3  # steps, with --timeline

# The two subjects, each in a process that makes a step when it is told to


@dataclass(frozen=True)
class Order:
    """What a subject is told to do for a few steps: count the arithmetic, time them, or note the GPU's timeline.

    wait    with the waits that a loop makes which reads the losses of a batch before its backward pass, and the norm
            after the step
    """

    what: Literal["count", "time", "trace", "end"]
    steps: int = 1
    wait: bool = False
    trace: Path | None = None


class Orders:
    """The subject's end of the pipe; it makes its steps through `step`, which waits for orders."""

    def __init__(self, pipe: Connection, device: torch.device) -> None:
        self.pipe, self.device = pipe, device
        self.order, self.left, self.doing = Order("end"), 0, ExitStack()

    def step(self, once: Callable[[], Tensor]) -> None:
        """Make one step, of which `once` returns the loss; when all of an order are made, tell what they took."""
        if not self.left:
            self._begin()
        loss = once()
        self.left -= 1
        if not self.left:
            self._end(loss)

    def _begin(self) -> None:
        self.order = self.pipe.recv()
        if self.order.what == "end":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
            self.pipe.send(torch.cuda.max_memory_allocated() if self.device.type == "cuda" else peak)
            os._exit(0)
        self.left = self.order.steps
        self.count = self.doing.enter_context(counter()) if self.order.what == "count" else None
        self.profile = self.doing.enter_context(profiler()) if self.order.what == "trace" else None
        synchronize(self.device)
        self.began = CLOCK()

    def _end(self, loss: Tensor) -> None:
        synchronize(self.device)
        seconds = CLOCK() - self.began
        self.doing.close()
        found = {"seconds": seconds / self.order.steps, "loss": float(loss)}
        found["flops"] = self.count.get_total_flops() if self.count else 0
        if self.profile is not None:
            self.profile.export_chrome_trace(str(self.order.trace))
            assert self.order.trace is not None
            found["busy"] = busy_seconds(self.order.trace) / seconds
        self.pipe.send(found)


def profiler() -> torch.profiler.profile:
    """Of the GPU alone: to note what the processor does too would slow it down."""
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])


def busy_seconds(trace: Path) -> float:
    """In which the GPU did anything, by a profiler's trace."""
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    spans = sorted(
        (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    found, until = 0.0, 0.0
    for begin, end in spans:
        found += max(0.0, end - max(begin, until))
        until = max(until, end)
    return found / 1e6


def ours(pipe: Connection, config: TrainConfig) -> None:
    """`pixart-ft train`, whose every step waits for the order."""
    step, terms, losses = Trainer._optimizer_step, Objective.terms, []
    orders: list[Orders] = []

    def noted(self: Objective, *given: Any, **more: Any) -> dict[str, Tensor]:
        found = terms(self, *given, **more)
        losses.append(found["simple"].detach().mean())
        if orders[0].order.wait:
            found["loss"].detach().cpu()
        return found

    def ordered(self: Trainer) -> None:
        if not orders:
            orders.append(Orders(pipe, self.accelerator.device))

        def once() -> Tensor:
            losses.clear()
            step(self)
            if orders[0].order.wait:
                self._read_numbers()
            return losses[0]

        orders[0].step(once)

    Objective.terms, Trainer._optimizer_step = noted, ordered  # type: ignore[method-assign]
    run_training(config)


class Plain:
    """The usual script."""

    def __init__(self, config: TrainConfig, kind: str) -> None:
        self.config = config = with_precision(config)
        accelerator = accelerator_for(config)
        start = look(config, None)
        self.device, self.start, self.step = accelerator.device, start, 0
        encoded = encode_once(config, start.base, start.learned, start.held, accelerator)
        self.data = TrainingSet(encoded.train, encoded.scale, encoded.null_caption)
        self.held_out = next(iter(encoded.held_out), None)
        assert start.objective.prediction_type == "epsilon"
        transformer = PixArtTransformer2DModel.from_pretrained(start.base.place, subfolder="transformer")
        self.transformer = transformer.float().requires_grad_(kind == "full").to(self.device).train()
        if kind == "lora":
            settings = LoraConfig(
                r=config.adapter.rank,
                lora_alpha=config.adapter.alpha,
                target_modules=list(named(config.adapter.targets, last_layer=start.objective.trains_variance)),
            )
            inject_adapter_in_model(settings, self.transformer)
        self.trained = [p for p in self.transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, config.optim.learning_rate or 1e-4)

    def once(self) -> Tensor:
        """A step; returns its loss."""
        size = self.config.train.batch_size
        draws = range(self.step * size, (self.step + 1) * size)
        steps = self.start.objective.schedule.num_steps
        batch = draw_batch(self.data, draws, self.start.laws, global_batch=size, num_steps=steps)
        missing = TEXT - batch.embeds.shape[1]
        embeds, mask = F.pad(batch.embeds, (0, 0, 0, missing)).float(), F.pad(batch.mask, (0, missing))
        x0, eps, t = batch.x0.to(self.device), batch.eps.to(self.device), batch.t.to(self.device)
        alpha_bar = self.start.objective.schedule.alpha_bar.to(self.device, torch.float32)[t].view(-1, 1, 1, 1)
        dtype = compute_dtype(self.config)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            output = self.transformer(
                alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps,
                encoder_hidden_states=embeds.to(self.device),
                encoder_attention_mask=mask.to(self.device),
                timestep=t,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                return_dict=False,
            )[0]
        loss = F.mse_loss(output[:, : eps.shape[1]].float(), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        loss.item()  # for its log
        return loss.detach()


def plain(pipe: Connection, config: TrainConfig, kind: str) -> None:
    subject = Plain(config, kind)
    orders = Orders(pipe, subject.device)
    while True:
        orders.step(subject.once)


# The comparison


def started(subject: Callable[..., None], *given: Any) -> Connection:
    """The pipe to a subject in a process of its own."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    multiprocessing.get_context("spawn").Process(target=subject, args=(there, *given), daemon=True).start()
    there.close()
    return here


def told(pipe: Connection, order: Order) -> Any:
    try:
        pipe.send(order)
        return pipe.recv()
    except (EOFError, OSError):
        sys.exit("one of the two processes has ended; see its message")


def compare(
    config: TrainConfig, kind: str, steps: int, *, in_a_row: int, at_once: bool, timeline: Path | None
) -> dict[str, float]:
    """Both subjects, some steps of one after as many of the other; or one after the other if they are not at once."""
    config = with_precision(config)
    base = Base.read(config.model.base, None)
    device = accelerator_for(config).device
    side = resolution_of(config, base) // base.vae_factor
    subjects: dict[str, tuple[Any, ...]] = {"plain": (plain, config, kind), "ours": (ours, config)}
    first: dict[str, dict[str, float]] = {}
    memory: dict[str, int] = {}
    peak = 0.0
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    found: dict[str, float] = {}
    for names in [list(subjects)] if at_once else [[name] for name in subjects]:
        pipes = {name: started(*subjects[name]) for name in names}
        first |= {name: told(pipe, Order("count")) for name, pipe in pipes.items()}  # it warms up too
        for _ in range(steps):
            for name, pipe in pipes.items():
                peak = max(peak, matrix_peak(config, base.transformer, side, device))
                seconds[name].append(told(pipe, Order("time", in_a_row))["seconds"])
        if timeline is not None and "ours" in pipes:
            found |= waiting(pipes["ours"], in_a_row, timeline)
        memory |= {name: told(pipe, Order("end")) for name, pipe in pipes.items()}
    assert kind == "full" or set(named(config.adapter.targets, last_layer=True)) == set(TARGETS["attention"])
    least = least_flops(
        base.transformer,
        rows=config.train.batch_size,
        side=side,
        text=longest_text(config),
        rank=None if kind == "full" else config.adapter.rank,
    )
    best = {name: min(values) for name, values in seconds.items()}
    for name in subjects:
        print(
            f"{name:<6} {best[name]:8.3f} s a step, {config.train.batch_size / best[name]:.4g} samples/s (of {steps}: "
            f"{', '.join(f'{value:.3f}' for value in seconds[name])}), peak memory {memory[name] / 1e9:.2f} GB, "
            f"{first[name]['flops'] / 1e9:,.0f} GFLOP, loss {first[name]['loss']:.6f}"
        )
    print(
        f"the least {least / 1e9:,.0f} GFLOP, and the machine's {peak / 1e9:,.0f} GFLOP/s in "
        f"{str(compute_dtype(config)).removeprefix('torch.')}: {least / peak:.3f} s; ours takes "
        f"{best['ours'] * peak / least:.2f} times that"
    )
    if device.type == "cuda":
        case = Case.of(config, base, tokens=longest_text(config), on_gpu=True)
        print(f"predicted for ours: {training(case).bytes / 1e9:.2f} GB")
    return found | {
        "speedup": best["plain"] / best["ours"],
        "memory_ratio": memory["ours"] / memory["plain"],
        "flops_ratio": first["ours"]["flops"] / least,
        "peak_share": least / (best["ours"] * peak),
        "loss_difference": abs(first["ours"]["loss"] - first["plain"]["loss"]) / first["plain"]["loss"],
    }


def waiting(pipe: Connection, in_a_row: int, folder: Path) -> dict[str, float]:
    """What waits in each step cost: the time of ours without and with, and the share of it that the GPU works."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, float] = {}
    for name, wait in (("free", False), ("waiting", True)):
        found[f"{name}_seconds"] = told(pipe, Order("time", in_a_row, wait))["seconds"]
        trace = folder / f"{name}.json.gz"
        found[f"{name}_busy_share"] = told(pipe, Order("trace", TRACED, wait, trace))["busy"]
    print(
        f"ours   {found['free_seconds']:.4f} s a step, of which the GPU works {found['free_busy_share']:.1%}; with "
        f"waits in each step {found['waiting_seconds']:.4f} s and {found['waiting_busy_share']:.1%}; traces in {folder}"
    )
    return found


def longest_text(config: TrainConfig) -> int:
    """Tokens of the texts of the first step, which is the one that is counted."""
    start = look(config, None)
    encoded = encode_once(config, start.base, start.learned, start.held, accelerator_for(config))
    data = TrainingSet(encoded.train, encoded.scale, encoded.null_caption)
    size, steps = config.train.batch_size, start.objective.schedule.num_steps
    return draw_batch(data, range(size), start.laws, global_batch=size, num_steps=steps).embeds.shape[1]


# Seconds to a loss


def courses(pipe: Connection, subject: str, config: TrainConfig) -> None:
    """Train to the end; tell the seconds of its steps and the held-out loss, again and again."""
    found: list[tuple[float, float]] = []
    if subject == "plain":
        script = Plain(config, "lora")
        spent, held_out = 0.0, script.held_out
        assert held_out is not None
        for step in range(config.train.steps + 1):
            if step % MEASURED_EVERY == 0 or step == config.train.steps:
                found.append((spent, held_out_mean(script, held_out)))
            began = CLOCK()
            script.once()
            synchronize(script.device)
            spent += CLOCK() - began
    else:
        whole, seconds = Trainer._optimizer_step, [0.0]

        def timed(self: Trainer) -> None:
            began = CLOCK()
            whole(self)
            synchronize(self.accelerator.device)
            seconds.append(CLOCK() - began)

        Trainer._optimizer_step = timed  # type: ignore[method-assign]
        lines = (run_training(config) / "log.jsonl").read_text().splitlines()
        after = list(accumulate(seconds))
        for record in map(json.loads, lines):
            if "held_out" in record:
                found.append((after[record["step"]], record["held_out"]["simple"]["mean"]))
    pipe.send(found)


def held_out_mean(script: Plain, held_out: HeldOutSet) -> float:
    losses = held_out_loss(script.transformer, script.start.objective, held_out, batch_size=8, device=script.device)
    return float(losses["simple"].mean())


def to_loss(config: TrainConfig) -> dict[str, float]:
    """Seconds of each until both have reached one held-out loss."""
    found = {name: started(courses, name, config).recv() for name in ("plain", "ours")}
    target = max(min(loss for _, loss in course) for course in found.values())
    if any(target >= course[0][1] for course in found.values()):
        sys.exit("one of the two got no better than it began; train for more steps")
    seconds = {name: next(s for s, loss in course if loss <= target) for name, course in found.items()}
    for name, course in found.items():
        shown = ", ".join(f"{loss:.4f} at {spent:.0f} s" for spent, loss in course)
        print(f"{name:<6} {seconds[name]:.1f} s of steps to a held-out loss of {target:.4f}: {shown}")
    return {"seconds": seconds["ours"], "speedup_to_loss": seconds["plain"] / seconds["ours"], "loss": target}


def configuration(args: argparse.Namespace) -> TrainConfig:
    """That of the run: the recipe of the model, with nothing measured, drawn or saved on the way."""
    options: dict[str, Any] = {
        "run.folder": args.work / "run",
        "logging.trackers": [],
        "data.cache": args.work / "cache",
    }
    if args.to_loss:
        options |= {"validation.every": MEASURED_EVERY, "validation.prompts": [], "train.checkpoint_every": 0}
        return load_config("quickstart", options | given(args))
    model = args.model
    if model in SIDES:
        model, pictures = args.work / args.model, args.work / f"pictures-{SIDES[args.model]}"
        if not (model / "model_index.json").is_file():
            build_model(model, SIDES[args.model])
        if not pictures.is_dir():
            build_pictures(pictures, side=SIDES[args.model])
        options |= {"data.folder": pictures}
    elif model == "demo":
        options |= {"data.folder": "demo"}
    options |= {
        "model.base": model,
        "model.gradient_checkpointing": False,
        "data.resolution": None,
        "data.held_out_fraction": 0,
        "optim.warmup_steps": 0,
        "train.batch_size": args.batch_size,
        "train.steps": args.steps * args.in_a_row + 2 + 2 * (args.in_a_row + TRACED),
        "train.checkpoint_every": 0,
        "validation.samples_every": 0,
        "logging.every": 1000,
    }
    if args.kind == "full":
        options |= {"adapter.kind": "full"}
    return load_config("lora_512", options | given(args))


def given(args: argparse.Namespace) -> dict[str, str]:
    return dict(option.split("=", 1) for option in args.option)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, xl2-512, xl2-1024, or a folder (with data.folder)")
    parser.add_argument("--kind", choices=("lora", "full"), default="lora")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="that are timed, after one that is counted")
    parser.add_argument("--in-a-row", type=int, default=1, help="steps that are timed together, on a GPU more than one")
    parser.add_argument("--timeline", type=Path, help="folder for traces of ours on a GPU, without and with waits")
    parser.add_argument("--option", action="append", default=[], help="KEY=VALUE of our configuration, for both")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "pixart_ft_bench")
    parser.add_argument("--one-by-one", action="store_true", help="where the memory does not hold both at once")
    parser.add_argument("--processor-time", action="store_true", help="for one thread on a machine that others use too")
    parser.add_argument("--to-loss", action="store_true", help="seconds to a held-out loss, on the demo")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    if args.processor_time and BUSY not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {BUSY: "1"})
    shutil.rmtree(args.work / "run", ignore_errors=True)
    config = configuration(args)
    if args.to_loss:
        found = to_loss(config)
    else:
        how = {"in_a_row": args.in_a_row, "at_once": not args.one_by_one, "timeline": args.timeline}
        found = compare(config, args.kind, args.steps, **how)
    if args.json:
        print(json.dumps({name: round(value, 5) for name, value in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
