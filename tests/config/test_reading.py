"""Reading a configuration and reporting its mistakes. Oracle: reports written by hand, for a small one."""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from pixart_ft.config import reading
from pixart_ft.config.key_types import expected
from pixart_ft.config.reading import Config, Section, keys, load, to_yaml, unknown_key
from pixart_ft.errors import UserError


class Oven(Section):
    """heat"""

    heat: float = Field(180.0, gt=0, le=300, description="temperature, Celsius")
    mode: Literal["fan", "grill", "no"] = Field("fan", description="how it heats")
    shelves: tuple[int, ...] = Field((1,), min_length=1, description="shelves used")


class Cake(Section):
    """what is baked"""

    recipe: str = Field(description="name of the recipe")
    book: Path | None = Field(None, description="where it stands")
    egg_count: int = Field(3, ge=0, description="eggs")
    glazed: bool = Field(False, description="sugar on top")
    pans: int | None = Field(None, ge=2, multiple_of=2, description="number of pans")


class Baking(Config):
    """A whole configuration."""

    oven: Oven = Oven()
    cake: Cake

    shipped = True
    unused = (("oven.shelves", "oven.mode", lambda mode: mode != "grill"),)
    rules = (
        (
            ("cake.egg_count", "oven.heat"),
            lambda eggs, heat: eggs > heat,
            "{} eggs are too many for {} degrees",
        ),
    )


def report(values: object, overrides: Any = None, **more: Any) -> list[str]:
    """The problems of a wrong configuration, one a line, without the heading of a long report."""
    with pytest.raises(UserError) as caught:
        load(Baking, values, overrides, **more)  # type: ignore[arg-type]
    head, *lines = str(caught.value).removeprefix("configuration: ").split("\n  - ")
    return lines or [head]


def test_values_defaults_and_types() -> None:
    config = load(Baking, {"cake": {"recipe": "plum", "pans": 4}, "oven": {"heat": 200, "shelves": [1, 2]}})
    assert config == Baking(cake=Cake(recipe="plum", pans=4), oven=Oven(heat=200.0, mode="fan", shelves=(1, 2)))
    assert type(config.oven.heat) is float


def test_an_empty_section_has_its_defaults(tmp_path: Path) -> None:
    file = tmp_path / "cake.yaml"
    file.write_text("oven:\ncake:\n  recipe: plum # a comment\n")
    assert load(Baking, file).oven == Oven()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"cake": {}}, "cake.recipe is required: name of the recipe"),
        ({}, "cake.recipe is required: name of the recipe"),
        ({"cake": {"recipe": ""}}, "cake.recipe is empty; give text"),
        ({"cake": {"recipe": 7}}, "cake.recipe is 7; expected text; put it in quotes"),
        ({"cake": {"recipe": None}}, "cake.recipe is null; expected text"),
        ({"cake": {"recipe": "a", "egg_count": "3"}}, 'cake.egg_count is "3"; expected integer >= 0'),
        ({"cake": {"recipe": "a", "egg_count": 3.0}}, "cake.egg_count is 3.0; expected integer >= 0"),
        ({"cake": {"recipe": "a", "egg_count": True}}, "cake.egg_count is true; expected integer >= 0"),
        ({"cake": {"recipe": "a", "glazed": "no"}}, 'cake.glazed is "no"; expected true | false'),
        (
            {"cake": {"recipe": "a", "pans": 3}},
            "cake.pans is 3; expected integer >= 2, a multiple of 2, or null",
        ),
        (
            {"cake": {"recipe": "a"}, "oven": {"heat": "hot"}},
            'oven.heat is "hot"; expected number > 0, <= 300',
        ),
        (
            {"cake": {"recipe": "a"}, "oven": {"heat": float("nan")}},
            "oven.heat is NaN; expected number > 0, <= 300",
        ),
        (
            {"cake": {"recipe": "a"}, "oven": {"mode": "steam"}},
            'oven.mode is "steam"; expected fan | grill | no',
        ),
        (
            {"cake": {"recipe": "a"}, "oven": {"shelves": None}},
            "oven.shelves is null; expected [integer, ...] (not empty)",
        ),
        (
            {"cake": {"recipe": "a"}, "oven": {"shelves": "top"}},
            'oven.shelves[0] is "top"; expected [integer, ...] (not empty)',
        ),
        (
            {"cake": {"recipe": "a"}, "oven": {"shelves": [1, "top"]}},
            'oven.shelves[1] is "top"; expected [integer, ...] (not empty)',
        ),
        ({"cake": {"recipe": "a"}, "oven": 5}, "oven is 5; expected a section of keys"),
        ({"cake": {"recipe": "a"}, "oven.heat": 5}, "oven.heat: write it nested, as {oven: {heat: ...}}"),
    ],
)
def test_each_mistake_is_named_with_value_and_remedy(values: object, problem: str) -> None:
    assert report(values) == [problem]


