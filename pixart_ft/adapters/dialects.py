"""The names that other programs give the weights of an adapter, read and written. Pure functions on named tensors.

| dialect | a key | who |
|---|---|---|
| peft | base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight | peft, this package |
| diffusers | transformer.transformer_blocks.0.attn1.to_q.lora_A.weight | diffusers, SimpleTuner |
| script | unet.transformer_blocks.0.attn1.to_q.lora_A.weight | the LoRA script of PixArt's authors |
| comfy | diffusion_model.blocks.0.attn.qkv.lora_down.weight | ComfyUI: the authors' own layers |
| kohya | lora_transformer_transformer_blocks_0_attn1_to_q.lora_down.weight | kohya's scripts, OneTrainer, LyCORIS |

Where the authors' layer is several of diffusers', an adapter of it is cut into theirs, and theirs are put together.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lokr.layer import factorization
from peft.utils.other import get_pattern_key
from torch import Tensor

from pixart_ft.adapters.files import LoraSettings, PeftSettings
from pixart_ft.config.train import LARGEST_RANK
from pixart_ft.errors import UserError
from pixart_ft.model.original import layers
from pixart_ft.runs.metadata import some

Dialect = Literal["peft", "diffusers", "script", "comfy", "kohya"]

# What a key begins with, the longer ones first.
_PREFIXES: dict[str, Dialect] = {
    "unet.base_model.model.": "script",
    "base_model.model.": "peft",
    "unet.": "script",
    "transformer.": "diffusers",
    "model.diffusion_model.": "comfy",
    "diffusion_model.": "comfy",
    "lora_transformer_": "kohya",
    "lora_unet_": "kohya",
    "lycoris_": "kohya",
    "": "peft",
}
_TEXT_ENCODER = ("text_encoder", "lora_te", "t5.", "bundle_emb")
_SUFFIX = re.compile(
    r"\.(?:(?P<a>lora_A(?:\.\w+)?\.weight|lora_down\.weight|lora\.down\.weight)"
    r"|(?P<b>lora_B(?:\.\w+)?\.weight|lora_up\.weight|lora\.up\.weight)"
    r"|(?P<magnitude>dora_scale|lora_magnitude_vector(?:\.\w+)*)"
    r"|(?P<alpha>alpha)"
    r"|(?P<factor>lokr_(?:w1|w1_a|w1_b|w2|w2_a|w2_b|t2)|hada_(?:w1_a|w1_b|w2_a|w2_b|t1|t2)))$"
)
_SCRIPT_ALPHA = 8.0  # peft's default, which the authors' script trains with and does not write down
_LORA = "lora_adapter_metadata"  # the key of diffusers' own text in a header


@dataclass(frozen=True)
class Update:
    """A LoRA of one layer: W becomes W + scale B A, and each row then has the length in `magnitude`, if there is one.

    a is (rank, inputs) or (rank, channels, k, k), b (outputs, rank) or (outputs, rank, 1, 1), magnitude (outputs,).
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of directions that it has."""
        return len(self.a)


@dataclass(frozen=True)
class Foreign:
    """An adapter of another program: its weights by peft's names, what they are, and what had to be assumed."""

    dialect: Dialect
    weights: dict[str, Tensor]
    settings: LoraSettings | PeftSettings
    needs_alpha: bool = False  # of some layers it says none
    remarks: tuple[str, ...] = ()


