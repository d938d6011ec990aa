"""Extraction with a codec: fitted before the first shard, one for all writers, what it loses on record."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from tests.caches import fill_shard, verified
from tests.chats import write_chats
from tests.conftest import Bench, Main
from tests.stages import deriving
from tests.stages.extract.test_extract import files
from tests.stages.ranks import Recorder

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.durable import QUARANTINE
from kdpipe.manifests.errors import CacheError, ConfigError, CorruptError
from kdpipe.manifests.fisher import Fisher
from kdpipe.manifests.fitted import CODEC_FILE, Choice, file_bytes, open_fitted, stored_as
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.run import read_run
from kdpipe.manifests.shard import commit_path, shard_path
from kdpipe.manifests.specs import DataSpec, RunSpec, TrainSpec
from kdpipe.manifests.verify import repair
from kdpipe.stages.codec.fit import wanted_rows
from kdpipe.stages.codec.metric import Lens
from kdpipe.stages.extract import ExtractSpec, extract, forecast
from kdpipe.stages.extract.calibrate import chosen
from kdpipe.stages.extract.recompute import recompute
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.rows import as_tensor
from kdpipe.stages.student.student import load_teacher_head
from kdpipe.stages.train import train
from kdpipe.stages.train.training import Training, check_training, find

CODECS = {"int8": {"codec": "int8"}, "fisher": {"codec": "fisher", "codec_kl": 0.02}}


def spec_of(bench: Bench, **changes: object) -> ExtractSpec:
    spec = ExtractSpec(
        teacher=bench.teacher,
        data=(bench.data,),
        data_spec=DataSpec(max_length=128, heldout_fraction=0.25),
        shard_tokens=500,
        device="cpu",
    )
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=CODECS)
def coded(request: pytest.FixtureRequest, bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("coded")
    return extract(spec_of(bench, **CODECS[request.param]), folder / "cache", Silent())


def lost(cache: Cache, exact: Cache) -> float:
    """Mean KL over all rows."""
    (teacher,) = of_caches([exact]).teachers
    head = load_teacher_head(teacher, torch.device("cpu"))
    lens = Lens.of(head.head, head.vocab_size, torch.device("cpu"))
    pairs = [(view.rows, other.rows) for view, other in zip(exact, cache, strict=True) if len(view.rows)]
    both = (as_tensor(np.concatenate(rows)).float() for rows in zip(*pairs, strict=True))
    return lens.compare(*both).mean


def test_a_cache_says_what_its_rows_lose_and_loses_that(coded: Cache, bench: Bench) -> None:
    assert verified(coded.path, "deep") == [*range(len(coded.plan.shards))]
    record, info = open_fitted(coded.path, coded.plan).record, coded.info()
    exact = Cache.open(bench.cache)
    found = lost(coded, exact)
    assert 0.5 * record.kl_mean < found < 1.5 * record.kl_mean
    assert info["codec"] == coded.plan.settings.codec.split()[0]
    assert (info["codec_kl_mean"], info["codec_kl_p99"]) == (record.kl_mean, record.kl_p99)
    assert (info["codec_fit_rows"], info["codec_test_rows"]) == (record.fit_rows, record.test_rows)
    shards = [coded.shard(number) for number in range(len(coded.plan.shards))]
    taken = sum(part.nbytes for shard in shards for part in shard.parts(0, shard.num_rows).values())
    assert info["codec_share"] == pytest.approx(taken / sum(view.rows.nbytes for view in exact))
    assert record.share < 0.6
    assert not list((coded.path / "tmp").iterdir())
    size = (coded.path / "teacher" / CODEC_FILE).stat().st_size
    assert 0 <= size - file_bytes(Choice.read(coded.plan.settings.codec), coded.plan.head.hidden_size) < 8192


def test_a_codec_of_few_rows_says_so_and_again_when_its_cache_grows(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, path = spec_of(bench, **CODECS["fisher"]), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr("kdpipe.stages.codec.fit.FIT", 0.005)
        patch.setattr("kdpipe.stages.codec.fit.TUNE", 0.01)
        extract(spec, path, first := Recorder())
    write_chats(more := tmp_path / "more.jsonl", 12, seed=7)
    extract(dataclasses.replace(spec, data=(more,), grow=True), path, second := Recorder())
    for log in (first, second):
        assert sum("rows, which is few: those of samples that are added may" in note for note in log.notes) == 1


def test_again_in_parts_and_after_a_loss_it_is_the_same_bytes(coded: Cache, bench: Bench, tmp_path: Path) -> None:
    name = coded.plan.settings.codec.split()[0]
    spec, path = spec_of(bench, **CODECS[name]), tmp_path / "cache"
    extract(spec, path, Silent(), part=(2, 2))
    first = (path / "teacher" / CODEC_FILE).read_bytes()
    log = Recorder()
    extract(spec, path, log, part=(1, 2))
    assert files(path) == files(coded.path)
    assert first == (path / "teacher" / CODEC_FILE).read_bytes()
    assert not log.values("codec", "kl_mean"), "it was fitted again"
    for number in (0, 2):
        commit_path(path, number).unlink()
    shard_path(path, 0).unlink()
    (path / "teacher" / CODEC_FILE).unlink()
    extract(spec, path, Silent())
    assert files(path) == files(coded.path)


def test_a_damaged_codec_and_a_damaged_shard_are_made_again_after_one_repair(
    coded: Cache, bench: Bench, tmp_path: Path
) -> None:
    path = shutil.copytree(coded.path, tmp_path / "cache")
    for part in (path / "teacher" / CODEC_FILE, shard_path(path, 1)):
        data = bytearray(part.read_bytes())
        data[-9] ^= 1
        part.write_bytes(data)
    assert {finding.part for finding in repair(Cache.open(path))} == {"tokenizer", 1}
    extract(spec_of(bench, **CODECS[coded.plan.settings.codec.split()[0]]), path, Silent())
    assert verified(path, "deep") == [*range(len(coded.plan.shards))]
    assert {**files(coded.path), **files(path)} == files(path)


class Slower(Recorder):
    """At a moment of its extraction another writer of the same plan is done, all but the record of one shard."""

    def __init__(self, moment: str, spec: ExtractSpec, cache: Path) -> None:
        super().__init__()
        self._moment, self._spec, self._cache = moment, spec, cache

    def begin(self, task: str, *, total: int | None, unit: str) -> None:
        super().begin(task, total=total, unit=unit)
        self._now(task)

    def event(self, kind: str, **fields: object) -> None:
        super().event(kind, **fields)
        self._now(kind)

    def _now(self, moment: str) -> None:
        if moment == self._moment and not self._cache.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("kdpipe.stages.codec.fit.FIT", 0.6)
                extract(self._spec, self._cache, Silent())
            commit_path(self._cache, 1).unlink()


@pytest.mark.parametrize("moment", ["prepare", "canary", "codec"])
def test_of_writers_that_begin_at_once_the_first_ones_codec_counts(
    moment: str, coded: Cache, bench: Bench, tmp_path: Path
) -> None:
    spec, path = spec_of(bench, **CODECS[coded.plan.settings.codec.split()[0]]), tmp_path / "cache"
    log = Slower(moment, spec, path)
    found = extract(spec, path, log)
    assert bool(log.values("codec", "kl_mean")) == (moment == "codec"), "one more was fitted"
    assert found.plan.teacher_files[CODEC_FILE] != coded.plan.teacher_files[CODEC_FILE]
    assert verified(path, "deep") == [*range(len(found.plan.shards))]
    assert not (path / QUARANTINE).exists()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cache"]


def test_it_grows_with_the_codec_that_it_has(coded: Cache, bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    shutil.copytree(coded.path, path)
    name = coded.plan.settings.codec.split()[0]
    more = write_chats(tmp_path / "more.jsonl", 12, seed=5)
    grown = extract(spec_of(bench, **CODECS[name], data=(more,), grow=True), path, Silent())
    assert (grown.plan.generation, len(grown)) == (1, len(coded) + 12)
    assert verified(path, "deep") == [*range(len(grown.plan.shards))]
    assert (path / "teacher" / CODEC_FILE).read_bytes() == (coded.path / "teacher" / CODEC_FILE).read_bytes()


def test_recomputed_rows_are_within_what_the_codec_loses(coded: Cache, bench: Bench, main: Main) -> None:
    found = recompute(coded, bench.teacher, 5, Silent())
    assert found.rows_equal == 1.0
    assert 0 < found.worst_distance < found.bound < 1
    assert found.shift == 0.0
    assert found.is_near
    out = main("cache", "verify", coded.path, "--recompute", 5, "--teacher", bench.teacher)[1]
    assert "bit for bit, once the codec has stored them" in out
    assert f"{found.worst_distance:.2g}: mean KL in nats of a sample's rows, as they are stored, from the" in out


@pytest.mark.parametrize("coded", ["fisher"], indirect=True)
def test_rows_that_are_each_off_by_no_more_than_a_sample_may_be_are_found_together(
    coded: Cache, bench: Bench, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of the numbers of every row are a step from where the codec puts them, and every checksum is right."""
    path = shutil.copytree(coded.path, tmp_path / "cache")
    steps = Fisher.steps
    monkeypatch.setattr(
        Fisher, "steps", lambda self, rows: steps(self, rows) + (np.arange(rows.shape[1]) < self.num_packed // 10)
    )
    for number in range(len(coded.plan.shards)):
        for part in (commit_path(path, number), shard_path(path, number)):
            part.unlink()
        fill_shard(path, number, rows=lambda _, index: coded.shard(index).rows(0, coded.plan.shards[index].num_rows))
    monkeypatch.undo()
    assert verified(path, "deep") == [*range(len(coded.plan.shards))]
    found = recompute(Cache.open(path), bench.teacher, 5, Silent())
    assert found.worst_distance < found.bound
    code, out, err = main("cache", "verify", path, "--recompute", 5, "--teacher", bench.teacher, "--json")
    assert (code, json.loads(out)["ok"]) == (3, False)
    assert f"rows are a mean KL of {found.shift:.1e} nats from what the teacher gives now under the same codec" in err


def test_a_codec_that_was_lost_and_does_not_come_out_the_same_is_an_error(
    coded: Cache, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    shutil.copytree(coded.path, path)
    (path / "teacher" / CODEC_FILE).unlink()
    monkeypatch.setattr("kdpipe.stages.codec.fit.FIT", 0.6)
    name = coded.plan.settings.codec.split()[0]
    with pytest.raises(CorruptError, match=r"it is lost, and fitted again it is another.*put it back from a copy"):
        extract(spec_of(bench, **CODECS[name]), path, Silent())
    assert not (path / "teacher" / CODEC_FILE).exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_students_of_raw_and_coded_rows_take_nearly_the_same_steps(
    dtype: Literal["float32", "bfloat16"], coded: Cache, bench: Bench, tmp_path: Path
) -> None:
    steps, ways = [], []
    for number, folder in enumerate((bench.cache, coded.path, coded.path)):
        run = RunSpec(train=TrainSpec(lr=1e-3, batch_tokens=600, dtype=dtype, max_steps=2))
        log = Recorder()
        train(
            Training(student=bench.student, caches=(folder,), output=tmp_path / f"out{number}", spec=run, device="cpu"),
            log,
        )
        loss = [note for note in log.notes if note.startswith(f"{folder}: its rows are coded, a mean KL of ")]
        assert len(loss) == (folder == coded.path)
        steps.append(log.values("step", "loss/mean"))
        ways.append(ways_of(log))
    assert steps[0] != steps[1] == steps[2]
    assert steps[0] == pytest.approx(steps[1], rel=0.05)
    way = "folded" if coded.plan.settings.codec.startswith("fisher") else "decoded"
    assert ways == [["rows"], [way], [way]]


def ways_of(log: Recorder) -> object:
    """How each teacher's rows meet its head in a run."""
    (found,) = (fields["teacher_rows"] for kind, fields in log.events if kind == "start")
    return found


def test_a_method_across_tokenizers_is_given_decoded_rows(coded: Cache, far_bench: Bench, tmp_path: Path) -> None:
    """dskd projects them."""
    log = Recorder()
    run = RunSpec(train=TrainSpec(lr=1e-3, batch_tokens=600, dtype="float32", max_steps=1))
    training = Training(student=far_bench.student, caches=(coded.path,), output=tmp_path, spec=run, device="cpu")
    train(dataclasses.replace(training, data=(far_bench.data,), align="dskd", align_floor=0.5), log)
    assert ways_of(log) == ["decoded"]


def test_a_coarser_codec_than_is_allowed_is_refused_by_name(coded: Cache, bench: Bench, tmp_path: Path) -> None:
    found = open_fitted(coded.path, coded.plan).record.kl_mean
    training = Training(
        student=bench.student,
        caches=(bench.cache, coded.path),
        output=tmp_path / "out",
        spec=RunSpec(),
        device="cpu",
        max_codec_kl=found * 0.9,
    )
    with pytest.raises(CacheError, match=r"its codec '.*' loses a mean KL of .* nats, --max-codec-kl allows") as caught:
        find(training)
    assert caught.value.where == str(coded.path)
    assert "or kdpipe cache convert a raw cache so, into another folder" in str(caught.value)
    find(dataclasses.replace(training, caches=(coded.path,), max_codec_kl=found))
    with pytest.raises(CacheError, match=r"--max-codec-kl allows 0; allow more, or extract raw into another folder"):
        find(dataclasses.replace(training, max_codec_kl=0.0))
    find(dataclasses.replace(training, caches=(bench.cache,), max_codec_kl=0.0))


def test_a_student_of_raw_rows_is_not_taken_for_one_of_coded_rows(coded: Cache, bench: Bench, tmp_path: Path) -> None:
    raw = Training(
        student=bench.student,
        caches=(bench.cache,),
        output=tmp_path / "out",
        spec=RunSpec(train=TrainSpec(max_steps=1, dtype="float32")),
        device="cpu",
    )
    train(raw, Silent())
    assert read_run(raw.output).inputs.codecs == ()  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"it holds the student of another run: its codecs is \[\], this run's is "):
        check_training(dataclasses.replace(raw, caches=(coded.path,)), 1)
    sidecar = deriving.derived(coded.path, tmp_path / "side", "logprob").plan
    whole = deriving.derived(bench.cache, tmp_path / "whole", "logprob").plan
    assert sidecar.fingerprint == whole.fingerprint
    assert stored_as(sidecar).split(" ")[0] == coded.plan.settings.codec.split(" ")[0]
    assert stored_as(whole) == "raw"


def test_a_codec_is_fitted_to_samples_in_no_order_of_the_data(bench: Bench) -> None:
    samples = Cache.open(bench.cache).samples
    whole, some = chosen(samples, 10**9), chosen(samples, 200)
    assert whole != sorted(whole)
    assert sorted(whole) == np.flatnonzero(samples.column("num_rows")).tolist()
    assert some == whole[: len(some)]
    rows = samples.column("num_rows")
    assert rows[some].sum() >= 200 > rows[some[:-1]].sum()


def test_of_a_cache_of_every_row_all_are_what_the_codec_is_fitted_to(bench: Bench, tmp_path: Path) -> None:
    cache = extract(spec_of(bench, codec="int8", rows="all"), tmp_path / "cache", Silent())
    record, num_rows = open_fitted(cache.path, cache.plan).record, cache.samples.column("num_rows")
    wanted = chosen(cache.samples, wanted_rows(cache.plan.head.hidden_size))
    assert record.fit_rows + record.test_rows == num_rows[wanted].sum()


def test_another_bound_is_another_cache(coded: Cache, bench: Bench) -> None:
    with pytest.raises(CacheError, match=r"settings.codec = .*, this command asks for 'fisher kl=0.03'"):
        extract(spec_of(bench, codec="fisher", codec_kl=0.03), coded.path, Silent())


def test_a_plan_with_too_few_rows_for_a_codec_is_refused_before_the_teacher_starts(
    bench: Bench, tmp_path: Path
) -> None:
    few = write_chats(tmp_path / "few.jsonl", 2, longest=3)
    log, spec = Recorder(), spec_of(bench, codec="fisher", data=(few,))
    for ask in (lambda: extract(spec, tmp_path / "cache", log), lambda: forecast(spec, log)):
        with pytest.raises(ConfigError, match="rows are too few to fit it to"):
            ask()
    assert not [note for note in log.notes if note.startswith("starting")]
    assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]
