"""Spans: which rows of two models with other tokenizers stand for the same text.

Row j of a model is the hidden state that predicts a token. A span is the shortest piece of supervised text at whose two
ends both tokenisations have a boundary: a run of the student's rows and a run of the teacher's. It is exact where both
runs are of one row: one token of the same bytes on either side.
Invariant: spans that passed `check` are in order, disjoint and lie within both models' rows.
"""

# Shapes: K spans, R rows of the student, P rows of the teacher, N rows of the K spans on one side.

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kdpipe.manifests.errors import ConfigError


class Members(NamedTuple):
    """The rows of all spans on one side, in order: their places [N], and the span that each is of [N]."""

    rows: Tensor
    spans: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Spans:
    """Which rows of two models stand for the same text: K spans, in order, disjoint.

    student, teacher: int64 [K, 2], a span's first row and its number of rows, 1 at least
    student_tokens int64 [R], teacher_tokens int64 [P]: the token that each row predicts
    """

    student: Tensor
    teacher: Tensor
    student_tokens: Tensor
    teacher_tokens: Tensor

    def __len__(self) -> int:
        return len(self.student)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Spans":
        """The same on another device."""
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in self.__slots__}
        return Spans(**moved)

    @property
    def exact(self) -> Tensor:
        """Whether a span is one token on each side, bool [K]."""
        return (self.student[:, 1] == 1) & (self.teacher[:, 1] == 1)

    def check(self) -> None:
        """ConfigError where shapes or dtypes are others or, on a CPU where looking is free, rows lie outside."""
        for owner, runs, tokens in (
            ("student", self.student, self.student_tokens),
            ("teacher", self.teacher, self.teacher_tokens),
        ):
            if tokens.dim() != 1 or runs.shape != (len(self.student), 2) or {runs.dtype, tokens.dtype} != {torch.int64}:
                found = f"{runs.dtype} {list(runs.shape)} and {tokens.dtype} {list(tokens.shape)}"
                raise ConfigError(
                    f"expected spans int64 [{len(self.student)}, 2] and tokens int64 [rows], got {found}", where=owner
                )
            if runs.device.type == "cpu" and len(runs):
                ends = runs.sum(1)
                misplaced = (runs[:, 1] < 1).any() | (runs[1:, 0] < ends[:-1]).any() | (runs[0, 0] < 0)
                if bool(misplaced | (ends[-1] > len(tokens))):
                    raise ConfigError(
                        f"spans must be in order, disjoint, of one row at least and within {len(tokens)} rows",
                        where=owner,
                    )


def members(runs: Tensor) -> Members:
    """Of runs [K, 2] the rows they consist of.

    [[3, 2], [7, 1]] -> rows [3, 4, 7], spans [0, 0, 1].
    """
    spans = torch.repeat_interleave(torch.arange(len(runs), device=runs.device), runs[:, 1])
    starts = runs[:, 1].cumsum(0) - runs[:, 1]
    return Members(runs[spans, 0] + torch.arange(len(spans), device=runs.device) - starts[spans], spans)
