"""Fitted codecs in a cache: rows of a coded cache survive all that raw ones do, and without its codec none is read."""

import random
from pathlib import Path

import numpy as np
import pytest
from tests.caches import fill_shard, fit_codec, make_cache, make_plan, make_samples, random_rows, verified

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.codec import as_stored
from kdpipe.manifests.errors import CheckFailed, CorruptError, IncompleteError, KdpipeError, LayoutError
from kdpipe.manifests.fitted import CODEC_FILE, Choice, open_fitted, read_fitted
from kdpipe.manifests.plan import read_plan
from kdpipe.manifests.shard import Shard, adopt, commit_path, planned_bytes, shard_layout, shard_path, sized_layout
from kdpipe.manifests.specs import Io
from kdpipe.manifests.tensorfile import parse
from kdpipe.manifests.verify import examine, repair

CODECS = ["int8", "fisher kl=0.01"]


def planned(folder: Path, codec: str) -> Path:
    make_plan(folder, make_samples(21))
    fit_codec(folder, codec)
    return folder


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("codec", CODECS)
def test_every_sample_reads_what_its_codec_stores(codec: str, io: Io, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", codec=codec)
    assert verified(cache.path, "deep", io=io) == [*range(len(cache.plan.shards))]
    stored = [as_stored(open_fitted(cache.path, cache.plan).codec, random_rows(cache.plan, at)) for at in range(4)]
    read = np.concatenate([view.rows for view in Cache.open(cache.path, io=io)])
    assert read.dtype == stored[0].dtype
    assert np.allclose(read.astype(np.float32), np.concatenate(stored).astype(np.float32), rtol=0.01, atol=1e-3)
    assert not list((cache.path / "tmp").iterdir())


def test_a_shard_takes_what_its_rows_take_and_no_more(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", codec="fisher kl=0.01")
    rows = random_rows(cache.plan, 0)
    rows[2] = 3e4  # a row as wild as none, which is longer than the others
    raw = make_cache(tmp_path / "raw")
    for number in range(len(cache.plan.shards)):
        size = shard_path(cache.path, number).stat().st_size
        assert size == planned_bytes(cache.path, cache.plan, number) < planned_bytes(raw.path, raw.plan, number)
    for path in (commit_path, shard_path):
        path(cache.path, 0).unlink()
    fill_shard(cache.path, 0, rows=lambda *_: rows)
    assert np.array_equal(Cache.open(cache.path).shard(0).rows(2, 3), rows[2:3])
    assert shard_path(cache.path, 0).stat().st_size > size


def test_a_shard_of_several_blocks_has_the_size_that_its_exceptions_give_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of the file says how many exceptions there are, whatever the checksums of its blocks take."""
    monkeypatch.setattr("kdpipe.manifests.shard.BLOCK", 256)
    cache = make_cache(tmp_path / "c", codec="fisher kl=0.01")
    assert verified(cache.path, "deep") == [*range(len(cache.plan.shards))]
    shard = cache.shard(0)
    assert len(shard.good) > 8
    codec, found = open_fitted(cache.path, cache.plan).codec, 0
    for count in range(200):
        layout = shard_layout(cache.plan, 0, "0" * 32, codec=codec, num_ragged=count)
        found += sized_layout(cache.plan, 0, "0" * 32, codec, layout.num_bytes) == layout
    assert found == 200


@pytest.mark.parametrize("codec", CODECS)
def test_rows_are_encoded_in_pieces_and_twice_with_the_same_bytes(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = planned(tmp_path / "c", codec)
    whole = fill_shard(folder, 0)
    assert fill_shard(folder, 0) == whole
    for path in (commit_path, shard_path):
        path(folder, 0).unlink()
    monkeypatch.setattr("kdpipe.manifests.shard.ENCODED_ROWS", 3)
    assert fill_shard(folder, 0) == whole
    commit_path(folder, 0).unlink()
    assert adopt(folder, read_plan(folder), 0)
    Shard(folder, read_plan(folder), 0).verify(None)


REGIONS = [
    "header",
    "padding",
    "packed",
    "num_exceptions",
    "row_offsets",
    "token_offsets",
    "token_ids",
    "supervised",
    "sample_ids",
    "exception_places",
    "exception_differences",
    "crc32c",
]


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("region", REGIONS)
def test_a_flipped_bit_in_any_part_of_a_coded_shard_is_found_by_verify_and_by_whoever_reads(
    region: str, io: Io, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard is of many blocks, and the first, a middle and the last byte of the part are tried."""
    monkeypatch.setattr("kdpipe.manifests.shard.BLOCK", 256)
    cache = make_cache(tmp_path / "c", codec="fisher kl=0.01")
    path, layout = shard_path(cache.path, 0), cache.shard(0).layout
    assert [*layout.tensors] == REGIONS[2:]
    assert len(cache.shard(0).good) > 8
    good = path.read_bytes()
    text_ends = good.index(b"}}", 8) + 2
    begin, end = {"header": (0, text_ends), "padding": (text_ends, layout.body)}.get(region) or (
        layout.tensors[region].begin,
        layout.tensors[region].end,
    )
    assert end - begin > 2
    for at in (begin, (begin + end) // 2, end - 1):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        (found,) = [finding for finding in examine(Cache.open(cache.path, io=io)) if finding.error]
        assert (found.part, found.error.where if found.error else None) == (0, str(path))
        with pytest.raises(CheckFailed) as caught:
            [view.rows for view in Cache.open(cache.path, io=io)]
        assert caught.value.where == str(path)
    path.write_bytes(good)
    assert verified(cache.path, io=io) == [*range(len(cache.plan.shards))]


def test_a_coded_shard_of_another_size_is_not_read(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", codec="fisher kl=0.01")
    path = shard_path(cache.path, 0)
    good = path.read_bytes()
    for size in (len(good) - 3, len(good) + 3, len(good) - 1):
        path.write_bytes(good[:size].ljust(size, b"\0"))
        with pytest.raises(LayoutError):
            Cache.open(cache.path)[0]


def test_a_flipped_bit_anywhere_in_a_codec_is_found_by_verify_and_by_whoever_reads(tmp_path: Path) -> None:
    """Each array of it, its record, the header's padding."""
    cache = make_cache(tmp_path / "c", codec="fisher kl=0.01")
    path = cache.teacher_folder / CODEC_FILE
    good = path.read_bytes()
    layout, _ = parse(memoryview(good), path)
    places = [0, 9, good.index(b"kl_mean"), layout.body - 1]
    places += [at for tensor in layout.tensors.values() for at in (tensor.begin, tensor.end - 1)]
    for at in places:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        found = [finding for finding in examine(Cache.open(cache.path), "quick") if finding.damaged]
        assert [(each.part, each.error.where if each.error else None) for each in found] == [("tokenizer", str(path))]
        with pytest.raises(CorruptError) as caught:
            Cache.open(cache.path)[0]
        assert caught.value.where == str(path)
    path.write_bytes(good)
    assert len(Cache.open(cache.path)[0].rows)


def test_a_cache_whose_codec_is_lost_or_damaged_is_not_read(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", codec="fisher kl=0.01")
    path = cache.teacher_folder / CODEC_FILE
    good = path.read_bytes()
    path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    with pytest.raises(CorruptError, match=r"xxh3-128 .*, PLAN.json says"):
        Cache.open(cache.path)[0]
    path.unlink()
    with pytest.raises(IncompleteError, match="the codec is missing, without which no row can be read"):
        Cache.open(cache.path)[0]
    path.write_bytes(good)
    assert len(Cache.open(cache.path)[0].rows)


def test_repair_puts_a_damaged_codec_aside_and_no_shard(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", codec="fisher kl=0.01")
    path = cache.teacher_folder / CODEC_FILE
    good = path.read_bytes()
    path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    for level in ("quick", "full", "deep"):
        found = {finding.part: finding for finding in examine(Cache.open(cache.path), level)}
        assert [part for part, finding in found.items() if finding.damaged] == ["tokenizer"]
        assert (found[0].error is None) == (level != "deep")
    assert "its numbers were not looked at, for want of the codec" in str(found[0].error)
    (put_aside,) = repair(Cache.open(cache.path))
    assert put_aside.part == "tokenizer"
    assert [each.name for each in (cache.path / "quarantine").iterdir()] == [CODEC_FILE]
    path.write_bytes(good)
    assert verified(cache.path, "deep") == [*range(len(cache.plan.shards))]


@pytest.mark.parametrize("lost", [True, False])
def test_damage_of_shards_is_told_beside_that_of_the_codec_and_repaired_with_it(lost: bool, tmp_path: Path) -> None:
    """In every part of a shard, and of its commit record."""
    cache = make_cache(tmp_path / "c", codec="fisher kl=0.01")
    path, shard = cache.teacher_folder / CODEC_FILE, shard_path(cache.path, 1)
    codec, good = path.read_bytes(), shard.read_bytes()
    layout = parse(memoryview(good), shard)[0]
    if lost:
        path.unlink()
    else:
        path.write_bytes(codec[:-9] + bytes([codec[-9] ^ 1]) + codec[-8:])
    places = [0, 9, good.index(b"kdpipe-shard"), good.index(b'"shape"') + 10, layout.body - 1]
    places += [
        at for tensor in layout.tensors.values() if tensor.end > tensor.begin for at in (tensor.begin, tensor.end - 1)
    ]
    for data in [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in places] + [good[:-1], good + b"x", b""]:
        shard.write_bytes(data)
        assert 1 in [finding.part for finding in examine(Cache.open(cache.path)) if finding.damaged]
    repair(Cache.open(cache.path))
    assert not shard.exists()
    path.write_bytes(codec)
    left = {finding.part: finding.error for finding in examine(Cache.open(cache.path), "deep")}
    assert {part for part, error in left.items() if error is not None} == {1}
    assert isinstance(left[1], IncompleteError)


@pytest.mark.parametrize("cases", [120, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_a_flipped_bit_anywhere_in_a_coded_cache_is_an_error_or_changes_no_row(cases: int, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", codec="fisher kl=0.01")
    wanted = [view.rows.tobytes() for view in cache]
    files = [path for path in sorted(cache.path.rglob("*")) if path.is_file() and path.stat().st_size]
    draw, refused = random.Random(cases), 0
    for _ in range(cases):
        path = draw.choice(files)
        good = path.read_bytes()
        at = draw.randrange(len(good))
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << draw.randrange(8)]) + good[at + 1 :])
        try:
            opened = Cache.open(cache.path)
            opened.samples.verify()
            opened.head()
            assert [view.rows.tobytes() for view in opened] == wanted, f"{path.name} at {at}"
        except KdpipeError:
            refused += 1
        path.write_bytes(good)
    assert refused > cases / 2


def test_a_codec_comes_back_from_its_file(tmp_path: Path) -> None:
    folder = planned(tmp_path / "c", "fisher bytes=0.3")
    plan = read_plan(folder)
    fitted = read_fitted(folder / "teacher" / CODEC_FILE, digest=plan.teacher_files[CODEC_FILE])
    assert (fitted.record.codec, fitted.record.head) == ("fisher bytes=0.3", plan.teacher_files["head.safetensors"])
    rows = random_rows(plan, 0)
    assert {name: part.dtype.kind for name, part in fitted.codec.encode(rows).items()} == {
        "packed": "u",
        "num_exceptions": "u",
        "exception_places": "u",
        "exception_differences": "i",
    }


@pytest.mark.parametrize("text", ["fisher kl=0.01", "fisher bytes=0.25", "int8", "raw", "fisher kl=1e-05"])
def test_a_choice_is_read_as_it_is_written(text: str) -> None:
    assert str(Choice.read(text)) == text


@pytest.mark.parametrize("text", ["fisher kl=x", "fisher kl=1e-2", "fisher  kl=0.01", "fisher size=3"])
def test_a_choice_written_otherwise_is_refused(text: str) -> None:
    with pytest.raises(LayoutError, match="is no codec"):
        Choice.read(text)
