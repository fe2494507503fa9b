"""The network with its text and positions computed once, on the tiny transformer.

Oracle: the same network called plainly, `network_output`, whose output it must give to the bit; forward hooks, which
count what is run; and the transformer's own parts, which must be found untouched afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models import embeddings
from torch import Tensor, nn

from pixart_ft.adapters.acting import merge
from pixart_ft.adapters.attach import attach
from pixart_ft.adapters.files import DEFAULT_TARGETS, LoraSettings
from pixart_ft.model import shared_calls as module
from pixart_ft.model.attention import KERNELS, Kernels, use_kernels
from pixart_ft.model.base import Base
from pixart_ft.model.loading import load_transformer
from pixart_ft.model.network import network_output
from pixart_ft.model.shared_calls import Network, prepared
from pixart_ft.model.text import pad_text

LENGTHS = (1, 9, 4, 7)  # tokens of each row
CALLS = ((4, 999), (2, 500), (4, 333.25), (2, 0))  # rows and timestep: all, or the last, in turn
NATIVE = (8, 8)
SIZES = (NATIVE, (12, 16), (16, 8), (4, 16))  # the last has as many patches as the native one


class Precision(NamedTuple):
    weights: torch.dtype
    autocast: torch.dtype | None

    @contextmanager
    def active(self) -> Iterator[None]:
        with torch.no_grad(), torch.autocast("cpu", dtype=self.autocast, enabled=self.autocast is not None):
            yield


PRECISIONS = {
    "float32": Precision(torch.float32, None),
    "bfloat16": Precision(torch.bfloat16, None),
    "autocast": Precision(torch.float32, torch.bfloat16),
    "bfloat16 under autocast": Precision(torch.bfloat16, torch.bfloat16),
}


@pytest.fixture(params=list(PRECISIONS))
def precision(request: pytest.FixtureRequest) -> Precision:
    return PRECISIONS[request.param]


def texts(seed: int = 0, width: int = 32) -> tuple[Tensor, Tensor]:
    """Embeddings and mask of the rows, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return pad_text([torch.randn(length, width, generator=generator) for length in LENGTHS])


def calls(size: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """The arguments of each of `CALLS`."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 4, *size, generator=generator), torch.tensor([timestep]).expand(rows))
        for rows, timestep in CALLS
    ]


def plainly(transformer: nn.Module, embeds: Tensor, mask: Tensor) -> Network:
    return lambda x, timesteps: network_output(transformer, x, timesteps, embeds[-len(x) :], mask[-len(x) :])


def check_same(transformer: nn.Module, precision: Precision, size: tuple[int, int], width: int = 32) -> None:
    """Each call of the prepared network gives the plain one's bytes."""
    embeds, mask = texts(width=width)
    arguments, plain = calls(size), plainly(transformer, embeds, mask)
    with precision.active():
        wanted = [plain(*call) for call in arguments]
        with prepared(transformer, embeds, mask, size) as network:
            found = [network(*call) for call in arguments]
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == torch.float32
    # Else rows mixed up, or a text that is not heard, would be as good.
    with precision.active():
        assert not torch.equal(plainly(transformer, embeds.flip(0), mask.flip(0))(*arguments[0]), wanted[0])


def with_lora(transformer: PixArtTransformer2DModel) -> None:
    """A LoRA of large random effect on every attention and on the text's projection."""
    targets = (*DEFAULT_TARGETS, "caption_projection.linear_1")
    attach(transformer, LoraSettings(rank=4, alpha=6.0, targets=targets), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("size", [NATIVE, (12, 16)])
def test_output_is_the_plain_networks_to_the_bit(tiny: Path, precision: Precision, size: tuple[int, int]) -> None:
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32).to(precision.weights)  # its positions too
    check_same(transformer, precision, size)


@pytest.mark.parametrize("size", SIZES[2:])
def test_other_sizes(tiny: Path, size: tuple[int, int]) -> None:
    check_same(load_transformer(Base.read(tiny), dtype=torch.float32), PRECISIONS["float32"], size)


@pytest.mark.parametrize("merged", [False, True])
def test_with_a_lora(tiny: Path, precision: Precision, merged: bool) -> None:
    transformer = load_transformer(Base.read(tiny), dtype=precision.weights)
    call, plain = calls(NATIVE)[0], plainly(transformer, *texts())
    with torch.no_grad():
        base = plain(*call)
        with_lora(transformer)
        if merged:
            merge(transformer)
        assert (plain(*call) - base).abs().max() > 0.1
    check_same(transformer, precision, NATIVE)


def test_with_the_processors_of_training(tiny: Path, precision: Precision) -> None:
    transformer = load_transformer(Base.read(tiny), dtype=precision.weights)
    use_kernels(transformer)
    check_same(transformer, precision, NATIVE)


def test_the_networks_own_kernels_are_kept(tiny: Path) -> None:
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    use_kernels(transformer, Kernels(image="headwise", text="plain"))
    with prepared(transformer, *texts(), NATIVE):
        found = {(".attn2." in name, processor.kernel) for name, processor in transformer.attn_processors.items()}
    assert found == {(False, KERNELS["headwise"]), (True, KERNELS["plain"])}


def test_network_without_a_caption_projection() -> None:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        cross_attention_dim=32,
        caption_channels=None,
        sample_size=8,
        out_channels=8,
        interpolation_scale=0.125,
        use_additional_conditions=False,
    ).eval()
    assert transformer.caption_projection is None
    check_same(transformer, PRECISIONS["float32"], NATIVE)
    assert transformer.caption_projection is None


