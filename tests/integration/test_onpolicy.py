"""kdpipe onpolicy as a user runs it: the student's own answers, scored by a teacher in a process of its own."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Bench, Main
from tests.integration.running import SETS, ended, started, steps_of, wait_for

from kdpipe.manifests.cache import Cache


def asked(bench: Bench, output: Path, *more: object) -> list[object]:
    data = ["--prompts", bench.data, "--max-length", 128, "--heldout-fraction", 0.25]
    models = ["--teacher", bench.teacher, "--student", bench.student]
    return ["onpolicy", *models, *data, "--output", output, "--max-new-tokens", 12, "--set", *SETS, "--json", *more]


def events(output: Path, kind: str) -> list[dict[str, Any]]:
    lines = (output / "events.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_without_answers_of_its_own_the_student_is_that_of_a_cache(
    bench: Bench,
    offline: bytes,
    tmp_path: Path,
) -> None:
    code, _, err = ended(started(*asked(bench, tmp_path / "out", "--lmbda", 0, "--tee", tmp_path / "kept")))
    assert code == 0, err
    assert "no answer of its own" in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == offline


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_its_own_answers(bench: Bench, tmp_path: Path) -> None:
    words = asked(bench, tmp_path / "out", "--lmbda", 1, "--beta", 1)
    words[words.index("--student") + 1] = bench.teacher
    code, out, err = ended(started(*words))
    assert code == 0, err
    steps = events(tmp_path / "out", "step")
    assert len(steps) > 2
    (begun,) = [event for event in events(tmp_path / "out", "begin") if event["task"] == "train"]
    assert (begun["unit"], begun["total"]) == ("steps", len(steps)), "the time left is known without the tokens"
    assert max(abs(step["loss/mean"]) for step in steps) < 1e-6
    assert json.loads(out)["rollout_reverse_kl"] == pytest.approx(0.0, abs=1e-5)
    assert all(step["rollout/num_answers"] > 0 for step in steps)


def test_answers_are_kept_as_a_cache_from_which_a_second_student_trains(
    bench: Bench, main: Main, tmp_path: Path
) -> None:
    words = asked(bench, tmp_path / "out", "--lmbda", 0.6, "--tee", tmp_path / "kept")
    code, _, err = ended(started(*words))
    assert code == 0, err
    cache = Cache.open(tmp_path / "kept")
    written = [json.loads(line) for line in (tmp_path / "out" / "rollouts-00000.jsonl").read_text().splitlines()]
    assert len(cache) == len(written)
    for view, each in zip(cache, sorted(written, key=lambda each: each["index"]), strict=True):
        assert view.token_ids[view.supervised].tolist() == each["token_ids"]
        assert len(view.rows) == len(each["token_ids"])
    assert main("cache", "verify", tmp_path / "kept", "--recompute", 5, "--teacher", bench.teacher)[0] == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["kept", "out"]
    second = ["--student", bench.student, "--cache", tmp_path / "kept", "--output", tmp_path / "second"]
    code, _, err = main("train", *second, "--nproc", 1, "--set", *SETS)
    assert code == 0, err
    code, _, err = main(*words)
    assert code == 0, err
    assert "already" in err


@pytest.mark.parametrize("killed", [(4,), pytest.param((2, 6), marks=pytest.mark.slow)], ids=len)
def test_killed_at_any_moment_it_goes_on_to_the_same_weights(
    killed: tuple[int, ...], bench: Bench, tmp_path: Path
) -> None:
    """Two steps ahead, the answers kept: every file of the run counts."""
    more = ["--lmbda", 0.7, "--overlap", 2]
    weights, logs, rows = [], [], []
    for name, kills in (("whole", ()), ("killed", killed)):
        output, kept = tmp_path / name, tmp_path / f"kept-{name}"
        for step in kills:
            process = started(*asked(bench, output, *more, "--tee", kept))
            wait_for(lambda: steps_of(output) >= step or process.poll() is not None)  # noqa: B023
            process.kill()
            code, _, err = ended(process)
            assert code == -signal.SIGKILL, err
        code, _, err = ended(started(*asked(bench, output, *more, "--tee", kept)))
        assert code == 0, err
        weights.append((output / "model.safetensors").read_bytes())
        logs.append((output / "rollouts-00000.jsonl").read_bytes())
        rows.append([path.read_bytes() for path in sorted((kept / "shards").iterdir())])
    assert weights[0] == weights[1]
    assert logs[0] == logs[1]
    assert rows[0] == rows[1]


def own_teacher(bench: Bench, output: Path, *more: object) -> list[object]:
    """The student's average as its teacher; cross entropy moves it, as the teacher has nothing to teach at first."""
    words = asked(bench, output, "--lmbda", 0.5, "--teacher-update-every", 2, "--ema", 0.5, *more)
    words[words.index("--teacher") + 1] = "student"
    words[words.index("--json")] = "loss.kd_weight=0.5"
    return [*words, "--json"]


