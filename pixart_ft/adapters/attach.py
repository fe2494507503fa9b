"""Adapters of peft in a network: put in, several beside each other, and taken out again."""

import difflib
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pixart_ft.adapters.files import LoraSettings, PeftSettings
from pixart_ft.adapters.targets import check_targets
from pixart_ft.config.train import Init
from pixart_ft.diffusion.intervals import WHOLE, Interval
from pixart_ft.errors import UserError
from pixart_ft.model.adapter_switch import BEGINNING, FIRST, AdapterSwitch, beside
from pixart_ft.model.loading import few_values
from pixart_ft.model.quantized import float_weight
from pixart_ft.randomness import generator
from pixart_ft.runs.metadata import some

# Types of peft that are not made by its type and options alone.
_ELSEWHERE = {
    "LORA": "set adapter.kind lora, with its own keys",
    "ADALORA": "it spreads its ranks anew as the steps go by, which no loop here tells it of; use adapter.kind lora",
}


def attach(transformer: PixArtTransformer2DModel, settings: LoraSettings | PeftSettings, *, seed: int) -> str:
    """Put an adapter into `transformer`, in place, freeze everything else, and keep the adapter in float32.

    Its values at the start follow from the seed, and the global random state is left as it was. Of a LoRA, A is uniform
    in +-1/sqrt(inputs) as a function of (seed, layer name) and B is zero, so the network's output is unchanged; where
    they begin as a part of the weights (see `LoraSettings.init`), to rounding. A LoRA may stand beside others: their
    updates add up.

    Returns peft's name of it. Raises UserError naming each target that matches no layer, and with peft's reason for
    what it cannot make; the network is then as it was.
    """
    others = attached(transformer)
    assert not others or (isinstance(settings, LoraSettings) and settings.init == "default"), "only LoRAs add up"
    check_targets(transformer, settings.targets)
    name, training = _free_name(others), transformer.training
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, 0, "adapter init").initial_seed())
            if isinstance(settings, LoraSettings):
                _attach_lora(transformer, settings, seed, name)
            else:
                _attach_any(transformer, settings)
    except UserError:
        detach(transformer, name)
        raise
    transformer.train(training)  # peft's new layers come in training mode, with their dropout on
    _settle(transformer, {**others, name: WHOLE}, frozen=bool(others))
    return name


def take_inputs_as_they_come(transformer: PixArtTransformer2DModel) -> None:
    """Spare the LoRAs a cast, where the network is called under autocast unless all of it is float32.

    peft casts what comes in half precision to the float32 of the weights, and autocast casts it back: four kernels of
    each such layer and step, and a copy that is kept, to the same bits. Not for dropout, whose draws may follow from
    the precision, or DoRA, which computes a norm in it.
    """
    for _, layer in tuner_layers(transformer):
        layer.cast_input_dtype_enabled = False


def detach(transformer: PixArtTransformer2DModel, name: str) -> None:
    """Take an adapter out again: the network and the adapters beside it are as if it had never been there."""
    intervals = {other: interval for other, interval in attached(transformer).items() if other != name}
    for place, layer in list(tuner_layers(transformer)):
        if intervals and set(layer.lora_A) - {name}:
            layer.delete_adapter(name)
            layer.lora_variant.pop(name, None)  # peft 0.18 gives it to the next adapter of this name
        else:
            put_back(transformer, place, layer)
    getattr(transformer, "peft_config", {}).pop(name, None)
    _settle(transformer, intervals, frozen=True)


def put_back(transformer: nn.Module, place: str, layer: Any) -> None:
    """The base's own layer again, in place of one with adapters."""
    parent, _, leaf = place.rpartition(".")
    setattr(transformer.get_submodule(parent), leaf, layer.get_base_layer())


def attached(transformer: nn.Module) -> dict[str, Interval]:
    """The adapters in a network by peft's names, with the timesteps at which each acts."""
    switch = getattr(transformer, "adapter_switch", None)
    return {} if switch is None else dict(switch.intervals)


def _free_name(others: Collection[str]) -> str:
    return next(name for name in (FIRST, *map(beside, range(2, len(others) + 3))) if name not in others)


def _settle(transformer: PixArtTransformer2DModel, intervals: Mapping[str, Interval], *, frozen: bool) -> None:
    """Let these adapters act, and no others; without any the network is a plain one. frozen: none is to be trained."""
    if hasattr(transformer, "adapter_switch"):
        transformer.adapter_switch.remove()
        del transformer.adapter_switch
    if not intervals:
        if hasattr(transformer, "peft_config"):
            del transformer.peft_config
        return
    transformer.adapter_switch = AdapterSwitch(transformer, intervals)
    if frozen:  # else as peft left it: trained, and beside what it began as
        for _, layer in tuner_layers(transformer):
            layer.set_adapter(list(intervals), inference_mode=True)


