"""What a run is trained on, by content and not by name, and whether a later command continues it.

Every checkpoint keeps this record. A folder that moved is the same pictures; other weights at the same path are not the
same base.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pixart_ft.adapters.targets import named
from pixart_ft.config.hub import Hub
from pixart_ft.config.reading import default, flat, keys
from pixart_ft.config.text import numbered
from pixart_ft.config.train import TrainConfig
from pixart_ft.data.buckets import Sized
from pixart_ft.data.pixels import TRANSFORM
from pixart_ft.data.rows import Row
from pixart_ft.errors import UserError
from pixart_ft.evaluation.objective import Objective
from pixart_ft.files import read_object, sha256
from pixart_ft.model import loading
from pixart_ft.model.base import Base
from pixart_ft.model.text import TEXT_PREPARATION, prepare_text
from pixart_ft.runs.folder import TRAINED_ON, RunFolder, step_of
from pixart_ft.training.batches import ORDER
from pixart_ft.training.encode import text_encoder_id, vae_id
from pixart_ft.training.learning_rate import LearningRate, fitting_warmup
from pixart_ft.training.objective import variance_stands_still

# Settings that a resumed run may change. First those that only name what is compared by content,
_BY_CONTENT = {
    "data.folder",
    "data.mask",
    "data.held_out",
    "data.held_out_fraction",
    "data.prior",
    "data.sources",
    "data.strict",
    "data.resolution",
    "data.aspect",
    "data.bucket_step",
    "data.small_buckets",
    "data.max_tokens",
    "data.shuffle_tags",
    "data.keep_tags",
    "data.caption_variants",
    "diffusion.schedule",
    "diffusion.num_steps",
    "diffusion.rescale",
    "diffusion.cosine_offset",
    "diffusion.zero_snr",
    "diffusion.prediction_type",
    "model.base",
    "model.dtype",
    "model.revision",
    "model.text_encoder_dtype",
    "model.text_encoder_quantization",
    "validation.pictures",
}
# then how a run is watched and kept, or cut into batches (of the same size in all, which `Trainer.load` checks),
_UNSAID = {
    "run.name",
    "run.folder",
    "data.cache",
    "train.batch_size",
    "train.accumulation",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.ema_on_cpu",
    "train.give_up_after",
    "validation.every",
    "validation.raw_weights",
    "validation.report",
    "validation.samples_every",
    "logging.every",
    "logging.trackers",
    "adapter.whole",
    *(f"hub.{key}" for key in Hub.model_fields),
}
# and what may be turned while a run goes on, which is said aloud.
_SAID = {
    "data.live",
    "data.project_captions",
    "train.steps",
    "optim.learning_rate",
    "optim.warmup_steps",
    "optim.decay",
    "optim.weight_decay",
    "optim.beta1",
    "optim.beta2",
    "optim.epsilon",
    "optim.clip_norm",
    "optim.in_backward",
    "model.gradient_checkpointing",
    "model.attention",
    "model.compile",
}
# What may lie elsewhere on each machine of a run; the first five are compared by content.
_OF_A_MACHINE = {"data.folder", "data.held_out", "data.prior", "data.sources", "model.base", "data.cache"}
# What the saved state does not fit any more.
_NEVER = {
    *(f"adapter.{key}" for key in ("kind", "rank", "targets", "dora", "init", "trainable", "peft_type")),
    *("optim.optimizer", "optim.groups", "optim.stochastic_rounding"),
}
_READABLE = 200  # letters of a change; sources have more keys than anybody reads
# What the held-out loss and the samples do not depend on, but by way of the training.
_NOT_COMPARED = ("training ", "prior ", "data.prior_weight", "adapter.", "optim.", "train.ema_")


@dataclass(frozen=True)
class Part:
    """One thing that a run is trained on: the digest of its content, and what to call it.

    pairs   of pictures or captions: the digest of both together, whatever their order
    """

    digest: str
    words: str = ""
    pairs: str = field(default="", compare=False)

    @classmethod
    def of(cls, content: Iterable[object], words: str = "", pairs: str = "") -> "Part":
        """The part with this content, whose order counts."""
        return cls(_digest(content), words, pairs)

    def change(self, now: "Part") -> str | None:
        """How it differs from what it is now, in words; None if it does not."""
        if self.digest == now.digest:
            return None
        if self.words != now.words:
            return f"{self.words} before, {now.words} now"
        reordered = self.pairs and self.pairs == now.pairs
        return "the same in another order" if reordered else "not the same as before"


@dataclass(frozen=True)
class TrainedOn:
    """All that a run is trained on: parts by content, and the resolved settings, flat."""

    parts: Mapping[str, Part]
    settings: Mapping[str, Any]

    def write(self, checkpoint: Path) -> None:
        """Into the folder of a checkpoint that is being written."""
        (checkpoint / TRAINED_ON).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path) -> "TrainedOn":
        """From a whole checkpoint; nothing is known of one that an earlier version wrote."""
        if not (checkpoint / TRAINED_ON).is_file():
            return cls({}, {})
        content = read_object(checkpoint / TRAINED_ON, "--resume", "give an earlier checkpoint")
        settings = {_as_named_now(key): value for key, value in content["settings"].items()}
        return cls({name: Part(**part) for name, part in content["parts"].items()}, settings)

    def facts(self) -> dict[str, str]:
        """What all processes of a run have in common, a line each."""
        settings = {key: repr(value) for key, value in self.settings.items() if key not in _OF_A_MACHINE}
        return settings | {name: f"{part.words} ({part.digest[:8]})".strip() for name, part in self.parts.items()}

    def with_base(self, transformer: nn.Module, name: str) -> "TrainedOn":
        """With the base's weights, once they are loaded."""
        return replace(self, parts={**self.parts, "base": Part(_weights_digest(transformer), name)})


