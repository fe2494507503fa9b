"""Adapters by peft: attach to a transformer, save, load back strictly, merge.

`files.py` says what a saved adapter consists of.
"""

import copy
import difflib
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    LoraConfig,
    PeftConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from pixart_ft.adapters.files import WEIGHTS, Adapter, LoraSettings, PeftSettings
from pixart_ft.adapters.targets import check_targets
from pixart_ft.config.train import Init
from pixart_ft.diffusion.intervals import WHOLE, Interval, shown
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.errors import UserError
from pixart_ft.files import write_folder
from pixart_ft.model.adapter_switch import ADAPTER_NAMES, AdapterSwitch, adapter_interval
from pixart_ft.model.loading import few_values, fingerprint
from pixart_ft.model.quantized import float_weight, is_quantized
from pixart_ft.model.text import TEXT_PREPARATION
from pixart_ft.model.weights import all_finite, read_null_caption, read_tensors
from pixart_ft.randomness import generator
from pixart_ft.runs.metadata import METADATA, NULL_CAPTION, AdapterMetadata, some
from pixart_ft.runs.results import Model
from pixart_ft.schedulers.stored import process_of

_PEFT_PREFIX = "base_model.model."
_ADAPTER, _BEGINNING = ADAPTER_NAMES  # what is trained; what it began as, frozen, and taken away again
# Types of peft that are not made by its type and options alone.
_ELSEWHERE = {
    "LORA": "set adapter.kind lora, with its own keys",
    "ADALORA": "it spreads its ranks anew as the steps go by, which no loop here tells it of; use adapter.kind lora",
}


def attach(transformer: PixArtTransformer2DModel, settings: LoraSettings | PeftSettings, *, seed: int) -> None:
    """Put an adapter into `transformer`, in place, freeze everything else, and keep the adapter in float32.

    Its values at the start follow from the seed, and the global random state is left as it was. Of a LoRA, A is uniform
    in +-1/sqrt(inputs) as a function of (seed, layer name) and B is zero, so the network's output is unchanged; where
    they begin as a part of the weights (see `LoraSettings.init`), to rounding.

    Raises UserError naming each target that matches no layer, and with peft's reason for what it cannot make.
    """
    assert not list(_layers(transformer)), "an adapter is attached already"
    check_targets(transformer, settings.targets)
    training = transformer.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, 0, "adapter init").initial_seed())
        if isinstance(settings, LoraSettings):
            _attach_lora(transformer, settings, seed)
        else:
            _attach_any(transformer, settings)
    transformer.train(training)  # peft's new layers come in training mode, with their dropout on
    transformer.adapter_switch = AdapterSwitch(transformer)


def _attach_lora(transformer: PixArtTransformer2DModel, settings: LoraSettings, seed: int) -> None:
    inject_adapter_in_model(_config(settings), transformer, adapter_name=_ADAPTER)
    if settings.init != "default":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # there are to be two
            inject_adapter_in_model(_config(replace(settings, dropout=0.0)), transformer, adapter_name=_BEGINNING)
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


def _attach_any(transformer: PixArtTransformer2DModel, settings: PeftSettings) -> None:
    """Any adapter that peft can put into layers, and that leaves the base as it is."""
    before = {name: few_values(parameter) for name, parameter in transformer.named_parameters()}
    config = _config(settings)
    with _reasons_of_peft(settings):
        inject_adapter_in_model(config, transformer, adapter_name=_ADAPTER)
    own = _parameters(transformer)
    for parameter in own.values():
        parameter.data = parameter.data.to(torch.float32)
    like = next(transformer.parameters())  # of the dtype and device of a call, whatever the layers are held in
    half = like.dtype != torch.float32
    with _reasons_of_peft(settings), torch.autocast(like.device.type, torch.bfloat16, enabled=half), torch.no_grad():
        for layer in [one for _, one in _layers(transformer) if isinstance(one.get_base_layer(), nn.Linear)][:1]:
            layer(torch.zeros(1, 1, layer.get_base_layer().in_features).to(like))  # some are refused by a call alone
    of_base = {n.replace(".base_layer.", "."): p for n, p in transformer.named_parameters() if n not in own}
    changed = [
        name
        for name, values in before.items()
        if name not in of_base or of_base[name].requires_grad or not torch.equal(few_values(of_base[name]), values)
    ]
    if changed:
        raise UserError(
            f"adapter.peft_type {settings.peft_type}: with these options it changes the base itself ({some(changed)}), "
            "so that the adapter alone would not give its result back; leave them out, or use adapter.kind full"
        )


