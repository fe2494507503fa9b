"""What is trained, kind by kind. Oracles: bit equality of what is frozen and of what is loaded back, the base's own
weights, plain diffusers."""

import importlib.util
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PixArtSigmaPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from pixart_ft.adapters.acting import load_adapter, merge
from pixart_ft.adapters.files import Adapter, LoraSettings
from pixart_ft.cli import main
from pixart_ft.config.reading import to_yaml
from pixart_ft.config.train import load_config
from pixart_ft.diffusion.intervals import WHOLE
from pixart_ft.diffusion.names import TimeConditioning
from pixart_ft.diffusion.schedules import NoiseSchedule, conditioned
from pixart_ft.errors import UserError
from pixart_ft.model import saving
from pixart_ft.model.base import Base
from pixart_ft.model.loading import fingerprint, load_transformer
from pixart_ft.model.network import network_output
from pixart_ft.model.quantized import check_quantization, quantize
from pixart_ft.runs.folder import RunFolder
from pixart_ft.sampling.text_to_image import TextToImage, abilities_of
from pixart_ft.training import run as run_module
from pixart_ft.training.kinds import AdapterKind
from pixart_ft.training.nested import load_nested
from pixart_ft.training.start import dry_run
from pixart_ft.training.trainer import Trainer
from tests.helpers.networks import call, randn
from tests.helpers.runs import Options, assert_same_end, cut_off, short_run, train

KINDS: dict[str, Options] = {
    "lora": {"adapter.rank": 4},
    "dora": {"adapter.rank": 4, "adapter.dora": True, "adapter.rslora": True, "adapter.targets": "attention+mlp"},
    "pissa": {"adapter.rank": 4, "adapter.init": "pissa", "adapter.targets": "all-linear"},
    "lokr": {"adapter.kind": "peft", "adapter.peft_type": "LOKR", "adapter.r": 4, "adapter.alpha": 4},
    "full": {"adapter.kind": "full", "optim.learning_rate": 1e-3},
    "part": {"adapter.kind": "full", "adapter.trainable": ["*.attn?.*", "proj_out.*"], "optim.learning_rate": 1e-3},
}
NF4 = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.fixture
def options(tiny: Path, pictures: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A run of a few steps that measures and draws as little as it may."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    own = {
        "train.steps": 8,
        "train.ema_decay": 0.0,
        "train.checkpoint_every": 0,
        "optim.warmup_steps": 0,
        "optim.decay": "constant",
        "validation.every": 0,
        "validation.timesteps": 2,
        "validation.prompts": [],
    }
    given = short_run(tiny, pictures, tmp_path / "run", cache) | own
    return {key: value for key, value in given.items() if not key.startswith("adapter.")}


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainer of each run that ended, with its network."""
    found: list[Trainer] = []
    finish = run_module.finish

    def kept(folder: Any, what: Any, trainer: Trainer, *more: Any) -> None:
        found.append(trainer)
        finish(folder, what, trainer, *more)

    monkeypatch.setattr(run_module, "finish", kept)
    return found


def held_out(run: Path) -> list[float]:
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [record["held_out"]["loss"]["mean"] for record in records if "held_out" in record]


def output(transformer: nn.Module, precision: str) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return call(transformer.eval())


def plain(transformer: nn.Module) -> dict[str, Tensor]:
    """The base's own weights, under whatever was put around them."""
    return {name.replace(".base_layer.", "."): value for name, value in transformer.named_parameters()}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_moves_what_it_trains_alone_and_comes_back(
    options: Options, ended: list[Trainer], tiny: Path, kind: str, precision: str
) -> None:
    run = train(options | KINDS[kind], train__mixed_precision=precision)
    network = ended[-1].transformer
    before, after = held_out(run)
    assert after < before
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    untouched = plain(load_transformer(Base.read(tiny), dtype=torch.float32))
    own = plain(network)
    is_full = KINDS[kind].get("adapter.kind") == "full"
    for name, value in untouched.items():
        if own[name].requires_grad:
            assert own[name].dtype == torch.float32 and not torch.equal(own[name], value), name
        else:
            assert torch.equal(own[name], value.to(dtype)), name
    trained = {name for name, value in own.items() if value.requires_grad}
    of_base = {"full": untouched.keys(), "part": {n for n in untouched if ".attn" in n or n.startswith("proj_out.")}}
    assert trained & untouched.keys() == of_base.get(kind, set())
    began = load_nested(run / "checkpoints" / "step-000008" / "trained.safetensors")
    assert began.keys() == ended[-1].trained.keys() and all(value.dtype == torch.float32 for value in began.values())

    loaded = TextToImage.load(run, dtype=dtype) if is_full else TextToImage.load(tiny, lora=run, dtype=dtype)
    close = {"rtol": 1e-4, "atol": 1e-4} if precision == "no" else {"rtol": 0.05, "atol": 0.05}
    exact = kind in ("lora", "dora", "lokr") or (is_full and precision == "no")
    expected = output(network, precision)
    if exact:
        assert torch.equal(output(loaded.transformer, precision), expected)
    else:  # a beginning is taken away again; a model held in bfloat16 rounds what was trained in float32
        torch.testing.assert_close(output(loaded.transformer, precision), expected, **close)  # type: ignore[arg-type]
    if is_full:
        as_trained = load_transformer(Base.read(run), dtype=torch.float32)
        saved = plain(as_trained)
        assert all(torch.equal(saved[name], value.float()) for name, value in own.items())


