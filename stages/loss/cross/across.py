"""distill_across: the loss of a student whose tokenizer is not its teacher's, fused, by any method of the table.

    loss = loss_scale * (kd_weight * kd + (1 - kd_weight) * ce + z_loss * z)

kd is a sum over spans, each counted once and times the mean weight of its student rows; ce and z are sums over the
student's rows, at its whole vocabulary. A step divides both by its number of supervised student tokens, so kd/mean is
comparable between methods and batches: what did not align counts as nothing, never as a larger weight of the rest.
Invariant: no array of [rows, vocabulary] of either model exists; the result does not depend on how rows are chunked.
"""

# Shapes: K spans, R rows of the student, P rows of the teacher.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.nearest import nearest
from kdpipe.manifests.sample import IGNORED
from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.loss.cross.dual import DualSpaces, further_problems, student_space
from kdpipe.stages.loss.cross.likelihood import chunk_passes
from kdpipe.stages.loss.cross.merged import Compared, exact_rows, first_rows, last_rows, merged_passes, plain_passes
from kdpipe.stages.loss.cross.methods import Method, find_method
from kdpipe.stages.loss.cross.pairs import HybridPair, SamePair, SharedPair, places_of
from kdpipe.stages.loss.cross.passes import Passes, Work, summed
from kdpipe.stages.loss.cross.projection import ProjectedPair, Projection, pieces_of
from kdpipe.stages.loss.cross.task import Order, Shared, Task, alone, compared
from kdpipe.stages.loss.divergences import Divergence, find
from kdpipe.stages.loss.fused import distill
from kdpipe.stages.loss.head import Side
from kdpipe.stages.loss.problem import DistillLoss, Metrics, checked_weights, pose
from kdpipe.stages.loss.spans import Spans
from kdpipe.stages.models.head import Head


