"""Files of the original PixArt-Sigma layout to a diffusers folder, and back: the same values, bit for bit.

What diffusers' network has no place for, the null embedding and the table of positions, stands beside it in a file of
its own and goes back from there. Files are read as tensors alone: a pickle that holds anything else runs nothing.
"""

import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixart_ft.config.export import ConvertConfig
from pixart_ft.config.train import Weights
from pixart_ft.errors import Mistakes, UserError
from pixart_ft.files import probe, read_object, reason_of, write_file, write_folder
from pixart_ft.model.base import Base
from pixart_ft.model.faults import fit_faults, transformer_faults
from pixart_ft.model.original import NULL_EMBEDDING, POSITIONS, bare, depth_of, to_diffusers, to_original
from pixart_ft.model.place import resolve_base
from pixart_ft.model.saving import write_pipeline
from pixart_ft.model.weights import quiet, variant
from pixart_ft.runs.metadata import some

BESIDE = "original.safetensors"  # in the diffusers folder: what only the original layout has
_SETS: dict[Weights, tuple[str, ...]] = {"ema": ("state_dict_ema", "ema"), "raw": ("state_dict", "model")}
# What network it is, which diffusers' PixArt-Sigma is not, and the parts of a name that tell it.
_OTHERS = {
    "micro-conditions: PixArt-alpha, which is told a picture's size and knows another VAE's latents": (
        "csize_embedder.",
        "ar_embedder.",
    ),
    "kv-compression: keys and values of a coarser grid, for which diffusers has no layers": (
        ".attn.sr.",
        ".attn.norm.",
    ),
    "qk-norm: normalised queries and keys, for which diffusers' PixArt has no layers": (".q_norm.", ".k_norm."),
    "flat parameters, one process's share of FSDP; gather its whole state_dict first": ("flat_param",),
    "a LoRA, which is given beside a model (--lora)": ("lora_",),
}
_SIGMA_TOKENS = 300
# The weights, by diffusers' names, whose shapes tell the network's sizes.
_TELLING = {
    f"{layer}.weight"
    for layer in ("pos_embed.proj", "caption_projection.linear_1", "proj_out", "transformer_blocks.0.ff.net.0.proj")
}


def convert(config: ConvertConfig) -> list[str]:
    """Convert the file of the original layout, or the folder, that the configuration names; what to tell of it."""
    if config.out.exists():
        raise UserError(f"out: {config.out} is there already; choose another name, or remove it")
    probe(config.out.parent, "out")
    return _from_original(config, config.file) if config.file.is_file() else _to_original(config)


def _from_original(config: ConvertConfig, file: Path) -> list[str]:
    everything, kept = read_original(file, config.weights)
    weights, beside = to_diffusers(everything)
    _refuse(file, everything, weights, beside)
    settings = network_config(weights, beside.get(POSITIONS), image_size=config.image_size, heads=config.heads)
    lender = None if config.parts is None else Base.read(config.parts)
    if faults := transformer_faults(settings) + (
        [] if lender is None else fit_faults(settings, lender.vae, lender.text_encoder)
    ):
        raise UserError("\n  - ".join([f"file: {file} cannot be used as a PixArt-Sigma:", *faults]))
    with torch.device("meta"), quiet(str(file)):
        network = PixArtTransformer2DModel.from_config(settings)
    _check_shapes(file, weights, network.state_dict())
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    if lender is not None:
        scheduler = DPMSolverMultistepScheduler(**lender.schedule_config, prediction_type=lender.prediction_type)

    def write(aside: Path) -> None:
        write_pipeline(aside, network, weights, scheduler, lender)
        if beside:
            save_file({name: value.contiguous() for name, value in beside.items()}, str(aside / BESIDE))

    write_folder(config.out, write)
    size = settings["sample_size"]
    facts = [
        f"read: {file}, its {'averaged' if kept == 'ema' else 'last'} weights, {_dtypes(weights)}",
        f"network: {settings['num_layers']} blocks of width {_width(weights)}, {config.heads} heads, "
        f"for pictures of {8 * size} pixels (interpolation_scale {settings['interpolation_scale']:g})",
        f"kept beside it for the way back: {', '.join(beside) or 'nothing'}",
    ]
    if (null := beside.get(NULL_EMBEDDING)) is not None and len(null) != _SIGMA_TOKENS:
        facts.append(
            f"careful: its null embedding has {len(null)} tokens, where PixArt-Sigma's has {_SIGMA_TOKENS} and "
            "PixArt-alpha's 120, which has the same layers but takes the latents of another VAE"
        )
    facts.append(
        "kv-compression that samples without weights of its own leaves no trace in a file; it is not looked for"
    )
    if lender is None:
        facts.append(
            "it is the transformer alone; --parts MODEL puts that model's VAE, text encoder and tokenizer beside it"
        )
    return [*facts, f"diffusers folder: {config.out}"]


