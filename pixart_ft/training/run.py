"""From a configuration to a finished run: check, encode once, build the parts, train, leave adapter and pictures.

What a user can get wrong is found before the run folder is made, and what is cheap to check before what is not.
"""

import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import PixArtTransformer2DModel

from pixart_ft.config.reading import flat, to_yaml
from pixart_ft.config.train import TrainConfig
from pixart_ft.data.buckets import Sized, whole_fit
from pixart_ft.errors import UserError, attempted
from pixart_ft.files import remove_folder, sha256, versions, write_text
from pixart_ft.model import loading
from pixart_ft.model.base import Base
from pixart_ft.model.projection import take_projected
from pixart_ft.model.text import TEXT_PREPARATION, prepare_text
from pixart_ft.model.text_encoder import TextEncoder
from pixart_ft.pictures.sheets import Sample
from pixart_ft.runs.folder import RunFolder, content_of
from pixart_ft.runs.lock import RunLock
from pixart_ft.runs.metadata import AdapterMetadata
from pixart_ft.sampling.settings import Abilities, Settings
from pixart_ft.sampling.text_to_image import TextToImage
from pixart_ft.training import speed
from pixart_ft.training.batches import TrainingSet
from pixart_ft.training.before_after import HELD_OUT, LEARNED
from pixart_ft.training.ema import Ema, OwnAverage
from pixart_ft.training.encode import Encoded, compute_dtype, encode_once
from pixart_ft.training.keeping import Keeper
from pixart_ft.training.kinds import Source
from pixart_ft.training.objective import abilities_after, warn_of_relearning
from pixart_ft.training.optimizers import build_optimizer
from pixart_ft.training.places import check_training
from pixart_ft.training.processes import Together, agree, shards_asked_for
from pixart_ft.training.report import compare_with_base, finish, publish
from pixart_ft.training.sharding import Whole, in_shards
from pixart_ft.training.start import accelerator_for, look, with_precision
from pixart_ft.training.trackers import begin_trackers
from pixart_ft.training.trained_on import Changes, announce, check_continues, trained_on
from pixart_ft.training.trainer import Trainer


def run_training(
    config: TrainConfig, resume: str | None = None, init_from: str | None = None, *, accept_changes: bool = False
) -> Path:
    """Train as `config` says and return the run folder.

    resume: "auto" or a checkpoint folder, continues the run in config.run.folder with all its state. init_from: an
    adapter, model or run folder whose weights start a new run. accept_changes: continue though what the run is trained
    on has changed (see `trained_on`). Raises UserError for whatever the user can mend.
    """
    return train(config, resume, check_training(config, resume, init_from), accept_changes)


def train(config: TrainConfig, resume: str | None, source: Source | None, accept_changes: bool) -> Path:
    """As `run_training`, once `check_training` has found what to start from."""
    config = with_precision(config)
    accelerator = accelerator_for(config)
    folder = RunFolder(config.run.folder)
    with Together(accelerator), RunLock(folder.path) as lock:
        if accelerator.is_main_process and resume is not None and folder.path.is_dir():
            lock.take()  # before anything in the folder is looked at
        run, held = _run(config, resume, source, accept_changes, accelerator, folder, lock)
    if accelerator.is_main_process:  # the others need not wait for it
        if config.validation.report:
            fits = [whole_fit(size, config.data.crop) for size in held.sizes]
            compare_with_base(run, config, list(zip(held.rows, fits, strict=True)), str(accelerator.device))
        publish(run, config.hub)
    return run


