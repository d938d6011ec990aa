"""The demo's plot: how each student's held-out figures went during training, from its events.jsonl."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

PANELS = {"heldout_kl": "held-out KL to the teacher (nats)", "heldout_ce": "held-out cross-entropy (nats)"}
LABELS = {"kd": "forward KL from the cache", "ce": "cross-entropy alone"}


def read_events(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def events(student: pathlib.Path) -> list[dict[str, Any]]:
    """Events of a student's training, in order."""
    return read_events(student / "events.jsonl")


def draw(students: Mapping[str, pathlib.Path], out: pathlib.Path, *, teacher_ce: float) -> None:
    """One panel a figure, one line a student, as a PNG."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(10, 4), layout="constrained")
    for axis, (field, title) in zip(axes, PANELS.items(), strict=True):
        for name, folder in students.items():
            scores = [event for event in events(folder) if event["kind"] == "eval"]
            axis.plot(
                [score["step"] for score in scores], [score[field] for score in scores], "o-", ms=3, label=LABELS[name]
            )
        axis.set(xlabel="optimizer step", title=title)
        axis.grid(alpha=0.3)
    axes[1].axhline(teacher_ce, color="grey", ls="--", label="the teacher itself")
    axes[0].set_ylim(bottom=0)
    for axis in axes:
        axis.legend()
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
