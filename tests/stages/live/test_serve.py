"""A teacher at work beside its students: what they read from a ring is what a cache holds, bit for bit."""

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import Bench
from tests.opened import teacher_in
from tests.stages.train.test_train import training_for

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import DataError, TeacherError, TemporaryError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.ring import RingReader, RingWriter, make_ring
from kdpipe.manifests.row_source import RingRows
from kdpipe.stages.feed.dataset import Dataset
from kdpipe.stages.live.serve import serve
from kdpipe.stages.live.tee import Tee
from kdpipe.stages.teacher.describe import describe_teacher
from kdpipe.stages.teacher.engine import Ack, Request
from kdpipe.stages.teacher.head import read_head
from kdpipe.stages.teacher.transformers_engine import TransformersEngine
from kdpipe.stages.train import train
from kdpipe.stages.train.training import find

SERVE = """
import sys
from pathlib import Path
from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import TeacherError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.ring import RingEnd, RingWriter
from kdpipe.stages.live.serve import serve
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.teacher.describe import describe_teacher
from kdpipe.stages.teacher.head import read_head
from kdpipe.stages.teacher.transformers_engine import TransformersEngine

teacher, cache = ModelFolder(Path(sys.argv[2]), TeacherError), Cache.open(Path(sys.argv[3]))
with RingWriter(RingEnd.of(sys.argv[1])) as ring:
    engine = TransformersEngine(teacher, dtype=cache.plan.settings.dtype, device="cpu")
    serve(engine, read_head(describe_teacher(teacher)), cache.samples, [ring], Silent())
"""


@contextmanager
def serving(
    bench: Bench, num_readers: int, num_bytes: int = 1 << 16, tee: Cache | None = None
) -> Iterator[list[RingReader]]:
    """Readers of a teacher in a thread of this process; its error is raised at the end. tee: a cache to fill"""
    ends = [make_ring(num_bytes) for _ in range(num_readers)]
    cache, folder, failed = Cache.open(bench.cache), teacher_in(bench.teacher), list[BaseException]()

    def run() -> None:
        rings = [RingWriter(ours, patience_s=20) for ours, _ in ends]
        try:
            engine = TransformersEngine(folder, dtype=cache.plan.settings.dtype, device="cpu")
            with ExitStack() as stack:
                kept = None if tee is None else stack.enter_context(Tee(tee, Silent()))
                serve(engine, read_head(describe_teacher(folder)), cache.samples, rings, Silent(), kept)
        except BaseException as err:
            failed.append(err)
            for ring in rings:
                ring.fail(err)
        finally:
            for ring in rings:
                ring.close()

    thread = threading.Thread(target=run)
    thread.start()
    readers = [RingReader(theirs, patience_s=20) for _, theirs in ends]
    try:
        yield readers
    finally:
        for reader in readers:
            reader.close()
        thread.join(30)
        assert not thread.is_alive()
    if failed:
        raise failed[0]


def rows_of(reader: RingReader, cache: Cache) -> RingRows:
    return RingRows(reader, width=cache.plan.head.hidden_size, dtype=cache.stored_rows(0).dtype)


def test_rows_come_as_they_were_asked_for_and_are_those_of_the_cache(bench: Bench) -> None:
    cache = Cache.open(bench.cache)
    order = np.random.default_rng(0).permutation(len(cache))[:12]
    with serving(bench, 2) as readers:
        sources = [rows_of(reader, cache) for reader in readers]
        for source, samples in zip(sources, (order[:6], order[6:]), strict=True):
            source.want(samples)
        for one, other in zip(order[:6].tolist(), order[6:].tolist(), strict=True):
            for source, sample in zip(sources, (one, other), strict=True):
                assert source.rows(sample).tobytes() == cache.stored_rows(sample).tobytes()
                source.done(np.array([sample]))
        for reader in readers:
            reader.finish()
        assert [reader.take("the end") for reader in readers] == [None, None]


