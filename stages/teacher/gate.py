"""The gate: what an engine says it wrote is checked against what lies in the shard, before the shard is committed.

Engines have returned swapped, short and shifted rows without a word (SGLang issues 4997, 8066, 8003, 30177).

How far a recomputed log-probability may be from the engine's own: each logit z of the engine went through r roundings
of unit u (the matmul, a bias, a scale, three operations of a soft cap), so it is off by r*u*|z| at most, and
    log p(y) = z_y - logsumexp(z)   moves by at most   r*u*(|z_y| + sum_v p_v |z_v|)
to first order; FLOAT32_SLACK is added for sums in another order. In fp32 a wrong row cannot hide. In bf16 the bound is
about 0.1 to 0.6 nat for logits near 20: a wrong row hides where both rows find the next token that nearly equally
likely, so each sample has several probes, far apart: its first row (a shift loses or doubles it), its last, and some
between, and all samples of a shard would have to agree by chance.
"""

# Shapes: R rows of a sample, K probed ones, E teacher width.

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from kdpipe.manifests.errors import GateError, TeacherError
from kdpipe.manifests.teacher import HeadRecord
from kdpipe.stages.teacher.canary import recompute_logprobs
from kdpipe.stages.teacher.engine import Ack, Request
from kdpipe.stages.teacher.head import Head
from kdpipe.stages.teacher.rows import TORCH_DTYPES, as_tensor, checksum

FLOAT32_SLACK = 1e-3


def choose_probes(sample: int, num_rows: int, count: int) -> np.ndarray:
    """Which of a sample's rows to probe: int64 [min(num_rows, count)], ascending, the first and the last among them.

    A pure function: the rows between are cut into count-2 equal stretches, one row is drawn of each by a digest of
    (sample, stretch).
        sample 7, 10 rows, count 4    [0 | 1..4 | 5..8 | 9] -> e.g. [0 2 7 9]
    """
    if count < 2:
        raise ValueError(f"{count} probes cannot hold the first and the last row")
    if num_rows <= count:
        return np.arange(num_rows, dtype=np.int64)
    edges = [1 + (num_rows - 2) * stretch // (count - 2) for stretch in range(count - 1)] if count > 2 else []
    inner = [low + _draw(sample, low) % (high - low) for low, high in pairwise(edges)]
    return np.array([0, *inner, num_rows - 1], dtype=np.int64)


def check_ack(request: Request, ack: Ack) -> None:
    """The ack is of this request, and the bytes it speaks of are those in the request's target. Raises GateError."""
    where = f"sample {request.sample}"
    if ack.sample != request.sample:
        raise GateError(f"the engine acknowledged sample {ack.sample} in its place; run it again", where=where)
    planned = len(request.positions)
    if not ack.num_rows == planned == len(request.target.array):
        raise GateError(f"the plan has {planned} rows, the engine wrote {ack.num_rows}; run it again", where=where)
    if len(ack.probe_logprobs) != len(request.probes):
        message = f"{len(request.probes)} rows were probed, the engine answered for {len(ack.probe_logprobs)}"
        raise GateError(message, where=where)
    found = checksum(request.target.array)
    if found != ack.checksum:
        message = f"its rows have checksum {found:016x}, the engine wrote {ack.checksum:016x}"
        raise GateError(f"{message}; another writer, or a failing disk or memory", where=where)


def check_finite(request: Request) -> None:
    """No NaN or infinity in the request's rows. Raises TeacherError naming sample, row and token position."""
    finite = torch.isfinite(as_tensor(request.target.array))
    if bool(finite.all()):
        return
    row = int(torch.nonzero(~finite.all(dim=1))[0])
    raise TeacherError(
        f"row {row} (token {request.positions[row]}) is not finite; the teacher overflows in this dtype, try --dtype",
        where=f"sample {request.sample}",
    )


def check_identity(requests: Sequence[Request], acks: Sequence[Ack], head: Head) -> float:
    """Each probed row, times the head, gives the log-probability that the engine reported; the largest difference.

    Call it with many requests: the head is read once for all their probes. Raises GateError naming sample and row.
    """
    if not sum(len(request.probes) for request in requests):
        return 0.0
    rows = torch.cat([as_tensor(request.target.array)[torch.from_numpy(request.probes)] for request in requests])
    next_ids = np.concatenate([request.token_ids[request.positions[request.probes] + 1] for request in requests])
    scores = recompute_logprobs(rows, head, next_ids)
    own = np.concatenate([ack.probe_logprobs for ack in acks]).astype(np.float64)
    allowed = rounding(head.record) * scores.magnitude + FLOAT32_SLACK
    difference = np.abs(scores.logprobs - own)
    wrong = np.flatnonzero(~(difference <= allowed))  # a NaN is wrong too
    if len(wrong):
        at = int(wrong[0])
        samples = np.concatenate([np.full(len(request.probes), request.sample) for request in requests])
        row = np.concatenate([request.probes for request in requests])[at]
        raise GateError(
            f"row {row} gives log p = {scores.logprobs[at]:.5f} for the next token, the engine said {own[at]:.5f} "
            f"(allowed {allowed[at]:.5f}); the row is of another token or sample",
            where=f"sample {samples[at]}",
        )
    return float(difference.max())


def rounding(record: HeadRecord) -> float:
    """r*u of the module's docstring: the relative error that a logit of the engine may have."""
    roundings = 1 + record.has_bias + (record.scale != 1.0) + 3 * (record.softcap is not None)
    return roundings * torch.finfo(TORCH_DTYPES[record.dtype]).eps / 2


def _draw(sample: int, low: int) -> int:
    digest = hashlib.blake2b(f"{sample} {low}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
