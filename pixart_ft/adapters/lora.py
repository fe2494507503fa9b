"""LoRA adapters by peft: attach to a transformer, save, load back strictly, merge.

`files.py` says what a saved adapter consists of.
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from pixart_ft.adapters.files import METADATA, NULL_CAPTION, WEIGHTS, Adapter, AdapterMetadata, LoraSettings, some
from pixart_ft.adapters.targets import check_targets
from pixart_ft.config.train import Init
from pixart_ft.diffusion.intervals import WHOLE, Interval, shown
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.errors import UserError
from pixart_ft.files import sha256, write_folder
from pixart_ft.model.adapter_switch import AdapterSwitch, adapter_interval
from pixart_ft.model.loading import fingerprint
from pixart_ft.model.text import TEXT_PREPARATION
from pixart_ft.model.weights import all_finite
from pixart_ft.randomness import generator
from pixart_ft.schedulers.stored import process_of

_PEFT_PREFIX = "base_model.model."
_ADAPTER, _BEGINNING = "default", "beginning"  # what is trained; what it began as, frozen, and taken away again


def attach(transformer: PixArtTransformer2DModel, settings: LoraSettings, *, seed: int) -> None:
    """Put a LoRA into `transformer`, in place, freeze everything else, and keep the LoRA in float32.

    A is uniform in +-1/sqrt(inputs) as a function of (seed, layer name) and B is zero, so the network's output is
    unchanged; where they begin as a part of the weights (see `LoraSettings.init`), to rounding. The global random state
    is left as it was. Raises UserError naming each target that matches no layer.
    """
    assert not list(_layers(transformer)), "an adapter is attached already"
    check_targets(transformer, settings.targets)
    training = transformer.training
    with torch.random.fork_rng(devices=[]):  # peft draws an initial A, which is replaced below
        inject_adapter_in_model(_config(settings), transformer, adapter_name=_ADAPTER)
        if settings.init != "default":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # there are to be two
                inject_adapter_in_model(_config(replace(settings, dropout=0.0)), transformer, adapter_name=_BEGINNING)
    transformer.train(training)  # peft's new layers come in training mode, with their dropout on
    for name, parameter in _parameters(transformer).items():
        parameter.data = parameter.data.to(torch.float32)
        parameter.requires_grad_(True)
        if ".lora_A." in name:
            bound = 1 / math.sqrt(parameter[0].numel())
            draw = torch.rand(parameter.shape, generator=generator(seed, 0, f"lora init {name}"), dtype=torch.float32)
            parameter.data.copy_((2 * draw - 1) * bound)
        elif ".lora_B." in name:
            parameter.data.zero_()
    if settings.init != "default":
        for _, layer in _layers(transformer):
            _begin_from_weights(layer, settings.init)
    transformer.adapter_switch = AdapterSwitch(transformer)


def save_adapter(
    folder: Path,
    transformer: PixArtTransformer2DModel,
    metadata: AdapterMetadata,
    null_caption: Tensor,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter attached to `transformer` as a folder, whole or not at all, replacing an earlier one.

    `null_caption` is (1,D). `state` gives other values for the adapter's parameters by their names in
    `transformer`, such as an average's shadows.
    """
    parameters = _parameters(transformer)
    assert parameters, "no adapter is attached"
    state = parameters if state is None else state
    assert state.keys() == parameters.keys(), "the state is not that of the attached adapter"
    if not all_finite(state.values()):
        raise UserError(f"adapter: {folder} is not written: its weights are not finite, the training diverged")
    attached: LoraConfig = transformer.peft_config[_ADAPTER]
    assert (attached.r, attached.lora_alpha) == (metadata.rank, metadata.alpha), "metadata of another adapter"
    weights = _in_file(transformer, state)
    settings = LoraSettings(
        attached.r,
        attached.lora_alpha,
        tuple(attached.target_modules),
        attached.lora_dropout,
        attached.use_rslora,
        attached.use_dora,
    )
    if _BEGINNING in transformer.peft_config:
        weights, settings = _without_beginning(transformer, weights, settings)
        metadata = replace(metadata, rank=settings.rank, alpha=settings.alpha)
    config = _config(settings)
    config.base_model_name_or_path, config.inference_mode = metadata.base, True
    config.target_modules = sorted(settings.targets)  # peft makes it a set, whose order would vary in the file

    def write(aside: Path) -> None:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in weights.items()},
            str(aside / WEIGHTS),
            metadata={"format": "pt"},
        )
        config.save_pretrained(str(aside))
        (aside / METADATA).write_text(json.dumps(asdict(metadata), indent=2) + "\n", encoding="utf-8")
        save_file({"null_caption": null_caption.detach().cpu().contiguous()}, str(aside / NULL_CAPTION))

    write_folder(folder, write)


