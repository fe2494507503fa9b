"""The memory that each stage of a training will need, before anything is loaded.

A stage's calls are made on tensors that have shapes, types and lives but no values (torch's FakeTensorMode), and the
bytes alive at a time are counted: no formula of ours, so that whatever the libraries keep for a backward pass is in it.
A GPU is played by the processor, with the differences that count: see `_network`.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pixart_ft.config.train import Quantization, TrainConfig
from pixart_ft.data.cache import CAPTIONS_AT_ONCE, pictures_at_once
from pixart_ft.diffusion.intervals import WHOLE
from pixart_ft.model import loading
from pixart_ft.model.attention import Kernels, use_kernels
from pixart_ft.model.base import Base
from pixart_ft.model.network import network_output
from pixart_ft.model.projection import projected_width, take_projected
from pixart_ft.model.quantized import bytes_saved
from pixart_ft.model.repeated import checkpoint_blocks
from pixart_ft.model.weights import CHUNK
from pixart_ft.training.encode import compute_dtype, text_dtype
from pixart_ft.training.kinds import Kind, count, kind_of, stand_in, weights_dtype
from pixart_ft.training.objective import build_objective
from pixart_ft.training.optimizers import build_optimizer
from pixart_ft.training.start import resolution_of

_PIECES, _PIECE = 64, 64 * 64  # weights that an optimizer is tried on: so many matrices, each large enough for 8 bits


@dataclass(frozen=True)
class Need:
    """Bytes of a stage at its peak, by what they are for; last what lies there only then."""

    parts: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """All together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Case:
    """What is predicted: a configuration whose precision is settled, its base, and what the data and the machine say.

    resolution   of the pictures, pixels
    kind         what is trained
    tokens       of the longest caption
    on_gpu       whether a CUDA GPU does it; else the processor
    """

    config: TrainConfig
    base: Base
    resolution: int
    kind: Kind
    tokens: int
    on_gpu: bool

    @classmethod
    def of(cls, config: TrainConfig, base: Base, *, tokens: int | None, on_gpu: bool) -> Self:
        """tokens: None where they are not known: as many as the configuration allows.

        Raises UserError for what does not fit the base.
        """
        objective, _ = build_objective(config, base)
        kind = stand_in(kind_of(config, base, objective), base)
        return cls(config, base, resolution_of(config, base), kind, tokens or config.data.max_tokens, on_gpu)

    def counts(self) -> tuple[int, int]:
        """Of the weights that are trained, and of all of the network's."""
        network = loading.skeleton(self.base)
        whole = sum(p.numel() for p in network.parameters())
        return count(self.kind.trained(network)), whole


def captions(case: Case) -> Need | None:
    """T5 encoding a batch of the longest captions; None for a base that has no T5."""
    if case.base.text_encoder is None:
        return None
    dtype, shape = text_dtype(case.config), (CAPTIONS_AT_ONCE, case.tokens)
    kept = "wo" if dtype == torch.float16 else None  # see `load_text_encoder`
    return _call(
        loading.text_encoder_skeleton(case.base),
        dtype,
        lambda encoder: encoder(input_ids=torch.zeros(shape, dtype=torch.int64)),
        float32=kept,
        few_bits=case.config.model.text_encoder_quantization,
    )


def pictures(case: Case) -> Need:
    """The VAE's encoder on a batch of pictures."""
    side = case.resolution
    return _call(
        loading.vae_skeleton(case.base),
        torch.float32,
        lambda vae: vae.encode(torch.empty(pictures_at_once((side, side)), 3, side, side)),
    )


def training(case: Case) -> Need:
    """An optimizer step in the middle of a run, at its peak: in the backward pass, or when the optimizer moves."""
    weights, trained, *peaks = _extrapolated(case, _training_peaks)
    kept, passing = _optimizer_bytes(case, trained)
    together = not case.config.optim.in_backward
    gradients, passing = (trained * _width(case), passing) if together else (0, 0)  # else a weight at a time
    at_once = max(*peaks, weights + gradients + passing) - weights - gradients
    parts = {"gradients": gradients, "optimizer": kept, "average": _average_bytes(case, trained), **_live(case)}
    return Need({"weights": weights, **parts, "activations": max(0, at_once)})


