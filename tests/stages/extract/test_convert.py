"""Converting: a raw cache becomes the one that extracting with the codec makes, byte for byte."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import crc32c
import numpy as np
import pytest
from tests.caches import fill_shard, grow_plan, make_cache, make_plan, make_samples, verified
from tests.conftest import Bench
from tests.manifests.packing import killed_at
from tests.stages.extract.test_extract import files
from tests.stages.extract.test_extract_codec import spec_of
from tests.stages.ranks import Recorder

from kdpipe.manifests import durable
from kdpipe.manifests.cache import HEAD_FILE, Cache, teacher_files, write_head
from kdpipe.manifests.errors import CacheError, ConfigError, CorruptError, IncompleteError, KdpipeError, SpaceError
from kdpipe.manifests.fitted import CODEC_FILE, Choice
from kdpipe.manifests.plan import PLAN_FILE
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.shard import blocks, commit_path, shard_path
from kdpipe.manifests.verify import repair
from kdpipe.pipeline.cli import main
from kdpipe.stages.extract import extract, planning
from kdpipe.stages.extract.convert import convert

FISHER = Choice("fisher", kl=0.02)


def test_a_converted_cache_is_the_extracted_one_and_is_gone_on_with(bench: Bench, tmp_path: Path) -> None:
    raw = extract(spec_of(bench), tmp_path / "raw", Silent())
    wanted = extract(spec_of(bench, codec="fisher", codec_kl=0.02), tmp_path / "coded", Silent())
    before = files(raw.path)
    out = tmp_path / "deep" / "out"
    found = convert(raw, out, FISHER, Silent())
    assert files(out) == files(wanted.path)
    assert files(raw.path) == before
    assert found.kl_mean == wanted.info()["codec_kl_mean"]
    for number in (1, 2):
        commit_path(out, number).unlink()
    shard_path(out, 2).unlink()
    (out / "tmp" / "000002.rows.1-0123456789ab").write_bytes(b"left by a kill")
    convert(raw, out, FISHER, Silent())
    assert {name: data for name, data in files(out).items() if not name.startswith("tmp/")} == files(wanted.path)


def test_what_a_converted_cache_lost_of_its_teacher_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make_cache(tmp_path / "raw", num_samples=80)
    convert(raw, tmp_path / "out", FISHER, Silent())
    whole, teacher = files(tmp_path / "out"), tmp_path / "out" / "teacher"
    for path in teacher.iterdir():
        path.unlink()
    convert(raw, tmp_path / "out", FISHER, Silent())
    assert files(tmp_path / "out") == whole
    (teacher / CODEC_FILE).unlink()
    monkeypatch.setattr("kdpipe.stages.codec.fit.FIT", 0.6)
    with pytest.raises(CorruptError, match=r"codec.safetensors: it is lost, and made again it is another"):
        convert(raw, tmp_path / "out", FISHER, Silent())
    assert not (teacher / CODEC_FILE).exists()
    assert not list((tmp_path / "out" / "tmp").iterdir())


def test_a_damaged_codec_and_damaged_shards_are_made_again_after_one_repair(tmp_path: Path) -> None:
    raw = make_cache(tmp_path / "raw", num_samples=80)
    out = tmp_path / "out"
    convert(raw, out, FISHER, Silent())
    whole = files(out)
    for part in (out / "teacher" / CODEC_FILE, shard_path(out, 1), shard_path(out, 3)):
        data = bytearray(part.read_bytes())
        data[-9] ^= 1
        part.write_bytes(data)
    assert {finding.part for finding in repair(Cache.open(out))} == {"tokenizer", 1, 3}
    convert(raw, out, FISHER, Silent())
    assert verified(out, "deep") == [*range(len(raw.plan.shards))]
    assert {**files(out), **whole} == files(out)


def test_a_cache_that_grew_is_converted_with_all_its_plans(tmp_path: Path) -> None:
    make_cache(tmp_path / "c", num_samples=80)
    grow_plan(tmp_path / "c", make_samples(20, seed=9))
    raw = Cache.open(tmp_path / "c")
    for number in range(len(raw.plan.shards)):
        if not commit_path(raw.path, number).exists():
            fill_shard(raw.path, number)
    convert(Cache.open(raw.path), tmp_path / "out", FISHER, Silent())
    out = Cache.open(tmp_path / "out")
    assert (out.plan.generation, len(out)) == (1, 100)
    assert verified(out.path, "deep") == [*range(len(out.plan.shards))]
    assert out.fingerprints() == Cache.open(raw.path).fingerprints()


def grow(raw: Cache, count: int, seed: int) -> Cache:
    """The cache with more samples, extracted."""
    grow_plan(raw.path, make_samples(count, seed=seed))
    for number in range(len(raw.plan.shards), len(Cache.open(raw.path).plan.shards)):
        fill_shard(raw.path, number)
    return Cache.open(raw.path)


@pytest.mark.parametrize("place", ["", "convert:grown", "shards:linked"])
def test_when_its_source_has_grown_it_goes_on_to_what_is_made_of_that_at_once(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, and killed on the way."""
    monkeypatch.setattr(durable, "MOMENT_S", 0.0)
    raw = make_cache(tmp_path / "c", num_samples=80)
    convert(raw, tmp_path / "out", FISHER, Silent())
    first = files(tmp_path / "out")
    raw = grow(grow(raw, 20, 9), 7, 11)
    if place:
        assert killed_at(place, lambda: convert(raw, tmp_path / "out", FISHER, Silent()))
    convert(raw, tmp_path / "out", FISHER, told := Recorder())
    assert any("has grown since" in note for note in told.notes) == (place != "shards:linked")
    convert(raw, tmp_path / "once", FISHER, Silent())
    assert files(tmp_path / "out") == files(tmp_path / "once")
    assert first.items() <= files(tmp_path / "out").items()
    assert verified(tmp_path / "out", "deep") == [*range(len(raw.plan.shards))]