@dataclass(frozen=True)
class Attached:
    """An adapter on a transformer."""

    path: str  # as it was given
    scale: float
    interval: Interval  # the network's timesteps that it acts at
    sha256: str  # of the weights, which may be trained anew at the same path
    metadata: AdapterMetadata = field(repr=False)


def load_adapter(
    transformer: PixArtTransformer2DModel, adapter: Adapter, *, scale: float = 1.0
) -> tuple[Attached, Tensor]:
    """Attach an adapter to its base, frozen, and return it as it is there and its null caption (1,D).

    The update is multiplied by `scale`, and acts at the timesteps of the adapter's interval; the network is the bare
    base elsewhere. Raises UserError if this is not the base it was trained on, or unless every weight in the file found
    its place and every place its weight.
    """
    _check_base(transformer, adapter)
    attach(transformer, adapter.settings, seed=0)
    mark = _fill(transformer, adapter.folder)
    for parameter in _parameters(transformer).values():
        parameter.requires_grad_(False)
    scale_adapter(transformer, scale)
    limit_adapter(transformer, adapter.interval)
    null_caption = _read_null_caption(adapter.folder)
    return Attached(adapter.name, scale, adapter.interval, mark, adapter.metadata), null_caption


def scale_adapter(transformer: PixArtTransformer2DModel, scale: float) -> None:
    """Multiply the attached adapter's update by `scale`, whatever it was multiplied by before; 1 is as trained."""
    for _, layer in _layers(transformer):
        layer.set_scale(_ADAPTER, scale)


def limit_adapter(transformer: PixArtTransformer2DModel, interval: Interval) -> None:
    """Let the attached adapter act at these timesteps alone, whichever it was limited to before."""
    transformer.adapter_switch.interval = interval


def warn_of_other_process(metadata: AdapterMetadata, scheduler: Any) -> None:
    """Warn where a scheduler of a diffusers pipeline is for another prediction or schedule than the adapter's."""
    process = process_of({**scheduler.config, "_class_name": type(scheduler).__name__})
    known, given = (NoiseSchedule.from_diffusers_config(x).alpha_bar for x in (metadata.schedule, process))
    if process["prediction_type"] != metadata.prediction_type or not torch.equal(known, given):
        warnings.warn(
            f"the adapter predicts {metadata.prediction_type} on {dict(metadata.schedule)}, and the scheduler of this "
            "pipeline is for another prediction or schedule",
            stacklevel=3,
        )


def fill_adapter(transformer: PixArtTransformer2DModel, adapter: Adapter) -> None:
    """Give the attached adapter the weights of a saved one, to train them on.

    Raises UserError as `load_adapter` does; the rank and the targets must be the same, alpha may differ.
    """
    _check_base(transformer, adapter)
    _fill(transformer, adapter.folder)


def merge(transformer: PixArtTransformer2DModel) -> None:
    """Add the adapter's scaled update to the weights, in place: a plain transformer again.

    Raises UserError for an adapter that acts in an interval of timesteps: weights act at all.
    """
    layers = list(_layers(transformer))
    assert layers, "no adapter is attached"
    interval = adapter_interval(transformer)
    if interval != WHOLE:
        raise UserError(
            f"adapter: it acts at the timesteps {shown(interval)} alone, and merged into the weights it would act at "
            f"all; load it with the interval {shown(WHOLE)} to merge it so"
        )
    transformer.adapter_switch.remove()
    del transformer.adapter_switch
    for name, layer in layers:
        layer.merge(safe_merge=True)
        parent, _, leaf = name.rpartition(".")
        setattr(transformer.get_submodule(parent), leaf, layer.get_base_layer())
    del transformer.peft_config


def _check_base(transformer: PixArtTransformer2DModel, adapter: Adapter) -> None:
    """Raise UserError if the adapter was trained on another base than `transformer`, or on captions of another kind."""
    folder, metadata, present = adapter.folder, adapter.metadata, fingerprint(transformer)
    if metadata.text_preparation != TEXT_PREPARATION:
        raise UserError(
            f"adapter: {folder} was trained on captions prepared by {metadata.text_preparation}, and this version "
            f"prepares them by {TEXT_PREPARATION}; use the version it was trained with"
        )
    if present != metadata.base_fingerprint:
        given = transformer.config.get("_name_or_path") or "the base given"
        raise UserError(
            f"adapter: {folder} was trained on the base {metadata.base} ({metadata.base_fingerprint}), "
            f"not on {given} ({present}); use --model {metadata.base}"
        )


