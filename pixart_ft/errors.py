"""The one exception that stands for a user's mistake, and failures that must not end a run."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake the user can mend: the message says what is wrong, the value, the remedy and the config key or path.

    The command line prints the message alone and exits with code 2.
    """


@contextmanager
def attempted(what: str) -> Iterator[None]:
    """Turn a failure inside into a warning: for what only reports on a training, which it must not lose."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        warnings.warn(f"{what} could not be made; everything else goes on. Reason: {reason}", stacklevel=3)
