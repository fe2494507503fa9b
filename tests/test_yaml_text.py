"""The YAML dialect. Oracle: the core schema of YAML 1.2 (section 10.3), and round trips."""

import pytest

from pixart_ft import yaml_text


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
        ("a: !!python/name:os.system", "line 1: could not determine a constructor"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_errors_name_the_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        yaml_text.parse(text)
