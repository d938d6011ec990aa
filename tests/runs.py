"""Outputs of runs as kdpipe leaves them, written by hand in a moment: what reports and tables of runs are made of."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdpipe.manifests.durable import canonical
from kdpipe.manifests.made_with import MadeWith
from kdpipe.manifests.run import RUN_FILE, RunInputs, RunRecord
from kdpipe.manifests.specs import RunSpec

BEGAN = 1_700_000_000.0
STEP_S = 2.0
STEP_TOKENS = 100


def loss_of(step: int) -> float:
    return round(4.0 / (step + 1) + 0.1, 6)


def kl_of(step: int) -> float:
    return round(2.0 / (step + 1) + 0.01, 6)


def inputs_of(spec: Mapping[str, Any] | None = None, **rest: Any) -> RunInputs:
    known = {"student": "s" * 64, "caches": ("c" * 64,), "heldout_fraction": 0.1, "spec": RunSpec(**(spec or {}))}
    return RunInputs(**(known | rest))


def session(
    first: int,
    after: int,
    *,
    began: float,
    inputs: RunInputs,
    made_with: MadeWith | None = None,
    num_steps: int = 8,
    eval_every: int = 2,
    further: Mapping[str, float] | None = None,
    command: str = "train",
) -> list[dict[str, Any]]:
    """Events of a session that makes the steps from `first` to before `after`. further: of each step"""
    made = None if made_with is None else made_with.model_dump()
    events: list[dict[str, Any]] = [
        {
            "time": began,
            "kind": "run",
            "command": command,
            "host": "node7",
            "pid": 1,
            "num_ranks": 1,
            "made_with": made,
        },
        {"time": began, "kind": "accepted", "inputs": inputs.model_dump(mode="json")},
        {"time": began, "kind": "start", "num_steps": num_steps, "first_step": first},
    ]
    if first == 1:
        events.append(evaluation(0, began + 1.0))
    for step in range(first, after):
        now = began + 1.0 + STEP_S * (step - first + 1)
        event = {
            "time": now,
            "kind": "step",
            "step": step,
            "loss/mean": loss_of(step),
            "grad_norm": 1.0,
            "lr": 1e-4,
            "num_tokens": STEP_TOKENS,
            "num_supervised": STEP_TOKENS // 2,
            "num_skipped": 0,
            "seconds": STEP_S,
        }
        events.append(event | dict(further or {}))
        if step % eval_every == 0 and step < num_steps:
            events.append(evaluation(step, now))
    return events


def evaluation(step: int, time: float) -> dict[str, Any]:
    return {
        "time": time,
        "kind": "eval",
        "step": step,
        "heldout_kl": kl_of(step),
        "heldout_reverse_kl": 2 * kl_of(step),
        "top1_agreement": round(1 - kl_of(step) / 4, 6),
        "heldout_ce": 3.0,
        "perplexity": 20.0855,
        "teacher_ce": 2.0,
        "num_tokens": 50,
        "dtype": "float32",
    }


def write_events(output: Path, events: Iterable[Mapping[str, Any]]) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "events.jsonl", "a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    return output


def write_run(
    output: Path,
    *,
    spec: Mapping[str, Any] | None = None,
    heldout_kl: float = 0.25,
    num_steps: int = 8,
    cache: Path | None = None,
    student: Path = Path("models/small"),
    further: Mapping[str, float] | None = None,
    **rest: Any,
) -> Path:
    """The output of a run that has finished in one session."""
    paths = {"student": (str(student),), "output": (str(output),)} | ({"cache": (str(cache),)} if cache else {})
    made = MadeWith(argv=("kdpipe", "train", "--output", str(output)), folder="/project", paths=paths)
    inputs = inputs_of(spec, **rest)
    events = session(1, num_steps + 1, began=BEGAN, inputs=inputs, made_with=made, num_steps=num_steps, further=further)
    last = evaluation(num_steps, events[-1]["time"] + 1.0) | {"heldout_kl": heldout_kl}
    write_events(output, [*events, last, {"time": last["time"], "kind": "finished"}])
    metrics = {key: value for key, value in last.items() if key not in ("time", "kind", "step")}
    record = RunRecord(
        inputs=inputs,
        num_steps=num_steps,
        num_tokens=num_steps * STEP_TOKENS,
        num_skipped=0,
        metrics=metrics,
        files={},
        made_with=made,
    )
    (output / RUN_FILE).write_bytes(canonical(record.model_dump(mode="json")))
    return output