def _to_original(config: ConvertConfig) -> list[str]:
    if config.image_size is not None or config.parts is not None:
        raise UserError("image_size, parts: they are for a file of the original layout; leave them out for a folder")
    if config.out.suffix not in (".pth", ".safetensors"):
        raise UserError(f"out: {config.out} is to be a file of the original layout: end it in .safetensors or .pth")
    folder = Path(resolve_base(str(config.file), config.weights))
    if not folder.is_dir():
        raise UserError(f"file: there is no {config.file}; give a file of the original layout, or a diffusers folder")
    beside = load_file(str(folder / BESIDE)) if (folder / BESIDE).is_file() else {}
    settings = read_object(folder / "transformer" / "config.json", "file", "copy the model again")
    facts = write_original(config.out, read_diffusers(folder), beside, settings)
    return [f"put back from {BESIDE}: {', '.join(beside) or 'nothing'}", *facts]


def write_original(
    out: Path, weights: Mapping[str, Tensor], beside: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> list[str]:
    """Write a network's weights, by diffusers' names, as a .safetensors or .pth of the original layout.

    beside: what only that layout has; settings: the network's configuration, for the table of positions where it is
    not there. Returns what there is to tell. A .pth is of tensors alone, as the authors' code saves it, and read as
    such runs nothing.
    """
    found, strange = to_original(weights)
    if strange:
        raise UserError(f"file: the original layout has no place for {len(strange)} of the weights: {some(strange)}")
    if POSITIONS not in beside:  # ComfyUI reads the size from it
        beside = {**beside, POSITIONS: _positions(settings)}
    whole = {name: value.contiguous() for name, value in {**found, **beside}.items()}
    if out.suffix == ".pth":
        write_file(out, lambda aside: torch.save({"state_dict": whole}, aside))
    else:
        write_file(out, lambda aside: save_file(whole, str(aside), metadata={"format": "pt"}))
    facts = [f"original layout: {out}, {len(found)} weights, {_dtypes(found)}"]
    if NULL_EMBEDDING not in beside:
        facts.append(f"without {NULL_EMBEDDING}, which the authors' code takes from its own file and ComfyUI needs not")
    return facts


def _positions(settings: Mapping[str, Any]) -> Tensor:
    side = settings["sample_size"] // settings["patch_size"]
    width = settings["num_attention_heads"] * settings["attention_head_dim"]
    table = get_2d_sincos_pos_embed(
        width, side, interpolation_scale=settings["interpolation_scale"], base_size=side, output_type="pt"
    )
    return table.float()[None]


def read_original(file: Path, asked: Weights = "ema") -> tuple[dict[str, Tensor], Weights]:
    """The weights in a .pth, .bin or .safetensors of the original layout, by their bare names, and which they are.

    Where the file has averaged and last weights, those `asked` for; else what it has. Raises UserError for a file that
    holds no weights, or more than tensors.
    """
    content = tensors_in(file)
    sets = {
        which: content[name]
        for which, names in _SETS.items()
        for name in names
        if isinstance(content.get(name), Mapping)
    }
    if asked == "raw" and "ema" in sets and "raw" not in sets:
        raise UserError(f"weights: {file} holds only its averaged weights; use --weights ema")
    kept: Weights = "ema" if asked == "ema" and "ema" in sets else "raw"
    chosen = sets.get(kept, content)
    weights: dict[str, Tensor] = {}
    for key, value in chosen.items():
        if isinstance(value, Tensor):
            name = bare(str(key))
            if name in weights:
                raise UserError(f"file: {file} holds {name} twice, under other prefixes; keep one network in it")
            weights[name] = value
    if not weights:
        raise UserError(f"file: {file} holds no weights (its keys are {some(map(str, chosen))})")
    return weights, kept


def tensors_in(file: Path, key: str = "file") -> dict[Any, Any]:
    """What is in a file, read as tensors, numbers and texts in dictionaries and lists alone.

    key: what messages begin with.
    """
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(str(file)))
        with warnings.catch_warnings(action="ignore"):  # of protocols, where the answer is below
            try:
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                found = torch.load(file, map_location="cpu", weights_only=True)  # of a torch before 1.6
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{key}: {file} is no file of weights, or holds more than tensors; reading that could run any program, so "
            f"nothing of it was run. Save its state_dict alone. Reason: {str(error).strip().splitlines()[0]}"
        ) from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (reason_of(error) if isinstance(error, OSError) else None) or (str(error).strip() or "?").splitlines()[
            0
        ]
        raise UserError(f"{key}: cannot read {file}: {reason}; copy or download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{key}: {file} holds a {type(found).__name__}, where weights by their names are expected")
    return found


