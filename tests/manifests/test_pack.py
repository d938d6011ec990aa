"""Packing a cache: whole or not there, the same however often it was interrupted, and only what was checked."""

import fcntl
from pathlib import Path

import crc32c
import pytest
from tests.caches import fill_shard, make_cache, make_plan, make_samples
from tests.conftest import Main
from tests.faults.powercut import Place, PowerCut
from tests.manifests.packing import PLENTY, killed_at, make_grown, tree

from kdpipe.manifests import packed as module
from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import BusyError, ConfigError, CorruptError, IncompleteError, LayoutError, SpaceError
from kdpipe.manifests.pack import pack
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.shard import blocks, commit_path, shard_path
from kdpipe.manifests.unpack import unpack


class Told(Silent):
    """What a packing says on its way."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, str]] = []
        self.notes: list[str] = []

    def advance(self, amount: int, detail: str = "") -> None:
        self.steps.append((amount, detail))

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return make_grown(tmp_path / "cache")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_was_packed_is_unpacked_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", dtype=dtype, rows="all", has_bias=True)  # type: ignore[arg-type]
    found = pack(cache, tmp_path / "deep" / "out", Silent(), most_bytes=PLENTY)
    assert found.packed_bytes == (tmp_path / "deep" / "out").stat().st_size
    unpack(tmp_path / "deep" / "out", tmp_path / "back", Silent(), most_bytes=PLENTY)
    assert tree(tmp_path / "back") == tree(cache.path)
    assert found.num_bytes == sum(map(len, tree(cache.path).values()))


def test_a_cache_that_grew_is_packed_with_its_logs_and_without_what_nobody_needs(cache: Cache, tmp_path: Path) -> None:
    pack(cache, tmp_path / "out", Silent(), most_bytes=PLENTY)
    back = unpack(tmp_path / "out", tmp_path / "back", Silent(), most_bytes=PLENTY)
    assert tree(back.path) == tree(cache.path)
    assert {"runs/20260101T000000Z-1.jsonl", "runs/empty.jsonl"} < tree(back.path).keys()
    assert not any((back.path / "claims").iterdir())
    assert not any((back.path / "tmp").iterdir())
    assert not (back.path / "quarantine").exists()
    assert back.plan == cache.plan
    assert back.plan.generation == 1


@pytest.mark.parametrize("codec", ["raw", "fisher kl=0.01"])
def test_a_packing_that_was_killed_anywhere_goes_on_to_the_same_file(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_grown(tmp_path / "cache", codec)
    monkeypatch.setattr(module, "BLOCK_BYTES", 2000)
    pack(cache, tmp_path / "right", Silent(), most_bytes=PLENTY)
    out, part = tmp_path / "out", tmp_path / ".out.pack"
    places = [f"pack:block#{count}" for count in (1, 2, 17, 40)]
    for place in [*places, "pack:flushed", f"{tmp_path.name}:linked"]:
        assert killed_at(place, lambda: pack(cache, out, Silent(), most_bytes=PLENTY)), place
        assert part.exists()
    # The last kill came between the name and the removal of the scratch name.
    assert out.read_bytes() == (tmp_path / "right").read_bytes()
    out.unlink()
    for torn in (1, 100, part.stat().st_size // 2):
        data = part.read_bytes()
        part.write_bytes(data[:-torn])
        pack(cache, out, Silent(), most_bytes=PLENTY)
        assert out.read_bytes() == (tmp_path / "right").read_bytes()
        assert not part.exists()
        out.rename(part)


@pytest.mark.parametrize("codec", ["raw", "fisher kl=0.01"])
@pytest.mark.parametrize(
    "skipped", [None, ("make_folder", "live"), ("pack", "new"), ("publish", "new")], ids=lambda place: str(place)
)
def test_a_packed_file_survives_a_cut_by_each_of_its_flushes(skipped: Place | None, codec: str, tmp_path: Path) -> None:
    """Whoever packs removes the cache."""
    cache = make_grown(tmp_path / "cache", codec)
    (tmp_path / "live").mkdir()
    with PowerCut(tmp_path / "live", skip=[] if skipped is None else [skipped]) as disk:
        pack(cache, tmp_path / "live" / "new" / "out", Silent(), most_bytes=PLENTY)
        disk.restore(tmp_path / "left")
    left, packed = tmp_path / "left" / "new" / "out", tmp_path / "live" / "new" / "out"
    assert (left.exists() and left.read_bytes() == packed.read_bytes()) == (skipped is None)


def test_what_was_packed_before_is_not_packed_again(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 2000)
    assert killed_at("pack:block#30", lambda: pack(cache, tmp_path / "out", Silent(), most_bytes=PLENTY))

    told = Told()
    found = pack(cache, tmp_path / "out", told, most_bytes=PLENTY)
    assert told.steps[0][1] == "begun before"
    assert told.steps[0][0] > 10_000
    assert sum(amount for amount, _ in told.steps) == found.num_bytes


def test_what_was_begun_of_another_cache_is_not_gone_on_with(cache: Cache, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", seed=3)
    assert killed_at("pack:block#12", lambda: pack(other, tmp_path / "out", Silent(), most_bytes=PLENTY))
    pack(cache, tmp_path / "out", Silent(), most_bytes=PLENTY)
    back = unpack(tmp_path / "out", tmp_path / "back", Silent(), most_bytes=PLENTY)
    assert tree(back.path) == tree(cache.path)


def test_what_was_begun_before_a_shard_was_made_again_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an engine makes it whose rows differ in their last bits: no size has changed."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 2000)
    cache = make_cache(tmp_path / "cache")
    assert killed_at("pack:block#45", lambda: pack(cache, tmp_path / "out", Silent(), most_bytes=PLENTY))
    for path in (shard_path(cache.path, 0), commit_path(cache.path, 0)):
        path.unlink()
    fill_shard(cache.path, 0, seed=1)
    pack(Cache.open(cache.path), tmp_path / "out", Silent(), most_bytes=PLENTY)
    back = unpack(tmp_path / "out", tmp_path / "back", Silent(), most_bytes=PLENTY)
    assert tree(back.path) == tree(cache.path)


def test_files_of_nobody_go_along_and_links_are_named(cache: Cache, tmp_path: Path) -> None:
    for name in ("shards/notes.txt", "shards/000099.safetensors", "README"):
        (cache.path / name).write_text("mine")
    pack(cache, tmp_path / "out", Silent(), most_bytes=PLENTY)
    back = unpack(tmp_path / "out", tmp_path / "back", Silent(), most_bytes=PLENTY)
    assert tree(back.path) == tree(cache.path)
    (cache.path / "runs" / "link").symlink_to("/etc/hostname")
    with pytest.raises(LayoutError, match="link: not a regular file but a link"):
        pack(cache, tmp_path / "other", Silent(), most_bytes=PLENTY)


def test_a_damaged_cache_is_refused_and_nothing_has_the_name(cache: Cache, tmp_path: Path) -> None:
    path, layout = shard_path(cache.path, 2), cache.shard(2).layout
    data = bytearray(path.read_bytes())
    data[layout.body + 1] ^= 8
    crcs = layout.tensors["crc32c"].view(data)  # the block agrees with its checksum, the shard not with its digest
    crcs[:] = [crc32c.crc32c(bytes(data[begin:end])) for begin, end in blocks(layout)]
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"000002.safetensors"):
        pack(cache, tmp_path / "out", Silent(), most_bytes=PLENTY)
    (cache.path / "teacher" / "head.json").write_text("{}")
    with pytest.raises(CorruptError, match=r"head.json"):
        pack(cache, tmp_path / "out", Silent(), most_bytes=PLENTY)
    assert not (tmp_path / "out").exists()


def test_a_cache_that_lacks_shards_is_refused(tmp_path: Path) -> None:
    make_plan(tmp_path / "cache", make_samples(21))
    fill_shard(tmp_path / "cache", 0)
    with pytest.raises(IncompleteError, match=r"1 of \d+ shards are extracted"):
        pack(Cache.open(tmp_path / "cache"), tmp_path / "out", Silent(), most_bytes=PLENTY)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_is_packed_already_is_left_as_it_is_and_said(cache: Cache, tmp_path: Path) -> None:
    """As after a kill between its name and the end of the command."""
    first = pack(cache, tmp_path / "out", Silent(), most_bytes=PLENTY)
    good, told = (tmp_path / "out").read_bytes(), Told()
    assert pack(cache, tmp_path / "out", told, most_bytes=0) == first
    assert told.notes[0].startswith(f"{tmp_path / 'out'} is there already; kdpipe cache verify ")
    assert (tmp_path / "out").read_bytes() == good
    (tmp_path / "out").write_bytes(good[:-9])
    with pytest.raises(CorruptError, match="its last note is missing"):
        pack(cache, tmp_path / "out", Silent(), most_bytes=PLENTY)
    other = make_cache(tmp_path / "other", num_samples=5)
    pack(other, tmp_path / "of-other", Silent(), most_bytes=PLENTY)
    with pytest.raises(ConfigError, match="it is there already; name another file"):
        pack(cache, tmp_path / "of-other", Silent(), most_bytes=PLENTY)


def test_a_place_that_is_taken_full_or_in_the_cache_is_refused(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(ConfigError, match="it is there already; name another file"):
        pack(cache, tmp_path / "taken", Silent(), most_bytes=PLENTY)
    with pytest.raises(ConfigError, match="lies in the cache"):
        pack(cache, cache.path / "inside", Silent(), most_bytes=PLENTY)
    with pytest.raises(SpaceError, match=r"about [\d,]+ bytes are needed, 5,000 are free"):
        pack(cache, tmp_path / "out", Silent(), most_bytes=5000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "taken"]


def test_two_at_once_are_one_too_many(cache: Cache, tmp_path: Path) -> None:
    with open(tmp_path / ".out.pack", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match="another process is writing it"):
            pack(cache, tmp_path / "out", Silent(), most_bytes=PLENTY)


@pytest.mark.parametrize(("shard_tokens", "codec"), [(9000, "raw"), (500, "raw"), (500, "fisher kl=0.01")])
def test_the_forecast_is_what_it_takes(shard_tokens: int, codec: str, tmp_path: Path) -> None:
    told = Told()
    large = make_cache(tmp_path / "large", num_samples=900, hidden_size=64, shard_tokens=shard_tokens, codec=codec)
    found = pack(large, tmp_path / "out", told, most_bytes=PLENTY)
    about = int(told.notes[0].split(" will take about ")[1].split()[0].replace(",", ""))
    assert about == pytest.approx(found.packed_bytes, rel=0.08)


def test_the_commands_pack_verify_and_unpack(cache: Cache, main: Main, tmp_path: Path) -> None:
    assert main("cache", "pack", cache.path, tmp_path / "c.kdpack", "--json")[0] == 0
    assert main("cache", "verify", tmp_path / "c.kdpack", "--json")[:2] == (
        0,
        f'{{"ok": true, "packed_bytes": {(tmp_path / "c.kdpack").stat().st_size}, "problems": []}}\n',
    )
    code, _, err = main("cache", "info", tmp_path / "c.kdpack")
    way = f"unpack it first: kdpipe cache unpack {tmp_path}/c.kdpack {tmp_path}/c"
    assert (code, way in err) == (4, True)
    assert main("cache", "unpack", tmp_path / "c.kdpack", tmp_path / "c", "--json")[0] == 0
    assert main("cache", "verify", tmp_path / "c", "--deep")[0] == 0
    data = bytearray((tmp_path / "c.kdpack").read_bytes())
    data[len(data) // 2] ^= 16
    (tmp_path / "c.kdpack").write_bytes(data)
    code, out, err = main("cache", "verify", tmp_path / "c.kdpack")
    assert (code, "E-CORRUPT" in out, "unpack another copy of it" in err) == (1, True, True)


@pytest.mark.parametrize("words", [("train", "--output", "o"), ("eval",)], ids=["train", "eval"])
def test_a_packed_cache_is_refused_with_the_command_that_unpacks_it(
    words: tuple[str, ...], cache: Cache, main: Main, tmp_path: Path
) -> None:
    pack(cache, tmp_path / "my cache", Silent(), most_bytes=PLENTY)
    code, _, err = main(*words, "--student", tmp_path / "student", "--cache", tmp_path / "my cache")
    assert code == 4
    assert f"kdpipe cache unpack '{tmp_path}/my cache' '{tmp_path}/my cache-unpacked'" in err
