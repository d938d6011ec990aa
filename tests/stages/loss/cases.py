"""Random loss inputs of odd sizes, and the truth in fp64 to measure errors against."""

# Shapes: T tokens, V vocabulary, D student width, E teacher width.

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.loss import DistillLoss, reference_distill_loss
from kdpipe.stages.loss.head import Side
from kdpipe.stages.loss.problem import pose_tensors
from kdpipe.stages.loss.reference import loss_of_logits

CROSS_ENTROPIES = {"soft_cross_entropy", "top1_ce"}
"""Their value at equality is an entropy, not 0."""
OF_TOKENS = {"token_reverse_kl"}
"""They look at the token that follows."""
SAMPLED = {"sampled_kl"} | OF_TOKENS
"""What holds for a divergence holds for it on average only."""


@dataclass(frozen=True, slots=True)
class Inputs:
    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor
    student_bias: Tensor
    teacher_bias: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another dtype, the student's ready for gradients."""
        return Inputs(
            self.student_hidden.detach().to(dtype).requires_grad_(),
            self.student_head.detach().to(dtype).requires_grad_(),
            self.teacher_hidden.to(dtype),
            self.teacher_head.to(dtype),
            self.labels,
            self.student_bias.detach().to(dtype).requires_grad_(),
            self.teacher_bias.to(dtype),
        )

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.student_hidden, self.student_head, self.student_bias


def make_inputs(
    num_tokens: int = 507,
    vocab_size: int = 251,
    *,
    teacher_rows: int | None = None,
    student_rows: int | None = None,
    scale: float = 2.0,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """D = 123, E = 77; logits of standard deviation `scale`; every third label is -100."""
    generator = torch.Generator().manual_seed(num_tokens + vocab_size)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    labels[::3] = -100
    inputs = Inputs(
        draw(num_tokens, 123),
        draw(student_rows or vocab_size, 123) * scale / 123**0.5,
        draw(num_tokens, 77),
        draw(teacher_rows or vocab_size, 77) * scale / 77**0.5,
        labels,
        draw(student_rows or vocab_size),
        draw(teacher_rows or vocab_size),
    )
    return inputs.to(dtype)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A loss with its gradients; a gradient that was not asked for is None."""

    out: DistillLoss
    gradients: tuple[Tensor | None, ...]


def outcome(function: Any, inputs: Inputs, *, bias: bool = False, labels: bool = True, **arguments: Any) -> Outcome:
    """`function` on the inputs, and the gradients of 4 * loss: the factor shows that backward scales."""
    if bias:
        arguments |= {"student_bias": inputs.student_bias, "teacher_bias": inputs.teacher_bias}
    if not labels and arguments.get("divergence") in OF_TOKENS:
        arguments["next_tokens"] = inputs.labels.clamp_min(0)
    out = function(
        inputs.student_hidden,
        inputs.student_head,
        inputs.teacher_hidden,
        inputs.teacher_head,
        inputs.labels if labels else None,
        **arguments,
    )
    wanted = [each for each in inputs.leaves if each.requires_grad]
    found = iter(torch.autograd.grad(4.0 * out.loss, wanted, allow_unused=True))
    return Outcome(out, tuple(next(found) if each.requires_grad else None for each in inputs.leaves))


def truth(inputs: Inputs, **arguments: Any) -> Outcome:
    return outcome(reference_distill_loss, inputs.to(torch.float64), **arguments)


def naive(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor | None = None,
    **arguments: Any,
) -> DistillLoss:
    """What one writes without thinking of memory: products in the inputs' dtype, the rest in fp32, autograd."""
    problem = pose_tensors(student_hidden, student_head, teacher_hidden, teacher_head, labels, **arguments)

    def logits(side: Side) -> Tensor:
        raw = (side.hidden @ side.head.weight[: problem.vocab_size].T).float()
        return side.head.finish.apply(raw, side.head.bias)

    return loss_of_logits(problem, logits(problem.student), [logits(teacher) for teacher in problem.teachers])


def errors(found: Outcome, right: Outcome) -> list[float]:
    """Relative errors of kd, ce, z, loss and of each gradient, in that order; 0 where there is nothing to compare."""
    pairs = [(getattr(found.out, name), getattr(right.out, name)) for name in ("kd", "ce", "z", "loss")]
    pairs += [(a, b) for a, b in zip(found.gradients, right.gradients, strict=True) if a is not None and b is not None]
    return [float((a.detach().double() - b.detach()).norm() / b.detach().norm().clamp_min(1e-9)) for a, b in pairs]


def arguments_of(spec: LossSpec) -> dict[str, Any]:
    """A run file's [loss] as arguments of fused_distill_loss."""
    return spec.model_dump(exclude={"preset", "options"}) | spec.options