def test_all_mistakes_come_in_one_report() -> None:
    values = {
        "oven": {"heat": -1, "mood": "fan"},
        "cake": {"egg_count": 2.5, "book": 3},
        "overn": {"mode": "fan", "colour": {"red": 1}},
    }
    assert report(values, {"cake.eg_count": "1", "oven.shelves": "[1"}, problems=["a problem of the caller"]) == [
        "a problem of the caller",
        "cake.eg_count: unknown key; did you mean cake.egg_count?",
        "oven.shelves is \"[1\"; expected [integer, ...] (not empty) (line 1: expected ',' or ']', "
        "but got '<stream end>')",
        "oven.heat is -1; expected number > 0, <= 300",
        "oven.mood: unknown key; did you mean oven.mode?",
        "cake.recipe is required: name of the recipe",
        "cake.book is 3; expected path or null; put it in quotes",
        "cake.egg_count is 2.5; expected integer >= 0",
        "overn.mode: unknown key; did you mean oven.mode?",
        "overn.colour.red: unknown key; --help lists all",
    ]


def test_contradictions_are_reported_beside_other_mistakes() -> None:
    values = {"oven": {"mode": "grill", "shelves": [2], "heat": 4}, "cake": {"egg_count": 5}}
    assert report(values) == [
        "cake.recipe is required: name of the recipe",
        'oven.shelves is [2], unused while oven.mode is "grill"; change one',
        "5 eggs are too many for 4 degrees",
    ]


@pytest.mark.parametrize("oven", [{"mode": "grilled", "shelves": [2]}, {"mode": "grill", "shelves": "low"}, 3])
def test_a_wrong_key_is_not_judged_by_rules(oven: object) -> None:
    assert len(report({"oven": oven, "cake": {"recipe": "a", "egg_count": 500 if oven == 3 else 3}})) == 1


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("adapter.rnak", "adapter.rank"),
        ("optim.lr", "optim.learning_rate"),  # initials
        ("train.learning_rate", "optim.learning_rate"),  # wrong section
        ("trian.steps", "train.steps"),  # the nearer of two keys called steps
        ("learning_rate", "optim.learning_rate"),
    ],
)
def test_nearest_key(key: str, near: str) -> None:
    known = ["adapter.rank", "optim.learning_rate", "train.steps", "validation.steps"]
    assert unknown_key(key, known) == f"{key}: unknown key; did you mean {near}?"


def test_a_section_and_a_stranger_are_no_keys() -> None:
    known = ["oven.heat", "oven.mode"]
    assert unknown_key("oven", known) == "oven: a section, not a key; its keys are oven.heat, oven.mode"
    assert unknown_key("oven.zzz", known) == "oven.zzz: unknown key; --help lists all"


def test_overrides_are_text_where_the_key_is_text_and_yaml_elsewhere() -> None:
    overrides = {
        "cake.recipe": "no: [7]",
        "cake.book": "2024",
        "cake.glazed": "true",
        "oven.heat": "2e2",
        "oven.mode": "no",
        "oven.shelves": "[3, 4]",
    }
    config = load(Baking, {"oven": {"heat": 100}}, overrides)
    assert config.cake == Cake(recipe="no: [7]", book=Path("2024"), glazed=True)
    assert config.oven == Oven(heat=200.0, mode="no", shelves=(3, 4))
    assert load(Baking, {"cake": {"book": "a"}}, {"cake.recipe": "null", "cake.book": "null"}).cake == Cake(
        recipe="null"
    )


