"""kdpipe train: a student from caches, in this process or in one process a GPU."""

import os
from dataclasses import replace

import click

from kdpipe.manifests.specs import RunFile
from kdpipe.pipeline.options import RunCommand, group_for, json_option, require_not_swapped, resume_option, this_command
from kdpipe.pipeline.output import results_only, show
from kdpipe.pipeline.training import choose_device, choose_nproc, launch_training, train_rank


@click.command("train", cls=RunCommand)
@resume_option
@json_option
def command(run: RunFile, resume: str, as_json: bool) -> None:
    """Train a student from one or more caches; the teacher is not needed.

    Prints the final metrics. Events go to OUTPUT/events.jsonl. Under torchrun it is one rank of that launch.
    Interrupted? The same command again goes on from its last checkpoint. Ctrl-C, SIGTERM, SIGUSR2 and SIGHUP finish the
    step, save and exit (130 for Ctrl-C, 75 for the others); a second one ends it at once.

    \b
    kdpipe train --student models/small --cache /scratch/cache --output runs/a --set train.lr=3e-4 loss.temperature=2
    """
    student, caches, output = run.student.path, run.cache.path, run.train.output
    assert student is not None, "RunCommand has asked for it"
    assert output is not None, "RunCommand has asked for it"
    require_not_swapped(student, caches)
    from kdpipe.stages.train import Training, check_training  # torch takes seconds: not for --help or a misspelt option

    device, gpus = choose_device(run.train.device)
    nproc = choose_nproc(run.train.nproc, device, gpus)
    training = Training(
        student=student,
        caches=caches,
        output=output,
        spec=run.training(),
        device=device,
        io=run.cache.io,
        trust=run.student.trust_remote_code,
        resume=resume,
        group=group_for(run.train.group, output),
        made_with=this_command(student=student, cache=caches, output=output),
    )
    with results_only():
        found = check_training(training, nproc)
        if nproc == 1 or "RANK" in os.environ:
            metrics = train_rank(training, found)
        else:
            metrics = launch_training(replace(training, inputs=found.inputs), nproc)
    if os.environ.get("RANK", "0") == "0":
        show(metrics, as_json=as_json)
