"""A node's copy of a cache: whole and verified, made once, kept while in use, removed when others need its room."""

import contextlib
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.caches import make_cache

from kdpipe.manifests import node_copy as module
from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CorruptError, IncompleteError
from kdpipe.manifests.node_copy import node_copy
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.shard import commit_path, shard_path


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.copied = 0

    def begin(self, task: str, *, total: int | None, unit: str) -> None:
        self.copied += 1

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "shared" / "cache").path


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in module.NOT_COPIED
    }


def copies(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_a_copy_has_every_byte_and_opens_as_a_cache(cache: Path, tmp_path: Path) -> None:
    with node_copy(cache, tmp_path / "local", Silent()) as copy:
        assert copy is not None
        assert files(copy) == files(cache)
        assert (Cache.open(copy)[3].rows == Cache.open(cache)[3].rows).all()


def test_a_copy_that_is_there_is_used_and_not_made_again(cache: Path, tmp_path: Path) -> None:
    with node_copy(cache, tmp_path / "local", Silent()) as first:
        pass
    notes = Notes()
    with node_copy(cache, tmp_path / "local", notes) as second:
        assert (second, notes.copied) == (first, 0)


def test_a_copy_that_was_interrupted_is_gone_on_with(cache: Path, tmp_path: Path) -> None:
    with node_copy(cache, tmp_path / "local", Silent()) as copy:
        assert copy is not None
    part = copy.rename(copy.with_name(f"{copy.name}.part"))
    torn, kept = shard_path(part, 1), shard_path(part, 0)
    torn.write_bytes(torn.read_bytes()[:100])
    before = kept.stat().st_mtime_ns
    with node_copy(cache, tmp_path / "local", Silent()) as again:
        assert again == copy
        assert files(copy) == files(cache)
        assert shard_path(copy, 0).stat().st_mtime_ns == before


@pytest.mark.parametrize("what", ["shard", "samples.arrow", "teacher/head.safetensors"])
def test_a_damaged_copy_is_refused_and_removed(
    what: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = shard_path(cache, 1).relative_to(cache) if what == "shard" else Path(what)

    def garble(path: Path, to: Path, progress: Silent) -> None:
        copy(path, to, progress)
        if path.relative_to(cache) == bad:
            data = bytearray(to.read_bytes())
            data[-1] ^= 1
            to.write_bytes(data)

    copy = module._copy
    monkeypatch.setattr(module, "_copy", garble)
    with pytest.raises(CorruptError, match="kdpipe cache verify"), node_copy(cache, tmp_path / "local", Silent()):
        pass
    assert copies(tmp_path / "local") == []


def test_a_cache_without_all_its_rows_is_not_copied(cache: Path, tmp_path: Path) -> None:
    commit_path(cache, 1).unlink()
    with pytest.raises(IncompleteError), node_copy(cache, tmp_path / "local", Silent()):
        pass
    assert not (tmp_path / "local").exists()


def test_a_cache_made_anew_has_another_copy(cache: Path, tmp_path: Path) -> None:
    with node_copy(cache, tmp_path / "local", Silent()):
        pass
    shutil.rmtree(cache)
    make_cache(cache, seed=1)
    with node_copy(cache, tmp_path / "local", Silent()):
        assert len(copies(tmp_path / "local")) == 2


def test_the_copies_not_used_for_the_longest_make_room_but_never_one_in_use(tmp_path: Path) -> None:
    made = [make_cache(tmp_path / f"cache{number}", seed=number).path for number in range(4)]
    size = max(sum(len(data) for data in files(cache).values()) for cache in made)
    folder, room = tmp_path / "local", 3 * size

    def used(number: int) -> contextlib.AbstractContextManager[Path | None]:
        return node_copy(made[number], folder, Silent(), max_bytes=room)

    names = []
    for number, when in ((0, 100.0), (1, 50.0), (2, 200.0)):
        with used(number) as copy:
            assert copy is not None
            names.append(copy.name)
        os.utime(folder / f"{copy.name}.lock", (when, when))
    with used(1) as held:  # the oldest, and in use
        os.utime(folder / f"{names[1]}.lock", (50.0, 50.0))
        with used(3) as fourth:
            assert held is not None
            assert fourth is not None
            assert copies(folder) == sorted([names[1], names[2], fourth.name])


def test_a_cache_that_has_no_room_is_read_where_it_is(cache: Path, tmp_path: Path) -> None:
    notes = Notes()
    with node_copy(cache, tmp_path / "local", notes, max_bytes=1000) as copy:
        assert copy is None
    assert "is read where it is" in notes.notes[0]
    assert copies(tmp_path / "local") == []


def test_a_full_disk_is_no_error(cache: Path, tmpfs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    disk, notes = tmpfs("64k"), Notes()
    with node_copy(cache, disk / "local", notes) as copy:
        assert copy is None
    monkeypatch.setattr(module, "_make_room", lambda *words: True)  # another filled it in the meantime
    with node_copy(cache, disk / "local", notes) as copy:
        assert copy is None
    assert "is full" in notes.notes[-1]
    assert copies(disk / "local") == []


def test_jobs_that_start_at_once_make_one_copy_and_all_use_it(cache: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    jobs = [context.Process(target=_use, args=(cache, tmp_path / "local", found)) for _ in range(3)]
    for job in jobs:
        job.start()
    results = [found.get(timeout=60) for _ in jobs]
    for job in jobs:
        job.join(60)
    assert len({name for name, _ in results}) == 1
    assert sum(copied for _, copied in results) == 1


def _use(cache: Path, folder: Path, found: "multiprocessing.Queue[tuple[str, int]]") -> None:
    notes = Notes()
    with node_copy(cache, folder, notes) as copy:
        assert copy is not None
        assert files(copy) == files(cache)
        found.put((copy.name, notes.copied))


def test_whoever_waits_for_another_says_so(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copying, go_on, copy = threading.Event(), threading.Event(), module._copy

    def slow(path: Path, to: Path, progress: Silent) -> None:
        copying.set()
        assert go_on.wait(30)
        copy(path, to, progress)

    monkeypatch.setattr(module, "_copy", slow)
    first = threading.Thread(target=lambda: next(_held(cache, tmp_path)))
    first.start()
    assert copying.wait(30)

    class Told(Notes):
        def note(self, text: str) -> None:
            super().note(text)
            go_on.set()

    notes = Told()
    with node_copy(cache, tmp_path / "local", notes) as found:
        assert found is not None
    first.join(30)
    assert notes.notes[0].startswith("waiting for another job of this node")


def _held(cache: Path, tmp_path: Path) -> Iterator[Path | None]:
    with node_copy(cache, tmp_path / "local", Silent()) as copy:
        yield copy
