"""[slurm]: what a cluster is asked for, and how its jobs are run; docs/slurm.md shows it at work.

Resources are what a job asks for; [slurm] has those of the students' jobs, [slurm.extract] and [slurm.light] what is
otherwise for the extraction's and for those that need no GPU. Cost: none, this is text until `kdpipe submit`.
"""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from kdpipe.manifests.specs.base import Count, Flag, Spec

OURS = (
    "array",
    "chdir",
    "comment",
    "dependency",
    "error",
    "job-name",
    "kill-on-invalid-dep",
    "no-requeue",
    "open-mode",
    "output",
    "parsable",
    "requeue",
    "signal",
    "test-only",
    "wait",
    "wrap",
)
"""Options of sbatch that a submission stands on, so that slurm.options may not have them."""
SHORT = {"-a": "array", "-c": "cpus-per-task", "-d": "dependency", "-D": "chdir", "-e": "error", "-J": "job-name"}
SHORT |= {"-o": "output", "-W": "wait"}
TIME = re.compile(r"\d+|\d+:\d+|\d+:\d+:\d+|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)


def _as_text(given: Any) -> Any:
    """A number, and a time that TOML has read as one of the day, is the text it was written as."""
    return given if given is None or isinstance(given, str | bool | list | tuple | dict) else str(given)


def _lines(given: Any) -> Any:
    return given.strip("\n").split("\n") if isinstance(given, str) else given


def _one_line(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("expected one line of text")
    return text


def _like(pattern: re.Pattern[str], what: str) -> AfterValidator:
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(f"expected {what}")
        return text

    return AfterValidator(check)


Line = Annotated[str, AfterValidator(_one_line)]
Word = Annotated[str, _like(re.compile(r"[^\s'\"\\$`;|<>]+"), "a name without spaces or quotes")]
Lines = Annotated[tuple[str, ...], BeforeValidator(_lines)]
Duration = Annotated[
    str, BeforeValidator(_as_text), _like(TIME, "a time as Slurm takes it: minutes, 2:30:00 or 1-12:00:00")
]
Memory = Annotated[str, BeforeValidator(_as_text), _like(MEMORY, "an amount of memory as Slurm takes it: 64G or 500M")]


class Resources(Spec):
    """What a job asks for. What is not given is left to the cluster's defaults."""

    partition: Annotated[Word | None, Flag(takes="NAME")] = None
    """Partition, or several with commas between."""
    account: Annotated[Word | None, Flag(takes="NAME")] = None
    """Account that is charged."""
    qos: Annotated[Word | None, Flag(takes="NAME")] = None
    """Quality of service."""
    constraint: Annotated[Line | None, Flag(takes="FEATURES")] = None
    """Features that a node must have: a100&nvlink for example."""
    reservation: Annotated[Word | None, Flag(takes="NAME")] = None
    """Reservation to run in."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """GPUs of each node; 0 asks for none."""
    gres: Annotated[Word | None, Flag(takes="LIST")] = None
    """Generic resources of each node as Slurm takes them, gpu:a100:4 for example, in place of gpus_per_node."""
    cpus_per_task: Count | None = None
    """Cores of each node; kdpipe uses as many threads as it is given cores."""
    mem: Annotated[Memory | None, Flag(takes="SIZE")] = None
    """Memory of each node: 64G for example; 0 is all of it."""
    time: Annotated[Duration | None, Flag(takes="TIME")] = None
    """Time limit: minutes, hours:minutes:seconds or days-hours. A job that reaches it saves and is queued again."""
    options: Annotated[Lines, Flag(takes="OPTION")] = ()
    """Any further option of sbatch, as a #SBATCH line has it: ["--exclusive", "--switches=1"]."""

    @field_validator("options")
    @classmethod
    def _not_ours(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if not option.startswith("-") or not option.isprintable():
                raise ValueError(f"expected an option of sbatch such as --exclusive, got {option!r}")
            name = option.split("=")[0].split()[0]
            name = SHORT.get(name, name.removeprefix("--"))
            if name in OURS:
                raise ValueError(f"{option!r} is what kdpipe submit sets itself; leave it out")
        return options


class SlurmSpec(Resources):
    """[slurm]: how `kdpipe submit` runs a run file on a cluster."""

    nodes: Count = 1
    """Nodes of a student: with more than one it trains under srun and torchrun, gloo or nccl between the nodes."""
    extract_tasks: Count = 1
    """Jobs that share the extraction, as the tasks of one array; each has a range of the cache's shards."""
    extract_parallel: Count | None = None
    """Of them at most so many at a time; as many as there is room for when not given."""
    signal_seconds: Annotated[int, Field(ge=1, le=65535)] = 120
    """Seconds before the time limit at which a job is asked to save; Slurm may ask a minute earlier. A checkpoint must
    be written within them."""
    max_requeues: Annotated[int, Field(ge=0)] = 20
    """How often a job is queued again, after preemption, at its time limit or for a temporary failure, before it
    fails."""
    setup: Annotated[Lines, Flag(takes="LINES")] = ()
    """Lines of shell that each job begins with: ["module load cuda", "source venv/bin/activate"]."""
    python: Annotated[Path | None, Flag(takes="FILE")] = None
    """The Python that kdpipe is installed for, on the nodes; that of `kdpipe submit` when neither this nor setup nor
    container is given."""
    container: Annotated[Line | None, Flag(takes="WORDS")] = None
    """Words before each command, which put it into a container: apptainer exec --nv --bind /scratch kdpipe.sif"""
    mail_user: Annotated[Word | None, Flag(takes="ADDRESS")] = None
    """Who is written to; mail_type says of what."""
    mail_type: Annotated[Word | None, Flag(takes="LIST")] = None
    """END,FAIL for example."""
    stage_dir: Annotated[Line | None, Flag(takes="FOLDER")] = None
    """Folder on the nodes' own disks to which a cache is copied before a student trains from it, once for all jobs of a
    node; may have variables of the node's shell, /local/$USER for example."""
    stage_max_bytes: Count | None = None
    """Bytes of copies that stage_dir keeps; those that were used last, and those in use, stay."""
    answer_seconds: Annotated[float, Field(gt=0.0)] = 30.0
    """How long an answer of sbatch, squeue or scancel is waited for."""
    extract: Resources = Resources()
    """Of the extraction's jobs, where they ask for other than the students'."""
    light: Resources = Resources()
    """Of the jobs that need no GPU, the check of the cache and the report; one node without GPUs when not given."""

    def for_extract(self) -> "SlurmSpec":
        """As the extraction's jobs ask: one node each, with what [slurm.extract] says otherwise."""
        return self._with(self.extract, nodes=1)

    def for_light(self) -> "SlurmSpec":
        """As jobs without a GPU ask."""
        return self._with(self.light, nodes=1, gpus_per_node=None, gres=None)

    def _with(self, other: Resources, **changes: object) -> "SlurmSpec":
        said: dict[str, object] = {name: getattr(other, name) for name in other.model_fields_set}
        if said.keys() & {"gres", "gpus_per_node"}:  # the one is said in place of the other
            changes |= {"gres": None, "gpus_per_node": None}
        return self.model_copy(update=changes | said)
