"""The repeated blocks: computed again for their gradients, and compiled. Oracle: the same network left alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from pixart_ft.adapters.acting import limit_adapter
from pixart_ft.adapters.attach import attach
from pixart_ft.adapters.files import LoraSettings
from pixart_ft.errors import UserError
from pixart_ft.model.attention import use_kernels
from pixart_ft.model.base import Base
from pixart_ft.model.engine import check_engine
from pixart_ft.model.loading import load_transformer
from pixart_ft.model.network import network_output
from pixart_ft.model.repeated import checkpoint_blocks, compile_blocks
from pixart_ft.model.shared_calls import prepared
from pixart_ft.model.text import pad_text

BLOCKS = 5
CPU = torch.device("cpu")


@pytest.fixture
def transformer(tiny: Path) -> PixArtTransformer2DModel:
    """The tiny one with more blocks, a LoRA of some effect, its dropout on, and float32 weights."""
    small = load_transformer(Base.read(tiny), dtype=torch.float32)
    torch.manual_seed(0)
    found = PixArtTransformer2DModel.from_config({**small.config, "num_layers": BLOCKS})
    attach(found, LoraSettings(rank=2, alpha=4.0, dropout=0.2), seed=0)
    for name, parameter in found.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    use_kernels(found)
    return found.requires_grad_(False)


def inputs(rows: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, timesteps, text and mask."""
    draw = torch.Generator().manual_seed(rows)
    x, timesteps = torch.randn(rows, 4, 8, 8, generator=draw), torch.tensor([999, 500, 0])[:rows]
    return x, timesteps, *pad_text([torch.randn(length, 32, generator=draw) for length in (1, 9, 4)[:rows]])


def gradients(transformer: PixArtTransformer2DModel, rows: int = 3) -> dict[str, Tensor]:
    """Of every weight of the adapter, in training mode."""
    transformer.train()
    trained = {name: p.requires_grad_() for name, p in transformer.named_parameters() if ".lora_" in name}
    torch.manual_seed(0)  # the adapter's dropout
    network_output(transformer, *inputs(rows)).square().mean().backward()
    found = {name: p.grad for name, p in trained.items() if p.grad is not None}
    assert found.keys() == trained.keys()
    transformer.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(("every", "again"), [(1, 5), (2, 3), (3, 2), (7, 1)])
def test_checkpointed_blocks_have_the_same_gradients_to_the_bit(
    transformer: PixArtTransformer2DModel, monkeypatch: pytest.MonkeyPatch, every: int, again: int
) -> None:
    """And as many blocks as said are run twice."""
    whole, runs = BasicTransformerBlock.forward, []

    def counted(block: BasicTransformerBlock, *args: object, **kwargs: object) -> Tensor:
        runs.append(block)
        return whole(block, *args, **kwargs)

    monkeypatch.setattr(BasicTransformerBlock, "forward", counted)
    plain = gradients(transformer)
    assert len(runs) == BLOCKS
    checkpoint_blocks(transformer, every)
    runs.clear()
    found = gradients(transformer)
    assert len(runs) == BLOCKS + again
    assert all(torch.equal(found[name], gradient) for name, gradient in plain.items())


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def settle(transformer: PixArtTransformer2DModel, backend: str) -> None:
    compile_blocks(transformer, backend)
    torch._dynamo.utils.counters.clear()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("backend", "every"), [("aot_eager", 0), ("aot_eager", 2), ("inductor", 2)])
def test_compiled_blocks_train_alike(transformer: PixArtTransformer2DModel, backend: str, every: int) -> None:
    """With and without checkpoints, for another number of rows, and after the weights were swapped in place."""
    for module in transformer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # compiled code draws other numbers
    if every:
        checkpoint_blocks(transformer, every)
    names = list(transformer.state_dict())
    weights = [p for name, p in transformer.named_parameters() if ".lora_" in name]

    def course() -> list[dict[str, Tensor]]:
        own = [weight.detach().clone() for weight in weights]
        found = [gradients(transformer), gradients(transformer, 2)]
        with torch.no_grad():
            for weight in weights:
                weight.mul_(0.5)  # as an average that is applied
        found.append(gradients(transformer))
        with torch.no_grad():
            for weight, value in zip(weights, own, strict=True):
                weight.copy_(value)
        return found

    plain = course()
    settle(transformer, backend)
    compiled = course()
    assert list(transformer.state_dict()) == names
    for mine, theirs in zip(compiled, plain, strict=True):
        for name, gradient in theirs.items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
    # one code for all blocks, not one for each
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] < BLOCKS * len(plain)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_sample_alike(transformer: PixArtTransformer2DModel, backend: str) -> None:
    """Both branches or one, inside and outside of the interval that the adapter acts in, text after text."""
    transformer.eval()
    limit_adapter(transformer, (400, 1000))
    _, _, embeds, mask = inputs()
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def course() -> list[Tensor]:
        found = []
        with torch.no_grad():
            for text in (embeds, embeds.flip(0)):
                with prepared(transformer, text, mask, (8, 8)) as network:
                    for rows, timestep in ((3, 999), (2, 500), (3, 300), (3, 999)):
                        found.append(network(x[:rows], torch.tensor([timestep]).expand(rows)))
        return found

    plain = course()
    assert not torch.allclose(plain[0], plain[4], rtol=1e-2)  # else a text of before would be as good
    settle(transformer, backend)
    for mine, theirs in zip(course(), plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_no_compiler_is_told_before_anything_is_loaded() -> None:
    from torch._inductor import config as inductor  # takes seconds

    with (
        inductor.patch({"cpp.cxx": ("/no/such/compiler",)}),
        pytest.raises(UserError, match=r"model\.compile: nothing can be compiled for cpu .*/no/such/compiler.* g\+\+"),
    ):
        check_engine("sdpa", True, CPU, torch.float32, "model.")
