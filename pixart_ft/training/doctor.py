"""`pixart-ft doctor`: what this machine can do, what a training needs of it, and what would make it fit."""

import importlib
import os
import platform
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from torch import nn

from pixart_ft.config.optimizers import check_installed
from pixart_ft.config.text import numbered
from pixart_ft.config.train import PlanConfig, TrainConfig
from pixart_ft.diffusion.weighting import timestep_probabilities
from pixart_ft.errors import Mistakes, UserError
from pixart_ft.files import versions
from pixart_ft.model import loading
from pixart_ft.model.attention import xformers_fault
from pixart_ft.model.base import Base
from pixart_ft.model.captions import account_of
from pixart_ft.model.text import token_ids
from pixart_ft.pictures.own import check_own
from pixart_ft.pictures.process_plot import PLOT, process_plot
from pixart_ft.runs.folder import RunFolder
from pixart_ft.training import memory
from pixart_ft.training.memory import Case, Need
from pixart_ft.training.objective import build_objective
from pixart_ft.training.overview import SHEET, Overview
from pixart_ft.training.places import check_training
from pixart_ft.training.processes import asked_for
from pixart_ft.training.start import accelerator_for, look, with_precision

CUDA_ITSELF = 2**29  # bytes of a GPU that its driver and kernels take, about
_GIB = 2**30
_PARTS = ("transformer", "text_encoder", "tokenizer", "vae")
_EIGHT_BITS = "adamw8bit"


def examine(config: PlanConfig | None, card: int | None, sheet: Path | None = None, plot: Path | None = None) -> None:
    """Print what is found, and raise one UserError with all that a training cannot begin with.

    config   None: the machine alone is looked at
    card     bytes of a GPU to plan for, in place of this machine
    sheet    where to write a contact sheet of the pictures
    plot     where to draw the training's process as a PNG
    """
    if sheet is not None:
        if config is None or not config.data.every_source():
            raise UserError("--sheet shows the pictures of a training; give data.folder or data.sources")
        check_own([sheet], SHEET, "--sheet")
    if plot is not None:
        if config is None:
            raise UserError("--plot draws the process of a training: give its --config, or any of its keys")
        check_own([plot], PLOT, "--plot")
    places = ("runs", ".cache") if config is None else (config.run.folder, config.data.cache)
    _say(_machine([Path(place) for place in places]))
    if config is None:
        return
    mistakes = Mistakes()
    settled = _settled(config, card)
    has_data = bool(config.data.every_source())
    with mistakes.noted():
        check_training(settled if has_data else _changed(settled, {"data.folder": "demo"}))
    base = None
    with mistakes.noted():
        base = Base.read(settled.model.base, settled.model.revision)
    if base is not None:
        print()
        _say(_of_base(base))
        if plot is not None:
            with mistakes.noted():
                _say({"plot": _plotted(settled, base, plot)})
        overview = None
        with mistakes.noted():
            overview = _of_data(settled, card)
            if sheet is not None and overview is not None:
                overview.save_sheet(sheet)
                print(f"contact sheet      {sheet}")
        with mistakes.noted():
            case = _case(settled, base, card, overview)
            with mistakes.noted():
                _weigh(case, card)
            with mistakes.noted():
                _measure_disk(case)
    mistakes.raise_if_any()


def show_caption(config: PlanConfig, caption: str) -> None:
    """Print what the text encoder of the base sees of a caption. Raises UserError without that base's tokenizer."""
    base = Base.read(config.model.base, config.model.revision).whole
    for name, fact in account_of(loading.load_tokenizer(base), caption, config.data.max_tokens).items():
        lines = textwrap.wrap(fact, 100, break_on_hyphens=False) or [""]
        _say({name: ("\n" + 19 * " ").join(lines)})


def _say(facts: Mapping[str, str]) -> None:
    for name, fact in facts.items():
        print(f"{name:<18} {fact}")


# The machine