@contextmanager
def _reasons_of_peft(settings: PeftSettings) -> Iterator[None]:
    try:
        yield
    except (NotImplementedError, ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"adapter.peft_type {settings.peft_type}: peft cannot make it here: {reason}") from error


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
    weights, config = _in_file(transformer, state), copy.copy(transformer.peft_config[_ADAPTER])
    if isinstance(config, LoraConfig):
        assert (config.r, config.lora_alpha) == (metadata.rank, metadata.alpha), "metadata of another adapter"
    if _BEGINNING in transformer.peft_config:
        weights, config = _without_beginning(transformer, weights, config)
        metadata = replace(metadata, rank=config.r, alpha=config.lora_alpha)
    config.base_model_name_or_path, config.inference_mode = metadata.base, True
    config.target_modules = sorted(config.target_modules)  # peft makes it a set, whose order would vary in the file

    def write(aside: Path) -> None:
        copies = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in weights.items()}
        save_file(copies, str(aside / WEIGHTS), metadata={"format": "pt"})  # copies, since layers may share a constant
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
    check_base(adapter, fingerprint(transformer), transformer.config.get("_name_or_path"))
    attach(transformer, adapter.settings, seed=0)
    mark = _fill(transformer, adapter.folder)
    for parameter in _parameters(transformer).values():
        parameter.requires_grad_(False)
    scale_adapter(transformer, scale)
    limit_adapter(transformer, adapter.interval)
    null_caption = read_null_caption(adapter.folder)
    return Attached(adapter.name, scale, adapter.interval, mark, adapter.metadata), null_caption


def scale_adapter(transformer: PixArtTransformer2DModel, scale: float) -> None:
    """Multiply the attached adapter's update by `scale`, whatever it was multiplied by before; 1 is as trained.

    Of one that is no sum of the base and an update (DoRA, most of peft's), what a layer gives is multiplied on its way
    from the base's to the adapter's.
    """
    for _, layer in _layers(transformer):
        if _is_plain_lora(transformer):
            layer.set_scale(_ADAPTER, scale)
        else:
            if (way := getattr(layer, "way", None)) is None:
                way = layer.way = _Way()
                layer.register_forward_hook(way)
            way.scale = scale


class _Way:
    """Between what a layer of the base gives and what its adapter makes of it."""

    scale = 1.0

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.scale == 1 or layer.disable_adapters:
            return output
        of_base: Tensor = layer.get_base_layer()(*inputs)
        return of_base.lerp(output.to(of_base.dtype), self.scale)


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


def fill_adapter(transformer: PixArtTransformer2DModel, adapter: Adapter, fingerprint_of_base: str) -> None:
    """Give the attached adapter the weights of a saved one, to train them on.

    Raises UserError as `load_adapter` does; the rank and the targets must be the same, alpha may differ.
    """
    check_base(adapter, fingerprint_of_base, transformer.config.get("_name_or_path"))
    _fill(transformer, adapter.folder)


def merge(transformer: PixArtTransformer2DModel) -> None:
    """Add the adapter's scaled update to the weights, in place: a plain transformer again.

    Raises UserError for an adapter that acts in an interval of timesteps, since weights act at all; for weights of 4 or
    8 bits, which would lose it; for a part of an adapter that is no sum; and for one that peft cannot merge.
    """
    layers = list(_layers(transformer))
    assert layers, "no adapter is attached"
    if is_quantized(transformer):
        raise UserError("adapter: weights of 4 or 8 bits cannot take it in; load the base in float32 or bfloat16")
    if any(getattr(layer, "way", _Way).scale != 1 for _, layer in layers):
        raise UserError("adapter: only a plain LoRA can be merged at another scale than 1; load it at 1")
    interval = adapter_interval(transformer)
    if interval != WHOLE:
        raise UserError(
            f"adapter: it acts at the timesteps {shown(interval)} alone, and merged into the weights it would act at "
            f"all; load it with the interval {shown(WHOLE)} to merge it so"
        )
    transformer.adapter_switch.remove()
    del transformer.adapter_switch
    for name, layer in layers:
        try:
            layer.merge(safe_merge=True)
        except (NotImplementedError, ValueError, TypeError) as error:
            raise UserError(f"adapter: peft cannot merge it: {error}; keep it beside its base") from error
        parent, _, leaf = name.rpartition(".")
        setattr(transformer.get_submodule(parent), leaf, layer.get_base_layer())
    del transformer.peft_config


