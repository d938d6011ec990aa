"""Reads: the one table of what each command reads of the run file, and so of the options that it has."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kdpipe.manifests.specs import fields, flag_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Reads:
    """What a command reads of the run file; a run file may hold the rest, for other commands.

    options: keys, and tables for all their keys, that have an option, in the order of --help
    others: keys and tables that have none; --set reaches both
    needs: keys without which there is nothing to do
    renamed: options that have another name here: {"data.paths": "--prompts"}
    sections: tables whose options --help shows apart, by what it says over them
    but: keys of these tables that are not read
    passes_on: whether it hands all but its own table to other commands
    """

    options: tuple[str, ...]
    others: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)
    but: tuple[str, ...] = ()
    passes_on: bool = False

    def flag(self, key: str) -> str:
        """The name of a key's option."""
        return self.renamed.get(key) or str(flag_of(key).name)

    def of_options(self) -> list[str]:
        """The keys that have an option."""
        keys = dict.fromkeys(key for each in self.options for key in fields() if within(key, each))
        return [key for key in keys if key not in self.but]

    def includes(self, key: str) -> bool:
        """Whether the command reads a key, or some of a table."""
        read = any(within(key, read) or within(read, key) for read in (*self.options, *self.others))
        return read and key not in self.but


OF_CACHES = ("data.heldout_fraction", "data.subset", "data.max_length", "data.overlong", "data.supervise")
"""Keys of [data] that kdpipe train asks a cache about too; the others are for data without one."""


def within(key: str, table: str) -> bool:
    """Whether a key is the other one, or in it where that is a table."""
    return f"{key}.".startswith(f"{table}.")


READS = {
    "plan": Reads(
        options=(
            "teacher.path",
            "data.paths",
            "data",
            "cache.rows",
            "teacher",
            "cache.path",
            "student.path",
            "cache.codec",
            "cache.codec_kl",
            "cache.codec_bytes",
            "cache.shard_tokens",
            "engine.name",
            "engine.device",
            "engine.batch_tokens",
        ),
        others=("engine", "student", "loss", "train", "live", "sweep"),
        needs=("teacher.path", "data.paths"),
    ),
    "extract": Reads(
        options=(
            "teacher.path",
            "data.paths",
            "cache.path",
            "data",
            "cache.rows",
            "cache.codec",
            "cache.codec_kl",
            "cache.codec_bytes",
            "cache.shard_tokens",
            "cache.seed",
            "teacher",
            "engine",
            "cache.group",
        ),
        needs=("teacher.path", "data.paths", "cache.path"),
        but=("data.subset",),
    ),
    "train": Reads(
        options=(
            "student.path",
            "cache.path",
            "data.paths",
            "train.output",
            "train.nproc",
            "train.device",
            "loss.preset",
            "cache.stage_dir",
            "cache.stage_max_bytes",
            "cache.io",
            "cache.max_codec_kl",
            "student",
            "train.group",
            "data",
        ),
        others=("loss", "train", "cache.weights", "cache.unmatched"),
        needs=("student.path", "train.output"),
        sections={"data": "With --data, in place of --cache"},
    ),
    "stream": Reads(
        options=(
            "teacher.path",
            "student.path",
            "data.paths",
            "train.output",
            "engine.name",
            "train.nproc",
            "data",
            "teacher.dtype",
            "teacher.trust_remote_code",
            "engine.batch_tokens",
            "engine.tp",
            "engine.dp",
            "engine.quantization",
            "engine.args",
            "loss.preset",
            "live.tee",
            "live.ring_mib",
            "live.teacher_cores",
            "live.teacher_gpus",
            "live.student_gpus",
            "train.device",
        ),
        others=("teacher", "engine", "student", "cache.seed", "loss", "train"),
        needs=("teacher.path", "student.path", "data.paths", "train.output"),
    ),
    "onpolicy": Reads(
        options=(
            "teacher.path",
            "student.path",
            "data.paths",
            "train.output",
            "live.lmbda",
            "live.beta",
            "live.seq_kd",
            "live.samples_per_prompt",
            "live.max_new_tokens",
            "live.truncated",
            "live.temperature",
            "live.top_p",
            "live.top_k",
            "live.overlap",
            "live.max_staleness",
            "live.importance_cap",
            "live.rollout_engine",
            "live.rollout_tp",
            "live.rollout_mem_fraction",
            "live.teacher_update_every",
            "live.ema",
            "live.tee",
            "cache.path",
            "engine.name",
            "train.nproc",
            "data",
            "teacher.dtype",
            "teacher.trust_remote_code",
            "engine.batch_tokens",
            "engine.tp",
            "engine.dp",
            "engine.quantization",
            "engine.args",
            "loss.preset",
            "live.ring_mib",
            "live.teacher_cores",
            "live.teacher_gpus",
            "live.student_gpus",
            "cache.io",
            "train.device",
        ),
        others=("teacher", "engine", "student", "cache.seed", "loss", "train"),
        needs=("teacher.path", "student.path", "data.paths", "train.output"),
        renamed={"data.paths": "--prompts"},
    ),
    "generate": Reads(
        options=(
            "teacher.path",
            "data.paths",
            "live.samples_per_prompt",
            "live.max_new_tokens",
            "live.temperature",
            "live.top_p",
            "live.top_k",
            "data.max_length",
            "data.where",
            "data.bad_records",
            "data.max_bad",
            "data.strict",
            "teacher.dtype",
            "engine.name",
            "engine.device",
            "engine.tp",
            "engine.dp",
            "engine.pp",
            "engine.ep",
            "engine.quantization",
            "engine.mem_fraction",
            "engine.deterministic",
            "engine.args",
            "engine.timeout",
            "teacher.trust_remote_code",
        ),
        needs=("teacher.path", "data.paths"),
        renamed={"teacher.path": "--model", "data.paths": "--prompts"},
    ),
    "eval": Reads(
        options=("eval.student", "cache.path", "data.paths", "eval", "cache.io", "student.trust_remote_code"),
        others=(
            "student.path",
            "train.output",
            "data.heldout_fraction",
            "data.max_length",
            "data.bad_records",
            "data.max_bad",
            "data.strict",
            "data.workers",
            "train.batch_tokens",
            "loss.teacher_mix",
            "loss.teacher_weights",
            "cache.unmatched",
        ),
        needs=("cache.path",),
    ),
    "sweep": Reads(
        options=("sweep.jobs", "sweep.output"),
        others=("sweep", "teacher", "engine", "data", "cache", "student", "loss", "train", "live"),
        passes_on=True,
    ),
    "submit": Reads(
        options=(),
        others=("slurm", "sweep", "teacher", "engine", "data", "cache", "student", "loss", "train", "live"),
        passes_on=True,
    ),
    "cache verify": Reads(options=("teacher.path", "teacher.trust_remote_code", "engine.tp", "cache.io")),
}


def readers(key: str) -> str:
    """The commands that read a key: "kdpipe train, stream or onpolicy"."""
    read = [name for name, reads in READS.items() if reads.includes(key)]
    *names, last = [name for name in read if not READS[name].passes_on] or read
    return f"kdpipe {', '.join(names)} or {last}" if names else f"kdpipe {last}"
