"""Slurm: steps as the text of batch scripts. Settings in, text out; nothing here asks Slurm or touches a disk.

    Step, ... -> batches_of -> Batch (one sbatch: a job, or an array of like jobs) -> render -> text

A script is plain bash around the very commands that anybody could type; it can be read, edited and submitted by hand.
What it adds to them is the end of a job that is not finished: kdpipe's exit code 75 has the job queued again, so that
none ends as COMPLETED half-done. What Slurm does when, as it was seen to do: docs/slurm.md.
"""

import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from kdpipe.manifests.specs import Member, SlurmSpec
from kdpipe.manifests.submission import LOGS, RUN_COPY, Task
from kdpipe.pipeline.steps import EXTRACT, Step

MOST_TASKS = 1000
"""Tasks of an array; Slurm's own MaxArraySize is 1001, of which 0 is one."""
FIRST_PORT, PORTS = 20000, 10000
"""Where the ranks of several nodes meet, by the job's number: below the ports that a system hands out by itself."""
SHUTDOWN_S = 100
"""How long ranks have to save when torchrun has passed a signal on to them; pipeline/launch.py gives them as long."""
LAST_S = 300
"""How long the other nodes of a student have to end when the first has ended."""
QUICK_S, PAUSE_S = 60, 30
"""A command that ended within so many seconds without a signal is queued again after so many more."""

DIRECTIVES = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "reservation": "reservation",
    "gpus_per_node": "gpus-per-node",
    "gres": "gres",
    "cpus_per_task": "cpus-per-task",
    "mem": "mem",
    "time": "time",
    "mail_user": "mail-user",
    "mail_type": "mail-type",
}
"""Fields of [slurm] -> options of sbatch."""

ENDING = r"""
# 75 is kdpipe's word for "saved, not finished": the job is queued again and goes on from what it has saved.
# USR2 comes to this shell alone, before the time limit or at preemption; it is passed on. TERM comes to every process
# of the job at once, and none is passed on: it is cancelled, at its limit, or Slurm itself is queueing it again.
child='' asked='' heard='' code=0
on_usr2() {
  heard=1 asked=1
  [ -z "$child" ] || kill -USR2 "$child" 2>/dev/null
}
trap on_usr2 USR2
trap 'heard=1' TERM

run() { # run COMMAND...: leaves its exit code in $code; a signal does not end the wait for it
  "$@" &
  child=$!
  [ -z "$asked" ] || kill -USR2 "$child" 2>/dev/null
  heard=1
  while [ -n "$heard" ]; do
    heard=''
    wait "$child"
    code=$?
  done
  child=''
  # It was ended by the signal itself where it had not yet begun to listen.
  if [ -n "$asked" ] && [ "$code" -ge 128 ]; then code=75; fi
}

queue_again() {
  local job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID} try
  if [ "${SLURM_RESTART_COUNT:-0}" -ge MAX_REQUEUES ]; then
    echo "kdpipe: job $job has been queued again MAX_REQUEUES times (slurm.max_requeues): it fails" >&2
    return
  fi
  [ -n "$asked" ] || [ "$SECONDS" -ge QUICK_S ] || sleep PAUSE_S
  for try in 1 2 3 4 5; do
    case $(scontrol show job "$SLURM_JOB_ID" 2>/dev/null) in
      *JobState=CANCELLED*) return ;;
      *JobState=*) scontrol requeue "$job" && return ;;
    esac
    sleep "$try"
  done
  echo "kdpipe: job $job could not be queued again: it fails" >&2
}
"""

