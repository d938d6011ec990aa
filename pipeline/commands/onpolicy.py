"""kdpipe onpolicy: the student writes answers, its teacher scores them, the student learns from that."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.generated import SIDECAR_ENDING
from kdpipe.manifests.ring import RingReader
from kdpipe.manifests.specs import RunFile
from kdpipe.pipeline.live_keys import require_same_model, settled
from kdpipe.pipeline.live_run import (
    choose_ranks,
    forget,
    gone_if_refused,
    plan_folder_of,
    planned,
    run_live,
    training_of,
)
from kdpipe.pipeline.options import RunCommand, json_option, require_not_swapped, resume_option, this_command
from kdpipe.pipeline.output import results_only, show
from kdpipe.pipeline.progress import EventLog, watch
from kdpipe.pipeline.training import train_rank

if TYPE_CHECKING:
    from kdpipe.stages.train import Found, Training

ANSWERS = "answers.jsonl"
"""Of the teacher, with --seq-kd; as kdpipe generate writes them."""


@click.command("onpolicy", cls=RunCommand)
@resume_option
@json_option
def command(run: RunFile, resume: str, as_json: bool) -> None:
    """Train a student on answers that it writes itself, scored by its teacher over the whole vocabulary.

    At each step a share --lmbda of the samples is answered by the student as it is then, the others have the data's
    answer; the teacher scores both in a process of its own, through the same checks as extract. Prompts come from any
    data file: a conversation up to its last answer, one that ends with a question, or a column `prompt`. --beta 1 is
    the reverse KL, the usual choice where the student writes all (--lmbda 1). Rows of the data's answers that a
    finished cache of this teacher has are read from it (--cache). With --seq-kd the answers that the student does not
    write are the teacher's, written first. With --teacher student the teacher is the student as it is at the start, and
    --teacher-update-every makes it anew of the student on the way. With --tee the student's answers and their rows are
    kept as a cache, from which further students train offline. Interrupted? The same command again goes on.
    Prints the metrics of train, and rollout_kl, rollout_reverse_kl and rollout_top1_agreement: those of the student's
    own answers to held-out prompts.

    \b
    kdpipe onpolicy --teacher models/large --student models/small --prompts chat.jsonl --output runs/b \\
        --lmbda 1 --beta 1 --max-new-tokens 256
    """
    student, output = run.student.path, run.train.output
    assert student is not None, "RunCommand has asked for it"
    assert output is not None, "RunCommand has asked for it"
    require_not_swapped(student, ())
    run = settled(run)
    device, nproc = choose_ranks(run, "onpolicy")
    from kdpipe.stages.live.kept import require_free, seal, start_anew
    from kdpipe.stages.live.onpolicy import check_cache, check_prompts, find_onpolicy  # torch: not for --help
    from kdpipe.stages.train import check_training
    from kdpipe.stages.train.checkpoint import newest_record
    from kdpipe.stages.train.output import Output

    folder = plan_folder_of(output, "onpolicy")
    require_same_model(run)
    with results_only():
        data = run.data.paths
        _require_this_run(run, output, resume)
        if run.live.seq_kd and run.live.lmbda < 1.0:
            run = _answered_by_teacher(run, answers_of(folder, output))
        made = this_command(
            teacher=run.teacher.path, student=student, prompts=data, output=output, cache=run.cache.path
        )
        training = training_of(run, folder, device, resume=resume, made_with=made, data=run.data.paths)
        with gone_if_refused(folder):
            plan = planned(run, folder, "onpolicy", keep_rows=False, prompts=True)
            found = check_training(training, nproc, find_onpolicy(training, run))
            check_prompts(found, run.live)
            record = Output(output).finished(found.inputs)
            check_cache(run, found)
            if run.live.tee is not None and record is None:
                require_free(run.live.tee, output)
                if resume == "never" or newest_record(output) is None:
                    start_anew(run.live.tee, output)
        training = replace(training, inputs=found.inputs)
        if record is not None and record.metrics is not None:
            metrics = train_rank(training, found, command="onpolicy")
        else:
            most_rows = max(int(plan.samples.column("num_rows").max()), run.live.max_new_tokens)
            fed = partial(_fed_by, run=run)
            metrics = run_live(run, training, found, plan, nproc, fed, command="onpolicy", most_rows=most_rows)
        if run.live.tee is not None:
            with watch("onpolicy", EventLog(None)) as progress:
                seal(plan, output, run.live.tee, progress)
        forget(folder)
        _move_in(answers_of(folder, output), output)
    show(metrics, as_json=as_json)


def _require_this_run(run: RunFile, output: Path, resume: str) -> None:
    """The output is of no run whose answers were to be written otherwise. Raises ConfigError, by the key's name."""
    from kdpipe.manifests.run import read_run
    from kdpipe.stages.train.checkpoint import newest_record

    there = read_run(output) or (newest_record(output) if resume != "never" else None)
    for key, asked in run.live.rollouts().items() if there is not None and there.inputs.rollouts else ():
        made = there.inputs.rollouts.get(key) if there is not None else None
        if made != asked:
            raise ConfigError(
                f"it is the output of another run: its live.{key} is {made}, this run's is {asked}; choose another "
                "--output",
                where=output,
            )


def answers_of(folder: Path, output: Path) -> Path:
    """The teacher's answers: in the output of a finished run, until then beside the plan's folder."""
    there = output / ANSWERS
    return there if there.exists() else folder.with_name(f"{folder.name}.{ANSWERS}")


def _move_in(answers: Path, output: Path) -> None:
    """The teacher's answers into the output, where they are not yet."""
    for ending in (SIDECAR_ENDING, ""):
        path = answers.with_name(answers.name + ending)
        if path.exists():
            path.replace(output / (ANSWERS + ending))


def _answered_by_teacher(run: RunFile, out: Path) -> RunFile:
    """The run with the teacher's answers for its data, written where they are not there yet."""
    from kdpipe.stages.generate import GenerateSpec, generate

    assert run.teacher.path is not None, "RunCommand has asked for it"
    spec = GenerateSpec(
        model=run.teacher.path,
        prompts=run.data.paths,
        out=out,
        sampling=run.live.model_copy(update={"samples_per_prompt": 1}),
        seed=run.train.seed,
        data_spec=run.samples(),
        dtype=run.teacher.dtype,
        device=run.engine.device,
        engine=run.engine.name,
        options=EngineOptions.of(run),
    )
    with watch("onpolicy", EventLog(None), where=out) as progress:
        generate(spec, progress)
    return run.model_copy(update={"data": run.data.model_copy(update={"paths": (out,)})})


def _fed_by(training: "Training", ring: RingReader, found: "Found | None", *, run: RunFile) -> "Found":
    """What a rank trains on."""
    from kdpipe.stages.live.onpolicy import fed_by, find_onpolicy

    return fed_by(ring, found or find_onpolicy(training, run), training, run)
