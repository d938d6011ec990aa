"""Precheck: what the commands of a run's students would refuse, asked of them before a job is sent.

A process of its own, as it loads torch, which `kdpipe submit` and `sweep` do not: (config, sets) -> refusal or None.
Where the cache is complete all that `kdpipe train` checks is checked, as on a CPU, once for each student and cache;
before that the loss, the student against its teacher, and the output.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kdpipe.manifests.errors import BusyError, KdpipeError, TemporaryError, error_of, fields_of
from kdpipe.manifests.specs import Member, load, members_of
from kdpipe.pipeline.steps import disk_of

PATIENCE_S = 900
"""Weights of students are digested, on a disk that may be slow."""
REFUSED = 64
"""Exit code of the process where its last line is the reason."""


def require_trainable(
    config: Path | None, sets: Sequence[str], folder: Path | None = None, *, but_busy: bool = False
) -> None:
    """Raises what the students' commands would refuse, naming the run.

    folder: where the commands will run, when not here; but_busy: an output where a run is at work now is no refusal
    """
    asked = json.dumps({"config": config and str(config), "sets": list(sets), "but_busy": but_busy})
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=PATIENCE_S, cwd=folder, check=False
        )
    except subprocess.TimeoutExpired:
        raise TemporaryError(f"models and cache could not be checked in {PATIENCE_S} s; run it again") from None
    last = done.stdout.strip().splitlines()[-1:] or ["{}"]
    if done.returncode == REFUSED:
        raise error_of(json.loads(last[0]))
    if done.returncode:
        raise KdpipeError(f"the check of the students ended with {done.returncode}: {done.stderr.strip()[-300:]}")


def check(config: Path | None, sets: tuple[str, ...], *, but_busy: bool = False) -> tuple[Member, KdpipeError] | None:
    """The first member that would be refused, and why; as in require_trainable."""
    run = load(config, sets)
    disk, seen = disk_of(run), dict[object, bool]()
    for member in members_of(run):
        if member.name in disk.finished:
            continue
        model = (member.run.student.path, member.run.cache.path)
        try:
            if run.sweep.command == "train" and set(member.run.cache.path) <= disk.complete and model not in seen:
                seen[model] = _check_training(member)
            else:
                seen[model] = _check_start(member, run.sweep.command, across=seen.get(model))
        except BusyError as err:
            if not but_busy:
                return member, err
        except KdpipeError as err:
            return member, err
    return None


def _check_training(member: Member) -> bool:
    """As `kdpipe train` does, for a run that begins; whether its student has another tokenizer than the teacher."""
    from kdpipe.stages.train import Training, check_training

    run = member.run
    assert run.student.path is not None, "steps_of has asked for it"
    if not run.cache.path:
        return _check_start(member, "train")  # its data are read by the job alone
    spec = run.training()
    eager = spec.train.model_copy(update={"fsdp": spec.train.fsdp.model_copy(update={"compile": False})})
    training = Training(
        student=run.student.path,
        caches=run.cache.path,
        max_codec_kl=run.cache.max_codec_kl,
        data=run.data.paths,
        align=run.student.align,
        align_floor=run.student.align_floor,
        workers=run.data.workers,
        output=member.output,
        spec=spec,
        device="cpu",
        io=run.cache.io,
        trust=run.student.trust_remote_code,
    )
    nproc = run.slurm.nodes * (run.train.nproc or 1)
    found = check_training(replace(training, spec=spec.model_copy(update={"train": eager})), nproc)
    return found.crossing is not None


def _check_start(member: Member, command: str, *, across: bool | None = None) -> bool:
    """What can be said without the cache; whether its student has another tokenizer than the teacher.

    command: that is run; across: whether it has, of a student that was checked with another run
    """
    from kdpipe.stages.live.onpolicy import check_across
    from kdpipe.stages.loss import find_divergence
    from kdpipe.stages.loss.cross import check_loss
    from kdpipe.stages.student import check_student_of, has_other_tokenizer, method_of
    from kdpipe.stages.train.output import Output

    run = member.run
    if across is None:
        across = False
        if run.student.path is not None and run.teacher.path is not None:
            given = run.student.path, run.teacher.path, run.teacher.trust_remote_code
            check_student_of(*given)
            across = has_other_tokenizer(*given)
    if across:
        check_loss(method_of(run.student.align), run.loss)
        if command == "onpolicy":
            check_across(run.live, member.output)
    else:
        find_divergence(run.loss.divergence).resolve(run.loss.options)
    Output(member.output).require_free()
    return across


def main() -> None:
    asked = json.load(sys.stdin)
    config = asked["config"] and Path(asked["config"])
    refused = check(config, tuple(asked["sets"]), but_busy=asked["but_busy"])
    if refused is not None:
        member, err = refused
        fields = fields_of(err)
        print(json.dumps(fields | {"message": f"run {member.name}: {fields['message']}"}))
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
