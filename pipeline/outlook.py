"""Outlook: every figure of kdpipe plan, in one record: what was counted, asked, measured, and estimated of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdpipe.manifests.adapter import base_of
from kdpipe.manifests.sample import Sample, is_heldout, is_in_subset
from kdpipe.manifests.specs import RunFile
from kdpipe.manifests.specs.members import members_of
from kdpipe.manifests.specs.teacher import CUDA_BATCH_TOKENS
from kdpipe.pipeline.costs import (
    Rate,
    StudentCost,
    Work,
    break_even_epochs,
    cached_seconds,
    live_over_cached,
    live_seconds,
    student_cost,
    teacher_seconds,
)
from kdpipe.pipeline.forecast import (
    FLEET,
    break_even_students,
    count_trained,
    exported_bytes,
    forward_flops,
    frozen_bytes,
    step_flops,
)
from kdpipe.pipeline.memory import ModelSizes, extract_bytes, train_bytes
from kdpipe.pipeline.prospect import Work as Steps
from kdpipe.pipeline.prospect import work_of
from kdpipe.pipeline.room import Room, room_at
from kdpipe.stages.feed.lengths import steps_of

if TYPE_CHECKING:
    from kdpipe.stages.extract import Forecast

HOUR = 3600.0
RATES = {
    "measured": "teacher: measured here, on samples drawn from the data (see probe)",
    "given": "teacher: by the rate that was given",
    "estimated": "teacher: estimated, 2 operations a parameter and token at the speed of a matrix product timed here: "
    "a lower bound; --probe N measures it",
}
HOW = (
    "counted: samples, tokens, rows, bytes by codec, files; asked of the file system: free bytes, free files, quota",
    "students: estimated, 6 operations a parameter and token, at the operations a second that the teacher's rate says",
    "memory: estimated, by the formulas of pipeline/memory.py, without what the process holds when nothing is loaded",
)


@dataclass(kw_only=True, slots=True)
class Epoch:
    """What an epoch trains on."""

    num_samples: int = 0
    num_tokens: int = 0


class Epochs:
    """Of some runs: those of the samples that go by that are not held out and belong to a run's subset."""

    def __init__(self, runs: Sequence[RunFile]) -> None:
        self._epochs = {(run.data.heldout_fraction, run.data.subset): Epoch() for run in runs}

    def see(self, sample: Sample) -> None:
        content_id = np.frombuffer(sample.content_id, np.uint8)[None]
        for (heldout, subset), epoch in self._epochs.items():
            if not is_heldout(content_id, heldout)[0] and is_in_subset(content_id, subset)[0]:
                epoch.num_samples += 1
                epoch.num_tokens += len(sample.token_ids)

    def of(self, run: RunFile) -> Epoch:
        return self._epochs[run.data.heldout_fraction, run.data.subset]

    def steps(self, run: RunFile) -> Steps:
        """Of all its epochs, or as many as max_steps leaves."""
        epoch = self.of(run)
        if not epoch.num_samples:
            return Steps(num_steps=0, num_tokens=0)
        steps = steps_of(epoch.num_samples, epoch.num_tokens, run.train.batch_tokens)
        return work_of(run.train, steps, epoch.num_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What a plan comes to.

    num_runs: students, or 1 where none is named
    trained_tokens, epoch_tokens: of all runs, over all of their steps and in an epoch of each
    cache_bytes: by the codec that is asked for
    estimated_seconds: at a matrix product's speed; train: of all students, one after the other
    memory: of each stage, the most of all students
    """

    found: "Forecast"
    room: Room
    rate: Rate
    num_runs: int
    trained_tokens: int
    epoch_tokens: int
    cache_bytes: int
    work: Work
    students: Sequence[StudentCost]
    student_params: int | None
    estimated_seconds: Mapping[str, float]
    memory: Mapping[str, Mapping[str, int]]

    def figures(self, *, whole: bool) -> dict[str, object]:
        """As kdpipe plan shows them. whole: each student of a sweep too"""
        smallest = min(self.found.bytes_per_codec.values()) + self.found.head_bytes
        all_tokens = self.num_runs * self.found.num_tokens
        figures: dict[str, object] = {
            **asdict(self.found),
            "free_bytes": self.room.free_bytes,
            "fits": smallest <= self.room.free_bytes,
            "epochs": 0.0,
            "break_even_students": None,
            "break_even_epochs": None,
        }
        if self.epoch_tokens:
            passes = self.epoch_tokens / all_tokens
            figures |= {
                "epochs": self.trained_tokens / self.epoch_tokens,
                "break_even_students": break_even_students(Fraction(self.trained_tokens, all_tokens)),
                "break_even_epochs": {f"{count}": break_even_epochs(count, passes) for count in FLEET},
            }
        if self.student_params is not None:
            figures["student_params"] = self.student_params
        if self.students:
            figures["live_over_cached"] = {
                f"{count}": live_over_cached(self.work, self.rate, self.students, count) for count in FLEET
            }
        figures |= {"estimated_seconds": self.estimated_seconds, "room": self._room(), "teacher": self._teacher()}
        if self.students:
            figures |= {"students": self._students(), "total": self._total()}
        if whole and self.students:
            figures["runs"] = [asdict(each) for each in self.students]
        return {**figures, "memory": self.memory, "how": [RATES[self.rate.came], *HOW]}

    def _room(self) -> dict[str, object]:
        outputs = sum(each.output_bytes for each in self.students)
        files = self.room.most_files
        return {
            "cache_bytes": self.cache_bytes,
            "output_bytes": outputs,
            "files": self.found.num_files,
            "free_files": self.room.free_files,
            "quota_bytes": self.room.quota_bytes,
            "quota_files": self.room.quota_files,
            "fits": self.cache_bytes + outputs <= self.room.most_bytes
            and (files is None or self.found.num_files <= files),
        }

    def _teacher(self) -> dict[str, object]:
        seconds = teacher_seconds(self.work, self.rate)
        return {
            "tokens_per_second": self.rate.tokens_per_second,
            "rate": self.rate.came,
            "seconds": seconds,
            "hours": seconds / HOUR,
        }

    def _students(self) -> dict[str, object]:
        seconds = [each.seconds for each in self.students]
        return {
            "count": len(seconds),
            "num_steps": sum(each.num_steps for each in self.students),
            "trained_tokens": sum(each.trained_tokens for each in self.students),
            "seconds": sum(seconds),
            "hours": sum(seconds) / HOUR,
            "shortest_hours": min(seconds) / HOUR,
            "longest_hours": max(seconds) / HOUR,
        }

    def _total(self) -> dict[str, object]:
        cached, live = (way(self.work, self.rate, self.students) for way in (cached_seconds, live_seconds))
        return {"hours": cached / HOUR, "live_teacher_hours": live / HOUR, "live_over_cached": live / cached}


def students_of(run: RunFile) -> list[tuple[str, RunFile]]:
    """The students of a run file, by name: those of its sweep, or its one; none where it names none."""
    if run.sweep.grid or run.sweep.runs:
        return [(member.name, member.run) for member in members_of(run) if member.run.student.path is not None]
    return [] if run.student.path is None else [(run.student.path.name, run)]


def outlook_of(
    run: RunFile, found: "Forecast", params: Mapping[Path, int], rate: Rate | None, epochs: Epochs
) -> Outlook:
    """What a run file comes to. Loads torch, to time a matrix product and to read configs.

    params: parameters of each student, by its folder
    rate: the teacher's, measured or given; None estimates it
    epochs: of its students, or of itself where it names none; they have seen every sample
    """
    import torch

    from kdpipe.stages.models.device import pick_device
    from kdpipe.stages.models.speed import matmul_flops

    device = pick_device("auto")
    students = students_of(run)
    dtypes = {found.dtype, *(one.train.dtype for _, one in students)}
    speed = {name: matmul_flops(getattr(torch, name), device) for name in dtypes}
    seconds = {"extract": forward_flops(found.teacher_params, found.num_tokens) / speed[found.dtype]}
    if students:
        seconds["train"] = sum(_flops(one, epochs.steps(one), params) / speed[one.train.dtype] for _, one in students)
    work = Work(
        num_tokens=found.num_tokens,
        num_rows=found.num_rows,
        teacher_params=found.teacher_params,
        head_params=found.vocab_size * found.hidden_size,
    )
    rate = rate or Rate(tokens_per_second=found.num_tokens / seconds["extract"], came="estimated")
    runs = [one for _, one in students] or [run]
    return Outlook(
        found=found,
        room=room_at((*run.cache.path, Path())[0]),
        rate=rate,
        num_runs=len(runs),
        trained_tokens=sum(epochs.steps(one).num_tokens for one in runs),
        epoch_tokens=sum(epochs.of(one).num_tokens for one in runs),
        cache_bytes=found.bytes_per_codec[run.cache.codec] + found.head_bytes,
        work=work,
        students=[_cost(name, one, work, rate, params, epochs.steps(one)) for name, one in students],
        student_params=None if run.student.path is None else params[run.student.path],
        estimated_seconds=seconds,
        memory=_memory(run, found, students, params),
    )


def _flops(run: RunFile, steps: Steps, params: Mapping[Path, int]) -> int:
    assert run.student.path is not None, "students_of has looked"
    return step_flops(params[run.student.path], steps.num_tokens, count_trained(run.student.path, run.student))


def _cost(name: str, run: RunFile, work: Work, rate: Rate, params: Mapping[Path, int], steps: Steps) -> StudentCost:
    assert run.student.path is not None, "students_of has looked"
    return student_cost(
        name,
        params[run.student.path],
        work,
        rate,
        num_steps=steps.num_steps,
        trained_tokens=steps.num_tokens,
        export_bytes=exported_bytes(run),
        checkpoints=run.train.keep if run.train.save_every else 0,
        trained=count_trained(run.student.path, run.student),
    )


def _memory(
    run: RunFile, found: "Forecast", students: Sequence[tuple[str, RunFile]], params: Mapping[Path, int]
) -> dict[str, Mapping[str, int]]:
    """Of the teacher's pass, and of the student that takes most."""
    memory = {"extract": _extract_bytes(run, found)}
    if students:
        each = [_train_bytes(one, found, params) for _, one in students]
        memory["train"] = max(each, key=lambda parts: parts["total_bytes"])
    return memory


def _extract_bytes(run: RunFile, found: "Forecast") -> Mapping[str, int]:
    from kdpipe.stages.models.device import pick_device

    assert run.teacher.path is not None, "the command has asked for it"
    on_gpu = pick_device(run.engine.device).type == "cuda"
    tokens = run.engine.batch_tokens
    return extract_bytes(
        sizes_of(run.teacher.path, found.teacher_params),
        dtype=found.dtype,
        batch_tokens=(CUDA_BATCH_TOKENS if on_gpu else 0) if tokens is None else tokens,
        longest=found.longest,
        shard_rows=-(-found.num_rows // found.num_shards) if found.num_shards else 0,
    )


def _train_bytes(run: RunFile, found: "Forecast", params: Mapping[Path, int]) -> Mapping[str, int]:
    from kdpipe.pipeline.training import choose_device

    assert run.student.path is not None, "students_of has looked"
    device, gpus = choose_device(run.train.device)
    ranks = run.train.nproc or max(gpus, 1)
    return train_bytes(
        sizes_of(run.student.path, params[run.student.path]),
        dtype=run.train.dtype,
        batch_tokens=run.train.batch_tokens,
        longest=found.longest,
        ranks=ranks,
        sharded_over=run.train.fsdp.shard_size or ranks,
        grad_accum=run.train.grad_accum,
        grad_checkpointing=run.train.grad_checkpointing,
        device=device,
        teacher_width=found.hidden_size,
        teacher_vocab=found.vocab_size,
        teacher_dtype=found.dtype,
        supervised=min(found.num_rows / max(found.num_tokens, 1), 1.0),
        trained=count_trained(run.student.path, run.student),
        frozen_bytes=frozen_bytes(run.student.path, run.student),
    )


def sizes_of(folder: Path, params: int) -> ModelSizes:
    """Of the model in a folder, by its config."""
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(base_of(folder))
    return ModelSizes.of(config.get("text_config", config), params)
