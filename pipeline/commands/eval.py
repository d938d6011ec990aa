"""kdpipe eval: a student against its teacher on held-out rows."""

from pathlib import Path

import click

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.specs import RunFile
from kdpipe.pipeline.options import RunCommand, json_option, require_not_swapped
from kdpipe.pipeline.output import results_only, show
from kdpipe.pipeline.progress import EventLog, watch


@click.command("eval", cls=RunCommand)
@json_option
def command(run: RunFile, as_json: bool) -> None:
    """Measure a student on the held-out rows of a cache, or of several; no teacher is loaded.

    Prints heldout_kl (teacher to student), heldout_reverse_kl, heldout_ce and teacher_ce as means per supervised token
    in nats, top1_agreement as a share, and perplexity. On caches of several teachers, heldout_kl_teacher_1 and so on
    are those from each. heldout_bits_per_byte compares students of different tokenizers: the cross-entropy over the
    bytes of the text. A student with another tokenizer than the teacher's needs --data, what the cache was made of.

    \b
    kdpipe eval --student runs/a --cache /scratch/cache --json
    """
    student, caches = _student(run), run.cache.path
    require_not_swapped(student, caches)
    from kdpipe.stages.evaluate import evaluate_student  # torch takes seconds: not for --help or a misspelt option

    heldout_fraction = run.eval.heldout_fraction
    if heldout_fraction is None and "heldout_fraction" in run.data.model_fields_set:
        heldout_fraction = run.data.heldout_fraction
    with results_only(), watch("eval", EventLog(None)) as progress:
        metrics = evaluate_student(
            student,
            caches,
            heldout_fraction=heldout_fraction,
            device=run.eval.device,
            dtype=run.eval.dtype,
            batch_tokens=run.eval.batch_tokens or run.train.batch_tokens,
            progress=progress,
            io=run.cache.io,
            trust=run.student.trust_remote_code,
            loss=run.loss,
            unmatched=run.cache.unmatched,
            data=run.data.paths,
            data_spec=run.samples(),
            workers=run.data.workers,
        )
    show(metrics, as_json=as_json)


def _student(run: RunFile) -> Path:
    """The student that is meant: by name, else what the run file trains. Raises ConfigError."""
    for path in (run.eval.student, run.train.output, run.student.path):
        if path is not None:
            return path
    raise ConfigError("option '--student' is missing, or eval.student of a run file", where="kdpipe eval")
