"""Progress: one line on a terminal, few lines elsewhere, every event in a file."""

import io
import json
import os
from pathlib import Path

import pytest

from kdpipe.manifests.errors import CacheError
from kdpipe.manifests.progress import Progress
from kdpipe.pipeline.endings import Terminated
from kdpipe.pipeline.progress import ConsoleProgress, EventLog, watch
from kdpipe.pipeline.streams import lasting_streams


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def work(progress: Progress, clock: Clock, *, seconds: int = 30, total: int | None = 3000) -> None:
    progress.begin("extract", total=total, unit="tokens")
    for _ in range(seconds):
        clock.now += 1
        progress.advance(100, "loss 2.31")
    progress.end()


def test_elsewhere_there_is_a_line_at_the_begin_every_ten_seconds_and_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    work(ConsoleProgress(EventLog(None), stream=stream, clock=clock), clock)
    assert stream.getvalue().splitlines() == [
        "extract: 0% 0/3,000 tokens",
        "extract: loss 2.31, 100 tokens/s, 0:20 left, 33% 1,000/3,000 tokens",
        "extract: loss 2.31, 100 tokens/s, 0:10 left, 67% 2,000/3,000 tokens",
        "extract: loss 2.31, 100 tokens/s, 100% 3,000/3,000 tokens",
        "extract: 3,000 tokens in 0:30, 100 tokens/s, loss 2.31",
    ]


def test_a_total_nobody_knows_shows_no_share_and_no_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    work(ConsoleProgress(EventLog(None), stream=stream, clock=clock), clock, seconds=10, total=None)
    assert stream.getvalue().splitlines()[1] == "extract: loss 2.31, 100 tokens/s, 1,000 tokens"


def test_on_a_terminal_one_line_is_rewritten_and_never_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    stream, clock = Terminal(), Clock()
    work(ConsoleProgress(EventLog(None), stream=stream, clock=clock), clock, seconds=5)
    *drawn, last = stream.getvalue().split("\r")[1:]
    assert [text.count("\n") for text in (*drawn, last)] == [0] * 6 + [1]
    assert all(len(text.removesuffix("\x1b[K")) <= 39 for text in drawn)
    assert drawn[3].removesuffix("\x1b[K") == "extract: loss 2.31, 100 tokens/s"


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (140, "train: step 31/100 loss 2.3145, 254 tokens/s, 0:05 left, 31% 549/1,771 tokens [######              ]"),
        (90, "train: step 31/100 loss 2.3145, 254 tokens/s, 0:05 left, 31% 549/1,771 tokens [###       ]"),
        (80, "train: step 31/100 loss 2.3145, 254 tokens/s, 0:05 left, 31% 549/1,771 tokens"),
        (60, "train: step 31/100 loss 2.3145, 254 tokens/s, 0:05 left"),
        (50, "train: step 31/100 loss 2.3145, 254 tokens/s"),
        (40, "train: step 31/100 loss 2.3145, 254/s"),
        (33, "step 31/100 loss 2.3145, 254/s"),
        (20, "step 31/100 loss 2.3"),
    ],
)
def test_step_and_loss_are_seen_before_all_else(columns: int, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns + 1))
    stream, clock = Terminal(), Clock()
    progress = ConsoleProgress(EventLog(None), stream=stream, clock=clock)
    progress.begin("train", total=1771, unit="tokens")
    clock.now += 2.1614
    progress.advance(549, "step 31/100 loss 2.3145")
    assert stream.getvalue().split("\r")[-1].removesuffix("\x1b[K") == shown


def test_work_found_finished_at_a_resume_does_not_flatter_the_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = ConsoleProgress(EventLog(None), stream=stream, clock=clock)
    progress.begin("extract", total=1_000_000, unit="tokens")
    clock.now += 0.2
    progress.advance(900_000)
    for _ in range(60):
        clock.now += 1
        progress.advance(100)
    assert "100 tokens/s, 15:40 left" in stream.getvalue().splitlines()[-1]


@pytest.mark.parametrize(("seconds", "shown"), [(59, "0:59"), (60, "1:00"), (3600, "1:00:00"), (3725, "1:02:05")])
def test_hours_are_shown_where_there_are_some(seconds: int, shown: str) -> None:
    stream, clock = io.StringIO(), Clock()
    work(ConsoleProgress(EventLog(None), stream=stream, clock=clock), clock, seconds=seconds)
    assert f" tokens in {shown}, 100 tokens/s" in stream.getvalue().splitlines()[-1]


