"""A model card: what a result is, how it came about, how well it does, and how to draw with it.

All of it is from the run's own files. It names no folder of this machine, and shows no prompt unless asked.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from huggingface_hub import ModelCard, ModelCardData

from pixart_ft.config.hub import Publication
from pixart_ft.diffusion.intervals import WHOLE, shown
from pixart_ft.diffusion.names import StockPrediction
from pixart_ft.files import versions
from pixart_ft.runs.hub import HubModel
from pixart_ft.runs.metadata import AdapterMetadata
from pixart_ft.runs.results import What

_VARIANCE = {
    "trained": "trained; the iddpm sampler steps by it",
    "direct": "trained as its logarithm itself; the iddpm sampler steps by it",
    "stale": "stale: the training moved the network and did not train it; sample with a fixed one (ddim, ddpm, ...)",
    "none": "the network has none",
}
_TERMS = {"loss": "loss", "simple": "error", "vlb": "variance bound, bits/dim"}
_FOLDER = "FOLDER_OF_THE_BASE"


@dataclass(frozen=True)
class Sample:
    """A picture of the grid: its path in the repository, and what it was drawn from."""

    path: str
    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card is written from.

    repo       where it goes
    what       was trained
    metadata   what it says of itself, its base as it is known everywhere
    whole      whether a model has the VAE and the text encoder too
    name       of the run; None, and no losses, settings and data: it lies in no run's folder
    settings   the run's configuration, by dotted keys
    data       what it was trained and measured on: (what, how much)
    held_out   the first and the last record of the log with a held-out loss
    samples    pictures drawn after its last step
    curve      the path of the loss curve in the repository
    """

    repo: str
    what: What
    metadata: AdapterMetadata
    whole: bool
    name: str | None = None
    settings: Mapping[str, Any]
    data: Sequence[tuple[str, str]]
    held_out: Sequence[Mapping[str, Any]]
    samples: Sequence[Sample]
    curve: str | None = None


