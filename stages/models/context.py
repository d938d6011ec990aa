"""Context: the longest text a model reads, by its config."""

from dataclasses import dataclass

from transformers import PretrainedConfig

# Where each family keeps the longest text it reads; others are mapped to the first by transformers.
CONTEXT_FIELDS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
SCALED_ROPES = ("linear", "dynamic")


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """The longest text a model reads: tokens, the config field that says so, and whether its positions are rotary."""

    tokens: int
    field: str
    rotary: bool


def context_of(config: PretrainedConfig) -> Context | None:
    """The context that a model's config names; None where it names none (state-space models, some biases).

    A scaled rotary embedding reaches as far as its factor says, whether max_position_embeddings knows it or not.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    for field in CONTEXT_FIELDS:
        tokens = getattr(text, field, None)
        if isinstance(tokens, int) and tokens > 0:
            scaled = int(tokens * float(rope.get("factor") or 1)) if rope.get("rope_type") in SCALED_ROPES else tokens
            if rope.get("rope_type") == "yarn":
                scaled = int((rope.get("original_max_position_embeddings") or tokens) * float(rope.get("factor") or 1))
            return Context(tokens=max(tokens, scaled), field=field, rotary=bool(rope))
    return None
