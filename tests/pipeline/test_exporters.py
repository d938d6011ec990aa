"""Exporters: TensorBoard and Weights & Biases read what a run has written for them; one that fails ends nothing."""

import glob
import importlib.util
import json
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Bench, Main

from kdpipe.pipeline import exporters
from kdpipe.pipeline.exporters import Exporters, TensorBoard, figures
from kdpipe.pipeline.progress import ConsoleProgress, EventLog

TRAIN = ("--set", "train.max_steps=3", "train.batch_tokens=256", "train.dtype=float32", "train.eval_every=2")


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard itself reads: name -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    all_of = {name: {each.step: each.value for each in found.Scalars(name)} for name in found.Tags()["scalars"]}
    assert all(len(found.Scalars(name)) == len(steps) for name, steps in all_of.items()), "a step is there twice"
    return all_of


def logged(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: after 7 bytes LevelDB's log, blocks of pieces with checksum, length, kind."""
    block, at, record = 1 << 15, 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


class Failing:
    """Of a library that gives up after some events."""

    def __init__(self, output: Path) -> None:
        self.left = 2

    def take(self, event: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("no way\nto the server")

    def close(self) -> None:
        raise OSError("closed already")


def test_figures_are_the_numbers_of_steps_and_evaluations() -> None:
    step = {"kind": "step", "time": 1.0, "step": 3, "loss/mean": 2.5, "lr": None, "dtype": "float32", "ok": True}
    assert figures(step) == {"train/loss/mean": 2.5}
    assert figures(step | {"kind": "eval"}) == {"eval/loss/mean": 2.5}
    assert figures(step | {"kind": "checkpoint"}) == {}


def test_tensorboard_has_the_figures_of_a_run_and_the_run_is_the_same(bench: Bench, main: Main, tmp_path: Path) -> None:
    words = ("train", "--student", bench.student, "--cache", bench.cache)
    assert main(*words, "--output", tmp_path / "plain", *TRAIN)[0] == 0
    assert main(*words, "--output", tmp_path / "a", *TRAIN, 'train.loggers=["tensorboard"]')[0] == 0
    found, told = scalars(tmp_path / "a" / "tensorboard"), events(tmp_path / "a" / "events.jsonl")
    for name, kind, key in (("train/loss/mean", "step", "loss/mean"), ("eval/heldout_kl", "eval", "heldout_kl")):
        wanted = {event["step"]: event[key] for event in told if event["kind"] == kind}
        assert found[name] == pytest.approx(wanted, rel=1e-6)  # it keeps float32
    plain, logged = (json.loads((tmp_path / name / "kdpipe.json").read_text()) for name in ("plain", "a"))
    assert plain["inputs"] == logged["inputs"]
    assert plain["files"] == logged["files"]
    code, out, _ = main(*words, "--output", tmp_path / "a", *TRAIN, "--json")
    assert (code, json.loads(out)["num_steps"]) == (0, 3), "without a logger it is the same run, finished already"


def test_steps_made_again_after_a_resume_replace_those_before(tmp_path: Path) -> None:
    for first, loss in ((1, 1.0), (3, 9.0)):
        log = EventLog(tmp_path / "events.jsonl", exporters=Exporters(["tensorboard"], tmp_path))
        log.write("start", {"first_step": first})
        for step in range(first, 7 - first):
            log.write("step", {"step": step, "loss/mean": loss})
        log.end()
    assert scalars(tmp_path / "tensorboard")["train/loss/mean"] == {1: 1.0, 2: 1.0, 3: 9.0}, "5 was not made again"


def test_one_that_fails_is_said_once_and_the_events_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(exporters.EXPORTERS, "wandb", Failing)  # type: ignore[arg-type]
    log = EventLog(tmp_path / "events.jsonl", exporters=Exporters(["wandb", "tensorboard"], tmp_path))
    progress = ConsoleProgress(log)
    for step in range(6):
        progress.event("step", step=step, loss=1.0)
    progress.close()
    told = events(tmp_path / "events.jsonl")
    assert [event["step"] for event in told if event["kind"] == "step"] == list(range(6))
    (note,) = [event["text"] for event in told if event["kind"] == "note"]
    assert note == "wandb: no way to the server; the run goes on without it, its events are in events.jsonl"
    assert capsys.readouterr().err == note + "\n"
    assert len(scalars(tmp_path / "tensorboard")["train/loss"]) == 6


def test_a_refused_run_begins_nothing_elsewhere(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", once="accepted", exporters=Exporters(["tensorboard"], tmp_path))
    log.write("step", {"step": 1, "loss": 1.0})
    log.end()
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_not_installed_is_said_before_the_run(
    bench: Bench, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    words = ("train", "--student", bench.student, "--cache", bench.cache, "--output", tmp_path / "a")
    code, _, err = main(*words, "--set", "train.loggers=wandb")
    assert (code, err.count("\n")) == (4, 1)
    assert err.startswith("E-CONFIG train.loggers: wandb is not installed: pip install 'kdpipe[wandb]'")
    assert not (tmp_path / "a").exists()


def test_an_unknown_one_is_refused_with_those_there_are(bench: Bench, main: Main, tmp_path: Path) -> None:
    words = ("train", "--student", bench.student, "--cache", bench.cache, "--output", tmp_path / "a")
    code, _, err = main(*words, "--set", "train.loggers=tensorbord")
    assert (code, err.count("\n")) == (4, 1)
    assert "did you mean 'tensorboard'?" in err


def test_weights_and_biases_offline_is_one_run_with_all_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    log = EventLog(tmp_path / "events.jsonl", exporters=Exporters(["wandb"], tmp_path))
    progress = ConsoleProgress(log)
    progress.event("accepted", inputs={"spec": {"train": {"lr": 0.5}}})
    progress.event("start", first_step=1)
    progress.event("eval", step=0, heldout_kl=2.0)
    for step in range(1, 4):
        progress.event("step", step=step, **{"loss/mean": 1.0 / step})
    progress.close()
    assert [event["kind"] for event in events(tmp_path / "events.jsonl")] == [
        "accepted",
        "start",
        "eval",
        *["step"] * 3,
    ]
    (path,) = glob.glob(str(tmp_path / "wandb" / "offline-run-*" / "run-*.wandb"))
    history = []
    for data in logged(Path(path).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {"/".join([*item.nested_key] or [item.key]): item.value_json for item in record.history.item}
            history.append({key: json.loads(text) for key, text in items.items() if not key.startswith("_")})
    assert history == [
        {"step": 0, "eval/heldout_kl": 2.0},
        *({"step": step, "train/loss/mean": 1.0 / step} for step in range(1, 4)),
    ]


def test_tensorboard_without_its_package_is_a_problem_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.ModuleType("torch.utils.tensorboard"))
    assert TensorBoard is exporters.EXPORTERS["tensorboard"]
    (problem,) = Exporters(["tensorboard"], tmp_path).problems
    assert problem.startswith("tensorboard: cannot import name 'SummaryWriter'")