def _machine(places: list[Path]) -> dict[str, str]:
    bf16 = with_precision(TrainConfig(data={"folder": "demo"})).train.mixed_precision == "bf16"  # type: ignore[arg-type]
    found = {
        "python": f"{platform.python_version()}, "
        + ", ".join(f"{name} {number}" for name, number in versions().items())
    }
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        found[f"GPU {number}"] = f"{name}, {_gib(total)}, {_gib(free)} of it free"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    power = f"{numbered(cores or 1, 'core')}, {numbered(torch.get_num_threads(), 'thread')}"
    return found | {
        "processor": f"{power}, {_gib(memory_of_machine())} of memory",
        "precision": f"train.mixed_precision auto is {'bf16' if bf16 else 'float32: no instructions for bfloat16'}",
        "bitsandbytes": _tried("bitsandbytes", _bitsandbytes_fault),
        "xformers": _tried("xformers", lambda device: xformers_fault(device, torch.float32)),
        "compiler": _compiler() or "none: model.compile needs g++ or clang++",
        "disk": ", ".join(f"{_gib(_free(place))} free for {place}" for place in places),
    }


def memory_of_machine() -> int:
    """Bytes that a process here may have: the machine's, or its container's."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if Path(path).is_file() and (text := Path(path).read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def _tried(package: str, fault_of: Callable[[torch.device], str | None]) -> str:
    """What a tiny operation of an optional package shows."""
    if find_spec(package) is None:
        return "absent"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fault = fault_of(device)
    return f"{version(package)} " + (f"works on {device.type}" if fault is None else f"does not run here: {fault}")


def _bitsandbytes_fault(device: torch.device) -> str | None:
    weight = nn.Parameter(torch.zeros(64, 64, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        importlib.import_module("bitsandbytes.optim").AdamW8bit([weight], lr=1.0).step()
    except Exception as error:  # a package without a kernel for this device raises almost anything
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None if bool((weight < 0).all()) else "a step of AdamW8bit left weights where they were"


def _compiler() -> str | None:
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None
    )


def _free(place: Path) -> int:
    there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


# The base and the data


def _of_base(base: Base) -> dict[str, str]:
    parameters = sum(p.numel() for p in loading.skeleton(base).parameters())
    variance = {"none": "no learned variance"}.get(base.variance, "a learned variance")
    found = {
        "base": f"{base.name}: {parameters:,} parameters, {base.native_size} x {base.native_size} pixels",
        "its output": f"{base.prediction_type}, {variance}",
    }
    return found if Path(base.place).is_dir() else found | {"to download": _to_download(base)}


def _plotted(config: TrainConfig, base: Base, path: Path) -> str:
    objective, _ = build_objective(config, base)
    choice = config.diffusion
    law = timestep_probabilities(
        choice.timestep_law,
        objective.schedule.num_steps,
        mean=choice.logit_mean,
        std=choice.logit_std,
        within=objective.within,
    )
    predicts = f"predicts {objective.prediction_type}, {choice.objective}, weighting {choice.weighting}"
    process_plot(
        path,
        title=f"{config.run.name}: schedule {choice.schedule}, {predicts}, {choice.timestep_law} t",
        schedule=objective.schedule,
        base=base.schedule,
        weights=objective.noise_weights,
        law=law,
    )
    return str(path)


def _to_download(base: Base) -> str:
    """What of a Hub's base is not on this machine."""
    try:
        files = HfApi().model_info(base.place, revision=base.commit, files_metadata=True).siblings or []
    except Exception:  # out of reach, or a mirror that knows no sizes
        return "unknown: the Hub does not tell"
    sizes: dict[str, int] = {}
    for file in files:
        part, _, name = file.rfilename.partition("/")
        wanted = part in _PARTS and not name.endswith((".bin", ".onnx", ".msgpack")) and ".fp16." not in name
        if wanted and not isinstance(try_to_load_from_cache(base.place, file.rfilename, revision=base.commit), str):
            sizes[part] = sizes.get(part, 0) + (file.size or 0)
    return ", ".join(f"{part} {_gib(size)}" for part, size in sizes.items()) or "nothing, it is all here"