@pytest.mark.slow
def test_a_student_with_itself_as_teacher_learns_from_its_average(bench: Bench, tmp_path: Path) -> None:
    output = tmp_path / "out"
    code, _, err = ended(started(*own_teacher(bench, output)))
    assert code == 0, err
    assert not (output / "teachers").exists()
    kd = [step["kd/mean"] for step in events(output, "step")]
    versions = [step["teacher/version"] for step in events(output, "step")]
    assert versions == [step // 2 * 2 for step in range(len(versions))]
    assert abs(kd[0]) < 1e-6, "the student as it is at the start"
    assert min(kd[1:]) > 1e-5, "an average is behind the student"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_student_with_itself_as_teacher_goes_on_after_a_kill_to_the_same_weights(
    bench: Bench, tmp_path: Path
) -> None:
    """In the usual tests this is a training in one process (tests/stages/live/test_updates.py)."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = started(*own_teacher(bench, killed))
    wait_for(lambda: steps_of(killed) >= 3 or process.poll() is not None)
    process.kill()
    assert ended(process)[0] == -signal.SIGKILL
    for output in (whole, killed):
        code, _, err = ended(started(*own_teacher(bench, output)))
        assert code == 0, err
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_ranks_make_the_teacher_that_one_makes(bench: Bench, tmp_path: Path) -> None:
    found = []
    for nproc in (1, 2):
        words = own_teacher(bench, tmp_path / str(nproc), "--nproc", nproc)
        words[words.index("--lmbda") + 1] = 0
        code, _, err = ended(started(*words))
        assert code == 0, err
        found.append([step["kd/mean"] for step in events(tmp_path / str(nproc), "step")])
    assert found[0][2:] == pytest.approx(found[1][2:], rel=1e-2)
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_ranks_write_what_one_writes(bench: Bench, tmp_path: Path) -> None:
    """The same prompts get answers by the same numbers; sums over ranks are rounded otherwise, so they part in time."""
    found = []
    for nproc in (1, 2):
        output = tmp_path / str(nproc)
        code, _, err = ended(started(*asked(bench, output, "--lmbda", 1, "--nproc", nproc)))
        assert code == 0, err
        lines = [json.loads(line) for path in output.glob("rollouts-*.jsonl") for line in path.open()]
        found.append({each["index"]: each for each in lines})
        assert len(list(output.glob("rollouts-*.jsonl"))) == nproc
    one, two = found
    assert one.keys() == two.keys()
    same = [one[index]["token_ids"] == two[index]["token_ids"] for index in one]
    assert np.mean(same) > 0.9
    assert all(one[index]["token_ids"] == two[index]["token_ids"] for index in one if one[index]["step"] == 0)


@pytest.mark.slow
def test_two_ranks_whose_answers_are_all_left_out_end_with_the_student_they_began_with(
    bench: Bench, tmp_path: Path
) -> None:
    words = asked(bench, tmp_path / "out", "--lmbda", 1, "--truncated", "drop", "--temperature", 0, "--nproc", 2)
    words[words.index("--max-new-tokens") + 1] = 1
    code, _, err = ended(started(*words))
    assert code == 0, err
    steps = events(tmp_path / "out", "step")
    assert all(step["rollout/num_dropped"] == step["rollout/num_answers"] > 0 for step in steps)
    assert steps[-1]["num_skipped"] == len(steps) > 2
    before, after = (load_file(folder / "model.safetensors") for folder in (bench.student, tmp_path / "out"))
    assert all(torch.equal(before[name].float(), after[name].float()) for name in before)


def test_answers_that_the_student_does_not_write_are_the_teachers_with_seq_kd(
    bench: Bench, main: Main, tmp_path: Path
) -> None:
    """As if they had been written by kdpipe generate before."""
    answers, weights = tmp_path / "answers.jsonl", []
    words = ["--model", bench.teacher, "--prompts", bench.data, "--out", answers, "--max-new-tokens", 12]
    assert main("generate", *words, "--max-length", 128)[0] == 0
    for name, prompts, more in (("at once", bench.data, ["--seq-kd"]), ("in two", answers, [])):
        given = asked(bench, tmp_path / name, "--lmbda", 0.5, *more)
        given[given.index("--prompts") + 1] = prompts
        code, _, err = ended(started(*given))
        assert code == 0, err
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert {entry.name for entry in tmp_path.iterdir()} == {"answers.jsonl", "answers.jsonl.json", "at once", "in two"}
    assert (tmp_path / "at once" / "answers.jsonl").read_bytes() == answers.read_bytes()


def test_a_refused_run_leaves_nothing_behind(bench: Bench, main: Main, tmp_path: Path) -> None:
    for words, says in (
        (asked(bench, tmp_path / "out", "--max-new-tokens", 5000), "the student reads"),
        (asked(bench, tmp_path / "out", "--tee", tmp_path / "out" / "kept"), "it lies in the student's --output"),
        (["stream", *asked(bench, tmp_path / "out", "--resume", tmp_path / "no")[1:]], "no checkpoint here"),
    ):
        words = ["--data" if word == "--prompts" and words[0] == "stream" else word for word in words]
        if words[0] == "stream":
            at = words.index("--max-new-tokens")
            del words[at : at + 2]
        code, _, err = main(*words)
        assert code == 4, err
        assert says in err, err
        assert list(tmp_path.iterdir()) == [], err


def test_a_run_that_starts_again_keeps_nothing_of_the_one_before(bench: Bench, main: Main, tmp_path: Path) -> None:
    """Its answers have the same indices, and at the first step the same tokens."""
    output, kept = tmp_path / "out", tmp_path / "kept"
    more = ["--lmbda", 1, "--tee", kept, "--max-new-tokens", 3]
    process = started(*asked(bench, output, *more))
    wait_for(lambda: steps_of(output) >= 4 or process.poll() is not None)
    process.kill()
    assert ended(process)[0] == -signal.SIGKILL
    code, _, err = main(*asked(bench, output, *more, "--truncated", "drop"))
    assert code == 4, err
    assert "live.truncated is train, this run's is drop" in err
    code, _, err = ended(started(*asked(bench, output, *more, "--truncated", "drop", "--resume", "never")))
    assert code == 0, err
    lines = [json.loads(line) for line in (output / "rollouts-00000.jsonl").read_text().splitlines()]
    finished = [each for each in lines if each["ended"]]
    assert (len(Cache.open(kept)) if kept.exists() else 0) == len(finished)
    assert not list(tmp_path.glob(".*"))
