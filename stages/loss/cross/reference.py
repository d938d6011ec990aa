"""The reference across tokenizers: dense logits of both models, one span at a time, autograd for the gradients.

It is the definition that the fused methods are tested against and shares no code with them: fp64 inputs are computed in
fp64, everything else in fp32. Cost: several [rows, vocabulary] arrays of each model, and Python for every span.
"""

# Shapes: K spans, R rows of the student, P rows of the teacher, V and U their vocabularies.

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.manifests.sample import IGNORED
from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.draws import uniform
from kdpipe.stages.loss.cross.dual import DualSpaces
from kdpipe.stages.loss.cross.methods import find_method
from kdpipe.stages.loss.cross.projection import Projection
from kdpipe.stages.loss.cross.task import Shared
from kdpipe.stages.loss.divergences import find
from kdpipe.stages.loss.head import Side
from kdpipe.stages.loss.problem import DistillLoss, Metrics
from kdpipe.stages.loss.spans import Spans
from kdpipe.stages.models.head import Head


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dense:
    """Both models' logits [R, V] and [P, U] at temperature 1, their log-probabilities at the temperature, and the rest.

    divergence: log-probabilities of teacher and student [1, tokens] and the row drawn for -> a value
    """

    student: Side
    teacher: Side
    student_logits: Tensor
    teacher_logits: Tensor
    log_s: Tensor
    log_t: Tensor
    spans: Spans
    vocabulary: Shared
    extra: nn.Module | None
    options: Mapping[str, float]
    beta: float
    temperature: float
    divergence: Callable[[Tensor, Tensor, int], Tensor]


def reference_across(
    student: Side,
    teacher: Side,
    spans: Spans,
    labels: Tensor | None,
    *,
    method: str,
    loss: LossSpec,
    vocabulary: Shared,
    extra: nn.Module | None = None,
    weights: Tensor | None = None,
    keys: Tensor | None = None,
    seed: int = 0,
    loss_scale: Tensor | float = 1.0,
) -> DistillLoss:
    """The same record as `distill_across` from the same arguments, taken to fit."""
    own = logits_of(student, vocabulary.student_size)
    chosen, known = find_method(method), find(loss.divergence)
    rest = {name: value for name, value in loss.options.items() if name not in chosen.options}
    given = known.resolve(rest) if chosen.divergences else {}
    keys = torch.arange(len(own), device=own.device) if keys is None else keys

    def divergence(log_t: Tensor, log_s: Tensor, row: int) -> Tensor:
        options: dict[str, Any] = dict(given)
        if known.draws is not None:
            options["draws"] = uniform(keys[row : row + 1], int(given[known.draws]), seed)
        return known.reference(log_t, log_s, **options)[0]

    with torch.no_grad():
        theirs = logits_of(teacher, vocabulary.teacher_size)
    dense = Dense(
        student=student,
        teacher=teacher,
        student_logits=own,
        teacher_logits=theirs,
        log_s=(own / loss.temperature).log_softmax(-1),
        log_t=(theirs / loss.temperature).log_softmax(-1),
        spans=spans,
        vocabulary=vocabulary,
        extra=extra,
        options=chosen.resolve(loss.options),
        beta={"forward_kl": 0.0, "reverse_kl": 1.0}.get(loss.divergence, given.get("beta", 0.5)),
        temperature=loss.temperature,
        divergence=divergence,
    )
    weights = torch.ones(len(own), dtype=own.dtype, device=own.device) if weights is None else weights.to(own.dtype)
    kd = ce = own.new_zeros(())
    if loss.kd_weight:
        for span in range(len(spans)):
            first, count = spans.student[span].tolist()
            value = DEFINITIONS[method](dense, span)
            if value is not None:
                kd = kd + value * weights[first : first + count].mean()
        kd = kd * (loss.temperature**2 if loss.scale_t2 else 1.0)
    if labels is not None:
        values = nn.functional.cross_entropy(
            own, labels, ignore_index=IGNORED, reduction="none", label_smoothing=loss.label_smoothing
        )
        ce = (values * weights).sum()
    z = (own.logsumexp(-1).square() * weights).sum()
    total = (loss.kd_weight * kd + (1.0 - loss.kd_weight) * ce + loss.z_loss * z) * loss_scale
    nothing = own.new_zeros(())
    metrics = Metrics(teacher_entropy=nothing, top1_agree=nothing, top_k_mass=nothing, num_taught=0, num_ranked=0)
    return DistillLoss(kd=kd.detach(), ce=ce.detach(), z=z.detach(), loss=total, metrics=metrics)


