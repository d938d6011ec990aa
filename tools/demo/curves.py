"""The demo's KD student goes on, on-policy and offline: the same start, samples and steps, three seeds.

    make demo && python tools/demo/curves.py --out .demo

Every student is one `kdpipe onpolicy` (with `--lmbda 0` it is the student of `extract` and `train`, bit for bit); they
differ by who writes the answers and by the divergence. The measure is the same for all: each student answers the same
held-out prompts with the same random numbers, and its reverse KL to the teacher on these answers is taken over the
whole vocabulary. Ends with a table and a plot; finished students are kept, so the same command goes on.
Cost: four minutes a student on two cores, nine students.
"""

import argparse
import pathlib
import statistics
from collections.abc import Mapping, Sequence

import plot
import run
from matplotlib import pyplot

STUDENTS = {
    "on-policy": ("on-policy, reverse KL", ["--lmbda", 1, "--beta", 1]),
    "offline-reverse": ("offline, reverse KL", ["--lmbda", 0, "--beta", 1]),
    "offline": ("offline, forward KL", ["--lmbda", 0]),
}
"""Of each student its name in table and plot, and how it is trained."""
COLUMNS = {
    "rollout_reverse_kl": "reverse KL on its own answers to held-out prompts",
    "heldout_kl": "forward KL on the held-out answers of the data",
    "heldout_reverse_kl": "reverse KL on the held-out answers of the data",
}
NEW_TOKENS = 64
TRAIN = run.TRAIN | {"lr": 1e-4, "epochs": 1, "eval_every": 11, "eval_tokens": 1024, "save_every": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(".demo"), help="folder of the demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="order of samples, and what is written")
    parser.add_argument("--plot", type=pathlib.Path, help="picture to write; OUT/onpolicy.png when not given")
    asked = parser.parse_args()
    found = {name: [train(asked.out, name, seed) for seed in asked.seeds] for name in STUDENTS}
    draw(found, asked.plot or asked.out / "onpolicy.png")
    run.say(f"\n{table(found)}")


Evals = list[dict[str, float]]
"""A run's evaluations, the first before any training."""


def train(out: pathlib.Path, name: str, seed: int) -> Evals:
    """One student, unless it is there already; its evaluations."""
    output, dtype = out / "onpolicy" / f"{name}-{seed}", "bfloat16" if run.has_bf16_arithmetic() else "float32"
    sets = [f"train.{key}={value}" for key, value in (TRAIN | {"seed": seed, "dtype": dtype}).items()]
    models = ["--teacher", out / "teacher", "--student", out / "kd", "--output", output, "--dtype", dtype]
    data = ["--prompts", out / "chats.jsonl", "--heldout-fraction", run.HELDOUT_FRACTION]
    how = ["--max-new-tokens", NEW_TOKENS, *STUDENTS[name][1]]
    run.kdpipe("onpolicy", *models, *data, *how, "--set", *sets)
    return [event for event in plot.events(output) if event["kind"] == "eval"]


def draw(found: Mapping[str, Sequence[Evals]], out: pathlib.Path) -> None:
    """One panel a figure, a thin line a run, a thick one the mean of its seeds, as a PNG."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, (field, title) in zip(axes, COLUMNS.items(), strict=False):
        for color, (name, runs) in enumerate(found.items()):
            steps = [score["step"] for score in runs[0]]
            curves = [[score[field] for score in scores] for scores in runs]
            for curve in curves:
                axis.plot(steps, curve, color=f"C{color}", lw=0.6, alpha=0.6)
            means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            axis.plot(steps, means, "o-", ms=3, color=f"C{color}", label=STUDENTS[name][0])
        axis.set(xlabel="optimizer step", ylabel="nats a token")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out, dpi=90)
    pyplot.close(figure)


def table(found: Mapping[str, Sequence[Evals]]) -> str:
    """A line a student in Markdown: every seed's last figure of the first column, means of the others."""
    head = [f"{title} (nats)" for title in COLUMNS.values()]
    lines = [f"| student | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    start = found["on-policy"][0][0]
    lines.append(f"| before training | {' | '.join(f'{start[field]:.3f}' for field in COLUMNS)} |")
    for name, runs in found.items():
        last = [scores[-1] for scores in runs]
        cells = [", ".join(f"{each[field]:.3f}" for each in last) for field in COLUMNS]
        lines.append(f"| {STUDENTS[name][0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