def card(facts: Facts, shown_as: Publication) -> str:
    """The README.md of a repository, its YAML block first."""
    data, metadata = _data(facts, shown_as), facts.metadata
    kind = {"lora": "LoRA adapter", "peft": "adapter", "full": "fine-tune"}[metadata.kind]
    base = HubModel.named(metadata.base)
    origin = f"[{base.id}](https://huggingface.co/{base.id})" if base else f"`{metadata.base}`"
    parts = [
        f"# {facts.repo.partition('/')[2]}",
        f"A {kind} of the PixArt-Sigma {origin}, made with pixart_ft.",
        *(["<Gallery />"] if facts.samples else []),
        *_triggers(shown_as.trigger_words),
        f"## Use\n\n{_use(facts, shown_as)}",
        f"## Training\n\n{_table(_training(facts))}",
        *_losses(facts),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n").content


def _data(facts: Facts, shown_as: Publication) -> ModelCardData:
    base = HubModel.named(facts.metadata.base)
    is_adapter = facts.what == "adapter"
    own = [facts.metadata.kind] if facts.metadata.kind == "lora" else []
    widget = [
        {"text": sample.prompt if shown_as.show_prompts else "-", "output": {"url": sample.path}}
        for sample in facts.samples
    ]
    return ModelCardData(
        license=shown_as.license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base.id if base else None,
        base_model_relation=("adapter" if is_adapter else "finetune") if base else None,
        tags=["text-to-image", "pixart-sigma", "pixart_ft", *own, *shown_as.tags],
        instance_prompt=", ".join(shown_as.trigger_words) or None,
        widget=widget or None,
    )


def _triggers(words: Sequence[str]) -> list[str]:
    return [f"## Trigger words\n\n{', '.join(f'`{word}`' for word in words)} in a prompt."] if words else []


def _use(facts: Facts, shown_as: Publication) -> str:
    metadata, base = facts.metadata, HubModel.named(facts.metadata.base)
    prompt = json.dumps(", ".join([*shown_as.trigger_words, "a red apple"]))
    if facts.what == "adapter":
        named = metadata.base if base or metadata.base == "demo" else _FOLDER
        option = f"--lora {facts.repo}" + (f" --model {_FOLDER}" if named == _FOLDER else "")
        load = f'TextToImage.load("{named}", lora="{facts.repo}"{_at(metadata)})'
    else:
        option, load = f"--model {facts.repo}", f'TextToImage.load("{facts.repo}")'
    parts = [
        "With pixart_ft, which checks that base, schedule and prediction type are those of the training:",
        f"```bash\npixart-ft generate {option} --prompt {shlex.quote(json.loads(prompt))}\n```",
        f"```python\nfrom pixart_ft import TextToImage\n\nmodel = {load}\n[picture] = model.generate({prompt})\n```",
    ]
    if metadata.base == "demo" and not facts.whole:
        return "\n\n".join([*parts, "Its base is the demo inside that package, which nothing else has."])
    if metadata.prediction_type not in get_args(StockPrediction):
        return "\n\n".join([*parts, f"No scheduler of diffusers knows what it predicts ({metadata.prediction_type})."])
    plain = (
        "With plain peft, in the stock pipeline of diffusers" if facts.what == "adapter" else "In the stock pipeline"
    )
    lines = [*_plain(facts, base.id if base else _FOLDER), f"picture = pipeline({prompt}).images[0]"]
    code = "\n".join(lines)
    return "\n\n".join(
        [*parts, f"{plain}:", f"```python\n{code}\n```", *_beside(metadata), *_comfy(facts, base is None)]
    )


def _comfy(facts: Facts, base_is_a_folder: bool) -> list[str]:
    """How its file for ComfyUI is made."""
    where, to = "models/diffusion_models", "merged --single-file"
    if facts.what == "adapter":
        where, to = "models/loras", "comfy" if facts.metadata.interval == WHOLE else "comfy --everywhere"
    base = f" --base {_FOLDER}" if base_is_a_folder else ""
    line = f"pixart-ft export {facts.repo} --to {to}{base} --out {facts.repo.partition('/')[2]}_comfy"
    return [f"For ComfyUI this line makes the file to be put into its `{where}`:", f"```bash\n{line}\n```"]


def _at(metadata: AdapterMetadata) -> str:
    """The argument of a base's revision, where one was asked for."""
    return "" if metadata.revision is None else f', revision="{metadata.revision}"'


def _plain(facts: Facts, base: str) -> list[str]:
    """The lines of Python that load it without this package."""
    metadata = facts.metadata
    if facts.what == "adapter":
        lines = [
            "from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline",
            "from peft import PeftModel",
            "",
            f'pipeline = PixArtSigmaPipeline.from_pretrained("{base}"{_at(metadata)})',
            f'PeftModel.from_pretrained(pipeline.transformer, "{facts.repo}")',
        ]
        if metadata.prediction_type == "epsilon" and not facts.settings.get("diffusion.zero_snr"):
            return ["from diffusers import PixArtSigmaPipeline", *lines[1:]]
        words = {**metadata.schedule, "prediction_type": metadata.prediction_type}
        told = "".join(f"    {key}={value!r},\n" for key, value in words.items())
        return [*lines, f"pipeline.scheduler = DPMSolverMultistepScheduler(\n{told})"]
    if facts.whole:
        load = f'pipeline = PixArtSigmaPipeline.from_pretrained("{facts.repo}")'
        return ["from diffusers import PixArtSigmaPipeline", "", load]
    return [
        "from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel",
        "",
        "pipeline = PixArtSigmaPipeline.from_pretrained(",
        f'    "{base}"{_at(metadata)},',
        f'    transformer=PixArtTransformer2DModel.from_pretrained("{facts.repo}", subfolder="transformer"),',
        f'    scheduler=DPMSolverMultistepScheduler.from_pretrained("{facts.repo}", subfolder="scheduler"),',
        ")",
    ]


def _beside(metadata: AdapterMetadata) -> list[str]:
    """What a stock pipeline does otherwise."""
    found = []
    if metadata.interval != WHOLE:
        found.append(
            f"There it acts at all timesteps; it was trained at {shown(metadata.interval)}, where pixart_ft uses it."
        )
    if metadata.time_conditioning != "index":
        by = {"snr_matched": "where the base met that noise", "rescaled": "its index in the base's count of steps"}
        told = by[metadata.time_conditioning]
        found.append(f"It was told of its noise by {told}, which stock schedulers do not do.")
    return found


def _training(facts: Facts) -> list[tuple[str, str]]:
    """The rows of the table: what was trained, on what, and how."""
    metadata, get = facts.metadata, facts.settings.get
    rows = [("predicts", metadata.prediction_type), ("learned variance", _VARIANCE[metadata.variance])]
    if metadata.step is not None:
        rows.append(("steps", f"{metadata.step:,}; pictures seen: {metadata.samples_seen:,}"))
    rows.append(("weights", "averaged" if metadata.weights == "ema" else "the last ones"))
    if metadata.rank is not None:
        rows.append(("rank, alpha", f"{metadata.rank}, {metadata.alpha:g}"))
    if metadata.interval != WHOLE:
        rows.append(("timesteps", shown(metadata.interval)))
    rows += facts.data
    for name, *settings in (
        ("targets", "adapter.targets") if facts.what == "adapter" else ("trainable", "adapter.trainable"),
        ("kind", "adapter.kind", "adapter.peft_type", "adapter.rslora", "adapter.dora"),
        ("objective", "diffusion.objective", "diffusion.weighting", "diffusion.error", "diffusion.timestep_law"),
        ("schedule", "diffusion.schedule", "diffusion.num_steps", "diffusion.zero_snr", "diffusion.time_conditioning"),
        ("optimizer", "optim.optimizer", "optim.learning_rate", "optim.decay", "optim.warmup_steps"),
        ("batch", "train.batch_size", "train.accumulation"),
        ("precision", "train.mixed_precision", "model.quantization"),
        ("average", "train.ema_decay", "train.ema_profile"),
        ("seed", "run.seed"),
    ):
        told = [(key.partition(".")[2], _words(get(key))) for key in settings if get(key) is not None]
        told = [(key, words) for key, words in told if words not in ("False", "none")]
        if told:
            rows.append((name, ", ".join(words if key == name else f"{key} {words}" for key, words in told)))
    rows.append(("made with", ", ".join(f"{name} {number}" for name, number in versions().items())))
    return rows


def _losses(facts: Facts) -> list[str]:
    """The held-out losses with their errors, and the curve."""
    found = []
    if len(facts.held_out) == 2:
        first, last = facts.held_out
        rows: list[tuple[str, ...]] = [("held-out loss", f"step {first['step']}", f"step {last['step']}")]
        for name, title in _TERMS.items():
            both = [record["held_out"].get(name) for record in (first, last)]
            if all(both):
                rows.append((title, *(f"{one['mean']:.4f} ± {one['standard_error']:.4f}" for one in both)))
        lines = [f"| {' | '.join(row)} |" for row in rows]
        note = "Means over the held-out pictures at fixed timesteps and noise, ± their standard errors."
        found.append("\n".join([lines[0], "|---|---|---|", *lines[1:]]) + f"\n\n{note}")
    if facts.curve is not None:
        found.append(f"![loss]({facts.curve})")
    return ["## Losses", *found] if found else []


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)])
