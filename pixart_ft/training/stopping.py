"""How all processes of a run end together, and the request to stop from outside: SIGTERM, Ctrl-C, a closed terminal."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pixart_ft.errors import UserError

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
_HANGUP = getattr(signal, "SIGHUP", None)


class AllStopped(KeyboardInterrupt):
    """A run stopped because it was asked to, all its processes after the same step, with its state saved."""


class AllFailed(UserError):
    """What a user can mend, raised in all processes of a run at once; the first one says it."""


class StopRequest:
    """`asked` becomes true at the first signal inside `caught`; a second one acts at once, as it did before.

    Not that of a closed terminal, which comes twice.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Within, signals only ask; those that are ignored, as under nohup, still are.

        In another thread than the main one there are none to catch, by Python's rules.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # None: a handler that was not set from Python, and cannot be set again from there
        before = {number: signal.getsignal(number) or signal.SIG_DFL for number in _SIGNALS}
        heard = [number for number in _SIGNALS if before[number] != signal.SIG_IGN]

        def ask(number: int, frame: object) -> None:
            self.asked = True
            if number != _HANGUP:  # a terminal that closes says it twice
                signal.signal(number, before[signal.Signals(number)])

        try:
            for number in heard:
                signal.signal(number, ask)
            yield
        finally:
            for number in heard:
                signal.signal(number, before[number])
