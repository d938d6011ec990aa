"""Columns: a sample and its likeliest tokens as the columns that other projects read. One table, `COLUMNS`.

Row t of a sample of n tokens is the distribution of its token t + 1, in all of them.

top-k        input_ids [n], labels [n], positions [R] with token_ids [R][K] and logprobs [R][K]; where the text is from
distillkit   input_ids [n], labels [n], compressed_logprobs [n][4 K], bytepacked_indices [n][bytes]: float32 as they are
axolotl      input_ids, attention_mask, labels [n], target_token_ids, target_logprobs (their sum 1), target_mask [n][K]

Invariant: a row that the cache does not have counts for nothing where the format is read as its project reads it.
Sources: arcee-ai/DistillKit distillkit/compression, trainer.py; axolotl-ai-cloud/axolotl src/axolotl/integrations/kd.
"""

# Shapes: n tokens of a sample, R stored rows of it, K tokens kept of each, V vocabulary.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from kdpipe.manifests.sample import IGNORED
from kdpipe.stages.exchange.topk import Top


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cut:
    """A sample, and the likeliest tokens after the positions [R] (int64) of its stored rows."""

    content_id: bytes
    place: str
    token_ids: np.ndarray
    supervised: np.ndarray
    positions: np.ndarray
    top: Top

    @property
    def labels(self) -> np.ndarray:
        """Every target that is predicted, IGNORED elsewhere: int32 [n]."""
        labels = np.where(self.supervised, self.token_ids, IGNORED).astype(np.int32)
        labels[:1] = IGNORED
        return labels

    def everywhere(self, vocab_size: int) -> tuple[Top, np.ndarray]:
        """A row for each token [n, K], evenly spread where there is none, and which there are, bool [n]."""
        n, k = len(self.token_ids), self.top.ids.shape[1]
        ids = np.broadcast_to(np.arange(k, dtype=np.int32), (n, k)).copy()
        logprobs = np.full((n, k), -np.log(k), dtype=np.float32)
        there = np.zeros(n, dtype=bool)
        ids[self.positions], logprobs[self.positions], there[self.positions] = self.top.ids, self.top.logprobs, True
        return Top(ids=ids, logprobs=logprobs), there


def plain(cuts: Sequence[Cut], vocab_size: int) -> dict[str, pa.Array]:
    return {
        "content_id": pa.array([cut.content_id.hex() for cut in cuts], pa.string()),
        "source": pa.array([cut.place for cut in cuts], pa.string()),
        "input_ids": listed([cut.token_ids for cut in cuts]),
        "labels": listed([cut.labels for cut in cuts]),
        "positions": listed([cut.positions.astype(np.int32) for cut in cuts]),
        "token_ids": listed([cut.top.ids for cut in cuts]),
        "logprobs": listed([cut.top.logprobs for cut in cuts]),
    }


def distillkit(cuts: Sequence[Cut], vocab_size: int) -> dict[str, pa.Array]:
    """Its mask of the divergence at row t is that label t is there: labels without a row are left out of it."""
    bits, found = index_bits(vocab_size), []
    for cut in cuts:
        top, there = cut.everywhere(vocab_size)
        found.append((np.where(there, cut.labels, IGNORED), as_bytes(top.logprobs), packed(top.ids, bits)))
    labels, logprobs, indices = zip(*found, strict=True)
    return {
        "input_ids": listed([cut.token_ids.astype(np.int64) for cut in cuts]),
        "labels": listed([each.astype(np.int64) for each in labels]),
        "compressed_logprobs": listed(logprobs),
        "bytepacked_indices": listed(indices),
    }


def axolotl(cuts: Sequence[Cut], vocab_size: int) -> dict[str, pa.Array]:
    found = []
    for cut in cuts:
        top, there = cut.everywhere(vocab_size)
        wide = top.logprobs.astype(np.float64)
        logprobs = (wide - np.log(np.exp(wide).sum(-1, keepdims=True))).astype(np.float32)
        wanted = there & np.append(cut.labels[1:] != IGNORED, False)
        found.append((top.ids, logprobs, np.repeat(wanted[:, None], top.ids.shape[1], axis=1).astype(np.int8)))
    ids, logprobs, masks = zip(*found, strict=True)
    return {
        "input_ids": listed([cut.token_ids for cut in cuts]),
        "attention_mask": listed([np.ones(len(cut.token_ids), dtype=np.int8) for cut in cuts]),
        "labels": listed([cut.labels for cut in cuts]),
        "target_token_ids": listed(ids),
        "target_logprobs": listed(logprobs),
        "target_mask": listed(masks),
    }


COLUMNS: Mapping[str, Callable[[Sequence[Cut], int], dict[str, pa.Array]]] = {
    "top-k": plain,
    "distillkit": distillkit,
    "axolotl": axolotl,
}


def index_bits(vocab_size: int) -> int:
    """Bits of a token id in DistillKit's packing."""
    return max((vocab_size - 1).bit_length(), 1)


def packed(ids: np.ndarray, bits: int) -> np.ndarray:
    """Ids [n, K] in so many bits each, the highest first, each row padded to whole bytes: uint8 [n, bytes]."""
    digits = (ids[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(digits.reshape(len(ids), -1).astype(np.uint8), axis=-1)


def as_bytes(values: np.ndarray) -> np.ndarray:
    """float32 [n, K] as the bytes they are: uint8 [n, 4 K]."""
    return np.ascontiguousarray(values, dtype="<f4").view(np.uint8)


def listed(arrays: Sequence[np.ndarray]) -> pa.Array:
    """Arrays of one or two dimensions as lists, or as lists of lists."""
    offsets = np.cumsum([0, *(len(array) for array in arrays)]).astype(np.int32)
    together = np.concatenate(arrays)
    values = pa.array(together.reshape(-1))
    if together.ndim == 2:
        inner = np.arange(len(together) + 1, dtype=np.int64) * together.shape[1]
        values = pa.ListArray.from_arrays(inner.astype(np.int32), values)
    return pa.ListArray.from_arrays(offsets, values)
