"""Tiny random teachers and tokenizers, made on the spot in a fraction of a second.

Weights are drawn wide enough that logits are as peaked as a trained model's: a wrong row, scale or cap shows.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

KINDS = ("llama", "qwen3", "qwen2", "gemma2", "cohere", "granite", "phi")

SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

EXPERTS = ("qwen3_moe", "mixtral")
ROUTED: dict[str, Any] = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.3}

# What each kind is here for; the rest of its config is SMALL.
OWN: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 12},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0, "sliding_window": 16, "head_dim": 12, "query_pre_attn_scalar": 12},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "tie_word_embeddings": True},
    "phi": {"tie_word_embeddings": False},
    "qwen3_moe": {"tie_word_embeddings": False, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 12} | ROUTED,
    "mixtral": {"tie_word_embeddings": False, "num_local_experts": 4} | ROUTED,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CORPUS = [
    "A teacher writes rows and a student reads them; the rows are kept on disk.",
    "Ein Lehrer, viele Schüler: 1 234 567 rows, 89 tokens, 0.5 nats.",
    "def row(position): return hidden[position]  # the head input of the next token",
    "<user> What is a row? The last hidden state after the final norm, and nothing else.",
]

# A model that transformers does not know: Llama under another name. Importing it adds a line to a file.
OWN_CONFIGURATION = """from transformers import LlamaConfig


class TinyConfig(LlamaConfig):
    model_type = "tiny"
"""
OWN_MODELING = """from transformers import LlamaForCausalLM, LlamaModel

from .configuration_tiny import TinyConfig

with open({marker!r}, "a") as file:
    file.write(__name__ + "\\n")


class TinyModel(LlamaModel):
    config_class = TinyConfig


class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig
"""


def make_model(
    kind: str,
    folder: Path,
    *,
    dtype: str = "float32",
    vocab_size: int = 251,
    seed: int = 0,
    sizes: Mapping[str, float] | None = None,
) -> Path:
    """A random causal LM of `kind` (one of KINDS or EXPERTS) saved in `folder`; `sizes` overrides its config."""
    config = transformers.AutoConfig.for_model(kind, vocab_size=vocab_size, **{**SMALL, **OWN[kind], **(sizes or {})})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)  # transformers starts biases at zero, where a lost one would not show
    model.save_pretrained(folder)
    return folder


def make_own(folder: Path, marker: Path) -> Path:
    """A llama folder becomes that of a model with code of its own, whose import adds a line to `marker`."""
    (folder / "configuration_tiny.py").write_text(OWN_CONFIGURATION)
    (folder / "modeling_tiny.py").write_text(OWN_MODELING.format(marker=str(marker)))
    (folder / "convert_tiny.py").write_text("# Nothing imports it.\n")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {
        "AutoConfig": "configuration_tiny.TinyConfig",
        "AutoModel": "modeling_tiny.TinyModel",  # SGLang asks for it
        "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
    }
    config |= {"model_type": "tiny", "architectures": ["TinyForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_tokenizer(folder: Path, *, vocab_size: int = 300) -> Path:
    """A byte-level BPE tokenizer with a ChatML-like template, saved in `folder`; at least 260 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", additional_special_tokens=special[2:3]
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


def make_adapter(
    base: Path, folder: Path, *, targets: str | list[str] = "all-linear", rank: int = 3, seed: int = 0, **settings: Any
) -> Path:
    """A random adapter for the model in `base`, as peft saves it; B is not zero, so that a lost one shows."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=12, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **settings
    )
    model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.3)  # of the size of what it is added to
    model.save_pretrained(folder)
    return folder
