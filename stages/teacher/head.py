"""The teacher's lm_head, read from its checkpoint by key; the model is never loaded.

Cost: one read of the head's own bytes, and a cast where the files hold another dtype than the engine computes in.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kdpipe.manifests.errors import TeacherError
from kdpipe.manifests.teacher import HeadRecord
from kdpipe.stages.models.head import Head
from kdpipe.stages.rows import TORCH_DTYPES
from kdpipe.stages.teacher.describe import TeacherInfo


def read_head(info: TeacherInfo) -> Head:
    """The whole head, padding included, in info.dtype, on the CPU. Raises TeacherError for unreadable files."""
    return Head(
        weight=_tensor(info, info.head_key),
        bias=None if info.bias_key is None else _tensor(info, info.bias_key),
        softcap=info.softcap,
        scale=info.scale,
    )


def head_record(info: TeacherInfo, vocab_size: int) -> HeadRecord:
    """teacher/head.json of a teacher whose tokenizer makes `vocab_size` ids."""
    return HeadRecord(
        architecture=info.architecture,
        hidden_size=info.hidden_size,
        vocab_size=vocab_size,
        head_rows=info.head_rows,
        dtype=info.dtype,
        tied=info.tied,
        has_bias=info.has_bias,
        softcap=info.softcap,
        scale=info.scale,
    )


def _tensor(info: TeacherInfo, key: str) -> torch.Tensor:
    file: Path = info.folder.weights[key]
    try:
        with safe_open(file, "pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(key)
    except SafetensorError as err:
        raise TeacherError(f"'{key}' cannot be read: {err}; copy the file again", where=file) from None
    if tensor.dtype not in TORCH_DTYPES.values():
        raise TeacherError(f"'{key}' is {tensor.dtype}; a quantised head is not supported", where=file)
    return tensor.to(TORCH_DTYPES[info.dtype])
