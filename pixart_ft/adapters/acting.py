"""Saved adapters at work in a network: loaded beside each other, scaled, limited, added to its weights, unloaded."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from pixart_ft.adapters.attach import attach, detach, is_plain_lora, parameters_of, put_back, tuner_layers
from pixart_ft.adapters.files import Adapter, LoraSettings
from pixart_ft.adapters.weights import check_base, read_weights, take
from pixart_ft.diffusion.intervals import WHOLE, Interval, shown
from pixart_ft.errors import UserError
from pixart_ft.model.adapter_switch import FIRST, adapter_intervals
from pixart_ft.model.loading import fingerprint
from pixart_ft.model.quantized import is_quantized
from pixart_ft.model.weights import read_null_caption
from pixart_ft.runs.metadata import AdapterMetadata


@dataclass(frozen=True)
class Attached:
    """A saved adapter in a transformer."""

    path: str  # as it was given
    scale: float
    interval: Interval  # the network's timesteps that it acts at
    sha256: str  # of the weights, which may be trained anew at the same path
    metadata: AdapterMetadata = field(repr=False)
    inside: str = field(default=FIRST, repr=False)  # peft's name of it there
    lora_alpha: float | None = None  # that was told of another program's

    @property
    def recipe(self) -> dict[str, Any]:
        """What of a picture follows from it."""
        told = set() if self.lora_alpha is None else {"lora_alpha"}
        return {key: value for key, value in asdict(self).items() if key not in {"inside", "lora_alpha"} - told}


def loaded(transformer: nn.Module) -> dict[str, Attached]:
    """The saved adapters in a network, by the names that they were given, in the order of loading."""
    return getattr(transformer, "loaded_adapters", {})


def load_adapter(
    transformer: PixArtTransformer2DModel,
    adapter: Adapter,
    *,
    scale: float = 1.0,
    name: str | None = None,
    strict: bool = True,
) -> tuple[Attached, Tensor | None]:
    """Attach an adapter to its base, frozen, and return it as it is there and its null caption (1,D).

    One of another program has none: the base's own stands for no caption.

    The update is multiplied by `scale`, and acts at the timesteps of the adapter's interval; the network is the bare
    base elsewhere. LoRAs may be loaded beside each other, each with a name (None: the last part of its path): their
    updates add up. Raises UserError if this is not the base it was trained on (not strict: warns of it), or unless
    every weight in the file found its place and every place its weight; the network is then as it was.
    """
    others = loaded(transformer)
    name = _name(adapter, name, others)
    check_base(adapter, fingerprint(transformer), transformer.config.get("_name_or_path"), strict=strict)
    for other in others.values():
        if not isinstance(adapter.settings, LoraSettings) or other.metadata.kind != "lora":
            raise UserError(
                f"adapter: {adapter.name} cannot act beside {other.path}: only LoRAs add up; unload the other, or add "
                "it to the weights first (fuse)"
            )
    saved, mark = read_weights(adapter)
    null_caption = None
    if adapter.taken is None:
        null_caption = read_null_caption(adapter.folder, transformer.config.caption_channels)
    inside = attach(transformer, adapter.settings, seed=0)
    try:
        take(transformer, saved, adapter.folder, inside)
    except UserError:
        detach(transformer, inside)
        raise
    for parameter in parameters_of(transformer, inside).values():
        parameter.requires_grad_(False)
    told = None if adapter.taken is None else adapter.taken.lora_alpha
    found = Attached(adapter.name, 1.0, WHOLE, mark, adapter.metadata, inside, told)
    transformer.loaded_adapters = {**others, name: found}
    scale_adapter(transformer, scale, name)
    limit_adapter(transformer, adapter.interval, name)
    return loaded(transformer)[name], null_caption


def _name(adapter: Adapter, given: str | None, others: Mapping[str, Attached]) -> str:
    """What an adapter is called: as asked for, else by its path, with a number where another has that name."""
    if given is None:
        own = adapter.folder.name if adapter.name in (".", "") else adapter.name.rstrip("/").rpartition("/")[2]
        return next(name for name in (own, *(f"{own}_{n}" for n in range(2, len(others) + 3))) if name not in others)
    if given in others:
        raise UserError(
            f"adapter: there is one of the name {given!r} already ({others[given].path}); give another name"
        )
    return given


def unload(transformer: PixArtTransformer2DModel, name: str) -> None:
    """Take a loaded adapter out again; without any the network is the bare base, to the bit."""
    inside = loaded(transformer)[name].inside
    for _, layer in tuner_layers(transformer):
        if (way := getattr(layer, "way", None)) is not None:
            way.scales.pop(inside, None)  # the next of this name has its own
    detach(transformer, inside)
    _forget(transformer, name)


def scale_adapter(transformer: PixArtTransformer2DModel, scale: float, name: str | None = None) -> None:
    """Multiply an adapter's update by `scale`, whatever it was multiplied by before; 1 is as trained.

    name: of a loaded one; None: of the only one, loaded or not. Of one that is no sum of the base and an update (DoRA,
    most of peft's), what a layer gives is multiplied on its way from the base's to the adapter's.
    """
    inside = FIRST if name is None else loaded(transformer)[name].inside
    for _, layer in tuner_layers(transformer):
        if is_plain_lora(transformer, inside):
            layer.set_scale(inside, scale)
        else:
            if (way := getattr(layer, "way", None)) is None:
                way = layer.way = _Way()
                layer.register_forward_hook(way)
            way.scales[inside] = scale
    _note(transformer, name, scale=scale)


class _Way:
    """Between what a layer of the base gives and what its adapters make of it."""

    def __init__(self) -> None:
        self.scales: dict[str, float] = {}

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        acting = layer.active_adapters
        if layer.disable_adapters or all(self.scales.get(name, 1) == 1 for name in acting):
            return output
        of_base: Tensor = layer.get_base_layer()(*inputs)
        if len(acting) == 1:
            return of_base.lerp(output.to(of_base.dtype), self.scales[acting[0]])
        found = of_base
        try:
            for name in acting:
                layer._active_adapter = [name]
                found = found + self.scales.get(name, 1) * (layer.forward(*inputs) - of_base)
        finally:
            layer._active_adapter = acting
        return found


def limit_adapter(transformer: PixArtTransformer2DModel, interval: Interval, name: str | None = None) -> None:
    """Let an adapter act at these timesteps alone, whichever it was limited to before; `name` as of `scale_adapter`."""
    inside = FIRST if name is None else loaded(transformer)[name].inside
    transformer.adapter_switch.intervals[inside] = interval
    _note(transformer, name, interval=interval)


def _note(transformer: PixArtTransformer2DModel, name: str | None, **changed: Any) -> None:
    names = [name] if name is not None else [n for n, one in loaded(transformer).items() if one.inside == FIRST]
    transformer.loaded_adapters = {
        key: replace(one, **changed) if key in names else one for key, one in loaded(transformer).items()
    }


def merge(transformer: PixArtTransformer2DModel) -> None:
    """Add the scaled updates of the attached adapters to the weights, in place: a plain transformer again.

    Raises UserError for an adapter that acts in an interval of timesteps, since weights act at all; for weights of 4 or
    8 bits, which would lose it; for a part of an adapter that is no sum; and for one that peft cannot merge.
    """
    layers = list(tuner_layers(transformer))
    assert layers, "no adapter is attached"
    if is_quantized(transformer):
        raise UserError("adapter: weights of 4 or 8 bits cannot take it in; load the base in float32 or bfloat16")
    inside = list(transformer.adapter_switch.intervals)
    if any(scale != 1 for _, layer in layers if hasattr(layer, "way") for scale in layer.way.scales.values()):
        raise UserError("adapter: only a plain LoRA can be merged at another scale than 1; load it at 1")
    if len(inside) > 1 and not all(is_plain_lora(transformer, name) for name in inside):
        raise UserError("adapter: of several only plain LoRAs can be merged together; merge one, then load the next")
    if limited := [interval for interval in adapter_intervals(transformer) if interval != WHOLE]:
        raise UserError(
            f"adapter: it acts at the timesteps {shown(limited[0])} alone, and merged into the weights it would act at "
            f"all; load it with the interval {shown(WHOLE)} to merge it so"
        )
    transformer.adapter_switch.remove()
    del transformer.adapter_switch
    for name, layer in layers:
        try:
            layer.merge(safe_merge=True)
        except (NotImplementedError, ValueError, TypeError) as error:
            raise UserError(f"adapter: peft cannot merge it: {error}; keep it beside its base") from error
        put_back(transformer, name, layer)
    del transformer.peft_config
    _forget(transformer, *loaded(transformer))


def _forget(transformer: PixArtTransformer2DModel, *names: str) -> None:
    transformer.loaded_adapters = {name: one for name, one in loaded(transformer).items() if name not in names}
