"""Kept: what a side-car keeps of each row of a teacher's, made of the row and the teacher's head.

    a shard's rows -> CHUNK_ROWS at a time -> log T [C, V] -> KEPT[kind] -> rows [C, W]

Invariant: a shard's chunks are the same whenever it is made, so that its bytes are: how many rows a product has decides
its last bits. A draw is a function of the seed and of the row's number in the cache.
Cost: a product with the head and a softmax in fp32, of each row.
"""

# Shapes: C rows of a chunk, V vocabulary, E teacher width, W numbers of a side-car's row.

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.sample import row_positions
from kdpipe.manifests.sidecar import Kind, Sidecar, id_bytes
from kdpipe.manifests.verify import check
from kdpipe.stages.draws import uniform
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.feed.packing import ROWS_A_SAMPLE
from kdpipe.stages.loss import Side
from kdpipe.stages.loss.memory import keep_heap
from kdpipe.stages.loss.metrics import wide_logits
from kdpipe.stages.loss.pointwise import drawn_places
from kdpipe.stages.student import load_teacher_head

CHUNK_ROWS = 512
"""Of a product: each widens the head to fp32 once."""
BLOCK_ELEMENTS = 1 << 21
"""Of log T at a time, behind the product: what the allocator keeps for the next block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is kept of a row; seed: of the draws."""

    sidecar: Sidecar
    seed: int = 0

    @property
    def arguments(self) -> dict[str, str]:
        """What decides the rows, for PLAN.json."""
        found: dict[str, str] = {"kind": self.sidecar.kind}
        if self.sidecar.kind != "logprob":
            found["tokens"] = str(self.sidecar.entries)
        return found | ({"seed": str(self.seed)} if self.sidecar.kind == "sampled" else {})


class CheckedRows:
    """The rows of a cache, each of whose shards is checked, every byte of it, before one is read."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self._checked = cache, -1

    def of(self, index: int) -> np.ndarray:
        """Of a sample's supervised tokens, [R, E]. Raises CorruptError."""
        number = bisect_right(self.cache.plan.shards.starts, index) - 1
        if number != self._checked and (error := check(self.cache, number, "full").error) is not None:
            raise error
        self._checked = number
        return self.cache.rows(index)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Chunk:
    """Some rows [C, E], the token that follows each, and a number that no other row has, int64 [C] both."""

    rows: np.ndarray
    tokens: np.ndarray
    keys: np.ndarray


def chunks(source: CheckedRows, samples: Sequence[int]) -> Iterator[Chunk]:
    """The rows of some samples, CHUNK_ROWS at a time, so that a shard's chunks are the same whenever it is made."""
    waiting: list[Chunk] = []
    for index in samples:
        text, rows = source.cache.samples.tokens(index), source.of(index)
        waiting.append(
            Chunk(
                rows=rows,
                tokens=text.token_ids[row_positions(text.supervised) + 1].astype(np.int64),
                keys=index * ROWS_A_SAMPLE + np.arange(len(rows)),
            )
        )
        if sum(len(each.rows) for each in waiting) >= CHUNK_ROWS:
            whole = _joined(waiting)
            cut = len(whole.rows) // CHUNK_ROWS * CHUNK_ROWS
            yield from (_part(whole, at, at + CHUNK_ROWS) for at in range(0, cut, CHUNK_ROWS))
            waiting = [_part(whole, cut, len(whole.rows))]
    if sum(len(each.rows) for each in waiting):
        yield _joined(waiting)


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    return Chunk(**{name: np.concatenate([getattr(each, name) for each in chunks]) for name in Chunk.__slots__})


def _part(chunk: Chunk, start: int, stop: int) -> Chunk:
    return Chunk(**{name: getattr(chunk, name)[start:stop] for name in Chunk.__slots__})


class Maker:
    """Makes rows of a side-car of a teacher's."""

    def __init__(self, cache: Cache, asked: Asked, device: torch.device) -> None:
        (teacher,) = of_caches([cache]).teachers
        self._head, self._dtype = load_teacher_head(teacher, device).head, teacher.dtype
        self._asked, self._device = asked, device
        self._logits = torch.empty(CHUNK_ROWS, teacher.record.vocab_size, device=device)
        self._keep = KEPT[asked.sidecar.kind]
        if device.type == "cpu":
            keep_heap()

    @torch.no_grad()
    def of(self, chunk: Chunk) -> np.ndarray:
        """[C, W] of some rows."""
        bits = torch.from_numpy(np.array(np.ascontiguousarray(chunk.rows).view(np.uint8)))
        side = Side(bits.view(self._dtype).to(self._device), self._head)
        logits = wide_logits(side, 0, len(chunk.rows), self._logits)
        tokens, keys = (torch.from_numpy(each).to(self._device) for each in (chunk.tokens, chunk.keys))
        size = max(BLOCK_ELEMENTS // logits.shape[1], 1)
        blocks = zip(logits.split(size), tokens.split(size), keys.split(size), strict=True)
        found = [self._keep(block.log_softmax(-1), next_tokens, own, self._asked) for block, next_tokens, own in blocks]
        rows: np.ndarray = torch.cat(found).cpu().numpy()
        return rows


def top_k(log_p: Tensor, tokens: Tensor, keys: Tensor, asked: Asked) -> Tensor:
    top = log_p.topk(asked.sidecar.entries, -1)
    return torch.cat([top.values, top.indices.float()], -1)


def sampled(log_p: Tensor, tokens: Tensor, keys: Tensor, asked: Asked) -> Tensor:
    """Drawn with replacement at temperature 1: a token counts as often as it is there (arXiv 2503.16870)."""
    places, _ = drawn_places(log_p.exp(), uniform(keys, asked.sidecar.entries, asked.seed))
    mean = log_p.gather(1, places).mean(-1, keepdim=True)
    digits = places[..., None] >> (8 * torch.arange(id_bytes(log_p.shape[1]), device=places.device))
    return torch.cat([mean.view(torch.uint8), (digits & 255).to(torch.uint8).flatten(1)], -1)


def logprob(log_p: Tensor, tokens: Tensor, keys: Tensor, asked: Asked) -> Tensor:
    return log_p.gather(1, tokens[:, None])


KEPT: Mapping[Kind, Callable[[Tensor, Tensor, Tensor, Asked], Tensor]] = {
    "topk": top_k,
    "sampled": sampled,
    "logprob": logprob,
}
"""What is kept of log T [C, V], the tokens that follow and the rows' numbers [C]: the rows of a side-car [C, W]."""