def _run(
    config: TrainConfig,
    resume: str | None,
    source: Source | None,
    accept_changes: bool,
    accelerator: Accelerator,
    folder: RunFolder,
    lock: RunLock,
) -> tuple[Path, Sized]:
    """The run's folder, and what is held out."""
    main = accelerator.is_main_process
    if main:
        folder.probe()  # before the cache remembers what pictures are like
    start = look(config, resume, accelerator, progress=main)
    base, objective = start.base, start.objective
    plan, checkpoint = start.plan, start.checkpoint
    learned, held, digests = start.learned, start.held, start.pictures.digests
    schedule_config = start.schedule_config
    overview = start.overview(config.data) if main else None
    if overview:
        facts = start.facts(config, str(accelerator.device), accelerator.num_processes)
        print("\n".join([*facts, *overview.facts()]))
        start.warn(overview, config)
    with accelerator.main_process_first():  # hashing T5-XXL takes long, and is remembered
        about = trained_on(config, base, start.train, start.prior, held, digests, schedule_config, objective)
    begins = {
        "--resume": f"{checkpoint.name} ({content_of(checkpoint)[:8]})" if checkpoint else "not given",
        "--init-from": f"{source.name} ({_marks(source.files)})" if source else "not given",
    }
    agree(accelerator, about.facts() | begins)
    if checkpoint is not None:
        check_continues(folder, checkpoint, about, start.learning_rate, accept_changes)
    encoded = encode_once(config, base, learned, held, accelerator, digests, prior=len(start.prior.rows))

    kind = start.kind
    transformer = loading.load_transformer(base, dtype=kind.dtype)
    fingerprint = loading.fingerprint(transformer)
    about = about.with_base(transformer, base.name)
    agree(accelerator, about.facts())
    found = Changes([], [], [])
    if checkpoint is not None:
        found = check_continues(folder, checkpoint, about, start.learning_rate, accept_changes)
    if config.data.project_captions:
        take_projected(transformer)
    kind.prepare(transformer, seed=config.run.seed, interval=objective.interval, device=accelerator.device)
    if source is not None:
        kind.start_from(transformer, source, fingerprint)
        warn_of_relearning(source.metadata, objective, config.diffusion.time_conditioning)
    engine = speed.set_up(config, transformer, encoded, accelerator, folder.path / "environment.json")
    transformer.train()
    divided = torch.distributed.is_initialized() and shards_asked_for(os.environ)
    network = in_shards(transformer, accelerator) if divided else transformer.to(accelerator.device)
    speed.set_up_blocks(config, network, accelerator)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if config.optim.stochastic_rounding:
        for parameter in trained.values():
            parameter.data = parameter.data.bfloat16()
    optimizer = build_optimizer(config.optim, trained, config.run.seed)
    average = ema = _average(config, trained, optimizer)
    whole = None
    if divided:
        piece = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
        ema = _average(config, piece, optimizer) if accelerator.is_main_process else Ema.off()
        whole = Whole(accelerator, transformer, ema, network, average)

    abilities = abilities_after(objective, base, start.resolution)
    metadata = AdapterMetadata(
        base_fingerprint=fingerprint,
        prediction_type=objective.prediction_type,
        schedule=schedule_config,
        time_conditioning=config.diffusion.time_conditioning,
        variance=abilities.variance,
        max_tokens=config.data.max_tokens,
        text_preparation=TEXT_PREPARATION,
        weights="raw",
        samples_seen=0,
        interval=objective.interval,
        **kind.described(base),
    )
    keeper = Keeper(
        kind=kind,
        folder=folder,
        transformer=transformer,
        ema=ema,
        metadata=metadata,
        null_caption=encoded.null_caption,
        samples_every=config.validation.samples_every,
        most=config.train.keep_checkpoints,
        last_step=plan.steps,
    )
    own, prior = (  # as many of each size as have latents
        Counter(learned.sizes[number] for number in encoded.learned if (number >= len(start.train.rows)) == is_prior)
        for is_prior in (False, True)
    )
    trainer = Trainer(
        accelerator=accelerator,
        transformer=network,
        whole=whole,
        objective=objective,
        data=TrainingSet(
            encoded.train,
            encoded.scale,
            encoded.null_text,
            prior=sum(prior.values()),
            prior_weight=config.data.prior_weight,
            names=[learned.rows[number].name for number in encoded.learned],
            captions=encoded.captions,
            buckets=tuple(own.values()),
            prior_buckets=tuple(prior.values()),
            together=plan.batch_size * plan.accumulation * accelerator.num_processes if start.several_sizes else 1,
            masked=any(row.mask is not None for row in learned.rows),
        ),
        optimizer=optimizer,
        ema=average,
        laws=start.laws,
        learning_rate=start.learning_rate,
        plan=plan,
        folder=folder,
        held_out=encoded.held_out,
        measure_raw=config.validation.raw_weights,
        draw_samples=_sampler(config, encoded, base, abilities, transformer, fingerprint, accelerator),
        describe=about.write,
        export=keeper.at_the_end,
        keep_adapter=keeper.on_the_way,
    )
    if checkpoint is not None:
        trainer.load(checkpoint)
    environment = json.dumps(_environment(accelerator) | engine, indent=1) + "\n"
    if accelerator.is_main_process:
        RunFolder.create(folder.path, resume=resume is not None)
        lock.take()
        done = trainer.step if checkpoint is not None else -1
        folder.cut(done)
        write_text(folder.config_file, to_yaml(config))
        write_text(folder.path / "environment.json", environment)
        if overview and not folder.contact_sheet.exists():
            with attempted("the contact sheet"):
                overview.save_sheet(folder.contact_sheet)
        if resume is not None:
            announce(folder, checkpoint, plan.steps, found)
    if found.begins_anew:
        trainer.watch.begin_anew(trainer.progress, found.names)
    if source is not None:
        trainer.save()  # else a run that is resumed before its first checkpoint would begin without these weights
    accelerator.wait_for_everyone()
    try:
        begin_trackers(accelerator, config.logging.trackers, config.run.name, folder.path, flat(config))
    except UserError:
        if resume is None and accelerator.is_main_process:
            remove_folder(folder.path)  # else the next try would find a run there
        raise
    trainer.run()
    if accelerator.is_main_process:
        finish(folder, kind.what, trainer, config.validation.prompts, {LEARNED: start.train.rows, HELD_OUT: held.rows})
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder.path, held


