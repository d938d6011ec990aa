"""The gate: what an engine says it wrote is checked against what lies in the shard, before the shard is committed.

Engines have returned swapped, short and shifted rows without a word (SGLang issues 4997, 8066, 8003, 30177).

At each probed row the engine reports the log-probabilities of several ids: the next token, some of the sample's own
tokens, some of the whole vocabulary. Differences of log-probabilities are differences of logits,
    log p(v) - log p(y) = z_v - z_y
so a row is checked against a few columns of the head, whatever the vocabulary's size. How far the two may be apart:
each logit z of the engine went through r roundings of unit u (the matmul, a bias, a scale, three operations of a soft
cap), so it is off by r*u*|z| at most, and the difference by r*u*(|z_v| + |z_y|); FLOAT32_SLACK is added for sums in
another order. In bf16 that is about 0.1 nat for logits near 20; a wrong row would have to come that close in each of
seven differences. Where an engine takes log-probabilities in a forward of their own, that forward's rows are checked
like this, and the stored ones must then be the same but for what the make-up of a batch does to them.
"""

# Shapes: n tokens of a sample, R rows of it, K probed ones, M scored ids of each, E teacher width.

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from kdpipe.manifests.compare import TOLERANCE, row_distance
from kdpipe.manifests.errors import GateError, TeacherError
from kdpipe.stages.models.head import Head
from kdpipe.stages.rows import as_tensor, checksum, not_finite
from kdpipe.stages.teacher.engine import Ack, Request

FLOAT32_SLACK = 1e-3
OWN_IDS, OTHER_IDS = 4, 3