def test_what_is_wanted_out_of_turn_is_had_whatever_was_asked_before(bench: Bench) -> None:
    """An evaluation between two steps whose rows were asked for already, in a ring that holds few samples."""
    cache = Cache.open(bench.cache)
    largest = max(cache.stored_rows(index).nbytes for index in range(len(cache)))
    with serving(bench, 1, num_bytes=largest) as (reader,):
        source = rows_of(reader, cache)
        source.want(np.arange(10))
        for sample in (15, 3, 3, 16, *range(10)):
            assert source.rows(sample).tobytes() == cache.stored_rows(sample).tobytes()
            source.done(np.array([sample]))
        reader.finish()
        assert reader.take("the end") is None


def test_a_reader_that_goes_or_fails_ends_the_teacher_with_its_error(bench: Bench) -> None:
    with pytest.raises(TemporaryError, match=r"the student.* is gone without a word"), serving(bench, 1) as (reader,):
        reader.ask(np.arange(3))
    with pytest.raises(DataError, match="seven is not a list"), serving(bench, 2) as readers:
        readers[1].fail(DataError("seven is not a list"))


def test_the_teachers_error_reaches_every_reader(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdpipe.stages.live.serve.check_identity", refuse)
    with pytest.raises(TeacherError, match="no row"), serving(bench, 2) as readers:
        ask_in_vain(readers)


def ask_in_vain(readers: list[RingReader]) -> None:
    readers[0].ask(np.arange(3))
    for reader in readers:
        with pytest.raises(TeacherError, match="no row"):
            reader.take("it")


def refuse(*_: object) -> None:
    raise TeacherError("no row is good enough")


def test_what_passes_by_becomes_the_cache_and_is_not_asked_of_the_teacher_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bench.cache, tmp_path / "cache")
    for name in ("shards", "commits"):
        shutil.rmtree(tmp_path / "cache" / name)
        (tmp_path / "cache" / name).mkdir()
    whole, cache = Cache.open(bench.cache), Cache.open(tmp_path / "cache")
    asked: list[int] = []
    run = TransformersEngine.run

    def counting(engine: TransformersEngine, batches: Iterable[Sequence[Request]]) -> Iterator[Ack]:
        for ack in run(engine, batches):
            asked.append(ack.sample)
            yield ack

    monkeypatch.setattr(TransformersEngine, "run", counting)
    with serving(bench, 1, tee=cache) as (reader,):
        source = rows_of(reader, whole)
        order = np.random.default_rng(0).permutation(len(whole))
        for sample in (*order[:5].tolist(), *order.tolist(), *order[:3].tolist()):
            assert source.rows(sample).tobytes() == whole.stored_rows(sample).tobytes()
            source.done(np.array([sample]))
        reader.finish()
        assert reader.take("the end") is None
    assert sorted(asked) == list(range(len(whole))), "each once"
    assert cache.complete
    for path in sorted((bench.cache / "shards").iterdir()):
        assert path.read_bytes() == (tmp_path / "cache" / "shards" / path.name).read_bytes()
    assert not list((tmp_path / "cache" / "claims").iterdir())
    assert not list((tmp_path / "cache" / "tmp").iterdir())


def test_a_student_of_a_ring_is_the_student_of_a_cache_bit_for_bit(bench: Bench, tmp_path: Path) -> None:
    results = []
    for name in ("cache", "ring"):
        training = training_for(bench, tmp_path / name, max_steps=None, epochs=2, eval_every=2)
        found = find(training)
        if name == "cache":
            results.append(train(training, Silent(), found))
            continue
        ours, theirs = make_ring(1 << 16)
        command = [sys.executable, "-c", SERVE, str(ours), str(bench.teacher), str(bench.cache)]
        teacher = subprocess.Popen(command, pass_fds=ours.fds)
        ours.close()
        with RingReader(theirs, patience_s=120) as ring:
            rows = rows_of(ring, Cache.open(bench.cache))
            dataset = Dataset(found.dataset.tables, [replace(found.dataset.teachers[0], rows=rows)])
            results.append(train(training, Silent(), replace(found, dataset=dataset)))
            ring.finish()
            assert ring.take("the end") is None
        assert teacher.wait(20) == 0
    assert results[0] == results[1]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("cache", "ring")]
    assert weights[0] == weights[1]
