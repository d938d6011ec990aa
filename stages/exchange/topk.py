"""Top-k: the likeliest tokens after each row of a teacher, and their log-probabilities over the whole vocabulary.

Invariant: what is left out is left out, not spread over what is kept: the k probabilities sum to less than 1.
Cost: a product with the head and a softmax in fp32, CHUNK_ROWS rows at a time.
"""

# Shapes: R rows, K tokens kept of each, V vocabulary, E teacher width.

from dataclasses import dataclass

import numpy as np
import torch

from kdpipe.manifests.errors import ConfigError
from kdpipe.stages.feed.dataset import Teacher
from kdpipe.stages.loss import Side
from kdpipe.stages.loss.metrics import wide_logits
from kdpipe.stages.student import load_teacher_head

CHUNK_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Top:
    """The likeliest tokens of some rows, falling: ids int32 [R, K] and log-probabilities float32 [R, K]."""

    ids: np.ndarray
    logprobs: np.ndarray


class TopK:
    """Cuts a teacher's rows to their k likeliest tokens. Raises ConfigError where it has fewer tokens."""

    def __init__(self, teacher: Teacher, k: int, device: torch.device) -> None:
        self.vocab_size = teacher.record.vocab_size
        if k > self.vocab_size:
            raise ConfigError(f"{k} tokens of a vocabulary of {self.vocab_size}; keep fewer", where="--top-k")
        self.k, self._device, self._dtype = k, device, teacher.dtype
        self._head = load_teacher_head(teacher, device).head

    @torch.no_grad()
    def of(self, rows: np.ndarray) -> Top:
        """Of rows [R, E]."""
        bits = torch.from_numpy(np.array(rows.view(np.uint8)))
        side = Side(bits.view(self._dtype).to(self._device), self._head)
        logits = torch.empty(min(len(rows), CHUNK_ROWS), self.vocab_size, device=self._device)
        found = []
        for start in range(0, len(rows), CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, len(rows))
            found.append(wide_logits(side, start, stop, logits).log_softmax(-1).topk(self.k, -1))
        ids = [each.indices.int().cpu().numpy() for each in found]
        logprobs = [each.values.cpu().numpy() for each in found]
        none = np.zeros((0, self.k))
        return Top(
            ids=np.concatenate([none.astype(np.int32), *ids]),
            logprobs=np.concatenate([none.astype(np.float32), *logprobs]),
        )
