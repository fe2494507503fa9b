"""A base by its configurations, each read once: all that is known of it before a weight is loaded.

What is no PixArt-Sigma, or would load silently wrong, is refused here, every fault in one report.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

from pixart_ft.config.train import Weights
from pixart_ft.diffusion.intervals import WHOLE, shown
from pixart_ft.diffusion.names import PredictionType, StockPrediction, VarianceState
from pixart_ft.diffusion.schedules import DIFFUSERS_KEYS, NoiseSchedule
from pixart_ft.errors import Mistakes, UserError
from pixart_ft.files import read_object
from pixart_ft.model.faults import fit_faults, index_faults, transformer_faults, type_faults
from pixart_ft.model.place import resolve_base
from pixart_ft.model.vae import LatentScale, latent_scale_faults
from pixart_ft.model.weights import readable
from pixart_ft.runs.hub import HubModel
from pixart_ft.runs.manifest import check_whole
from pixart_ft.runs.metadata import METADATA, AdapterMetadata, read_metadata
from pixart_ft.schedulers.stored import process_of

_INDEX = "model_index.json"
_PARTS = {
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}


@dataclass(frozen=True, eq=False, repr=False)
class Base:
    """A PixArt-Sigma as it describes itself; `loading` loads its weights.

    name                              as it was given: "demo", a folder, or a Hub id
    place                             the folder or Hub id that this means; of a run's result on the Hub: a folder
    revision                          asked for of a Hub model; None: its newest
    commit                            the one that its index is of, and every other file with it; None: not the Hub's
    transformer, vae, text_encoder    the configurations of its parts; None: its index says that it has no such part
    schedule, prediction_type         the noise schedule it was trained with and what it predicts
    schedule_config                   that schedule in the words of a diffusers scheduler config
    metadata                          of a run's result: what it was trained on; None: it is no run's
    source                            of a run's result that holds the transformer alone: where its other parts are
    """

    name: str
    place: str
    revision: str | None
    commit: str | None
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any] | None
    schedule: NoiseSchedule
    prediction_type: PredictionType
    schedule_config: Mapping[str, Any]
    metadata: AdapterMetadata | None = None
    source: Self | None = None

    @classmethod
    def read(cls, name: str | Path, revision: str | None = None, weights: Weights = "ema") -> Self:
        """The base that `model.base` and `model.revision` mean; of a run its averaged or its last `weights`.

        Warns of one that was trained at a part of the timesteps. Raises UserError with every fault: files that are
        absent or damaged, else what makes it no PixArt-Sigma.
        """
        place, commit = resolve_base(str(name), weights), None
        if (model := None if Path(place).is_dir() else HubModel.named(place)) is not None:
            name, revision = model.id, _one_of(model.revision, revision)
            place, commit = _on_the_hub(model.id, revision)
        elif revision is not None:
            raise UserError(
                f"model.revision {revision!r} chooses among the versions of a Hub model, and {place} is a folder; "
                "remove it (an adapter's stands in its name, --lora owner/name@revision)"
            )
        index = _read(_file(place, _INDEX, commit))
        _refuse(place, index_faults(index.get("_class_name")))
        metadata = None
        if (Path(place) / METADATA).is_file():
            check_whole(Path(place), "model.base", hashed="*.json")
            metadata = read_metadata(Path(place))
        parts: dict[str, dict[str, Any]] = {}
        mistakes, source = Mistakes(), None
        lent = metadata is not None and index.get("vae") == [None, None]
        if metadata is not None and lent:
            try:
                source = cls.read(metadata.base, metadata.revision)
            except UserError as error:
                raise UserError(f"{place} holds the transformer alone, of the base {metadata.base}: {error}") from error
            parts = {"vae": dict(source.vae)}
            parts |= {} if source.text_encoder is None else {"text_encoder": dict(source.text_encoder)}
        for part in _PARTS:
            if part in parts or (part == "text_encoder" and index.get(part) in (None, [None, None])):
                continue
            try:
                parts[part] = _read_part(place, part, commit)
            except UserError as error:
                mistakes.add(str(error))
                if isinstance(error.__cause__, LocalEntryNotFoundError):  # out of reach: so are the others
                    break
        mistakes.raise_if_any()
        transformer, vae, text_encoder = parts["transformer"], parts["vae"], parts.get("text_encoder")
        faults = transformer_faults(transformer) + latent_scale_faults(vae) + fit_faults(transformer, vae, text_encoder)
        try:
            trained_with = _trained_with(parts["scheduler"], metadata)
        except ValueError as error:
            faults.append(f"{_PARTS['scheduler']}: {error}")
        _refuse(place, faults)
        if metadata is not None and metadata.interval != WHOLE:
            warnings.warn(
                f"the model {name} was trained at the timesteps {shown(metadata.interval)} alone: elsewhere it is what "
                "that training made of it",
                stacklevel=2,
            )
        return cls(str(name), place, revision, commit, transformer, vae, text_encoder, *trained_with, metadata, source)

    def __repr__(self) -> str:
        return f"Base({self.name!r}, {self.native_size} px, predicts {self.prediction_type}, variance {self.variance})"

    @property
    def variance(self) -> VarianceState:
        """The state of its learned variance: "none" without the channels, else a stock base counts as trained.

        The metadata of a run's result, or of an adapter, may say "stale" instead.
        """
        if self.metadata is not None:
            return self.metadata.variance
        channels = self.transformer.get("in_channels", 4)
        return "trained" if self.transformer.get("out_channels", 8) == 2 * channels else "none"

    @property
    def whole(self) -> "Base":
        """The base that has the VAE, the text encoder and the tokenizer: itself, unless it holds the network alone."""
        return self if self.source is None else self.source.whole

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along each side."""
        factor: int = 2 ** (len(self.vae["block_out_channels"]) - 1)
        return factor

    @property
    def native_size(self) -> int:
        """The side in pixels of the pictures that it was trained on."""
        size: int = self.transformer.get("sample_size", 128)
        return size * self.vae_factor

    @property
    def size_unit(self) -> int:
        """What a picture's height and width must be multiples of: patch size times VAE factor."""
        patch: int = self.transformer.get("patch_size", 2)
        return patch * self.vae_factor

    @property
    def latent_scale(self) -> LatentScale:
        """How the transformer's latents follow from the VAE's."""
        return LatentScale.of(self.vae)