def _of_data(config: TrainConfig, card: int | None) -> Overview | None:
    """Print what a run says at its start, and more of its pictures and captions, which are given; None without them."""
    if not config.data.every_source():
        print("pictures           none were given (--data.folder)")
        return None
    accelerator = accelerator_for(config) if card is None else None
    start = look(config, None)
    RunFolder(config.run.folder).probe()
    device, processes = f"an NVIDIA GPU of {_gib(card or 0)}", 1
    if accelerator is not None:
        device, processes = str(accelerator.device), accelerator.num_processes
    overview = start.overview(config.data)
    print("\n".join([*start.facts(config, device, processes), *overview.details()]))
    start.warn(overview, config)
    return overview


def _longest(config: TrainConfig, base: Base, overview: Overview | None) -> int | None:
    """The tokens of the longest text that T5 is given, where pictures and tokenizer are at hand."""
    if overview is None or overview.longest is None:
        return None
    prompts = token_ids(loading.load_tokenizer(base.whole), config.validation.prompts, config.data.max_tokens)
    return max(overview.longest, *map(len, prompts), 0)


# Memory


def _case(config: TrainConfig, base: Base, card: int | None, overview: Overview | None) -> Case:
    return Case.of(
        config, base, tokens=_longest(config, base, overview), on_gpu=card is not None or torch.cuda.is_available()
    )


def _weigh(case: Case, card: int | None) -> None:
    """Print what each stage needs; UserError with what would help where one does not fit."""
    room, where = _room(card)
    alone = "" if asked_for(os.environ) == 1 else ", for one process without shards"
    print(f"\nmemory             predicted, a stage after the other, in {where}{alone}")
    needs = {}
    for stage, need_of in _STAGES.items():
        if stage == _SAMPLES and not case.config.validation.prompts:
            continue
        if (need := need_of(case)) is not None:
            needs[stage] = need
            print(f"  {stage:<17}{_gib(need.bytes):>9}   {_parts(need)}".rstrip())
    lacking = {stage: need for stage, need in needs.items() if need.bytes > room}
    if not lacking:
        tight = max(need.bytes for need in needs.values()) > room / 1.15
        print("it fits, tightly: a prediction is good to about 15 %" if tight else "it fits")
        return
    told = "; ".join(f"{stage} needs {_gib(need.bytes)}" for stage, need in lacking.items())
    raise UserError("\n".join([f"it is not likely to fit into {_gib(room)}: {told}", *_remedies(case, lacking, room)]))


def _measure_disk(case: Case) -> None:
    """Print what the run's folder will hold; UserError where the disk has less."""
    need, folder = memory.on_disk(case), case.config.run.folder
    free = _free(folder)
    print(f"disk               {_gib(need.bytes)} in {folder}, of {_gib(free)} free: {_parts(need)}".rstrip(": "))
    if need.bytes > free:
        raise UserError(
            f"{folder} will hold up to {_gib(need.bytes)} and its disk has {_gib(free)} free: another run.folder, a "
            "smaller train.keep_checkpoints or a larger validation.samples_every helps"
        )


_CAPTIONS, _PICTURES, _TRAINING, _SAMPLES = "captions by T5", "pictures by VAE", "training", "sample grid"
_STAGES = {
    _CAPTIONS: memory.captions,
    _PICTURES: memory.pictures,
    _TRAINING: memory.training,
    _SAMPLES: memory.samples,
}


def _room(card: int | None) -> tuple[int, str]:
    """Bytes that a training can have, and where, in words."""
    if card is None and not torch.cuda.is_available():
        whole, own = memory_of_machine(), _own_memory()
        return whole - own, f"{_gib(whole)}, of which the libraries have {_gib(own)}"
    whole = torch.cuda.mem_get_info()[1] if card is None else card
    return max(0, whole - CUDA_ITSELF), f"the GPU's {_gib(whole)}, of which CUDA itself takes about {_gib(CUDA_ITSELF)}"


