"""The network itself trained, all of it or a part: which weights, and the diffusers pipeline it is saved as."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pixart_ft.config.train import LAST_LAYER
from pixart_ft.errors import UserError
from pixart_ft.files import write_folder
from pixart_ft.model.base import Base
from pixart_ft.model.saving import write_pipeline
from pixart_ft.model.weights import all_finite, plain_name
from pixart_ft.runs.manifest import write_manifest
from pixart_ft.runs.metadata import METADATA, NULL_CAPTION, AdapterMetadata


def weights_meant(transformer: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The names of the weights that `adapter.trainable` means, as in a shell: * stands for anything.

    Raises UserError naming each pattern that matches none, with the nearest names.
    """
    names = [name for name, _ in transformer.named_parameters()]
    faults = []
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0) or names[:3]
            faults.append(f"{pattern!r} matches no weight; near: {', '.join(near)}")
    if faults:
        raise UserError("adapter.trainable: " + "; ".join(faults))
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def free(
    transformer: PixArtTransformer2DModel, patterns: Sequence[str], *, frozen: torch.dtype, variance_stands_still: bool
) -> None:
    """Let the weights meant be trained, in float32; the others are frozen, in their dtype.

    Where the variance is to stand still, the rows of the last layer that make it are frozen too: no weight decay moves
    what no loss sees.
    """
    meant = set(weights_meant(transformer, patterns))
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(name in meant)
        parameter.data = parameter.data.to(torch.float32 if name in meant else frozen)
    if variance_stands_still:
        channels = transformer.config.out_channels
        layer = transformer.get_submodule(LAST_LAYER)
        rows = torch.arange(layer.out_features)  # of a patch's places, each with all channels, the mean's first
        rows = rows[rows % channels < channels // 2]
        for part in ("weight", "bias"):
            if f"{LAST_LAYER}.{part}" in meant:
                parametrize.register_parametrization(layer, part, _MeanRows(getattr(layer, part), rows))


class _MeanRows(nn.Module):
    """Some rows of a weight, which are trained, in their places among the others, which are not."""

    whole: Tensor
    rows: Tensor

    def __init__(self, whole: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("whole", whole.detach().clone(), persistent=False)
        self.register_buffer("rows", rows.to(whole.device), persistent=False)

    def forward(self, trained: Tensor) -> Tensor:
        return self.whole.to(trained.dtype).index_copy(0, self.rows, trained)

    def right_inverse(self, whole: Tensor) -> Tensor:
        return whole[self.rows]


@torch.no_grad()
def whole_weights(transformer: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Every weight by its name in a plain network. `state` gives other values for the trained ones, by their names in
    `transformer`, such as an average's shadows.
    """
    found = {}
    for name, value in {**dict(transformer.named_parameters()), **(state or {})}.items():
        plain, rows = _plain(transformer, name)
        found[plain] = value.detach() if rows is None else rows(value.detach())
    return found


@torch.no_grad()
def take_weights(transformer: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Give what is trained the values of a plain network's weights, by their names there."""
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            plain, rows = _plain(transformer, name)
            parameter.copy_(whole[plain] if rows is None else rows.right_inverse(whole[plain]))


def _plain(transformer: nn.Module, name: str) -> tuple[str, _MeanRows | None]:
    """The name of a parameter in a plain network, and what makes the whole weight of it where it is some rows."""
    parts = name.removesuffix(".original")
    if parts == name:
        return name, None
    (rows,) = transformer.get_submodule(parts).children()
    assert isinstance(rows, _MeanRows)
    return plain_name(name), rows


def save_model(
    folder: Path,
    transformer: PixArtTransformer2DModel,
    base: Base,
    metadata: AdapterMetadata,
    null_caption: Tensor,
    state: Mapping[str, Tensor] | None = None,
    *,
    whole: bool,
) -> None:
    """Write the network as the folder of a diffusers pipeline, whole or not at all, replacing an earlier one.

    Its weights are float32, in shards above 5 GB. whole: with the VAE, text encoder and tokenizer of `base`; else the
    metadata says where they are. `state` as of `whole_weights`; `null_caption` is (1, D).
    """
    weights = {name: value.to("cpu", torch.float32) for name, value in whole_weights(transformer, state).items()}
    if not all_finite(weights.values()):
        raise UserError(f"model: {folder} is not written: its weights are not finite, the training diverged")
    # told of other noise by the base's own clock, the network still keeps that clock
    clock = metadata.schedule if metadata.time_conditioning == "index" else base.schedule_config
    scheduler = DPMSolverMultistepScheduler(**clock, prediction_type=metadata.prediction_type)

    def write(aside: Path) -> None:
        write_pipeline(aside, transformer, weights, scheduler, base if whole else None)
        (aside / METADATA).write_text(json.dumps(asdict(metadata), indent=2) + "\n", encoding="utf-8")
        save_file({"null_caption": null_caption.detach().cpu().contiguous()}, str(aside / NULL_CAPTION))
        write_manifest(aside)

    write_folder(folder, write)
