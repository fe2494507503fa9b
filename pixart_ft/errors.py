"""The one exception that stands for a user's mistake, and failures that must not end a run."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake the user can mend: the message says what is wrong, the value, the remedy and the config key or path.

    The command line prints the message alone and exits with code 2.

    each   the single mistakes, where the message reports several
    """

    each: Sequence[str] = ()


def insist(faults: Sequence[str], *, strict: bool) -> None:
    """Raise UserError with these faults; where it was asked not to be strict, warn of each and go on."""
    if faults and strict:
        raise UserError("\n".join(faults))
    for fault in faults:
        warnings.warn(f"let pass: {fault}", stacklevel=4)


@contextmanager
def attempted(what: str) -> Iterator[None]:
    """Turn a failure inside into a warning: for what only reports on a training, which it must not lose."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        warnings.warn(f"{what} could not be made; everything else goes on. Reason: {reason}", stacklevel=3)


class Mistakes:
    """Several checks, one report: each failure is noted, and all are raised together."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, mistake: str) -> None:
        """Note one, once."""
        if mistake not in self._found:
            self._found.append(mistake)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the UserError of the block, and go on after it."""
        try:
            yield
        except UserError as error:
            for mistake in error.each or [str(error)]:
                self.add(mistake)

    def raise_if_any(self) -> None:
        """Raise one UserError with all that was noted."""
        if len(self._found) == 1:
            raise UserError(self._found[0])
        if self._found:
            error = UserError("\n  - ".join([f"{len(self._found)} problems", *self._found]))
            error.each = tuple(self._found)
            raise error
