"""Requests with rows in plain memory, for tests of the engines and of the gate."""

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from tests.opened import teacher_in

from kdpipe.manifests.specs import Dtype
from kdpipe.stages.teacher.describe import describe_teacher
from kdpipe.stages.teacher.engine import Ack, Request, RowTarget
from kdpipe.stages.teacher.gate import check_ack, check_finite, check_identity, choose_probes, choose_scored
from kdpipe.stages.teacher.head import read_head

NUMPY_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
VOCAB = 251
WIDTH = 48


def make_request(sample: int, length: int, *, dtype: str = "float32", probes: int = 4, every: bool = False) -> Request:
    """A sample of random ids that keeps about two rows of three (every row but the last token's with `every`)."""
    draw = np.random.default_rng(1000 + sample)
    keep = np.arange(length - 1) if every else np.flatnonzero(draw.random(length - 1) < 0.66)
    array = np.zeros((len(keep), WIDTH), NUMPY_DTYPES[dtype])
    token_ids = draw.integers(3, VOCAB, length).astype(np.int32)
    positions = keep.astype(np.int64)
    chosen = choose_probes(sample, len(keep), probes)
    return Request(
        sample=sample,
        token_ids=token_ids,
        positions=positions,
        probes=chosen,
        scored=choose_scored(sample, token_ids, positions[chosen], VOCAB),
        target=RowTarget(array=array, path=Path("unused"), offset=0),
    )


def pass_the_gate(folder: Path, dtype: Dtype, requests: Sequence[Request], acks: Sequence[Ack]) -> None:
    """All three checks of the gate, with the head of the teacher in `folder`."""
    for request, ack in zip(requests, acks, strict=True):
        check_ack(request, ack)
        check_finite(request)
    check_identity(requests, acks, read_head(describe_teacher(teacher_in(folder), dtype)))


def acks_by_sample(acks: list[Ack]) -> dict[int, Ack]:
    return {ack.sample: ack for ack in acks}