def of_another_source(folder: Path) -> KdpipeError:
    """Of the same teacher, with a sample more."""
    convert(make_cache(folder.with_name("other"), num_samples=81), folder / "out", FISHER, Silent())
    with pytest.raises(CacheError, match=r"it is not made of .*c; choose another OUT") as caught:
        convert(make_cache(folder / "c", num_samples=80), folder / "out", FISHER, Silent())
    return caught.value


def of_coded(folder: Path) -> KdpipeError:
    with pytest.raises(ConfigError, match=r"its rows are coded already \('int8'\)") as caught:
        convert(make_cache(folder / "c", codec="int8"), folder / "out", FISHER, Silent())
    return caught.value


def of_another_codec(folder: Path) -> KdpipeError:
    raw = make_cache(folder / "c", num_samples=80)
    convert(raw, folder / "out", Choice("int8"), Silent())
    with pytest.raises(CacheError, match=r"its codec is 'int8', this command asks for 'fisher kl=0.02'") as caught:
        convert(raw, folder / "out", FISHER, Silent())
    return caught.value


def of_unfinished(folder: Path) -> KdpipeError:
    make_plan(folder / "c", make_samples(21))
    with pytest.raises(IncompleteError, match="0 of 4 shards") as caught:
        convert(Cache.open(folder / "c"), folder / "out", FISHER, Silent())
    return caught.value


def of_a_folder_that_is_there(folder: Path) -> KdpipeError:
    (folder / "out").mkdir()
    with pytest.raises(CacheError, match="it exists and is not a cache") as caught:
        convert(make_cache(folder / "c", num_samples=80), folder / "out", FISHER, Silent())
    return caught.value


def of_damaged(folder: Path) -> KdpipeError:
    raw = make_cache(folder / "c", num_samples=80)
    path, layout = shard_path(raw.path, 1), raw.shard(1).layout
    data = bytearray(path.read_bytes())
    data[layout.body + 1] ^= 8
    crcs = layout.tensors["crc32c"].view(data)  # the block agrees with its checksum, the shard not with its digest
    crcs[:] = [crc32c.crc32c(bytes(data[begin:end])) for begin, end in blocks(layout)]
    path.write_bytes(data)
    with pytest.raises(CorruptError) as caught:
        convert(Cache.open(raw.path), folder / "out", FISHER, Silent())
    return caught.value


