"""The last net: whatever nobody answered is one line, and a file for its owner with the traceback."""

import builtins
import errno
import os
import re
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from kdpipe.pipeline import cli


@pytest.fixture
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def recurse() -> None:
    recurse()


def raise_(err: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise err

    return run


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


UNFORESEEN: dict[str, tuple[Callable[[], object], str]] = {
    "a bug": (lambda: 1 // 0, "ZeroDivisionError"),
    "an assertion": (raise_(AssertionError()), "AssertionError"),
    "a recursion": (recurse, "RecursionError"),
    "a panic": (raise_(type("PanicException", (BaseException,), {})("index out of bounds")), "PanicException: index"),
    "many lines": (raise_(RuntimeError("one\ntwo")), "RuntimeError: one two"),
    "no words": (raise_(UnprintableError()), "UnprintableError"),
    "half a surrogate pair": (raise_(ValueError("\ud800")), "ValueError"),
}


@pytest.mark.parametrize("case", UNFORESEEN)
def test_what_nobody_foresaw_is_one_line_and_a_file(case: str, tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, said = UNFORESEEN[case]
    assert cli.guard(run) == 70
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err[:11]) == ("", 1, "E-INTERNAL:")
    assert said in err
    (report,) = tmp.iterdir()
    assert f"the traceback is in {report}, please report it" in err
    assert stat.S_IMODE(report.stat().st_mode) == 0o600
    text = report.read_text(errors="surrogatepass")
    assert "Traceback (most recent call last)" in text
    assert re.search(r"^python 3.*, kdpipe .*, torch 2.*, transformers 5", text, re.MULTILINE)


def test_where_in_kdpipe_it_happened_is_said(tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.guard(lambda: cli.LazyGroup.get_command(None, None, [])) == 70  # type: ignore[arg-type]
    assert re.search(r"TypeError: .* at pipeline/cli\.py:\d+: a fault of kdpipe", capsys.readouterr().err)


@pytest.mark.parametrize("why", ["full", "nowhere"])
def test_a_traceback_that_cannot_be_written_is_said(
    why: str, tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.open

    def full(file: object, *args: object, **kwargs: object) -> object:
        if isinstance(file, int):
            os.close(file)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, *args, **kwargs)  # type: ignore[call-overload]

    if why == "full":
        monkeypatch.setattr(builtins, "open", full)
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp / "nowhere"))
    assert cli.guard(lambda: 1 // 0) == 70
    monkeypatch.undo()
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "the traceback could not be written (no" in err
    assert list(tmp.iterdir()) == []


LACKS: dict[str, tuple[BaseException, str]] = {
    "memory": (MemoryError(), "memory ran out (MemoryError)"),
    "a GPU's memory": (
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        "memory ran out (CUDA out of memory. Tried to allocate 2 GiB)",
    ),
    "torch's memory": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        "memory ran out ([enforce fail",
    ),
    "disk": (OSError(errno.ENOSPC, "No space left on device", "x.bin"), "E-SPACE x.bin: no space left on device"),
}


@pytest.mark.parametrize("what", LACKS)
def test_lack_of_memory_or_disk_is_no_fault_of_kdpipe(what: str, tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err, said = LACKS[what]
    assert cli.guard(raise_(err)) == 4
    printed = capsys.readouterr().err
    assert (printed.count("\n"), printed[:7]) == (1, "E-SPACE")
    assert said in printed
    assert list(tmp.iterdir()) == []


def test_an_exit_that_a_library_asks_for_is_left_alone() -> None:
    with pytest.raises(SystemExit):
        cli.guard(raise_(SystemExit(3)))
