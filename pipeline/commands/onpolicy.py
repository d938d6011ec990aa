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
from kdpipe.manifests.specs import LiveSpec, LossSpec, RunFile
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
    run = _checked(of_own(run))
    device, nproc = choose_ranks(run, "onpolicy")
    from kdpipe.stages.live.kept import require_free, seal, start_anew
    from kdpipe.stages.live.onpolicy import check_cache, check_prompts, find_onpolicy  # torch: not for --help
    from kdpipe.stages.train import check_training
    from kdpipe.stages.train.checkpoint import newest_record
    from kdpipe.stages.train.output import Output

    folder = plan_folder_of(output, "onpolicy")
    if run.live.teacher_update_every is not None:
        _require_same_model(run)
    with results_only():
        data = run.data.paths
        _require_this_run(run, output, resume)
        if run.live.seq_kd and run.live.lmbda < 1.0:
            run = _answered_by_teacher(run, answers_of(folder, output))
        made = this_command(
            teacher=run.teacher.path, student=student, prompts=data, output=output, cache=run.cache.path
        )
        training = training_of(run, folder, device, resume=resume, made_with=made)
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


OWN = Path("student")
"""As --teacher: the student itself, as it is at the start."""


def of_own(run: RunFile) -> RunFile:
    """With the student's folder as the teacher's, where the word for it is given and is no folder."""
    if run.teacher.path != OWN or OWN.exists():
        return run
    trust = run.teacher.trust_remote_code or run.student.trust_remote_code
    teacher = run.teacher.model_copy(update={"path": run.student.path, "trust_remote_code": trust})
    return run.model_copy(update={"teacher": teacher})


def _require_same_model(run: RunFile) -> None:
    """Of teacher and student. Raises ConfigError, and the errors of reading their configs."""
    from kdpipe.manifests.errors import StudentError, TeacherError
    from kdpipe.stages.live.updates import require_same_model
    from kdpipe.stages.models.folder import ModelFolder

    assert run.student.path is not None, "RunCommand has asked for it"
    assert run.teacher.path is not None, "RunCommand has asked for it"
    require_same_model(
        ModelFolder(run.student.path, StudentError, run.student.trust_remote_code),
        ModelFolder(run.teacher.path, TeacherError, run.teacher.trust_remote_code),
    )


def _check_updates(run: RunFile) -> None:
    """Raises ConfigError for what a teacher that is made anew cannot go with."""
    live = run.live
    if live.teacher_update_every is None:
        if live.ema:
            raise ConfigError(
                "nothing makes the teacher anew; say how often with --teacher-update-every, or leave it out",
                where="live.ema",
            )
        return
    for key, given, why in (
        (
            "live.overlap",
            live.overlap,
            "answers written ahead would have the rows of one teacher and the head of another",
        ),
        ("cache.path", run.cache.path, "its rows are those of the teacher at the start"),
        ("live.tee", live.tee, "a cache has the rows of one teacher"),
    ):
        if given:
            raise ConfigError(f"{why}; leave it out, or live.teacher_update_every", where=key)


def _checked(run: RunFile) -> RunFile:
    """With what its keys imply for each other. Raises ConfigError for those that contradict."""
    _check_updates(run)
    live, loss = run.live, run.loss
    if live.overlap > live.staleness_bound:
        raise ConfigError(
            f"answers are {live.overlap} optimizer steps old when they are trained on, live.max_staleness allows "
            f"{live.staleness_bound}: all would be dropped; lower the one or raise the other",
            where="live.overlap",
        )
    if live.importance_cap is not None:
        _check_importance(live)
    if live.beta is not None:
        if loss.divergence != "jsd" and "divergence" in loss.model_fields_set:
            raise ConfigError(
                f"beta is that of the divergence jsd, loss.divergence is {loss.divergence}; leave one of them out",
                where="live.beta",
            )
        given = loss.model_dump(exclude_unset=True, exclude={"preset"} if loss.preset is None else set())
        loss = LossSpec.model_validate(given | {"divergence": "jsd", "options": {"beta": live.beta}})
    if loss.kd_weight == 0.0:
        raise ConfigError(
            "0 leaves nothing to learn from the teacher; kdpipe train --data learns from the data's answers alone",
            where="loss.kd_weight",
        )
    if live.seq_kd and run.cache.path:
        raise ConfigError(
            "with --seq-kd the teacher's answers take the place of those whose rows it has; leave one of them out",
            where="--cache",
        )
    if live.temperature == 0.0 and live.samples_per_prompt > 1:
        raise ConfigError(
            f"temperature 0 writes the same answer {live.samples_per_prompt} times", where="live.samples_per_prompt"
        )
    return run.model_copy(update={"loss": loss})


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


def _check_importance(live: LiveSpec) -> None:
    """Raises ConfigError where importance weights would be none, or all 1."""
    if live.temperature == 0.0:
        raise ConfigError(
            "temperature 0 takes the most likely token, it draws none by a probability that could be compared; leave "
            "it out, or raise live.temperature",
            where="live.importance_cap",
        )
    if not live.overlap:
        raise ConfigError(
            "live.overlap 0 trains on every answer with the weights that wrote it, so all weights would be 1; leave it "
            "out, or set live.overlap",
            where="live.importance_cap",
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
