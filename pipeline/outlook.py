"""Outlook: every figure of kdpipe plan, in one record: what was counted, asked, measured, and estimated of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.manifests.adapter import base_of
from kdpipe.manifests.specs import RunFile
from kdpipe.manifests.specs.members import members_of
from kdpipe.manifests.specs.teacher import CUDA_BATCH_TOKENS
from kdpipe.pipeline.costs import (
    Rate,
    StudentCost,
    Work,
    break_even_epochs,
    cached_seconds,
    live_seconds,
    student_cost,
    teacher_seconds,
)
from kdpipe.pipeline.forecast import (
    FLEET,
    break_even_students,
    compare,
    count_trained,
    exported_bytes,
    forward_flops,
    frozen_bytes,
    step_flops,
)
from kdpipe.pipeline.memory import ModelSizes, extract_bytes, train_bytes
from kdpipe.pipeline.room import Room, room_at

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What a plan comes to.

    cache_bytes: by the codec that is asked for
    estimated_seconds: at a matrix product's speed
    memory: of each stage, the most of all students
    """

    found: "Forecast"
    room: Room
    rate: Rate
    epochs: float
    cache_bytes: int
    work: Work
    students: Sequence[StudentCost]
    student_params: int | None
    estimated_seconds: Mapping[str, float]
    memory: Mapping[str, Mapping[str, int]]

    def figures(self, *, whole: bool) -> dict[str, object]:
        """As kdpipe plan shows them. whole: each student of a sweep too"""
        smallest = min(self.found.bytes_per_codec.values()) + self.found.head_bytes
        figures: dict[str, object] = {
            **asdict(self.found),
            "free_bytes": self.room.free_bytes,
            "fits": smallest <= self.room.free_bytes,
            "epochs": self.epochs,
            "break_even_students": break_even_students(self.epochs),
            "break_even_epochs": {f"{count}": break_even_epochs(count) for count in FLEET},
        }
        if self.student_params is not None:
            sizes = {"teacher_params": self.found.teacher_params, "student_params": self.student_params}
            figures |= {"student_params": self.student_params, "live_over_cached": compare(self.epochs, **sizes)}
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


def outlook_of(run: RunFile, found: "Forecast", params: Mapping[Path, int], rate: Rate | None) -> Outlook:
    """What a run file comes to. Loads torch, to time a matrix product and to read configs.

    params: parameters of each student, by its folder
    rate: the teacher's, measured or given; None estimates it
    """
    import torch

    from kdpipe.stages.models.device import pick_device
    from kdpipe.stages.models.speed import matmul_flops

    device = pick_device("auto")
    speed = {name: matmul_flops(getattr(torch, name), device) for name in {found.dtype, run.train.dtype}}
    seconds = {"extract": forward_flops(found.teacher_params, found.num_tokens) / speed[found.dtype]}
    own = None if run.student.path is None else params[run.student.path]
    if own is not None:
        assert run.student.path is not None, "its parameters are counted"
        trained = count_trained(run.student.path, run.student)
        seconds["train"] = step_flops(own, found.num_tokens, trained) * run.train.epochs / speed[run.train.dtype]
    work = Work(
        num_tokens=found.num_tokens,
        num_rows=found.num_rows,
        heldout_fraction=run.data.heldout_fraction,
        teacher_params=found.teacher_params,
        head_params=found.vocab_size * found.hidden_size,
    )
    rate = rate or Rate(tokens_per_second=found.num_tokens / seconds["extract"], came="estimated")
    students = students_of(run)
    return Outlook(
        found=found,
        room=room_at((*run.cache.path, Path())[0]),
        rate=rate,
        epochs=run.train.epochs,
        cache_bytes=found.bytes_per_codec[run.cache.codec] + found.head_bytes,
        work=work,
        students=[_cost(name, one, work, rate, params) for name, one in students],
        student_params=own,
        estimated_seconds=seconds,
        memory=_memory(run, found, students, params),
    )


def _cost(name: str, run: RunFile, work: Work, rate: Rate, params: Mapping[Path, int]) -> StudentCost:
    assert run.student.path is not None, "students_of has looked"
    return student_cost(
        name,
        params[run.student.path],
        work,
        rate,
        export_bytes=exported_bytes(run),
        epochs=run.train.epochs,
        batch_tokens=run.train.batch_tokens,
        subset=run.data.subset,
        max_steps=run.train.max_steps,
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
