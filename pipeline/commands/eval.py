"""kdpipe eval: a student against its teacher on held-out rows."""

from pathlib import Path

import click

from kdpipe.manifests.specs import DeviceChoice, DtypeChoice, Io
from kdpipe.pipeline.options import (
    PATH,
    Command,
    Finite,
    OneOf,
    device_option,
    io_option,
    json_option,
    require_not_swapped,
    run_options,
    run_spec,
    trust_option,
)
from kdpipe.pipeline.output import results_only, show
from kdpipe.pipeline.progress import EventLog, watch


@click.command("eval", cls=Command)
@click.option("--student", type=PATH, required=True, metavar="FOLDER", help="Student in Hugging Face format.")
@click.option("--cache", type=PATH, required=True, metavar="FOLDER", help="A complete cache of its teacher.")
@click.option(
    "--heldout-fraction",
    type=Finite(0, 1),
    help="Share of the samples to measure on, chosen by content.  [default: the student's, else the cache's]",
)
@trust_option
@io_option
@device_option
@click.option(
    "--dtype",
    type=OneOf(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    help="Precision of the student; auto is the one its weights are stored in.",
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    help="Tokens of a forward pass.  [default: train.batch_tokens of the run file, 16384]",
)
@run_options
@json_option
def command(
    student: Path,
    cache: Path,
    heldout_fraction: float | None,
    trust: str | None,
    io: Io,
    device: DeviceChoice,
    dtype: DtypeChoice,
    batch_tokens: int | None,
    config: Path | None,
    sets: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure a student on the held-out rows of a cache; no teacher is loaded.

    Prints heldout_kl (teacher to student), heldout_reverse_kl, heldout_ce and teacher_ce as means per supervised token
    in nats, top1_agreement as a share, and perplexity.

    \b
    kdpipe eval --student runs/a --cache /scratch/cache --json
    """
    require_not_swapped(student, (cache,))
    run = run_spec(config, sets)
    from kdpipe.stages.evaluate import (
        evaluate_student,
    )  # torch takes seconds: not for --help or a misspelt option

    if heldout_fraction is None and "heldout_fraction" in run.data.model_fields_set:
        heldout_fraction = run.data.heldout_fraction
    with results_only(), watch("eval", EventLog(None)) as progress:
        metrics = evaluate_student(
            student,
            cache,
            heldout_fraction=heldout_fraction,
            device=device,
            dtype=dtype,
            batch_tokens=batch_tokens or run.train.batch_tokens,
            progress=progress,
            io=io,
            trust=trust,
        )
    show(metrics, as_json=as_json)
