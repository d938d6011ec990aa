"""Memory: what a stage takes at its peak, from sizes alone. No model is built, no torch is loaded.

Estimates, each by the formula that its function states. What they leave out is what allocators keep beyond what is
asked of them and what libraries hold for themselves; tests/pipeline/test_memory.py compares both stages with the
measured peak of a small run, within WITHIN.
"""

# Letters: P parameters, L layers, D width, A width of all query heads, K width of all key heads, I width of the MLP,
# V rows of the head, E width of the teacher; n tokens of a batch, w bytes of a number in the pass.

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WITHIN = 1.6
"""Factor between an estimate and the peak that was measured, either way."""
STATE_BYTES = 16
"""Of a parameter in training: fp32 weight, fp32 gradient, two fp32 moments of AdamW."""
LOSS_TOKENS = {"cpu": 512, "cuda": 2048}
"""Tokens of a chunk of the loss; see stages/loss/layout.py, whose numbers these are."""
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """A causal LM by the sizes that decide its memory.

    queries, keys: width of all query heads, and of all key heads, together
    """

    params: int
    layers: int
    hidden: int
    queries: int
    keys: int
    intermediate: int
    vocab: int

    @classmethod
    def of(cls, config: Mapping[str, Any], params: int) -> "ModelSizes":
        """From a config.json, by the names that most models have; what one does not say is as in most of them."""

        def get(default: int, *names: str) -> int:
            return next((int(config[name]) for name in names if config.get(name)), default)

        hidden = get(0, "hidden_size", "n_embd", "d_model")
        heads = get(1, "num_attention_heads", "n_head", "num_heads")
        width = get(hidden // heads, "head_dim")
        return cls(
            params=params,
            layers=get(1, "num_hidden_layers", "n_layer", "num_layers"),
            hidden=hidden,
            queries=heads * width,
            keys=get(heads, "num_key_value_heads") * width,
            intermediate=get(4 * hidden, "intermediate_size", "n_inner", "ffn_dim"),
            vocab=get(1, "vocab_size"),
        )


def extract_bytes(
    teacher: ModelSizes, *, dtype: str, batch_tokens: int, longest: int, shard_rows: int
) -> Mapping[str, int]:
    """Of a teacher's pass by transformers on one device.

    weights  P*w
    head     V*E*w, the copy that the gate computes log-probabilities with
    batch    n*w*(4D + 3A + 2K + 3I): what is alive at once inside one layer; nothing is kept for a backward pass
    rows     of a shard, E*w each: pages of its file, which the kernel takes back when it needs them
    n is batch_tokens, or the longest sample where that is more: it runs alone.
    """
    w, tokens = ITEMSIZE[dtype], max(batch_tokens, longest)
    inside = 4 * teacher.hidden + 3 * teacher.queries + 2 * teacher.keys + 3 * teacher.intermediate
    return summed(
        weights=teacher.params * w,
        head=teacher.vocab * teacher.hidden * w,
        batch=tokens * w * inside,
        rows=shard_rows * teacher.hidden * w,
    )


def train_bytes(
    student: ModelSizes,
    *,
    dtype: str,
    batch_tokens: int,
    longest: int,
    ranks: int = 1,
    sharded_over: int | None = None,
    grad_accum: int = 1,
    grad_checkpointing: bool = False,
    device: str = "cpu",
    teacher_width: int = 0,
    teacher_vocab: int = 0,
    teacher_dtype: str = "bfloat16",
    supervised: float = 1.0,
    trained: int | None = None,
    frozen_bytes: int = 0,
) -> Mapping[str, int]:
    """Of one rank of a student's training.

    state        16*P over the ranks that share a copy: weights, gradients, two moments, all fp32; with adapters 16 of
                 each of their numbers, and the frozen weights
    gathered     w*(2*V*D + 2*P/L): the root's and two layers' weights as a pass uses them, and the root's gradients;
                 with adapters once V*D
    head         V'*E*w', the teacher's
    activations  n*L*(w*(6D + 4A + 2K + 4I) + 8D where w is 2): what a layer keeps for its backward pass, the norms'
                 fp32 copies with it; with gradient checkpointing n*w*D a layer, and one layer whole
    loss         C*(V*w + V'*w') logits of a chunk of C tokens, and with several chunks 4*V*D, the head's gradient where
                 it has one
    rows         n*s*(E*w' + D*w): the teacher's and the student's supervised ones
    n are the tokens of a micro-batch: batch_tokens / (ranks * grad_accum), or the longest sample; s the share of
    them that is supervised.
    trained: numbers that are, where they are those of adapters; frozen_bytes: of the weights under them
    """
    w, theirs, size = ITEMSIZE[dtype], ITEMSIZE[teacher_dtype], student
    tokens = max(-(-batch_tokens // (ranks * grad_accum)), longest)
    head = size.vocab * size.hidden
    layer = w * (6 * size.hidden + 4 * size.queries + 2 * size.keys + 4 * size.intermediate)
    layer += 8 * size.hidden if w == 2 else 0
    kept = size.layers * layer
    if grad_checkpointing:
        kept = size.layers * w * size.hidden + layer
    rows, whole = int(tokens * supervised), not frozen_bytes
    chunk = rows if rows <= LOSS_TOKENS[device] + size.hidden else LOSS_TOKENS[device]
    return summed(
        state=(STATE_BYTES * (size.params if whole else trained or 0) + frozen_bytes) // (sharded_over or ranks),
        gathered=w * ((2 if whole else 1) * head + 2 * size.params // max(size.layers, 1)),
        head=teacher_vocab * teacher_width * theirs,
        activations=tokens * kept,
        loss=chunk * (size.vocab * w + teacher_vocab * theirs) + (4 * head if chunk < rows and whole else 0),
        rows=rows * (teacher_width * theirs + size.hidden * w),
    )


def summed(**parts: int) -> dict[str, int]:
    """{"weights_bytes": 3, ..., "total_bytes": 7}"""
    return {f"{name}_bytes": size for name, size in parts.items()} | {"total_bytes": sum(parts.values())}
