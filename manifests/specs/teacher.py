"""[teacher] and [engine]: the model whose rows are kept, and what runs it."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from kdpipe.manifests.specs.base import CodeDigest, Count, DeviceChoice, DtypeChoice, Flag, Spec

CUDA_BATCH_TOKENS = 16384
"""engine.batch_tokens on a GPU, where it is not given."""


class TeacherSpec(Spec):
    """[teacher]: the model whose rows are kept."""

    path: Annotated[Path | None, Flag("--teacher", "FOLDER")] = None
    """Teacher in Hugging Face format, with tokenizer."""
    dtype: DtypeChoice = "auto"
    """Precision of the teacher and of the stored rows; auto is that of its checkpoint."""
    trust_remote_code: Annotated[CodeDigest | None, Flag(takes="DIGEST")] = None
    """Run the Python code that the teacher's folder brings (auto_map in its configs), if its sha256 is this one, or
    starts with it (12 digits or more). Without it such a model is refused and nothing of it runs; the message names
    the files to read and their digest. Code of another repository is never fetched."""


class EngineSpec(Spec):
    """[engine]: what runs the teacher, and how."""

    name: Annotated[str, Flag("--engine", "NAME")] = "auto"
    """What runs the teacher: transformers or sglang; auto takes sglang on a GPU where version and architecture were
    tried, else transformers; it says why."""
    device: DeviceChoice = "auto"
    """Where the teacher runs; auto takes GPUs where there are any."""
    batch_tokens: Annotated[int, Field(ge=0)] | None = None
    """transformers: tokens of a teacher batch, padding included; 0 runs samples alone; when not given 0 on cpu, 16384
    on cuda."""
    tp: Count = 1
    """sglang: GPUs that share each layer."""
    dp: Count = 1
    """sglang: copies of the teacher."""
    pp: Count = 1
    """sglang: pipeline stages."""
    ep: Count = 1
    """sglang: GPUs that share the experts."""
    quantization: Annotated[str | None, Flag(takes="NAME")] = None
    """sglang: run the weights quantised, fp8 for example."""
    mem_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """sglang: share of a GPU's memory for weights and KV cache; sglang's choice when not given."""
    deterministic: bool = False
    """sglang: its deterministic mode, where the attention backend has one."""
    args: Annotated[dict[str, bool | int | float | str], Flag("--engine-arg", "NAME=VALUE")] = {}  # noqa: RUF012 - pydantic copies it
    """sglang: any further field of its ServerArgs, chunked_prefill_size=8192 for example; repeatable."""
    timeout: Annotated[float, Field(ge=1.0), Flag("--engine-timeout", "SECONDS")] = 600.0
    """sglang: longest silence in seconds before it is given up."""
