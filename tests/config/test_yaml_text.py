"""The YAML dialect. Oracle: the core schema of YAML 1.2 (section 10.3), and round trips."""

import json

import pytest

from pixart_ft.config import yaml_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("On", "On"),
        ("true", True),
        ("1e-4", 1e-4),
        ("-1.5", -1.5),
        (".5", 0.5),
        ("010", 10),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-11-22", "2026-11-22"),
        ("~", None),
        ("", None),
        ("'7'", "7"),
        ("[1, a b, null]", [1, "a b", None]),
        ("'&x *y !z'", "&x *y !z"),
        ("5 * 3 & !", "5 * 3 & !"),
        ("[" * 19 + "]" * 19, json.loads("[" * 19 + "]" * 19)),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    parsed = yaml_text.parse(f"key: {text}")["key"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_dump_is_read_back() -> None:
    texts = [
        "no",
        "1e-4",
        "010",
        "null",
        "",
        "~",
        "true",
        "a: b",
        "- a",
        "#",
        "2026-11-22",
        "two\nlines",
        "ひ",
    ]
    values = {
        "texts": texts,
        "numbers": [1e-5, 1e22, 0.1, 3],
        "others": [True, None, []],
        "sections": {"a": {"b": 1}},
    }
    assert yaml_text.parse(yaml_text.dump(values)) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: key 'a' is given twice"),
        ("a: 1\nb: [1,\nc", "line 3: "),
        ("a:\n\tb: 1", "line 2: .*tab|line 2: .*t'"),
        ("? [a]\n: 1", "line 1: a key must be a word"),
        ("a: !!python/name:os.system", r"line 1: no tags \(!\) here"),
        ("a: 1\nb: !!binary aGVsbG8=", r"line 2: no tags \(!\) here; leave it out, or quote the value"),
        ("a: 1\nb: [!]", r"line 2: no tags"),
        ("a: &x 1", r"line 1: no anchors \(&\) and aliases \(\*\) here; write the value out, or quote it"),
        ("a: 1\nb: *", "line 2: no anchors"),
        ("a: *b", "line 1: no anchors"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "line 1: no anchors"),  # would double with every line
        ("a: 1\n---\nb: 2", r"line 2: a second document begins \(---\); keep one"),
        ("a: [\t1]", "line 1: a tab; indent with spaces, or quote it"),
        ("[" * 10_000, "line 1: nested more than 20 levels deep"),
        ("{a: " * 10_000, "line 1: nested more than 20 levels deep"),
        ("- " * 10_000, "line 1: nested more than 20 levels deep"),
        ("a: " + "9" * 5000, "line 1: a number of more than 40 digits"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_errors_name_the_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        yaml_text.parse(text)