def trained_on(
    config: TrainConfig,
    base: Base,
    train: Sized,
    prior: Sized,
    held: Sized,
    digests: Sequence[str],
    schedule_config: Mapping[str, object],
    objective: Objective,
) -> TrainedOn:
    """Everything but the base's own weights, found without loading any.

    digests          of the pictures of `train`, then of `prior`, then of `held`
    schedule_config  the noise schedule in the words of a diffusers scheduler config
    """
    schedule = sorted((key, value) for key, value in schedule_config.items() if value)  # what is off may be left out
    parts, each = {}, iter(digests)
    for name, part in (("training", train), ("prior", prior), ("held-out", held)):
        pictures, captions = list(islice(each, len(part.rows))), [str(_said(row)) for row in part.rows]
        words = str(len(part.rows)), _digest(sorted(zip(pictures, captions, strict=True)))
        parts[f"{name} pictures"] = Part.of(pictures, *words)
        parts[f"{name} captions"] = Part.of(captions, *words)
    parts["training order"] = Part.of([ORDER], ORDER)
    parts["size of the pictures"] = _sizes((train, prior, held))
    parts["VAE"] = Part.of([vae_id(config, base), base.latent_scale])
    parts["text encoder"] = Part.of([text_encoder_id(config, base), config.data.max_tokens, TEXT_PREPARATION])
    parts["noise schedule"] = Part.of([schedule, objective.prediction_type])
    targets = named(config.adapter.targets, last_layer=not variance_stands_still(objective, base))
    in_full = {"diffusion.timestep_range": list(objective.interval), "adapter.targets": list(targets)}
    return TrainedOn(parts, flat(config) | in_full)


def _sizes(parts: Sequence[Sized]) -> Part:
    counts = [part.counts for part in parts]
    sizes = {size for found in counts for size in found}
    if len(sizes) == 1 and len(set(*sizes)) == 1:
        ((side, _),) = sizes
        return Part.of([side, TRANSFORM], f"{side} pixels")
    return Part.of([*map(list, (found.items() for found in counts)), TRANSFORM], numbered(len(sizes), "size"))


@dataclass(frozen=True)
class Changes:
    """What a continuation changes: `said` is allowed, `refused` has to be accepted; `names` are those of `refused`.

    behind   settings that may be why something in `refused` is compared by its content and is another
    """

    said: Sequence[str]
    refused: Sequence[str]
    names: Sequence[str]
    behind: Sequence[str] = ()

    @property
    def begins_anew(self) -> bool:
        """Whether the held-out loss and the samples can no longer be compared with those from before."""
        return any(not name.startswith(_NOT_COMPARED) for name in self.names)


