"""The lists of faults are of today's files, and a fault in the copy is what its tests see."""

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import mutate

    return mutate


def fault(mutate: ModuleType, **changes: object) -> object:
    """Words must be the same to be near: a test of the words that are offered notices it."""
    own = {"file": "manifests/nearest.py", "old": "cutoff=0.6", "new": "cutoff=1.0"}
    tests = ("tests/manifests/test_nearest.py::test_the_nearest_word_is_offered_only_where_one_is_near",)
    return mutate.Fault(**{"where": "here#1", "tests": tests} | own | changes)


def test_every_entry_is_a_fault_of_todays_files(mutate: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert mutate.main(["--check"]) == 0, capsys.readouterr().out


def test_what_is_no_fault_of_todays_files_is_stale(mutate: ModuleType) -> None:
    assert mutate.staleness(fault(mutate)) == ""
    assert mutate.staleness(fault(mutate, old="cutoff")) == ""
    assert mutate.staleness(fault(mutate, old="names")).endswith("times in manifests/nearest.py")
    assert mutate.staleness(fault(mutate, old="gone")) == "`old` occurs 0 times in manifests/nearest.py"
    assert mutate.staleness(fault(mutate, file="gone.py")) == "`old` occurs 0 times in gone.py"
    assert mutate.staleness(fault(mutate, new="cutoff=0.6")) == "`new` is `old`"
    assert mutate.staleness(fault(mutate, tests=())) == "it names no test"
    for test in ("tests/gone.py", "tests/manifests/test_nearest.py::test_the_nearest"):
        assert mutate.staleness(fault(mutate, tests=(test,))) == f"there is no test {test}"


def test_a_fault_is_in_the_copy_alone_and_the_copy_is_what_is_imported(mutate: ModuleType) -> None:
    before = (ROOT / "manifests/nearest.py").read_text()
    with mutate.copied(fault(mutate)) as tree:
        assert (tree / "manifests/nearest.py").read_text() == before.replace("cutoff=0.6", "cutoff=1.0")
        mutate.require_copy(tree)
    assert not tree.exists()
    assert (ROOT / "manifests/nearest.py").read_text() == before


@pytest.mark.parametrize(
    ("new", "verdict"),
    [("cutoff=0.61", "SURVIVED"), pytest.param("cutoff=1.0", "noticed", marks=pytest.mark.slow)],
)
def test_a_fault_is_noticed_or_survives(new: str, verdict: str, mutate: ModuleType) -> None:
    found = mutate.try_fault(fault(mutate, new=new))
    assert found.verdict == verdict, found
    assert "test_the_nearest_word_is_offered" in found.detail


@pytest.mark.slow
def test_a_fault_that_ends_the_tests_otherwise_is_not_called_noticed(mutate: ModuleType) -> None:
    assert mutate.try_fault(dataclasses.replace(fault(mutate), new="cutoff=")).verdict == "broken"
