"""What is trained: an adapter, or the network itself. A kind says which parameters, and how they are saved.

The loop knows none of them: it trains what wants gradients.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from pixart_ft.adapters.acting import limit_adapter
from pixart_ft.adapters.attach import attach, take_inputs_as_they_come
from pixart_ft.adapters.files import Adapter, LoraSettings, PeftSettings
from pixart_ft.adapters.full import free, save_model, take_weights, whole_weights
from pixart_ft.adapters.targets import check_rank, check_targets, named
from pixart_ft.adapters.weights import check_base, fill_adapter, save_adapter
from pixart_ft.config.train import Quantization, TrainConfig
from pixart_ft.diffusion.intervals import WHOLE, Interval
from pixart_ft.errors import UserError
from pixart_ft.evaluation.objective import Objective
from pixart_ft.model.base import Base
from pixart_ft.model.loading import load_transformer, skeleton
from pixart_ft.model.quantized import quantize
from pixart_ft.runs.metadata import AdapterMetadata, some
from pixart_ft.runs.results import Model, What
from pixart_ft.training.encode import DTYPES, compute_dtype
from pixart_ft.training.objective import variance_stands_still

Source = Adapter | Model  # what --init-from gives


class Kind(Protocol):
    """One way to train a network.

    what   what it leaves in the run's folder
    dtype  what the base's weights are loaded in
    words  what is trained, for people
    """

    @property
    def what(self) -> What: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def words(self) -> str: ...

    def trained(self, skeleton: PixArtTransformer2DModel) -> dict[str, nn.Parameter]:
        """The weights that are trained, by name, without values, as the network is that is built up in place.

        Raises UserError for what does not fit it.
        """

    def prepare(
        self, transformer: PixArtTransformer2DModel, *, seed: int, interval: Interval, device: torch.device
    ) -> None:
        """Let in place exactly those parameters want gradients that are trained, as float32, and freeze all others.

        interval: of timesteps, where an adapter is to act.
        """

    def start_from(self, transformer: PixArtTransformer2DModel, source: Any, fingerprint: str) -> None:
        """Give what is trained the weights of an earlier result of this kind, of the base with this fingerprint."""

    def described(self, base: Base) -> dict[str, Any]:
        """What of the metadata depends on the kind."""

    def save(
        self,
        folder: Path,
        transformer: PixArtTransformer2DModel,
        metadata: AdapterMetadata,
        null_caption: Tensor,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the result; `state` gives other values for what is trained, such as an average's."""


