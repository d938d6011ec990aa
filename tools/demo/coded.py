"""Students taught from one teacher's rows as they came, under each codec, and from side-cars, measured alike.

    make demo && python tools/demo/coded.py --out .demo

The teacher runs over the demo's documentation chats once (`kdpipe extract`); every other cache is made from that one
by `kdpipe cache convert` and `kdpipe cache derive`. Students differ by their cache alone: the same start, samples and
steps, three seeds, forward KL at temperature 1. A top-k side-car cannot serve that: its student minimises the KL over
the likeliest 64 tokens and all others as one. Each student is measured by `kdpipe eval` on the held-out samples of the
raw cache, so against the teacher's exact rows.
Ends with a table and codecs.json; finished students are kept, so that the same command goes on. Cost: three minutes
a student on one core, 18 students.
"""

import argparse
import json
import pathlib
import shlex
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import corpus
import run

from kdpipe.manifests.cache import Cache

CHATS = 208
HELDOUT = 0.25
TRAIN = {"batch_tokens": 512, "epochs": 1, "lr": 5e-4, "warmup_ratio": 0.1, "eval_tokens": 512, "save_every": 0}
COLUMNS = {"heldout_kl": "held-out KL", "top1_agreement": "top-1 agreement", "heldout_ce": "held-out CE"}


Scores = dict[str, float]
"""What kdpipe eval says of a student."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A cache: how it is made of the raw one, and what its student minimises where that is not forward KL."""

    made: Sequence[object] = ()
    loss: Sequence[str] = ()


KINDS = {
    "raw": Kind(),
    "fisher-1e-2": Kind(["convert", "--codec", "fisher", "--codec-kl", 1e-2]),
    "fisher-3e-2": Kind(["convert", "--codec", "fisher", "--codec-kl", 3e-2]),
    "int8": Kind(["convert", "--codec", "int8"]),
    "sampled": Kind(["derive", "--kind", "sampled", "--samples", 12]),
    "topk": Kind(["derive", "--kind", "topk", "--top-k", 64], ["loss.divergence=top_k_kl", "loss.options.k=64"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(".demo"), help="folder of the demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="order of samples")
    parser.add_argument("--caches", nargs="+", default=list(KINDS), choices=KINDS)
    asked = parser.parse_args()
    out = asked.out / "codecs"
    out.mkdir(exist_ok=True)
    prepare(asked.out, out, asked.caches)
    found: dict[str, list[Scores]] = {name: [] for name in asked.caches}
    for seed in asked.seeds:
        for name in asked.caches:
            found[name].append(student(asked.out / "student", out, name, seed))
    sizes = {name: row_bytes(out / name) for name in found}
    start = evaluated(asked.out / "student", out)
    scores = {"start": start, "row_bytes": sizes, "students": found}
    (out / "codecs.json").write_text(json.dumps(scores, indent=2) + "\n")
    run.say(f"\n{table(found, sizes, start)}")


def prepare(demo: pathlib.Path, out: pathlib.Path, names: Sequence[str]) -> None:
    """The raw cache and those that are made of it; what is there is kept."""
    corpus.write_chats(out / "chats.jsonl", num_chats=CHATS)
    data = ["--teacher", demo / "teacher", "--data", out / "chats.jsonl", "--heldout-fraction", HELDOUT]
    run.kdpipe("extract", *data, "--cache", out / "raw", "--dtype", precision())
    for name in names:
        if made := KINDS[name].made:
            run.kdpipe("cache", made[0], out / "raw", out / name, *made[1:])


def student(start: pathlib.Path, out: pathlib.Path, name: str, seed: int) -> Scores:
    """One student, unless it is there already; its figures."""
    output, kept = out / "runs" / f"{name}-{seed}", out / "runs" / f"{name}-{seed}" / "codecs.json"
    sets = [f"train.{key}={value}" for key, value in (TRAIN | {"seed": seed, "dtype": precision()}).items()]
    given = ["--student", start, "--cache", out / name, "--output", output]
    run.kdpipe("train", *given, "--set", *sets, *KINDS[name].loss)
    if not kept.exists():
        kept.write_text(json.dumps(evaluated(output, out)))
    found: Scores = json.loads(kept.read_text())
    return found


def evaluated(student: pathlib.Path, out: pathlib.Path) -> Scores:
    """Against the exact rows of the samples that no student saw."""
    command = ["kdpipe", "eval", "--student", str(student), "--cache", str(out / "raw"), "--json"]
    run.say(f"\n$ {shlex.join(command)}")
    found: Scores = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def row_bytes(folder: pathlib.Path) -> float:
    """Bytes of a cache's shards over its rows."""
    return sum(path.stat().st_size for path in (folder / "shards").iterdir()) / Cache.open(folder).plan.num_rows


def table(found: Mapping[str, Sequence[Scores]], sizes: Mapping[str, float], start: Scores) -> str:
    """A line a cache: bytes of a row, means over its seeds, and each seed's KL."""
    heads = ["bytes a row", *COLUMNS.values()]
    lines = [f"{'':14}" + "".join(f"{head:>17}" for head in heads) + "   held-out KL of each seed"]
    lines.append(f"{'no training':14}{'':17}" + "".join(f"{start[column]:17.3f}" for column in COLUMNS))
    for name, runs in found.items():
        means = "".join(f"{statistics.fmean(each[column] for each in runs):17.3f}" for column in COLUMNS)
        seeds = "  ".join(f"{each['heldout_kl']:.4f}" for each in runs)
        lines.append(f"{name:14}{sizes[name]:17,.0f}{means}   {seeds}")
    return "\n".join(lines)


def precision() -> str:
    return "bfloat16" if run.has_bf16_arithmetic() else "float32"


if __name__ == "__main__":
    main()