def _refuse(place: str, faults: list[str]) -> None:
    if faults:
        raise UserError("\n  - ".join([f"model.base: {place} cannot be used:", *faults]))


def _trained_with(
    config: Mapping[str, Any], metadata: AdapterMetadata | None
) -> tuple[NoiseSchedule, PredictionType, dict[str, Any]]:
    """Schedule, prediction type and the schedule's own words from a scheduler_config.json; ValueError for another's."""
    if config.get("network_timesteps") is not None:
        raise ValueError(
            "it tells the network other timesteps than its own indices (network_timesteps): a way to sample from a "
            "base, not a base; use the folder that it was made from"
        )
    process = process_of(config)
    prediction_type = process["prediction_type"] if metadata is None else metadata.prediction_type
    if metadata is None and prediction_type not in get_args(StockPrediction):
        raise ValueError(
            f"unknown prediction_type {prediction_type!r}; a PixArt-Sigma predicts epsilon, v_prediction or sample"
        )
    words = {key: process[key] for key in DIFFUSERS_KEYS if key in process}
    return NoiseSchedule.from_diffusers_config(words), prediction_type, words


def _one_of(named: str | None, revision: str | None) -> str | None:
    """The revision that a name has, or that was asked for beside it."""
    if named and revision and named != revision:
        raise UserError(f"model.revision is {revision!r}, and model.base names the revision {named!r}; give one")
    return named or revision


def _on_the_hub(name: str, revision: str | None) -> tuple[str, str]:
    """Where the files of a Hub model are, which for a run's result is here, all of them, and the commit they are of."""
    commit = _file(name, _INDEX, revision).parent.name  # the Hub's cache has a folder for each commit
    with readable(name, METADATA):
        if not HubModel(name, commit).has(METADATA):
            return name, commit
        return str(HubModel(name, commit).fetch("model.base")), commit


def _read_part(place: str, part: str, commit: str | None) -> dict[str, Any]:
    config = _read(_file(place, _PARTS[part], commit))
    if faults := type_faults(part, config):
        raise UserError(f"model.base: {place}/{_PARTS[part]}: {'; '.join(faults)}; copy or download the model again")
    return config


def _read(file: Path) -> dict[str, Any]:
    return read_object(file, "model.base", "copy or download the model again")


def _file(place: str, name: str, revision: str | None) -> Path:
    """A file of a base, from the Hub if it is one of the Hub's."""
    path = Path(place) / name
    if not Path(place).is_dir():
        with readable(place, name):
            return Path(hf_hub_download(place, name, revision=revision))
    if not path.is_file():
        held = ", ".join(sorted(entry.name for entry in Path(place).iterdir())) or "nothing"
        raise UserError(f"model.base: {path} is missing (the folder holds {held}); give a whole diffusers PixArt-Sigma")
    return path
