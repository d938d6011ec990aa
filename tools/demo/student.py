"""The demo's student: a folder with a small Qwen3 of random weights and the teacher's tokenizer, for `kdpipe train`.

Invariant: the same seed and tokenizer give the same weights, so two students differ by their loss alone.
"""

import os
import pathlib
import shutil

import torch
from architecture import qwen3_config
from transformers import AutoTokenizer, Qwen3ForCausalLM


def write_student(out: pathlib.Path, *, tokenizer_folder: pathlib.Path, seed: int = 0) -> int:
    """Write an untrained student to the folder `out`, in place of one that is there; its number of parameters."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(qwen3_config(tokenizer_folder, width=128, layers=2, heads=2))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(partial)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    return sum(parameter.numel() for parameter in model.parameters())