def read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    alpha: float | None = None,
) -> Foreign:
    """The adapter in these tensors, whatever program named them.

    header: the texts that a safetensors file has beside them; config: an adapter_config.json; alpha: of all layers,
    where the file says none. Raises UserError, with counts and names, unless every tensor is understood.
    """
    dialect, found = _sorted_by_layer(tensors)
    told = _told(header or {}, config or {})
    if any(key not in ("a", "b", "magnitude", "alpha") for values in found.values() for key in values):
        return _read_factors(dialect, found)
    pattern = told["alpha_pattern"] or {}
    updates: dict[str, Update] = {}
    faults, silent = [], 0
    for names, values in found.items():
        if {"a", "b"} - values.keys():
            faults.append(f"{names[0]} has only {', '.join(sorted(values))}")
            continue
        a, b = values["a"], values["b"]
        if a.ndim not in (2, 4) or b.ndim != a.ndim or b.shape[1] != len(a) or not 0 < len(a) <= LARGEST_RANK:
            faults.append(f"{names[0]} is of {tuple(a.shape)} and {tuple(b.shape)}")
            continue
        own = _number(values["alpha"]) if "alpha" in values else _of_layer(pattern, names[0], told["lora_alpha"])
        if own is None:
            silent += 1
            usual = _SCRIPT_ALPHA if dialect in ("script", "peft") else float(len(a))
            own = usual if alpha is None else alpha
        if not (0 < own < math.inf):
            faults.append(f"{names[0]} has the alpha {own}")
            continue
        root = told.get("use_rslora") and "alpha" not in values
        update = Update(a, b, own / (math.sqrt(len(a)) if root else len(a)), _row(values.get("magnitude")))
        updates |= _cut(names, update)
    if faults:
        raise UserError(f"adapter: {len(faults)} of {len(found)} layers are no LoRA: {some(faults)}")
    if not updates:
        raise UserError("adapter: it changes nothing: every B in it is zero")
    remarks = _assumed(dialect, updates) if silent and alpha is None else ()
    return Foreign(dialect, to_peft(updates), lora_settings(updates), silent > 0, remarks)


def _sorted_by_layer(tensors: Mapping[str, Tensor]) -> tuple[Dialect, dict[tuple[str, ...], dict[str, Tensor]]]:
    """The tensors by the layers of diffusers' that they are for, and by their part in the adapter."""
    numbers = [int(n) for key in tensors for n in re.findall(r"blocks[._](\d{1,3})[._]", key)]
    places = _places(max(numbers, default=-1) + 1)
    found: dict[tuple[str, ...], dict[str, Tensor]] = defaultdict(dict)
    dialects: Counter[Dialect] = Counter()
    strange, text = [], []
    for key, value in tensors.items():
        prefix = next(prefix for prefix in _PREFIXES if key.startswith(prefix))
        suffix = _SUFFIX.search(key)
        names = places.get(key[len(prefix) : suffix.start()]) if suffix else None
        if key.startswith(_TEXT_ENCODER):
            text.append(key)
        elif suffix is None or names is None:
            strange.append(key)
        else:
            part = suffix["factor"] or next(name for name, match in suffix.groupdict().items() if match)
            dialects[_PREFIXES[prefix]] += 1
            if part in found[names]:
                strange.append(key)
            found[names][part] = value
    if text:
        raise UserError(
            f"adapter: {len(text)} weights are for the text encoder, which stays as it is here: {some(text)}"
        )
    if len(dialects) > 1:
        kinds = ", ".join(f"{count} {name}" for name, count in dialects.items())
        raise UserError(f"adapter: its names are of {len(dialects)} dialects ({kinds}); one adapter has one")
    if strange:
        raise UserError(
            f"adapter: {len(strange)} of {len(tensors)} weights have names that no known dialect gives a LoRA of "
            f"PixArt-Sigma: {some(strange)}"
        )
    if not dialects:
        raise UserError("adapter: it holds no weights")
    return next(iter(dialects)), found


def _places(depth: int) -> dict[str, tuple[str, ...]]:
    """What a layer is called, with dots or underscores, and the layers of diffusers' that it is."""
    known: dict[str, tuple[str, ...]] = {}
    for theirs, ours in layers(depth).items():
        known |= {theirs: ours} | {name: (name,) for name in ours}
        if len(ours) > 1:
            known |= {f"{theirs}.{part}": (name,) for part, name in enumerate(ours)}
    return known | {name.replace(".", "_"): ours for name, ours in known.items()}


def _told(header: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says of all its layers, by the names in peft's configuration."""
    told = {key: config.get(key) for key in ("lora_alpha", "use_rslora", "alpha_pattern")}
    try:
        own = json.loads(header.get(_LORA) or "{}")
        told |= {key: own[name] for key in told for name in (key, f"transformer.{key}") if name in own}
        if (alpha := header.get("ss_network_alpha")) is not None:
            told["lora_alpha"] = float(alpha)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"adapter: the texts in the file's header are damaged ({error}); copy it again") from error
    if not isinstance(told["lora_alpha"], int | float | None) or not isinstance(told["alpha_pattern"], dict | None):
        raise UserError(f"adapter: its configuration says lora_alpha {told['lora_alpha']!r}; expected a number")
    return told