@pytest.mark.parametrize("kind", ["dora", "pissa", "lokr", "full", "part"])
def test_every_kind_resumes_bit_for_bit(options: Options, tmp_path: Path, kind: str) -> None:
    asked = options | KINDS[kind] | {"train.steps": 6, "train.checkpoint_every": 2, "train.ema_decay": 0.9}
    asked |= {"diffusion.objective": "simple"} if kind == "part" else {}
    straight = train(asked)
    cut_off(5, asked, run__folder=tmp_path / "cut")
    torch.manual_seed(123)
    assert_same_end(straight, train(asked, run__folder=tmp_path / "cut", resume="auto"))


def test_a_lora_takes_inputs_of_half_precision_as_they_come_to_the_same_bits(tiny: Path) -> None:
    """Oracle: peft, which casts them to float32 and leaves it to autocast to cast them back."""
    network = load_transformer(Base.read(tiny), dtype=torch.bfloat16)
    kind = AdapterKind(LoraSettings(4, 8.0, ("to_q", "to_out.0", "ff.net.2")), torch.bfloat16, "none", torch.bfloat16)
    kind.prepare(network, seed=0, interval=WHOLE, device=torch.device("cpu"))
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for number, p in enumerate(trained.values()):
            p.copy_(randn(*p.shape, seed=number).float() / 10)
    given = randn(2, 4, 8, 8).float(), torch.tensor([10, 700]), randn(2, 5, 32).float(), torch.ones(2, 5)
    found = []
    for cast in (False, True):
        if cast:
            for layer in network.modules():
                if isinstance(layer, LoraLayer):
                    layer.cast_input_dtype_enabled = True
        with torch.profiler.profile() as profile:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = network_output(network, *given)
            output.square().mean().backward()
        copies = sum(event.count for event in profile.key_averages() if event.key == "aten::_to_copy")
        found.append((copies, [output, *(p.grad for p in trained.values())]))
        network.zero_grad()
    assert found[0][0] < found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)


