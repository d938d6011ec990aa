"""The demo's student: a folder with a small Qwen3 of random weights and the teacher's tokenizer, for `kdpipe train`.

Invariant: the same seed and tokenizer give the same weights, so two students differ by their loss alone.
"""

import os
import pathlib
import shutil

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM


def student_config(tokenizer_folder: pathlib.Path) -> Qwen3Config:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def write_student(out: pathlib.Path, *, tokenizer_folder: pathlib.Path, seed: int = 0) -> int:
    """Write an untrained student to the folder `out`, in place of one that is there; its number of parameters."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(student_config(tokenizer_folder))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(partial)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    return sum(parameter.numel() for parameter in model.parameters())
