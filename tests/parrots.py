"""Models that say one sentence: the next token is a function of the last one, by hand-made weights."""

import itertools
import json
from pathlib import Path

import torch
from tests.models import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

END = "<|im_end|>"


def make_parrot(folder: Path, sentence: str, *, after: str = "assistant\n") -> Path:
    """A model that answers `sentence` and its end, greedily, whatever is asked. Its tokens must differ."""
    folder.mkdir(parents=True)
    make_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    says = [tokenizer(after)["input_ids"][-1], *tokenizer(sentence + END)["input_ids"]]
    assert len(set(says)) == len(says), "a token of the sentence stands in it twice"
    size = len(tokenizer)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=size,
        hidden_size=size + size % 2,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                weight.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(size, config.hidden_size))
        for now, following in itertools.pairwise(says):
            model.get_output_embeddings().weight[following, now] = 10.0
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    return folder
