"""How fast a training is, and what it waits for."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Pace:
    """The steps since the last line of the log: what is measured or drawn between them does not count."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pictures, self._seconds, self._waited = 0, 0.0, 0.0

    @contextmanager
    def step(self, pictures: int) -> Iterator[None]:
        """The block works on this many pictures more; on a GPU it may end before the GPU does."""
        begin = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - begin
        self._pictures += pictures

    def close(self, waited: float) -> dict[str, float]:
        """What the log is told, once the last of the steps is done; the next ones begin anew.

        samples_per_second; data_wait, the share of the time that they waited for their batches, where `waited` is the
        seconds of that since the run began; on a GPU memory_gb, the most that tensors took of it so far.
        """
        seconds = max(self._seconds, 1e-9)
        found = {"samples_per_second": self._pictures / seconds, "data_wait": (waited - self._waited) / seconds}
        if self._device.type == "cuda":
            found["memory_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        self._pictures, self._seconds, self._waited = 0, 0.0, waited
        return found
