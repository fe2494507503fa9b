"""The generate command: prompts times seeds to PNG files that hold their recipe, and a grid of them."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from pixart_ft.adapters.adopting import like_base, taken_in
from pixart_ft.adapters.files import Adapter, ForeignPlace
from pixart_ft.config.generate import GenerateConfig
from pixart_ft.config.text import numbered, read_text
from pixart_ft.config.train import HUB_BASE, MOST_PICTURES
from pixart_ft.errors import UserError
from pixart_ft.files import probe, write_text
from pixart_ft.model.base import Base
from pixart_ft.model.engine import check_engine
from pixart_ft.model.quantized import check_quantization
from pixart_ft.pictures.own import check_own, not_there_yet
from pixart_ft.pictures.recipes import changes, read_recipe
from pixart_ft.pictures.sheets import grid, picture_name, save_png
from pixart_ft.sampling.comparison import Cells, comparison_sheets, run_comparison, settled_cells
from pixart_ft.sampling.places import check_generation
from pixart_ft.sampling.settings import Abilities, Settings, settled, size_of
from pixart_ft.sampling.text_to_image import TextToImage, abilities_of, names_of

GRID_PIXELS = 8192  # longest side of grid.png, labels not counted
LEAST_CELL = 32  # pixels; rows and columns that would need smaller ones are left out


def run_generation(config: GenerateConfig, again: Path | None = None) -> list[Path]:
    """Draw every prompt of `config` with every seed into its folder, and a grid; returns the pictures' paths.

    A picture that is there with the same recipe is kept. Raises UserError, before drawing, when a file that
    would be written is there with another recipe, or none; only a grid of ours is drawn anew. With `compare`, see
    `comparison.run_comparison`.
    again: the picture whose recipe `config` was read from; warns of what has changed since then.
    """
    return generate(config, check_generation(config), again)


def generate(config: GenerateConfig, found: Sequence[Adapter | ForeignPlace], again: Path | None = None) -> list[Path]:
    """As `run_generation`, once `check_generation` has found the adapters."""
    started = time.perf_counter()
    prompts, base, adapters, settings, cells = _look(config, found)
    if config.aspect_ratio is not None:
        print(f"aspect_ratio {config.aspect_ratio}: {settings.width} x {settings.height} pixels")
    model = _load_model(config, base, adapters, prompts)
    if config.compare:
        return run_comparison(config, model, prompts, cells)
    seeds = range(config.seed, config.seed + config.images_per_prompt)
    jobs = {
        config.out / picture_name(f"{number:03d}", prompt, seed): (prompt, seed)
        for number, prompt in enumerate(prompts)
        for seed in seeds
    }
    shared = model.circumstances(settings)
    if again is not None and (changed := changes(read_recipe(again), shared)):
        warnings.warn(f"{again} may come out otherwise: {', '.join(changed)} changed since it was drawn", stacklevel=2)
    recipes = {path: {"prompt": prompt, "seed": seed} | shared for path, (prompt, seed) in jobs.items()}
    todo = not_there_yet(recipes)
    with model.progress_bar(len(todo), settings) as bar:
        drawn = model.draw([jobs[path] for path in todo], settings, batch_size=config.batch_size, progress=bar.update)
        for path, picture in zip(todo, drawn, strict=True):
            save_png(picture, path, recipes[path])
        made = bar.n
    if config.captions:
        sheet = _save_captions({path.with_suffix(".txt"): prompt for path, (prompt, _) in jobs.items()})
    else:
        side = max(settings.width or 0, settings.height or 0)
        sheet = f"\nall of them on one sheet: {_save_grid(config.out, list(jobs), prompts, seeds, side)}"
    print(
        f"pictures drawn: {len(todo)} in {time.perf_counter() - started:.1f} s; there already: {len(jobs) - len(todo)}"
    )
    print(_cost(settings, model.calls(settings), made / len(todo) if todo else None))
    print(f"pictures: {config.out}{sheet}")
    return list(jobs)


def dry_run(config: GenerateConfig, found: Sequence[Adapter | ForeignPlace]) -> list[str]:
    """What `generate` would draw; raises UserError as it does before it loads a weight. Writes nothing."""
    prompts, base, adapters, settings, cells = _look(config, found)
    device = device_of(config.device)
    dtype = str(dtype_of(config.dtype, device)).removeprefix("torch.")
    if config.compare:
        drawn = f"{numbered(len(prompts), 'sheet')} of {numbered(len(cells), 'picture')}"
    else:
        steps = numbered(str(settings.steps), f"{settings.sampler} step")
        drawn = f"{len(prompts) * config.images_per_prompt:,}, of {steps} each"
    return [
        f"device             {device}, weights {dtype}",
        f"model              {base.name}" + "".join(f", with the adapter {adapter.name}" for adapter in adapters),
        f"pictures           {drawn}, {settings.width} x {settings.height} pixels",
        f"folder             {config.out}",
    ]


def _look(
    config: GenerateConfig, found: Sequence[Adapter | ForeignPlace]
) -> tuple[list[str], Base, list[Adapter], Settings, Cells]:
    """Prompts, base, adapters, how to sample, the cells of a comparison: what can be refused before weights are loaded.

    Of another program's adapter the weights alone say what it is.
    """
    prompts = prompts_of(config.prompts, config.prompts_file, config.images_per_prompt)
    base = _base(config, [one for one in found if isinstance(one, Adapter)])
    adapters = taken_in(found, lambda: like_base(base), config.lora_alpha)
    abilities = abilities_of(base, adapters)
    name = names_of(adapter.name for adapter in adapters)
    settings = settled(_settings(config, abilities), abilities, name)
    cells = settled_cells(config, settings, abilities, name) if config.compare else {}
    device = device_of(config.device)
    check_engine(config.attention, config.compile, device, dtype_of(config.dtype, device))
    check_quantization("text_encoder_quantization", config.text_encoder_quantization)
    probe(config.out, "out")
    if config.compare:
        check_own(comparison_sheets(config, prompts), "sampler")
    elif not config.captions:
        check_own([config.out / "grid.png"], "pictures")
    return prompts, base, adapters, settings, cells


def _load_model(config: GenerateConfig, base: Base, adapters: Sequence[Adapter], prompts: Sequence[str]) -> TextToImage:
    """The base and adapters that a configuration asks for, all texts encoded and the text encoder freed."""
    device = device_of(config.device)
    model = TextToImage.of(
        base,
        adapters,
        config.lora_scale,
        dtype=dtype_of(config.dtype, device),
        device=device,
        prompts=[*prompts, config.negative_prompt],
        attention=config.attention,
        compiled=config.compile,
        text_encoder_quantization=config.text_encoder_quantization,
    )
    if config.compile:
        print("compiling one block of the network for all, at its first call: the first picture takes minutes")
    if config.tiling:
        model.vae.enable_tiling()
    return model


def _settings(config: GenerateConfig, abilities: Abilities) -> Settings:
    """How to sample, in the terms of the model."""
    settings = Settings.of(config)
    if config.aspect_ratio is None:
        return settings
    width, height = size_of(config.aspect_ratio, abilities)
    return replace(settings, width=width, height=height)


def _cost(settings: Settings, calls: int | None, on_average: float | None) -> str:
    """What a picture takes."""
    both = "" if settings.guidance == 1 else ", with and without the prompt"
    if calls is None:
        spent = "" if on_average is None else f", about {on_average:.0f} network calls{both}"
        return f"each picture: {settings.sampler} to tolerance {settings.options['tolerance']}{spent}"
    steps = numbered(str(settings.steps), f"{settings.sampler} step")
    return f"each batch: {steps}, {numbered(calls, 'network call')}{both}"


def _base(config: GenerateConfig, adapters: Sequence[Adapter]) -> Base:
    """The base asked for; without one, what the first adapter was trained on; without either, the Hub's.

    One of the Hub that the adapter was trained on comes in the revision of its training, unless another is asked for.
    """
    if config.model is not None or not adapters:
        return Base.read(config.model or HUB_BASE, config.revision, config.weights)
    trained_on = adapters[0].metadata
    moves = config.revision is None and not Path(trained_on.base).is_dir()
    return Base.read(trained_on.base, trained_on.revision if moves else config.revision)


def prompts_of(given: Sequence[str], file: Path | None, each: int) -> list[str]:
    """The prompts that are given, then those of a file, which are drawn `each` times. Raises UserError for none."""
    prompts = list(given)
    if file is not None:
        try:
            lines = read_text(file).split("\n")
        except (OSError, UserError) as error:
            raise UserError(f"prompts_file: cannot read {file} ({error})") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if (count := len(prompts) * each) > MOST_PICTURES:
        raise UserError(
            f"{numbered(len(prompts), 'prompt')} with images_per_prompt {each:,}: {count:,} pictures; "
            f"one command draws at most {MOST_PICTURES:,}"
        )
    if not prompts:
        raise UserError(f"nothing to draw: no prompts, and prompts_file ({file}) holds none")
    return prompts


def device_of(name: str) -> torch.device:
    """The device that a configuration names. Raises UserError for one that cannot be used here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device: {name!r} cannot be used here ({reason}); choose auto, cpu, cuda or mps") from error


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the weights that a configuration names."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _save_captions(captions: Mapping[Path, str]) -> str:
    """Write each prompt beside its picture, where none is yet: it may have been edited."""
    for path, prompt in captions.items():
        if not path.exists():
            write_text(path, prompt + "\n")
    return ", each with its caption: --data.prior or --data.folder takes it"


def _save_grid(folder: Path, paths: Sequence[Path], prompts: Sequence[str], seeds: Sequence[int], side: int) -> Path:
    """grid.png, drawn anew on every run: a row for each prompt, a column for each seed.

    side: the longer side in pixels of the pictures, which are shown no larger than that. No more rows and columns are
    shown than GRID_PIXELS has room for.
    """
    most = GRID_PIXELS // LEAST_CELL
    rows = [paths[start : start + len(seeds)][:most] for start in range(0, len(paths), len(seeds))][:most]
    cell = min(256, max(side, LEAST_CELL), GRID_PIXELS // max(len(rows), len(rows[0])))
    sheet = grid(
        [[_thumbnail(path, cell) for path in row] for row in rows],
        row_labels=prompts[:most],
        column_labels=[f"seed {seed}" for seed in seeds[:most]],
        cell=cell,
    )
    save_png(sheet, folder / "grid.png", {"pictures": [path.name for row in rows for path in row]})
    return folder / "grid.png"


def _thumbnail(path: Path, side: int) -> Image.Image:
    with Image.open(path) as picture:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        return picture.copy()
