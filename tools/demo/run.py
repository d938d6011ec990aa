"""The demo: one teacher, one cache, two students that differ by their loss alone, and what came of it.

    python tools/demo/run.py --out .demo

Makes text, tokenizer, teacher and an untrained student out of what ships with Python, then types the commands a user
would type (they are printed) and ends with a table, a plot and summary.json. The teacher is kept for the next time;
cache and students are made afresh. Cost on two cores: about seven minutes the first time, two and a half afterwards.
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

import bpe
import corpus
import plot
import student
import teacher

# A small transfer set on purpose: cross-entropy overfits it, the teacher's distribution does not.
NUM_TRANSFER = 1000
HELDOUT_FRACTION = 0.35
TEACHER_EPOCHS = 3
TRAIN = {"batch_tokens": 2048, "epochs": 8, "lr": 2e-3, "warmup_ratio": 0.1, "seed": 0, "eval_every": 25}
STUDENTS = {"kd": 1.0, "ce": 0.0}
"""Name of each student, and the weight of the divergence in its loss; the rest is cross-entropy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(".demo"), help="folder for everything made")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    seconds = {"teacher": prepare(out)}
    dtype = "bfloat16" if teacher.has_bf16_arithmetic() else "float32"
    for name in ("cache", *STUDENTS):
        shutil.rmtree(out / name, ignore_errors=True)
    data = ["--teacher", out / "teacher", "--data", out / "transfer.jsonl", "--heldout-fraction", HELDOUT_FRACTION]
    kdpipe("plan", *data, "--cache", out / "cache", "--dtype", dtype, "--student", out / "student")
    seconds["extract"] = kdpipe("extract", *data, "--cache", out / "cache", "--dtype", dtype)
    sets = [f"train.{key}={value}" for key, value in TRAIN.items()] + [f"train.dtype={dtype}"]
    students = {}
    for name, kd_weight in STUDENTS.items():
        paths = ["--student", out / "student", "--cache", out / "cache", "--output", out / name]
        seconds[name] = kdpipe("train", *paths, "--set", *sets, f"loss.kd_weight={kd_weight}")
        students[name] = scores(out / name, out / "cache", seconds[name])
    seconds["total"] = time.monotonic() - started
    report(out, students, seconds)


def prepare(out: pathlib.Path) -> float:
    """Text, tokenizer, teacher and an untrained student in `out`; seconds the teacher took when it was trained.

    The teacher is kept from an earlier time if it was trained on the same text in the same way.
    """
    info = corpus.write_corpus(out / "teacher.jsonl", transfer_path=out / "transfer.jsonl", num_transfer=NUM_TRANSFER)
    recipe = {"corpus": info.sha256, "num_transfer": NUM_TRANSFER, "epochs": TEACHER_EPOCHS}
    record = out / "teacher" / "demo.json"
    if record.exists() and json.loads(record.read_text())["recipe"] == recipe:
        say(f"The teacher is there already ({out / 'teacher'}).")
    else:
        chats = [sample.messages() for sample in corpus.read_samples(out / "teacher.jsonl")]
        say(f"Training a teacher on {len(chats):,} pages of Python's own documentation.")
        bpe.train_tokenizer((turn["content"] for chat in chats for turn in chat), folder=out / "tokenizer")
        shutil.rmtree(out / "teacher", ignore_errors=True)
        trained = teacher.train_teacher(
            chats, tokenizer_folder=out / "tokenizer", out=out / "teacher", num_epochs=TEACHER_EPOCHS
        )
        record.write_text(json.dumps({"recipe": recipe, "seconds": trained.duration_s}))
    student.write_student(out / "student", tokenizer_folder=out / "tokenizer", seed=0)
    return float(json.loads(record.read_text())["seconds"])


def kdpipe(*words: object) -> float:
    """Type a kdpipe command, show it, and stop the demo where it fails; the seconds it took."""
    command = ["kdpipe", *map(str, words)]
    say(f"$ {shlex.join(command)}")
    started = time.monotonic()
    finished = subprocess.run(command, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
    return time.monotonic() - started


def scores(folder: pathlib.Path, cache: pathlib.Path, seconds: float) -> dict[str, float]:
    """What kdpipe eval says of a student, with its training's speed."""
    command = ["kdpipe", "eval", "--student", str(folder), "--cache", str(cache), "--json"]
    say(f"$ {shlex.join(command)}")
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    steps = [event for event in plot.events(folder) if event["kind"] == "step"]
    rate = sum(step["num_tokens"] for step in steps) / sum(step["seconds"] for step in steps)
    return found | {"tokens_per_s": rate, "seconds": seconds}


def report(out: pathlib.Path, students: dict[str, dict[str, float]], seconds: dict[str, float]) -> None:
    """Table on stdout, plot.png and summary.json in `out`."""
    shards = [event for path in (out / "cache" / "runs").glob("*.jsonl") for event in plot.read_events(path)]
    shards = [event for event in shards if event.get("kind") == "shard"]
    rate = sum(shard["num_tokens"] for shard in shards) / sum(shard["seconds"] for shard in shards)
    summary: dict[str, Any] = {
        "teacher": {
            "heldout_kl": 0.0,
            "top1_agreement": 1.0,
            "heldout_ce": students["kd"]["teacher_ce"],
            "tokens_per_s": rate,
            "seconds": seconds["teacher"],
        },
        "students": students,
        "seconds": seconds,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot.draw({name: out / name for name in STUDENTS}, out / "plot.png", teacher_ce=students["kd"]["teacher_ce"])
    columns = ("heldout_kl", "top1_agreement", "heldout_ce", "tokens_per_s", "seconds")
    heads = ("held-out KL", "top-1 agreement", "held-out CE", "tokens/s", "seconds")
    rows = {"teacher": summary["teacher"], "KD student": students["kd"], "CE student": students["ce"]}
    say("")
    say(f"{'':12}" + "".join(f"{head:>17}" for head in heads))
    for name, row in rows.items():
        digits = (3, 3, 3, 0, 0)
        say(f"{name:12}" + "".join(f"{row[column]:17,.{n}f}" for column, n in zip(columns, digits, strict=True)))
    ratio = students["kd"]["heldout_kl"] / students["ce"]["heldout_kl"]
    say("")
    say(f"The distilled student is {ratio:.2f} times as far from the teacher as the one trained on text alone.")
    rest = sum(seconds[name] for name in ("extract", *STUDENTS))
    say(f"Seconds: teacher {seconds['teacher']:.0f} (once), extraction and both students {rest:.0f}.")
    say(f"Plot: {out / 'plot.png'}   Numbers: {out / 'summary.json'}")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
