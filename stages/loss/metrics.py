"""Token metrics: how close a student is to its teacher on held-out tokens, chunk by chunk and without gradients.

Invariant: every sum runs over the same tokens, those whose label is not -100, so any of them divided by num_tokens is
a mean. Logits are fp32 products whatever the inputs' dtype: rounded to bf16 they tie at the maximum in one token of
several hundred, and the mean cross-entropy moves in its fifth digit.
Cost: two fp32 matrix products and two softmaxes; two fp32 buffers [C, V], and HEAD_ROWS rows of a head in fp32.
"""

# Shapes: T tokens, V shared vocabulary, D student width, E teacher width, C tokens per chunk, R rows per block.

from dataclasses import dataclass

import torch
from torch import Tensor

import kdpipe.stages.loss.pointwise as pointwise
from kdpipe.manifests.sample import IGNORED
from kdpipe.stages.loss.head import Side
from kdpipe.stages.loss.layout import row_blocks, rows_per_block
from kdpipe.stages.loss.pointwise import Distributions, normalised
from kdpipe.stages.loss.problem import checked_labels, shared_vocab
from kdpipe.stages.models.head import Head

CHUNK_TOKENS = 256
HEAD_ROWS = 8192
"""Rows of a head that are widened to fp32 at a time, for all tokens of a chunk."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenMetrics:
    """Sums over the labelled tokens at temperature 1, in nats: fp64 scalars on the inputs' device, ready to all-reduce.

    top1_agree counts tokens whose most likely token is the same in both models; num_tokens counts the tokens. Without a
    teacher what has to do with one is nan."""

    forward_kl: Tensor
    reverse_kl: Tensor
    top1_agree: Tensor
    ce: Tensor
    teacher_ce: Tensor
    num_tokens: Tensor


@torch.no_grad()
def token_metrics(
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor | None,
    teacher: Head | None,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
) -> TokenMetrics:
    """Sums for student_hidden [T, D] and teacher_hidden [T, E] against labels [T]; heads are cut to vocab_size rows.

    teacher_hidden, teacher: None where there is no teacher, then the cross-entropy alone is measured
    """
    students, teachers = Side(student_hidden, student), []
    if teacher_hidden is not None and teacher is not None:
        teachers.append(Side(teacher_hidden, teacher))
    vocab = shared_vocab(students, teachers, vocab_size)
    num_tokens, device = student_hidden.shape[0], student_hidden.device
    labels = checked_labels(labels, num_tokens, vocab)
    size = max(1, min(CHUNK_TOKENS, num_tokens))
    block_rows = min(rows_per_block(vocab, device, compiled=False), size)
    logits = torch.empty(1 + len(teachers), size, vocab, dtype=torch.float32, device=device)
    totals = torch.zeros(5, num_tokens, dtype=torch.float32, device=device)
    for start in range(0, num_tokens, size):
        stop = min(start + size, num_tokens)
        finished = [
            wide_logits(side, start, stop, out) for side, out in zip((students, *teachers), logits, strict=True)
        ]
        for block in row_blocks(stop - start, block_rows):
            tokens = slice(start + block.start, start + block.stop)
            totals[:, tokens] = measured(*(each[block] for each in finished), labels=labels[tokens])
    labelled = labels != IGNORED
    forward, reverse, agree, ce, teacher_ce = totals.double().where(labelled, 0.0).sum(1)
    return TokenMetrics(
        forward_kl=forward,
        reverse_kl=reverse,
        top1_agree=agree,
        ce=ce,
        teacher_ce=teacher_ce,
        num_tokens=labelled.sum(dtype=torch.float64),
    )


def wide_logits(side: Side, start: int, stop: int, out: Tensor) -> Tensor:
    """Finished logits of tokens start:stop in out's first rows [stop - start, V], fp32 from the product on."""
    hidden, logits = side.hidden[start:stop].float(), out[: stop - start]
    for entries in row_blocks(out.shape[1], HEAD_ROWS):
        logits[:, entries] = hidden @ side.head.weight[entries].float().T
    return side.head.finish.apply(logits, side.head.bias)


def measured(student_logits: Tensor, teacher_logits: Tensor | None = None, *, labels: Tensor) -> Tensor:
    """The five metrics [5, R] of a block of finished logits [R, V]; without a teacher all but the fourth are nan."""
    log_p_student, p_student, _ = normalised(student_logits)
    target = labels.clamp_min(0)[:, None]
    ce = -log_p_student.gather(1, target)[:, 0]
    if teacher_logits is None:
        nothing = torch.full_like(ce, torch.nan)
        return torch.stack([nothing, nothing, nothing, ce, nothing])
    log_p_teacher, p_teacher, _ = normalised(teacher_logits)
    both = Distributions(log_p_teacher, p_teacher, log_p_student, p_student)
    return torch.stack(
        [
            pointwise.forward_kl(both)[0],
            pointwise.reverse_kl(both)[0],
            (log_p_student.argmax(-1) == log_p_teacher.argmax(-1)).float(),
            ce,
            -log_p_teacher.gather(1, target)[:, 0],
        ]
    )
