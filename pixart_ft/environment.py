"""What a run or a picture was made with."""

from importlib.metadata import PackageNotFoundError, version

from pixart_ft import __version__

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def versions() -> dict[str, str]:
    """The versions of this package and of the libraries that its numbers depend on."""
    found = {"pixart_ft": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a vendored build without metadata
            found[name] = "unknown"
    return found
