"""A step of `kdpipe stream` against the slower of its two sides on the same core alone.

    teacher   seconds the teacher takes for the samples of a step: `kdpipe extract`, its shards over their tokens
    student   seconds of a step of `kdpipe train` from that cache
    stream    seconds of a step of `kdpipe stream`, teacher and student each on one core

All three are whole commands with one thread, bound to a core each, in turn in every round; the medians of a round's
steps give one ratio, the median over rounds is printed: stream over the slower side, and both sides one after the
other.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all Python adds

from tests.chats import write_chats
from tests.models import make_model, make_tokenizer

TOKENS = 2048
SKIPPED = 2
"""Steps at the start of a run that are not timed: what they need is made and read then."""
TEACHER = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 5, "num_attention_heads": 8}
STUDENT = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
SETS = (f"train.batch_tokens={TOKENS}", "train.eval_tokens=64", "train.save_every=0", "data.heldout_fraction=0.01")


def kdpipe(core: str, *words: object) -> None:
    command = ["taskset", "-c", core, sys.executable, "-m", "kdpipe.pipeline.cli", *map(str, words)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)


def events(path: Path, kind: str) -> list[dict[str, float]]:
    return [event for line in path.read_text().splitlines() if (event := json.loads(line))["kind"] == kind]


def step_seconds(output: Path) -> float:
    """The median of a run's steps."""
    times = [event["time"] for event in events(output / "events.jsonl", "step")][SKIPPED:]
    return statistics.median(after - before for before, after in pairwise(times))


def teacher_seconds(cache: Path) -> float:
    """For the tokens of a step; the first shard also waits for the engine."""
    (log,) = (cache / "runs").glob("*Z-*.jsonl")
    shards = events(log, "shard")[1:]
    return TOKENS * sum(shard["seconds"] for shard in shards) / sum(shard["num_tokens"] for shard in shards)


def one_round(folder: Path, cores: Sequence[str]) -> dict[str, float]:
    teacher, student, data = folder / "teacher", folder / "student", folder / "data.jsonl"
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        made = ["--teacher", teacher, "--data", data, "--heldout-fraction", 0.01]
        kdpipe(cores[0], "extract", *made, "--cache", place / "cache", "--shard-tokens", 2 * TOKENS)
        words = ["--student", student, "--output", place / "out", "--set", *SETS]
        kdpipe(cores[1], "train", "--cache", place / "cache", *words, "--nproc", 1)
        words = ["--student", student, "--output", place / "live", "--set", *SETS]
        kdpipe(",".join(cores), "stream", "--teacher", teacher, "--data", data, *words, "--nproc", 1)
        return {
            "teacher": teacher_seconds(place / "cache"),
            "student": step_seconds(place / "out"),
            "stream": step_seconds(place / "live"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="one round of fewer steps: about two minutes")
    arguments = parser.parse_args()
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))[:2]]
    if len(cores) < 2:
        raise SystemExit("stream: two cores are needed, one for each side")
    with tempfile.TemporaryDirectory(prefix="kdpipe-bench-") as name:
        folder = Path(name)
        sizes = {"max_position_embeddings": 1024}
        make_tokenizer(make_model("qwen3", folder / "teacher", vocab_size=2048, sizes=TEACHER | sizes))
        make_tokenizer(make_model("llama", folder / "student", vocab_size=2048, seed=1, sizes=STUDENT | sizes))
        write_chats(folder / "data.jsonl", 50 if arguments.quick else 120, longest=150)
        rounds = [one_round(folder, cores) for _ in range(1 if arguments.quick else 5)]
    seconds = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    slower = [each["stream"] / max(each["teacher"], each["student"]) for each in rounds]
    both = [each["stream"] / (each["teacher"] + each["student"]) for each in rounds]
    ratio, serial = statistics.median(slower), 1 / statistics.median(both)
    case = f"teacher {seconds['teacher']:.2f} s, student {seconds['student']:.2f} s a step of {TOKENS} tokens"
    if arguments.json:
        line = {"bench": "stream", "case": case, "metric": "time", "unit": "x max(teacher, student)"}
        rivals = {"one after the other": round(serial * ratio, 3)}
        print(json.dumps({**line, "kdpipe": round(ratio, 3), "rivals": rivals}))
    else:
        print(f"{case}: stream {ratio:.3f} x the slower side, one after the other {serial * ratio:.3f} x")


if __name__ == "__main__":
    main()
