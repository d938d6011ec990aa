"""Dual space: both models' hidden states compared in the student's space and in the teacher's, through two projectors.

On exact spans, where both models predict one token of the same bytes (exact token alignment):
    student space: D(softmax(head_S(h_T A)) || S), the teacher's rows through A [E, D] and the student's head; A learns
                   by the cross-entropy of that same distribution, the head fixed; only_right leaves out rows where the
                   projected teacher likes another token better than the text's
    teacher space: D(T || softmax(head_T(h_S B))), the student's rows through B [D, E] and the teacher's head
    kd = the sum of the three
DSKD v2, Zhang et al. 2025, arXiv 2504.11426; dual spaces 2406.17328. A and B start as least squares: so that the
projected rows have, over the shared tokens, the logits that they have in their own model.
Cost: three losses of one vocabulary, one after the other; head and projectors get gradients.
"""

# Shapes: N exact spans, D student width, E teacher width, S shared tokens.

import torch
from torch import Tensor, nn

from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.loss.cross.merged import Compared
from kdpipe.stages.loss.cross.task import Shared, Task
from kdpipe.stages.loss.head import Side
from kdpipe.stages.loss.problem import Problem, pose
from kdpipe.stages.models.head import Head

RIDGE = 1e-6
"""Of the mean square of a head's columns: keeps the least squares solvable where a head does not have full rank."""


class DualSpaces(nn.Module):
    """The projectors: to_student [E -> D], to_teacher [D -> E]."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.to_student = nn.Linear(teacher_width, student_width, bias=False)
        self.to_teacher = nn.Linear(student_width, teacher_width, bias=False)

    @torch.no_grad()
    def start(self, student: Head, teacher: Head, shared: Shared) -> None:
        """Least squares over the shared tokens' rows of both heads."""
        own, theirs = student.weight[shared.student_ids].float(), teacher.weight[shared.teacher_ids].float()
        self.to_student.weight.copy_(least_squares(own, theirs))
        self.to_teacher.weight.copy_(least_squares(theirs, own))


def least_squares(into: Tensor, of: Tensor) -> Tensor:
    """X [width, other width] with into @ X nearest to `of`; into [S, width], of [S, other width]."""
    gram = (into.T @ into).double()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-12))
    return torch.linalg.solve(gram, (into.T @ of).double()).float()


def projected(linear: nn.Linear, rows: Tensor, like: Tensor) -> Tensor:
    """Rows through a projector, in the dtype of `like`."""
    return linear(rows.to(linear.weight.dtype)).to(like.dtype)


def fixed(head: Head) -> Head:
    """The same head without gradients."""
    return Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.softcap, head.scale)


def student_space(task: Task, spaces: DualSpaces, chosen: Compared) -> Side:
    """The teacher's exact rows as rows of the student's head [N, D], with gradients to the projector alone."""
    rows = projected(spaces.to_student, task.teacher.hidden[chosen.teacher].detach(), task.problem.student.hidden)
    return Side(rows, fixed(task.problem.student.head))


def further_problems(
    task: Task, spaces: DualSpaces, chosen: Compared, in_student: Side, spec: LossSpec
) -> list[Problem]:
    """The two sums beside the student's own space: the projector's cross-entropy, and the teacher's space."""
    weights = task.span_weights()[chosen.spans] * task.kd_scale
    scale, tokens = task.problem.loss_scale, task.spans.student_tokens[chosen.student]
    plain = spec.model_copy(
        update={"scale_t2": False, "label_smoothing": 0.0, "z_loss": 0.0, "options": dict(task.divergence_options)}
    )
    in_teacher = Side(
        projected(spaces.to_teacher, task.problem.student.hidden[chosen.student], task.teacher.hidden),
        fixed(task.teacher.head),
    )
    return [
        pose(
            in_student,
            (),
            tokens,
            loss=plain.model_copy(update={"kd_weight": 0.0}),
            vocab_size=task.student_size,
            weights=weights,
            loss_scale=scale,
        ),
        pose(
            in_teacher,
            [task.teacher_rows(chosen.teacher)],
            None,
            loss=plain.model_copy(update={"kd_weight": 1.0}),
            vocab_size=task.teacher_size,
            weights=weights,
            keys=task.keys[chosen.student],
            seed=task.seed,
            loss_scale=scale,
        ),
    ]
