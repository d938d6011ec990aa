"""Preparing data in several processes: the same samples, incidents and errors, in the same order, as in one."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.stages.extracting import files, small_spec

from kdpipe.manifests.errors import DataError, TemporaryError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.sample import Incident
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.extract.staging import staged
from kdpipe.stages.prepare import pool, prepare
from kdpipe.stages.prepare import samples as samples_module
from kdpipe.stages.prepare.sources import RawRecord
from kdpipe.stages.prepare.work import Preparing

NUM_RECORDS = 90


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "BATCH_RECORDS", 4)


def record(index: int) -> dict[str, Any]:
    """All that may become of one: a sample, a cut one, an empty one, a bad one; some with a column nobody reads."""
    kinds = [
        {"prompt": f"question {index}", "completion": "answer " * (index % 7 + 1)},
        {"prompt": "q", "completion": "word " * 200},
        {"prompt": "q", "completion": ""},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": f"q {index}"}, {"role": "assistant", "content": "a"}], "id": index},
    ]
    return kinds[index % len(kinds) if index % 3 else 0]


@pytest.fixture
def data(tmp_path: Path) -> list[Path]:
    """A file of each kind; blank lines and a line that is not JSON between."""
    lines = [json.dumps(record(index)) for index in range(NUM_RECORDS)]
    lines[10:10] = ["", "  ", "{not json"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([record(index) for index in range(30)]))
    pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(20)], "completion": ["a"] * 20}), tmp_path / "c.parquet")
    return [tmp_path / name for name in ("a.jsonl", "b.json", "c.parquet")]


def told(paths: list[Path], tokenizer: Any, workers: int | None, **spec: Any) -> list[object]:
    """All that preparing says, in order: samples, incidents, notes, counts, and how it ends."""
    said: list[object] = []

    def incident(found: Incident) -> None:
        said.append(found)

    unread: Counter[str] = Counter()
    chosen = DataSpec(max_length=100, **spec)
    try:
        for sample in prepare(
            paths, tokenizer, chosen, on_incident=incident, on_note=said.append, unread=unread, workers=workers
        ):
            said.append((sample.content_id, sample.source, sample.line, sample.token_ids.tobytes(), sample.truncated))
            said.append(sample.supervised.tobytes())
    except DataError as err:
        said.append(str(err))
    return [*said, unread]


def children() -> set[int]:
    """Processes of ours that run workers."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            words = (status.parent / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if "kdpipe.stages.prepare.worker" in words and int(fields[1]) == os.getpid() and fields[0] != "Z":
            found.add(int(status.parent.name))
    return found


def test_any_number_of_processes_says_the_same_in_the_same_order(data: list[Path], chatml: Any) -> None:
    alone = told(data, chatml, 1, bad_records="skip", max_bad=1.0)
    assert len(alone) > 200
    assert told(data, chatml, 3, bad_records="skip", max_bad=1.0) == alone
    assert children() == set()


def test_errors_come_in_the_order_of_the_records(data: list[Path], chatml: Any, tmp_path: Path) -> None:
    """A bad record far on, then a file that ends in the middle of a line: what is before them comes first."""
    good = [json.dumps({"prompt": f"q{index}", "completion": "a"}) for index in range(50)]
    (tmp_path / "bad.jsonl").write_text("\n".join([*good, json.dumps({"prompt": 3}), *good]) + "\n")
    (tmp_path / "cut.jsonl").write_text("\n".join([*good, '{"prompt": "q']))
    (tmp_path / "cut.json").write_text("[" + ",\n".join([*good, '{"prompt": ']))
    places = {"bad.jsonl": "bad.jsonl:51: ", "cut.jsonl": "cut.jsonl:51: ", "cut.json": "cut.json:51: "}
    for name, place in places.items():
        paths = [tmp_path / "c.parquet", tmp_path / name]
        alone = told(paths, chatml, 1)
        assert place in str(alone[-2])
        assert sum(isinstance(each, tuple) for each in alone) == 20 + len(good)
        if name != "cut.jsonl":  # found by the work; that of cut.json while reading
            assert told(paths, chatml, 2) == alone
    assert children() == set()


def test_a_plan_and_what_is_said_of_its_data_have_the_same_bytes(tmp_path: Path) -> None:
    spec = replace(small_spec(tmp_path), data_spec=DataSpec(max_length=40))
    made = []
    for workers in (1, 2):
        with staged(replace(spec, prepare_workers=workers), tmp_path / f"cache{workers}", Silent()) as found:
            assert found.folder is not None
            made.append(files(found.folder) | {"log": (found.folder / "runs" / "prepare.jsonl").read_bytes()})
    assert made[0].keys() >= {"PLAN.json", "samples.arrow", "shards.arrow"}
    assert made[0]["log"]
    assert made[0] == made[1]


def batches(num: int, taken: list[int], long_from: int = 10_000) -> Iterator[list[RawRecord]]:
    """Batches of two records, lines of 4 MiB from one of them on."""
    line = b'{"prompt": "q", "completion": "a"}'
    for number in range(num):
        taken.append(number)
        raw = line.ljust(4 << 20) if number >= long_from else line
        yield [RawRecord(source="f", line=n, place=f"f:{number}", raw=raw + b"\n") for n in range(2)]