def _attach_lora(transformer: PixArtTransformer2DModel, settings: LoraSettings, seed: int, adapter: str) -> None:
    with _reasons_of_peft("LORA"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # there may be several
        inject_adapter_in_model(_config(settings), transformer, adapter_name=adapter)
    if settings.init != "default":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # there are to be two
            inject_adapter_in_model(_config(replace(settings, dropout=0.0)), transformer, adapter_name=BEGINNING)
    for name, parameter in parameters_of(transformer, adapter).items():
        parameter.data = parameter.data.to(torch.float32)
        parameter.requires_grad_(True)
        if ".lora_A." in name:
            bound = 1 / math.sqrt(parameter[0].numel())
            draw = torch.rand(parameter.shape, generator=generator(seed, 0, f"lora init {name}"), dtype=torch.float32)
            parameter.data.copy_((2 * draw - 1) * bound)
        elif ".lora_B." in name:
            parameter.data.zero_()
    if settings.init != "default":
        for _, layer in tuner_layers(transformer):
            _begin_from_weights(layer, settings.init)


def _attach_any(transformer: PixArtTransformer2DModel, settings: PeftSettings) -> None:
    """Any adapter that peft can put into layers, and that leaves the base as it is."""
    before = {name: few_values(parameter) for name, parameter in transformer.named_parameters()}
    config = _config(settings)
    with _reasons_of_peft(settings.peft_type):
        inject_adapter_in_model(config, transformer, adapter_name=FIRST)
    own = parameters_of(transformer)
    for parameter in own.values():
        parameter.data = parameter.data.to(torch.float32)
    like = next(transformer.parameters())  # of the dtype and device of a call, whatever the layers are held in
    half = like.dtype != torch.float32
    autocast = torch.autocast(like.device.type, torch.bfloat16, enabled=half)
    with _reasons_of_peft(settings.peft_type), autocast, torch.no_grad():
        for layer in [one for _, one in tuner_layers(transformer) if isinstance(one.get_base_layer(), nn.Linear)][:1]:
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
def _reasons_of_peft(peft_type: str) -> Iterator[None]:
    try:
        yield
    except (NotImplementedError, ValueError, TypeError, RuntimeError, AttributeError, KeyError, re.error) as error:
        reason = str(error).strip() or type(error).__name__
        if isinstance(error, KeyError):  # whose text is the key alone
            reason = f"it looks for {reason}, which is not here; adapter.options may give what it would find by that"
        raise UserError(f"adapter.peft_type {peft_type}: peft cannot make it here: {reason}") from error


def _config(settings: LoraSettings | PeftSettings) -> PeftConfig:
    """As peft takes it. Raises UserError, with peft's reason, for what is no configuration of it."""
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    if isinstance(settings, LoraSettings):
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=targets,
            lora_dropout=settings.dropout,
            bias="none",
            use_rslora=settings.rslora,
            use_dora=settings.dora,
            **settings.options,
        )
    kinds = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if settings.peft_type in _ELSEWHERE:
        raise UserError(f"adapter.peft_type {settings.peft_type}: {_ELSEWHERE[settings.peft_type]}")
    if settings.peft_type not in kinds:
        near = difflib.get_close_matches(settings.peft_type.upper(), kinds, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(kinds))}"
        raise UserError(f"adapter.peft_type {settings.peft_type!r}: peft has no such type; {hint}")
    with _reasons_of_peft(settings.peft_type):
        return kinds[settings.peft_type](target_modules=targets, **settings.options)


@torch.no_grad()
def _begin_from_weights(layer: LoraLayer, init: Init) -> None:
    """Set the layer's A and B, and those that are taken away, to a part of its weight W, which stays as it is.

    With the scale s of the update, s B A is the best of this rank (PiSSA, Meng et al. 2024), or B and A are the first
    columns of Q and rows of R of W = Q R (OLoRA, Büyükakyüz 2024). peft would write W - s B A into W, in its dtype.
    """
    matrix = float_weight(layer.get_base_layer()).flatten(1)
    rank, scale = layer.r[FIRST], layer.scaling[FIRST]
    if init == "pissa":
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        root = (s[:rank] / scale).sqrt()
        a, b = root[:, None] * vt[:rank], u[:, :rank] * root
    else:
        q, r = torch.linalg.qr(matrix)
        a, b = r[:rank], q[:, :rank]
    for adapter in (FIRST, BEGINNING):
        for part, value in ((layer.lora_A[adapter].weight, a), (layer.lora_B[adapter].weight, b)):
            if not value.is_meta:  # of a layer without values
                part.data = value.reshape(part.shape).to(part.device, torch.float32, copy=True)
    layer.set_adapter([FIRST, BEGINNING])
    layer.lora_A[BEGINNING].requires_grad_(False)
    layer.lora_B[BEGINNING].requires_grad_(False)
    layer.scaling[BEGINNING] = -scale


def tuner_layers(transformer: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a network that adapters stand beside, by name."""
    return ((name, module) for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer))


def is_plain_lora(transformer: Any, adapter: str = FIRST) -> bool:
    """Whether what an adapter does is a sum of the base and an update, which a scale multiplies."""
    config = transformer.peft_config[adapter]
    return isinstance(config, LoraConfig) and not config.use_dora


def parameters_of(transformer: nn.Module, adapter: str = FIRST) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in the transformer."""
    own = transformer.named_parameters()
    return {name: parameter for name, parameter in own if f".{adapter}." in f"{name}."}
