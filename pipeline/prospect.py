"""Prospect: what the runs of a sweep that are left will take: steps, tokens, time, disk; and whether it is there.

Steps and tokens are exact where the samples are planned (a cache, whole or not), else those that kdpipe plan finds in
the data. Time is as that of finished students of the same model, token for token, where there are any for every run;
else the operations at the speed of a matrix product that is timed here: a lower bound.
Cost: no torch in this process; a child for the data, one for the speed.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import SpaceError
from kdpipe.manifests.plan import PLAN_FILE
from kdpipe.manifests.sample import is_heldout, is_in_subset
from kdpipe.manifests.specs import Member, RunFile, TrainSpec, members_of, sweep_output
from kdpipe.pipeline.child import command_of
from kdpipe.pipeline.costs import STATE_BYTES
from kdpipe.pipeline.forecast import count_parameters, count_trained, exported_bytes, free_bytes, step_flops
from kdpipe.pipeline.output import human_bytes
from kdpipe.pipeline.progress import duration
from kdpipe.pipeline.runs import state_of
from kdpipe.pipeline.steps import EXTRACT, Step, words_of
from kdpipe.stages.feed.lengths import Shares, num_steps, planned_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Of one run: optimizer steps, and tokens over all of them."""

    num_steps: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Unread:
    """Of a cache that is still to be planned, as kdpipe plan says it.

    works: of each run, by its name
    seconds: at least
    """

    works: Mapping[str, Work]
    cache_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Prospect:
    """What is left of a sweep.

    num_left, num_finished: runs to do, and those that are there already
    work: of all runs that are left; None where nothing says it before one begins
    seconds: of all of it; None where the work is not known
    is_measured: whether finished students say so, else it is a lower bound
    student_bytes, checkpoint_bytes: what the runs write, and what they keep on the way at once
    cache_bytes: of rows that are still to be extracted, where that is known
    free_bytes: on the disk of the output
    """

    num_left: int
    num_finished: int
    work: Work | None
    seconds: float | None
    is_measured: bool
    student_bytes: int
    checkpoint_bytes: int
    cache_bytes: int
    free_bytes: int

    def record(self) -> dict[str, object]:
        """As JSON values."""
        steps_and_tokens = {} if self.work is None else asdict(self.work)
        names = (
            "num_finished",
            "seconds",
            "is_measured",
            "student_bytes",
            "checkpoint_bytes",
            "cache_bytes",
            "free_bytes",
        )
        return {"num_left": self.num_left, **steps_and_tokens, **{name: getattr(self, name) for name in names}}

    def lines(self) -> list[str]:
        """As it is said before the first run: what there is to do, and the room for it."""
        said = [
            f"{self.num_left} run{'s' * (self.num_left != 1)} to do"
            + (f", {self.num_finished} finished" if self.num_finished else "")
        ]
        if self.work is not None:
            said.append(f"{self.work.num_steps:,} steps, {self.work.num_tokens:,} tokens")
        if self.seconds is not None:
            said.append(
                f"about {duration(self.seconds)} (as measured in finished runs)"
                if self.is_measured
                else f"at least {duration(self.seconds)} (estimated)"
            )
        room = [f"students {human_bytes(self.student_bytes)}", f"checkpoints {human_bytes(self.checkpoint_bytes)}"]
        if self.cache_bytes:
            room.append(f"cache {human_bytes(self.cache_bytes)}")
        return ["; ".join(said), f"disk: {', '.join(room)}; {human_bytes(self.free_bytes)} free"]


def prospect_of(config: Path | None, run: RunFile, steps: Sequence[Step], sets: Sequence[str] = ()) -> Prospect:
    """What the steps will take, sweep.jobs at a time; the data are read where no plan says yet which samples there are.

    Raises SpaceError where a disk has not the room, StudentError for a student without weights; SystemExit with the
    code of kdpipe plan where that has said why it cannot.
    """
    left = [step for step in steps if step.member is not None]
    params = {student: count_parameters(student) for student in map(_student, left)}
    extract = next((step for step in steps if step.name == EXTRACT), None)
    unplanned = extract is not None and not (extract.output / PLAN_FILE).exists()
    unread = _read(run, words_of("plan", config, sets)) if unplanned else None
    works = [_work(step, unread) for step in left]
    seconds, is_measured = _seconds(run, left, works, params, unread)
    kept = sorted((_checkpoint_bytes(step) for step in left), reverse=True)
    output = sweep_output(run)
    prospect = Prospect(
        num_left=len(left),
        num_finished=len(members_of(run)) - len(left),
        work=_sum(works),
        seconds=seconds,
        is_measured=is_measured,
        student_bytes=sum(exported_bytes(_run(step)) for step in left),
        checkpoint_bytes=sum(kept[: run.sweep.jobs]),
        cache_bytes=0 if unread is None else unread.cache_bytes,
        free_bytes=free_bytes(output),
    )
    _require_room(prospect, output, run.cache.path)
    return prospect


def work_of_all(steps: Sequence[Step]) -> Work | None:
    """Of the runs among some steps whose samples are planned; None where those of one are not."""
    return _sum([_work(step, None) for step in steps if step.member is not None])


def _run(step: Step) -> RunFile:
    assert step.member is not None, "it is a run's"
    return step.member.run


def _student(step: Step) -> Path:
    path = _run(step).student.path
    assert path is not None, "steps_of has asked for it"
    return path


