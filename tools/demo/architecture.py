"""The demo's architecture: Qwen3, teacher and student alike but for their sizes."""

import pathlib

from transformers import AutoTokenizer, Qwen3Config


def qwen3_config(tokenizer_folder: pathlib.Path, *, width: int, layers: int, heads: int) -> Qwen3Config:
    """A Qwen3 of this width (three times that in the MLP), with half as many key-value heads, heads of 64."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