def test_no_more_than_a_few_batches_are_on_their_way(chatml: Any) -> None:
    taken: list[int] = []
    results = pool.in_processes(2, batches(30, taken), (Preparing, chatml, DataSpec(), ()))
    for number, result in enumerate(results):
        assert len(result.outcomes) == 2
        assert len(taken) <= number + 2 * pool.IN_FLIGHT + 1
    assert number == 29


def test_a_process_that_dies_is_one_line_that_names_the_place_and_the_others_end(chatml: Any) -> None:
    results = pool.in_processes(2, batches(10_000, []), (Preparing, chatml, DataSpec(), ()))
    next(results)
    first = min(children())
    os.kill(first, signal.SIGKILL)
    with pytest.raises(TemporaryError, match=r"f:\d+: a process that .* was killed by SIGKILL; out of memory\?"):
        list(results)
    assert children() == set()


@pytest.mark.parametrize(
    ("long_from", "start_s"),
    [pytest.param(4, 10.0, marks=pytest.mark.slow, id="sending"), pytest.param(10_000, 600.0, id="receiving")],
)
def test_a_process_that_stands_still_is_not_waited_for_without_end(
    long_from: int, start_s: float, chatml: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fifth batch, which is sent when the third result is taken, may be more than a link holds."""
    monkeypatch.setattr(pool, "SILENCE_S", start_s)
    results = pool.in_processes(1, batches(10_000, [], long_from=long_from), (Preparing, chatml, DataSpec(), ()))
    for _ in range(3):
        next(results)
    monkeypatch.setattr(pool, "SILENCE_S", 0.2)
    for number in children():
        os.kill(number, signal.SIGSTOP)
    with pytest.raises(TemporaryError, match=r"f:\d+: a process that .* takes and gives nothing any more"):
        list(results)
    assert children() == set()


def test_an_exception_in_a_process_is_raised_here_and_says_where_it_was(chatml: Any) -> None:
    broken = [RawRecord(source="f", line=1, place="f:1", fields=None)]  # type: ignore[arg-type]
    with pytest.raises(AttributeError) as caught:
        list(pool.in_processes(1, [broken], (Preparing, chatml, DataSpec(), ())))
    assert "read_form" in caught.value.__notes__[0]
    assert children() == set()


def test_a_process_that_cannot_start_says_its_last_word(
    chatml: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho the loader >&2\necho cannot load it >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(TemporaryError, match=r"ended with exit code 3 \(cannot load it\); out of memory"):
        list(pool.in_processes(2, batches(3, []), (Preparing, chatml, DataSpec(), ())))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    with pytest.raises(TemporaryError, match="no process can be started to prepare data: No such file"):
        list(pool.in_processes(2, batches(3, []), (Preparing, chatml, DataSpec(), ())))


def test_closing_early_ends_the_processes(data: list[Path], chatml: Any) -> None:
    spec = DataSpec(bad_records="skip", max_bad=1.0)
    with closing(prepare(data, chatml, spec, on_incident=lambda found: None, workers=2)) as samples:
        next(samples)
        assert len(children()) == 2
    assert children() == set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_one_that_started_them(number: int, chatml: Any, tmp_path: Path) -> None:
    """Killed, it cannot end them: they see that their link has ended. Ctrl-C goes to all of a terminal's programs."""
    code = """
import itertools, pickle, sys
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.prepare import pool
from kdpipe.stages.prepare.sources import RawRecord
from kdpipe.stages.prepare.work import Preparing
record = RawRecord(source="f", line=1, place="f:1", raw=b'{"prompt": "q", "completion": "a"}')
with open(sys.argv[1], "rb") as file: tokenizer = pickle.load(file)
results = pool.in_processes(1, itertools.repeat([record]), (Preparing, tokenizer, DataSpec(), ()))
next(results)
print("at work", flush=True)
for _ in results: pass
"""
    (tmp_path / "tokenizer").write_bytes(pickle.dumps(chatml))
    parent = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "tokenizer"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert parent.stdout is not None
    assert parent.stderr is not None
    assert parent.stdout.readline() == b"at work\n"
    task = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(task) == 1
    os.killpg(parent.pid, number)
    assert parent.wait(30) == -number
    assert parent.stderr.read().count(b"Traceback") == (number == signal.SIGINT), "the workers' are not seen"
    ended = time.monotonic() + 20
    while any(Path(f"/proc/{each}").exists() for each in task):
        assert time.monotonic() < ended, "a worker outlives its pool"
        time.sleep(0.02)


def test_as_many_processes_as_data_and_cores_are_worth(
    chatml: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    found = []
    for size in (1, 2, 5, 100):
        with open(tmp_path / f"{size}.jsonl", "wb") as file:
            file.truncate(size * pool.WORKER_BYTES)
        found.append(pool.num_processes(None, [tmp_path / f"{size}.jsonl"], chatml))
    assert found == [1, 2, 5, 8]
    assert [pool.num_processes(asked, [], chatml) for asked in (0, 1, 3)] == [1, 1, 3]
    own = type("Own", (type(chatml),), {"__module__": "modeling_own"})
    chatml.__class__ = own
    assert pool.num_processes(5, [tmp_path / "100.jsonl"], chatml) == 1
