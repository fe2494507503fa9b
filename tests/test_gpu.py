"""On a GPU a run does what it does on a processor, and waits for nothing.

Oracles: the same run on the processor, equality to the bit, and CUDA's own alarm for whatever makes the host wait.
"""

import gc
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pixart_ft import cli
from pixart_ft.config.train import load_config
from pixart_ft.model.base import Base
from pixart_ft.model.loading import load_transformer
from pixart_ft.model.quantized import quantize
from pixart_ft.model.repeated import compile_fault
from pixart_ft.sampling.settings import Settings
from pixart_ft.sampling.text_to_image import TextToImage
from pixart_ft.training import doctor, memory
from pixart_ft.training.memory import Case
from pixart_ft.training.start import look, with_precision
from pixart_ft.training.trainer import Trainer
from tests.helpers.adapters import make_adapter
from tests.helpers.rounding import PICTURE, gap
from tests.helpers.runs import STEPS, Options, assert_same_end, command, cut_off, losses, short_run, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
]
ROOT = Path(__file__).parents[1]
GPU = "cuda"
BITS = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
FULL: Options = {"adapter.kind": "full", "optim.learning_rate": 1e-3}
KINDS: dict[str, Options] = {"lora": {}, "full": FULL}
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float32}  # and what a frozen base is held in
# Of one loss: some 30 operations, each rounded to half a last place, make an error of the output, whose square it is.
ROUNDING = {"no": 1e-4, "bf16": 0.05, "fp16": 0.01}
# What small differences may become in some steps of Adam, which moves a weight by the sign of its gradient.
AFTER_STEPS = 1e-3


