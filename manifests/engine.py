"""Engine options: how the model that gives rows or writes answers is run, as a run file says it."""

import json
from dataclasses import dataclass, replace

from kdpipe.manifests.specs import RunFile


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How an engine is run; what an engine has no use for must be left as it is here.

    tp, dp, pp, ep: tensor, data, pipeline and expert parallelism, in GPUs (dp: in copies of the model)
    quantization: of the teacher's weights, by the engine's own name for it ("fp8"); None runs them as they are
    mem_fraction: share of each GPU's memory for weights and KV cache; None lets the engine choose
    deterministic: ask for rows that do not depend on what else is in the engine, where its backend has such a mode
    timeout_s: longest silence, with requests in flight, before the engine is given up
    trust: digest of the teacher's own code that may run, or its start; None where it brings none
    arguments: further arguments of the engine by its own names, as text: ("kv_cache_dtype", "fp8_e5m2")
    """

    tp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    quantization: str | None = None
    mem_fraction: float | None = None
    deterministic: bool = False
    timeout_s: float = 600.0
    trust: str | None = None
    arguments: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, run: RunFile) -> "EngineOptions":
        """As a run file says it; its arguments are texts, as they are on a command line."""
        engine = run.engine
        return cls(
            tp=engine.tp,
            dp=engine.dp,
            pp=engine.pp,
            ep=engine.ep,
            quantization=engine.quantization,
            mem_fraction=engine.mem_fraction,
            deterministic=engine.deterministic,
            timeout_s=engine.timeout,
            trust=run.teacher.trust_remote_code,
            arguments=tuple((name.replace("-", "_"), _as_text(value)) for name, value in engine.args.items()),
        )

    def identity(self) -> dict[str, str]:
        """The part that decides what the rows are, beyond rounding; recorded in the plan.

        The teacher's own code is part of the teacher there.
        """
        named = {"quantization": self.quantization, "deterministic": "true" if self.deterministic else None}
        return dict(self.arguments) | {name: value for name, value in named.items() if value is not None}

    def like(self, identity: dict[str, str]) -> "EngineOptions":
        """These options, with the part that decides what the rows are as it is recorded."""
        others = tuple(
            (name, value) for name, value in identity.items() if name not in ("quantization", "deterministic")
        )
        return replace(
            self,
            quantization=identity.get("quantization"),
            deterministic=identity.get("deterministic") == "true",
            arguments=others,
        )


def _as_text(value: bool | int | float | str) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)