def choose_probes(sample: int, num_rows: int, count: int) -> np.ndarray:
    """Which of a sample's rows to probe: int64 [min(num_rows, count)], ascending; the last, and of several the first.

    A pure function: the rows between are cut into count-2 equal stretches, one row is drawn of each by a digest of
    (sample, stretch).
        sample 7, 10 rows, count 4    [0 | 1..4 | 5..8 | 9] -> e.g. [0 2 7 9]
    """
    if num_rows <= count:
        return np.arange(num_rows, dtype=np.int64)
    if count == 1:
        return np.array([num_rows - 1], dtype=np.int64)
    edges = [1 + (num_rows - 2) * stretch // (count - 2) for stretch in range(count - 1)] if count > 2 else []
    inner = [low + _draw(sample, low) % (high - low) for low, high in pairwise(edges)]
    return np.array([0, *inner, num_rows - 1], dtype=np.int64)


def is_probed_inside(sample: int, every: int) -> bool:
    """Whether a sample is one of `every` whose inner rows are probed too, drawn by a digest."""
    return _draw(sample, -1) % every == 0


def choose_scored(sample: int, token_ids: np.ndarray, positions: np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids to score at each probed position: int64 [K, 1 + OWN_IDS + OTHER_IDS], a pure function.

    First the next token, then tokens drawn from the sample's own, whose head columns were trained, then any.
    """
    scored = np.empty((len(positions), 1 + OWN_IDS + OTHER_IDS), dtype=np.int64)
    scored[:, 0] = token_ids[positions + 1]
    for row, position in zip(scored, positions, strict=True):
        draws = [_draw(sample, int(position) * len(row) + column) for column in range(1, len(row))]
        row[1 : 1 + OWN_IDS] = [token_ids[draw % len(token_ids)] for draw in draws[:OWN_IDS]]
        row[1 + OWN_IDS :] = [draw % vocab_size for draw in draws[OWN_IDS:]]
    return scored


def admit(request: Request, ack: Ack) -> None:
    """A request's rows are all there, as they were written, and finite. Raises GateError, TeacherError."""
    check_ack(request, ack)
    check_finite(request)


def check_ack(request: Request, ack: Ack) -> None:
    """The ack is of this request, and the bytes it speaks of are those in the request's target. Raises GateError."""
    where = f"sample {request.sample}"
    if ack.sample != request.sample:
        raise GateError(f"the engine acknowledged sample {ack.sample} in its place; run it again", where=where)
    planned = len(request.positions)
    if not ack.num_rows == planned == len(request.target.array):
        raise GateError(f"the plan has {planned} rows, the engine wrote {ack.num_rows}; run it again", where=where)
    if ack.probe_logprobs.shape != request.scored.shape:
        message = f"{request.scored.shape} ids were scored, the engine answered for {ack.probe_logprobs.shape}"
        raise GateError(message, where=where)
    found = checksum(request.target.array)
    if found != ack.checksum:
        message = f"its rows have checksum {found:016x}, the engine wrote {ack.checksum:016x}"
        raise GateError(f"{message}; another writer, or a failing disk or memory", where=where)


def check_finite(request: Request) -> None:
    """No NaN or infinity in the request's rows. Raises TeacherError naming sample, row and token position."""
    rows = not_finite(request.target.array)
    if not len(rows):
        return
    raise TeacherError(
        f"row {rows[0]} (token {request.positions[rows[0]]}) is not finite; the teacher overflows in this dtype, "
        "try --dtype",
        where=f"sample {request.sample}",
    )


def check_identity(requests: Sequence[Request], acks: Sequence[Ack], head: Head) -> float:
    """Each probed row, times the scored columns of the head, gives the engine's own logits but for a constant.

    The largest difference. Raises GateError naming sample and row.
    """
    if not sum(len(request.probes) for request in requests):
        return 0.0
    pairs = list(zip(requests, acks, strict=True))
    rows = as_tensor(np.concatenate([_probe_rows(request, ack) for request, ack in pairs]))
    scored = torch.from_numpy(np.concatenate([request.scored for request in requests]))
    logits = head.chosen(rows, scored).double().cpu().numpy()
    own = np.concatenate([ack.probe_logprobs for ack in acks]).astype(np.float64)
    allowed = rounding(head) * (np.abs(logits) + np.abs(logits[:, :1])) + FLOAT32_SLACK
    difference = np.abs((logits - logits[:, :1]) - (own - own[:, :1]))
    wrong = np.argwhere(~(difference <= allowed))  # a NaN is wrong too
    if len(wrong):
        at, column = wrong[0]
        sample, row = _probe(requests, at)
        raise GateError(
            f"row {row} puts the logits of tokens {int(scored[at, column])} and {int(scored[at, 0])} "
            f"{logits[at, column] - logits[at, 0]:.5f} apart, the engine {own[at, column] - own[at, 0]:.5f} "
            f"(allowed {allowed[at, column]:.5f}); the row is of another token or sample",
            where=f"sample {sample}",
        )
    for request, ack in pairs:
        if ack.probe_rows is not None:
            _check_same(request, ack.probe_rows, TOLERANCE[head.dtype])
    return float(difference.max())


def _probe(requests: Sequence[Request], at: int) -> tuple[int, int]:
    """Sample and row of the at-th probe of all requests."""
    return [(request.sample, int(row)) for request in requests for row in request.probes][at]


def _probe_rows(request: Request, ack: Ack) -> np.ndarray:
    return request.target.array[request.probes] if ack.probe_rows is None else ack.probe_rows


def _check_same(request: Request, taken: np.ndarray, allowed: float) -> None:
    """The stored rows against those of another forward of the same tokens [K, E]. Raises GateError."""
    distance = row_distance(taken, request.target.array[request.probes])
    wrong = np.flatnonzero(~(distance <= allowed))
    if len(wrong):
        raise GateError(
            f"row {request.probes[wrong[0]]} is {distance[wrong[0]]:.1e} from that of the prompt cut there (allowed "
            f"{allowed:.0e}); the row is of another token or sample",
            where=f"sample {request.sample}",
        )


def rounding(head: Head) -> float:
    """r*u of the module's docstring: the relative error that a logit of the engine may have."""
    roundings = 1 + (head.bias is not None) + (head.scale != 1.0) + 3 * (head.softcap is not None)
    return roundings * torch.finfo(head.weight.dtype).eps / 2


def _draw(sample: int, low: int) -> int:
    digest = hashlib.blake2b(f"{sample} {low}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
