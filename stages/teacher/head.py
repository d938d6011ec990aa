"""The teacher's lm_head, read from its checkpoint by key; the model is never loaded.

Cost: one read of the head's own bytes, and a cast where the files hold another dtype than the engine computes in.
"""

# Shapes: V' rows of the head (padded vocabulary), E teacher width, R rows, M chosen entries of the vocabulary.

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kdpipe.manifests.errors import TeacherError
from kdpipe.manifests.teacher import HeadRecord
from kdpipe.stages.models import head as models_head
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.teacher.describe import TeacherInfo
from kdpipe.stages.teacher.rows import TORCH_DTYPES

COLUMN_ELEMENTS = 1 << 17
"""fp32 elements of the head's columns that are gathered at a time."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Head:
    """weight [V', E] and bias [V'] (None where there is none), with all that lies between a row and the logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    record: HeadRecord

    @property
    def formula(self) -> models_head.Head:
        return models_head.Head(self.weight, self.bias, self.record.softcap, self.record.scale)


def read_head(path: Path, info: TeacherInfo, vocab_size: int) -> Head:
    """The head of the teacher at `path` in info.dtype, on the CPU. Raises TeacherError for unreadable files."""
    files = ModelFolder(path, TeacherError).weights
    weight = _tensor(files, info.head_key, info)
    bias = None if info.bias_key is None else _tensor(files, info.bias_key, info)
    return Head(weight=weight, bias=bias, record=head_record(info, vocab_size))


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


def chosen_logits(rows: torch.Tensor, head: Head, ids: torch.Tensor) -> torch.Tensor:
    """Logits [R, M] in fp32 of rows [R, E] for other entries in each row, ids [R, M], by HeadRecord's formula."""
    block = max(1, COLUMN_ELEMENTS // (ids.shape[1] * rows.shape[1]))
    products = [
        torch.linalg.vecdot(head.weight[entries].float(), some[:, None].float())
        for some, entries in zip(rows.split(block), ids.split(block), strict=True)
    ]
    bias = None if head.bias is None else head.bias[ids].float()
    raw = torch.cat(products)
    return head.formula.finish.apply(raw if bias is None else raw + bias, None)


def _tensor(files: dict[str, Path], key: str, info: TeacherInfo) -> torch.Tensor:
    try:
        with safe_open(files[key], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(key)
    except SafetensorError as err:
        raise TeacherError(f"'{key}' cannot be read: {err}; copy the file again", where=files[key]) from None
    if tensor.dtype not in TORCH_DTYPES.values():
        raise TeacherError(f"'{key}' is {tensor.dtype}; a quantised head is not supported", where=files[key])
    return tensor.to(TORCH_DTYPES[info.dtype])