def test_rows_of_a_variance_that_is_not_trained_stand_still(options: Options, tiny: Path) -> None:
    """No decay moves them, as it would move a weight whose gradient is zero; the mean's rows of the layer move."""
    options |= KINDS["full"] | {"optim.weight_decay": 0.5, "train.steps": 3, "validation.prompts": ["a circle"]}
    options |= {"validation.steps": 2}
    untouched = plain(load_transformer(Base.read(tiny), dtype=torch.float32))
    for objective in ("simple", "hybrid"):
        where = Path(str(options["run.folder"])).with_name(objective)
        run = train(options, run__folder=where, diffusion__objective=objective)
        saved = load_file(run / "final" / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
        assert saved.keys() == untouched.keys()
        for name in ("proj_out.weight", "proj_out.bias"):
            rows = torch.arange(32) % 8 >= 4  # of 2 x 2 places, 8 channels each
            same = (saved[name] == untouched[name]).view(32, -1).all(dim=1)
            assert not same[~rows].any() and bool(same[rows].all()) == (objective == "simple")
        state = "stale" if objective == "simple" else "trained"
        base = Base.read(run)
        assert base.variance == abilities_of(base).variance == state
    with pytest.raises(UserError, match="leaves it stale"):
        TextToImage.load(where.with_name("simple")).generate("a circle", sampler="iddpm", steps=2, progress=False)


@pytest.fixture
def model(options: Options) -> Path:
    """A run that trained the whole network, to predict v on a cosine schedule in a part of it."""
    cosine = {"diffusion.schedule": "cosine", "diffusion.prediction_type": "v_prediction"}
    more = {"validation.prompts": ["a red circle"], "validation.steps": 2, "validation.samples_every": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(options | KINDS["full"] | cosine | more | {"train.steps": 4, "train.ema_decay": 0.5})


def test_a_trained_model_is_a_base_for_every_command(model: Path, options: Options, tiny: Path, tmp_path: Path) -> None:
    read = Base.read(model)
    assert (read.prediction_type, read.schedule_config["beta_schedule"]) == ("v_prediction", "squaredcos_cap_v2")
    assert read.whole.place == str(tiny) and read.metadata is not None and read.metadata.weights == "ema"
    assert Base.read(model, weights="raw").place == str(model / "final" / "model_raw")
    assert Base.read(f"{model}@2").place == str(model / "models" / "step-000002")
    assert sorted(path.name for path in (model / "final" / "model").iterdir()) == [
        *("manifest.json", "model_index.json", "null_caption.safetensors", "pixart_ft.json", "scheduler", "transformer")
    ]
    last, average = (
        load_nested(model / "checkpoints" / "step-000004" / name) for name in ("trained.safetensors", "ema.safetensors")
    )
    for kept, state in (("model", average["shadows"]), ("model_raw", last)):
        saved = load_file(model / "final" / kept / "transformer" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(saved[name], value) for name, value in state.items())
    where = tmp_path / "drawn"
    line = ["generate", "--model", str(model), "--weights", "raw", "--prompt", "a red circle", "--steps", "2"]
    assert main([*line, "--device", "cpu", "--out", str(where)]) == 0
    picture = next(where.glob("000-*.png"))
    assert main(["generate", "--from", str(picture), "--out", str(tmp_path / "again")]) == 0
    assert next((tmp_path / "again").glob("000-*.png")).read_bytes() == picture.read_bytes()

    # an adapter on top of it, and the whole network once more
    lora = train(options, model__base=model, run__folder=tmp_path / "lora", train__steps=1)
    adapter = Adapter.read(lora)
    assert adapter.metadata.base == str(model / "final" / "model")
    assert adapter.metadata.prediction_type == "v_prediction"
    assert main(["generate", "--lora", str(lora), "--prompt", "a", "--steps", "1", "--out", str(tmp_path / "c")]) == 0
    again = train(options | KINDS["full"], model__base=model, run__folder=tmp_path / "more", train__steps=1)
    about = Base.read(again).metadata
    assert about is not None and about.base == str(tiny)  # not a chain of runs
    with pytest.raises(UserError, match=r"the run .* trained a model, not an adapter; give it as the model"):
        Adapter.read(model)
    with pytest.raises(UserError, match=r"the run .* trained an adapter, not a model; give it as the adapter"):
        Base.read(lora)
    with pytest.raises(UserError, match=r"is a whole model; give it as the model"):
        Adapter.read(model / "final" / "model")
    with pytest.raises(UserError, match=r"is an adapter; give it as the adapter"):
        Base.read(lora / "final" / "adapter")


def test_a_model_says_where_its_other_parts_are_or_has_them(
    options: Options, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "LARGEST_SHARD", "100KB")
    asked = options | KINDS["full"] | {"train.steps": 1, "model.base": base}
    run, whole = train(asked), train(asked, adapter__whole=True, run__folder=tmp_path / "whole")
    assert len(list((run / "final" / "model" / "transformer").glob("*-of-*.safetensors"))) > 2
    alone = PixArtSigmaPipeline.from_pretrained(
        str(run / "final" / "model"), vae=AutoencoderKL.from_pretrained(str(base), subfolder="vae"), text_encoder=None
    )
    expected = call(load_transformer(Base.read(run), dtype=torch.float32))
    assert torch.equal(call(alone.transformer), expected)
    shutil.rmtree(base)
    with pytest.raises(UserError, match=r"holds the transformer alone, of the base .*: model\.base: there is no"):
        Base.read(run)
    stock = PixArtSigmaPipeline.from_pretrained(str(whole / "final" / "model"))
    assert torch.equal(call(stock.transformer), expected) and stock.text_encoder is not None
    assert len(TextToImage.load(whole).generate("a circle", steps=1, progress=False)) == 1


def test_a_model_trained_at_some_timesteps_says_so(options: Options) -> None:
    run = train(options | KINDS["full"], train__steps=1, diffusion__timestep_range=[0, 400])
    with pytest.warns(UserWarning, match=r"was trained at the timesteps \[0, 400\] alone"):
        assert Base.read(run).metadata is not None


@pytest.mark.parametrize(("how", "steps"), [("snr_matched", 1000), ("rescaled", 250)])
def test_a_model_told_of_other_noise_by_the_clock_of_its_base_keeps_that_clock(
    options: Options, tiny: Path, how: TimeConditioning, steps: int
) -> None:
    """It is drawn with on the schedule that it was trained on, and is a base on the one that its timesteps mean."""
    cosine = {"diffusion.schedule": "cosine", "diffusion.time_conditioning": how, "diffusion.num_steps": steps}
    run, native = train(options | KINDS["full"] | cosine, train__steps=1), Base.read(tiny)
    base = Base.read(run)
    assert base.schedule_config == {**native.schedule_config, "rescale_betas_zero_snr": False}
    matched = conditioned(NoiseSchedule.cosine(steps), native.schedule, how)
    found = abilities_of(base).schedule
    assert torch.equal(found.alpha_bar, matched.alpha_bar) and torch.equal(found.timesteps, matched.timesteps)


def test_the_whole_network_may_start_from_an_earlier_result(options: Options, tmp_path: Path, tiny: Path) -> None:
    asked = options | KINDS["full"] | {"train.steps": 1}
    first = train(asked)
    second = train(asked, run__folder=tmp_path / "second", init_from=first)
    assert held_out(second)[0] == pytest.approx(held_out(first)[1], rel=1e-5)
    with pytest.raises(UserError, match=r"differs from the base in weights that adapter\.trainable leaves frozen"):
        train(options | KINDS["part"], run__folder=tmp_path / "third", init_from=first)
    lora = train(options, run__folder=tmp_path / "lora", train__steps=1)
    with pytest.raises(UserError, match="trained an adapter, not a model"):
        train(asked, run__folder=tmp_path / "fourth", init_from=lora)
    with pytest.raises(UserError, match=r"adapter\.init olora begins from the base's weights, and --init-from"):
        train(options, run__folder=tmp_path / "fifth", adapter__init="olora", init_from=lora)


def test_patterns_are_checked_before_anything_is_loaded(options: Options, tmp_path: Path) -> None:
    def refused(match: str, **more: Any) -> None:
        tree: dict[str, Options] = {}
        for key, value in (options | {k.replace("__", "."): v for k, v in more.items()}).items():
            section, name = key.split(".")
            tree.setdefault(section, {})[name] = str(value) if isinstance(value, Path) else value
        with pytest.raises(UserError, match=match):
            dry_run(load_config(tree))

    refused("'\\*.attn3' matches no weight; near: ", adapter__kind="full", adapter__trainable=["*.attn3"])
    refused(
        "model.dtype bfloat16 with adapter.kind full and train.mixed_precision no",
        adapter__kind="full",
        model__dtype="bfloat16",
    )
    of_peft = {"adapter__kind": "peft"}
    refused(
        "adapter.peft_type 'LOKER': peft has no such type; did you mean LOKR", adapter__peft_type="LOKER", **of_peft
    )
    refused("unexpected keyword argument 'rank'", adapter__peft_type="LOKR", adapter__rank=4, **of_peft)
    refused("set adapter.kind lora", adapter__peft_type="LORA", **of_peft)
    refused("peft cannot make it here: .*target_modules", adapter__peft_type="PREFIX_TUNING", **of_peft)
    refused("task_ids should not be None", adapter__peft_type="POLY", **of_peft)
    refused("'to_z' matches no layer", adapter__peft_type="LOKR", adapter__target_modules=["to_z"], **of_peft)


def test_a_peft_configuration_stands_as_peft_has_it_and_is_written_in_full(tmp_path: Path) -> None:
    given = {"kind": "peft", "peft_type": "LOKR", "r": 8, "alpha": 2, "target_modules": ["to_q", "net.2"]}
    config = load_config({"adapter": given, "data": {"folder": "x"}})
    assert config.adapter.options == {"r": 8, "alpha": 2} and config.adapter.targets == ("to_q", "net.2")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    typed = {"adapter.kind": "peft", "adapter.peft_type": "LOKR", "adapter.options": "{r: 8, alpha: 2}"}
    line = load_config({"data": {"folder": "x"}}, typed | {"adapter.targets": "[to_q, net.2]"})
    assert line.adapter == config.adapter
    wrong: list[tuple[Mapping[str, Any], str]] = [
        ({"kind": "peft"}, r"adapter\.kind \"peft\" needs adapter\.peft_type"),
        ({"options": {"r": 8}}, r"adapter\.options is .*, unused while adapter\.kind is \"lora\""),
        ({"kind": "full", "rank": 4}, r"adapter\.rank is 4, unused while adapter\.kind is \"full\""),
        ({"whole": True}, r"adapter\.whole is true, unused while adapter\.kind is \"lora\""),
        ({"r": 8}, r"adapter\.r: unknown key"),
    ]
    for adapter, message in wrong:
        with pytest.raises(UserError, match=message):
            load_config({"adapter": dict(adapter), "data": {"folder": "x"}})


@NF4
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_lora_on_a_base_of_few_bits(
    options: Options, ended: list[Trainer], tiny: Path, how: Any, precision: str
) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    asked = options | {"model.quantization": how, "adapter.rank": 4, "train.mixed_precision": precision}
    if how == "nf4":
        asked |= {"adapter.dora": True} if precision == "no" else {"adapter.init": "pissa"}
    run = train(asked)
    before, after = held_out(run)
    assert after < before
    network, short = ended[-1].transformer, load_transformer(Base.read(tiny), dtype=dtype)
    mark = fingerprint(short)
    quantize(short, how, dtype=dtype, device="cpu")
    frozen = plain(short)
    assert frozen["transformer_blocks.0.attn1.to_q.weight"].dtype in (torch.uint8, torch.int8)
    assert all(torch.equal(plain(network)[name], value) for name, value in frozen.items())
    adapter = Adapter.read(run)
    assert adapter.metadata.base_fingerprint == mark
    on_float = load_transformer(Base.read(tiny), dtype=dtype)
    load_adapter(on_float, adapter)
    near = output(on_float, precision) - output(network, precision)
    assert near.abs().max() < 0.5  # the same adapter; what the bits round is left
    merge(on_float)
    with pytest.raises(UserError, match="weights of 4 or 8 bits cannot take it in"):
        merge(network)


def test_a_base_of_few_bits_says_what_it_needs(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"model\.quantization nf4 needs bitsandbytes: pip install"):
        check_quantization("model.quantization", "nf4")
    check_quantization("model.quantization", "none")
    with pytest.raises(UserError, match=r"unused while adapter\.kind is \"full\""):
        load_config({"adapter": {"kind": "full"}, "model": {"quantization": "nf4"}, "data": {"folder": "x"}})
    with pytest.raises(UserError, match="no DoRA on weights of 8 bits"):
        load_config({"adapter": {"dora": True}, "model": {"quantization": "int8"}, "data": {"folder": "x"}})


def test_of_models_on_the_way_the_newest_stay_and_the_lowest(options: Options) -> None:
    """Each has the size of the network: as many as there are checkpoints, the result among them."""
    own = {"validation.samples_every": 1, "validation.every": 1, "train.keep_checkpoints": 3}
    run = train(options | KINDS["part"] | own)
    losses = held_out(run)
    lowest = min(range(1, len(losses)), key=losses.__getitem__)
    assert RunFolder(run).kept_steps("model") == sorted({6, 7, lowest} - {8})
