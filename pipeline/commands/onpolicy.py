"""kdpipe onpolicy: the student writes answers, its teacher scores them, the student learns from that."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.ring import RingReader
from kdpipe.manifests.specs import LossSpec, RunFile
from kdpipe.pipeline.live_run import choose_ranks, forget, plan_folder_of, planned, run_live
from kdpipe.pipeline.options import RunCommand, json_option, require_not_swapped, resume_option, this_command
from kdpipe.pipeline.output import results_only, show
from kdpipe.pipeline.progress import EventLog, watch
from kdpipe.pipeline.training import train_rank

if TYPE_CHECKING:
    from kdpipe.stages.train import Found, Training


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
    write are the teacher's, written first. With --tee the student's answers and their rows are kept as a cache, from
    which further students train offline. Interrupted? The same command again goes on.
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
    run = _checked(run)
    device, nproc = choose_ranks(run, "onpolicy")
    from kdpipe.stages.live.kept import require_free, seal
    from kdpipe.stages.live.onpolicy import check_prompts, find_onpolicy  # torch takes seconds: not for --help
    from kdpipe.stages.train import Training, check_training
    from kdpipe.stages.train.output import Output

    folder = plan_folder_of(output, "onpolicy")
    with results_only():
        data = run.data.paths
        if run.live.seq_kd and run.live.lmbda < 1.0:
            run = _answered_by_teacher(run, answers_of(folder))
        plan = planned(run, folder, "onpolicy", keep_rows=False, prompts=True)
        training = Training(
            student=student,
            caches=(folder,),
            output=output,
            spec=run.training(),
            device=device,
            trust=run.student.trust_remote_code,
            resume=resume,
            made_with=this_command(
                teacher=run.teacher.path, student=student, prompts=data, output=output, cache=run.cache.path
            ),
        )
        found = check_training(training, nproc, find_onpolicy(training, run))
        check_prompts(found, run.live)
        training = replace(training, inputs=found.inputs)
        record = Output(output).finished(found.inputs)
        if run.live.tee is not None and record is None:
            require_free(run.live.tee, output)
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
        for path in (answers_of(folder), answers_of(folder).with_suffix(".jsonl.json")):
            path.unlink(missing_ok=True)
    show(metrics, as_json=as_json)


def _checked(run: RunFile) -> RunFile:
    """With what its keys imply for each other. Raises ConfigError for those that contradict."""
    live, loss = run.live, run.loss
    if live.overlap > live.staleness_bound:
        raise ConfigError(
            f"answers are {live.overlap} optimizer steps old when they are trained on, live.max_staleness allows "
            f"{live.staleness_bound}: all would be dropped; lower the one or raise the other",
            where="live.overlap",
        )
    if live.beta is not None:
        if loss.divergence != "jsd" and "divergence" in loss.model_fields_set:
            raise ConfigError(
                f"beta is that of the divergence jsd, loss.divergence is {loss.divergence}; leave one of them out",
                where="live.beta",
            )
        given = loss.model_dump(exclude_unset=True, exclude={"preset"} if loss.preset is None else set())
        loss = LossSpec.model_validate(given | {"divergence": "jsd", "options": {"beta": live.beta}})
    if live.temperature == 0.0 and live.samples_per_prompt > 1:
        raise ConfigError(
            f"temperature 0 writes the same answer {live.samples_per_prompt} times", where="live.samples_per_prompt"
        )
    return run.model_copy(update={"loss": loss})


def answers_of(folder: Path) -> Path:
    """Beside the plan's folder: the teacher's answers, until the run is finished."""
    return folder.with_name(f"{folder.name}.answers.jsonl")


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