OVER_NODES = r"""
# kdpipe's ranks on all nodes: a torchrun on each, which passes signals on and gives its ranks time to save. Its exit
# code is 1 whatever theirs were; the last event of the run has kdpipe's own.
over_nodes() { # over_nodes OUTPUT WORDS...
  local output=$1
  shift
  MASTER_PORT=$((FIRST_PORT + SLURM_JOB_ID % NUM_PORTS)) run \
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" SRUN_OPTIONS --kill-on-bad-exit=0 --wait=LAST_S \
    CONTAINERbash -c 'exec torchrun --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node=NPROC \
      --master-addr="$SLURM_LAUNCH_NODE_IPADDR" --master-port="$MASTER_PORT" --shutdown-timeout=SHUTDOWN_S \
      --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 -m kdpipe.pipeline.cli "$@"' torchrun "$@"
  if [ "$code" -ne 0 ] && [ "$code" -ne 75 ]; then
    local said
    said=$(tail -n 1 "$output/events.jsonl" | sed -n 's/.*"exit_code": *\([0-9]*\).*/\1/p')
    code=${said:-${asked:+75}}
    code=${code:-1}
  fi
}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One sbatch: a job, or an array of jobs that ask for the same.

    name: of its script: "extract", "seal", "train", "train-2", "report"
    steps: of an array one a task; an extraction is one step of several
    indices: of the array's tasks; () is a job without an array
    spec: what each of its jobs asks for
    """

    name: str
    steps: tuple[Step, ...]
    indices: tuple[int, ...]
    spec: SlurmSpec

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the steps that come before, once each."""
        return tuple(dict.fromkeys(name for step in self.steps for name in step.needs))

    @property
    def whatever(self) -> bool:
        """Whether it starts however those ended."""
        return any(step.whatever for step in self.steps)

    def tasks(self, folder: Path) -> tuple[Task, ...]:
        """What the job does, or each task of the array; folder: where relative outputs begin"""
        step = self.steps[0]
        if step.parts > 1:
            output = str(folder / step.output)
            return tuple(
                Task(index=part, step=step.name, part=part, parts=step.parts, output=output) for part in self.indices
            )
        places: Sequence[int | None] = self.indices or (None,)
        return tuple(
            Task(index=index, step=step.name, output=str(folder / step.output))
            for index, step in zip(places, self.steps, strict=True)
        )


def batches_of(steps: Sequence[Step], spec: SlurmSpec, parts: Collection[int] | None = None) -> tuple[Batch, ...]:
    """The steps as jobs, in their order; students that ask for the same are the tasks of one array.

    parts: those of the extraction that are left to do; all of them when not given
    """
    found: list[Batch] = []
    for is_student, some in groupby(steps, key=lambda step: step.member is not None):
        if is_student:
            found += _arrays(tuple(some))
            continue
        for step in some:
            indices: tuple[int, ...] = ()
            if step.parts > 1:
                indices = tuple(range(1, step.parts + 1) if parts is None else sorted(parts))
            own = spec.for_extract() if step.name == EXTRACT else spec.for_light()
            found.append(Batch(name=step.name, steps=(step,), indices=indices, spec=own))
    return tuple(found)


def _arrays(students: Sequence[Step]) -> Iterator[Batch]:
    """Students as few arrays: of each, all tasks ask for the same."""
    alike: dict[tuple[str, SlurmSpec, int], list[Step]] = {}
    for step in students:
        assert step.member is not None, "only students are asked for"
        spec = step.member.run.slurm
        alike.setdefault((step.argv[0], spec, _nproc(step.member, spec)), []).append(step)
    names: Counter[str] = Counter()
    for (command, spec, _), steps in alike.items():
        for first in range(0, len(steps), MOST_TASKS):
            some = steps[first : first + MOST_TASKS]
            names[command] += 1
            name = command if names[command] == 1 else f"{command}-{names[command]}"
            indices = tuple(range(1, len(some) + 1)) if len(some) > 1 else ()
            yield Batch(name=name, steps=tuple(some), indices=indices, spec=spec)


def render(batch: Batch, *, folder: Path, submission: Path, name: str, python: Path | None) -> str:
    """The script of a batch.

    folder: where its commands work
    submission: folder with the copy of the run file, the scripts and the logs
    name: of the run; its job's name begins with it
    python: the Python that kdpipe is installed for; None where setup or the container say which it is
    """
    lines = [
        "#!/bin/bash",
        *_directives(batch, submission, name),
        "",
        *_remarks(batch, submission),
        "",
        f'cd {_quoted(folder)} || {{ echo "kdpipe: $(hostname) does not see this folder" >&2; exit 4; }}',
        *batch.spec.setup,
    ]
    if python is not None:
        lines.append(f'export PATH={_quoted(python.parent)}:"$PATH"')
    text = "\n".join(lines) + "\n" + _filled(ENDING, batch.spec)
    if _over_nodes(batch):
        member = batch.steps[0].member
        assert member is not None, "only students take several nodes"
        text += _filled(OVER_NODES, batch.spec, nproc=_nproc(member, batch.spec))
    return text + "\n" + "\n".join(_work(batch)) + '\n[ "$code" -ne 75 ] || queue_again\nexit "$code"\n'


def array_words(indices: Sequence[int], most: int | None = None) -> str:
    """[1, 2, 3, 7] -> "1-3,7"; with most 2 "1-3,7%2"."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    words = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return words if most is None else f"{words}%{most}"


def _directives(batch: Batch, submission: Path, name: str) -> Iterator[str]:
    spec, place = batch.spec, "%A_%a" if batch.indices else "%j"
    log = f"{str(submission / LOGS / batch.name).replace('%', '%%')}-{place}.txt"
    yield _directive("job-name", f"{name}-{batch.name}")
    if batch.indices:
        most = spec.extract_parallel if batch.name == EXTRACT else None
        yield _directive("array", array_words(batch.indices, most))
    yield _directive("nodes", spec.nodes)
    yield _directive("ntasks-per-node", 1)
    for field, option in DIRECTIVES.items():
        if (value := getattr(spec, field)) is not None and not (field == "gpus_per_node" and value == 0):
            yield _directive(option, value)
    yield _directive("output", log)
    yield _directive("open-mode", "append")
    yield "#SBATCH --requeue"
    yield _directive("signal", f"B:USR2@{spec.signal_seconds}")
    yield _directive("kill-on-invalid-dep", "yes")
    yield from (f"#SBATCH {option}" for option in spec.options)


