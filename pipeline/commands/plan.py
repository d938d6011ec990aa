"""kdpipe plan: what an extraction would make and cost, before anything runs."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdpipe.manifests.specs import DtypeChoice, RowsChoice, RunSpec
from kdpipe.pipeline.forecast import (
    break_even_students,
    compare,
    count_parameters,
    forward_flops,
    free_bytes,
    step_flops,
)
from kdpipe.pipeline.options import PATH, Command, data_options, json_option, run_options, run_spec, trust_option
from kdpipe.pipeline.output import results_only, show
from kdpipe.pipeline.progress import EventLog, watch
from kdpipe.stages.teacher.engine import EngineOptions

if TYPE_CHECKING:
    from kdpipe.stages.extract import Forecast


@click.command("plan", cls=Command)
@data_options
@click.option("--cache", type=PATH, metavar="FOLDER", help="Where the cache would lie, for its disk.  [default: here]")
@trust_option
@click.option("--student", type=PATH, metavar="FOLDER", help="A student, to compare the cost with and without a cache.")
@run_options
@json_option
def command(
    teacher: Path,
    data: tuple[Path, ...],
    max_length: int | None,
    overlong: str | None,
    supervise: str | None,
    heldout_fraction: float | None,
    bad_records: str | None,
    max_bad: float | None,
    strict: bool | None,
    rows: RowsChoice,
    dtype: DtypeChoice,
    cache: Path | None,
    trust: str | None,
    student: Path | None,
    config: Path | None,
    sets: tuple[str, ...],
    as_json: bool,
) -> None:
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
    run = run_spec(
        config,
        sets,
        max_length=max_length,
        overlong=overlong,
        supervise=supervise,
        heldout_fraction=heldout_fraction,
        bad_records=bad_records,
        max_bad=max_bad,
        strict=strict,
    )
    student_params = None if student is None else count_parameters(student)
    # torch takes seconds: not for --help or a misspelt option
    from kdpipe.stages.extract import ExtractSpec, forecast
    from kdpipe.stages.student import check_student_of

    spec = ExtractSpec(
        teacher=teacher,
        data=data,
        data_spec=run.data,
        engine="auto",
        dtype=dtype,
        rows=rows,
        codec="raw",
        seed=0,
        device="auto",
        batch_tokens=None,
        options=EngineOptions(trust=trust),
    )
    with results_only(), watch("plan", EventLog(None)) as progress:
        if student is not None and (unchecked := check_student_of(student, teacher, trust)):
            progress.note(unchecked)
        found = forecast(spec, progress)
    worth = _worth(found, run, student_params, cache or Path())
    show(dataclasses.asdict(found) | worth | {"estimated_seconds": _time(found, run, student_params)}, as_json=as_json)


def _time(found: "Forecast", run: RunSpec, student_params: int | None) -> dict[str, float]:
    """Seconds of the teacher's pass and of a student's training on this machine, one device, at a product's speed."""
    import torch

    from kdpipe.stages.models.speed import matmul_flops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = {
        "extract": forward_flops(found.teacher_params, found.num_tokens)
        / matmul_flops(getattr(torch, found.dtype), device)
    }
    if student_params is not None:
        trained = step_flops(student_params, found.num_tokens) * run.train.epochs
        seconds["train"] = trained / matmul_flops(getattr(torch, run.train.dtype), device)
    return seconds


def _worth(found: "Forecast", run: RunSpec, student_params: int | None, folder: Path) -> dict[str, object]:
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