# The steps of it


def _marks(files: Iterable[Path]) -> str:
    """By what files of weights are told apart."""
    return " ".join(sha256(file)[:8] for file in files)


def _average(config: TrainConfig, trained: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> Ema:
    choice = config.train
    if config.optim.optimizer == "schedule_free":
        return OwnAverage(trained, optimizer)
    if not choice.ema_decay:
        return Ema.off()
    return Ema(trained, choice.ema_decay, choice.ema_profile, width=choice.ema_width, on_cpu=choice.ema_on_cpu)


def _sampler(
    config: TrainConfig,
    encoded: Encoded,
    base: Base,
    abilities: Abilities,
    transformer: PixArtTransformer2DModel,
    fingerprint: str,
    accelerator: Accelerator,
) -> Callable[[], list[Sample]] | None:
    """Draws the fixed prompts with the network as it stands, one picture for every prompt and seed."""
    if not encoded.prompts or not accelerator.is_main_process:
        return None if not encoded.prompts else list
    choice, vae = config.validation, loading.load_vae(base, dtype=torch.float32)
    known = dict(zip(map(prepare_text, choice.prompts), encoded.prompts, strict=True)) | {"": encoded.null_text}
    model = TextToImage(
        transformer=transformer,
        vae=loading.decoder_only(vae).to(accelerator.device),
        text=TextEncoder(config.data.max_tokens, known=known, quantization=config.model.text_encoder_quantization),
        abilities=abilities,
        base=base,
        fingerprint=fingerprint,
        dtype=torch.float32 if config.train.mixed_precision == "no" else compute_dtype(config),
    )
    settings, seeds = model.settled(Settings.of(choice)), choice.seeds

    def draw() -> list[Sample]:
        samples = []
        for prompt in choice.prompts:
            pictures = model.draw([(prompt, seed) for seed in seeds], settings, batch_size=len(seeds))
            samples += [Sample(prompt, *one) for one in zip(seeds, pictures, strict=True)]
        return samples

    return draw


def _environment(accelerator: Accelerator) -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "versions": versions(),
        "device": str(accelerator.device),
        "device_name": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }
