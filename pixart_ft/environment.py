"""What a run or a picture was made with."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

from pixart_ft import __version__

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def versions() -> dict[str, str]:
    """The versions of this package and of the libraries that its numbers depend on."""
    return dict(_versions())


@cache  # every picture's recipe asks, and each answer takes milliseconds
def _versions() -> dict[str, str]:
    found = {"pixart_ft": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a vendored build without metadata
            found[name] = "unknown"
    return found
