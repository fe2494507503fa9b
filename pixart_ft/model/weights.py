"""Loading weights with the libraries: which files, quietly, one message for damage, every weight accounted for."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import diffusers.utils.logging
import transformers.utils.logging
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.distributed.tensor import DTensor

from pixart_ft.errors import UserError
from pixart_ft.files import sha256
from pixart_ft.runs.hub import meaning
from pixart_ft.runs.metadata import NULL_CAPTION

Weight = TypeVar("Weight", bound=Tensor)

CHUNK = 2**26  # weights that there are float32 copies of at a time: 256 MiB
# A file of weights: its variant stands before or after the number of its shard.
_VARIANT = re.compile(r"[^.]+?(?:-\d+-of-\d+)?(?:\.([^.]+?))?(?:-\d+-of-\d+)?\.safetensors$")


def variant(base: str, part: str) -> str | None:
    """The variant that a folder's weights were saved as (`*.fp16.safetensors`), None where there are plain ones."""
    names = [path.name for path in sorted((Path(base) / part).glob("*.safetensors"))]
    found = {match[1] for name in names if (match := _VARIANT.match(name))}
    if None in found or not found:
        return None
    if len(found) > 1:
        raise UserError(
            f"model.base: {base}/{part} holds its weights as {', '.join(sorted(found))}, none of them plain; keep one"
        )
    return found.pop()


def check_keys(base: str, part: str, missing: Any, unexpected: Any) -> None:
    """Refuse weights that were not in the file (they would be random) or that found no place."""
    faults = [
        f"{len(keys)} {what}, such as {', '.join(sorted(keys)[:3])}"
        for what, keys in (("weights missing", missing), ("unknown weights", unexpected))
        if keys
    ]
    if faults:
        raise UserError(f"model.base: the weights in {base}/{part} do not fit its config.json: {'; '.join(faults)}")


@contextmanager
def readable(base: str, part: str) -> Iterator[None]:
    """Turn the many errors of opening a damaged, absent or unreachable model into one message."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes the libraries raise almost anything
        if Path(base).is_dir():
            remedy = "copy or download the model again"
        else:
            remedy = (
                "check the name and the connection (HF_HUB_OFFLINE=1 leaves only what was downloaded before); weights "
                "saved as a variant (*.fp16.safetensors) are read from a downloaded folder"
            )
        if part == "tokenizer":
            remedy += "; a tokenizer without tokenizer.json needs the packages sentencepiece and protobuf"
        raise UserError(f"model.base: cannot load {part} of {base}; {remedy}. Reason: {meaning(error)}") from error


@contextmanager
def quiet(base: str) -> Iterator[None]:
    """Silence the libraries' remarks on loading (what matters is checked here); bars stay for downloads."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    before = [(logger, logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        if Path(base).is_dir():
            logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, verbosity, had_bars in before:
            logger.set_verbosity(verbosity)
            if had_bars:
                logger.enable_progress_bar()


def all_finite(values: Iterable[object]) -> bool:
    """Whether every number of these tensors is finite; what is no tensor does not count."""
    return all(bool(value.isfinite().all()) for value in values if isinstance(value, Tensor))


def read_null_caption(folder: Path, width: int | None) -> Tensor:
    """The embedding (1, D) that stands for no caption, from the folder of what a run trained; D is the network's."""
    path = folder / NULL_CAPTION
    found = read_tensors(path)[0].get("null_caption")
    if found is None or found.ndim != 2 or not found.is_floating_point() or not all_finite([found]):
        raise UserError(f"adapter: cannot read {path}: it holds no null_caption; copy the adapter again")
    if found.shape != (1, width or found.shape[1]):
        raise UserError(
            f"adapter: {path} holds a null_caption of shape {tuple(found.shape)}, and this base takes (1, {width}); "
            "copy the adapter again"
        )
    return found


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """What a file of tensors holds, and its SHA-256."""
    try:
        content = path.read_bytes()
        return load(content), sha256(content)
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter: cannot read {path} ({error}); copy the adapter again") from error


def plain_name(name: str) -> str:
    """The name that a parameter has where none is parametrized: "a.parametrizations.weight.original" is a.weight."""
    return name.replace(".parametrizations.", ".").removesuffix(".original")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it: its shard, where it is in shards, of which few operators on lists know."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def chunks(weights: Iterable[Weight]) -> Iterator[list[Weight]]:
    """These in lists of at most `CHUNK` numbers, or of one weight that is larger."""
    part: list[Weight] = []
    for weight in list(weights):
        if part and sum(w.numel() for w in part) + weight.numel() > CHUNK:
            yield part
            part = []
        part.append(weight)
    if part:
        yield part


def is_known(flag: Tensor) -> bool:
    """Whether reading it makes nobody wait for a device."""
    return flag.device.type == "cpu"