def _remarks(batch: Batch, submission: Path) -> Iterator[str]:
    after = "afterany" if batch.whatever else "afterok"
    waits = f"--dependency={after}:{':'.join(name.upper() for name in batch.needs)} " if batch.needs else ""
    if len(waits) > 100:
        waits = f"--dependency={after}:... "
    yield f"# Made by kdpipe submit of {submission / RUN_COPY}; by hand: sbatch {waits}{batch.name}.sbatch"
    if batch.needs:
        names = ", ".join(batch.needs) if len(batch.needs) <= 4 else f"{batch.needs[0]} and {len(batch.needs) - 1} more"
        yield f"# It starts when {names} {'ended, however that was' if batch.whatever else 'ended well'}."


def _work(batch: Batch) -> Iterator[str]:
    """The commands: one, or a case for each task of the array."""
    if not batch.indices or batch.steps[0].parts > 1:
        yield _command(batch, batch.steps[0], "")
        return
    yield "case $SLURM_ARRAY_TASK_ID in"
    for index, step in zip(batch.indices, batch.steps, strict=True):
        yield f"  {index}) # {step.name}"
        yield f"{_command(batch, step, '    ')} ;;"
    yield "esac"


def _command(batch: Batch, step: Step, indent: str) -> str:
    """A step's words, each option on a line of its own."""
    if _over_nodes(batch):
        begin = f"over_nodes {_quoted(step.output)} {step.argv[0]}"
    else:
        begin = f"run {f'{batch.spec.container} ' if batch.spec.container else ''}kdpipe {step.argv[0]}"
    lines, line = [], begin
    for word in step.argv[1:]:
        if word.startswith("--"):
            lines.append(line)
            line = _quoted(word)
        else:
            line += f' "$SLURM_ARRAY_TASK_ID/{step.parts}"' if word == "{part}" else f" {_quoted(word)}"
    lines += [line, *_staging(batch, step)]
    if len(short := indent + " ".join(lines)) <= 100:
        return short
    return f" \\\n{indent}  ".join([indent + lines[0], *lines[1:]])


def _staging(batch: Batch, step: Step) -> Iterator[str]:
    spec = batch.spec
    if spec.stage_dir is None or step.member is None or not step.member.run.cache.path or step.argv[0] != "train":
        return
    with_variables = re.sub(r'(["\\`])', r"\\\1", spec.stage_dir)
    yield f'--stage-dir "{with_variables}"'
    if spec.stage_max_bytes is not None:
        yield f"--stage-max-bytes {spec.stage_max_bytes}"


def _filled(text: str, spec: SlurmSpec, nproc: int = 1) -> str:
    cpus = f" --cpus-per-task={spec.cpus_per_task}" if spec.cpus_per_task else ""
    places = {
        "MAX_REQUEUES": spec.max_requeues,
        "QUICK_S": QUICK_S,
        "PAUSE_S": PAUSE_S,
        "FIRST_PORT": FIRST_PORT,
        "NUM_PORTS": PORTS,
        "LAST_S": LAST_S,
        "SHUTDOWN_S": SHUTDOWN_S,
        "NPROC": nproc,
        "SRUN_OPTIONS": f"--ntasks-per-node=1{cpus}",
        "CONTAINER": f"{spec.container} " if spec.container else "",
    }
    return re.sub("|".join(places), lambda found: str(places[found[0]]), text)


def _over_nodes(batch: Batch) -> bool:
    return batch.spec.nodes > 1


def _nproc(member: Member, spec: SlurmSpec) -> int:
    """Ranks of each node: as train.nproc says, else one a GPU."""
    return member.run.train.nproc or spec.gpus_per_node or _gpus_of(spec.gres) or 1


def _gpus_of(gres: str | None) -> int:
    """GPUs in a list of generic resources: "gpu:a100:4,lscratch:100" -> 4."""
    counts = (word.split(":") for word in (gres or "").split(",") if word.partition(":")[0] == "gpu")
    return sum(int(parts[-1]) if parts[-1].isdecimal() else 1 for parts in counts)


def _directive(option: str, value: object) -> str:
    text = str(value)
    if re.search(r"[\s#'\"\\]", text):
        text = '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
    return f"#SBATCH --{option}={text}"


def _quoted(word: object) -> str:
    return shlex.quote(str(word))
