"""The records of a training run: of its finished student, and of each checkpoint on the way.

`kdpipe.json` is written last, so a folder that has it holds a finished student. A checkpoint's `checkpoint.json` is
written after every file it names, and the folder gets its name after that.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import JsonValue, field_validator

from kdpipe.manifests.made_with import MadeWith
from kdpipe.manifests.record import Record, read_record
from kdpipe.manifests.specs import RunSpec

RUN_FILE = "kdpipe.json"
CHECKPOINT_FILE = "checkpoint.json"
ROLLOUTS = "rollouts-*.jsonl"
"""Files of the answers that the student wrote itself, one for each rank."""
EVENTS = "events.jsonl"
LOG = "log.txt"
"""What a run of a sweep has printed, beside its student."""
TEACHERS = "teachers"
"""Folder of the teachers that a run has made of its student."""
TENSORBOARD, WANDB = "tensorboard", "wandb"
"""Folders of a run's figures as other programs read them (train.loggers)."""

METRICS = (
    "heldout_kl",
    "heldout_reverse_kl",
    "top1_agreement",
    "heldout_ce",
    "heldout_bits_per_byte",
    "perplexity",
    "teacher_ce",
    "num_tokens",
    "aligned_token_share",
    "aligned_byte_share",
    "exact_tokens",
    "shared_mass",
    "unmatched_mass",
)
"""In the order in which they are shown, whatever that of the keys in kdpipe.json; others come after them."""
ELASTIC = (
    "spec.train.grad_accum",
    "spec.train.eval_every",
    "spec.train.eval_tokens",
    "spec.train.save_every",
    "spec.train.save_minutes",
    "spec.train.keep",
    "spec.train.grad_checkpointing",
    "spec.train.fsdp.shard_size",
    "spec.train.fsdp.optimizer_on_cpu",
    "spec.train.fsdp.compile",
    "spec.loss.chunk_tokens",
)
"""Inputs that may change between a checkpoint and the run that goes on from it: the steps are the same with any."""


V = TypeVar("V")
Metrics = dict[str, int | float | str]
"""Figures by name, and the dtype they were measured in."""


class RunInputs(Record):
    """Everything a run's result depends on."""

    student: str
    """sha256 over the student's weight files and config, and its own code if it ran."""
    tokenizer: str = ""
    """sha256 over the student's tokenizer files, which are exported with it; "" in records of before they counted."""
    caches: tuple[str, ...]
    """Fingerprint of every cache trained on; none without a teacher."""
    codecs: tuple[str, ...] = ()
    """How the rows of each are stored, or of the cache that a side-car was made of; () where all are raw."""
    cache_weights: tuple[float, ...] = ()
    """Share of each cache in an epoch's supervised tokens; () where every sample comes once."""
    data: str = ""
    """sha256 over the samples trained on where they are the student's own: without a teacher, or aligned with those of
    caches; "" where caches hold them."""
    align: str = ""
    """The method by which a student with another tokenizer learns; "" where it has the teacher's."""
    heldout_fraction: float
    spec: RunSpec
    rollouts: dict[str, JsonValue] = {}  # noqa: RUF012 - pydantic copies it
    """How the student wrote answers of its own; {} where it wrote none."""

    def difference(self, other: "RunInputs", *, but: tuple[str, ...] = ()) -> str | None:
        """The first key in which the other differs and both values, in words; None where none does."""
        ours, theirs = (_leaves(one.model_dump(mode="json")) for one in (self, other))
        for key in sorted((ours.keys() | theirs.keys()) - set(but)):
            if ours.get(key) != theirs.get(key):
                return f"its {key} is {theirs.get(key)}, this run's is {ours.get(key)}"
        return None


def in_order(metrics: Mapping[str, V]) -> dict[str, V]:
    """The metrics in the order of METRICS, then others by their names."""
    known = [name for name in METRICS if name in metrics]
    return {name: metrics[name] for name in (*known, *sorted(metrics.keys() - set(known)))}


class WrittenFile(Record):
    """A file as it was written."""

    num_bytes: int
    digest: str
    """xxh3-128"""


class RunRecord(Record):
    """kdpipe.json"""

    inputs: RunInputs
    num_steps: int
    num_tokens: int
    num_skipped: int
    """Steps that changed nothing: loss or gradient was not finite, or there was no token to learn."""
    metrics: Metrics | None
    """Of the exported student on all held-out samples; None until it was measured, {} where none is held out."""
    files: dict[str, WrittenFile]
    """The student's files, by their names in the folder."""
    added_stops: tuple[int, ...] = ()
    """Ids at which its generation config says to stop because it was trained to end its answers with them."""
    made_with: MadeWith | None = None
    """The command that made it, for people; compared with nothing."""

    @field_validator("metrics")
    @classmethod
    def _in_order(cls, metrics: Metrics | None) -> Metrics | None:
        return None if metrics is None else in_order(metrics)


class CheckpointRecord(Record):
    """checkpoint.json: the state after `step` steps that is not in tensors. Random numbers are functions of the step.

    files: of rank 0, 1 ...; a file's name follows from its rank
    """

    format_version: int = 1
    inputs: RunInputs
    step: int
    num_tokens: int
    num_skipped: int
    lr_factor: float
    """1, halved with each step left out under train.on_nonfinite = "halve"."""
    batches: dict[str, JsonValue] = {}  # noqa: RUF012 - pydantic copies it
    """What the next steps depend on beside their number: {} where they are planned."""
    files: tuple[WrittenFile, ...]


def read_run(folder: Path) -> RunRecord | None:
    """The record of the run whose student is in `folder`; None where it is not a student of ours."""
    return read_record(folder / RUN_FILE, RunRecord)


def _leaves(tree: dict[str, Any]) -> dict[str, object]:
    """{"spec.train.lr": 0.0001, ...}"""

    def walk(branch: dict[str, Any], prefix: str) -> Iterator[tuple[str, object]]:
        for key, value in branch.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(tree, ""))
