"""How a configuration is read, whatever its keys: YAML, overrides, and ONE report of every mistake in them.

`train.py` and `generate.py` say what the keys are. A key is named by its dotted path, as `optim.learning_rate`.
"""

import difflib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from pixart_ft.config import yaml_text
from pixart_ft.config.key_types import expected, inside, is_empty, item_of, parse_override
from pixart_ft.config.text import is_text, no_text, read_text, visible
from pixart_ft.errors import UserError
from pixart_ft.files import reason_of


class Section(BaseModel):
    """Frozen keys and values: unknown keys, wrong types, nan and inf are refused; an integer is a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Unused = tuple[str, str, Callable[[Any], bool]]
Rule = tuple[tuple[str, ...], Callable[..., bool], str]


class Config(Section):
    """A whole configuration: its sections or keys, and what they may not say together.

    unused  (key, other, used): key may differ from its default only where `used(value of other)` is true,
            since a setting is used or refused, never ignored
    rules   (keys, broken, message): `broken(*values of keys)` must be false
    may_be_empty   keys for which an empty text means something; for any other it is a mistake, such as a shell variable
                   that is not set, and never the default or the current folder
    shipped  whether the recipes that come with the package are of this kind
    """

    unused: ClassVar[tuple[Unused, ...]] = ()
    rules: ClassVar[tuple[Rule, ...]] = ()
    may_be_empty: ClassVar[tuple[str, ...]] = ()
    shipped: ClassVar[bool] = False

    @classmethod
    def arranged(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values that were given, with those that may stand in another place in their own."""
        return values


# Former names of keys, and what is written now.
FORMER = {"logging.tensorboard": "logging.trackers, a list: [tensorboard], or [] for none"}
SHOWN = 20  # mistakes that a report lists; the others it counts

AnyConfig = TypeVar("AnyConfig", bound=Config)


