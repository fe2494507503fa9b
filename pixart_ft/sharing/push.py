"""What a run trained goes to the Hub: its files, its settings, its pictures and a card, as one commit with a tag.

Nothing of the run is changed. What was uploaded before a failure is not uploaded again by the next try.
"""

import io
import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from PIL import Image

from pixart_ft.config import yaml_text
from pixart_ft.config.push import PushConfig
from pixart_ft.config.text import numbered, read_text
from pixart_ft.config.train import Weights
from pixart_ft.errors import UserError
from pixart_ft.files import read_object
from pixart_ft.pictures.recipes import read_recipe
from pixart_ft.runs.folder import TRAINED_ON, RunFolder, step_name
from pixart_ft.runs.hub import SAMPLES, HubModel, check_base, check_can_push, may_pass, reached
from pixart_ft.runs.manifest import MANIFEST, check_whole, manifest_with
from pixart_ft.runs.metadata import METADATA, AdapterMetadata, read_metadata
from pixart_ft.runs.results import What, find
from pixart_ft.sharing.card import Facts, Sample, card

CARD, SETTINGS, CURVE = "README.md", "config.yaml", "loss.png"
WAITS = (1, 5, 20)  # seconds before each new try
_MARKS: dict[What, str] = {"adapter": "adapter_config.json", "model": "model_index.json"}  # tell which one is there
_OURS = (f"{SAMPLES}/", "transformer/")  # where files have other names from one push to the next
# Settings that say where something lies, or what a caption is, and that the repository says by itself.
_PLACES = ("run.folder", "data.folder", "data.held_out", "data.prior", "data.sources", "data.cache", "model.base")
_PARTS = {  # of what a run is recorded to be trained on
    "training pictures": "pictures",
    "prior pictures": "pictures of the prior",
    "held-out pictures": "pictures held out",
    "size of the pictures": "size",
}

Done = TypeVar("Done")


@dataclass(frozen=True)
class Parcel:
    """What is pushed: each file by its path in the repository, as a file here or as its bytes; the tag, if any."""

    what: What
    files: Mapping[str, Path | bytes]
    tag: str | None

    def lines(self) -> list[str]:
        """Each file with its size, for people."""
        sizes = {name: len(of) if isinstance(of, bytes) else of.stat().st_size for name, of in self.files.items()}
        return [f"{size:>13,}  {name}" for name, size in sorted(sizes.items())]


def push(config: PushConfig) -> str:
    """Push what `config.run` means; returns the address of the repository.

    Raises UserError for what can be mended, and where the Hub is out of reach: the run is as it was then, and the same
    command goes on.
    """
    check_can_push(config.repo, "repo")
    parcel = pack(config)
    api, again = HfApi(), "; nothing here has changed, and the same command goes on from there"
    with reached(f"cannot push to {config.repo}", again):
        commit = _send(api, config, parcel)
        kept = "" if parcel.tag is None else _tag(api, config.repo, parcel.tag, commit)
    address = f"{api.endpoint}/{config.repo}"
    print(f"pushed {numbered(len(parcel.files), 'file')} to {address}{kept}")
    return address


def dry_run(config: PushConfig) -> list[str]:
    """What `push` would send, a line each, and the card. Asks nobody."""
    parcel = pack(config)
    tag = "" if parcel.tag is None else f", tag {parcel.tag}"
    private = ", private if it is made" if config.private else ""
    return [
        f"repository  {config.repo}, {config.revision or 'main'}{tag}{private}",
        *parcel.lines(),
        "",
        *bytes(parcel.files[CARD]).decode().splitlines(),
    ]


def pack(config: PushConfig) -> Parcel:
    """All that goes to the Hub. Raises UserError where there is no result, or it is no more as it was written."""
    what, folder, metadata = _result(config.run, config.weights)
    check_whole(folder, what)
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    told, whole = _without_places(metadata, config.base), "vae/config.json" in files
    if what == "model" and not whole and told.base != metadata.base and config.base is None:
        raise UserError(
            f"base: {folder} holds the network alone, and its VAE and text encoder are in {metadata.base}, which is a "
            "folder of this machine; say where the Hub has them (--base owner/name), or train with adapter.whole"
        )
    if told != metadata:
        changed = {METADATA: _json(asdict(told))}
        if what == "adapter":
            about = read_object(folder / _MARKS[what], what, "copy the adapter again")
            changed[_MARKS[what]] = _json({**about, "base_model_name_or_path": told.base})
        if MANIFEST in files:
            changed[MANIFEST] = manifest_with(folder, changed)
        files |= changed
    run = next((RunFolder(place) for place in folder.parents if RunFolder(place).is_run), None)
    settings: dict[str, Any] = {}
    samples: list[Sample] = []
    if run is not None:
        settings = _settings(run, metadata.base, show_prompts=config.show_prompts)
        files[SETTINGS] = yaml_text.dump(_nested(settings)).encode()
        for number, path in enumerate(_drawn(run, metadata.step)):
            recipe = read_recipe(path)
            samples.append(Sample(f"{SAMPLES}/{number:02d}-seed{recipe['seed']}.png", recipe["prompt"], recipe["seed"]))
            files[samples[-1].path] = _pixels(path)
        if folder.parent == run.final and (curve := run.final / CURVE).is_file():
            files[CURVE] = _pixels(curve)
    facts = Facts(
        repo=config.repo,
        what=what,
        metadata=told,
        whole=whole,
        name=None if run is None else run.path.name,
        settings=settings,
        data=[] if run is None else _data(run),
        held_out=[] if run is None else _held_out(run, metadata.step),
        samples=samples,
        curve=CURVE if CURVE in files else None,
    )
    files[CARD] = card(facts, config).encode()
    return Parcel(what, files, None if metadata.step is None else step_name(metadata.step))