@dataclass(frozen=True)
class AdapterKind:
    """An adapter beside the frozen base, whose blocks may be of 4 or 8 bits."""

    settings: LoraSettings | PeftSettings
    dtype: torch.dtype
    quantization: Quantization
    computed: torch.dtype  # what layers of 4 or 8 bits compute in
    what: What = "adapter"

    @property
    def words(self) -> str:
        lora = self.settings
        name = f"the LoRA, rank {lora.rank}" if isinstance(lora, LoraSettings) else f"the adapter, {lora.peft_type}"
        return name if self.quantization == "none" else f"{name}, on a base of {self.quantization}"

    def trained(self, skeleton: PixArtTransformer2DModel) -> dict[str, nn.Parameter]:
        check_targets(skeleton, self.settings.targets)
        if isinstance(self.settings, LoraSettings):
            check_rank(skeleton, self.settings.rank, self.settings.targets)
            attach(skeleton, replace(self.settings, init="default"), seed=0)  # the others begin from values
            return _trained(skeleton)
        filled = skeleton.to_empty(device="cpu")  # not all of peft works without values
        for parameter in filled.requires_grad_(False).parameters():
            parameter.zero_()
        self.prepare(filled, seed=0, interval=WHOLE, device=torch.device("cpu"))
        return _trained(filled)

    def prepare(
        self, transformer: PixArtTransformer2DModel, *, seed: int, interval: Interval, device: torch.device
    ) -> None:
        quantize(transformer, self.quantization, dtype=self.computed, device=device)
        attach(transformer, self.settings, seed=seed)
        if isinstance(self.settings, LoraSettings) and not (self.settings.dropout or self.settings.dora):
            take_inputs_as_they_come(transformer)
        limit_adapter(transformer, interval)

    def start_from(self, transformer: PixArtTransformer2DModel, source: Source, fingerprint: str) -> None:
        assert isinstance(source, Adapter)
        fill_adapter(transformer, source, fingerprint)

    def described(self, base: Base) -> dict[str, Any]:
        own = {"base": _found_by(base), "revision": base.revision}
        if isinstance(self.settings, LoraSettings):
            return {**own, "kind": "lora", "rank": self.settings.rank, "alpha": self.settings.alpha}
        return {**own, "kind": "peft", "rank": None, "alpha": None}

    def save(
        self,
        folder: Path,
        transformer: PixArtTransformer2DModel,
        metadata: AdapterMetadata,
        null_caption: Tensor,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        save_adapter(folder, transformer, metadata, null_caption, state)


@dataclass(frozen=True)
class FullKind:
    """The network itself, all of its weights or those that some patterns mean."""

    base: Base
    patterns: tuple[str, ...]
    frozen: torch.dtype  # what the other weights are held in
    variance_stands_still: bool
    whole: bool  # whether the result has the VAE and the text encoder too
    what: What = "model"
    dtype: torch.dtype = torch.float32  # the trained ones begin as exactly as the file has them

    @property
    def words(self) -> str:
        return "the network" if self.patterns == ("*",) else f"the network: {', '.join(self.patterns)}"

    def trained(self, skeleton: PixArtTransformer2DModel) -> dict[str, nn.Parameter]:
        self.prepare(skeleton, seed=0, interval=WHOLE, device=torch.device("meta"))
        return _trained(skeleton)

    def prepare(
        self, transformer: PixArtTransformer2DModel, *, seed: int, interval: Interval, device: torch.device
    ) -> None:
        free(transformer, self.patterns, frozen=self.frozen, variance_stands_still=self.variance_stands_still)

    @torch.no_grad()
    def start_from(self, transformer: PixArtTransformer2DModel, source: Source, fingerprint: str) -> None:
        assert isinstance(source, Model)
        check_base(source, fingerprint, self.base.name)
        saved = dict(load_transformer(Base.read(source.folder), dtype=torch.float32).named_parameters())
        take_weights(transformer, saved)
        own = whole_weights(transformer)
        others = [name for name, value in own.items() if not torch.equal(value, saved[name].to(value))]
        if others:  # which a resumed run would have from the base again
            raise UserError(
                f"--init-from {source.name}: it differs from the base in weights that adapter.trainable leaves frozen "
                f"({some(others)}); train those too, or give it as model.base"
            )

    def described(self, base: Base) -> dict[str, Any]:
        whole = base.whole
        return {"base": _found_by(whole), "revision": whole.revision, "kind": "full", "rank": None, "alpha": None}

    def save(
        self,
        folder: Path,
        transformer: PixArtTransformer2DModel,
        metadata: AdapterMetadata,
        null_caption: Tensor,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        save_model(folder, transformer, self.base, metadata, null_caption, state, whole=self.whole)


def kind_of(config: TrainConfig, base: Base, objective: Objective) -> Kind:
    """What the configuration, whose precision is settled, has trained. Raises UserError for what cannot be here."""
    choice, still, held = config.adapter, variance_stands_still(objective, base), weights_dtype(config)
    if choice.kind == "full":
        if held != torch.float32 and config.train.mixed_precision == "no":
            raise UserError(
                f"model.dtype {config.model.dtype} with adapter.kind full and train.mixed_precision no: what is "
                "trained is float32, and computes with nothing else; leave model.dtype at auto"
            )
        return FullKind(base, choice.trainable, held, still, choice.whole)
    targets = named(choice.targets, last_layer=not still)
    settings: LoraSettings | PeftSettings
    if choice.kind == "lora":
        settings = LoraSettings(
            choice.rank, choice.alpha, targets, choice.dropout, choice.rslora, choice.dora, choice.init
        )
    else:
        settings = PeftSettings(choice.peft_type or "", targets, choice.options)
    computed = held if config.train.mixed_precision == "no" else compute_dtype(config)
    return AdapterKind(settings, held, config.model.quantization, computed)


def stand_in(kind: Kind, base: Base) -> Kind:
    """What is like it where layers have no values: for what of peft may look at them, a LoRA of about as many weights.

    Raises UserError as `trained` does.
    """
    whole = count(kind.trained(skeleton(base)))
    if not isinstance(kind, AdapterKind) or isinstance(kind.settings, LoraSettings):
        return kind
    thin = LoraSettings(1, 1.0, kind.settings.targets)
    one = count(replace(kind, settings=thin).trained(skeleton(base)))
    return replace(kind, settings=replace(thin, rank=max(1, round(whole / one))))


def count(weights: Mapping[str, Tensor]) -> int:
    """How many numbers these are."""
    return sum(weight.numel() for weight in weights.values())


def weights_dtype(config: TrainConfig) -> torch.dtype:
    """What frozen weights are held in."""
    if config.model.dtype != "auto":
        return DTYPES[config.model.dtype]
    # float16 weights would overflow; under float16 autocast float32 weights do not.
    return torch.bfloat16 if config.train.mixed_precision == "bf16" else torch.float32


def _trained(transformer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def _found_by(base: Base) -> str:
    """What finds the base from any folder: a local one by its whole path, so that it is never looked up on the Hub."""
    is_local = base.name != "demo" and base.commit is None
    return str(Path(base.place).absolute()) if is_local else base.name
