"""Likelihood of equal text: each span's probability under both models, compared as the outcome of one coin.

    p = exp(sum of log T / tau),  q = exp(sum of log S / tau)     over the span's own tokens, a little below 1
    loss of a span = tau D({p, 1 - p}, {q, 1 - q}), any divergence of the table that does not draw or rank

Approximate likelihood matching, Minixhofer et al. 2025, arXiv 2503.20083. Theirs has no factor tau: at their tau of 100
it is some hundredths of a cross-entropy, and its weight is left to a balance of gradients. With the factor the forward
KL of a large tau is a log(a / b) - a + b, a and b the surprisals of teacher and student, whatever tau. Only the tokens
that were written count, so no two vocabularies meet; a span's gradient is a pull on the log-probability of each of its
tokens.
Cost: the student's logits twice, the teacher's once.
"""

# Shapes: K spans, R rows of the student.

import torch
from torch import Tensor

from kdpipe.stages.loss.cross.passes import Pass, Passes, likelihoods
from kdpipe.stages.loss.cross.rows import Rows
from kdpipe.stages.loss.cross.task import Task
from kdpipe.stages.loss.divergences import Divergence
from kdpipe.stages.loss.head import Side
from kdpipe.stages.loss.spans import members

BELOW_ONE = 1e-6
"""Taken from each log p / tau, so that 1 - p has a logarithm too: as tokenkit does."""


def chunk_passes(task: Task) -> Passes:
    """One pass over all rows, after both models' likelihoods of the spans."""
    own, (rows, spans) = task.problem.student, members(task.spans.student)
    chunk = task.chunk_rows
    with torch.no_grad():
        log_s = _summed(own, task.spans.student, task.spans.student_tokens, task.student_size, task.temperature, chunk)
        log_t = _summed(
            task.teacher, task.spans.teacher, task.spans.teacher_tokens, task.teacher_size, task.temperature, chunk
        )
    values, slopes = coin_distance(task.divergence, dict(task.divergence_options), log_t, log_s, task.options["tau"])
    weights = task.span_weights() * task.kd_scale
    pulls = torch.zeros_like(task.weights).index_copy_(0, rows, (slopes * weights)[spans])
    kd = torch.zeros_like(task.weights).index_add_(0, task.spans.student[:, 0], values * weights)
    yield Pass(
        start=0,
        stop=len(task.labels),
        rows=Rows(
            labels=task.labels,
            weights=task.weights,
            tokens=task.spans.student_tokens,
            pulls=pulls,
            kd=kd,
        ),
    )


def _summed(side: Side, runs: Tensor, tokens: Tensor, size: int, temperature: float, chunk: int) -> Tensor:
    """Log-likelihood of each span's own tokens, fp32 [K]."""
    rows, spans = members(runs)
    found = likelihoods(
        Side(side.hidden.detach()[rows], side.head), tokens[rows], size, temperature, chunk_tokens=chunk
    )
    return found.new_zeros(len(runs)).index_add_(0, spans, found)


def coin_distance(
    divergence: Divergence, options: dict[str, float], log_t: Tensor, log_s: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """tau D of the two coins [K] and its slope with respect to log_s [K]; in fp64, as both coins are almost certain."""
    with torch.enable_grad():
        own = log_s.double().detach().requires_grad_()
        values = tau * divergence.reference(coin(log_t.double(), tau), coin(own, tau), **options)
        (slopes,) = torch.autograd.grad(values.sum(), own)
    return values.detach().to(log_s.dtype), slopes.to(log_s.dtype)


def coin(log_p: Tensor, tau: float) -> Tensor:
    """log of p^(1/tau) and of its complement [K, 2]."""
    heads = log_p / tau - BELOW_ONE
    # log(1 - p): of -expm1 near 1, of log1p near 0, whichever keeps its digits.
    near = heads > -0.6931
    tails = torch.where(near, (-heads.where(near, heads.new_tensor(-1.0)).expm1()).log(), (-heads.exp()).log1p())
    return torch.stack([heads, tails], -1)