def distill_across(
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
    """Sums over spans (kd) and rows (ce, z) and the loss, with gradients to the student's hidden, head, bias and extra.

    student: hidden [R, D], a row for each supervised token; teacher: hidden [P, E]; labels int64 [R], -100 for no ce
    extra: the module of `extra_of`, where the method has one
    weights fp32 [R], keys int64 [R]: as in fused_distill_loss, of the student's rows
    Raises ConfigError where sizes, dtypes, spans or options do not fit.
    """
    task = posed(
        student,
        teacher,
        spans,
        labels,
        method=find_method(method),
        loss=loss,
        vocabulary=vocabulary,
        extra=extra,
        weights=weights,
        keys=keys,
        seed=seed,
        loss_scale=loss_scale,
    )
    if task.kd_weight == 0.0:
        return distill(task.problem, chunk_tokens=loss.chunk_tokens, head_grad_fp32=loss.head_grad_fp32)
    plan = PLANS[method](task)
    hidden = task.problem.student.hidden
    own = hidden if plan.order is None else hidden.index_select(0, plan.order.rows)
    work = Work(
        problem=replace(task.problem, student=Side(own, task.problem.student.head)),
        kd_weight=task.kd_weight,
        kd_scale=task.kd_scale,
        temperature=task.temperature,
        passes=plan.passes,
        widest=max(task.student_size, task.teacher_size),
    )
    total, seen = summed(work, chunk_tokens=loss.chunk_tokens, head_grad_fp32=loss.head_grad_fp32)
    kd, ce, z, entropy = seen.values
    for further in plan.further(loss):
        found = distill(further, chunk_tokens=loss.chunk_tokens, head_grad_fp32=loss.head_grad_fp32)
        total = total + task.kd_weight * found.loss
        kd = kd + (found.kd if further.teachers else found.ce)
    agree, mass = seen.ranks
    metrics = Metrics(
        teacher_entropy=entropy,
        top1_agree=agree,
        top_k_mass=mass,
        num_taught=seen.num_taught,
        num_ranked=seen.num_ranked,
    )
    return DistillLoss(kd=kd, ce=ce, z=z, loss=total, metrics=metrics)


def posed(
    student: Side,
    teacher: Side,
    spans: Spans,
    labels: Tensor | None,
    *,
    method: Method,
    loss: LossSpec,
    vocabulary: Shared,
    extra: nn.Module | None,
    weights: Tensor | None,
    keys: Tensor | None,
    seed: int,
    loss_scale: Tensor | float,
) -> Task:
    """The checked arguments; ConfigError in one line where two disagree."""
    options, divergence_options = check_loss(method.name, loss)
    alone = loss.model_copy(update={"kd_weight": 0.0, "divergence": "forward_kl", "options": {}})
    num_rows = student.hidden.shape[0]
    if labels is None and loss.kd_weight < 1.0:
        raise ConfigError(f"kd_weight {loss.kd_weight} mixes in cross-entropy and so needs labels", where="loss")
    if labels is None:
        labels = torch.full((num_rows,), IGNORED, dtype=torch.int64, device=student.hidden.device)
    problem = pose(
        student,
        (),
        labels,
        loss=alone,
        vocab_size=vocabulary.student_size,
        weights=weights,
        seed=seed,
        loss_scale=loss_scale,
    )
    assert problem.labels is not None
    if not 0.0 <= loss.kd_weight <= 1.0:
        raise ConfigError(f"kd_weight must be a number in 0..1, got {loss.kd_weight!r}", where="loss")
    teacher.check(vocabulary.teacher_size, "teacher")
    spans.check()
    counts = len(spans.student_tokens), len(spans.teacher_tokens)
    if counts != (num_rows, teacher.hidden.shape[0]):
        raise ConfigError(
            f"spans are of {counts[0]} student and {counts[1]} teacher rows, hidden states have "
            f"{num_rows} and {teacher.hidden.shape[0]}",
            where="loss",
        )
    given = (
        torch.ones(num_rows, device=student.hidden.device) if weights is None else checked_weights(weights, num_rows)
    )
    return Task(
        problem=problem,
        teacher=Side(teacher.hidden.detach(), teacher.head),
        spans=spans,
        vocabulary=vocabulary,
        extra=extra,
        divergence=find(loss.divergence),
        divergence_options=divergence_options,
        options=options,
        temperature=float(loss.temperature),
        kd_weight=float(loss.kd_weight),
        kd_scale=float(loss.temperature) ** 2 if loss.scale_t2 else 1.0,
        weights=given,
        labels=problem.labels,
        keys=torch.arange(num_rows, device=student.hidden.device) if keys is None else keys,
        seed=seed,
        chunk_tokens=loss.chunk_tokens,
    )


def check_loss(name: str, loss: LossSpec) -> tuple[dict[str, float], dict[str, float]]:
    """The options of a method and those of its divergence, with their values.

    Raises ConfigError for a method that is none, a divergence that it does not take, an option that neither has.
    """
    method = find_method(name)
    if method.divergences and loss.divergence not in method.divergences:
        raise ConfigError(
            f"{loss.divergence} is not for method {method.name}, which takes: {', '.join(method.divergences)}",
            where="loss.divergence",
        )
    if not method.divergences and loss.divergence != LossSpec.model_fields["divergence"].default:
        raise ConfigError(
            f"method {method.name} has a distance of its own, got {loss.divergence!r}; leave it out",
            where="loss.divergence",
        )
    return resolved(method, find(loss.divergence) if method.divergences else None, loss.options)


def resolved(
    method: Method, divergence: Divergence | None, given: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Options of the method and of its divergence, all with values; ConfigError for a name that neither has."""
    theirs = {} if divergence is None else divergence.options
    known = [*method.options, *theirs]
    for name in given:
        if name not in known:
            raise ConfigError(
                f"unknown option '{name}', it takes: {', '.join(known) or 'none'}{nearest(name, known)}",
                where=f"method {method.name}" + ("" if divergence is None else f" with {divergence.name}"),
            )
    rest = {name: value for name, value in given.items() if name in theirs}
    return method.resolve(given), {} if divergence is None else divergence.resolve(rest)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Passes over the student's rows in `order` (None: as they are), and problems whose losses are added."""

    passes: Callable[[], Passes]
    order: Order | None = None
    further: Callable[[LossSpec], list[Any]] = lambda _: []


def _order(task: Task, chosen: Compared) -> Order:
    return Order.of(chosen.student, chosen.spans, len(task.labels))


def _formula(task: Task) -> dict[str, Any]:
    return {
        "divergence": task.divergence.name,
        "options": tuple(task.divergence_options.items()),
        "temperature": task.temperature,
    }


def _shared_vocab(task: Task) -> Plan:
    chosen = exact_rows(task)
    order = _order(task, chosen)
    own, theirs = shared_ids(task)
    tables = own, theirs, places_of(own, task.student_size)
    return Plan(passes=lambda: plain_passes(task, order, chosen, SharedPair(**_formula(task)), tables), order=order)


def _uld(task: Task) -> Plan:
    chosen = first_rows(task)
    order = _order(task, chosen)
    nothing = torch.zeros(0, dtype=torch.int64, device=task.labels.device)
    tables = hybrid_tables(nothing, nothing, task.student_size, task.teacher_size)
    pair = HybridPair(beta=0.0, matched=0.0, unmatched=1.0, temperature=task.temperature)
    return Plan(passes=lambda: plain_passes(task, order, chosen, pair, tables), order=order)


def _gold(task: Task) -> Plan:
    chosen = first_rows(task) if task.options["first_row"] else last_rows(task)
    order = _order(task, chosen)
    own, theirs = shared_ids(task)
    pair, tables = _hybrid(task, own, theirs, task.options["matched_weight"], task.options["unmatched_weight"])
    return Plan(passes=lambda: merged_passes(task, order, chosen, pair, tables), order=order)


def _xtoken(task: Task) -> Plan:
    projection, chosen = task.extra, exact_rows(task)
    if not isinstance(projection, Projection):
        raise ConfigError("method xtoken needs its projection between the vocabularies, see extra_of", where="loss")
    order = _order(task, chosen)
    if task.options["hybrid"]:
        if task.divergence.name not in BETAS:
            raise ConfigError(
                f"{task.divergence.name} is not for xtoken with hybrid = 1, which takes: {', '.join(BETAS)}",
                where="loss.divergence",
            )
        pair, tables = _hybrid(task, projection.near_student, projection.near_teacher, 1.0, 1.0)
        return Plan(passes=lambda: plain_passes(task, order, chosen, pair, tables), order=order)
    entries = projection.tables(task.student_size)
    return Plan(passes=lambda: plain_passes(task, order, chosen, ProjectedPair(**_formula(task)), entries), order=order)


def _chunk(task: Task) -> Plan:
    return Plan(passes=lambda: chunk_passes(task))


def _dskd(task: Task) -> Plan:
    spaces, chosen = task.extra, exact_rows(task)
    if not isinstance(spaces, DualSpaces):
        raise ConfigError("method dskd needs its two projectors, see extra_of", where="loss")
    order, in_student = _order(task, chosen), student_space(task, spaces, chosen)
    pair = SamePair(**_formula(task), only_right=bool(task.options["only_right"]))
    seen = Side(in_student.hidden.detach(), in_student.head)

    def passes() -> Passes:
        yield from compared(task, order, seen, pair, teacher_size=task.student_size, is_projected=True)
        yield from alone(task, order)

    return Plan(
        passes=passes, order=order, further=lambda loss: further_problems(task, spaces, chosen, in_student, loss)
    )


BETAS = {"jsd": None, "forward_kl": 0.0, "reverse_kl": 1.0}
"""Divergences that HybridPair has, by their beta; jsd's is an option."""


def _hybrid(
    task: Task, own: Tensor, theirs: Tensor, matched: float, unmatched: float
) -> tuple[HybridPair, tuple[Tensor, ...]]:
    """matched, unmatched: weights; both 0: the share of the teacher's tokens that is matched, and 1 less it."""
    if matched == unmatched == 0.0:
        matched = len(theirs) / task.teacher_size
        unmatched = 1.0 - matched
    beta = BETAS[task.divergence.name]
    beta = task.divergence_options["beta"] if beta is None else beta
    pair = HybridPair(beta=beta, matched=matched, unmatched=unmatched, temperature=task.temperature)
    return pair, hybrid_tables(own, theirs, task.student_size, task.teacher_size)


def shared_ids(task: Task) -> tuple[Tensor, Tensor]:
    """Ids of the tokens that both have, within both heads; ConfigError where there are none."""
    device = task.labels.device
    own, theirs = task.vocabulary.student_ids.to(device), task.vocabulary.teacher_ids.to(device)
    if not len(own):
        raise ConfigError("the two tokenizers share no token; method chunk needs none", where="student.align")
    if own.device.type == "cpu" and (int(own.max()) >= task.student_size or int(theirs.max()) >= task.teacher_size):
        raise ConfigError("shared tokens lie outside of a head's vocabulary", where="student.align")
    return own, theirs


def hybrid_tables(own: Tensor, theirs: Tensor, student_size: int, teacher_size: int) -> tuple[Tensor, ...]:
    """HybridPair's tables of these matched tokens."""
    other_student, other_teacher = _without(own, student_size), _without(theirs, teacher_size)
    return own, theirs, other_student, other_teacher, places_of(torch.cat([own, other_student]), student_size)


def _without(ids: Tensor, size: int) -> Tensor:
    """The entries of a vocabulary that are not in `ids`."""
    others = torch.ones(size, dtype=torch.bool, device=ids.device)
    others[ids] = False
    return others.nonzero()[:, 0]


PLANS: Mapping[str, Callable[[Task], Plan]] = {
    "shared-vocab": _shared_vocab,
    "uld": _uld,
    "gold": _gold,
    "xtoken": _xtoken,
    "chunk": _chunk,
    "dskd": _dskd,
}


def extra_of(
    method: str,
    student_width: int,
    teacher_width: int,
    vocabulary: Shared,
    options: Mapping[str, float],
    *,
    heads: tuple[Head, Head] | None = None,
    encode: Callable[[str], Sequence[int]] | None = None,
) -> nn.Module | None:
    """What a method has beside the two models: dskd's projectors, to be trained; xtoken's projection, fixed.

    options: loss.options
    heads: the student's and the teacher's, from which dskd's projectors start; without them at random
    encode: the teacher's tokenizer without special tokens, by which xtoken cuts the student's; without it by the
        longest tokens that fit
    """
    chosen = find_method(method)
    given = chosen.resolve(options)
    if method == "dskd":
        spaces = DualSpaces(student_width, teacher_width)
        if heads is not None:
            spaces.start(*heads, vocabulary)
        return spaces
    if method == "xtoken":
        pieces = pieces_of(vocabulary, encode)
        return Projection(pieces, top_k=int(given["top_k"]), decay=given["decay"], threshold=given["threshold"])
    return None