def test_every_event_is_a_line_with_time_and_kind(tmp_path: Path) -> None:
    path, clock = tmp_path / "runs" / "events.jsonl", Clock()
    progress = ConsoleProgress(EventLog(path), stream=io.StringIO(), clock=clock)
    progress.event("shard", number=3, loss=float("nan"))
    assert read(path)[0]["kind"] == "shard", "flushed as it happens"
    progress.note("the GPU has no bfloat16")
    work(progress, clock)
    events = read(path)
    assert [event["kind"] for event in events] == ["shard", "note", "begin", "progress", "progress", "progress", "end"]
    assert all(isinstance(event["time"], float) for event in events)
    assert events[0] | {"time": 0} == {"time": 0, "kind": "shard", "number": 3, "loss": None}
    assert events[3]["done"] == 1000
    assert events[3]["rate"] == 100


def test_events_wait_for_the_folder_and_a_refused_run_leaves_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(CacheError), watch("extract", EventLog(cache / "runs" / "1.jsonl", after=cache)):
        raise CacheError("it belongs to another teacher")
    assert list(tmp_path.iterdir()) == []
    with watch("extract", EventLog(cache / "runs" / "1.jsonl", after=cache)) as progress:
        progress.event("early")
        cache.mkdir()
        progress.event("late")
    kinds = [event["kind"] for event in read(cache / "runs" / "1.jsonl")]
    assert kinds == ["run", "early", "late", "finished"]


def test_events_wait_for_the_kind_that_says_the_run_was_accepted(tmp_path: Path) -> None:
    with pytest.raises(CacheError), watch("extract", EventLog(tmp_path / "1.jsonl", after=tmp_path, once="plan")):
        raise CacheError("it belongs to another teacher")
    assert list(tmp_path.iterdir()) == []
    with watch("extract", EventLog(tmp_path / "1.jsonl", after=tmp_path, once="plan")) as progress:
        progress.event("early")
        assert list(tmp_path.iterdir()) == []
        progress.event("plan")
    assert [event["kind"] for event in read(tmp_path / "1.jsonl")] == ["run", "early", "plan", "finished"]


def test_the_error_that_ended_a_run_is_its_last_event(tmp_path: Path) -> None:
    with pytest.raises(CacheError), watch("extract", EventLog(tmp_path / "events.jsonl")):
        raise CacheError("it belongs to another teacher", where="c")
    last = read(tmp_path / "events.jsonl")[-1]
    assert (last["kind"], last["exit_code"]) == ("failed", 4)
    assert last["error"] == "E-CACHE c: it belongs to another teacher"


@pytest.mark.parametrize(
    ("raised", "kind", "exit_code", "error"),
    [
        (KeyboardInterrupt(), "interrupted", 130, "E-INTERRUPTED c: stopped by SIGINT; 3 shards are kept; run"),
        (Terminated("SIGTERM"), "terminated", 75, "E-TEMPORARY c: stopped by SIGTERM; 3 shards are kept; run"),
        (ZeroDivisionError("secret text"), "crashed", 70, "ZeroDivisionError"),
    ],
)
def test_however_a_run_ends_its_last_event_says_so(
    tmp_path: Path, raised: BaseException, kind: str, exit_code: int, error: str
) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    with pytest.raises(BaseException) as caught, watch("train", log, where="c", kept=lambda: "3 shards are kept"):
        raise raised
    assert caught.value is raised or str(caught.value).startswith(error)
    last = read(tmp_path / "events.jsonl")[-1]
    assert (last["kind"], last["exit_code"]) == (kind, exit_code)
    assert str(last["error"]).startswith(error)
    assert "secret" not in str(last), "no text that a bug may have got from the data"


def test_a_log_that_cannot_be_written_is_said_once_and_ends_nothing() -> None:
    stream, clock = io.StringIO(), Clock()
    work(ConsoleProgress(EventLog(Path("/dev/full")), stream=stream, clock=clock), clock)
    lines = stream.getvalue().splitlines()
    said = "/dev/full cannot be written (no space left on device): the work goes on without it"
    assert lines.count(said) == 1
    assert lines[-1] == "extract: 3,000 tokens in 0:30, 100 tokens/s, loss 2.31"


def test_a_log_goes_on_where_there_is_room_again_on_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    path.write_text("in the way")
    log = EventLog(path / "events.jsonl")
    log.write("lost", {})
    path.unlink()
    path.mkdir()
    (path / "events.jsonl").write_text('{"torn')
    log.write("kept", {})
    torn, kept = (path / "events.jsonl").read_text().splitlines()
    assert (torn, json.loads(kept)["kind"]) == ('{"torn', "kept")


def test_progress_that_nobody_can_see_is_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kdpipe.pipeline.streams.DESCRIPTORS", {"stdout": 1, "stderr": os.open("/dev/full", os.O_WRONLY)}
    )
    with lasting_streams() as lost:
        work(ConsoleProgress(EventLog(tmp_path / "events.jsonl")), Clock())
        assert lost("stderr") is not None
    notes = [event["text"] for event in read(tmp_path / "events.jsonl") if event["kind"] == "note"]
    assert notes == ["stderr cannot be written (no space left on device): the work goes on without it"]
