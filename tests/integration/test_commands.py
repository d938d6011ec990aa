"""The whole path as a user types it: plan, extract, train, eval on real models; and what is typed wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from tests.chats import write_chats
from tests.conftest import Bench, Main
from tests.models import make_model, make_tokenizer

SETS = ["train.dtype=float32", "train.batch_tokens=600", "train.lr=1e-2", "train.epochs=4"]


def found(out: str) -> dict:
    """The one JSON object on stdout."""
    assert out.count("\n") == 1 or out.startswith("{\n")
    return json.loads(out)


def test_two_students_from_one_cache(bench: Bench, main: Main, tmp_path: Path) -> None:
    data = ["--teacher", bench.teacher, "--data", bench.data, "--max-length", 128, "--heldout-fraction", 0.25]
    cache = tmp_path / "cache"
    code, out, _ = main("plan", *data, "--cache", cache, "--student", bench.student, "--json")
    assert code == 0
    plan = found(out)
    assert plan["fits"]
    assert not cache.exists()
    code, out, err = main("extract", *data, "--cache", cache, "--json")
    assert code == 0, err
    info = found(out)
    assert (info["num_samples"], info["num_rows"], info["complete"]) == (plan["num_samples"], plan["num_rows"], True)
    scores = {}
    for name, sets in {"kd": [], "ce": ["loss.kd_weight=0"]}.items():
        run = tmp_path / f"{name}.toml"
        run.write_text(
            f'student.path = "{bench.student}"\ncache.path = "{cache}"\ntrain.output = "{tmp_path / name}"\n'
            "[data]\nmax_length = 128\nheldout_fraction = 0.25\n"
        )
        code, out, err = main("train", "--config", run, "--set", *SETS, *sets, "--json")
        assert code == 0, err
        trained = found(out)
        code, out, _ = main("eval", "--config", run, "--json")
        scores[name] = found(out)
        assert scores[name]["heldout_kl"] == pytest.approx(trained["heldout_kl"], rel=1e-5)
        events = [json.loads(line) for line in (tmp_path / name / "events.jsonl").read_text().splitlines()]
        assert [event["kind"] for event in events].count("step") == trained["num_steps"]
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        made = json.loads((tmp_path / name / "kdpipe.json").read_text())["made_with"]
        assert made["argv"][:4] == ["kdpipe", "train", "--config", str(run)]
        assert made["paths"]["cache"] == [str(cache)]
    keys = {
        "heldout_kl",
        "heldout_reverse_kl",
        "top1_agreement",
        "heldout_ce",
        "perplexity",
        "heldout_bits_per_byte",
        "teacher_ce",
        "num_tokens",
    }
    assert scores["kd"].keys() == keys
    assert scores["kd"]["heldout_kl"] < scores["ce"]["heldout_kl"]
    assert scores["kd"]["num_tokens"] == scores["ce"]["num_tokens"]
    code, out, _ = main("cache", "verify", cache, "--json")
    assert (code, found(out)["ok"]) == (0, True)
    made = found(main("cache", "info", cache, "--json")[1])["made_with"]
    assert (made["teacher"], made["data"]) == ([str(bench.teacher)], [str(bench.data)])
    assert made["command"].startswith(f"kdpipe extract --teacher {bench.teacher}")


def test_two_ranks_train_the_student_of_one(bench: Bench, main: Main, tmp_path: Path) -> None:
    scores = []
    for nproc in (1, 2):
        paths = ["--student", bench.student, "--cache", bench.cache, "--output", tmp_path / str(nproc)]
        code, out, err = main("train", *paths, "--set", *SETS, "--nproc", nproc, "--json")
        assert code == 0, err
        scores.append(found(out))
    assert [each.pop("dtype") for each in scores] == ["float32", "float32"]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n{"messages": [}\n', "data.jsonl:1"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n', "data.jsonl:2"),
        (b'{"prompt": "a", "completion": "\xff"}\n', "data.jsonl:1"),
        (b'{"mesages": []}\n', "did you mean 'messages'"),
        (b'{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}\n', "data.jsonl:1"),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}\n',
            "empty_completion",
        ),
    ],
    ids=[
        "empty",
        "no assistant",
        "not json",
        "not utf-8",
        "unknown column",
        "roles out of order",
        "nothing supervised",
    ],
)
def test_bad_data_is_one_line_and_exit_code_4(
    content: bytes, said: str, bench: Bench, main: Main, tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    for command in (["plan"], ["extract", "--cache", tmp_path / "cache"]):
        code, out, err = main(*command, "--teacher", bench.teacher, "--data", tmp_path / "data.jsonl")
        refused(code, out, err, said)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_empty_last_assistant_turn_is_reported_and_not_trained_on(bench: Bench, main: Main, tmp_path: Path) -> None:
    """The chat form of GKD recipes: a JSON array of messages and prompt."""
    turns = [{"role": "user", "content": "What is a row?"}, {"role": "assistant", "content": "A hidden state."}]
    unanswered = [turns[0], {"role": "assistant", "content": ""}]
    records = [{"messages": turns, "prompt": turns[:1]}, {"messages": unanswered, "prompt": turns[:1]}]
    (tmp_path / "data.json").write_text(json.dumps(records, indent=1))
    code, out, err = main(
        "extract", "--teacher", bench.teacher, "--data", tmp_path / "data.json", "--cache", tmp_path / "cache", "--json"
    )
    assert code == 0
    assert found(out)["counts"] == {"read": 2, "kept": 1, "empty_completion": 1}
    assert "1 of 2 samples empty completion" in err
    (line,) = (tmp_path / "cache" / "runs" / "prepare.jsonl").read_text().splitlines()
    assert json.loads(line)["line"] > 1


def test_what_is_not_read_is_counted_and_bad_records_can_be_left_out(bench: Bench, main: Main, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What is a row?"}, {"role": "assistant", "content": "A hidden state."}]
    lines = [json.dumps({"id": 7, "source": None, "messages": [{**turn, "at": 0} for turn in turns]})] * 3
    lines[1:1] = ["{", json.dumps({"messages": [turns[0], turns[0]]}), "{"]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    words = ["--teacher", bench.teacher, "--data", tmp_path / "data.jsonl"]
    code, out, err = main("plan", *words)
    refused(code, out, err.splitlines()[-1], "data.jsonl:2: not JSON")
    assert "3 of the 6 records read so far are bad: 2 x not JSON: " in err
    assert err.count("bad record ") == 3
    skip = ["--bad-records", "skip", "--max-bad", 0.5]
    counts = {"read": 6, "kept": 3, "bad_record": 3, "not read: id": 3, "not read: messages.at": 3}
    code, out, err = main("plan", *words, *skip, "--strict", "--json")
    assert (code, found(out)["counts"]) == (0, counts)
    assert "not read, with the number of records that have it: id (3), messages.at (3)" in err
    plans = []
    for name in ("a", "b", "a"):
        code, out, err = main("extract", *words, *skip, "--cache", tmp_path / name, "--json")
        assert (code, found(out)["counts"]) == (0, counts)
        plans.append((tmp_path / name / "PLAN.json").read_bytes())
    assert plans[0] == plans[1] == plans[2]
    log = [json.loads(line) for line in (tmp_path / "a" / "runs" / "prepare.jsonl").read_text().splitlines()]
    assert [(each["line"], each["kind"]) for each in log] == [(line, "bad_record") for line in (2, 3, 4)]
    assert log[1]["detail"].startswith("roles out of order: message 2 is 'user'")
    more = [*words, tmp_path / "more.jsonl", *skip, "--cache", tmp_path / "a", "--json"]
    (tmp_path / "more.jsonl").write_text(json.dumps({"prompt": "And a shard?", "completion": "Many rows."}) + "\n{\n")
    code, out, err = main("extract", *more)
    assert (code, found(out)["num_samples"], found(out)["counts"]["bad_record"]) == (0, 4, 4)


def test_overlong_samples_follow_the_policy_and_are_counted(bench: Bench, main: Main) -> None:
    for policy, field in (("truncate", "truncated"), ("drop", "dropped_overlong")):
        words = ["--teacher", bench.teacher, "--data", bench.data, "--max-length", 60, "--overlong", policy]
        counts = found(main("plan", *words, "--json")[1])["counts"]
        assert counts[field] > 0
        assert counts["read"] == 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_before_the_first_step_is_temporary_too(number: signal.Signals, bench: Bench, tmp_path: Path) -> None:
    words = ["train", "--student", bench.student, "--cache", bench.cache, "--output", tmp_path / "out", "--set", *SETS]
    command = [sys.executable, "-m", "kdpipe.pipeline.cli", *map(str, words)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    caught, until = 0, time.monotonic() + 60
    while not caught >> (number - 1) & 1 and time.monotonic() < until:  # the command line has begun
        status = Path(f"/proc/{running.pid}/status").read_text()
        caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
    begun = (tmp_path / "out").exists()
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    assert not begun, "the handler of the steps, which is another"
    assert running.returncode == 75, said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("nproc", "number"), [(1, signal.SIGHUP), pytest.param(2, signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_in_the_middle_says_what_is_saved_and_the_rest_is_done_later(
    nproc: int, number: signal.Signals, bench: Bench, main: Main, tmp_path: Path
) -> None:
    """Ctrl-C as a terminal sends it, to the launcher and its ranks at once. Meanwhile a second run is refused."""
    words = ["train", "--student", bench.student, "--cache", bench.cache, "--output", tmp_path / "out"]
    words += ["--nproc", nproc, "--set", *SETS, "train.epochs=99", "train.max_steps=60", "train.eval_every=1"]
    command = [sys.executable, "-m", "kdpipe.pipeline.cli", *map(str, words)]
    running = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    events, until = tmp_path / "out" / "events.jsonl", time.monotonic() + 240
    while not (events.exists() and '"kind":"step"' in events.read_text().replace(" ", "")):
        assert time.monotonic() < until
        time.sleep(0.02)
    before = events.read_text()
    code, out, err = main(*words)
    assert (code, out, err.count("\n")) == (75, "", 1), err
    assert err.startswith(f"E-BUSY {tmp_path / 'out'}: another run is at work here: pid ")
    assert events.read_text().startswith(before)
    os.killpg(running.pid, number)
    _, said = running.communicate(timeout=90)
    assert running.returncode == (130 if number == signal.SIGINT else 75), said
    assert f"{number.name}: finishing the step and saving; once more ends it at once\n" in said
    last = re.fullmatch(
        rf"E-\w+ .*: stopped by {number.name}; its state after step (\d+) is saved; .*", said.splitlines()[-1]
    )
    assert last, said
    kinds = [json.loads(line)["kind"] for line in events.read_text().splitlines()]
    assert kinds.count("run") == 1
    code, _, err = main(*words)
    assert code == 0, err
    steps = [json.loads(line) for line in events.read_text().splitlines()]
    taken = [event["step"] for event in steps if event["kind"] == "step"]
    assert taken == list(range(1, 61))
    assert [event["step"] for event in steps if event["kind"] == "resume"] == [int(last[1])]


def seed_too_large(bench: Bench, folder: Path) -> list[object]:
    words = ["--student", bench.student, "--cache", bench.cache, "--output", folder / "out"]
    return [*words, "--set", "train.seed=99999999999999999999999"]


def folder_is_a_file(bench: Bench, folder: Path) -> list[object]:
    shutil.copytree(bench.cache, folder / "odd")
    shutil.rmtree(folder / "odd" / "shards")
    (folder / "odd" / "shards").write_text("a note")
    return ["--student", bench.student, "--cache", folder / "odd", "--output", folder / "out"]


def other_tokenizer(bench: Bench, folder: Path) -> list[object]:
    make_tokenizer(make_model("llama", folder / "student", vocab_size=320), vocab_size=290)
    return ["--student", folder / "student", "--cache", bench.cache, "--output", folder / "out"]


def test_plan_says_that_a_student_has_another_tokenizer(bench: Bench, main: Main, tmp_path: Path) -> None:
    other_tokenizer(bench, tmp_path)
    words = ["--teacher", bench.teacher, "--data", bench.data, "--student", tmp_path / "student"]
    code, _, err = main("plan", *words)
    assert code == 0
    assert f"{tmp_path / 'student'} has another tokenizer than the teacher: kdpipe train aligns its texts" in err


def data_that_are_of_no_use(bench: Bench, folder: Path) -> list[object]:
    """The student has the teacher's tokenizer."""
    return ["--student", bench.student, "--cache", bench.cache, "--data", bench.data, "--output", folder / "out"]


