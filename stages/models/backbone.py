"""Backbone: the part of a causal LM that makes hidden states, everything before its lm_head.

One answer for teacher and student, whatever wraps it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kdpipe.stages.feed.packing import PackedBatch
from kdpipe.stages.models.attention import SampleBounds


def backbone(model: nn.Module) -> nn.Module:
    """The module whose last_hidden_state enters the lm_head: the decoder, seen through a wrapper of peft."""
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    found: nn.Module = inner.get_decoder()
    if found is not inner and found is not inner.get_output_embeddings():
        return found
    # Llama4ForCausalLM names its backbone as its multimodal parent does, so transformers does not find it by name; the
    # `decoder` of ModernBertDecoderForCausalLM is its lm_head.
    return next(child for child in inner.children() if isinstance(child, PreTrainedModel))


def packed_hidden(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """The input of the lm_head for every token, [1, L, D] packed or [S, L, D] padded."""
    hidden: torch.Tensor = packed_output(model, batch).last_hidden_state
    return hidden


def packed_output(model: nn.Module, batch: PackedBatch, **more: bool) -> Any:
    """What the backbone makes of a batch, as the model's own record; more: what else it is to put there.

    Padded on the right, positions are the model's own, which count from its first token as they do without padding.
    """
    if batch.attention_mask is not None:
        return backbone(model)(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **more)
    bounds = torch.nn.functional.pad(batch.seq_lens.cumsum(0), (1, 0)).to(torch.int32)
    longest = max(end - begin for begin, end in pairwise(batch.bounds))
    return backbone(model)(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=longest,
        max_length_k=longest,
        sample_bounds=SampleBounds(batch.bounds),
        **more,
    )


@contextmanager
def hidden_states(model: nn.Module, keep: int) -> Iterator[list[torch.Tensor]]:
    """Collects what the backbone makes in each forward of the causal LM, [B, n, D]; its head gets the last `keep` rows.

    So logits of a long sample never exist in full, whether or not the model's forward knows `logits_to_keep`.
    """
    found: list[torch.Tensor] = []

    def capture(module: nn.Module, args: Any, output: Any) -> Any:
        found.append(output.last_hidden_state)
        output.last_hidden_state = found[-1][:, -keep:]
        return output

    handle = backbone(model).register_forward_hook(capture)
    try:
        yield found
    finally:
        handle.remove()