def _live(case: Case) -> dict[str, int]:
    """What VAE and T5 need, one after the other, beside the training, where it encodes what it draws."""
    found = [need for need in (captions(case), pictures(case)) if need is not None] if case.config.data.live else []
    if not found:
        return {}
    return {"VAE and T5": sum(need.parts["weights"] for need in found) + max(n.parts["activations"] for n in found)}


def samples(case: Case) -> Need:
    """The sample grid of a run: a call of the network for the pictures of one prompt, or a picture through the VAE."""
    weights, trained, most = _extrapolated(case, _sampling_peaks)
    side = case.resolution // case.base.vae_factor
    channels = case.base.transformer.get("in_channels", 4)
    vae = loading.decoder_only(loading.vae_skeleton(case.base))
    drawn = _call(vae, torch.float32, lambda vae: vae.decode(torch.empty(1, channels, side, side)))
    average = _average_bytes(case, trained)
    parts = {
        "optimizer": _optimizer_bytes(case, trained)[0],
        "average": average + (trained * _width(case) if average else 0),  # the weights that it stands in for
        "VAE": drawn.parts["weights"],
    }
    return Need({"weights": weights, **parts, "activations": max(most - weights, drawn.parts["activations"])})


def on_disk(case: Case) -> Need:
    """What the run's folder will hold at most, beside its log and pictures."""
    choice, every = case.config.train, case.config.validation.samples_every
    trained, weights = case.counts()
    state = trained * _width(case) + _optimizer_bytes(case, trained)[0] + _average_bytes(case, trained, anywhere=True)
    grids = choice.steps // every if every else 0
    if case.kind.what == "model":
        grids = min(grids, choice.keep_checkpoints)
    results = grids + 1 + (2 if _average_bytes(case, trained, anywhere=True) else 1)  # the lowest, and the last
    one = 4 * (weights if case.kind.what == "model" else trained)
    # a new one is written before the oldest goes
    return Need({"checkpoints": (choice.keep_checkpoints + 1) * state, f"{case.kind.what}s": results * one})


# Calls without values