@pytest.mark.parametrize("when", ["before the fit", "after it"])
def test_a_full_disk_is_refused_with_what_takes_less_and_nothing_is_left(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, log = make_cache(tmp_path / "c", num_samples=80), Recorder()
    free = iter([1] if when == "before the fit" else [10**12, 1])
    monkeypatch.setattr(planning.os, "statvfs", lambda _: SimpleNamespace(f_bavail=next(free), f_frsize=1))
    with pytest.raises(SpaceError, match="or a coarser codec") as caught:
        convert(raw, tmp_path / "deep" / "out", FISHER, log)
    assert caught.value.where == str(tmp_path / "deep" / "out")
    assert bool(log.values("codec", "kl_mean")) == (when == "after it")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_what_a_killed_conversion_left_is_gone_after_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".out.plan.1-0123456789ab"
    left.mkdir()
    os.utime(left, (0, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "MOMENT_S", 0)
        convert(make_cache(tmp_path / "c", num_samples=80), tmp_path / "out", FISHER, Silent())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "out"]


def of_no_rows(folder: Path) -> KdpipeError:
    samples = [replace(each, supervised=each.supervised & False) for each in make_samples(5)]
    raw = make_cache(folder / "c", samples=samples)
    with pytest.raises(ConfigError, match="0 rows are too few") as caught:
        convert(raw, folder / "out", FISHER, Silent())
    return caught.value


def to_raw(folder: Path) -> KdpipeError:
    with pytest.raises(ConfigError, match="'raw' is not a codec that rows are converted to") as caught:
        convert(make_cache(folder / "c"), folder / "out", Choice("raw"), Silent())
    return caught.value


@pytest.mark.parametrize(
    "refused",
    [
        of_another_source,
        of_coded,
        of_another_codec,
        of_unfinished,
        of_a_folder_that_is_there,
        of_damaged,
        of_no_rows,
        to_raw,
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(refused: Callable[[Path], KdpipeError], tmp_path: Path) -> None:
    assert refused(tmp_path).where
    assert not [path for path in tmp_path.iterdir() if path.name not in ("c", "out")], "scratch is left"


def test_padding_of_the_teachers_vocabulary_counts_for_nothing(tmp_path: Path) -> None:
    losses = []
    for name, padding in (("small", 0.0), ("large", 9.0)):
        plan = make_plan(tmp_path / name, make_samples(80))
        weight = np.array(Cache.open(tmp_path / name).head().weight)
        weight[plan.head.vocab_size :] = padding
        (tmp_path / name / "teacher" / HEAD_FILE).unlink()
        write_head(tmp_path / name / "teacher", weight, None, dtype=plan.head.dtype)
        plan = plan.changed(teacher_files=teacher_files(tmp_path / name / "teacher"))
        (tmp_path / name / PLAN_FILE).write_bytes(plan.to_bytes())
        for number in range(len(plan.shards)):
            fill_shard(tmp_path / name, number)
        losses.append(convert(Cache.open(tmp_path / name), tmp_path / f"{name} out", Choice("int8"), Silent()).kl_mean)
    assert losses[0] == losses[1]


def test_the_command_says_what_came_of_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    raw = make_cache(tmp_path / "c", num_samples=80)

    def run(*words: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(words)
        return int(ended.value.code or 0)

    words = ["cache", "convert", str(raw.path), str(tmp_path / "out"), "--codec", "fisher", "--codec-bytes", "0.3"]
    assert run(*words, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["codec"] == "fisher bytes=0.3"
    assert 0 < found["kl_mean"] < found["kl_p99"]
    assert run("cache", "info", str(tmp_path / "out")) == 0
    said = capfd.readouterr().out
    assert "codec kl mean" in said
    assert f"kdpipe cache convert {raw.path}" in said, "what it was made with"
    assert run("cache", "compare", str(raw.path), str(tmp_path / "out")) == 4
    assert "its rows are coded ('fisher bytes=0.3')" in capfd.readouterr().err
    assert run("cache", "compare", str(raw.path), str(tmp_path / "out"), "--tolerance", "2") == 0
    assert run(*words[:-2], "--codec-kl", "0.01", "--codec-bytes", "0.3") == 4
    assert "give one of the two" in capfd.readouterr().err
