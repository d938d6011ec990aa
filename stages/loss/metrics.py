"""Token metrics: how close a student is to its teacher on held-out tokens, chunk by chunk and without gradients.

Invariant: every sum runs over the same tokens, those whose label is not -100, so any of them divided by num_tokens is
a mean. Cost: two matrix products and two softmaxes; two [C, V] buffers in the inputs' dtype.
"""

# Shapes: T tokens, V shared vocabulary, D student width, E teacher width, C tokens per chunk, R rows per block.

from dataclasses import dataclass

import torch
from torch import Tensor

import kdpipe.stages.loss.pointwise as pointwise
from kdpipe.stages.loss.blocks import row_blocks, rows_per_block
from kdpipe.stages.loss.gradients import CHUNK_TOKENS
from kdpipe.stages.loss.head import Head, Side
from kdpipe.stages.loss.pointwise import Rows, normalise_
from kdpipe.stages.loss.problem import IGNORED, checked_labels, shared_vocab


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenMetrics:
    """Sums over the labelled tokens at temperature 1, in nats: fp64 scalars on the inputs' device, ready to all-reduce.

    top1_agree counts tokens whose most likely token is the same in both models; num_tokens counts the tokens."""

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
    teacher_hidden: Tensor,
    teacher: Head,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
) -> TokenMetrics:
    """Sums for student_hidden [T, D] and teacher_hidden [T, E] against labels [T]; heads are cut to vocab_size rows."""
    students, teachers = Side(student_hidden, student), Side(teacher_hidden, teacher)
    vocab = shared_vocab(students, teachers, vocab_size)
    num_tokens, device = student_hidden.shape[0], student_hidden.device
    labels = checked_labels(labels, num_tokens, vocab)
    size = min(CHUNK_TOKENS.get(device.type, CHUNK_TOKENS["cuda"]), num_tokens)
    block_rows = rows_per_block(vocab, device)
    scratch = torch.empty(5, min(block_rows, max(size, 1)), vocab, dtype=torch.float32, device=device)
    student_buffer, teacher_buffer = student_hidden.new_empty(size, vocab), teacher_hidden.new_empty(size, vocab)
    totals = torch.zeros(5, num_tokens, dtype=torch.float32, device=device)
    for start in range(0, num_tokens, max(size, 1)):
        stop = min(start + size, num_tokens)
        student_raw = students.raw_logits(start, stop, student_buffer)
        teacher_raw = teachers.raw_logits(start, stop, teacher_buffer)
        for block in row_blocks(stop - start, block_rows):
            rows = Rows(*scratch[:4, : block.stop - block.start])
            student.finish_(rows.log_p_student.copy_(student_raw[block]))
            teacher.finish_(rows.log_p_teacher.copy_(teacher_raw[block]))
            tokens = slice(start + block.start, start + block.stop)
            measure_rows(rows, scratch[4, : block.stop - block.start], labels[tokens], totals[:, tokens])
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


def measure_rows(rows: Rows, scratch: Tensor, labels: Tensor, out: Tensor) -> None:
    """The five metrics of a block into out [5, R]; rows come with finished logits in place of log-probabilities."""
    normalise_(rows.log_p_student, rows.p_student)
    normalise_(rows.log_p_teacher, rows.p_teacher)
    out[0] = pointwise.forward_kl(rows, scratch)
    out[1] = pointwise.reverse_kl(rows, scratch)
    out[2] = rows.log_p_student.argmax(-1) == rows.log_p_teacher.argmax(-1)
    target = labels.clamp_min(0)[:, None]
    out[3] = -rows.log_p_student.gather(1, target)[:, 0]
    out[4] = -rows.log_p_teacher.gather(1, target)[:, 0]
