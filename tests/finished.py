"""Runs that are finished, or not, without a model: what they leave in their folder."""

import json
from pathlib import Path

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.durable import canonical
from kdpipe.manifests.plan import PLAN_FILE
from kdpipe.manifests.run import RUN_FILE, Metrics, RunInputs, RunRecord
from kdpipe.manifests.specs import Member


def write_record(member: Member, *, metrics: Metrics | None, num_steps: int = 3) -> RunRecord:
    """kdpipe.json of a member's student, as a run of it writes it."""
    spec = member.run.training()
    caches = tuple(
        Cache.open(path).plan.fingerprint.overall() if (path / PLAN_FILE).exists() else "c"
        for path in member.run.cache.path
    )
    record = RunRecord(
        inputs=RunInputs(student="s", caches=caches, heldout_fraction=spec.data.heldout_fraction, spec=spec),
        num_steps=num_steps,
        num_tokens=100,
        num_skipped=0,
        metrics=metrics,
        files={},
    )
    member.output.mkdir(parents=True, exist_ok=True)
    (member.output / RUN_FILE).write_bytes(canonical(record.model_dump(mode="json")))
    return record


def write_events(output: Path, *kinds: str, **fields: object) -> None:
    """Lines of events.jsonl, one of each kind, all with the same fields; a step counts up."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "events.jsonl", "a", encoding="utf-8") as file:
        for number, kind in enumerate(kinds, 1):
            counted = {"step": number} if kind == "step" else {}
            file.write(json.dumps({"time": 1000.0 + number, "kind": kind, **counted, **fields}) + "\n")
