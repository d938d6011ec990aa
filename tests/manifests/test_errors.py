"""Errors: one line each, with the exit code the design promises."""

import pickle

import pytest

from kdpipe.manifests import errors
from kdpipe.manifests.errors import CorruptError, KdpipeError, stopped


def tree(base: type[KdpipeError] = KdpipeError) -> list[type[KdpipeError]]:
    return [base, *(error for child in base.__subclasses__() for error in tree(child))]


def test_the_docstring_draws_every_error_with_its_code_and_exit_code() -> None:
    drawn = {words[0]: words[1:] for line in (errors.__doc__ or "").splitlines() if (words := line.split())}
    for error in tree():
        assert error.__name__ in drawn
        if len(drawn[error.__name__]) > 1 and drawn[error.__name__][0].startswith("E-"):
            assert drawn[error.__name__][:2] == [error.code, str(error.exit_code)]


@pytest.mark.parametrize(
    ("name", "exit_code"),
    [
        ("CheckFailed", 1), ("GateError", 1), ("LayoutError", 1), ("CorruptError", 1), ("IncompleteError", 2),
        ("DriftError", 3), ("InputError", 4), ("DataError", 4), ("ConfigError", 4), ("TeacherError", 4),
        ("StudentError", 4), ("CacheError", 4), ("SpaceError", 4), ("TemporaryError", 75),
    ],
)  # fmt: skip
def test_exit_codes_are_those_of_the_design(name: str, exit_code: int) -> None:
    assert getattr(errors, name).exit_code == exit_code


def test_codes_are_unique() -> None:
    codes = [error.code for error in tree()]
    assert len(set(codes)) == len(codes)


def test_a_message_is_one_line_with_code_and_place() -> None:
    assert str(CorruptError("bits\n  flipped", where="a/b")) == "E-CORRUPT a/b: bits flipped"
    assert str(CorruptError("bits flipped")) == "E-CORRUPT: bits flipped"


def test_an_error_survives_the_way_between_processes() -> None:
    came = pickle.loads(pickle.dumps(CorruptError("bits flipped", where="a/b")))
    assert (type(came), str(came)) == (CorruptError, "E-CORRUPT a/b: bits flipped")


def test_the_hint_can_be_left_out_where_several_errors_share_it() -> None:
    err = CorruptError("bits flipped", where="a/b", hint="kdpipe cache repair a puts it aside")
    assert str(err) == "E-CORRUPT a/b: bits flipped; kdpipe cache repair a puts it aside"
    assert err.without_hint() == "E-CORRUPT a/b: bits flipped"
    assert pickle.loads(pickle.dumps(err)).without_hint() == err.without_hint()


@pytest.mark.parametrize(("name", "code", "ending"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 75, "terminated")])
def test_a_signal_is_an_error_that_says_what_is_kept(name: str, code: int, ending: str) -> None:
    err = stopped(name, where="c", kept="3 of 12 shards are kept")
    assert (err.exit_code, err.ending) == (code, ending)
    assert str(err).endswith(f" c: stopped by {name}; 3 of 12 shards are kept; run the same command again")
