"""kdpipe plan: what an extraction would make and cost, before anything runs."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdpipe.manifests.specs import RunFile
from kdpipe.pipeline.forecast import (
    break_even_students,
    compare,
    count_parameters,
    forward_flops,
    free_bytes,
    step_flops,
)
from kdpipe.pipeline.options import RunCommand, json_option
from kdpipe.pipeline.output import results_only, show
from kdpipe.pipeline.progress import EventLog, watch

if TYPE_CHECKING:
    from kdpipe.stages.extract import Forecast


@click.command("plan", cls=RunCommand)
@json_option
def command(run: RunFile, as_json: bool) -> None:
    """Forecast a cache without running the teacher: reads the data, the tokenizer and the config; writes nothing.

    Prints samples, tokens, rows, bytes by codec, free disk, and break_even_students: how many students it takes until
    one teacher pass for the cache is less than the passes of a live teacher, one in each epoch (train.epochs) of each
    student. With --student, live_over_cached is the total cost with a live teacher over that with a cache, for 1 to 16
    students, at 2 operations a parameter and token for the teacher and 6 for the student; disk time is not counted.
    estimated_seconds are these operations at the speed of a matrix product that is timed here, on one GPU where there
    are any: a lower bound, real runs take longer. A student that train would refuse, for another
    tokenizer, is refused here.

    \b
    kdpipe plan --teacher models/large --data chat.jsonl more.parquet --cache /scratch/cache
    """
    student_params = None if run.student.path is None else count_parameters(run.student.path)
    # torch takes seconds: not for --help or a misspelt option
    from kdpipe.stages.extract import ExtractSpec, forecast
    from kdpipe.stages.student import check_student_of

    with results_only(), watch("plan", EventLog(None)) as progress:
        spec = ExtractSpec.of(run)
        trust = run.student.trust_remote_code or run.teacher.trust_remote_code
        if run.student.path is not None and (unchecked := check_student_of(run.student.path, spec.teacher, trust)):
            progress.note(unchecked)
        found = forecast(spec, progress)
    worth = _worth(found, run, student_params, (*run.cache.path, Path())[0])
    show(dataclasses.asdict(found) | worth | {"estimated_seconds": _time(found, run, student_params)}, as_json=as_json)


def _time(found: "Forecast", run: RunFile, student_params: int | None) -> dict[str, float]:
    """Seconds of the teacher's pass and of a student's training on this machine, one device, at a product's speed."""
    import torch

    from kdpipe.stages.models.device import pick_device
    from kdpipe.stages.models.speed import matmul_flops

    device = pick_device("auto")
    seconds = {
        "extract": forward_flops(found.teacher_params, found.num_tokens)
        / matmul_flops(getattr(torch, found.dtype), device)
    }
    if student_params is not None:
        trained = step_flops(student_params, found.num_tokens) * run.train.epochs
        seconds["train"] = trained / matmul_flops(getattr(torch, run.train.dtype), device)
    return seconds


def _worth(found: "Forecast", run: RunFile, student_params: int | None, folder: Path) -> dict[str, object]:
    """Whether the cache fits on the disk and when it pays."""
    epochs, free = run.train.epochs, free_bytes(folder)
    worth: dict[str, object] = {
        "free_bytes": free,
        "fits": min(found.bytes_per_codec.values()) + found.head_bytes <= free,
        "epochs": epochs,
        "break_even_students": break_even_students(epochs),
    }
    if student_params is not None:
        ratios = compare(epochs, teacher_params=found.teacher_params, student_params=student_params)
        worth |= {"student_params": student_params, "live_over_cached": ratios}
    return worth
