"""Metrics across tokenizers: a student's cross-entropy on all its tokens, its teacher where both predict one token.

Where a span is one token on either side, and so the same bytes, both models are compared over the tokens that they
share, renormalised. What of the teacher's probability lies on those tokens is reported beside it.
Invariant: sums in fp64 over the labelled rows and the exact spans; logits are fp32 products, as in metrics.py.
Cost: two fp32 matrix products and a softmax each for exact spans, one for the other rows.
"""

# Shapes: K exact spans, V' shared tokens, C spans per chunk.

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kdpipe.stages.loss import pointwise
from kdpipe.stages.loss.head import Side
from kdpipe.stages.loss.layout import row_blocks
from kdpipe.stages.loss.metrics import CHUNK_TOKENS, token_metrics, wide_logits
from kdpipe.stages.loss.pointwise import Distributions, normalised
from kdpipe.stages.loss.spans import Spans
from kdpipe.stages.models.vocabularies import SharedVocabulary


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CrossMetrics:
    """Sums at temperature 1, in nats: fp64 scalars on the inputs' device, ready to all-reduce.

    ce, num_tokens: over the student's labelled rows, at its whole vocabulary
    forward_kl, reverse_kl, top1_agree: over num_exact spans and the shared tokens
    teacher_mass, student_mass: probability that either model gives to the shared tokens there
    """

    forward_kl: Tensor
    reverse_kl: Tensor
    top1_agree: Tensor
    teacher_mass: Tensor
    student_mass: Tensor
    num_exact: Tensor
    ce: Tensor
    num_tokens: Tensor

    def flat(self) -> Tensor:
        """All of them in one row, to be added up."""
        return torch.stack([getattr(self, name) for name in NAMES])

    @classmethod
    def of_flat(cls, values: Tensor) -> "CrossMetrics":
        """Those of `flat`."""
        return cls(**dict(zip(NAMES, values, strict=True)))


NAMES = [field.name for field in fields(CrossMetrics)]


@torch.no_grad()
def cross_metrics(
    student: Side, teacher: Side, spans: Spans, labels: Tensor, vocabulary: SharedVocabulary
) -> CrossMetrics:
    """Sums for a student's rows [R, D] and a teacher's [P, E]; labels int64 [R], of the student's tokens."""
    own = token_metrics(student, (), labels, vocab_size=vocabulary.student_size)
    exact = spans.exact
    sides = (
        (Side(student.hidden[spans.student[exact, 0]], student.head), vocabulary.student_ids, vocabulary.student_size),
        (Side(teacher.hidden[spans.teacher[exact, 0]], teacher.head), vocabulary.teacher_ids, vocabulary.teacher_size),
    )
    count, device = int(exact.sum()), student.hidden.device
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for rows in row_blocks(count, CHUNK_TOKENS):
        both, masses = [], []
        for side, ids, size in sides:
            out = torch.empty(rows.stop - rows.start, size, dtype=torch.float32, device=device)
            logits = wide_logits(side, rows.start, rows.stop, out)
            shared = logits[:, ids.to(device)]
            masses.append((shared.logsumexp(-1) - logits.logsumexp(-1)).exp())
            both.append(normalised(shared)[:2])
        distributions = Distributions(*both[1], *both[0])
        agree = both[0][0].argmax(-1) == both[1][0].argmax(-1)
        found = (
            pointwise.forward_kl(distributions)[0],
            pointwise.reverse_kl(distributions)[0],
            agree,
            masses[1],
            masses[0],
        )
        sums += torch.stack([each.double().sum() for each in found])
    return CrossMetrics.of_flat(torch.cat([sums, torch.stack([sums.new_tensor(float(count)), own.ce, own.num_tokens])]))
