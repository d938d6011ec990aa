"""Gradients of the student's hidden states, head, bias and an adapter on the head, summed while the loss goes along.

Invariant: the head's gradient is summed over chunks in `sum_dtype`, by default fp32, and then rounded once.
Cost: the gradients themselves; with several chunks of bf16 or fp16 and an fp32 sum, that sum [V, D] beside them.
"""

# Shapes: T tokens, V shared vocabulary, D student width, C tokens per chunk, R rows per block, r rank of an adapter.

from collections.abc import Sequence

import torch
from torch import Tensor

from kdpipe.stages.loss.layout import row_blocks
from kdpipe.stages.loss.memory import zeros
from kdpipe.stages.loss.problem import Problem

# Head rows whose gradient is made and added at once, so that it is still in the cache when it is added.
HEAD_ROWS = {"cpu": 4096, "cuda": 16384}


class StudentGradients:
    """What is wanted of the gradients, and their sums so far. A head that is frozen costs neither product nor array.

    wanted: which of Side.tensors
    """

    def __init__(self, problem: Problem, sum_dtype: torch.dtype, *, one_chunk: bool, wanted: Sequence[bool]) -> None:
        hidden, weight, bias, *low = wanted
        self._side, self._vocab = problem.student, problem.vocab_size
        head, rows = self._side.head, self._side.hidden
        self._one_chunk = one_chunk and problem.num_tokens > 0
        if self._one_chunk:
            sum_dtype = head.weight.dtype
        # One chunk writes the rows of the vocabulary, several add to them; rows beyond it stay 0.
        self._hidden = zeros(rows.shape, like=rows) if hidden else None
        self._bias = rows.new_zeros(self._vocab, dtype=torch.float32) if bias else None
        self._weight = zeros(head.weight.shape, like=head.weight, dtype=sum_dtype) if weight else None
        self._low = self._up = None
        if any(low) and self._side.low is not None:
            self._low = zeros(self._side.low.rows.shape, like=rows)
            self._up = rows.new_zeros(self._side.low.up.shape, dtype=torch.promote_types(rows.dtype, torch.float32))
        self._head_rows = HEAD_ROWS.get(rows.device.type, HEAD_ROWS["cuda"])
        if weight and sum_dtype != rows.dtype:
            self._part = rows.new_empty(min(self._head_rows, self._vocab), rows.shape[1])

    @property
    def wanted(self) -> bool:
        """Whether any gradient is."""
        return any(grad is not None for grad in (self._hidden, self._weight, self._bias, self._low))

    @property
    def wants_bias(self) -> bool:
        return self._bias is not None

    def add_bias(self, grad: Tensor | None) -> None:
        """Take a block's share of the bias gradient [V]."""
        if self._bias is not None and grad is not None:
            self._bias.add_(grad)

    def add_chunk(self, start: int, grad: Tensor) -> None:
        """Take the rounded gradient with respect to the raw logits [C, V] of tokens start .. start + C."""
        tokens = slice(start, start + grad.shape[0])
        if self._hidden is not None:
            torch.mm(grad, self._side.head.weight[: self._vocab], out=self._hidden[tokens])
        if self._side.low is not None and self._low is not None and self._up is not None:
            torch.mm(grad, self._side.low.up[: self._vocab], out=self._low[tokens])
            self._up[: self._vocab] += grad.T @ self._side.low.rows[tokens]
        if self._weight is not None:
            for rows in row_blocks(self._vocab, self._head_rows):
                self._add_weight(self._weight[rows], grad[:, rows].T, self._side.hidden[tokens])

    def _add_weight(self, total: Tensor, grad: Tensor, hidden: Tensor) -> None:
        """total += grad @ hidden, in fp32 where there is something to add to."""
        if self._one_chunk:
            torch.mm(grad, hidden, out=total)
        elif total.dtype == hidden.dtype:
            total.addmm_(grad, hidden)
        else:
            total.add_(torch.mm(grad, hidden, out=self._part[: total.shape[0]]))

    def finish(self) -> tuple[Tensor | None, ...]:
        """Those of Side.tensors; sums stay fp32, to be rounded once."""
        if self._bias is None or self._side.head.bias is None:
            return self._hidden, self._weight, None, self._low, self._up
        bias = self._bias.new_zeros(self._side.head.bias.shape)
        bias[: self._vocab] = self._bias
        return self._hidden, self._weight, bias, self._low, self._up