def _read(run: RunFile, words: Sequence[str]) -> Unread:
    """What kdpipe plan says of the data; it shows its own progress, and its own error."""
    done = subprocess.run(command_of([*words, "--json"]), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    found = json.loads(done.stdout)
    return Unread(
        works={
            each["name"]: Work(num_steps=each["num_steps"], num_tokens=each["trained_tokens"]) for each in found["runs"]
        },
        cache_bytes=found["bytes_per_codec"][run.cache.codec] + found["head_bytes"],
        seconds=found["estimated_seconds"]["extract"],
    )


def _sum(works: Sequence[Work | None]) -> Work | None:
    known = [work for work in works if work is not None]
    if len(known) < len(works) or not works:
        return None
    return Work(num_steps=sum(work.num_steps for work in known), num_tokens=sum(work.num_tokens for work in known))


def _work(step: Step, unread: Unread | None) -> Work | None:
    """Of one run; None where its samples are not planned before it begins: data without a teacher, live runs."""
    member = step.member
    if member is None or step.argv[0] != "train":
        return None
    train, weights = member.run.train, member.run.cache.weights
    if unread is not None:
        return unread.works[member.name]
    if not member.run.cache.path or not all((path / PLAN_FILE).exists() for path in member.run.cache.path):
        return None
    lengths, supervised = _planned(member)
    if weights and all(len(each) and each.any() for each in supervised):
        shares = Shares.of(lengths, supervised, weights, train.batch_tokens)
        return work_of(train, shares.num_steps, shares.num_tokens)
    together = np.concatenate(lengths)
    if not len(together):
        return None
    return work_of(train, num_steps(together, train.batch_tokens), int(together.sum()))


def work_of(train: TrainSpec, steps_per_epoch: int, num_tokens: int) -> Work:
    """Of a run whose epochs have so many steps and tokens."""
    steps = planned_steps(steps_per_epoch, epochs=train.epochs, max_steps=train.max_steps)
    return Work(num_steps=steps, num_tokens=round(num_tokens * steps / steps_per_epoch))


def _planned(member: Member) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Lengths and supervised tokens of the training samples of each of a run's caches."""
    caches = [Cache.open(path) for path in member.run.cache.path]
    fraction = max(one.plan.heldout_fraction for one in caches)
    if "heldout_fraction" in member.run.data.model_fields_set:
        fraction = member.run.data.heldout_fraction
    if member.run.loss.teacher_mix in ("distributions", "losses"):  # the first teacher's samples are those of all
        caches = [one for one in caches if one.plan.fingerprint.teacher == caches[0].plan.fingerprint.teacher]
    lengths, supervised = [], []
    for one in caches:
        ids = one.samples.column("content_id")
        trained = ~is_heldout(ids, fraction) & is_in_subset(ids, member.run.data.subset)
        lengths.append(one.num_tokens()[trained].astype(np.int64))
        supervised.append(one.num_supervised()[trained].astype(np.int64))
    return lengths, supervised


def _seconds(
    run: RunFile,
    left: Sequence[Step],
    works: Sequence[Work | None],
    params: Mapping[Path, int],
    unread: Unread | None,
) -> tuple[float | None, bool]:
    """Of all the work, and whether it is measured; None where it is not known."""
    if _sum(works) is None:
        return None, False
    tokens = [(_student(step), work.num_tokens) for step, work in zip(left, works, strict=True) if work is not None]
    rates = _rates(run)
    if unread is None and all(student in rates for student, _ in tokens):
        return sum(count / rates[student] for student, count in tokens) / min(run.sweep.jobs, len(left)), True
    if (speed := _machine_flops(run)) is None:
        return None, False
    trained = [count_trained(_student(step), _run(step).student) for step in left]
    flops = sum(step_flops(params[student], count, own) for (student, count), own in zip(tokens, trained, strict=True))
    return flops / speed + (0.0 if unread is None else unread.seconds), False


def _rates(run: RunFile) -> dict[Path, float]:
    """Tokens a second of the students that are finished, by their model: the slowest."""
    rates: dict[Path, float] = {}
    for member in members_of(run):
        if (state := state_of(member.output)).status == "finished" and state.rate:
            student = member.run.student.path
            assert student is not None, "steps_of has asked for it"
            rates[student] = min(state.rate, rates.get(student, state.rate))
    return rates


def _machine_flops(run: RunFile) -> float | None:
    """Operations a second of a matrix product on all of this machine; None where it has not the device.

    Timed by another process, as it may come to hold a GPU's memory.
    """
    words = [sys.executable, "-m", "kdpipe.stages.models.speed", run.train.dtype, run.train.device]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return float(done.stdout) if done.returncode == 0 else None


def _checkpoint_bytes(step: Step) -> int:
    """What a run keeps on the way, the one that is being written too."""
    run = _run(step)
    trained = count_trained(_student(step), run.student)
    return (run.train.keep + 1) * STATE_BYTES * trained if run.train.save_every else 0


def _require_room(prospect: Prospect, output: Path, caches: Sequence[Path]) -> None:
    """Raises SpaceError for a disk with less room than is wanted of it."""
    wanted: dict[int, int] = defaultdict(int)
    places = {_disk(output): output} | {_disk(path): path for path in caches[:1] if prospect.cache_bytes}
    wanted[_disk(output)] += prospect.student_bytes + prospect.checkpoint_bytes
    if prospect.cache_bytes:
        wanted[_disk(caches[0])] += prospect.cache_bytes
    for disk, need in wanted.items():
        if need > (free := free_bytes(places[disk])):
            raise SpaceError(
                f"the sweep needs {human_bytes(need)} here, {human_bytes(free)} are free; free some room, lower "
                "train.keep, or let fewer runs be at work at a time",
                where=places[disk],
            )


def _disk(place: Path) -> int:
    there = place.absolute()
    while not there.exists():
        there = there.parent
    return os.stat(there).st_dev
