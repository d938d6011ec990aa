"""Gradients of the student's hidden states, head and bias, summed over chunks while the loss goes along.

Invariant: the head's gradient is summed over chunks in fp32 and rounded once.
Cost: the gradients themselves; with several chunks of bf16 or fp16 an fp32 sum [V, D] for the head beside them.
"""

# Shapes: T tokens, V shared vocabulary, D student width, C tokens per chunk, R rows per block.

import torch
from torch import Tensor

from kdpipe.stages.loss.blocks import row_blocks
from kdpipe.stages.loss.memory import zeros
from kdpipe.stages.loss.problem import Problem

# Adding a chunk's head gradient to the sum moves 8*V*D bytes, the chunk's products are 2*C*V*(3*D + E) operations: with
# E = D the sum costs 20/C of the products on an EPYC core and some 210/C on an H100, so a GPU wants longer chunks.
CHUNK_TOKENS = {"cpu": 512, "cuda": 2048}
# Head rows whose gradient is made and added at once, so that it is still in the cache when it is added.
HEAD_ROWS = {"cpu": 4096, "cuda": 16384}


def chunk_size(num_tokens: int, student_width: int, *, device: str, sums_head: bool) -> int:
    """Tokens per chunk; sums_head: with several chunks the head's gradient needs an fp32 sum beside it."""
    # In 2-byte inputs one chunk of T costs 4*T*V + 2*V*D bytes, chunks of C cost 4*C*V + 6*V*D with the sum:
    # up to T = C + D one chunk is both smaller and faster.
    usual = CHUNK_TOKENS.get(device, CHUNK_TOKENS["cuda"])
    if num_tokens <= usual + (student_width if sums_head else 0):
        return max(num_tokens, 1)
    num_chunks = -(-num_tokens // usual)
    return -(-num_tokens // num_chunks)


class StudentGradients:
    """What is wanted of the three gradients, and their sums so far."""

    def __init__(self, problem: Problem, chunk_tokens: int | None, *, hidden: bool, weight: bool, bias: bool) -> None:
        self._side, self._vocab = problem.student, problem.vocab_size
        head, rows, device = self._side.head, self._side.hidden, self._side.hidden.device
        narrow = torch.finfo(rows.dtype).bits < 32
        self.wanted = hidden or weight or bias
        self.chunk_tokens = chunk_tokens or chunk_size(
            problem.num_tokens, rows.shape[1], device=device.type, sums_head=weight and narrow
        )
        self._one_chunk = 0 < problem.num_tokens <= self.chunk_tokens
        # One chunk writes the rows of the vocabulary, several add to them; rows beyond it stay 0.
        sum_dtype = torch.float32 if narrow and not self._one_chunk else head.weight.dtype
        self._hidden = zeros(rows.shape, like=rows) if hidden else None
        self._bias = rows.new_zeros(self._vocab, dtype=torch.float32) if bias else None
        self._weight = zeros(head.weight.shape, like=head.weight, dtype=sum_dtype) if weight else None
        self._head_rows = HEAD_ROWS.get(device.type, HEAD_ROWS["cuda"])
        if weight and narrow and not self._one_chunk:
            self._part = rows.new_empty(min(self._head_rows, self._vocab), rows.shape[1])

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

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden [T, D], weight [rows, D] and bias [rows]; sums stay fp32, to be rounded once."""
        if self._bias is None or self._side.head.bias is None:
            return self._hidden, self._weight, None
        bias = self._bias.new_zeros(self._side.head.bias.shape)
        bias[: self._vocab] = self._bias
        return self._hidden, self._weight, bias
