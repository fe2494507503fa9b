"""YAML as people mean it: the core schema of YAML 1.2, without the surprises of PyYAML's 1.1.

`no` and `on` are text (`mixed_precision: no`), `1e-4` is a number, `010` is ten, `2026-11-22` is text.
A key given twice is an error, and so are anchors, aliases and tags, which a configuration does not need.
"""

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

_NO_ALIASES = "no anchors (&) and aliases (*) here; write the value out, or quote it"
_NO_TAGS = "no tags (!) here; leave it out, or quote the value"
_PROBLEMS = {  # PyYAML's words, or the context it gives, in ours
    "but found another document": "a second document begins (---); keep one",
    "found character '\\t' that cannot start any token": "a tab; indent with spaces, or quote it",
    "while scanning an anchor": _NO_ALIASES,
    "while scanning an alias": _NO_ALIASES,
    "while scanning a tag": _NO_TAGS,
}
_DEEPEST = 20  # a configuration has three levels; parsers of nested text overflow at a thousand
_DIGITS = 40
LONGEST = 2**18  # bytes of a file; a configuration has some thousand


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _at(event, _NO_ALIASES)
        if event.tag is not None:
            raise _at(event, _NO_TAGS)
        self.depth += 1
        if self.depth > _DEEPEST:
            raise _at(event, f"nested more than {_DEEPEST} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _at(key, "a key must be a word")
            if key.value in seen:
                raise _at(key, f"key {key.value!r} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the text that `_Loader` would read as something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # list items stand one level below their key


_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)
for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _CORE_SCHEMA:
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > _DIGITS:
        raise _at(node, f"a number of more than {_DIGITS} digits")
    return int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def _at(place: Any, problem: str) -> ConstructorError:
    return ConstructorError(problem=problem, problem_mark=place.start_mark)


def parse(text: str) -> Any:
    """The value of one YAML document; raises ValueError with the line of a mistake."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        said = error.problem or str(error)
        raise ValueError(line + (_PROBLEMS.get(said) or _PROBLEMS.get(error.context or "") or said)) from None
    except yaml.YAMLError as error:  # a character that YAML forbids
        raise ValueError(str(error).splitlines()[0]) from None


def dump(values: Any, *, ascii_only: bool = False) -> str:
    """YAML text that `parse` reads back to the same value, keys in the order given."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=not ascii_only, width=110)
