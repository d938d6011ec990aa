"""Files are whole or absent, and nothing is ever replaced."""

import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdpipe.manifests.durable import canonical, disk_error, file_system, publish, scratch_name, sweep, write_once
from kdpipe.manifests.errors import SpaceError


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical({"b": 1, "a": "ü"}) == canonical({"a": "ü", "b": 1}) == '{\n  "a": "ü",\n  "b": 1\n}\n'.encode()


def test_numbers_json_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError):
        canonical({"a": float("nan")})


def test_the_file_system_is_that_of_the_mount() -> None:
    with open("/proc/self/stat") as file:
        assert file_system(file.fileno()) == "proc"
    pipe = os.pipe()
    assert file_system(pipe[0]) == ""
    for descriptor in pipe:
        os.close(descriptor)


def test_the_first_write_stays(tmp_path: Path) -> None:
    final = tmp_path / "record.json"
    assert write_once(final, b"first", scratch_folder=tmp_path)
    assert not write_once(final, b"second", scratch_folder=tmp_path)
    assert final.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [final]


def test_publishing_replaces_nothing_and_leaves_the_loser_to_its_owner(tmp_path: Path) -> None:
    final, outcomes = tmp_path / "shard", []
    for content in (b"first", b"second"):
        scratch = scratch_name(tmp_path, "shard")
        scratch.write_bytes(content)
        outcomes.append(publish(scratch, final))
    assert outcomes == [True, False]
    assert final.read_bytes() == b"first"
    assert [path.read_bytes() for path in tmp_path.iterdir() if path != final] == [b"second"]


def test_scratch_names_never_repeat(tmp_path: Path) -> None:
    assert len({scratch_name(tmp_path, "a") for _ in range(100)}) == 100


def test_what_was_made_a_moment_ago_is_not_swept_and_what_is_older_is(tmp_path: Path) -> None:
    """Its maker may not have come to hold it yet."""
    for name in ("file", "folder/in/it"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    sweep(tmp_path.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    with pytest.MonkeyPatch.context() as patch:
        later = time.time() + 3
        patch.setattr(time, "time", lambda: later)
        sweep(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "E-SPACE"),
        (errno.EDQUOT, "E-SPACE"),
        (errno.EFBIG, "E-SPACE"),
        (errno.EACCES, "E-INPUT"),
        (errno.EIO, "E-IO"),
    ],
)
def test_a_failed_system_call_becomes_an_error_for_a_person(number: int, code: str) -> None:
    failed = disk_error(OSError(number, os.strerror(number)), Path("shards/1"))
    assert str(failed).startswith(f"{code} shards/1: ")
    assert isinstance(failed, SpaceError) == (code == "E-SPACE")


def test_a_file_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
import resource, pathlib
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))
from kdpipe.manifests.durable import write_once
from kdpipe.manifests.errors import SpaceError
folder = pathlib.Path({str(tmp_path)!r})
try:
    write_once(folder / "big", bytes(100_000), scratch_folder=folder)
except SpaceError as err:
    print(err)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith(f"E-SPACE {tmp_path}/big: ")
    assert list(tmp_path.iterdir()) == []
