"""Every causal LM of transformers, made tiny by one rule: each size that its config names is reduced.

No family is named here. What the rule cannot build is said, with transformers' own words.
"""

import copy
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MODELS

VOCAB_SIZE = 304
NUM_LAYERS = 2
SMALL: tuple[tuple[str, int], ...] = (
    (r"vocab_size(_per_layer_input)?$|^n_vocab$", VOCAB_SIZE),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|context_length", 256),
    (r"(num|n)_(hidden_|decoder_|encoder_)?layers?$|^n_layer$|(encoder|decoder)_layers$|layers_num", NUM_LAYERS),
    (r"(num|n)_(key_value|kv)_heads|multi_query_group_num", 2),
    (r"attention_heads$|(num|n)_(attn_)?heads?$|^n_head$", 4),
    (r"(hidden|model|embedding|embed|emb|state)_?(size|dim)$|^d_model$|^n_embd$|^dim_model$|^emb_dim$", 48),
    (r"intermediate|ffn_dim|^d_ff$|^n_inner$|^dim_ff$|ff_dim|ffn_hidden_size|mlp_dim", 64),
    (r"(num|n)_(local_|routed_)?experts$|num_experts", 4),
    (r"experts_per_tok|top_?k$", 2),
    (r"^qk_head_dim$", 24),
    (r"rotary_dim$", 8),
    (r"head_dim$|^d_kv$", 12),
    (r"lora_rank$|_rank$", 8),
    (r"window|chunk_size|block_size", 8),
)
"""Patterns of field names, and the size that a number under one gets where it is larger; the first that fits."""
LARGEST = 20_000_000
"""Parameters of a model that is built: one whose config hides its sizes takes all memory."""


def families() -> list[str]:
    return sorted(MODELS)


def make_family(family: str, folder: Path) -> Path:
    """A tiny random model of the family in `folder`, its weights wide enough that a wrong step shows."""
    config = transformers.AutoConfig.for_model(family)
    mapping = transformers.AutoModelForCausalLM._model_mapping
    text = config.get_text_config()
    small = type(text)(**_shrunk(text.to_dict()), bos_token_id=1, eos_token_id=3, pad_token_id=0)
    build = mapping[type(text) if type(text) in mapping else type(config)]._from_config
    with torch.device("meta"):
        num_params = sum(parameter.numel() for parameter in build(copy.deepcopy(small)).parameters())
    if num_params > LARGEST:
        raise ValueError(f"{num_params:,} parameters: not all of its sizes are reduced")
    torch.manual_seed(0)
    model = build(small, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)  # norms and biases start at values that hide a loss
            else:
                parameter.mul_(3)
    model.save_pretrained(folder)
    return folder


def _shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that change. A list with an entry a layer keeps the first of each kind."""
    found: dict[str, Any] = {}
    num_layers = fields.get("num_hidden_layers")
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == num_layers and num_layers > NUM_LAYERS:
            kinds = [each for at, each in enumerate(value) if each not in value[:at]]
            found[name] = (kinds + [value[-1]] * NUM_LAYERS)[:NUM_LAYERS]
        elif isinstance(value, dict) and name.endswith("_config"):
            found[name] = value | _shrunk(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in SMALL if re.search(pattern, name)), value)
            if value > size:
                found[name] = size
    if fields.get("num_key_value_heads") == fields.get("num_attention_heads") and "num_key_value_heads" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]  # latent attention has no groups
    return found
