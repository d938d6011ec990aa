"""The teacher: what it is, its head, the engines that run it, and the gate that believes none of them.

    describe  what a teacher folder holds, no weights loaded
    head      lm_head straight from the checkpoint's files, and what it makes of a row
    canary    that formula against the model's own logits, at the start
    gate      every sample's rows, before their shard is committed

Cost: importing this package loads no torch; `open_engine` does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from kdpipe.manifests.errors import ConfigError, nearest
from kdpipe.stages.teacher.engine import TeacherEngine

DtypeName = Literal["bfloat16", "float16", "float32"]
DeviceName = Literal["auto", "cpu", "cuda"]
OpenEngine = Callable[[Path, DtypeName, DeviceName, int], TeacherEngine]


def _transformers(path: Path, dtype: DtypeName, device: DeviceName, chunk_tokens: int) -> TeacherEngine:
    from kdpipe.stages.teacher.transformers_engine import TransformersEngine

    return TransformersEngine(path, dtype=dtype, device=device, chunk_tokens=chunk_tokens)


ENGINES: dict[str, OpenEngine] = {
    "transformers": _transformers,
}


def open_engine(
    name: str, path: Path, *, dtype: DtypeName, device: DeviceName = "auto", chunk_tokens: int = 8192
) -> TeacherEngine:
    """The engine called `name` with the teacher at `path` loaded. Raises ConfigError for a name not in ENGINES."""
    if name not in ENGINES:
        known = ", ".join(sorted(ENGINES))
        raise ConfigError(f"there is no engine '{name}'{nearest(name, ENGINES)} (known: {known})", where="--engine")
    return ENGINES[name](path, dtype, device, chunk_tokens)