def _result(name: str, weights: Weights) -> tuple[What, Path, AdapterMetadata]:
    """Whether `name` means an adapter or a model, its folder, and what it says of itself."""
    faults = []
    for what in get_args(What):
        try:
            folder = find(Path(name).absolute(), what, weights, read_metadata)  # what lies on the Hub is there already
        except UserError as error:
            faults.append(str(error))
        else:
            metadata = read_metadata(folder)
            return "model" if metadata.kind == "full" else "adapter", folder, metadata
    raise UserError(faults[0])


def _without_places(metadata: AdapterMetadata, base: str | None) -> AdapterMetadata:
    """With what finds the base everywhere; of a folder of this machine only its name, which finds it nowhere."""
    check_base(base, metadata.base, "base")
    if base is not None and (model := HubModel.named(base)) is not None:
        return replace(metadata, base=model.id, revision=model.revision)
    if Path(metadata.base).is_absolute():
        warnings.warn(
            f"its base is a folder of this machine ({metadata.base}), so who loads it has to name one (--model); where "
            "the Hub has it, say so with --base owner/name",
            stacklevel=3,
        )
        return replace(metadata, base=Path(metadata.base).name)
    return metadata


def _settings(run: RunFolder, base: str, *, show_prompts: bool) -> dict[str, Any]:
    """The run's settings by dotted keys, without places of this machine, and without prompts unless asked."""
    content = yaml_text.parse(read_text(run.config_file))
    sections = content.items() if isinstance(content, dict) else ()
    found = {f"{name}.{key}": value for name, part in sections if isinstance(part, dict) for key, value in part.items()}
    gone = {key for key in found if key.startswith("hub.")}
    gone |= {key for key in _PLACES if found.get(key) != "demo"}
    if (model := HubModel.named(str(found.get("model.base")))) is not None and model.id == base:
        gone.discard("model.base")  # else a folder that is spelled like an id
    if not show_prompts:
        gone.add("validation.prompts")
    return {key: value for key, value in found.items() if key not in gone}


def _nested(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        found.setdefault(section, {})[name] = value
    return found


def _data(run: RunFolder) -> list[tuple[str, str]]:
    """What it was trained on, as its newest checkpoint has it."""
    records = sorted(run.checkpoints.glob(f"*/{TRAINED_ON}"))
    parts = read_object(records[-1], "push", "leave the checkpoint out").get("parts", {}) if records else {}
    counts = [(title, parts.get(name, {}).get("words")) for name, title in _PARTS.items()]
    return [(title, words) for title, words in counts if words not in (None, "0")]


def _held_out(run: RunFolder, step: int | None) -> list[Mapping[str, Any]]:
    """The first and the last record with a held-out loss, up to a step."""
    records = [record for record in run.log.comparable() if "held_out" in record]
    known = [record for record in records if step is None or record["step"] <= step]
    return [known[0], known[-1]] if len(known) > 1 else []


def _drawn(run: RunFolder, step: int | None) -> list[Path]:
    """The pictures that were drawn with the result."""
    return [] if step is None else sorted(run.samples_at(step).glob("*.png"))


def _pixels(path: Path) -> bytes:
    """A picture as PNG that says nothing but what it shows."""
    plain = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(plain, format="PNG")
    return plain.getvalue()


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _send(api: HfApi, config: PushConfig, parcel: Parcel) -> str:
    """One commit with all of it; returns the commit's name."""
    repo, branch = config.repo, config.revision
    _tried(lambda: api.create_repo(repo, private=config.private or None, exist_ok=True))
    if config.private and not _tried(lambda: api.model_info(repo)).private:
        raise UserError(
            f"private: {repo} is there already, for all to see; make it private on the Hub, or choose another"
        )
    if branch is not None:
        _tried(lambda: api.create_branch(repo, branch=branch, exist_ok=True))
    there = _tried(lambda: api.list_repo_files(repo, revision=branch))
    for what, mark in _MARKS.items():
        if what != parcel.what and mark in there:
            raise UserError(f"repo: {repo} holds {_a(what)}, and this is {_a(parcel.what)}; choose another repository")
    gone = [CommitOperationDelete(name) for name in there if name.startswith(_OURS) and name not in parcel.files]

    def commit() -> str:
        added = [CommitOperationAdd(name, content) for name, content in parcel.files.items()]
        message = f"{parcel.tag or 'A result'} of pixart_ft"
        return str(api.create_commit(repo, [*gone, *added], commit_message=message, revision=branch).oid)

    return _tried(commit)


def _tag(api: HfApi, repo: str, tag: str, commit: str) -> str:
    """Name a commit by its step; a tag that is there already stays where it is. Returns what to say of it."""
    _tried(lambda: api.create_tag(repo, tag=tag, revision=commit, exist_ok=True))
    where = {ref.name: ref.target_commit for ref in _tried(lambda: api.list_repo_refs(repo)).tags}.get(tag)
    if where == commit:
        return f", as {tag}"
    warnings.warn(
        f"{repo} has the tag {tag} already, of an earlier push, which stays; this one is found by its commit {commit}",
        stacklevel=3,
    )
    return f", as {commit}"


def _tried(act: Callable[[], Done]) -> Done:
    """What `act` returns, after some new tries where the failure may pass."""
    for wait in WAITS:
        try:
            return act()
        except Exception as error:
            if not may_pass(error):
                raise
            time.sleep(wait)
    return act()


def _a(what: What) -> str:
    return {"adapter": "an adapter", "model": "a whole model"}[what]