def keys(kind: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Every key of a configuration by its dotted path, sections opened, in the order of definition."""
    found: dict[str, FieldInfo] = {}
    for name, field in kind.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            found |= keys(section, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def default(field: FieldInfo, beside: Mapping[str, Any] | None = None) -> Any:
    """The default of a key, plain as YAML has it. Some depend on the keys beside it; the run's name shows NAME."""
    value = field.get_default(call_default_factory=True, validated_data={"name": "NAME", **(beside or {})})
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The report of a key that does not exist, with the nearest of those that do.

    Its last word must resemble, or be the initials of (`lr`), theirs; of several the whole path decides.
    """
    known = list(known)
    if key in FORMER:
        return f"{key} is now {FORMER[key]}"
    if key in known:  # a dotted path used as one word of a file
        return f"{key}: write it nested, as {{{key.replace('.', ': {')}: ...}}}}"
    if inside := [k for k in known if k.startswith(f"{key}.")]:
        return f"{key}: a section, not a key; its keys are {', '.join(inside)}"
    last = {k: k.rpartition(".")[2] for k in [key, *known]}
    alike = difflib.get_close_matches(last[key], {last[k] for k in known})
    kin = [k for k in known if last[k] in alike or _initials(last[k]) == last[key]]
    near = difflib.get_close_matches(key, kin, 1, cutoff=0)
    return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "; --help lists all")


def add_unknown(problems: list[str], key: str, known: Iterable[str]) -> None:
    """Add the report of a key that does not exist; its nearest is looked for only where the report will be shown."""
    problems.append(unknown_key(key, known) if len(problems) < SHOWN else f"{key}: unknown key")


def load(
    kind: type[AnyConfig],
    source: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    problems: Sequence[str] = (),
    origin: str | None = None,
    yields: bool = False,
) -> AnyConfig:
    """Reads a configuration, applies the overrides and checks everything.

    source     YAML file, name of a shipped configuration, or a mapping
    overrides  dotted key -> text as typed (YAML, or plain text where the key is text), or a value
    problems   mistakes the caller found already, reported together with those found here
    origin     what a report calls the source; None: its path
    yields     a value of the source that the overrides leave without use is set aside, not refused

    Raises UserError with every unknown key, wrong type, missing key and contradiction in one report.
    """
    path, values = _read(source, kind.shipped)
    origin = origin or path
    fields = keys(kind)
    problems = list(problems)
    for name in kind.model_fields:  # an absent or empty section has its defaults
        if name not in fields and values.get(name) is None:
            values[name] = {}
    _override(values, overrides or {}, fields, problems)
    values = kind.arranged(values)
    _wrap_single_values(values, fields)
    values = _whole(values, "", problems)
    config = None
    empty = {key for key, value in _flat(values) if key in fields and key not in kind.may_be_empty and is_empty(value)}
    wrong = set(empty)
    problems += [
        f"{key} is empty; give {expected(field)}" + ("" if field.is_required() else ", or leave it out")
        for key, field in fields.items()
        if key in empty
    ]
    try:
        config = kind.model_validate_json(json.dumps(values))  # JSON: a list fills a tuple
    except ValidationError as error:
        for key, problem in _explain(error, fields):
            if key in empty:
                continue
            wrong.add(key)
            if problem is None:
                add_unknown(problems, key, fields)
            else:
                problems.append(problem)
    given = dict(_flat(values, mappings={key for key, field in fields.items() if get_origin(field.annotation) is dict}))
    if yields and not wrong:
        idle = [key for key, _ in _idle(kind, given, wrong) if key not in (overrides or {})]
        given = {key: value for key, value in given.items() if key not in idle}
        config = kind.model_validate_json(json.dumps({k: v for k, v in values.items() if k not in idle}))
    problems += [*(report for _, report in _idle(kind, given, wrong)), *_contradictions(kind, given, wrong)]
    if problems or config is None:
        raise UserError(_report(origin, problems))
    return config


def to_yaml(config: Config, *, ascii_only: bool = False) -> str:
    """The whole configuration as YAML that `load` reads back to an equal one."""
    return yaml_text.dump(config.model_dump(mode="json"), ascii_only=ascii_only)


def flat(config: Config) -> dict[str, Any]:
    """The whole configuration by dotted keys, plain as YAML has it."""
    return dict(_flat(config.model_dump(mode="json")))


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name: a wheel has them inside, a clone beside it."""
    package = Path(__file__).parents[1]
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _read(source: str | Path | Mapping[str, Any], shipped: bool) -> tuple[str, dict[str, Any]]:
    if is_empty(source):
        raise UserError("--config is empty; give a YAML file or a shipped name, or leave it out")
    if isinstance(source, Mapping):
        try:
            return "configuration", json.loads(json.dumps(source, default=str))
        except (TypeError, ValueError, RecursionError) as error:  # a key that is no text, or a value inside itself
            raise UserError(f"cannot read the configuration: {error}") from None
    path, names = Path(os.path.expanduser(source)), shipped_configs()
    try:
        path = path if path.is_file() or not shipped else names.get(str(source), path)
        values = yaml_text.parse(read_text(path, most=yaml_text.LONGEST))
    except FileNotFoundError:
        remedy = f"give a path or a shipped name: {', '.join(names) or 'none'}" if shipped else "give a path"
        other = f" ({source} is a recipe for training)" if not shipped and str(source) in names else ""
        raise UserError(f"no configuration file {path}{other}; {remedy}") from None
    except UserError as error:
        raise UserError(f"cannot read the configuration: {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the configuration {path}: {reason_of(error) or error}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"cannot read the configuration {path}: {_show(values)} is not keys and values")
    return str(path), json.loads(json.dumps(values or {}, default=str))


def _override(
    values: dict[str, Any], overrides: Mapping[str, Any], fields: Mapping[str, FieldInfo], problems: list[str]
) -> None:
    """Puts the overrides into `values`, and what is wrong with them into `problems`."""
    for key, text in overrides.items():
        if key not in fields:
            add_unknown(problems, key, fields)
            continue
        section, _, name = key.rpartition(".")
        target = values[section] if section else values
        try:
            value = parse_override(text, fields[key])
        except ValueError as error:
            problems.append(f"{key} is {_show(text)}; expected {expected(fields[key])} ({error})")
            continue
        if isinstance(target, dict):  # else the whole section is wrong, which pydantic finds
            target[name] = json.loads(json.dumps(value, default=str))  # a tuple or a path becomes as YAML has it


def _wrap_single_values(values: dict[str, Any], fields: Mapping[str, FieldInfo]) -> None:
    """One value stands for a list of one."""
    for key, field in fields.items():
        section, _, name = key.rpartition(".")
        target = values.get(section) if section else values
        if item_of(field) and isinstance(target, dict) and _is_single(target.get(name), mapping=bool(inside(field))):
            target[name] = [target[name]]


def _is_single(value: Any, *, mapping: bool) -> bool:
    return isinstance(value, str | int | float | dict if mapping else str | int | float) and value not in ("", {})


def _whole(value: Any, key: str, problems: list[str]) -> Any:
    """`value` with text that no encoding can hold escaped, and reported by its key."""
    if isinstance(value, dict):
        return {visible(k): _whole(v, f"{key}.{k}" if key else k, problems) for k, v in value.items()}
    if isinstance(value, list):
        return [_whole(item, f"{key}[{number}]", problems) for number, item in enumerate(value)]
    if isinstance(value, str) and not is_text(value):
        problems.append(no_text(key, value))
        return visible(value)
    return value


def _explain(error: ValidationError, fields: Mapping[str, FieldInfo]) -> Iterator[tuple[str, str | None]]:
    """(dotted key, what is wrong) of each of pydantic's findings; None: there is no such key."""
    unions: set[str] = set()
    lists: set[str] = set()  # with a wrong item, which pydantic leaves out of their length
    for finding in error.errors(include_url=False, include_context=False):
        words = [part for part in finding["loc"] if isinstance(part, str)]
        items = [f"[{part}]" for part in finding["loc"] if isinstance(part, int)]
        if not items and (union := ".".join(words[:-1])) in fields:  # pydantic tries each member of it, and names it
            if union in unions:
                continue
            unions.add(union)
            words = words[:-1]
        key, value = ".".join(words), finding["input"]
        if finding["type"] == "json_invalid":
            yield key, f"it cannot be read: {finding['msg']}"
        elif (owner := ".".join(words[:-1])) in fields:  # inside an item of a list
            item, inner = inside(fields[owner]), f"{owner}{items[0]}.{words[-1]}"
            if finding["type"] == "missing":
                yield owner, f"{inner} is required"
            elif words[-1] in item:
                yield owner, f"{inner} is {_show(value)}; expected {expected(item[words[-1]])}"
            else:
                near = difflib.get_close_matches(words[-1], item, 1)
                yield (
                    owner,
                    f"{inner}: unknown key; "
                    + (f"did you mean {near[0]}?" if near else f"{owner} has {', '.join(item)}"),
                )
        elif finding["type"] == "value_error" and isinstance(value, dict):  # what an item may not say together
            yield key, f"{key}{''.join(items)}: {finding['msg'].removeprefix('Value error, ')}"
        elif finding["type"] == "extra_forbidden":
            yield from ((k, None) for k, _ in _flat({key: value}))
        elif finding["type"] == "missing":
            yield key, f"{key} is required: {fields[key].description}"
        elif key not in fields:
            yield key, f"{key} is {_show(value)}; expected a section of keys"
        elif finding["type"] == "default_factory_not_called" or (finding["type"] == "too_short" and key in lists):
            continue  # what it comes from is wrong, and reported
        else:
            lists |= {key} if items else set()
            hint = "; put it in quotes" if finding["type"] == "string_type" and value is not None else ""
            yield key, f"{key}{''.join(items)} is {_show(value)}; expected {expected(fields[key])}{hint}"


def _idle(kind: type[Config], given: Mapping[str, Any], wrong: set[str]) -> Iterator[tuple[str, str]]:
    """The keys that another one leaves without use, and the report of each."""
    fields = keys(kind)
    for key, other, used in kind.unused:
        if _judged((key, other), wrong):
            value, there = (_value(name, given, fields) for name in (key, other))
            if value != _default(key, given, fields) and not used(there):
                yield key, f"{key} is {_show(value)}, unused while {other} is {_show(there)}; change one"


def _contradictions(kind: type[Config], given: Mapping[str, Any], wrong: set[str]) -> Iterator[str]:
    """What the keys may not say together."""
    fields = keys(kind)
    for names, broken, message in kind.rules:
        values = [_value(name, given, fields) for name in names]
        if _judged(names, wrong) and broken(*values):
            yield message.format(*map(_show, values))


def _default(key: str, given: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> Any:
    section = key.rpartition(".")[0]
    parts = (name.rpartition(".") for name in given)
    return default(fields[key], {name: given[f"{s}{dot}{name}"] for s, dot, name in parts if s == section})


def _value(key: str, given: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> Any:
    return given[key] if key in given else _default(key, given, fields)


def _judged(names: Iterable[str], wrong: set[str]) -> bool:
    """Whether the keys are right by themselves: where one, or its section, is wrong, that is enough."""
    return not any(name == bad or name.startswith(bad + ".") for name in names for bad in wrong)


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


def _report(origin: str, problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return visible(f"{origin}: {problems[0]}")
    more = [f"and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else []
    return visible("\n  - ".join([f"{origin}: {len(problems):,} problems", *problems[:SHOWN], *more]))


def _flat(values: Mapping[str, Any], prefix: str = "", mappings: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a key of `mappings` has a mapping for its value."""
    for name, value in values.items():
        if isinstance(value, dict) and value and prefix + name not in mappings:
            yield from _flat(value, f"{prefix}{name}.", mappings)
        else:
            yield prefix + name, value


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