def test_the_next_texts_are_not_the_last_ones(tiny: Path) -> None:
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    call = calls(NATIVE)[0]
    outputs = []
    with torch.no_grad():
        for seed in (0, 1, 0):
            wanted = plainly(transformer, *texts(seed))(*call)
            with prepared(transformer, *texts(seed), NATIVE) as network:
                outputs.append(network(*call))
            assert torch.equal(outputs[-1], wanted)
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


def run_counts(transformer: PixArtTransformer2DModel, run: Callable[[], object]) -> dict[str, list[int]]:
    """Rows of the input of every run of a text layer, and of two layers that must run at each call."""
    layers = {"caption_projection": transformer.caption_projection}
    for index, block in enumerate(transformer.transformer_blocks):
        layers |= {f"{index}.to_k": block.attn2.to_k, f"{index}.to_v": block.attn2.to_v}
        layers |= {f"{index}.to_q": block.attn2.to_q, f"{index}.own to_k": block.attn1.to_k}
    ran: dict[str, list[int]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_hook(lambda _, args, __, name=name: ran[name].append(len(args[0])))
        for name, layer in layers.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return ran


@pytest.mark.parametrize("lora", [False, True])
def test_text_layers_run_once_for_each_number_of_rows(tiny: Path, lora: bool) -> None:
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    if lora:
        with_lora(transformer)
    embeds, mask = texts()
    arguments = calls(NATIVE)
    rows = [len(x) for x, _ in arguments]

    def run() -> None:
        with torch.no_grad(), prepared(transformer, embeds, mask, NATIVE) as network:
            for call in arguments:
                network(*call)

    for _ in range(2):  # anew in each context
        for name, ran in run_counts(transformer, run).items():
            text = name == "caption_projection" or name.endswith((".to_k", ".to_v"))
            assert ran == ([4, 2] if text else rows), name
    assert rows == [4, 2, 4, 2]


@pytest.mark.parametrize("size", SIZES)
def test_positions_are_computed_once(tiny: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    computed: list[object] = []
    compute = embeddings.get_2d_sincos_pos_embed

    def counted(*args: object, **kwargs: object) -> Tensor:
        computed.append(kwargs.get("grid_size"))
        return compute(*args, **kwargs)

    monkeypatch.setattr(embeddings, "get_2d_sincos_pos_embed", counted)
    monkeypatch.setattr(module, "get_2d_sincos_pos_embed", counted)
    embeds, mask = texts()
    with torch.no_grad():
        with prepared(transformer, embeds, mask, size) as network:
            for call in calls(size):
                network(*call)
        grid = (size[0] // 2, size[1] // 2)
        assert computed == ([] if size == NATIVE else [grid])
        computed.clear()
        for call in calls(size):
            plainly(transformer, embeds, mask)(*call)
    assert computed == ([] if size == NATIVE else [grid] * len(calls(size)))


class Parts(NamedTuple):
    """What `prepared` changes while it lasts."""

    processors: dict[str, object]
    projection: nn.Module | None
    patches: nn.Module
    positions: Tensor
    grid: tuple[int, int]
    buffers: list[str]
    children: list[str]

    @classmethod
    def of(cls, transformer: PixArtTransformer2DModel) -> "Parts":
        patches = transformer.pos_embed
        return cls(
            dict(transformer.attn_processors),
            transformer.caption_projection,
            patches,
            patches.pos_embed,
            (patches.height, patches.width),
            [name for name, _ in transformer.named_buffers()],
            [name for name, _ in transformer.named_modules()],
        )

    def check(self, other: "Parts") -> None:
        """The same objects, not only equal ones."""
        assert list(other.processors) == list(self.processors)
        assert all(other.processors[name] is processor for name, processor in self.processors.items())
        assert other.projection is self.projection and other.patches is self.patches
        assert other.positions is self.positions
        assert (other.grid, other.buffers, other.children) == (self.grid, self.buffers, self.children)


@pytest.mark.parametrize("fault", [None, "between", "in the network"])
@pytest.mark.parametrize("size", [NATIVE, (12, 16)])
def test_transformer_is_as_it_was(tiny: Path, size: tuple[int, int], fault: str | None) -> None:
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    if size == NATIVE:  # with processors of its own, or diffusers'
        use_kernels(transformer)
    embeds, mask = texts()
    call = calls(size)[0]
    before, state = Parts.of(transformer), {k: v.clone() for k, v in transformer.state_dict().items()}
    positions = before.positions.clone()
    with torch.no_grad():
        wanted = plainly(transformer, embeds, mask)(*call)

    def run() -> None:
        with torch.no_grad(), prepared(transformer, embeds, mask, size) as network:
            network(*call)
            assert transformer.caption_projection is not before.projection
            if fault == "between":
                raise KeyboardInterrupt
            if fault == "in the network":
                network(call[0], call[1].double())

    if fault is None:
        run()
    else:
        with pytest.raises(KeyboardInterrupt if fault == "between" else ValueError):
            run()
    before.check(Parts.of(transformer))
    assert torch.equal(transformer.pos_embed.pos_embed, positions)
    after = transformer.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], tensor) for name, tensor in state.items())
    with torch.no_grad():
        assert torch.equal(plainly(transformer, embeds, mask)(*call), wanted)


class Wrapped(nn.Module):
    """Another module around the transformer, as a compiler's or a profiler's is; notes the text of each call."""

    def __init__(self, transformer: PixArtTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.texts: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, **arguments: Tensor) -> tuple[Tensor]:
        self.texts.append((arguments["encoder_hidden_states"], arguments["encoder_attention_mask"]))
        output: tuple[Tensor] = self.transformer(x, **arguments)
        return output


@pytest.mark.parametrize("size", [NATIVE, (12, 16)])
def test_any_other_module_is_called_plainly(tiny: Path, size: tuple[int, int]) -> None:
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    wrapped, before = Wrapped(transformer), Parts.of(transformer)
    embeds, mask = texts()
    arguments = calls(size)
    with torch.no_grad():
        wanted = [plainly(transformer, embeds, mask)(*call) for call in arguments]
        with prepared(wrapped, embeds, mask, size) as network:
            before.check(Parts.of(transformer))
            found = [network(*call) for call in arguments]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))
    for (x, _), (text, real) in zip(arguments, wrapped.texts, strict=True):
        assert torch.equal(text, embeds[-len(x) :]) and torch.equal(real, mask[-len(x) :])