def too_many_ranks(bench: Bench, folder: Path) -> list[object]:
    return ["--student", bench.student, "--cache", bench.cache, "--output", folder / "out", "--nproc", 500]


def misspelt_key(bench: Bench, folder: Path) -> list[object]:
    words = ["--student", bench.student, "--cache", bench.cache, "--output", folder / "out"]
    return [*words, "--set", "train.learning_rte=1"]


def misspelt_divergence(bench: Bench, folder: Path) -> list[object]:
    words = ["--student", bench.student, "--cache", bench.cache, "--output", folder / "out"]
    return [*words, "--set", "loss.divergence=forward_lk"]


def no_cache(bench: Bench, folder: Path) -> list[object]:
    return ["--student", bench.student, "--cache", folder / "none", "--output", folder / "out"]


def torn_cache(bench: Bench, folder: Path) -> list[object]:
    shutil.copytree(bench.cache, folder / "torn")
    (folder / "torn" / "PLAN.json").write_bytes((bench.cache / "PLAN.json").read_bytes()[:-40])
    return ["--student", bench.student, "--cache", folder / "torn", "--output", folder / "out"]


@pytest.mark.parametrize(
    ("case", "code", "said"),
    [
        (other_tokenizer, 4, "give the data that the cache was made of too (--data)"),
        (data_that_are_of_no_use, 4, "--data: the student has the teacher's tokenizer"),
        (too_many_ranks, 4, "500 ranks for"),
        (misspelt_key, 4, "unknown key 'train.learning_rte'"),
        (misspelt_divergence, 4, "did you mean 'forward_kl'"),
        (no_cache, 4, "PLAN.json is missing"),
        (torn_cache, 1, "PLAN.json"),
        (seed_too_large, 4, "train.seed"),
        (folder_is_a_file, 1, "odd/shards: it is not a folder"),
    ],
)
def test_bad_training_is_one_line_and_leaves_nothing(
    case: Callable[[Bench, Path], list[object]], code: int, said: str, bench: Bench, main: Main, tmp_path: Path
) -> None:
    words = case(bench, tmp_path)
    before = sorted(tmp_path.iterdir())
    refused(*main("train", *words), said, wanted=code)
    assert sorted(tmp_path.iterdir()) == before


def test_cache_of_other_data_is_refused_by_name(bench: Bench, main: Main, tmp_path: Path) -> None:
    data = write_chats(tmp_path / "data.jsonl", 5, seed=3)
    words = ["--teacher", bench.teacher, "--data", data, "--cache", bench.cache]
    before = sorted(bench.cache.rglob("*"))
    refused(*main("extract", *words, "--max-length", 128, "--heldout-fraction", 0.25), "fingerprint.data")
    assert sorted(bench.cache.rglob("*")) == before


def refused(code: int, out: str, err: str, said: str, *, wanted: int = 4) -> None:
    """The command ended with the wanted code, nothing on stdout, and one line of error, the last on stderr."""
    assert code == wanted
    assert out == ""
    assert said in err
    assert [line for line in err.splitlines() if line.startswith("E-")] == err.splitlines()[-1:]
    assert "Traceback" not in err