def test_a_mapping_given_is_left_as_it_was() -> None:
    values: dict[str, Any] = {"cake": {"recipe": "a"}, "oven": None}
    load(Baking, values, {"oven.heat": "100", "cake.recipe": "b"})
    assert values == {"cake": {"recipe": "a"}, "oven": None}


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load(Baking, {"cake": {"recipe": "no"}, "oven": {"heat": 3.00001, "mode": "no", "shelves": [2, 1]}})
    file = tmp_path / "cake.yaml"
    file.write_text(to_yaml(config))
    assert load(Baking, file) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("oven:\n  heat: [1\n", "line 3: expected"),
        ("- a\n- b\n", r'\["a", "b"\] is not keys and values'),
        ("oven: {heat: 1}\noven: {heat: 2}\n", "line 2: key 'oven' is given twice"),
        (b"\xff\xfe\x00", "cannot read the configuration: .*cake.yaml line 1: the bytes 00"),
    ],
)
def test_an_unreadable_file_is_named_with_the_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    file = tmp_path / "cake.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        load(Baking, file)
    assert str(file) in str(caught.value)


def test_an_absent_file_lists_the_shipped_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no configuration file .*nope.yaml; .*cosine_512, dreambooth, full_1024"):
        load(Baking, tmp_path / "nope.yaml")
    with pytest.raises(UserError, match="cannot read the configuration"):
        load(Baking, tmp_path)


def test_shipped_configurations_are_found_inside_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").touch()
    monkeypatch.setattr(reading, "__file__", str(tmp_path / "config" / "reading.py"))
    assert reading.shipped_configs() == {"mine": tmp_path / "configs" / "mine.yaml"}


def test_words_for_what_a_key_accepts() -> None:
    assert {key: expected(field) for key, field in keys(Baking).items()} == {
        "oven.heat": "number > 0, <= 300",
        "oven.mode": "fan | grill | no",
        "oven.shelves": "[integer, ...] (not empty)",
        "cake.recipe": "text",
        "cake.book": "path or null",
        "cake.egg_count": "integer >= 0",
        "cake.glazed": "true | false",
        "cake.pans": "integer >= 2, a multiple of 2, or null",
    }


def test_a_report_lists_twenty_mistakes_and_counts_the_others() -> None:
    for values, overrides in (
        ({"cake": {"recipe": "a"}, **{f"heat{number}": 1 for number in range(5000)}}, {}),
        ({"cake": {"recipe": "a"}}, {f"heat{number}": "1" for number in range(5000)}),
        ({"cake": {"recipe": "a"}, "oven": {"shelves": [1, *["no"] * 5000]}}, {}),
    ):
        with pytest.raises(UserError) as caught:
            load(Baking, values, overrides)
        first, *listed, last = str(caught.value).split("\n  - ")
        assert (first, len(listed), last) == ("configuration: 5,000 problems", 20, "and 4,980 more")


def test_a_file_that_is_no_configuration_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "weights.yaml").write_text("a: 1\n" * 100_000)
    for path in (tmp_path / "weights.yaml", Path("/dev/zero")):
        with pytest.raises(UserError, match=r"^cannot read the configuration: .* is larger than 262,144 bytes"):
            load(Baking, path)


def test_a_mapping_that_no_file_could_hold_is_refused() -> None:
    inside: dict[str, object] = {}
    inside["itself"] = inside
    deep: dict[str, object] = {}
    for _ in range(100_000):
        deep = {"deeper": deep}
    mappings: list[Any] = [inside, deep, {(1, 2): 3}]
    for values in mappings:
        with pytest.raises(UserError, match=r"^cannot read the configuration: "):
            load(Baking, values)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("", "it is a folder, not a file"),
        ("loop", "its symbolic links lead in a circle"),
        ("x" * 300, "the name is too long"),
        ("file/below", "a part of this path is a file"),
    ],
)
def test_a_place_where_no_configuration_can_be_gives_the_reason(tmp_path: Path, place: str, reason: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^cannot read the configuration .*: {reason}"):
        load(Baking, tmp_path / place)