class _Living(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, or shown to it, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self._most = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.see(leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
        return found

    def see(self, tensors: Any) -> None:
        """Count these too; views of one storage count once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self._most = max(self._most, self.now)
                weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def forget(self, count: int) -> None:
        """Count so many bytes less, which would not be there."""
        self.now = self._most = self.now - count

    def peak(self) -> int:
        """The most since the last time this was asked."""
        most, self._most = self._most, self.now
        return most


@contextmanager
def _without_values(*modules: nn.Module, dtype: torch.dtype, float32: str | None = None) -> Iterator[_Living]:
    """Within, these modules of the meta device lie on the processor, without values, as does whatever is made.

    What is frozen is held in `dtype`, but in float32 where its name has the word `float32`.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}  # one weight may stand at two places

    def stand_in(name: str, p: nn.Parameter) -> nn.Parameter:
        kept = p.requires_grad or not p.is_floating_point() or (float32 is not None and float32 in name.split("."))
        return nn.Parameter(torch.empty(p.shape, dtype=p.dtype if kept else dtype), requires_grad=p.requires_grad)

    with FakeTensorMode(allow_non_fake_inputs=True), _Living() as living:
        for prefix, part in chain.from_iterable(module.named_modules() for module in modules):
            for name, p in list(part.named_parameters(recurse=False)):
                if p not in made:
                    made[p] = stand_in(f"{prefix}.{name}", p)
                setattr(part, name, made[p])
            for name, b in list(part.named_buffers(recurse=False)):
                setattr(part, name, torch.empty(b.shape, dtype=b.dtype))
        yield living


def _call(
    module: nn.Module,
    dtype: torch.dtype,
    call: Callable[[Any], object],
    *,
    float32: str | None = None,
    few_bits: Quantization = "none",
) -> Need:
    """Of one call for its result alone."""
    module.requires_grad_(False).eval()
    with _without_values(module, dtype=dtype, float32=float32) as living, torch.no_grad():
        living.forget(bytes_saved(module, few_bits, dtype))
        weights = living.now
        call(module)
        return Need({"weights": weights, "activations": living.peak() - weights})


# The network. Its blocks are alike, so that what is true of two short ones tells of a long one


def _extrapolated(case: Case, numbers: Callable[[Case, int], list[int]]) -> list[int]:
    """The numbers of a network of so many blocks, for as many as the base has.

    Each grows by the same for every block, or for every k blocks where every k-th is another: between the last k and
    the first k, a backward pass has no peak of its own, since on the way it grows or falls evenly.
    """
    blocks, period = case.base.transformer["num_layers"], _period(case.config)
    short = 2 * period + blocks % period
    if short + period >= blocks or not _blocks_are_alike(case.config):
        return numbers(case, blocks)
    times = (blocks - short) // period
    few, more = numbers(case, short), numbers(case, short + period)
    return [one + times * (other - one) for one, other in zip(few, more, strict=True)]


def _period(config: TrainConfig) -> int:
    """After how many blocks they repeat."""
    return int(config.model.gradient_checkpointing) or 1


def _blocks_are_alike(config: TrainConfig) -> bool:
    """Whether nothing is said of single blocks: by their names, or in the words that peft has for them."""
    choice = config.adapter
    words = [*choice.targets, *choice.trainable, *choice.options]
    return not any("blocks" in word or word.startswith("layers_") for word in words)


def _kernel(case: Case) -> str:
    """Of attention; those that keep as much as torch's own choice are played by that."""
    asked = case.config.model.attention
    short = asked in ("by_shape", "auto") and not case.on_gpu  # may take the plain one
    return "by_shape" if short else "plain" if asked == "plain" else "sdpa"


@dataclass
class _Network:
    """A network of some blocks, prepared as training does, and a batch for it. Made inside of `_network`."""

    living: _Living
    module: Any
    trained: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Of the weights that are trained."""
        return sum(p.numel() for p in self.trained.values())

    def call(self, case: Case, rows: int) -> Tensor:
        """The output for a batch."""
        side = case.resolution // case.base.vae_factor
        about = case.base.transformer
        channels, width = (about.get(key, 4) for key in ("in_channels", "caption_channels"))
        width = projected_width(case.base) if case.config.data.project_captions else width
        x = torch.empty(rows, channels, side, side)
        t, mask = (torch.ones(shape, dtype=torch.int64) for shape in ((rows,), (rows, case.tokens)))
        embeds = torch.empty(rows, case.tokens, width, dtype=text_dtype(case.config))
        dtype = compute_dtype(case.config)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            return network_output(self.module, x, t, embeds, mask)


@contextmanager
def _network(case: Case, blocks: int) -> Iterator[_Network]:
    config = case.config
    shorter = replace(case.base, transformer={**case.base.transformer, "num_layers": blocks})
    module = loading.skeleton(shorter).requires_grad_(False)
    case.kind.prepare(module, seed=config.run.seed, interval=WHOLE, device=torch.device("meta"))
    if config.data.project_captions:
        take_projected(module)
    if every := int(config.model.gradient_checkpointing):
        checkpoint_blocks(module, every)
    if case.on_gpu:  # which is played by the processor
        for norm in (part for part in module.modules() if isinstance(part, nn.LayerNorm)):
            norm.register_forward_pre_hook(_widened)
    kernel = _kernel(case)
    use_kernels(module, Kernels(kernel, kernel))
    module.train()
    with _without_values(module, dtype=weights_dtype(config)) as living:
        living.forget(bytes_saved(module, config.model.quantization, weights_dtype(config)))
        yield _Network(living, module, {name: p for name, p in module.named_parameters() if p.requires_grad})


def _training_peaks(case: Case, blocks: int) -> list[int]:
    """Bytes of the weights, how many are trained, and three peaks: forward; backward, at the end and the beginning."""
    with _network(case, blocks) as network:
        weights = network.living.now
        peaks: list[int] = []
        for p in network.trained.values():
            if case.config.train.accumulation > 1:  # those of the earlier micro-batches
                p.grad = torch.empty_like(p)
            if case.config.optim.in_backward:
                p.register_post_accumulate_grad_hook(_dropped)

        def mark(*_: object) -> None:
            peaks.append(network.living.peak())

        def watch(block: nn.Module, inputs: object, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(mark)

        period = _period(case.config)
        edges = {blocks - 1 - period, period - 1} if blocks >= 2 * period else set()
        hooks = [network.module.transformer_blocks[number].register_forward_hook(watch) for number in edges]
        loss = network.call(case, case.config.train.batch_size).square().mean()
        mark()
        for hook in hooks:
            hook.remove()  # a checkpointed block is called again
        loss.backward()
        mark()
        ends = [peaks[1], peaks[-1]] if _blocks_are_alike(case.config) else [max(peaks)] * 2
        return [weights, network.count, peaks[0], *ends]


def _sampling_peaks(case: Case, blocks: int) -> list[int]:
    """Bytes of the weights, how many are trained, and the peak of a call without gradients."""
    choice = case.config.validation
    with _network(case, blocks) as network, torch.no_grad():
        weights = network.living.now
        network.module.eval()
        network.call(case, len(choice.seeds) * (2 if choice.guidance > 1 else 1))
        return [weights, network.count, network.living.peak()]


def _dropped(weight: Tensor) -> None:
    weight.grad = None


def _widened(norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    """CUDA's autocast, other than the processor's, computes the norms of layers in float32."""
    return (inputs[0].float(),) if torch.is_autocast_enabled("cpu") else None


# The optimizer, and what it leaves


def _width(case: Case) -> int:
    """Bytes of a trained weight, and of its gradient."""
    return 2 if case.config.optim.stochastic_rounding else 4


def _average_bytes(case: Case, trained: int, *, anywhere: bool = False) -> int:
    choice = case.config.train
    elsewhere = choice.ema_on_cpu and case.on_gpu and not anywhere
    is_on = choice.ema_decay and case.config.optim.optimizer != "schedule_free"
    return 4 * trained if is_on and not elsewhere else 0


def _optimizer_bytes(case: Case, trained: int) -> tuple[int, int]:
    """Bytes that an optimizer of so many weights keeps, and that its step needs beside.

    Found by a step on a few small matrices, which have values: 8-bit optimizers know no others.
    """
    choice = case.config.optim.model_copy(update={"groups": ()})
    dtype = torch.bfloat16 if choice.stochastic_rounding else torch.float32
    side = math.isqrt(_PIECE)
    pieces = {
        f"transformer_blocks.{number}.weight": nn.Parameter(torch.zeros(side, side, dtype=dtype))
        for number in range(_PIECES)
    }
    optimizer = build_optimizer(choice, pieces, seed=0)
    for p in pieces.values():
        p.grad = torch.ones_like(p)
    with _Living() as living:
        living.see([*pieces.values(), *(p.grad for p in pieces.values())])
        before = living.now
        optimizer.step()
        kept = sum(map(_size, _tensors(optimizer)))
        passing = max(0, living.peak() - before - kept)
    for_all = trained / (_PIECES * _PIECE)
    at_a_time = min(trained, CHUNK) / (_PIECES * _PIECE) if choice.stochastic_rounding else for_all
    return round(kept * for_all), round(passing * at_a_time)


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [x for x in tree_leaves(optimizer.state_dict()["state"]) if isinstance(x, Tensor)]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