def check_base(trained: Adapter | Model, fingerprint_of_base: str, given: str | None) -> None:
    """Raise UserError if this was trained on another base, or on captions of another kind. given: its name, if any."""
    folder, metadata = trained.folder, trained.metadata
    if metadata.text_preparation != TEXT_PREPARATION:
        raise UserError(
            f"adapter: {folder} was trained on captions prepared by {metadata.text_preparation}, and this version "
            f"prepares them by {TEXT_PREPARATION}; use the version it was trained with"
        )
    if fingerprint_of_base != metadata.base_fingerprint:
        raise UserError(
            f"adapter: {folder} was trained on the base {metadata.base} ({metadata.base_fingerprint}), "
            f"not on {given or 'the base given'} ({fingerprint_of_base}); use --model {metadata.base}"
        )


def _fill(transformer: PixArtTransformer2DModel, folder: Path) -> str:
    """Copy the saved weights into the attached adapter: all of them and no other, or UserError with lists.

    Returns the SHA-256 of their file.
    """
    saved, mark = read_tensors(folder / WEIGHTS)
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


def _config(settings: LoraSettings | PeftSettings) -> PeftConfig:
    """As peft takes it. Raises UserError, with peft's reason, for what is no configuration of it."""
    if isinstance(settings, LoraSettings):
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(settings.targets),
            lora_dropout=settings.dropout,
            bias="none",
            use_rslora=settings.rslora,
            use_dora=settings.dora,
        )
    kinds = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if settings.peft_type in _ELSEWHERE:
        raise UserError(f"adapter.peft_type {settings.peft_type}: {_ELSEWHERE[settings.peft_type]}")
    if settings.peft_type not in kinds:
        near = difflib.get_close_matches(settings.peft_type.upper(), kinds, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(kinds))}"
        raise UserError(f"adapter.peft_type {settings.peft_type!r}: peft has no such type; {hint}")
    with _reasons_of_peft(settings):
        return kinds[settings.peft_type](target_modules=list(settings.targets), **settings.options)


@torch.no_grad()
def _begin_from_weights(layer: LoraLayer, init: Init) -> None:
    """Set the layer's A and B, and those that are taken away, to a part of its weight W, which stays as it is.

    With the scale s of the update, s B A is the best of this rank (PiSSA, Meng et al. 2024), or B and A are the first
    columns of Q and rows of R of W = Q R (OLoRA, Büyükakyüz 2024). peft would write W - s B A into W, in its dtype.
    """
    matrix = float_weight(layer.get_base_layer()).flatten(1)
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
            if not value.is_meta:  # of a layer without values
                part.data = value.reshape(part.shape).to(part.device, torch.float32, copy=True)
    layer.set_adapter([_ADAPTER, _BEGINNING])
    layer.lora_A[_BEGINNING].requires_grad_(False)
    layer.lora_B[_BEGINNING].requires_grad_(False)
    layer.scaling[_BEGINNING] = -scale


def _without_beginning(
    transformer: nn.Module, weights: Mapping[str, Tensor], config: LoraConfig
) -> tuple[dict[str, Tensor], LoraConfig]:
    """The adapter less what it began as: s (B A - B' A') = s [B, -B'] [A; A'], a plain one of twice the rank."""
    begun = _in_file(transformer, _parameters(transformer, _BEGINNING), _BEGINNING)
    whole = {
        key: torch.cat([value, begun[key]]) if ".lora_A." in key else torch.cat([value, -begun[key]], dim=1)
        for key, value in weights.items()
    }
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    rank = 2 * config.r
    return whole, replace(config, r=rank, lora_alpha=scale * rank, use_rslora=False)


def _layers(transformer: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer))


def _is_plain_lora(transformer: Any) -> bool:
    config = transformer.peft_config[_ADAPTER]
    return isinstance(config, LoraConfig) and not config.use_dora


def _parameters(transformer: nn.Module, adapter: str = _ADAPTER) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in the transformer."""
    own = transformer.named_parameters()
    return {name: parameter for name, parameter in own if f".{adapter}." in f"{name}."}


def _in_file(transformer: nn.Module, state: Mapping[str, Tensor], adapter: str = _ADAPTER) -> dict[str, Tensor]:
    """The adapter's values under the names that peft gives them in a file."""
    whole = {**transformer.state_dict(), **state}  # some adapters have constants that are no parameters
    found = get_peft_model_state_dict(transformer, whole, adapter, save_embedding_layers=False)
    return {_PEFT_PREFIX + key: value for key, value in found.items()}
