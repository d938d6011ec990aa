"""Attention over packed samples: each attends to itself alone, without a mask of L x L and without padding.

    q, k, v [1, heads, L, d] + seq_lens -> one causal attention a sample -> concatenated

Registered with transformers under the name PACKED (its own extension point, AttentionInterface). Models that go through
it get `sample_bounds`, numbers on the CPU: reading them from a GPU, as `cu_seq_lens_q` of the flash
attention kernels is, would wait for it in every layer. On a GPU with flash attention installed that kernel is used
instead. Cost: sum of L_i^2 instead of (sum L_i)^2.
"""

# Shapes: L packed tokens, H heads, K key-value heads, d head width.

from itertools import pairwise

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

PACKED = "kdpipe_packed"


class SampleBounds:
    """Where packed samples begin and end: a box, as torch.compile compiles a layer anew for tuples of other lengths."""

    def __init__(self, at: tuple[int, ...]) -> None:
        self.at = at


@torch.compiler.disable
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    sample_bounds: SampleBounds | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_ignored: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each packed sample: query [1, H, L, d], key and value [1, K, L, d] -> [1, L, H, d].

    transformers passes every attention function whatever its model has to say, hence the open end of the signature;
    what matters and is not understood here (sinks, soft caps, position biases) is found by the student's probe.
    """
    if sample_bounds is not None:
        bounds = sample_bounds.at
    else:
        bounds = (0, query.shape[2]) if cu_seq_lens_q is None else tuple(cu_seq_lens_q.tolist())
    parts = []
    for begin, end in pairwise(bounds):
        window = sliding_window if sliding_window is not None and sliding_window < end - begin else None
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, begin:end],
                key[:, :, begin:end],
                value[:, :, begin:end],
                attn_mask=None if window is None else _window_mask(end - begin, window, query.device),
                dropout_p=dropout,
                is_causal=window is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [length, length]: a token sees itself and the window-1 tokens before it."""
    at = torch.arange(length, device=device)
    back = at[:, None] - at[None, :]
    return (back >= 0) & (back < window)


AttentionInterface.register(PACKED, packed_attention)


def use_packed_attention(model: PreTrainedModel, device: torch.device) -> None:
    """Give the model the fastest attention that keeps packed samples apart.

    A model that transformers itself does not run on scaled_dot_product_attention (Gemma 2 and its soft cap) keeps what
    it has, and masks samples off by their restarting positions.
    """
    if model.config._attn_implementation != "sdpa":
        return
    flash = device.type == "cuda" and is_flash_attn_2_available()
    model.set_attn_implementation("flash_attention_2" if flash else PACKED)