def read_diffusers(folder: Path) -> dict[str, Tensor]:
    """The weights of a diffusers folder's transformer, in the dtype that they are held in."""
    suffix = "" if (kind := variant(str(folder), "transformer")) is None else f".{kind}"
    files = sorted((folder / "transformer").glob("*.safetensors"))
    weights: dict[str, Tensor] = {}
    for file in files:
        if not suffix or suffix in file.name:
            try:
                weights |= load_file(str(file))
            except (OSError, SafetensorError) as error:
                raise UserError(f"file: cannot read {file} ({error}); copy the model again") from error
    if not weights:
        raise UserError(f"file: {folder / 'transformer'} holds no *.safetensors")
    weights.pop("pos_embed.pos_embed", None)  # of older checkpoints; recomputed
    return weights


def network_config(
    weights: Mapping[str, Tensor], positions: Tensor | None, *, image_size: int | None, heads: int
) -> dict[str, Any]:
    """diffusers' configuration of the network with these weights, by their shapes and its table of positions.

    Raises UserError where a shape is not PixArt's, or nothing says for what size it is.
    """
    shape = {name: tuple(value.shape) for name, value in weights.items()}
    width, channels, patch = shape["pos_embed.proj.weight"][:3]
    size, scale = image_size and image_size // 8, None
    if positions is not None:
        side = math.isqrt(positions.shape[-2])
        if image_size is not None and side * patch * 8 != image_size:
            raise UserError(
                f"image_size {image_size}: the file's table of positions is for {side * patch * 8} pixels; leave it out"
            )
        size, scale = side * patch, _scale_of(positions)
    if size is None:
        raise UserError(
            "image_size: the file has no table of positions, so nothing says for what size it is; give --image-size "
            "256, 512, 1024 or 2048, as in the file's name"
        )
    mistakes = Mistakes()
    if width % heads:
        mistakes.add(f"heads {heads}: the network's width {width} is no multiple of it; PixArt-Sigma has 16")
    if shape["transformer_blocks.0.ff.net.0.proj.weight"][0] != 4 * width:
        mistakes.add("file: its feed-forward layers are not four times as wide as the network, as diffusers' are")
    mistakes.raise_if_any()
    usual = size / 64
    return {
        "_class_name": "PixArtTransformer2DModel",
        "sample_size": size,
        "num_layers": depth_of(weights, "transformer_blocks"),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "cross_attention_dim": width,
        "in_channels": channels,
        "out_channels": shape["proj_out.weight"][0] // patch**2,
        "patch_size": patch,
        "caption_channels": shape["caption_projection.linear_1.weight"][1],
        "interpolation_scale": usual if scale is None or abs(scale / usual - 1) < 0.01 else round(scale, 3),
        "use_additional_conditions": False,
    }


def _scale_of(positions: Tensor) -> float | None:
    """By what positions are divided: the second place's, in the wave whose length is 100 times the usual one's.

    None: the table is empty.
    """
    wave = positions.shape[-1] // 8
    value = positions.flatten(0, -2)[1, wave].item() if positions.flatten(0, -2).shape[0] > 1 else 0.0
    if not 0 <= value <= 1:
        raise UserError(f"file: its table of positions ({POSITIONS}) is damaged, or another network's")
    return None if value == 0 else 0.01 / math.asin(value)


def _refuse(
    file: Path, everything: Mapping[str, Tensor], weights: Mapping[str, Tensor], beside: Mapping[str, Tensor]
) -> None:
    """Raise UserError, with every reason, for weights that are not this network's."""
    if depth_of(everything, "transformer_blocks"):
        raise UserError(f"file: {file} has diffusers' names already; put it into a diffusers folder")
    reasons = {why: [k for k in everything if any(one in f".{k}" for one in parts)] for why, parts in _OTHERS.items()}
    if found := {why: keys for why, keys in reasons.items() if keys}:
        lines = [f"  - {why} ({some(keys)})" for why, keys in found.items()]
        raise UserError("\n".join([f"file: {file} is no PixArt-Sigma that diffusers knows:", *lines]))
    if not weights.keys() >= _TELLING:
        raise UserError(f"file: {file} holds no PixArt network (its names are {some(everything)})")
    if strange := beside.keys() - {NULL_EMBEDDING, POSITIONS}:
        raise UserError(f"file: {file} holds {len(strange)} weights that PixArt-Sigma does not have: {some(strange)}")


def _check_shapes(file: Path, weights: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    faults = {
        "missing": places.keys() - weights.keys(),
        "unknown": weights.keys() - places.keys(),
        "of another shape": {k for k in weights.keys() & places.keys() if weights[k].shape != places[k].shape},
    }
    if any(faults.values()):
        lines = [f"  - {len(keys)} {what}: {some(keys)}" for what, keys in faults.items() if keys]
        raise UserError("\n".join([f"file: the weights in {file}, by diffusers' names, do not fit:", *lines]))


def _width(weights: Mapping[str, Tensor]) -> int:
    return len(weights["pos_embed.proj.weight"])


def _dtypes(weights: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in weights.values()}))
