"""The list of planted bugs stays one that can be planted. That each is seen is `make planted`'s to prove."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from planted_bugs import Bug, Outcome, chosen, faults, read_bugs

BUGS = read_bugs()


def test_every_entry_can_be_planted() -> None:
    """What is to be found is in its file once, what replaces it compiles, and the tests are there."""
    assert [fault for bug in BUGS for fault in faults(bug)] == []
    names = [bug.name for bug in BUGS]
    assert len(names) == len(set(names)) > 10, "a name is given twice"


def test_a_bad_entry_is_named(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("a = 1\nb = 1\n")
    (tmp_path / "test_code.py").write_text("def test_one() -> None: ...\n")

    def bug(find: str, replace: str, *tests: str) -> list[str]:
        return faults(Bug("area", "name", "code.py", find, replace, list(tests)), tmp_path)

    assert bug("a = 1", "a = 2", "test_code.py", "test_code.py::test_one[b-1]") == []
    assert "area/name: 'find' occurs 2 times in code.py" in bug("= 1", "= 2", "test_code.py")[0]
    assert "occurs 0 times" in bug("c = 1", "c = 2", "test_code.py")[0]
    assert "is no Python" in bug("a = 1", "a = (", "test_code.py")[0]
    assert "what was found" in bug("a = 1", "a = 1", "test_code.py")[0]
    assert "no test test_code.py::test_two" in bug("a = 1", "a = 2", "test_code.py::test_two")[0]
    assert "no test test_other.py" in bug("a = 1", "a = 2", "test_other.py")[0]
    assert "names no test" in bug("a = 1", "a = 2")[0]


def test_only_a_test_that_ran_and_failed_is_red() -> None:
    assert Outcome(1, "tests/test_a.py::test_b", "AssertionError").verdict == "red"
    for outcome in (Outcome(0), Outcome(1), Outcome(2), Outcome(5), Outcome(-1), Outcome(1, "test", "NameError")):
        assert outcome.verdict != "red"


def test_bugs_are_chosen_by_area_or_name() -> None:
    assert chosen(BUGS, []) == BUGS
    first = BUGS[0]
    assert chosen(BUGS, [first.name]) == [first]
    assert first in chosen(BUGS, [first.area])
    with pytest.raises(ValueError, match="quack"):
        chosen(BUGS, [first.area, "quack"])
