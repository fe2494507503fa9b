"""What is made ahead. Oracle: the order in which the worker was asked, and what it was told."""

import threading
from collections.abc import Callable

import pytest

from pixart_ft.training.ahead import Ahead


def test_the_next_is_made_in_another_thread_while_the_caller_works() -> None:
    """And no more than the next."""
    made: dict[int, threading.Thread] = {}
    done = {key: threading.Event() for key in range(4)}

    def job(key: int) -> Callable[[], int]:
        def make() -> int:
            made[key] = threading.current_thread()
            done[key].set()
            return key * key

        return make

    with Ahead(job) as ahead:
        for key in range(3):
            assert ahead.take(key, key + 1) == key * key
            assert done[key + 1].wait(10) and list(made) == list(range(key + 2))
    assert {thread is threading.main_thread() for thread in made.values()} == {False}
    assert len(set(made.values())) == 1 and not made[0].is_alive()


def test_an_error_comes_where_the_thing_is_taken_and_the_thread_ends() -> None:
    def job(key: int) -> Callable[[], int]:
        return lambda: 1 // (1 - key)

    before = threading.active_count()
    with Ahead(job) as ahead:
        assert ahead.take(0, 1) == 1
        with pytest.raises(ZeroDivisionError):
            ahead.take(1, 2)
        assert ahead.take(2, None) == -1
    assert threading.active_count() == before


def test_what_nobody_takes_keeps_nobody() -> None:
    begun = threading.Event()

    def job(key: int) -> Callable[[], None]:
        return begun.set if key else lambda: None

    with pytest.raises(KeyboardInterrupt), Ahead(job) as ahead:
        ahead.take(0, 1)
        raise KeyboardInterrupt
