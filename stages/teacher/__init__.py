"""The teacher: what it is, its head, the engines that run it, and the gate that believes none of them.

    describe  what a teacher folder holds, no weights loaded
    head      lm_head straight from the checkpoint's files
    canary    that formula against the model's own logits, and an engine's rows against transformers', at the start
    gate      every sample's rows, before their shard is committed

Cost: importing this package loads no torch; engine_class does.
"""

import importlib
from dataclasses import dataclass

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.nearest import nearest
from kdpipe.manifests.specs import Device
from kdpipe.stages.teacher.engine import TeacherEngine

ENGINES: dict[str, str | type[TeacherEngine]] = {
    "transformers": "kdpipe.stages.teacher.transformers_engine:TransformersEngine",
    "sglang": "kdpipe.stages.teacher.sglang_engine:SglangTeacher",
}
"""Engines by name, as "module:class" or as the class."""


def engine_class(name: str) -> type[TeacherEngine]:
    """The engine of a name in ENGINES; loads its module, and torch with it."""
    entry = ENGINES[name]
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    found: type[TeacherEngine] = getattr(importlib.import_module(module), attribute)
    return found


SGLANG_TRIED = {"LlamaForCausalLM", "Qwen3ForCausalLM"}
"""Architectures whose rows were compared with transformers' (tests/stages/teacher/test_sglang_engine.py)."""


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
        version = engine_class("sglang").version()
    except ConfigError as err:
        return Choice(name="transformers", reason=str(err.args[0]))
    return Choice(name="sglang", reason=f"{version} is installed and runs {architecture}")