def _own_memory() -> int:
    """Bytes of this process that lie in memory."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.is_file() else 0


def _remedies(case: Case, lacking: Mapping[str, Need], room: int) -> Iterator[str]:
    """Lines that say what each change brings, and all that help together."""
    for stage, need in lacking.items():

        def line(changes: Mapping[str, Any], stage: str = stage, need: Need = need) -> str | None:
            config = _changed(case.config, changes)
            other = _STAGES[stage](Case.of(config, case.base, tokens=case.tokens, on_gpu=case.on_gpu))
            size = need.bytes if other is None else other.bytes
            if size > 0.97 * need.bytes:
                return None
            options = " ".join(f"--{key} {_typed(value)}" for key, value in changes.items())
            return f"  {stage:<16}{_gib(size):>9}{' fits ' if size <= room else '      '}with {options}"

        found = {told: way for way in _changes(case, stage) if (told := line(way)) is not None}
        yield from found
        if len(found) > 1 and (told := line({key: value for way in found.values() for key, value in way.items()})):
            yield told
    if _CAPTIONS in lacking:
        yield "  captions can be encoded on another machine: copy its data.cache"
    if _SAMPLES in lacking:
        yield "  sample grids are left out with --validation.prompts []"


def _changes(case: Case, stage: str) -> list[dict[str, Any]]:
    """Settings that may make a stage smaller, the gentlest first."""
    config, rows = case.config, case.config.train.batch_size
    ways: dict[str, list[tuple[bool, dict[str, Any]]]] = {
        _CAPTIONS: [
            (True, {"model.text_encoder_dtype": "bfloat16"}),
            (config.model.text_encoder_quantization == "none", {"model.text_encoder_quantization": "int8"}),
            (config.model.text_encoder_quantization != "nf4", {"model.text_encoder_quantization": "nf4"}),
        ],
        _PICTURES: [(True, {"data.resolution": (case.resolution // 2 // 16 * 16,)})],
        _TRAINING: [
            (not config.model.gradient_checkpointing, {"model.gradient_checkpointing": True}),
            (rows > 1, {"train.batch_size": 1, "train.accumulation": rows * config.train.accumulation}),
            (case.on_gpu and config.train.mixed_precision != "bf16", {"train.mixed_precision": "bf16"}),
            (case.on_gpu and config.train.ema_decay > 0, {"train.ema_on_cpu": True}),
            (config.optim.optimizer == "adamw" and _is_installed(_EIGHT_BITS), {"optim.optimizer": _EIGHT_BITS}),
            (config.adapter.kind != "full" and config.model.quantization == "none", {"model.quantization": "nf4"}),
        ],
    }
    return [way for applies, way in ways.get(stage, []) if applies]


def _is_installed(optimizer: str) -> bool:
    try:
        check_installed(optimizer)
    except UserError:
        return False
    return True


def _settled(config: TrainConfig, card: int | None) -> TrainConfig:
    """With its precision known: this machine's, or bf16 on a card."""
    if card is not None and config.train.mixed_precision == "auto":
        return _changed(config, {"train.mixed_precision": "bf16"})
    return with_precision(config)


def _changed(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    for key, value in changes.items():
        section, _, name = key.partition(".")
        part = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: part})
    return config


def _typed(value: object) -> str:
    """A setting as the command line takes it."""
    return str(value[0] if isinstance(value, tuple) else value).lower()


def _parts(need: Need) -> str:
    return ", ".join(f"{name} {_number(size)}" for name, size in need.parts.items() if size >= 0.005 * _GIB)


def _gib(size: int) -> str:
    return f"{_number(size)} GiB"


def _number(size: int) -> str:
    """In GiB, of three digits at most."""
    value = size / _GIB
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
