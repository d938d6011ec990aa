"""Token metrics: how close a student is to its teacher on held-out tokens, chunk by chunk and without gradients.

Invariant: every sum runs over the same tokens, those whose label is not -100, so any of them divided by num_tokens is
a mean. Logits are fp32 products whatever the inputs' dtype: rounded to bf16 they tie at the maximum in one token of
several hundred, and the mean cross-entropy moves in its fifth digit.
Cost, of each model: an fp32 matrix product, a softmax and an fp32 buffer [C, V]; HEAD_ROWS rows of a head in fp32.
"""

# Shapes: T tokens, V shared vocabulary, C tokens per chunk, R rows per block, K teachers where there are several, or 0.

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

import kdpipe.stages.loss.pointwise as pointwise
from kdpipe.manifests.sample import IGNORED
from kdpipe.stages.loss.head import Side
from kdpipe.stages.loss.layout import row_blocks, rows_per_block
from kdpipe.stages.loss.pointwise import Distributions, averaged, normalised
from kdpipe.stages.loss.problem import checked_labels, shared_vocab, shares

CHUNK_TOKENS = 256
HEAD_ROWS = 8192
"""Rows of a head that are widened to fp32 at a time, for all tokens of a chunk."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenMetrics:
    """Sums over the labelled tokens at temperature 1, in nats: fp64 scalars on the inputs' device, ready to all-reduce.

    Several teachers are their average, as sum w_k T_k. top1_agree counts tokens whose most likely token is the same in
    both models; num_tokens counts the tokens. Without a teacher what has to do with one is nan.
    each_kl, each_tokens: of each of several teachers [K], KL(T_k || S) and the tokens that it taught; else [0]
    """

    forward_kl: Tensor
    reverse_kl: Tensor
    top1_agree: Tensor
    ce: Tensor
    teacher_ce: Tensor
    num_tokens: Tensor
    each_kl: Tensor
    each_tokens: Tensor

    def flat(self) -> Tensor:
        """All of them in one row [6 + 2 K], to be added up."""
        return torch.cat([getattr(self, name).reshape(-1) for name in NAMES])

    @classmethod
    def of_flat(cls, values: Tensor) -> "TokenMetrics":
        """Those of `flat`."""
        teachers = (len(values) - 6) // 2
        return cls(**dict(zip(NAMES, (*values[:6], values[6 : 6 + teachers], values[6 + teachers :]), strict=True)))


NAMES = [field.name for field in fields(TokenMetrics)]


@torch.no_grad()
def token_metrics(
    student: Side,
    teachers: Sequence[Side],
    labels: Tensor,
    *,
    weights: Sequence[float] = (),
    vocab_size: int | None = None,
) -> TokenMetrics:
    """Sums for a student's and its teachers' rows of T tokens against labels [T]; heads are cut to vocab_size rows.

    teachers: without any the cross-entropy alone is measured
    weights: of each teacher in their average, over their sum; all equal where none are given
    """
    vocab, weights = shared_vocab(student, teachers, vocab_size), shares(weights, len(teachers))
    num_tokens, device = student.hidden.shape[0], student.hidden.device
    several = len(teachers) if len(teachers) > 1 else 0
    labels = checked_labels(labels, num_tokens, vocab)
    size = max(1, min(CHUNK_TOKENS, num_tokens))
    block_rows = min(rows_per_block(vocab, device, compiled=False), size)
    logits = torch.empty(1 + len(teachers), size, vocab, dtype=torch.float32, device=device)
    totals = torch.zeros(5 + several, num_tokens, dtype=torch.float32, device=device)
    for start in range(0, num_tokens, size):
        stop = min(start + size, num_tokens)
        finished = [wide_logits(side, start, stop, out) for side, out in zip((student, *teachers), logits, strict=True)]
        for block in row_blocks(stop - start, block_rows):
            tokens = slice(start + block.start, start + block.stop)
            own, *theirs = (each[block] for each in finished)
            totals[:, tokens] = measured(own, theirs, weights, labels=labels[tokens])
    labelled = labels != IGNORED
    forward, reverse, agree, ce, teacher_ce, *each_kl = totals.double().where(labelled, 0.0).sum(1)
    count = labelled.sum(dtype=torch.float64)
    return TokenMetrics(
        forward_kl=forward,
        reverse_kl=reverse,
        top1_agree=agree,
        ce=ce,
        teacher_ce=teacher_ce,
        num_tokens=count,
        each_kl=torch.stack(each_kl) if several else count.new_zeros(0),
        each_tokens=count.expand(several),
    )


def wide_logits(side: Side, start: int, stop: int, out: Tensor) -> Tensor:
    """Finished logits of tokens start:stop in out's first rows [stop - start, V], fp32 from the product on."""
    hidden, logits = side.hidden[start:stop].float(), out[: stop - start]
    for entries in row_blocks(out.shape[1], HEAD_ROWS):
        logits[:, entries] = hidden @ side.head.weight[entries].float().T
    return side.head.finish.apply(logits, side.head.bias)


def measured(
    student_logits: Tensor, teachers_logits: Sequence[Tensor], weights: Sequence[float], *, labels: Tensor
) -> Tensor:
    """The first five metrics and each_kl [5 + K, R] of a block of finished logits [R, V].

    Without a teacher all but the fourth are nan.
    """
    log_p_student, p_student, _ = normalised(student_logits)
    target = labels.clamp_min(0)[:, None]
    ce = -log_p_student.gather(1, target)[:, 0]
    if not teachers_logits:
        nothing = torch.full_like(ce, torch.nan)
        return torch.stack([nothing, nothing, nothing, ce, nothing])
    teachers = [normalised(logits)[:2] for logits in teachers_logits]
    log_p_teacher, p_teacher = averaged(teachers, weights)
    both = Distributions(log_p_teacher, p_teacher, log_p_student, p_student)
    several = teachers if len(teachers) > 1 else []
    return torch.stack(
        [
            pointwise.forward_kl(both)[0],
            pointwise.reverse_kl(both)[0],
            (log_p_student.argmax(-1) == log_p_teacher.argmax(-1)).float(),
            ce,
            -log_p_teacher.gather(1, target)[:, 0],
            *(pointwise.forward_kl(Distributions(*each, log_p_student, p_student))[0] for each in several),
        ]
    )