def _of_layer(pattern: Mapping[str, Any], name: str, usual: Any) -> Any:
    """What a pattern of peft's says of a layer, by the end of its name."""
    return pattern.get(get_pattern_key(pattern.keys(), name), usual)


def _row(magnitude: Tensor | None) -> Tensor | None:
    return None if magnitude is None else magnitude.flatten()


def _number(tensor: Tensor) -> float:
    """The only one that it holds; of another number of them none."""
    return float(tensor) if tensor.numel() == 1 and not tensor.is_complex() else math.nan


def _assumed(dialect: Dialect, updates: Mapping[str, Update]) -> tuple[str, ...]:
    ranks = sorted({update.rank for update in updates.values()})
    rank = str(ranks[0]) if len(ranks) == 1 else "RANK"
    if dialect in ("script", "peft"):
        other = f"if it was trained with alpha equal to its rank, give --lora-alpha {rank}"
        return (f"it says no alpha: assumed {_SCRIPT_ALPHA:g}, as the script of PixArt's authors trains; {other}",)
    other = f"if the script of PixArt's authors made it, give --lora-alpha {_SCRIPT_ALPHA:g}"
    return (f"it says no alpha: assumed its rank, so that its update counts as it is; {other}",)


def _cut(names: Sequence[str], update: Update) -> dict[str, Update]:
    """An update of a layer whose rows are these layers', as updates of theirs, without directions that end in zeros."""
    if len(names) == 1:
        return {names[0]: update}
    found = {}
    lengths: Sequence[Tensor | None] = [None] * len(names)
    if update.magnitude is not None:
        lengths = update.magnitude.chunk(len(names))
    for name, rows, length in zip(names, update.b.chunk(len(names)), lengths, strict=True):
        used = (rows != 0).any(dim=0)
        used[0] |= length is not None and not used.any()
        if used.any():
            found[name] = Update(update.a[used], rows[:, used].clone(), update.scale, length)
    return found


def _join(parts: Sequence[Update | None]) -> Update:
    """Updates of layers that are the rows of one, as an update of it; None: that one is not changed."""
    present = [part for part in parts if part is not None]
    if len(parts) == 1:
        return present[0]
    scale, rows = present[0].scale, len(present[0].b)
    b = present[0].b.new_zeros(rows * len(parts), sum(part.rank for part in present))
    column = 0
    for place, part in enumerate(parts):
        if part is not None:
            b[place * rows : (place + 1) * rows, column : column + part.rank] = part.b * (part.scale / scale)
            column += part.rank
    lengths = [part.magnitude for part in present if part.magnitude is not None]
    if lengths and len(lengths) < len(parts):
        raise UserError(
            "to: comfy has one layer where q, k and v are three, and this DoRA is not of all of them: their rows' "
            "lengths are not known; choose kohya, diffusers, peft or merged"
        )
    return Update(torch.cat([part.a for part in present]), b, scale, torch.cat(lengths) if lengths else None)


def from_peft(weights: Mapping[str, Tensor], settings: LoraSettings) -> dict[str, Update]:
    """The updates in the weights of an adapter of ours, by diffusers' layers."""
    pattern = settings.options.get("alpha_pattern") or {}
    updates = {}
    for (name,), values in _sorted_by_layer(weights)[1].items():
        alpha, rank = _of_layer(pattern, name, settings.alpha), len(values["a"])
        scale = alpha / (math.sqrt(rank) if settings.rslora else rank)
        updates[name] = Update(values["a"], values["b"], scale, _row(values.get("magnitude")))
    return updates


def to_peft(updates: Mapping[str, Update], prefix: str = "base_model.model.") -> dict[str, Tensor]:
    """As peft names them."""
    found: dict[str, Tensor] = {}
    for name, update in updates.items():
        found |= {f"{prefix}{name}.lora_A.weight": update.a, f"{prefix}{name}.lora_B.weight": update.b}
        if update.magnitude is not None:
            found[f"{prefix}{name}.lora_magnitude_vector"] = update.magnitude
    return found


