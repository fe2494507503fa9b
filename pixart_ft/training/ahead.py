"""What is needed next, made by a worker while the caller works with what it has."""

import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")


class Ahead(Generic[Key, Made]):
    """Things made in a thread of its own, at most one ahead of the caller; a context, which ends the thread.

    waited   seconds that `take` has waited for the worker so far
    """

    def __init__(self, job: Callable[[Key], Callable[[], Made]]) -> None:
        """`job(key)` gives what the worker calls; it is asked in the caller's thread, when the worker is told."""
        self.waited = 0.0
        self._job = job
        self._begun: dict[Key, Future[Made]] = {}
        self._worker: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._worker is not None
        self._worker.shutdown(cancel_futures=True)
        self._begun.clear()

    def take(self, key: Key, following: Key | None) -> Made:
        """What was made for this key, or its error; the worker turns to `following`, unless None, meanwhile."""
        assert self._worker is not None, "the worker is there inside the context alone"
        future = self._begun.pop(key, None) or self._worker.submit(self._job(key))
        if following is not None:
            self._begun[following] = self._worker.submit(self._job(following))
        begin = time.perf_counter()
        try:
            return future.result()
        finally:
            self.waited += time.perf_counter() - begin
