"""What a run says of what it trained, beside the weights: the content of pixart_ft.json. No torch."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from pixart_ft.config.train import LARGEST_RANK, Kind, Scale, Weights
from pixart_ft.diffusion.intervals import WHOLE, Interval
from pixart_ft.diffusion.names import PredictionType, TimeConditioning, VarianceState
from pixart_ft.errors import UserError
from pixart_ft.files import read_object

METADATA, NULL_CAPTION = "pixart_ft.json", "null_caption.safetensors"

# What the files beside the weights may say: everything else in them is a UserError.
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
Text = Annotated[str, Field(min_length=1)]
Rank = Annotated[int, Field(ge=1, le=LARGEST_RANK)]


@dataclass(frozen=True)
class _Schedule:
    """`schedules.DIFFUSERS_KEYS`, each of them absent or of this kind."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    num_train_timesteps: Annotated[int, Field(ge=1, le=2**17)] | None = None
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    trained_betas: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] | None = None
    rescale_betas_zero_snr: bool = False


def _of_schedule(value: Mapping[str, object]) -> Mapping[str, object]:
    found = TypeAdapter(_Schedule).validate_json(json.dumps(value))
    betas = found.trained_betas
    if betas and ((found.num_train_timesteps or len(betas)) != len(betas) or 1 in betas[:-1]):
        raise ValueError("trained_betas are one for each timestep, and only the last may be 1")
    return value


def _of_interval(value: Interval) -> Interval:
    if not 0 <= value[0] <= value[1] <= 1e6:
        raise ValueError("the first end comes before the last, and neither is negative")
    return value


@dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter, or a whole model, was trained on and how.

    base               as given in model.base; of a whole model the one that its VAE and text encoder come from
    base_fingerprint   `loading.fingerprint` of the network that was trained
    prediction_type    what the network predicts
    schedule           the noise schedule it was trained with, in the words of a diffusers scheduler config
    variance           the state of the learned variance after this training
    rank, alpha        of a LoRA; None: it is none
    max_tokens         longest caption, in tokens
    text_preparation   how captions were prepared before the tokenizer
    weights            whether these are the averaged or the last weights
    samples_seen       pictures drawn in training, repeats included
    step               optimizer steps done; None: made before this was kept
    revision           of a Hub base, if one was asked for
    time_conditioning  what the network is told of another schedule's noise: its index, that in the base's count of
                       steps, or where the base met that SNR
    interval           the network's timesteps that it was trained at; an adapter acts there unless told otherwise
    kind               of what was trained, as adapter.kind
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    base: Text
    base_fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    prediction_type: PredictionType
    schedule: Annotated[Mapping[str, object], AfterValidator(_of_schedule)]
    variance: VarianceState
    rank: Rank | None
    alpha: Scale | None
    max_tokens: Annotated[int, Field(ge=1, le=4096)]
    text_preparation: Text
    weights: Weights
    samples_seen: Annotated[int, Field(ge=0, lt=2**63)]
    revision: Text | None = None
    time_conditioning: TimeConditioning = "index"
    step: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    interval: Annotated[Interval, AfterValidator(_of_interval)] = WHOLE
    kind: Kind = "lora"

    @property
    def last_timestep(self) -> int:
        """The one of the most noise, of the process it was trained on; the base's own where the network counts so."""
        steps = self.schedule.get("num_train_timesteps")
        steps = steps if isinstance(steps, int) else 1000
        return (steps if self.time_conditioning == "index" else max(steps, 1000)) - 1


def read_metadata(folder: Path) -> AdapterMetadata:
    """The content of a folder's pixart_ft.json; UserError if it is damaged or of another version."""
    path = folder / METADATA
    return checked(AdapterMetadata, path, read_object(path, "adapter", "copy the adapter again"))


MetadataOf = Callable[[Path], AdapterMetadata]  # of a folder
AnyContent = TypeVar("AnyContent")


def checked(kind: type[AnyContent], path: Path, content: Mapping[str, object]) -> AnyContent:
    """What a JSON file holds, as `kind`. Raises UserError naming every key that is strange, and every value."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(content))  # JSON: a list fills a tuple
    except ValidationError as error:
        found = [(".".join(part for part in one["loc"] if isinstance(part, str)), one) for one in error.errors()]
    other = ("missing", "unexpected_keyword_argument")
    if strange := [key for key, one in found if one["type"] in other and isinstance(one["loc"][-1], str)]:
        raise UserError(f"adapter: {path} is of another version of pixart_ft (fields {some(strange)}); train again")
    wrong = [f"{key or 'it'} is {json.dumps(one['input'], default=str)[:60]} ({one['msg']})" for key, one in found]
    raise UserError(f"adapter: cannot read {path}: {', '.join(wrong)}; copy the adapter again")


def some(names: Iterable[str]) -> str:
    """The first three names, for messages."""
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
