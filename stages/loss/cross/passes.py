"""Passes: the student's rows in a few sweeps, each against rows of its teacher's or alone, gradients on the way.

A method across tokenizers is a generator of passes over the student's rows, in an order of its own: it gets each pass's
values before it makes the next one, since a span's distance may decide what pulls on the rows before. The four matrix
products run on chunks as in fused.py, rows.py does the rest.
Invariant: every row of the student's is in one pass; passes come in the order of the rows.
Cost over the inputs: one buffer [C, V] of the student's raw logits and one [C, U] of the teacher's, the gradients and,
with several chunks, the fp32 sum of the head's: what the loss of one tokenizer takes. Never [rows, vocabulary] of both.
"""

# Shapes: R rows of the student, V its vocabulary, U the teacher's, C rows of a chunk, N rows of a pass.

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdpipe.stages.loss.cross.rows import VALUES, Pair, RowFormula, Rows, row_step
from kdpipe.stages.loss.fused import INPUTS, Fused, agreement, dtypes_of
from kdpipe.stages.loss.gradients import StudentGradients
from kdpipe.stages.loss.head import Side
from kdpipe.stages.loss.layout import Layout, pays_to_compile, row_blocks, rows_per_block
from kdpipe.stages.loss.memory import keep_heap, release_scratch, scratch
from kdpipe.stages.loss.pointwise import normalised
from kdpipe.stages.loss.problem import Problem


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pass:
    """One sweep over the student's rows start .. stop.

    teacher: a row for each of them, to be compared by `pair`; None for rows alone
    teacher_size: entries of the teacher's vocabulary
    tables: what the pair needs of the two vocabularies
    ranked: int64, places of rows whose likeliest tokens are compared over those that both have, by `shared`: the ids of
        the student's and of the teacher's
    differentiate: whether anything of this pass has a gradient
    """

    start: int
    stop: int
    rows: Rows
    teacher: Side | None = None
    teacher_size: int = 0
    pair: Pair | None = None
    tables: tuple[Tensor, ...] = ()
    ranked: Tensor | None = None
    shared: tuple[Tensor, Tensor] | None = None
    differentiate: bool = True


Passes = Generator[Pass, Tensor, None]
"""Yields passes; is sent the VALUES [5, N] of each."""


class Seen(NamedTuple):
    """Sums over all rows of the first four VALUES [4] and of `fused.agreement` [2]; loss.Metrics has the two counts."""

    values: Tensor
    ranks: Tensor
    num_taught: int
    num_ranked: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Work:
    """A whole loss: the student's half as a posed problem without a teacher, the weight of kd, the passes."""

    problem: Problem
    kd_weight: float
    kd_scale: float
    temperature: float
    passes: Callable[[], Passes]
    widest: int
    """Entries of the larger vocabulary."""

    def total(self, kd: Tensor, ce: Tensor, z: Tensor) -> Tensor:
        """The loss of these sums."""
        problem = self.problem
        total = self.kd_weight * kd + (1.0 - self.kd_weight) * ce
        return (total + problem.z_loss * z if problem.z_loss else total) * problem.loss_scale


def summed(work: Work, *, chunk_tokens: int | None, head_grad_fp32: bool) -> tuple[Tensor, Seen]:
    """The loss, with gradients, and what its passes have seen."""
    student = work.problem.student
    weight = student.head.weight
    sum_dtype = torch.promote_types(weight.dtype, torch.float32) if head_grad_fp32 else weight.dtype
    loss, *seen = _Across.apply(*student.tensors, work, chunk_tokens, sum_dtype, torch.is_grad_enabled())
    return loss, Seen(*seen)


