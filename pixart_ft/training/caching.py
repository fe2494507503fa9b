"""`pixart-ft cache`: what T5 and the VAE are needed for, made ahead of a training by all processes; or read through."""

from pixart_ft.config.text import numbered
from pixart_ft.config.train import TrainConfig
from pixart_ft.data.cache import CachedPictures
from pixart_ft.data.rows import listed
from pixart_ft.data.store import TensorStore
from pixart_ft.errors import UserError
from pixart_ft.training.encode import encode_once
from pixart_ft.training.processes import Together, agree
from pixart_ft.training.start import accelerator_for, look, with_precision
from pixart_ft.training.trained_on import trained_on


def cache(config: TrainConfig) -> list[str]:
    """Encode what the cache misses for this training; returns what it holds of it, in lines, on the first process.

    Raises UserError for pictures, captions and settings that the training would refuse before it loads the network,
    and not for its run's folder or what it would start from.
    """
    if config.data.live:
        raise UserError("data.live keeps nothing of the training, so there is nothing to encode ahead; leave it out")
    config = with_precision(config)
    accelerator = accelerator_for(config)
    with Together(accelerator):
        main = accelerator.is_main_process
        start = look(config, None, accelerator, progress=main)
        digests = start.pictures.digests
        with accelerator.main_process_first():  # hashing T5-XXL takes long, and is remembered
            before = len(TensorStore(config.data.cache))
            about = trained_on(
                config,
                start.base,
                start.train,
                start.prior,
                start.held,
                digests,
                start.schedule_config,
                start.objective,
            )
        agree(accelerator, about.facts())
        prior = len(start.prior.rows)
        encoded = encode_once(config, start.base, start.learned, start.held, accelerator, digests, prior=prior)
        assert isinstance(encoded.train, CachedPictures)
        accelerator.wait_for_everyone()
    if not main:
        return []
    latents, texts = (sizes.mean() for sizes in encoded.train.sizes())
    store = TensorStore(config.data.cache)
    held = numbered(len(store), "encoding")
    return [
        *start.pictures.facts(),
        f"cache              {store.folder}: {held}, {len(store) - before:,} of them made now",
        f"on average         {latents:,.0f} bytes a view of a picture, {texts:,.0f} a caption",
    ]


def verify(config: TrainConfig) -> list[str]:
    """Read the whole cache; returns what it holds, in lines. Raises UserError naming the files that were damaged."""
    store = TensorStore(config.data.cache)
    if not store.folder.is_dir():
        raise UserError(f"data.cache: there is no folder {store.folder}; give that of a cache")
    if damaged := store.verify():
        kinds = {
            "damaged files, removed (the next run encodes anew what was in them)": False,
            "damaged files that cannot be removed (delete them by hand)": True,
        }
        found = {kind: [str(path) for path in damaged if path.exists() == there] for kind, there in kinds.items()}
        named = "\n".join(listed(kind, paths) for kind, paths in found.items() if paths)
        raise UserError(f"data.cache: {store.folder} was not whole:\n{named}")
    return [f"cache              {store.folder}: {numbered(len(store), 'encoding')}, all as they were written"]