def logits_of(side: Side, size: int) -> Tensor:
    """Logits [rows, size] in fp32, or in fp64 where the hidden states are fp64."""
    dtype, head = torch.promote_types(side.hidden.dtype, torch.float32), side.head
    wide = Head(head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype), head.softcap, head.scale)
    return wide.logits(side.hidden.to(dtype), size)


def exact_rows(dense: Dense, span: int) -> tuple[int, int] | None:
    """The row of each model, where the span is one token on each side."""
    (first, count), (their_first, their_count) = dense.spans.student[span].tolist(), dense.spans.teacher[span].tolist()
    return (first, their_first) if count == their_count == 1 else None


def shared_vocab(dense: Dense, span: int) -> Tensor | None:
    rows = exact_rows(dense, span)
    if rows is None:
        return None
    own = dense.student_logits[rows[0], dense.vocabulary.student_ids] / dense.temperature
    theirs = dense.teacher_logits[rows[1], dense.vocabulary.teacher_ids] / dense.temperature
    return dense.divergence(theirs.log_softmax(-1)[None], own.log_softmax(-1)[None], rows[0])


def by_rank(q: Tensor, t: Tensor) -> Tensor:
    """Sum over ranks of |q - t|, the shorter padded with zeros."""
    size = max(len(q), len(t))
    padded = [torch.cat([each, each.new_zeros(size - len(each))]) for each in (q, t)]
    falling = [each.sort(descending=True).values for each in padded]
    return (falling[0] - falling[1]).abs().sum()


def uld(dense: Dense, span: int) -> Tensor:
    first, their_first = int(dense.spans.student[span, 0]), int(dense.spans.teacher[span, 0])
    return by_rank(dense.log_s[first].exp(), dense.log_t[their_first].exp())


