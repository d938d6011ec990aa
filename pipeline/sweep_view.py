"""What a sweep shows: what it will take, a line for each run that begins or ends, the students at its end.

Notes and the progress line go to stderr and to OUTPUT/events.jsonl, results to stdout.
"""

import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import click

from kdpipe.manifests.errors import StoppedError, TemporaryError
from kdpipe.manifests.run import Metrics
from kdpipe.manifests.specs import Member
from kdpipe.pipeline.local import Outcome
from kdpipe.pipeline.output import table, to_json
from kdpipe.pipeline.progress import ConsoleProgress, duration
from kdpipe.pipeline.prospect import Prospect, work_of_all
from kdpipe.pipeline.runs import RunState, state_of
from kdpipe.pipeline.steps import REPORT, Step

SHOWN = ("heldout_kl", "top1_agreement", "heldout_ce", "perplexity", "rollout_reverse_kl")
"""Figures of the table, as far as a student has them."""
RANKED = ("heldout_kl", "rollout_reverse_kl", "heldout_ce")
"""The first of these that a student has says how good it is: less is better."""
RESUMABLE = (TemporaryError.exit_code, StoppedError.exit_code)


class Show:
    """A watcher of steps; the progress line counts the optimizer steps of all runs.

    keep: called at every look
    """

    def __init__(self, progress: ConsoleProgress, steps: Sequence[Step], keep: Callable[[], None]) -> None:
        self._progress, self._keep = progress, keep
        self._left = [step for step in steps if step.member is not None]
        self._at: dict[str, int] = {}
        """Step of each run that has begun, as it was seen last."""
        self._num_good = self._num_bad = 0
        self._waited: set[str] = set()

    def started(self, step: Step, log: Path | None) -> None:
        if step.member is None:
            self._progress.note(shlex.join(("kdpipe", *step.argv)))
            return
        if not self._at:
            work = work_of_all(self._left)  # the samples are planned by now
            made = sum(state_of(each.output).step or 0 for each in self._left)  # by runs that were interrupted
            self._progress.begin("sweep", total=None if work is None else max(work.num_steps - made, 0), unit="steps")
        self._at[step.name] = state_of(step.output).step or 0
        self._progress.event("run_started", name=step.member.name, argv=step.argv)
        self._progress.note(f"{step.member.name}: started; log {log}")

    def ended(self, outcome: Outcome) -> None:
        step, state = outcome.step, state_of(outcome.step.output)
        self._progress.event(
            "run_ended",
            name=name_of(step),
            exit_code=outcome.exit_code,
            error=outcome.error,
            seconds=outcome.seconds,
        )
        if not outcome.is_good:
            self._progress.note(said(outcome))
        elif step.name == REPORT:
            self._progress.note(f"the students compared: {step.output}")
        elif step.member is not None:
            figures = "".join(f", {text}" for text in _figures(state.metrics or {}))
            self._progress.note(f"{name_of(step)}: finished in {duration(outcome.seconds)}{figures}")
        if step.member is not None:
            self._num_good += outcome.is_good
            self._num_bad += not outcome.is_good
            self._progress.advance(self._made(step, state) if step.name in self._at else 0)

    def waits(self, step: Step) -> None:
        if step.name not in self._waited:
            self._waited.add(step.name)
            self._progress.note(f"{name_of(step)}: another run is at work in {step.output}; waiting for its end")

    def look(self, at_work: Collection[Step]) -> None:
        self._keep()
        made = sum(self._made(step, state_of(step.output)) for step in at_work if step.member is not None)
        runs = f"{self._num_good}/{len(self._left)} runs, {len(at_work)} at work"
        self._progress.advance(made, runs + (f", {self._num_bad} failed" if self._num_bad else ""))

    def _made(self, step: Step, state: RunState) -> int:
        """Steps of a run since the last look; those that it makes again, from a checkpoint on, are not counted."""
        before = self._at.get(step.name, 0)
        self._at[step.name] = max(state.step or 0, before)
        return self._at[step.name] - before


def name_of(step: Step) -> str:
    """What a person calls a step: a run by its name."""
    return step.name if step.member is None else step.member.name


def said(outcome: Outcome) -> str:
    """What is said of a step that did not end well: what was wrong, and where more of it is."""
    how = "stopped" if outcome.exit_code in RESUMABLE else "failed"
    log = "" if outcome.log is None else f"; log {outcome.log}"
    return f"{name_of(outcome.step)}: {how}: {outcome.error}{log}"


def print_commands(prospect: Prospect, steps: Sequence[Step], *, as_json: bool) -> None:
    """What a sweep would do."""
    if as_json:
        listed = [{"name": step.name, "argv": step.argv, "needs": step.needs} for step in steps]
        click.echo(to_json({"prospect": prospect.record(), "steps": listed}))
        return
    for line in prospect.lines():
        click.echo(line, err=True)
    for step in steps:
        click.echo(shlex.join(("kdpipe", *step.argv)))


def print_students(members: Sequence[Member], outcomes: Sequence[Outcome], page: Path, *, as_json: bool) -> None:
    """Every student, the best first.

    outcomes: of the runs that were not finished before; page: where the report is, if it was made
    """
    errors = {name_of(outcome.step): outcome.error for outcome in outcomes}
    states = sorted(((member.name, state_of(member.output)) for member in members), key=lambda each: _rank(each[1]))
    if as_json:
        students = [
            {"name": name, "output": state.output, "status": state.status, "error": errors.get(name), **_final(state)}
            for name, state in states
        ]
        click.echo(to_json({"students": students, "report": page if page.exists() else None}))
        return
    rows = [{"student": name, "status": state.status, **dict(_shown(_final(state)))} for name, state in states]
    click.echo(table(rows))


def _final(state: RunState) -> Metrics:
    """Figures of a finished student; those on the way are measured on fewer samples."""
    return (state.metrics or {}) if state.status == "finished" else {}


def _shown(metrics: Metrics) -> Iterator[tuple[str, int | float | str]]:
    return ((name, metrics[name]) for name in SHOWN if name in metrics)


def _figures(metrics: Metrics) -> list[str]:
    return [f"{name.replace('_', ' ')} {value:.4g}" for name, value in list(_shown(metrics))[:2]]


def _rank(state: RunState) -> tuple[bool, float]:
    """Sorts a student with a smaller divergence before one with a larger, one without figures last."""
    metrics = _final(state)
    value = next((metrics[name] for name in RANKED if name in metrics), None)
    return (not isinstance(value, int | float), float(value) if isinstance(value, int | float) else 0.0)