def _fill(transformer: PixArtTransformer2DModel, folder: Path) -> str:
    """Copy the saved weights into the attached adapter: all of them and no other, or UserError with lists.

    Returns the SHA-256 of their file.
    """
    saved, mark = _read_tensors(folder / WEIGHTS)
    places = _in_file(transformer, _parameters(transformer))
    shared = saved.keys() & places.keys()
    faults = {
        "in the file but not in the model": saved.keys() - places.keys(),
        "in the model but not in the file": places.keys() - saved.keys(),
        "of another shape (another adapter.rank?)": {k for k in shared if saved[k].shape != places[k].shape},
    }
    if any(faults.values()):
        lines = [f"  - {len(keys)} {what}: {some(keys)}" for what, keys in faults.items() if keys]
        raise UserError(f"adapter: the weights in {folder} do not fit:\n" + "\n".join(lines))
    if not all_finite(saved.values()):
        raise UserError(f"adapter: the weights in {folder} are not finite, its training diverged; train it again")
    with torch.no_grad():
        for key, parameter in places.items():
            parameter.copy_(saved[key])
    return mark


def _config(settings: LoraSettings) -> LoraConfig:
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.targets),
        lora_dropout=settings.dropout,
        bias="none",
        use_rslora=settings.rslora,
        use_dora=settings.dora,
    )


@torch.no_grad()
def _begin_from_weights(layer: LoraLayer, init: Init) -> None:
    """Set the layer's A and B, and those that are taken away, to a part of its weight W, which stays as it is.

    With the scale s of the update, s B A is the best of this rank (PiSSA, Meng et al. 2024), or B and A are the first
    columns of Q and rows of R of W = Q R (OLoRA, Büyükakyüz 2024). peft would write W - s B A into W, in its dtype.
    """
    weight = layer.get_base_layer().weight
    matrix = weight.flatten(1).float()
    rank, scale = layer.r[_ADAPTER], layer.scaling[_ADAPTER]
    if init == "pissa":
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        root = (s[:rank] / scale).sqrt()
        a, b = root[:, None] * vt[:rank], u[:, :rank] * root
    else:
        q, r = torch.linalg.qr(matrix)
        a, b = r[:rank], q[:, :rank]
    for adapter in (_ADAPTER, _BEGINNING):
        for part, value in ((layer.lora_A[adapter].weight, a), (layer.lora_B[adapter].weight, b)):
            part.data = value.reshape(part.shape).to(part.device, torch.float32, copy=True)
    layer.set_adapter([_ADAPTER, _BEGINNING])
    layer.lora_A[_BEGINNING].requires_grad_(False)
    layer.lora_B[_BEGINNING].requires_grad_(False)
    layer.scaling[_BEGINNING] = -scale


def _without_beginning(
    transformer: nn.Module, weights: Mapping[str, Tensor], settings: LoraSettings
) -> tuple[dict[str, Tensor], LoraSettings]:
    """The adapter less what it began as: s (B A - B' A') = s [B, -B'] [A; A'], a plain one of twice the rank."""
    begun = _in_file(transformer, _parameters(transformer, _BEGINNING), _BEGINNING)
    whole = {
        key: torch.cat([value, begun[key]]) if ".lora_A." in key else torch.cat([value, -begun[key]], dim=1)
        for key, value in weights.items()
    }
    scale = settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)
    rank = 2 * settings.rank
    return whole, replace(settings, rank=rank, alpha=scale * rank, rslora=False)


def _layers(transformer: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, module) for name, module in transformer.named_modules() if isinstance(module, LoraLayer))


def _parameters(transformer: nn.Module, adapter: str = _ADAPTER) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in the transformer."""
    own = transformer.named_parameters()
    return {name: parameter for name, parameter in own if ".lora_" in name and f".{adapter}." in name}


def _in_file(transformer: nn.Module, state: Mapping[str, Tensor], adapter: str = _ADAPTER) -> dict[str, Tensor]:
    """The adapter's values under the names that peft gives them in a file."""
    found = get_peft_model_state_dict(transformer, dict(state), adapter, save_embedding_layers=False)
    return {_PEFT_PREFIX + key: value for key, value in found.items()}


def _read_null_caption(folder: Path) -> Tensor:
    path = folder / NULL_CAPTION
    found = _read_tensors(path)[0].get("null_caption")
    if found is None or found.ndim != 2 or not all_finite([found]):
        raise UserError(f"adapter: cannot read {path}: it holds no null_caption; copy the adapter again")
    return found


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """What a file of tensors holds, and its SHA-256."""
    try:
        content = path.read_bytes()
        return load(content), sha256(content)
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter: cannot read {path} ({error}); copy the adapter again") from error
