"""What opening and reading a cache of tiny tensors costs, for 10^3 to 10^6 samples.

    python scripts/cache_scale.py [--samples 1000 10000 100000 1000000] [--folder FOLDER]

A sample is the two tensors that a picture has in a cache, one of the latents' kind and one of 1 to 291 tokens, each of
a few bytes, as only their number is in question. Every size is opened in a process of its own, once without an index
and once with one. Seconds are those of a processor's core, system calls included, so other programs do not lengthen
them; the files are in the system's memory. MB are what that process has more than before it opened the cache: while it
looks for its keys, and afterwards.
"""

import argparse
import gc
import multiprocessing
import random
import re
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart_ft.data.store import INDEX, TensorStore
from pixart_ft.files import write_bytes

READS = 10_000
SHARD = 256  # tensors


def key(kind: str, number: int) -> str:
    """As the cache names its tensors."""
    return sha256(f"{kind} {number}".encode()).hexdigest()


def _shard_of(like: Tensor) -> tuple[list[str], bytes]:
    """A shard of `SHARD` such tensors as the store writes it: its header around the keys, and the rest."""
    names = [f"{number:064x}" for number in range(SHARD)]
    with tempfile.TemporaryDirectory() as folder:
        TensorStore(folder).add({name: like.clone() for name in names})
        content = next(Path(folder).iterdir()).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return re.split("|".join(names), content[8:start].decode()), content[start:]


def write(folder: Path, count: int) -> None:
    """A cache of so many samples: what the store writes of one shard of each kind, with other keys in it."""
    kinds = {"latent": [torch.zeros(2, 4, 1, 1)], "text": [torch.zeros(tokens, 1) for tokens in range(1, 301, 10)]}
    for kind, tensors in kinds.items():
        made = [_shard_of(tensor) for tensor in tensors]
        for number, first in enumerate(range(0, count, SHARD)):
            (begin, *around), data = made[number % len(made)]
            header = begin + "".join(key(kind, first + at) + text for at, text in enumerate(around))
            content = len(header).to_bytes(8, "little") + header.encode() + data
            write_bytes(folder / f"{sha256(content).hexdigest()}.safetensors", content)


def resident() -> float:
    """MB of memory that this process has."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def measure(folder: Path, count: int, told: Any) -> None:
    """Open the cache, look up all samples, and read some at random."""
    keys = {kind: [key(kind, number) for number in range(count)] for kind in ("latent", "text")}
    TensorStore(folder / "none").missing(list(keys["latent"][:9]))
    before, begun = resident(), time.process_time()
    store = TensorStore(folder)
    opened, held_open = time.process_time() - begun, resident() - before
    begun = time.process_time()
    latents, texts = store.held(keys["latent"]), store.held(keys["text"])
    found, shards = time.process_time() - begun, len(store._shards.files)
    del store
    kept = resident() - before
    numbers = random.Random(0).choices(range(count), k=READS // 2)
    begun = time.process_time()
    for number in numbers:
        assert latents[number].shape == (2, 4, 1, 1) and texts[number].shape[1] == 1
    reads = READS / (time.process_time() - begun)
    told.put((shards, opened, found, held_open, kept, reads))


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6], help="sizes")
    parser.add_argument("--folder", type=Path, help="where the caches are made; else a temporary folder")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(
        "| samples | shards | opened, s | opened without index, s | keys found, s | MB open | MB kept |",
        end="",
    )
    print(" reads per s |\n|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        for count in options.samples:
            folder, lines = Path(place) / str(count), []
            write(folder, count)
            for _ in range(2):
                told = context.Queue()
                process = context.Process(target=measure, args=(folder, count, told))
                process.start()
                lines.append(told.get())
                process.join()
            assert (folder / INDEX).exists()
            (_, slowly, *_), (shards, opened, found, held_open, kept, reads) = lines
            times = " | ".join(f"{seconds:.2f}" for seconds in (opened, slowly, found))
            print(f"| {count:,} | {shards:,} | {times} | {held_open:.0f} | {kept:.0f} | {reads:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
