"""What a run trained, as others read it. Oracles: peft's and diffusers' loaders; ComfyUI's and kohya's by hand."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.loaders import PeftAdapterMixin
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from pixart_ft.adapters.acting import load_adapter
from pixart_ft.adapters.attach import attach
from pixart_ft.adapters.export import export, low_rank
from pixart_ft.adapters.files import DEFAULT_TARGETS, Adapter, LoraSettings, PeftSettings
from pixart_ft.adapters.full import save_model
from pixart_ft.adapters.weights import save_adapter
from pixart_ft.cli import main
from pixart_ft.config.export import ExportConfig
from pixart_ft.config.train import TARGETS
from pixart_ft.errors import UserError
from pixart_ft.model.base import Base
from pixart_ft.model.loading import fingerprint, load_transformer
from pixart_ft.model.original import to_diffusers, to_original
from pixart_ft.model.quantized import quantize
from tests.helpers.adapters import metadata_of
from tests.helpers.foreign import comfy_merged, kohya_merged
from tests.helpers.networks import call

FULL_RANK = 64  # of the largest matrices of the tiny network
KINDS: dict[str, LoraSettings | PeftSettings | None] = {
    "lora": LoraSettings(4, 6.0, (*TARGETS["all-linear"], "pos_embed.proj")),
    "rslora": LoraSettings(4, 6.0, rslora=True),
    "dora": LoraSettings(4, 6.0, TARGETS["attention+mlp"], dora=True),
    "qlora": LoraSettings(4, 6.0),
    "lokr": PeftSettings("LOKR", DEFAULT_TARGETS, {"r": 2, "alpha": 4, "decompose_both": True}),
    "loha": PeftSettings("LOHA", DEFAULT_TARGETS, {"r": 2, "alpha": 4}),
    "oft": PeftSettings("OFT", DEFAULT_TARGETS, {"r": 0, "oft_block_size": 8}),
    "full": None,
}
NEAREST = [("full", to) for to in ("peft", "diffusers", "comfy", "kohya")]
NEAREST += [("lokr", "comfy"), ("loha", "comfy"), ("loha", "diffusers")]
NEAREST += [("oft", to) for to in ("diffusers", "comfy", "kohya")]


class Stock(PixArtTransformer2DModel, PeftAdapterMixin):
    """The stock network with diffusers' loader of adapters."""


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensor]]:
    """The folder of what was trained by a kind, and what its network gives."""
    made: dict[str, tuple[Path, Tensor]] = {}

    def make(kind: str) -> tuple[Path, Tensor]:
        if kind not in made:
            place = tmp_path_factory.mktemp(kind) / "result"
            made[kind] = _train(KINDS[kind], tiny, place, bits=4 if kind == "qlora" else 32)
        return made[kind]

    return make


