"""The teacher: what it is, its head, the engines that run it, and the gate that believes none of them.

    describe  what a teacher folder holds, no weights loaded
    head      lm_head straight from the checkpoint's files, and what it makes of a row
    canary    that formula against the model's own logits, at the start
    gate      every sample's rows, before their shard is committed

Cost: importing this package loads no torch; `open_engine` does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdpipe.manifests.errors import ConfigError, nearest
from kdpipe.manifests.specs import DeviceChoice, Dtype
from kdpipe.stages.teacher.engine import TeacherEngine


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineKind:
    """One way to run a teacher: `version()` names its libraries, `open(path, dtype, device, chunk_tokens)` loads it."""

    version: Callable[[], str]
    open: Callable[[Path, Dtype, DeviceChoice, int], TeacherEngine]


def _transformers_version() -> str:
    from kdpipe.stages.teacher.transformers_engine import library_version

    return library_version()


def _open_transformers(path: Path, dtype: Dtype, device: DeviceChoice, chunk_tokens: int) -> TeacherEngine:
    from kdpipe.stages.teacher.transformers_engine import TransformersEngine

    return TransformersEngine(path, dtype=dtype, device=device, chunk_tokens=chunk_tokens)


ENGINES: dict[str, EngineKind] = {
    "transformers": EngineKind(version=_transformers_version, open=_open_transformers),
}


def pick_engine(name: str) -> str:
    """The engine a name stands for: "auto" is transformers. Raises ConfigError for a name not in ENGINES."""
    if name == "auto":
        return "transformers"
    if name not in ENGINES:
        known = ", ".join(sorted(ENGINES))
        raise ConfigError(
            f"there is no engine '{name}'{nearest(name, ENGINES)} (known: auto, {known})", where="--engine"
        )
    return name


def engine_version(name: str) -> str:
    """Versions of the libraries an engine runs on; part of the plan."""
    return ENGINES[pick_engine(name)].version()


def open_engine(
    name: str, path: Path, *, dtype: Dtype, device: DeviceChoice = "auto", chunk_tokens: int = 8192
) -> TeacherEngine:
    """The engine called `name` with the teacher at `path` loaded. Raises ConfigError for a name not in ENGINES."""
    return ENGINES[pick_engine(name)].open(path, dtype, device, chunk_tokens)
