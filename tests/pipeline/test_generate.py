"""kdpipe generate as it is called: options, a run file, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.chats import write_chats
from tests.conftest import Bench, Main

KDPIPE = [sys.executable, "-m", "kdpipe.pipeline.cli"]


def test_options_and_a_run_file_say_the_same(bench: Bench, main: Main, tmp_path: Path) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 3)
    out = tmp_path / "a.jsonl"
    words = ("--model", bench.teacher, "--prompts", data, "--out", out, "--device", "cpu", "--seed", 3, "--top-k", 50)
    code, stdout, stderr = main("generate", *words, "--max-new-tokens", 6, "--samples-per-prompt", 2, "--json")
    assert code == 0, stderr
    made = json.loads(stdout)
    assert (made["num_prompts"], made["num_answers"]) == (3, 6)
    assert len(out.read_text().splitlines()) == 6
    (tmp_path / "run.toml").write_text(
        f'[teacher]\npath = "{bench.teacher}"\n[data]\npaths = ["{data}"]\n[engine]\ndevice = "cpu"\n'
        "[live]\nmax_new_tokens = 6\ntop_k = 50\n"
    )
    second = tmp_path / "b.jsonl"
    run = ("generate", "--config", tmp_path / "run.toml", "--out", second, "--seed", 3)
    code, stdout, stderr = main(*run, "--set", "live.samples_per_prompt=2")
    assert code == 0, stderr
    assert second.read_bytes() == out.read_bytes()
    code, _, stderr = main(*run, "--set", "live.samples_per_prompt=1")
    assert code == 4
    assert f"E-CONFIG {second}: it was written with samples_per_prompt = 2, this command asks for 1" in stderr


def test_what_is_missing_or_wrong_is_one_line(bench: Bench, main: Main, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    for words, said in (
        (("--out", out), "option '--model' is missing, or teacher.path of a run file"),
        (("--out", out, "--model", bench.teacher), "option '--prompts' is missing, or data.paths of a run file"),
        (("--model", bench.teacher, "--prompts", bench.data), "option '--out' is missing"),
        (
            ("--out", out, "--temperature", "0.0001"),
            "--temperature: '0.0001': expected 0 (the most likely token each time) or at",
        ),
        (("--out", out, "--top-p", "0"), "--top-p: '0': expected greater than 0"),
        (("--out", out, "--set", "loss.temperature=2"), "generate does not read 'loss.temperature'"),
        (("--out", out, "--model", bench.cache, "--prompts", bench.data), "E-TEACHER"),
    ):
        code, _, stderr = main("generate", *words)
        assert code == 4
        assert said in stderr
        assert stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_and_stopped_it_goes_on_to_the_same_file(bench: Bench, tmp_path: Path) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 400)
    outs = [tmp_path / name for name in ("whole.jsonl", "killed.jsonl")]
    words = [
        *KDPIPE,
        "generate",
        "--model",
        bench.teacher,
        "--prompts",
        data,
        "--device",
        "cpu",
        "--max-new-tokens",
        "40",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, again = ([*map(str, words), "--out", str(out)] for out in outs)
    subprocess.run(whole, env=env, check=True, capture_output=True, timeout=120)
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 75)):
        before = outs[1].stat().st_size if outs[1].exists() else 0
        process = subprocess.Popen(again, env=env, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not (outs[1].exists() and outs[1].stat().st_size > before) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        stderr = process.communicate(timeout=60)[1]
        assert process.returncode == code, stderr
        assert code < 0 or "answers are finished and kept" in stderr
    subprocess.run(again, env=env, check=True, capture_output=True, timeout=120)
    assert outs[1].read_bytes() == outs[0].read_bytes()