@pytest.fixture(autouse=True)
def exact_arithmetic() -> Iterator[None]:
    """Float32 that is float32: torch lets convolutions round their factors to 10 bits; no group of an earlier test."""
    was = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.backends.cudnn.allow_tf32 = was
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def options(tiny: Path, pictures: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A short run without dropout, whose bits each device draws for itself."""
    shared = short_run(tiny, pictures, tmp_path / "run", tmp_path_factory.getbasetemp() / "cache")
    return shared | {"adapter.dropout": 0.0}


def of_kind(options: Options, kind: Options) -> Options:
    if kind.get("adapter.kind") == "full":
        options = {key: value for key, value in options.items() if not key.startswith("adapter.")}
    return options | kind


# Nothing measured, drawn or saved on the way.
STEPS_ALONE: Options = {
    "data.held_out_fraction": 0.0,
    "validation.prompts": [],
    "train.checkpoint_every": 0,
    "logging.every": 100,
}


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainer of each run, with its network."""
    found: list[Trainer] = []
    whole = Trainer.run

    def run(self: Trainer) -> None:
        found.append(self)
        whole(self)

    monkeypatch.setattr(Trainer, "run", run)
    return found


@contextmanager
def on_the_processor() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def deterministic() -> Iterator[None]:
    """cuBLAS wants a workspace of its own for that, which the environment names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def means(run: Path) -> list[float]:
    """The loss of each step that was taken."""
    return [record["loss"] for record in losses(run) if "loss" in record]


def plain(transformer: nn.Module) -> dict[str, Tensor]:
    """The base's own weights, under whatever was put around them."""
    return {name.replace(".base_layer.", "."): value.cpu() for name, value in transformer.named_parameters()}


# Training


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_what_is_trained_alone_as_the_processor_does(
    options: Options, ended: list[Trainer], tiny: Path, tmp_path: Path, kind: str, precision: str
) -> None:
    asked = of_kind(options, KINDS[kind])
    found = means(train(asked, train__mixed_precision=precision))
    trainer = ended[-1]
    assert all(p.device.type == GPU for p in trainer.transformer.parameters())
    began, own = plain(load_transformer(Base.read(tiny), dtype=torch.float32)), plain(trainer.transformer)
    for name, value in began.items():
        if kind == "full":
            assert own[name].dtype == torch.float32 and not torch.equal(own[name], value), name
        else:
            assert torch.equal(own[name], value.to(PRECISIONS[precision])), name
    assert all(bool((p != 0).any()) for name, p in trainer.trained.items() if ".lora_B." in name)
    assert all(torch.isfinite(torch.tensor(found))) and len(found) >= 3  # a scaler may begin too high
    with on_the_processor():
        wanted = means(train(asked, run__folder=tmp_path / "processor"))
    assert all(p.device.type == "cpu" for p in ended[-1].transformer.parameters())
    print(f"{kind} {precision}: {found} on the GPU, {wanted} on the processor")
    if len(found) == STEPS:
        assert found[0] == pytest.approx(wanted[0], rel=ROUNDING[precision])
        assert found == pytest.approx(wanted, rel=max(AFTER_STEPS, 3 * ROUNDING[precision]))


@pytest.mark.parametrize(
    "how",
    [
        {},
        FULL,
        FULL | {"train.mixed_precision": "bf16", "model.gradient_checkpointing": True},
        {"train.mixed_precision": "fp16", "adapter.dropout": 0.1},
        {"diffusion.timestep_law": "importance", "train.ema_on_cpu": True},
        pytest.param(FULL | {"optim.optimizer": "adamw8bit"}, marks=BITS),
        pytest.param(FULL | {"optim.optimizer": "paged_adamw8bit"}, marks=BITS),
    ],
    ids=["lora", "full", "bf16, checkpointing", "fp16, dropout", "importance, average", "adamw8bit", "paged"],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(options: Options, tmp_path: Path, how: Options) -> None:
    """With torch's deterministic kernels, and attention whose backward pass adds in one order."""
    asked = of_kind(options, how) | {"model.attention": "plain"}
    with deterministic():
        straight = train(asked)
        cut_off(5, asked, run__folder=tmp_path / "cut")
        torch.manual_seed(123)
        resumed = train(asked, run__folder=tmp_path / "cut", resume="auto")
    if how.get("train.mixed_precision") == "fp16":  # a step may be skipped, which has no loss
        assert means(straight) == means(resumed)
    else:
        assert_same_end(straight, resumed)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one_to_rounding_as_torch_comes(
    options: Options, tmp_path: Path, precision: str
) -> None:
    asked = options | {"train.mixed_precision": precision}
    straight = train(asked)
    cut_off(5, asked, run__folder=tmp_path / "cut")
    resumed = train(asked, run__folder=tmp_path / "cut", resume="auto")
    print(f"{precision}: to the bit: {losses(straight) == losses(resumed)}")
    assert means(resumed) == pytest.approx(means(straight), rel=max(AFTER_STEPS, ROUNDING[precision]))


# Waits


def steps_without_waits(options: Options, monkeypatch: pytest.MonkeyPatch) -> int:
    """Train, where CUDA raises at whatever waits from the third step to the last; returns how many were watched."""
    step, between, watched = Trainer._optimizer_step, Trainer._between_steps, []

    def watched_step(self: Trainer) -> None:
        if self.step >= 2:  # the first ones begin what is kept: moments, a scale, kernels
            torch.cuda.set_sync_debug_mode("error")
            watched.append(self.step)
        step(self)

    def unwatched(self: Trainer) -> None:
        if self.step >= self.plan.steps:
            torch.cuda.set_sync_debug_mode("default")
        between(self)

    monkeypatch.setattr(Trainer, "_optimizer_step", watched_step)
    monkeypatch.setattr(Trainer, "_between_steps", unwatched)
    try:
        train(options | STEPS_ALONE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return len(watched)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({}, id="lora"),
        pytest.param({"train.mixed_precision": "bf16", "model.gradient_checkpointing": True}, id="bf16, checkpointing"),
        pytest.param({"train.mixed_precision": "fp16", "adapter.dropout": 0.1}, id="fp16 with its scaler, dropout"),
        pytest.param({"train.accumulation": 2, "train.batch_size": 2}, id="accumulation"),
        pytest.param({"diffusion.timestep_law": "importance"}, id="importance sampling"),
        pytest.param({"diffusion.timestep_range": [200, 700], "diffusion.weighting": "min_snr"}, id="range, weights"),
        pytest.param({"train.ema_on_cpu": True}, id="average on the processor"),
        pytest.param({"adapter.dora": True}, id="dora"),
        pytest.param({"optim.optimizer": "muon"}, id="muon"),
        pytest.param({"optim.optimizer": "adafactor"}, id="adafactor"),
        pytest.param(FULL, id="full"),
        pytest.param(FULL | {"optim.in_backward": True, "optim.clip_norm": 0.0}, id="full, steps in the backward pass"),
        pytest.param(
            FULL | {"optim.stochastic_rounding": True, "train.mixed_precision": "bf16"}, id="full, bfloat16 weights"
        ),
        pytest.param(FULL | {"optim.optimizer": "adamw8bit"}, id="full, adamw8bit", marks=BITS),
        pytest.param({"model.quantization": "nf4", "train.mixed_precision": "bf16"}, id="nf4", marks=BITS),
    ],
)
def test_no_step_waits_for_the_device(options: Options, how: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps_without_waits(of_kind(options, how), monkeypatch) == STEPS - 2


@pytest.mark.parametrize(
    ("how", "where"),
    [
        pytest.param(
            {"optim.optimizer": "prodigy", "optim.learning_rate": 1.0}, "guard", id="prodigy reads its step size"
        ),
        pytest.param(
            {"optim.optimizer": "schedule_free", "optim.decay": "constant", "train.ema_decay": 0.0},
            "guard",
            id="schedule-free counts in its groups",
        ),
        pytest.param(FULL | {"optim.optimizer": "paged_adamw8bit"}, "guard", id="pages cannot be put back", marks=BITS),
        pytest.param(
            {"model.quantization": "int8", "train.mixed_precision": "bf16"}, "bitsandbytes", id="int8 looks", marks=BITS
        ),
    ],
)
def test_what_waits_in_each_step_is_known(
    options: Options, how: Options, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing before it: the first thing that waits is in a file of that name."""
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation") as caught:
        steps_without_waits(of_kind(options, how), monkeypatch)
    assert any(where in str(frame.path) for frame in caught.traceback)


# Few bits, compiling, kernels


@BITS
@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_lora_on_a_base_of_few_bits(options: Options, ended: list[Trainer], tiny: Path, how: Any) -> None:
    run = train(options, model__quantization=how, train__mixed_precision="bf16")
    assert len(means(run)) == STEPS and all(torch.isfinite(torch.tensor(means(run))))
    short = load_transformer(Base.read(tiny), dtype=torch.bfloat16)
    quantize(short, how, dtype=torch.bfloat16, device=GPU)
    frozen, own = plain(short), plain(ended[-1].transformer)
    assert frozen["transformer_blocks.0.attn1.to_q.weight"].dtype in (torch.uint8, torch.int8)
    assert all(torch.equal(own[name], value) for name, value in frozen.items())
    TextToImage.load(tiny, lora=run, device=GPU).generate("a red circle", steps=2, progress=False)


@BITS
@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw", "paged_adamw8bit"])
def test_optimizers_of_bitsandbytes(options: Options, tmp_path: Path, optimizer: str) -> None:
    """Their first losses are AdamW's: the first is before any step, and 8 bits hold a step to some percent."""
    asked = of_kind(options, FULL) | STEPS_ALONE | {"logging.every": 1}
    wanted = means(train(asked, run__folder=tmp_path / "adamw"))
    assert means(train(asked, optim__optimizer=optimizer)) == pytest.approx(wanted, rel=0.05)


def needs_a_compiler() -> None:
    if (fault := compile_fault(torch.device(GPU))) is not None:
        pytest.skip(f"nothing can be compiled here: {fault}")


def test_compiled_blocks_train_alike(options: Options, tmp_path: Path) -> None:
    needs_a_compiler()
    asked = options | STEPS_ALONE | {"logging.every": 1, "train.steps": 3}
    found = means(train(asked, model__compile=True))
    assert found == pytest.approx(means(train(asked, run__folder=tmp_path / "plain")), rel=AFTER_STEPS)


def test_kernels_of_attention_train_alike_and_are_timed(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = options | STEPS_ALONE | {"logging.every": 1}
    found = {
        name: means(train(asked, run__folder=tmp_path / name, model__attention=name))
        for name in ("by_shape", "sdpa", "plain", "auto")
    }
    for name, each in found.items():
        assert each == pytest.approx(found["plain"], rel=AFTER_STEPS), name
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("attention "))
    assert line.count("sdpa ") >= 2 and line.count("plain ") >= 2 and "headwise" not in line
    record = json.loads((tmp_path / "auto" / "environment.json").read_text())
    assert record["attention_timed_on"] == torch.cuda.get_device_name()
    assert set(record["attention"].values()) <= {"sdpa", "plain", "xformers"}
    print(line)


# Sampling


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny, tmp_path_factory.mktemp("adapter") / "adapter")


PROMPTS = ["a red circle on grey", "a photo of the black triangle on pink"]


def drawn(model: TextToImage, sampler: str) -> Tensor:
    model.text.encode([*PROMPTS, ""])
    settings = model.settled(Settings(sampler=sampler, steps=6, guidance=4.5))
    return model.latents([(prompt, 7) for prompt in PROMPTS], settings).cpu()


@pytest.mark.parametrize("sampler", ["ddpm", "iddpm", "ddim", "euler", "dpm++", "unipc"])
def test_a_sampler_draws_what_it_draws_on_the_processor(tiny: Path, adapter: Path, sampler: str) -> None:
    there, here = (TextToImage.load(tiny, lora=adapter, device=device) for device in (GPU, "cpu"))
    wanted = drawn(here, sampler)
    assert gap(drawn(there, sampler), wanted) < PICTURE
    half = drawn(TextToImage.load(tiny, lora=adapter, device=GPU, dtype=torch.bfloat16), sampler)
    assert half.isfinite().all() and gap(half, wanted) < 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_command_draws(tiny: Path, adapter: Path, tmp_path: Path, dtype: str) -> None:
    line = ["generate", "--model", tiny, "--lora", adapter, "--prompt", PROMPTS[0], "--steps", 2, "--dtype", dtype]
    assert cli.main([*map(str, line), "--device", GPU, "--attention", "auto", "--out", str(tmp_path / "out")]) == 0
    recipe = next((tmp_path / "out").glob("000-*.png"))
    assert cli.main(["generate", "--from", str(recipe), "--out", str(tmp_path / "again")]) == 0


def test_compiled_blocks_draw_alike(tiny: Path, adapter: Path) -> None:
    needs_a_compiler()
    found, wanted = (
        drawn(TextToImage.load(tiny, lora=adapter, device=GPU, compile=compiled), "ddim") for compiled in (True, False)
    )
    assert gap(found, wanted) < PICTURE


# Shards


@contextmanager
def as_launched() -> Iterator[None]:
    """As torchrun starts the one process of a run in shards; a run leaves its group at its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in (launched | {"ACCELERATE_USE_FSDP": "true"}).items():
            patch.setenv(variable, value)
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_network_in_shards_trains_and_goes_on(options: Options, ended: list[Trainer], tmp_path: Path) -> None:
    """FSDP2 by NCCL, over the one GPU that there may be; its checkpoint is read with shards and without."""
    asked = of_kind(options, FULL) | {"train.keep_checkpoints": 9}
    straight = train(asked)
    with as_launched():
        run = train(asked, run__folder=tmp_path / "shards")
    assert isinstance(ended[-1].transformer, FSDPModule)
    assert all(isinstance(p, DTensor) and p.device.type == GPU for p in ended[-1].trained.values())
    assert means(run) == pytest.approx(means(straight), rel=AFTER_STEPS)
    again = Path(shutil.copytree(run, tmp_path / "again"))
    with as_launched():
        train(asked, run__folder=again, resume=str(again / "checkpoints" / "step-000004"))
    assert means(again) == pytest.approx(means(straight), rel=AFTER_STEPS)
    train(asked, run__folder=run, resume=str(run / "checkpoints" / "step-000004"))
    assert means(run) == pytest.approx(means(straight), rel=AFTER_STEPS)


@pytest.mark.parametrize("file", ["fsdp2", "ddp"])
def test_the_launcher_s_configurations(options: Options, tmp_path: Path, file: str) -> None:
    """Of one process, since there may be one GPU."""
    configuration = ROOT / "configs" / "accelerate" / f"{file}.yaml"
    assert yaml.safe_load(configuration.read_text())["num_processes"] == 2
    asked = of_kind(options, FULL) | STEPS_ALONE | {"logging.every": 1, "train.steps": 3}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration)]
    line = [*launcher, "--num_processes", "1", str(ROOT / "scripts" / "train.py"), *command(asked)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(means(Path(asked["run.folder"]))) == 3


# The doctor


def test_the_doctor_sees_the_gpu(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["doctor", "--model.base", str(tiny), "--data.folder", str(pictures), "--data.resolution=64"]
    assert cli.main([*line, "--prompt", "a red circle"]) == 0
    out = capsys.readouterr().out
    print(out)
    found = {line[:18].strip(): line[18:].strip() for line in out.splitlines()}
    assert found["GPU 0"].startswith(torch.cuda.get_device_name(0))
    assert found["precision"] == "train.mixed_precision auto is bf16"
    assert found["device"].startswith("cuda")
    assert "in the GPU's" in found["memory"]
    if importlib.util.find_spec("bitsandbytes") is not None:
        assert found["bitsandbytes"].endswith("works on cuda")


CUBLAS = 2 * 2**25  # bytes that its two libraries take of a GPU of the Hopper kind for themselves, through torch


@pytest.mark.parametrize(
    "how",
    [
        {"train.mixed_precision": "no"},
        {"train.mixed_precision": "bf16"},
        {"train.mixed_precision": "bf16", "model.gradient_checkpointing": True},
        FULL | {"train.mixed_precision": "bf16"},
        FULL | {"train.mixed_precision": "no"},
    ],
    ids=["lora, float32", "lora, bf16", "lora, bf16, checkpointing", "full, bf16", "full, float32"],
)
def test_the_demo_takes_the_memory_that_was_predicted(
    how: Options, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = STEPS_ALONE | {
        "run.folder": tmp_path / "run",
        "model.base": "demo",
        "data.folder": "demo",
        "data.cache": tmp_path_factory.getbasetemp() / "cache",
        "train.batch_size": 64,
        "train.steps": 3,
        "optim.warmup_steps": 0,
        "logging.trackers": [],
        **how,
    }
    gc.collect()
    steps, found = Trainer._steps, []
    before = torch.cuda.memory_allocated()

    def measured(self: Trainer) -> None:
        torch.cuda.reset_peak_memory_stats()
        steps(self)
        found.append(torch.cuda.max_memory_allocated() - before)

    monkeypatch.setattr(Trainer, "_steps", measured)
    train(asked)
    config, base = with_precision(load_config({}, asked)), Base.read("demo")
    tokens = doctor._longest(config, base, look(config, None).overview(config.data))
    told = memory.training(Case.of(config, base, tokens=tokens, on_gpu=True)).bytes
    print(f"{how}: predicted {told / 2**20:.0f} MiB, measured {found[0] / 2**20:.0f} MiB, {told / found[0]:.2f}")
    assert told / 1.5 < found[0] < 1.5 * told + CUBLAS
