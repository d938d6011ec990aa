"""kdpipe plan: what an extraction and its students would make and cost, before anything runs."""

import dataclasses

import click

from kdpipe.manifests.specs import RunFile
from kdpipe.pipeline.costs import From, Rate
from kdpipe.pipeline.forecast import count_parameters
from kdpipe.pipeline.options import Finite, RunCommand, json_option
from kdpipe.pipeline.outlook import Epochs, outlook_of, students_of
from kdpipe.pipeline.output import results_only, show, table
from kdpipe.pipeline.progress import EventLog, watch


@click.command("plan", cls=RunCommand)
@click.option(
    "--probe",
    "probed",
    type=click.IntRange(min=1),
    metavar="N",
    help="Run N samples of the data through the teacher for real, on this machine, and reckon with its speed.",
)
@click.option(
    "--teacher-tokens-per-second",
    "given_rate",
    type=Finite(min=0.0, min_open=True),
    metavar="NUMBER",
    help="Reckon with this speed of the teacher: of another machine, or of all the jobs of an extraction together.",
)
@json_option
def command(run: RunFile, probed: int | None, given_rate: float | None, as_json: bool) -> None:
    """Forecast a cache and its students: reads the data, the tokenizers and the configs; writes nothing.

    Counted: samples, tokens, rows, bytes by codec, files. Asked: free disk, inodes and quota. Measured: with --probe,
    which alone runs the teacher, its speed, and what each codec takes and loses. All else is estimated, and `how` says
    by what: fisher's bytes too, by those of another teacher.

    With --student, or a run file with [student] or [sweep], also what the students come to, in hours and bytes;
    live_over_cached is the cost with a live teacher over that with a cache, break_even_students and break_even_epochs
    where the two are equal. Without a rate of the teacher the hours are a lower bound: operations at the speed of a
    matrix product that is timed here. A student that train would refuse is refused here; the hours of one with
    another tokenizer are reckoned with the teacher's tokens.

    \b
    kdpipe plan --teacher models/large --data chat.jsonl more.parquet --cache /scratch/cache --probe 32
    kdpipe plan --config sweep.toml --teacher-tokens-per-second 250000 --json
    """
    if probed is not None and given_rate is not None:
        raise click.UsageError("--probe measures the rate that --teacher-tokens-per-second gives; take one of the two")
    students = [one for _, one in students_of(run)]
    folders = {run.student.path, *(one.student.path for one in students)}
    params = {path: count_parameters(path) for path in folders if path is not None}
    # torch takes seconds: not for --help or a misspelt option
    from kdpipe.stages.extract import ExtractSpec, forecast
    from kdpipe.stages.student import check_student_of

    with results_only(), watch("plan", EventLog(None)) as progress:
        spec, epochs = ExtractSpec.of(run), Epochs(students or [run])
        for path in params:
            trust = run.student.trust_remote_code or run.teacher.trust_remote_code
            if unchecked := check_student_of(path, spec.teacher, trust):
                progress.note(unchecked)
        if probed:
            from kdpipe.stages.extract.probe import Drawn, probe

            drawn = Drawn(probed)
            found = forecast(spec, progress, epochs.see, drawn.see)
            measured = probe(spec, drawn.samples(), progress)
            found = found.measured({name: each["share_of_raw"] for name, each in measured.codecs.items()}, spec)
        else:
            found, measured = forecast(spec, progress, epochs.see), None
    given = measured.tokens_per_second if measured is not None else given_rate
    came: From = "measured" if measured is not None else "given"
    rate = None if given is None else Rate(tokens_per_second=given, came=came)
    outlook = outlook_of(run, found, params, rate, epochs)
    figures = outlook.figures(whole=as_json)
    record = None if measured is None else dataclasses.asdict(measured)
    codecs = {} if record is None or as_json else record.pop("codecs")
    show(figures if record is None else {**figures, "probe": record}, as_json=as_json)
    if codecs:
        rows = ({"codec": name} | {key: f"{value:.3g}" for key, value in each.items()} for name, each in codecs.items())
        click.echo("\n" + table([*rows]))
