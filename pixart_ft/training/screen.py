"""How far a training is, for people: a bar on a terminal; in a file a line for each line of the log."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm

from pixart_ft.config.text import numbered


class Screen:
    """Shows pictures seen of all, their rate, the time left and the loss, on the standard error."""

    def __init__(self, pictures: int, seen: int, *, show: bool) -> None:
        """`pictures` of the whole run, of which `seen` were before; not `show`: nothing is written."""
        self.pictures, self.seen, self.show = pictures, seen, show
        self._bar: tqdm | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, a terminal has a bar, whose rate is that of what is shown inside."""
        with tqdm(
            total=self.pictures,
            initial=self.seen,
            unit=" pictures",
            desc="training",
            dynamic_ncols=True,
            disable=not (self.show and sys.stderr.isatty()),
        ) as self._bar:
            yield

    def move(self, pictures: int) -> None:
        """So many more were seen."""
        self.seen += pictures
        if self._bar is not None:
            self._bar.update(pictures)

    def tell(self, loss: float, rate: float) -> None:
        """A line of the log was written: the mean loss since the one before, and pictures per second."""
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(f"loss {loss:.4f}")
        elif self.show:
            left = tqdm.format_interval((self.pictures - self.seen) / rate)
            where = f"training: {self.seen:,} of {numbered(self.pictures, 'picture')}"
            with suppress(OSError):  # whoever read it may be gone, and the state is still to be saved
                print(f"{where}, {rate:.3g} a second, {left} left, loss {loss:.4f}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """What is written from here on begins a line of its own."""
        if self._bar is not None:
            self._bar.close()
