"""Importance: a row whose token an older student wrote weighs as the student of now would have written it.

    w = min(p_now(token) / p_written(token), cap)          p: of softmax(logits / temperature), before top-k and top-p

Truncated importance sampling: Ionides 2008, Journal of Computational and Graphical Statistics 17(2); for policies
Espeholt et al. 2018, arXiv 1802.01561. A weight is a constant of its row: no gradient goes through it.
Limit: the divergence of a row is over the whole vocabulary and depends on the tokens before it. The weight corrects the
factor of the row's own token alone; that of the whole answer, their product, has a variance that grows with its length.
Cost: the student's head once more for these rows, a few at a time.
"""

# Shapes: R rows of a batch, K of them that older weights wrote, V vocabulary.

import torch
from torch import Tensor

from kdpipe.stages.loss.head import Side

CHUNK_LOGITS = 1 << 24
"""fp32 logits that exist at a time, 64 MiB."""


class Importance:
    """Makes the weights of batches, and remembers what they were until it is asked.

    cap: largest weight
    temperature: by which the answers were drawn
    """

    def __init__(self, cap: float, temperature: float) -> None:
        self._cap, self._temperature = cap, temperature
        self._seen: list[Tensor] = []

    @torch.no_grad()
    def weights(self, student: Side, tokens: Tensor, rows: Tensor, written: Tensor, vocab_size: int) -> Tensor:
        """fp32 [R]: w of some rows, 1 of the others.

        tokens: int64 [R], what each row's next token is
        rows: int64 [K], those that older weights wrote; written: fp32 [K], the log-probability that it had then
        """
        own = Side(student.hidden[rows], student.head)
        ratios = (logprobs(own, tokens[rows], vocab_size, self._temperature) - written).exp()
        # The logits of what is not a number are not either, and neither is the loss: that is noticed by the step.
        found = ratios.clamp_max(self._cap).nan_to_num(nan=1.0)
        figures = [torch.full_like(found[0], len(rows)), found.sum(), (ratios > self._cap).sum(), found.amax()]
        self._seen.append(torch.stack([figure.double() for figure in figures]))
        weights = torch.ones(len(tokens), dtype=torch.float32, device=tokens.device)
        return weights.index_copy_(0, rows, found)

    def take(self, device: torch.device) -> tuple[Tensor, float]:
        """Of the weights since it was asked last: their number, their sum and how many the cap cut [3]; the largest."""
        seen, self._seen = torch.stack([torch.zeros(4, dtype=torch.float64, device=device), *self._seen]), []
        return seen[:, :3].sum(0), float(seen[:, 3].max())


def logprobs(side: Side, tokens: Tensor, vocab_size: int, temperature: float) -> Tensor:
    """Log-probability fp32 [K] of a token after each row, among the first V, at a temperature."""
    count, weight = max(1, CHUNK_LOGITS // vocab_size), side.head.weight[:vocab_size]
    found = []
    for hidden, wanted in zip(side.hidden.split(count), tokens.split(count), strict=True):
        logits = side.head.finish.apply((hidden @ weight.T).float(), side.head.bias) / temperature
        found.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(found)