def unnormalised(log_q: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """Jensen-Shannon of two distributions that need not sum to 1, with the two KL at its ends."""
    if beta in (0.0, 1.0):
        one, other = (log_t, log_q) if beta == 0.0 else (log_q, log_t)
        return (one.exp() * (one - other)).sum()
    log_m = torch.logaddexp(log_t + math.log(beta), log_q + math.log(1.0 - beta))
    return beta * (log_t.exp() * (log_t - log_m)).sum() + (1.0 - beta) * (log_q.exp() * (log_q - log_m)).sum()


def hybrid(dense: Dense, log_q: Tensor, log_t: Tensor, pairs: tuple[Tensor, Tensor], weights: list[float]) -> Tensor:
    """Matched tokens one by one, the others by rank."""
    own, theirs = (set(each.tolist()) for each in pairs)
    others = [index for index in range(len(log_q)) if index not in own]
    their_others = [index for index in range(len(log_t)) if index not in theirs]
    matched = unnormalised(log_q[pairs[0]], log_t[pairs[1]], dense.beta)
    return weights[0] * matched + weights[1] * by_rank(log_q[others].exp(), log_t[their_others].exp())


def gold(dense: Dense, span: int) -> Tensor:
    def merged(log_p: Tensor, run: list[int], tokens: Tensor) -> Tensor:
        rows = list(range(run[0], run[0] + run[1]))
        base = rows[0] if dense.options["first_row"] else rows[-1]
        others = [log_p[row, tokens[row]] for row in rows if row != base]
        return log_p[base] + sum(others)

    spans = dense.spans
    log_q = merged(dense.log_s, spans.student[span].tolist(), spans.student_tokens)
    log_t = merged(dense.log_t, spans.teacher[span].tolist(), spans.teacher_tokens)
    weights = [dense.options["matched_weight"], dense.options["unmatched_weight"]]
    if weights == [0.0, 0.0]:
        share = len(dense.vocabulary.teacher_ids) / dense.log_t.shape[1]
        weights = [share, 1.0 - share]
    return hybrid(dense, log_q, log_t, (dense.vocabulary.student_ids, dense.vocabulary.teacher_ids), weights)


def xtoken(dense: Dense, span: int) -> Tensor | None:
    rows, projection = exact_rows(dense, span), dense.extra
    assert isinstance(projection, Projection)
    if rows is None:
        return None
    if dense.options["hybrid"]:
        pairs = projection.near_student, projection.near_teacher
        return hybrid(dense, dense.log_s[rows[0]], dense.log_t[rows[1]], pairs, [1.0, 1.0])
    own = (dense.student_logits[rows[0], projection.own] / dense.temperature).softmax(-1)
    log_t = (dense.teacher_logits[rows[1], projection.columns] / dense.temperature).log_softmax(-1)
    matrix = own.new_zeros(len(projection.own), len(projection.columns))
    matrix[projection.sources, projection.targets] = projection.weights.to(own.dtype)
    return dense.divergence(log_t[None], (own @ matrix).log()[None], rows[0])


def chunk(dense: Dense, span: int) -> Tensor:
    def likelihood(log_p: Tensor, run: list[int], tokens: Tensor) -> Tensor:
        return torch.stack([log_p[row, tokens[row]] for row in range(run[0], run[0] + run[1])]).sum()

    def coin(log_p: Tensor) -> Tensor:
        heads = log_p / dense.options["tau"] - 1e-6
        return torch.stack([heads, (-heads.expm1()).log()])[None]

    spans = dense.spans
    log_q = likelihood(dense.log_s, spans.student[span].tolist(), spans.student_tokens)
    log_p = likelihood(dense.log_t, spans.teacher[span].tolist(), spans.teacher_tokens)
    return dense.options["tau"] * dense.divergence(coin(log_p), coin(log_q), 0)


def dskd(dense: Dense, span: int) -> Tensor | None:
    rows, spaces = exact_rows(dense, span), dense.extra
    assert isinstance(spaces, DualSpaces)
    if rows is None:
        return None
    row, their_row = rows
    token, dtype = dense.spans.student_tokens[row], dense.log_s.dtype
    projected = spaces.to_student(dense.teacher.hidden[their_row].to(dtype))
    head = dense.student.head
    fixed = Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.softcap, head.scale)
    in_student = logits_of(Side(projected[None], fixed), dense.log_s.shape[1])
    of_projector = nn.functional.cross_entropy(in_student, token[None])
    target = (in_student.detach() / dense.temperature).log_softmax(-1)
    in_own = dense.divergence(target, dense.log_s[row][None], row)
    if dense.options["only_right"] and int(in_student.argmax()) != int(token):
        in_own = in_own * 0.0
    in_teacher = logits_of(
        Side(spaces.to_teacher(dense.student.hidden[row].to(dtype))[None], dense.teacher.head), dense.log_t.shape[1]
    )
    in_theirs = dense.divergence(dense.log_t[their_row][None], (in_teacher / dense.temperature).log_softmax(-1), row)
    return in_own + of_projector + in_theirs


DEFINITIONS: Mapping[str, Callable[[Dense, int], Tensor | None]] = {
    "shared-vocab": shared_vocab,
    "uld": uld,
    "gold": gold,
    "xtoken": xtoken,
    "chunk": chunk,
    "dskd": dskd,
}
"""By method: the value of a span, None where it is not compared."""
