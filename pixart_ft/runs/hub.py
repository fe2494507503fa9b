"""Models on the Hub: which names mean one, its files brought here, and what a refusal means. No torch.

Only a Hub id asks the network; with HF_HUB_OFFLINE=1 what was downloaded before is found.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pixart_ft.errors import UserError
from pixart_ft.files import reason_of

SAMPLES = "samples"  # the folder of a pushed result's pictures, which nothing is loaded from

_NAME = r"[\w-][\w.-]*"
_ID = re.compile(rf"({_NAME}/{_NAME})(?:@(\S+))?")
_SECRET = re.compile(r"\b(hf|api_org)_\w{16,}|Bearer [^'\"]+")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_MEANINGS = {
    401: f"it does not know who asks (401); check the name, and {_LOG_IN}",
    403: "your token may not do this (403); take one with that right, or ask for access on the page of the model",
    404: f"it has no such model (404); check the name, and to see a private one {_LOG_IN}",
    409: "it is being changed by somebody else (409); try again later",
    429: "you asked too often (429); try again later",
}


@dataclass(frozen=True)
class HubModel:
    """A model by its id, such as "owner/name", and the branch, tag or commit of it; None: its newest."""

    id: str
    revision: str | None = None

    @classmethod
    def named(cls, name: str | Path) -> Self | None:
        """What "owner/name" and "owner/name@revision" mean; None for any other name. No folder is looked for."""
        match = _ID.fullmatch(str(name))
        return cls(match[1], match[2]) if match else None

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"

    def fetch(self, key: str, *, top: bool = False) -> Path:
        """Its folder here, downloaded unless it is here already; top: only what an adapter may be, above its folders.

        Raises UserError, with `key` before it, for a model that cannot be had.
        """
        from huggingface_hub import snapshot_download

        kinds, left_out = (["*.json", "*.safetensors", "*.bin"], ["*/*"]) if top else (None, [f"{SAMPLES}/*"])
        with reached(f"{key}: {self} is no folder here, and cannot be had from the Hub"):
            return Path(
                snapshot_download(self.id, revision=self.revision, allow_patterns=kinds, ignore_patterns=left_out)
            )

    def has(self, file: str) -> bool:
        """Whether one of its files is there, which then is here too; of one that is out of reach: whether it is here.

        Raises what huggingface_hub raises.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError  # on the Hub, or here while that is out of reach

        try:
            hf_hub_download(self.id, file, revision=self.revision)
        except EntryNotFoundError:
            return False
        return True


def check_can_push(repo: str, key: str) -> None:
    """Raise UserError, naming `key`, unless a model may have this id, and somebody is there to push it."""
    from huggingface_hub import get_token, is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        legal = "/" in repo
    except HFValidationError:
        legal = False
    if not legal:
        raise UserError(
            f"{key} is {without_secrets(repo)!r}; expected owner/name, of letters, digits and - _ . inside, at most "
            "96 of each"
        )
    if is_offline_mode():
        raise UserError(f"{key}: HF_HUB_OFFLINE is set, and pushing asks the Hub; unset it, or push later")
    if get_token() is None:
        raise UserError(f"{key}: pushing needs a token that may write to {repo.partition('/')[0]}; {_LOG_IN}")


def check_base(named: str | None, trained_on: str, key: str) -> None:
    """Raise UserError unless the id that a base goes by on the Hub, if any, is one, and stands for a folder."""
    if named is not None and HubModel.named(named) is None:
        raise UserError(f"{key} is {named!r}; expected a Hub id, such as owner/name or owner/name@revision")
    if named is not None and not Path(trained_on).is_absolute():
        raise UserError(f"{key} is for a base that is a folder, and {trained_on} is known everywhere; leave it out")


@contextmanager
def reached(what: str, beside: str = "") -> Iterator[None]:
    """Turn what the Hub, or the way to it, refuses inside into a UserError: what, why, the remedy, what else to say."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        raise UserError(f"{what}: {meaning(error)}{beside}") from error


def meaning(error: BaseException) -> str:
    """Why the Hub, or the way to it, refused, and the remedy. It shows no token."""
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import (
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RevisionNotFoundError,
    )

    causes = list(_causes(error))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes) or (
        is_offline_mode() and isinstance(error, LocalEntryNotFoundError)
    ):
        return "HF_HUB_OFFLINE is set, and it was not downloaded before; unset it"
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return "it has no such revision (404); give one of its branches, tags or commits"
    if any(isinstance(cause, RemoteEntryNotFoundError) for cause in causes):
        return f"it lacks a file ({without_secrets(_line(str(error)))})"
    if (status := _status(error)) is not None:
        said = next((text for cause in causes if (text := getattr(cause, "server_message", None))), "")
        if status >= 500:
            return f"it does not work at the moment ({status}); try again later"
        found = _MEANINGS.get(status, f"it refused ({status})")
        return without_secrets(found if status in (401, 404) or not said else f"{found}. It says: {_line(said)}")
    if any(isinstance(cause, UnicodeEncodeError) for cause in causes):
        return f"a letter of the request cannot be sent; if it is of the token, {_LOG_IN} anew"
    if any(_is_of_the_line(cause) for cause in causes):
        return f"it cannot be reached ({without_secrets(_line(str(causes[-1])))}); check the connection, and try again"
    reason = reason_of(error) if isinstance(error, Exception) else None
    return reason or without_secrets(_line(str(error)) or type(error).__name__)


def may_pass(error: BaseException) -> bool:
    """Whether trying again a little later may help."""
    status = _status(error)
    return any(map(_is_of_the_line, _causes(error))) if status is None else status == 429 or status >= 500


def without_secrets(text: str) -> str:
    """The text with *** in place of what looks like a token."""
    return _SECRET.sub("***", text)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The one that the Hub answered with."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((cause.response.status_code for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)


def _is_of_the_line(error: BaseException) -> bool:
    """Whether there was no answer: huggingface_hub's errors of HTTP that are not the Hub's own."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    return isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError)


def _line(text: str) -> str:
    """The first one that says something."""
    return next((line.strip(" -") for line in text.splitlines() if line.strip()), "")