def _train(settings: LoraSettings | PeftSettings | None, tiny: Path, folder: Path, bits: int) -> tuple[Path, Tensor]:
    """Of what was trained on a base of 4 bits, what it gives on the base itself, which every reader has."""
    base = Base.read(tiny)
    network = load_transformer(base, dtype=torch.float32)
    lora = settings if isinstance(settings, LoraSettings) else LoraSettings(4, 6.0)
    metadata = metadata_of(fingerprint(network), lora, base=str(tiny))
    draw = torch.Generator().manual_seed(1)
    if settings is None:
        for name, parameter in network.named_parameters():
            if "attn" in name and name.endswith("weight"):
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
        metadata = replace(metadata, kind="full", rank=None, alpha=None)
        save_model(folder, network, base, metadata, torch.zeros(1, 32), whole=False)
        return folder, call(network)
    quantize(network, "nf4" if bits == 4 else "none", dtype=torch.float32, device="cpu")
    attach(network, settings, seed=0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    if isinstance(settings, PeftSettings):
        metadata = replace(metadata, kind="peft", rank=None, alpha=None)
    save_adapter(folder, network, metadata, torch.zeros(1, 32))
    if bits == 4:
        network = load_transformer(base, dtype=torch.float32)
        load_adapter(network, Adapter.read(folder))
    return folder, call(network)


def written(folder: Path, out: Path, to: Any, **more: Any) -> list[str]:
    return export(ExportConfig(run=folder, to=to, out=out, **more))


def read_back(out: Path, to: str, tiny: Path) -> PixArtTransformer2DModel:
    """The network that the reader of a dialect makes of an exported folder."""
    if to == "merged":
        return PixArtSigmaPipeline.from_pretrained(str(out)).transformer
    network = load_transformer(Base.read(tiny), dtype=torch.float32)
    if to == "peft":
        return PeftModel.from_pretrained(network, str(out))
    if to == "diffusers":
        network.__class__ = Stock
        network.load_lora_adapter(str(out), weight_name="pytorch_lora_weights.safetensors")
        return network
    (file,) = out.iterdir()
    weights = network.state_dict()
    if to == "kohya":
        merged = kohya_merged(weights, load_file(file))
    else:
        merged = to_diffusers(comfy_merged(to_original(weights)[0], load_file(file)))[0]
    network.load_state_dict(merged)
    return network


@pytest.mark.parametrize("to", ["peft", "diffusers", "comfy", "kohya", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_everybody_draws_what_was_trained(
    trained: Callable[[str], tuple[Path, Tensor]], tiny: Path, tmp_path: Path, kind: str, to: str
) -> None:
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
    folder, expected = trained(kind)
    assert (expected - call(load_transformer(Base.read(tiny), dtype=torch.float32))).abs().max() > 0.05
    nearest = {"rank": FULL_RANK} if (kind, to) in NEAREST else {}
    facts = written(folder, tmp_path / "out", to, **nearest)
    assert any("nearest LoRA of rank 64" in fact for fact in facts) == ((kind, to) in NEAREST)
    if (kind, to) == ("lokr", "diffusers") and not _knows_lokr():
        pytest.skip("this diffusers reads no LoKr")
    torch.testing.assert_close(call(read_back(tmp_path / "out", to, tiny)), expected, rtol=1e-5, atol=1e-5)
    if to == "merged":
        assert torch.equal(
            call(load_transformer(Base.read(tmp_path / "out"), dtype=torch.float32)),
            call(read_back(tmp_path / "out", to, tiny)),
        )


def test_the_page_puts_an_export_into_a_stock_pipeline(trained: Any, tiny: Path, tmp_path: Path) -> None:
    folder, expected = trained("dora")
    written(folder, tmp_path / "out", "diffusers")
    page = (Path(__file__).parents[2] / "docs" / "other_programs.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    names: dict[str, Any] = {"base": str(tiny), "folder": str(tmp_path / "out")}
    exec(code, names)
    torch.testing.assert_close(call(names["pipeline"].transformer), expected, rtol=1e-5, atol=1e-5)


def _knows_lokr() -> bool:
    from diffusers.utils import peft_utils

    return hasattr(peft_utils, "_create_lokr_config")


def test_a_lower_rank_says_what_it_loses(trained: Any, tiny: Path, tmp_path: Path) -> None:
    """The best of its rank (Eckart and Young): what is missed are the other singular values."""
    change = torch.randn(12, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(change.flatten(1).double())
    update, missed = low_rank(change, 3)
    found = (update.b.flatten(1) @ update.a.flatten(1)).view_as(change)
    assert missed == pytest.approx(values[3:].square().sum().item(), rel=1e-6)
    assert (found - change).square().sum().item() == pytest.approx(missed, rel=1e-4)
    folder, _ = trained("full")
    facts = written(folder, tmp_path / "out", "peft", rank=8)
    assert any(
        "nearest LoRA of rank 8 to the change of 16 layers" in fact and "% of the change" in fact for fact in facts
    )
    adapter = Adapter.read(tmp_path / "out")  # ours again, for the same base
    network = load_transformer(Base.read(tiny), dtype=torch.float32)
    load_adapter(network, adapter)
    assert adapter.metadata.kind == "lora" and adapter.metadata.rank == 8


def test_one_file_of_the_authors_layout_beside_the_pipeline(trained: Any, tiny: Path, tmp_path: Path) -> None:
    folder, expected = trained("lora")
    facts = written(folder, tmp_path / "out", "merged", single_file=True)
    assert any("transformer_original.safetensors" in fact for fact in facts)
    weights, beside = to_diffusers(load_file(tmp_path / "out" / "transformer_original.safetensors"))
    assert beside.keys() == {"pos_embed"}
    network = load_transformer(Base.read(tiny), dtype=torch.float32)
    network.load_state_dict(weights)
    torch.testing.assert_close(call(network), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("lora --to kohya --rank 8", "rank: kohya holds this adapter as it is; leave it out"),
        ("lora --to merged --rank 8", 'rank is 8, unused while to is "merged"'),
        ("lora --to comfy --single-file", 'single_file is true, unused while to is "comfy"'),
        ("lora --to comfy --everywhere", "acts at all timesteps already; leave it out"),
        ("lora --to civitai", 'to is "civitai"; expected peft | diffusers | comfy | kohya | merged'),
        ("nothing --to peft", "adapter: there is no nothing"),
    ],
)
def test_what_has_no_use_or_no_place_is_refused(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    first, *rest = options.split()
    place = str(trained(first)[0]) if first in KINDS else first
    assert main(["export", place, *rest, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_some_timesteps_is_refused_or_let_act_everywhere(
    trained: Any, tiny: Path, tmp_path: Path
) -> None:
    folder, _ = trained("lora")
    network = load_transformer(Base.read(tiny), dtype=torch.float32)
    adapter = Adapter.read(folder)
    load_adapter(network, adapter)
    limited = replace(adapter.metadata, interval=(0, 500))
    save_adapter(tmp_path / "some", network, limited, torch.zeros(1, 32))
    for to in ("diffusers", "comfy", "kohya", "merged"):
        with pytest.raises(UserError, match=r"everywhere: it was trained at the timesteps \[0, 500\].*--everywhere"):
            written(tmp_path / "some", tmp_path / "out", to)
    written(tmp_path / "some", tmp_path / "out", "kohya", everywhere=True)
    with pytest.raises(UserError, match="everywhere: plain peft lets every adapter act at all timesteps"):
        written(tmp_path / "some", tmp_path / "again", "peft", everywhere=True)
    written(tmp_path / "some", tmp_path / "whole", "merged", everywhere=True)
    with pytest.warns(UserWarning, match=r"was trained at the timesteps \[0, 500\] alone"):
        Base.read(tmp_path / "whole")
    written(tmp_path / "some", tmp_path / "again", "peft")
    assert Adapter.read(tmp_path / "again").interval == (0, 500)
    with pytest.raises(UserError, match="is there already"):
        written(tmp_path / "some", tmp_path / "out", "kohya", everywhere=True)


def test_another_prediction_or_schedule_is_told_of(trained: Any, tiny: Path, tmp_path: Path) -> None:
    folder, _ = trained("lora")
    network = load_transformer(Base.read(tiny), dtype=torch.float32)
    adapter = Adapter.read(folder)
    load_adapter(network, adapter)
    save_adapter(tmp_path / "v", network, replace(adapter.metadata, prediction_type="v_prediction"), torch.zeros(1, 32))
    facts = written(tmp_path / "v", tmp_path / "out", "comfy")
    assert any("it predicts v_prediction" in fact and "--to merged sets it" in fact for fact in facts)
    assert not any("it predicts" in fact for fact in written(folder, tmp_path / "eps", "comfy"))
    written(tmp_path / "v", tmp_path / "merged", "merged")
    assert (
        PixArtSigmaPipeline.from_pretrained(str(tmp_path / "merged")).scheduler.config.prediction_type == "v_prediction"
    )
    mean = replace(adapter.metadata, prediction_type="posterior_mean")
    save_adapter(tmp_path / "mean", network, mean, torch.zeros(1, 32))
    facts = written(tmp_path / "mean", tmp_path / "merged_mean", "merged")
    assert any("no scheduler of diffusers knows what it predicts (posterior_mean)" in fact for fact in facts)