def lora_settings(updates: Mapping[str, Update]) -> LoraSettings:
    """What peft is told of these: the usual rank and alpha, and those of the other layers."""
    rank = Counter(update.rank for update in updates.values()).most_common(1)[0][0]
    alphas = {name: update.scale * update.rank for name, update in updates.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    patterns = {
        "rank_pattern": {name: update.rank for name, update in updates.items() if update.rank != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
    }
    dora = {update.magnitude is not None for update in updates.values()}
    if len(dora) > 1:
        raise UserError("adapter: some of its layers are DoRA and others are not, which peft holds in no one adapter")
    options = {key: value for key, value in patterns.items() if value}
    return LoraSettings(rank, alpha, tuple(sorted(updates)), dora=dora.pop(), options=options)


def to_diffusers(updates: Mapping[str, Update]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As diffusers' `load_lora_adapter` takes them: the tensors, and the texts of the file's header."""
    settings = lora_settings(updates)
    config = {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": list(settings.targets),
        "use_dora": settings.dora,
        "rank_pattern": {},  # an older diffusers asks for both
        "alpha_pattern": {},
        **settings.options,
    }
    return to_peft(updates, "transformer."), diffusers_header(config)


def diffusers_header(config: Mapping[str, Any]) -> dict[str, str]:
    """The header of diffusers' file for an adapter with this configuration of peft's."""
    own = {f"transformer.{key}": value for key, value in config.items()}
    return {"format": "pt", _LORA: json.dumps(own, indent=2, sort_keys=True)}


def to_comfy(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """As ComfyUI names them: by the authors' own layers, each with its alpha."""
    depth = 1 + max((int(name.split(".")[1]) for name in updates if name.startswith("transformer_blocks.")), default=-1)
    joined = {
        theirs: _join([updates.get(name) for name in ours])
        for theirs, ours in layers(depth).items()
        if any(name in updates for name in ours)
    }
    return _with_alpha({f"diffusion_model.{name}": update for name, update in joined.items()})


def to_kohya(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """As kohya's scripts and OneTrainer name them, each with its alpha."""
    return _with_alpha({f"lora_transformer_{name.replace('.', '_')}": update for name, update in updates.items()})


def _with_alpha(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, update in updates.items():
        found |= {
            f"{name}.lora_down.weight": update.a,
            f"{name}.lora_up.weight": update.b,
            f"{name}.alpha": torch.tensor(update.scale * update.rank, dtype=torch.float32),
        }
        if update.magnitude is not None:
            found[f"{name}.dora_scale"] = update.magnitude[:, None]
    return found


def _read_factors(dialect: Dialect, found: Mapping[tuple[str, ...], Mapping[str, Tensor]]) -> Foreign:
    """LoKr or LoHa: the scale of each layer goes into its first factor, since peft holds one for all."""
    kinds = {part.partition("_")[0] for values in found.values() for part in values} - {"alpha", "magnitude"}
    if len(kinds) != 1 or any("magnitude" in values for values in found.values()):
        raise UserError(
            f"adapter: it holds {', '.join(sorted(kinds))} factors in one file, or DoRA of such, which peft cannot"
        )
    layers_of: dict[str, dict[str, Tensor]] = {}
    for names, values in found.items():
        layers_of |= _cut_factors(names, values)
    weights: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, values in layers_of.items():
        own, ranks[name] = _whole(name, values)
        weights |= {f"base_model.model.{name}.{part}": value for part, value in own.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: own for name, own in ranks.items() if own != rank}
    options: dict[str, Any] = {"r": rank, "alpha": rank}
    if others:
        options |= {"rank_pattern": others, "alpha_pattern": dict(others)}
    if any(part.endswith(("_t1", "_t2")) for part in weights):
        options["use_effective_conv2d"] = True
    if kinds == {"lokr"}:
        options |= {"decompose_both": any(part.endswith("lokr_w1_a") for part in weights)}
        options |= {"decompose_factor": _decompose_factor(layers_of.values())}
    settings = PeftSettings("LOHA" if kinds == {"hada"} else "LOKR", tuple(sorted(layers_of)), options)
    return Foreign(dialect, weights, settings)


def factors_to_kohya(weights: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """A LoKr or LoHa of ours, which peft's options describe, as LyCORIS names it."""
    _, found = _sorted_by_layer(weights)
    told: dict[str, Tensor] = {}
    alphas, ranks = options.get("alpha_pattern") or {}, options.get("rank_pattern") or {}
    for (name,), values in found.items():
        first = next(part for part in ("lokr_w1", "lokr_w1_a", "hada_w1_a") if part in values)
        scale = _of_layer(alphas, name, options["alpha"]) / _of_layer(ranks, name, options["r"])
        scaled = {**values, first: values[first] * scale}
        own = scaled | {"alpha": torch.tensor(float(_rank(values)))}
        told |= {f"lora_transformer_{name.replace('.', '_')}.{part}": value for part, value in own.items()}
    return told


def _rank(values: Mapping[str, Tensor]) -> int:
    """How many directions the factors have; of whole ones, at which rank peft leaves them whole."""
    parts = [part for part in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if part in values]
    return len(values[parts[0]]) if parts else max(values["lokr_w2"].shape[:2])


def factors_to_diffusers(
    weights: Mapping[str, Tensor], settings: PeftSettings
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A LoKr of ours as a diffusers takes it that knows LoKr: the tensors, and the texts of the file's header."""
    names = {f"transformer.{key.removeprefix('base_model.model.')}": value for key, value in weights.items()}
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    return names, diffusers_header({**settings.options, "target_modules": targets})


def _cut_factors(names: Sequence[str], values: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Factors of a layer whose rows are these layers': the ones that make the rows are cut."""
    if len(names) == 1:
        return {names[0]: dict(values)}
    rows = [part for part in values if part in ("hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w1_a")]
    if any("_t" in part for part in values) or any(len(values[part]) % len(names) for part in rows):
        raise UserError(f"adapter: the factors of {', '.join(names)} are one layer's and cannot be cut into theirs")
    cut = {part: values[part].chunk(len(names)) for part in rows}
    return {name: {**values, **{part: cut[part][place] for part in rows}} for place, name in enumerate(names)}


def _whole(name: str, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The factors of a layer, with its scale in the first of them, and their rank."""
    wanted = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} if "hada_w1_a" in values else set()
    first = [part for part in ("lokr_w1", "lokr_w1_a", "hada_w1_a") if part in values]
    second = [part for part in ("lokr_w2", "lokr_w2_b", "hada_w2_a") if part in values]
    if len(first) != 1 or len(second) != 1 or wanted - values.keys():
        raise UserError(f"adapter: {name} lacks factors, or has too many; it has {', '.join(sorted(values))}")
    rank = _rank(values)
    alpha = _number(values["alpha"]) if "alpha" in values else float(rank)
    if not (0 < alpha < math.inf):
        raise UserError(f"adapter: {name} has the alpha {alpha}; expected a number above 0")
    own = {part: value for part, value in values.items() if part != "alpha"}
    if first + second == ["lokr_w1", "lokr_w2"] or alpha == rank:  # of whole factors LyCORIS counts no alpha
        return own, rank
    return own | {first[0]: own[first[0]] * (alpha / rank)}, rank


def _decompose_factor(found: Iterable[Mapping[str, Tensor]]) -> int:
    """peft's setting by which it makes the factors of these sizes. Raises UserError if there is none."""
    splits = set()
    for values in found:
        upper = len(values["lokr_w1"] if "lokr_w1" in values else values["lokr_w1_a"])
        left = values["lokr_w1"].shape[1] if "lokr_w1" in values else values["lokr_w1_b"].shape[1]
        w2 = values.get("lokr_w2")
        if w2 is not None:
            lower, right = w2.shape[:2]
        elif "lokr_t2" in values:
            lower, right = values["lokr_w2_a"].shape[1], values["lokr_w2_b"].shape[1]
        else:
            lower, right = len(values["lokr_w2_a"]), values["lokr_w2_b"].shape[1]
        splits |= {(upper, lower), (left, right)}
    for factor in (-1, *sorted({outer for outer, _ in splits})):
        if all(factorization(outer * inner, factor) == (outer, inner) for outer, inner in splits):
            return factor
    raise UserError(f"adapter: peft makes no LoKr with factors of these sizes: {some(map(str, splits))}")
