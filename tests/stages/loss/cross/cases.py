"""Random inputs of a loss across tokenizers, of odd sizes, and what is compared of its results."""

# Shapes: R rows of the student, P rows of the teacher, V and U their vocabularies, K spans.

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.loss import DistillLoss, Head, Side
from kdpipe.stages.loss.cross import extra_of
from kdpipe.stages.loss.spans import Spans

STUDENT_WIDTH, TEACHER_WIDTH = 23, 31


@dataclass(frozen=True)
class Pairs:
    """Tokens that both models have."""

    student_ids: Tensor
    teacher_ids: Tensor
    student_size: int
    teacher_size: int
    student_bytes: list[bytes | None]
    teacher_bytes: list[bytes | None]


@dataclass(frozen=True)
class Case:
    """All arguments but method and loss. softcap, scale and biases are on, so that nothing is left out."""

    student_hidden: Tensor
    student_head: Tensor
    student_bias: Tensor
    teacher: Side
    spans: Spans
    labels: Tensor
    vocabulary: Pairs

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers in another dtype, the student's ready for gradients."""
        head = self.teacher.head
        weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
        return replace(
            self,
            student_hidden=self.student_hidden.detach().to(dtype).requires_grad_(),
            student_head=self.student_head.detach().to(dtype).requires_grad_(),
            student_bias=self.student_bias.detach().to(dtype).requires_grad_(),
            teacher=Side(self.teacher.hidden.to(dtype), Head(weight, bias, head.softcap, head.scale)),
        )

    @property
    def student(self) -> Side:
        return Side(self.student_hidden, Head(self.student_head, self.student_bias, 20.0, 1.5))


def runs_of(lengths: Tensor, gaps: Tensor, after: int) -> tuple[Tensor, int]:
    """Runs [K, 2] of these lengths with a gap before each, and how many rows there are, `after` more at the end."""
    starts = (lengths + gaps).cumsum(0) - lengths
    return torch.stack([starts, lengths], 1), int((lengths + gaps).sum()) + after


def make_case(
    num_spans: int = 29,
    *,
    sizes: tuple[int, int] = (53, 61),
    num_shared: int = 37,
    exact: float = 0.6,
    scale: float = 2.0,
    padding: tuple[int, int] = (0, 0),
    covered: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Spans of one to three rows on each side, `exact` of them of one; some rows are of no span, unless `covered`."""
    generator = torch.Generator().manual_seed(num_spans + sizes[0])

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    alike = torch.rand(num_spans, generator=generator) < exact
    gap, after = (1, 0) if covered else (2, 2)
    student, num_rows = runs_of(whole(1, 4, num_spans).masked_fill(alike, 1), whole(0, gap, num_spans), after)
    teacher, their_rows = runs_of(whole(1, 4, num_spans).masked_fill(alike, 1), whole(0, gap, num_spans), after)
    labels = whole(0, sizes[0], num_rows)
    spans = Spans(
        student=student, teacher=teacher, student_tokens=labels, teacher_tokens=whole(0, sizes[1], their_rows)
    )
    own = torch.randperm(sizes[0], generator=generator)[:num_shared].sort().values
    theirs = torch.randperm(sizes[1], generator=generator)[:num_shared]
    same = dict(zip(own.tolist(), theirs.tolist(), strict=True))
    # A token of the student's alone is some of the teacher's in a row; every seventh is special.
    their_bytes: list[bytes | None] = [bytes([256 - sizes[1] + index]) for index in range(sizes[1])]
    own_bytes = [
        their_bytes[same[index]]
        if index in same
        else b"".join(their_bytes[each] or b"" for each in whole(0, sizes[1], int(whole(2, 6, 1))).tolist())
        if index % 7
        else None
        for index in range(sizes[0])
    ]
    case = Case(
        student_hidden=draw(num_rows, STUDENT_WIDTH),
        student_head=draw(sizes[0] + padding[0], STUDENT_WIDTH) * scale / STUDENT_WIDTH**0.5,
        student_bias=draw(sizes[0] + padding[0]),
        teacher=Side(
            draw(their_rows, TEACHER_WIDTH),
            Head(
                draw(sizes[1] + padding[1], TEACHER_WIDTH) * scale / TEACHER_WIDTH**0.5,
                draw(sizes[1] + padding[1]),
                15.0,
                0.8,
            ),
        ),
        spans=spans,
        labels=labels.masked_fill(torch.arange(num_rows) % 5 == 0, -100),
        vocabulary=Pairs(own, theirs, *sizes, own_bytes, their_bytes),
    )
    return case.to(dtype)


def module_of(method: str, case: Case, options: dict[str, float]) -> nn.Module | None:
    """The method's extra module, in the dtype of the case."""
    torch.manual_seed(0)
    heads = Head(case.student_head.detach()), Head(case.teacher.head.weight)
    return extra_of(method, STUDENT_WIDTH, TEACHER_WIDTH, case.vocabulary, options, heads=heads)


@dataclass(frozen=True)
class Outcome:
    """A loss, and the gradients of 4 * loss to hidden, head, bias and the extra's parameters."""

    out: DistillLoss
    gradients: tuple[Tensor | None, ...]


def outcome(function: Callable[..., DistillLoss], case: Case, method: str, **spec: Any) -> Outcome:
    """`function` on a case; spec: keys of [loss], and `more` for arguments of the call."""
    more = spec.pop("more", {})
    loss = LossSpec(**spec)
    extra = module_of(method, case, loss.options)
    if extra is not None and case.student_hidden.dtype == torch.float64:
        extra = extra.double()
    out = function(
        case.student,
        case.teacher,
        case.spans,
        case.labels,
        method=method,
        loss=loss,
        vocabulary=case.vocabulary,
        extra=extra,
        **more,
    )
    leaves = [case.student_hidden, case.student_head, case.student_bias, *([] if extra is None else extra.parameters())]
    return Outcome(out, torch.autograd.grad(4.0 * out.loss, leaves, allow_unused=True))


def errors(found: Outcome, right: Outcome) -> dict[str, float]:
    """Relative errors of the sums and of each gradient."""
    pairs = {name: (getattr(found.out, name), getattr(right.out, name)) for name in ("kd", "ce", "z", "loss")}
    for place, (own, true) in enumerate(zip(found.gradients, right.gradients, strict=True)):
        if true is not None:
            assert own is not None, f"gradient {place} is missing"
            pairs[f"gradient {place}"] = own, true
    return {
        name: float((own.detach().double() - true.detach()).norm() / true.detach().norm().clamp_min(1e-9))
        for name, (own, true) in pairs.items()
    }
