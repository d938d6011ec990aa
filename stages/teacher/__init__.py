"""The teacher: what it is, its head, the engines that run it, and the gate that believes none of them.

    describe  what a teacher folder holds, no weights loaded
    head      lm_head straight from the checkpoint's files, and what it makes of a row
    canary    that formula against the model's own logits, and an engine's rows against transformers', at the start
    gate      every sample's rows, before their shard is committed

Cost: importing this package loads no torch; using an entry of ENGINES does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.nearest import nearest
from kdpipe.manifests.specs import Device, Dtype
from kdpipe.stages.teacher.engine import Determinism, EngineOptions, TeacherEngine


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineKind:
    """One way to run a teacher.

    version: names its libraries; ConfigError where they are absent or were not tried
    determinism: whether the same planned batch gives the same bits again; ConfigError for options it cannot have
    open: the engine; it may start only when it is used
    batches_itself: a planned batch is not run as one
    """

    version: Callable[[], str]
    determinism: Callable[[Device, EngineOptions], Determinism]
    open: Callable[[Path, Dtype, Device, EngineOptions], TeacherEngine]
    batches_itself: bool


def _transformers_version() -> str:
    from kdpipe.stages.teacher.transformers_engine import library_version

    return library_version()


def _transformers_determinism(device: Device, options: EngineOptions) -> Determinism:
    if options != EngineOptions(timeout_s=options.timeout_s, trust=options.trust):
        raise ConfigError(
            "the transformers engine runs one copy of the teacher on one device as its checkpoint is; "
            "parallelism, quantization and engine arguments are for --engine sglang",
            where="--engine transformers",
        )
    return "bitwise" if device == "cpu" else "tolerance"


def _open_transformers(path: Path, dtype: Dtype, device: Device, options: EngineOptions) -> TeacherEngine:
    from kdpipe.stages.teacher.transformers_engine import TransformersEngine

    return TransformersEngine(path, dtype=dtype, device=device, trust=options.trust)


def _sglang_version() -> str:
    from kdpipe.stages.teacher.sglang.teacher import library_version

    return library_version()


def _sglang_determinism(device: Device, options: EngineOptions) -> Determinism:
    from kdpipe.stages.teacher.sglang.arguments import check_options

    check_options(options, device)
    return "bitwise" if options.deterministic else "tolerance"


def _open_sglang(path: Path, dtype: Dtype, device: Device, options: EngineOptions) -> TeacherEngine:
    from kdpipe.stages.teacher.sglang.teacher import SglangTeacher

    return SglangTeacher(path, dtype=dtype, device=device, options=options)


ENGINES: dict[str, EngineKind] = {
    "transformers": EngineKind(
        version=_transformers_version,
        determinism=_transformers_determinism,
        open=_open_transformers,
        batches_itself=False,
    ),
    "sglang": EngineKind(
        version=_sglang_version, determinism=_sglang_determinism, open=_open_sglang, batches_itself=True
    ),
}

SGLANG_TRIED = {"LlamaForCausalLM", "Qwen3ForCausalLM"}
"""Architectures whose rows were compared with transformers' (tests/stages/teacher/sglang/test_teacher.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The engine that a name stands for, and why in a few words."""

    name: str
    reason: str


def pick_engine(name: str, *, architecture: str, device: Device) -> Choice:
    """The engine a name stands for. Raises ConfigError for a name not in ENGINES.

    "auto" is sglang on a GPU, where it is installed in a version that was tried and so was the architecture. On a CPU
    it is transformers: it starts at once, and its rows do not depend on what else is in a batch.
    """
    if name != "auto":
        if name not in ENGINES:
            known = ", ".join(sorted(ENGINES))
            raise ConfigError(
                f"there is no engine '{name}'{nearest(name, ENGINES)} (known: auto, {known})", where="--engine"
            )
        return Choice(name=name, reason="as asked")
    if device == "cpu":
        return Choice(name="transformers", reason="no GPU: it starts at once and its rows repeat bit for bit")
    if architecture not in SGLANG_TRIED:
        return Choice(name="transformers", reason=f"{architecture} was not tried with sglang; --engine sglang tries it")
    try:
        version = ENGINES["sglang"].version()
    except ConfigError as err:
        return Choice(name="transformers", reason=str(err.args[0]))
    return Choice(name="sglang", reason=f"{version} is installed and runs {architecture}")
