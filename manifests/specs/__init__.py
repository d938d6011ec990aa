"""Specs: what a run file may say, one model a table; every key has its unit, a misspelt one is an error.

Invariant: a spec that validated holds only known keys with values in range. Room: a table's module imports base.py
alone; run.py joins the tables and reads the file.
"""

from kdpipe.manifests.specs.base import (
    Device,
    DeviceChoice,
    Dtype,
    DtypeChoice,
    Flag,
    Io,
    RowsChoice,
    Spec,
    Unmatched,
)
from kdpipe.manifests.specs.cache import MAX_SHARD_TOKENS, SHARD_TOKENS, CacheSpec
from kdpipe.manifests.specs.data import DataSpec, DataTable
from kdpipe.manifests.specs.live import LiveSpec
from kdpipe.manifests.specs.loss import LOSS_OPTIONS, PRESETS, LossSpec, TeacherMix
from kdpipe.manifests.specs.members import Member, members_of, same_run, sweep_output
from kdpipe.manifests.specs.run import (
    RunFile,
    RunSpec,
    fields,
    flag_of,
    full_keys,
    load,
    misspelt_keys,
    override,
    with_keys,
)
from kdpipe.manifests.specs.slurm import Resources, SlurmSpec
from kdpipe.manifests.specs.student import OF_LORA, EvalSpec, StudentSpec, StudentTable
from kdpipe.manifests.specs.sweep import SweepSpec
from kdpipe.manifests.specs.teacher import EngineSpec, TeacherSpec
from kdpipe.manifests.specs.train import FsdpSpec, TrainSpec, TrainTable

__all__ = [
    "LOSS_OPTIONS",
    "MAX_SHARD_TOKENS",
    "OF_LORA",
    "PRESETS",
    "SHARD_TOKENS",
    "CacheSpec",
    "DataSpec",
    "DataTable",
    "Device",
    "DeviceChoice",
    "Dtype",
    "DtypeChoice",
    "EngineSpec",
    "EvalSpec",
    "Flag",
    "FsdpSpec",
    "Io",
    "LiveSpec",
    "LossSpec",
    "Member",
    "Resources",
    "RowsChoice",
    "RunFile",
    "RunSpec",
    "SlurmSpec",
    "Spec",
    "StudentSpec",
    "StudentTable",
    "SweepSpec",
    "TeacherMix",
    "TeacherSpec",
    "TrainSpec",
    "TrainTable",
    "Unmatched",
    "fields",
    "flag_of",
    "full_keys",
    "load",
    "members_of",
    "misspelt_keys",
    "override",
    "same_run",
    "sweep_output",
    "with_keys",
]