class _Across(Fused):
    """As Fused, by passes; backward is the same."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        student_bias: Tensor | None,
        low_rows: Tensor | None,
        low_up: Tensor | None,
        work: Work,
        chunk_tokens: int | None,
        sum_dtype: torch.dtype,
        differentiate: bool,
    ) -> tuple[Tensor, *tuple[Any, ...]]:
        wanted = [differentiate and needed for needed in ctx.needs_input_grad[:INPUTS]]
        layout = layout_of(work, chunk_tokens, sums_head=wanted[1] and sum_dtype != student_head.dtype)
        gradients = StudentGradients(work.problem, sum_dtype, one_chunk=layout.num_chunks == 1, wanted=wanted)
        seen = _run(work, layout, gradients)
        ctx.save_for_backward(*gradients.finish())
        ctx.dtypes = dtypes_of(work.problem.student)
        ctx.mark_non_differentiable(seen.values, seen.ranks)
        return work.total(*seen.values[:3]), *seen


def layout_of(work: Work, chunk_tokens: int | None, *, sums_head: bool) -> Layout:
    """Layout of the student's rows, with blocks of as many rows as the larger vocabulary allows."""
    layout = Layout.of(work.problem, chunk_tokens, sums_head=sums_head)
    compiled = pays_to_compile(work.problem)
    rows = rows_per_block(
        max(work.widest, work.problem.vocab_size), work.problem.student.hidden.device, compiled=compiled
    )
    rows = min(rows, layout.chunk_tokens)
    size = -(-layout.chunk_tokens // rows) * rows
    num_chunks = -(-work.problem.num_tokens // size)
    return Layout(chunk_tokens=size, block_rows=rows, num_chunks=num_chunks, compiled=compiled)


def _run(work: Work, layout: Layout, gradients: StudentGradients) -> Seen:
    """What there is over all rows; leaves the gradients in `gradients`."""
    hidden = work.problem.student.hidden
    if hidden.device.type == "cpu":
        keep_heap()
    # One chunk holds the gradient of every row until the last pass, several are handed on one by one.
    whole = layout.num_chunks == 1
    buffer = scratch("student", (layout.chunk_tokens + layout.block_rows, work.problem.vocab_size), like=hidden)
    sums, ranks = (torch.zeros(size, dtype=torch.float32, device=hidden.device) for size in (4, 2))
    num_taught = num_ranked = 0
    passes = work.passes()
    each = next(passes, None)
    while each is not None:
        values = _sweep(each, work, layout, gradients, buffer, ranks, whole=whole)
        sums += values[:4].sum(1)
        num_taught += 0 if each.teacher is None else each.stop - each.start
        num_ranked += 0 if each.ranked is None else len(each.ranked)
        each = _next(passes, values)
    if whole and gradients.wanted:
        gradients.add_chunk(0, buffer[: work.problem.num_tokens])
    if layout.num_chunks > 1:
        release_scratch()
    return Seen(sums, ranks, num_taught, num_ranked)


def _next(passes: Passes, values: Tensor) -> Pass | None:
    """The pass that follows these values; None after the last."""
    try:
        return passes.send(values)
    except StopIteration:
        return None


def _sweep(
    each: Pass, work: Work, layout: Layout, gradients: StudentGradients, buffer: Tensor, ranks: Tensor, *, whole: bool
) -> Tensor:
    """The VALUES [5, N] of a pass; its gradient in the buffer where that is the whole, else handed on.

    ranks: what is ranked of it is added to
    """
    problem, device, count = work.problem, buffer.device, each.stop - each.start
    rows_a_block, differentiate = layout.block_rows, each.differentiate and gradients.wanted
    head = None if each.teacher is None else each.teacher.head
    formula = RowFormula.of(
        problem,
        each.pair,
        None if head is None else head.finish,
        kd_weight=work.kd_weight,
        kd_scale=work.kd_scale,
        temperature=work.temperature,
        differentiate=differentiate,
        wants_bias=gradients.wants_bias,
    )
    teacher_dtype = None if head is None else head.weight.dtype
    shape = (rows_a_block, problem.vocab_size, each.teacher_size, problem.student.hidden.dtype, teacher_dtype, device)
    given = tuple(part is None for part in each.rows), tuple(table.shape for table in each.tables)
    step = row_step(formula, (*shape, given) if layout.compiled else None, compiled=layout.compiled)
    scale = torch.as_tensor(problem.loss_scale, dtype=torch.float32, device=device)
    biases = problem.student.head.bias, None if head is None else head.bias
    values = torch.zeros(len(VALUES), count + rows_a_block, dtype=torch.float32, device=device)
    rows = each.rows.padded(rows_a_block)
    chunk_rows = min(layout.chunk_tokens, -(-count // rows_a_block) * rows_a_block)
    theirs = None
    if each.teacher is not None:
        theirs = scratch("teacher", (chunk_rows, each.teacher_size), like=each.teacher.hidden)
    for chunk in row_blocks(count, chunk_rows):
        start, size = each.start + chunk.start, chunk.stop - chunk.start
        filled = -(-size // rows_a_block) * rows_a_block
        own = buffer[start if whole else 0 :][:filled]
        problem.student.raw_logits(start, start + size, own)
        # Rows beyond the last are computed with the last block and not used: they are of no pass, or of one to come.
        own[size:].zero_()
        if each.teacher is not None and theirs is not None:
            each.teacher.raw_logits(chunk.start, chunk.stop, theirs)
            theirs[size:].zero_()
            ranks += _ranked(each, work, own, theirs, chunk)
        for block in row_blocks(filled, rows_a_block):
            at = slice(chunk.start + block.start, chunk.start + block.stop)
            found = step(
                own[block], None if theirs is None else theirs[block], rows.cut(at), each.tables, *biases, scale
            )
            values[:, at] = found.values
            gradients.add_bias(found.bias)
        if differentiate and not whole:
            gradients.add_chunk(start, own[:size])
        elif whole and not differentiate:
            own[:size].zero_()
    return values[:, :count]


def _ranked(each: Pass, work: Work, own: Tensor, theirs: Tensor, chunk: slice) -> Tensor:
    """`fused.agreement` of the rows of a chunk that are ranked, from raw logits; 0 where there are none."""
    if each.ranked is None or each.shared is None or each.teacher is None:
        return own.new_zeros(2, dtype=torch.float32)
    places = each.ranked[(each.ranked >= chunk.start) & (each.ranked < chunk.stop)] - chunk.start
    logits = [
        head.finish.apply(raw[places].float(), head.bias).index_select(1, ids)
        for head, raw, ids in zip(
            (work.problem.student.head, each.teacher.head), (own, theirs), each.shared, strict=True
        )
    ]
    return agreement(logits[0] / work.temperature, logits[1])


def likelihoods(side: Side, tokens: Tensor, vocab_size: int, temperature: float, *, chunk_tokens: int) -> Tensor:
    """Log-probability fp32 [N] of each row's token among the vocabulary, at a temperature; no gradient."""
    count, found = len(tokens), torch.zeros(len(tokens), dtype=torch.float32, device=side.hidden.device)
    rows = rows_per_block(vocab_size, side.hidden.device, compiled=False)
    for chunk in row_blocks(count, chunk_tokens):
        size = chunk.stop - chunk.start
        raw = scratch("teacher", (size, vocab_size), like=side.hidden)
        side.raw_logits(chunk.start, chunk.stop, raw)
        for block in row_blocks(size, rows):
            logits = side.head.finish.apply(raw[block].float(), side.head.bias)
            log_p = normalised(logits if temperature == 1.0 else logits / temperature)[0]
            at = slice(chunk.start + block.start, chunk.start + block.stop)
            found[at] = log_p.gather(1, tokens[at, None])[:, 0]
    return found
