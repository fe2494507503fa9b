"""Shared fixtures: the tiny pipeline, a few pictures, and no network for anyone."""

import os

# Read by the libraries when they are imported, so set before any of them is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # toy models are slower on many threads

import gc
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


def pytest_collection_finish() -> None:
    """What was imported stays: a full collection, of which a run has several, need not look through it each time."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Refuse every connection that leaves the machine; process groups and local servers still work."""
    plain_connect = socket.socket.connect

    def connect(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in LOCAL_HOSTS:
            raise OSError(f"a test tried to reach {address}")
        plain_connect(self, address)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        yield


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk() -> Iterator[None]:
    """A short run waits for it some sixty times, as long as it computes; no test pulls the plug of the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline's folder (read only: it is shared by all tests)."""
    from tests.helpers.tiny import build_tiny_pipeline

    return build_tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 captioned 64 x 64 pictures (read only)."""
    from tests.helpers.tiny import build_picture_folder

    return build_picture_folder(tmp_path_factory.mktemp("pictures"), 12)


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "base"))
