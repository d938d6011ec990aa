"""What SGLang is started with: its ServerArgs and its environment, made of kdpipe's options.

Pure but for the number of cores. What kdpipe must decide itself (OURS) cannot be overridden.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from kdpipe.manifests.cores import given_cores, num_cores
from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.specs import Device, Dtype
from kdpipe.stages.sglang.host import SWITCH

CPU_TOKENS = 65536
"""Tokens of KV cache on a CPU, where SGLang would otherwise take a share of the machine's memory."""

SPARE_POSITIONS = 16

OURS = {
    "model_path", "device", "dtype", "tp_size", "dp_size", "pp_size", "ep_size", "quantization", "mem_fraction_static",
    "enable_deterministic_inference", "disable_radix_cache", "skip_tokenizer_init", "enable_return_hidden_states",
    "trust_remote_code", "custom_weight_loader", "weight_version",
}  # fmt: skip
"""Arguments that this file decides; each has an option of its own, or rows would be wrong with another value."""


def check_options(options: EngineOptions, device: Device) -> None:
    """Raises ConfigError for what SGLang cannot have, or must not."""
    if options.deterministic and device == "cpu":
        raise ConfigError(
            "SGLang's attention on a CPU has no deterministic mode; --engine transformers repeats bit for bit there",
            where="--deterministic",
        )
    if options.pp > 1:
        raise ConfigError(
            "SGLang does not hand hidden states on between pipeline stages; use --tp, or --dp for several copies",
            where="--pp",
        )
    for name, _ in options.arguments:
        if name in OURS:
            raise ConfigError(f"'{name}' is set by kdpipe; see kdpipe extract --help", where="--engine-arg")


def server_arguments(
    path: Path,
    dtype: Dtype,
    max_positions: int | None,
    device: Device,
    options: EngineOptions,
    own: dict[str, Any],
) -> dict[str, Any]:
    """SGLang's ServerArgs, pure.

    path: must hold the very code that options.trust allows, where it allows any
    max_positions: longest text the model's config allows, None where it names none
    own: what those need who will ask it
    """
    check_options(options, device)
    given = {name: parsed(value) for name, value in options.arguments}
    arguments: dict[str, Any] = {
        "model_path": str(path),
        "device": device,
        "dtype": dtype,
        "tp_size": options.tp,
        "dp_size": options.dp,
        "ep_size": options.ep,
        "quantization": options.quantization,
        "mem_fraction_static": options.mem_fraction,
        "enable_deterministic_inference": options.deterministic,
        "skip_tokenizer_init": True,  # ids go in and come out
        "log_level": "warning",
        "random_seed": 0,
        "trust_remote_code": True if options.trust else None,
    }
    if device == "cpu":
        arguments |= {
            "attention_backend": "torch_native",
            "sampling_backend": "pytorch",
            "disable_cuda_graph": True,
            # Of memory that others use too; the cache itself is bounded by max_total_tokens.
            "mem_fraction_static": options.mem_fraction or 0.5,
            "sleep_on_idle": True,
            "max_total_tokens": max(CPU_TOKENS, 2 * (max_positions or 0)),
        }
    if max_positions is not None:
        # SGLang keeps six places of the context for itself; the plan has no sample longer than the model's own.
        arguments["context_length"] = max_positions + SPARE_POSITIONS
    return {name: value for name, value in (arguments | own | given).items() if value is not None}


def parsed(value: str) -> Any:
    """A value of --engine-arg: JSON where it is JSON (4096, true, {"a": 1}), else the text as it is."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def host_environment(folder: Path, device: Device, options: EngineOptions) -> dict[str, str]:
    """The environment of the host and all it starts."""
    env = dict(os.environ) | {
        SWITCH: "1",
        "TMPDIR": str(folder),  # sockets that SGLang leaves behind go with it; what torch compiled stays
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        or str(Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"),
        "HF_MODULES_CACHE": str(folder / "modules"),  # a model's own code runs from here, and from nowhere else
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
    }
    if device == "cpu":
        ranks = options.tp * options.dp
        env["SGLANG_USE_CPU_ENGINE"] = "1"
        env["OMP_NUM_THREADS"] = str(max(1, num_cores() // ranks))
        if ranks > 1:
            env.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(core_groups(ranks)))
    return env


def core_groups(ranks: int) -> list[str]:
    """This process's cores dealt to the ranks in equal runs, as "0,1"; where there are fewer, ranks share them."""
    given = given_cores()
    cores = given.numbers or sorted(os.sched_getaffinity(0))[: given.count]  # SGLang wants numbers of its ranks
    size = max(1, len(cores) // ranks)
    return [",".join(str(cores[(rank * size + i) % len(cores)]) for i in range(size)) for rank in range(ranks)]
