"""What opening and reading a cache of tiny tensors costs, for 10^3 to 10^6 samples.

    python scripts/cache_scale.py [--samples 1000 10000 100000 1000000] [--folder FOLDER]

A sample is the two tensors that a picture has in a cache, one of the latents' kind and one of 1 to 300 tokens, each of
a few bytes, as only their number is in question. Every size is opened in a process of its own, once without an index
and once with one; memory is what that process has more than before it opened the cache.
"""

import argparse
import gc
import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart_ft.data.store import INDEX, TensorStore

READS = 20_000


def key(kind: str, number: int) -> str:
    """As the cache names its tensors."""
    return sha256(f"{kind} {number}".encode()).hexdigest()


def samples(count: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of so many samples; each begins with its number."""
    for number in range(count):
        yield key("latent", number), torch.full((2, 4, 1, 1), float(number))
        yield key("text", number), torch.full((1 + number % 300, 1), number, dtype=torch.int32)


def resident() -> float:
    """MB of memory that this process has."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def measure(folder: Path, count: int, told: Any) -> None:
    """Open the cache, look up all samples, and read some at random."""
    keys = {kind: [key(kind, number) for number in range(count)] for kind in ("latent", "text")}
    TensorStore(folder / "none").missing(list(keys["latent"][:9]))
    before, begun = resident(), time.perf_counter()
    store = TensorStore(folder)
    opened, held_open = time.perf_counter() - begun, resident() - before
    begun = time.perf_counter()
    latents, texts = store.held(keys["latent"]), store.held(keys["text"])
    found, shards = time.perf_counter() - begun, len(store._shards.files)
    del store
    kept = resident() - before
    numbers = random.Random(0).choices(range(count), k=READS // 2)
    begun = time.perf_counter()
    for number in numbers:
        assert latents[number][0, 0] == texts[number][0] == number
    reads = READS / (time.perf_counter() - begun)
    told.put((shards, opened, found, held_open, kept, reads))


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6], help="sizes")
    parser.add_argument("--folder", type=Path, help="where the caches are made; else a temporary folder")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(
        "| samples | shards | written, s | opened, s | opened without index, s | keys found, s | MB open | MB kept |",
        end="",
    )
    print(" reads per s |\n|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        for count in options.samples:
            folder, lines = Path(place) / str(count), []
            begun = time.perf_counter()
            TensorStore(folder).fill(samples(count))
            written = time.perf_counter() - begun
            for _ in range(2):
                told = context.Queue()
                process = context.Process(target=measure, args=(folder, count, told))
                process.start()
                lines.append(told.get())
                process.join()
            assert (folder / INDEX).exists()
            (_, slowly, *_), (shards, opened, found, held_open, kept, reads) = lines
            times = " | ".join(f"{seconds:.2f}" for seconds in (written, opened, slowly, found))
            print(f"| {count:,} | {shards:,} | {times} | {held_open:.0f} | {kept:.0f} | {reads:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