def changes(began: TrainedOn, now: TrainedOn, rate: LearningRate, step: int) -> Changes:
    """What differs between a checkpoint after `step` steps and the run that is to continue it at `rate`.

    Parts that only one of the two knows yet are left out, but for those that were otherwise before they were known.
    Raises UserError for what cannot be continued at all.
    """
    if rate.steps < step:
        raise UserError(
            f"--resume: train.steps is {rate.steps}, and this run has done {numbered(step, 'step')} already; give more "
            "steps, or an earlier checkpoint"
        )
    if not began.settings:
        line = "what it was trained on is not recorded: an earlier version wrote this checkpoint"
        return Changes([], [line], ["everything"])
    # what an earlier version did not know of, it did as by default
    was = {key: default(known) for key, known in keys(TrainConfig).items()} | dict(began.settings)
    gone = dict.fromkeys(key for key in was if key.startswith("adapter.options."))  # unless they are there still
    settings = {**gone, **now.settings}
    differs = [key for key, value in settings.items() if was.get(key) != value]
    lines = {key: f"{key} was {was.get(key)!r}, is {settings[key]!r}" for key in differs}
    said = [lines[key] for key in differs if key in _SAID]
    refused = {key: lines[key] for key in differs if key not in _BY_CONTENT | _UNSAID | _SAID}
    averages = now.settings.get("optim.optimizer") == "schedule_free"  # its weights are mixed with beta1
    never = [line for key, line in lines.items() if key in _NEVER or (averages and key == "optim.beta1")]
    if never:
        raise UserError("--resume cannot go on: " + "; ".join(never) + "; start another run (--init-from)")
    without = {name: Part.of([], "0") for name in ("prior pictures", "prior captions")}
    known_then = {**without, "training order": Part("", "a shuffled table"), **began.parts}
    for name in (name for name in now.parts if name in known_then):
        if told := known_then[name].change(now.parts[name]):
            refused[name] = f"{name}: {told}"
    rates = _rates(began, rate, step)
    if rates is not None:
        line = f"the learning rate was {rates[0]:.3g} and goes on at {rates[1]:.3g}"
        turned = {"optim.learning_rate", "optim.decay", "optim.warmup_steps"} & set(differs)
        if rates[1] > rates[0] and not turned:
            refused["optim.learning_rate"] = f"{line}: train.steps stretches the {rate.decay} decay"
        else:
            said.append(line)
    behind = [
        lines[key] if len(lines[key]) < _READABLE else f"{key} is another" for key in differs if key in _BY_CONTENT
    ]
    return Changes(said, list(refused.values()), list(refused), behind)


def check_continues(
    folder: RunFolder, checkpoint: Path, now: TrainedOn, rate: LearningRate, accept_changes: bool
) -> Changes:
    """What this run changes; raises UserError for what would make it another one, unless that is accepted."""
    step = step_of(checkpoint) or 0
    found = changes(TrainedOn.read(checkpoint), now, rate, step)
    if found.refused and not accept_changes:
        anew = f"; the held-out loss and the samples are then compared with step {step}" if found.begins_anew else ""
        raise UserError(
            f"--resume continues {folder.path} from step {step}, and these are not as they were:\n"
            + "".join(f"  - {line}\n" for line in found.refused)
            + "".join(f"    ({line})\n" for line in found.behind)
            + f"put them back (--config {folder.config_file}), go on all the same with --accept-changes{anew}, or "
            "start another run from these weights (--init-from)"
        )
    return found


def announce(folder: RunFolder, checkpoint: Path | None, steps: int, found: Changes) -> None:
    """Where a resumed run goes on, and what it changes."""
    if checkpoint is None:
        print(f"{folder.path} has no checkpoint yet: the run begins at step 0")
        return
    print(f"continuing {folder.path} from step {step_of(checkpoint)} of {steps}")
    for line in (*found.refused, *found.said):
        print(f"  changed: {line}")
    if found.begins_anew:
        print("  the held-out loss and the samples are compared with this step from now on")


def _rates(began: TrainedOn, rate: LearningRate, step: int) -> tuple[float, float] | None:
    """The learning rate of the last step done and of the next one, where it would not have gone on like this."""
    if step == 0 or step == rate.steps:
        return None
    peak, warmup, decay = (began.settings[f"optim.{name}"] for name in ("learning_rate", "warmup_steps", "decay"))
    steps = began.settings["train.steps"]
    before = LearningRate(peak, fitting_warmup(warmup, steps), decay, steps)
    if before.at(step) == rate.at(step):
        return None
    return before.at(step - 1), rate.at(step)


def _digest(content: Iterable[object]) -> str:
    return sha256(json.dumps([str(x) for x in content]).encode())[:32]


def _said(row: Row) -> object:
    """What a picture is called: its caption, or all of them with their shares."""
    captions = tuple(map(prepare_text, row.captions))
    return (captions, row.shares) if row.others else captions[0]


def _as_named_now(key: str) -> str:
    """A setting of an earlier version under its present name."""
    return f"adapter.{key.removeprefix('lora.')}" if key.startswith("lora.") else key


def _weights_digest(module: nn.Module) -> str:
    """Over every bit of the weights, their names, and what else decides the function."""
    digest = hashlib.sha256(loading.fingerprint(module).encode())
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
