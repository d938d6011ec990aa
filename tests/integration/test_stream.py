"""kdpipe stream as a user runs it: two processes, one of which may be killed at any moment, and nothing left behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.caches import make_cache
from tests.conftest import Bench, Main
from tests.integration.running import SETS, ended, started, steps_of, wait_for

from kdpipe.manifests.ring import RingReader, make_ring
from kdpipe.stages.train.checkpoint import CHECKPOINTS


def streaming(bench: Bench, output: Path, *more: object) -> list[object]:
    data = ["--data", bench.data, "--max-length", 128, "--heldout-fraction", 0.25]
    models = ["--teacher", bench.teacher, "--student", bench.student]
    return ["stream", *models, *data, "--output", output, "--set", *SETS, "--json", *more]


def teachers_of(output: Path) -> list[int]:
    """The teacher's processes that answer for an output."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "kdpipe.pipeline.teacher_role" in words and str(output.parent / f".{output.name}.stream") in words:
            found.append(int(entry.name))
    return found


def kill_at(bench: Bench, output: Path, step: int, whom: str, saved: bool = False) -> tuple[int, str]:
    """Run and kill one side when so many steps were made, and a checkpoint; exit code and stderr.

    The other side is gone soon after.
    """
    process = started(*streaming(bench, output))

    def is_there() -> bool:
        checkpoint = not saved or any((output / CHECKPOINTS).glob("[0-9]*"))
        return bool(checkpoint and teachers_of(output) and steps_of(output) >= step)

    wait_for(lambda: is_there() or process.poll() is not None)
    for teacher in teachers_of(output):
        os.kill(teacher if whom == "teacher" else process.pid, signal.SIGKILL)
    killed = time.monotonic()
    code, _, err = ended(process)
    wait_for(lambda: not teachers_of(output), timeout_s=20)
    assert time.monotonic() - killed < 20
    return code, err


def test_either_side_may_be_killed_and_the_student_is_that_of_a_cache(
    bench: Bench, offline: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    code, err = kill_at(bench, output, 2, "teacher")
    assert code == 75, err
    assert err.splitlines()[-1].startswith("E-TEMPORARY the rows of sample")
    assert "the teacher (process" in err
    assert "Traceback" not in err
    code, _ = kill_at(bench, output, 5, "student", saved=True)
    assert code == -signal.SIGKILL
    code, out, err = ended(started(*streaming(bench, output)))
    assert code == 0, err
    assert "checkpoint" in err, "it goes on"
    assert (output / "model.safetensors").read_bytes() == offline
    assert json.loads(out)["num_steps"] == steps_of_run(output)
    assert 0.0 < json.loads(out)["share_waiting"] < 1.0
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    waits = [event["wait/teacher/seconds"] for event in events if event["kind"] == "step"]
    assert min(waits) >= 0.0
    assert max(waits) > 0.0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"], "the plan is gone"


def steps_of_run(output: Path) -> int:
    return json.loads((output / "kdpipe.json").read_text())["num_steps"]


def test_a_signal_saves_the_state_and_ends_the_teacher(bench: Bench, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = started(*streaming(bench, output))
    wait_for(lambda: steps_of(output) >= 1 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 75, err
    assert "saved" in err
    wait_for(lambda: not teachers_of(output), timeout_s=20)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_ranks_are_those_of_a_cache(bench: Bench, tmp_path: Path) -> None:
    words = ["--student", bench.student, "--cache", bench.cache, "--output", tmp_path / "off", "--set", *SETS]
    assert ended(started("train", *words, "--nproc", 2))[0] == 0
    code, _, err = ended(started(*streaming(bench, tmp_path / "live", "--nproc", 2)))
    assert code == 0, err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("off", "live")]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_random_moments_it_goes_on_to_the_same_weights(bench: Bench, offline: bytes, tmp_path: Path) -> None:
    output, moments = tmp_path / "out", random.Random(0)
    for _ in range(30):
        code, err = kill_at(
            bench, output, steps_of(output) + moments.randint(0, 5), moments.choice(["teacher", "student"])
        )
        assert code in (0, 75, -signal.SIGKILL), err
    assert ended(started(*streaming(bench, output)))[0] == 0
    assert (output / "model.safetensors").read_bytes() == offline


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--teacher", "nowhere"], "E-TEACHER nowhere: no such folder"),
        (["--set", "live.ring_mib=0"], "'live.ring_mib' = 0"),
        (["--teacher-cores", "99"], "live.teacher_cores"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_before_anything_runs(
    words: list[str], says: str, bench: Bench, main: Main, tmp_path: Path
) -> None:
    code, out, err = main(*streaming(bench, tmp_path / "out"), *words)
    assert (code, out) == (4, "")
    assert says in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def files_of(cache: Path) -> dict[str, bytes]:
    """What makes a cache: all but the logs of those who filled it, and what students with other tokenizers add."""
    found = {path.relative_to(cache).as_posix(): path for path in cache.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(("runs/", "aligned/"))}


def test_what_passes_by_is_kept_as_the_cache_that_extract_makes(bench: Bench, offline: bytes, tmp_path: Path) -> None:
    """Killed once on the way: what was finished of the cache is used, and the teacher is not needed for the rest."""
    output, cache, config = tmp_path / "out", tmp_path / "cache", tmp_path / "run.toml"
    config.write_text('[cache]\ncodec = "fisher"\n')
    words = streaming(bench, output, "--tee", cache, "--config", config)
    process = started(*words)
    wait_for(lambda: steps_of(output) >= 4 or process.poll() is not None)
    process.kill()
    ended(process)
    code, _, err = ended(started(*words))
    assert code == 0, err
    assert (output / "model.safetensors").read_bytes() == offline
    assert files_of(cache) == files_of(bench.cache)
    assert "kdpipe eval" in err
    assert "shards of" not in err, "it is complete"
    assert f"{cache}: rows are kept as they are, not under cache.codec = 'fisher'; kdpipe cache convert codes" in err
    code, _, err = ended(started(*streaming(bench, tmp_path / "second", "--tee", cache)))
    assert code == 0, err
    assert not teachers_of(tmp_path / "second")
    assert "rows differ" not in err, "no teacher was started"


def test_rows_are_not_kept_among_coded_ones(bench: Bench, main: Main, tmp_path: Path) -> None:
    coded = make_cache(tmp_path / "coded", codec="int8").path
    code, _, err = main(*streaming(bench, tmp_path / "out", "--tee", coded))
    assert code == 4
    assert f"E-CONFIG --tee: {coded} has rows under the codec 'int8', and rows are kept as they are here" in err


def test_a_teacher_that_is_still_being_loaded_goes_with_its_student() -> None:
    """It does not look at its ring for a minute."""
    ours, theirs = make_ring(1 << 20)
    code = """
import sys, time
from kdpipe.manifests.ring import RingEnd, RingWriter
from kdpipe.pipeline.teacher_role import end_with
end_with([RingWriter(RingEnd.of(sys.argv[1]))])
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(ours)], pass_fds=ours.fds)
    ours.close()
    reader = RingReader(theirs, patience_s=30)
    assert process.poll() is None
    reader.close()
    assert process.wait(20) == 75
