"""Projection: the student's distribution as one over the teacher's tokens, by how the teacher would cut each token.

    q(v) = sum over the student's tokens u of W[u, v] S(u)

W is sparse: a token of the same bytes has weight 1; any other is cut into the teacher's tokens, of which the first
`top_k` have weights 1, decay, decay^2 ... over their sum. So "201" of a student whose teacher writes digit by digit
counts as "2" first of all, instead of as a token the teacher does not know. With decay 0 the first piece has all the
weight: what the teacher's next token would be if the student's token were u.
X-Token, arXiv 2605.21699. Tokens that cannot be cut (special ones of one model alone) and tokens of the teacher that no
token is cut into are left out, and both distributions renormalised without them.
"""

# Shapes: V student's vocabulary, O student's tokens with pieces, C teacher's tokens that are a piece, M entries of W.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdpipe.stages.loss.cross.pairs import places_of, spread
from kdpipe.stages.loss.cross.rows import Distance, Rows
from kdpipe.stages.loss.cross.task import Shared
from kdpipe.stages.loss.divergences import find
from kdpipe.stages.loss.pointwise import TINY, Distributions, normalised

Pieces = Sequence[Sequence[int]]
"""The teacher's ids that each token of the student's is cut into; none for one that cannot be."""


def pieces_of(vocabulary: Shared, encode: Callable[[str], Sequence[int]] | None) -> list[list[int]]:
    """Of every token of the student's the teacher's ids for its bytes.

    encode: the teacher's tokenizer, without special tokens; where a token is no text of its own, or comes back with
        other bytes (a blank put before it), its bytes are cut by the longest tokens that fit, as they are without it
    """
    theirs = vocabulary.teacher_bytes
    same = dict(zip(vocabulary.student_ids.tolist(), vocabulary.teacher_ids.tolist(), strict=True))
    known = {content: index for index, content in reversed(list(enumerate(theirs))) if content}
    longest = max(map(len, known), default=0)

    def cut(content: bytes) -> list[int]:
        try:
            found = [] if encode is None else list(encode(content.decode()))
        except UnicodeDecodeError:
            found = []
        parts = [theirs[each] if each < len(theirs) else None for each in found]
        if found and None not in parts and b"".join(part or b"" for part in parts) == content:
            return found
        return longest_match(content, known, longest)

    return [
        [same[index]] if index in same else cut(content) if content else []
        for index, content in enumerate(vocabulary.student_bytes)
    ]


def longest_match(content: bytes, known: Mapping[bytes, int], longest: int) -> list[int]:
    """Ids of the longest known tokens that fit, from the left; [] where some byte is in none."""
    found, start = [], 0
    while start < len(content):
        for end in range(min(len(content), start + longest), start, -1):
            if content[start:end] in known:
                found.append(known[content[start:end]])
                start = end
                break
        else:
            return []
    return found


class Projection(nn.Module):
    """W as entries [M], fixed: source (place in `own`), target (place in `columns`), weight; rows of W sum to 1.

    own: int64 [O], the student's tokens that have pieces; columns: int64 [C], the teacher's tokens that are one
    near_student, near_teacher: int64 [S], pairs of tokens alike: each with its first piece where that weighs at least
    `threshold`, every token in one pair; of several tokens the one of the largest weight, of equals the first
    """

    own: Tensor
    columns: Tensor
    sources: Tensor
    targets: Tensor
    weights: Tensor
    near_student: Tensor
    near_teacher: Tensor

    def __init__(self, pieces: Pieces, *, top_k: int, decay: float, threshold: float) -> None:
        super().__init__()
        rows = {index: _weighted(parts[:top_k], decay) for index, parts in enumerate(pieces) if parts}
        entries = [(place, part, weight) for place, row in enumerate(rows.values()) for part, weight in row.items()]
        columns = sorted({part for _, part, _ in entries})
        column = {part: place for place, part in enumerate(columns)}
        near: dict[int, int] = {}
        for index in sorted(rows, key=lambda each: -rows[each][pieces[each][0]]):
            if rows[index][pieces[index][0]] >= threshold:
                near.setdefault(pieces[index][0], index)
        fixed = {
            "own": list(rows),
            "columns": columns,
            "sources": [place for place, _, _ in entries],
            "targets": [column[part] for _, part, _ in entries],
            "near_student": list(near.values()),
            "near_teacher": list(near),
        }
        for name, values in fixed.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)
        weights = torch.tensor([weight for _, _, weight in entries], dtype=torch.float32)
        self.register_buffer("weights", weights, persistent=False)

    def tables(self, student_size: int) -> tuple[Tensor, ...]:
        """What ProjectedPair takes."""
        places = places_of(self.own, student_size)
        return self.own, self.columns, self.sources, self.targets, self.weights, places


def _weighted(parts: Sequence[int], decay: float) -> dict[int, float]:
    """Weights 1, decay, decay^2 ... over their sum, of pieces; a piece that comes twice has both."""
    total, found = sum(decay**order for order in range(len(parts))), dict[int, float]()
    for order, part in enumerate(parts):
        if decay**order:
            found[part] = found.get(part, 0.0) + decay**order / total
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectedPair:
    """A divergence between the teacher over its tokens used, renormalised, and the student's projection onto them.

    tables: Projection.tables
    """

    divergence: str
    options: tuple[tuple[str, float], ...]
    temperature: float

    @property
    def compiles(self) -> bool:
        return False  # a scatter with many targets

    def __call__(self, student: Tensor, teacher: Tensor, rows: Rows, tables: tuple[Tensor, ...]) -> Distance:
        own, columns, sources, targets, weights, places = tables
        _, p_s, _ = normalised(student.index_select(1, own) / self.temperature)
        log_t, p_t, _ = normalised(teacher.index_select(1, columns) / self.temperature)
        shares = p_s.index_select(1, sources) * weights
        q = torch.zeros_like(p_t).scatter_add_(1, targets.expand(len(p_s), -1), shares).clamp_min_(TINY)
        both = Distributions(log_t, p_t, q.log(), q, rows.draws)
        value, gradient = find(self.divergence).value_and_grad(both, **dict(self.options))
        # The formula's gradient is q (f - sum q f), f = df/dq; each token's share of an entry takes its part of it.
        part = shares * (gradient / q).index_select(1, targets)
        pulled = torch.zeros_like(p_s).scatter_add_(1, sources.expand(len(p_s), -1), part)
        gradient = (pulled - p_s * pulled.sum(-1, keepdim=True)) / self.temperature
        return Distance(value, spread(gradient, places), -(p_t * log_t).sum(-1))
