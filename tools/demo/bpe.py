"""The demo's tokenizer: byte-level BPE trained on the demo's own text, with a chat template.

Invariant: any text survives encoding and decoding; the same texts give the same folder; the template marks as the
assistant's exactly its text and the end-of-turn token.
Cost: a second for one and a half megabytes of text.
"""

import pathlib
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 2048
PAD, END = "<|pad|>", "<|end|>"
ROLES = (
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)  # one token opens a turn: a sample costs four tokens beside its text

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], *, folder: pathlib.Path, vocab_size: int = VOCAB_SIZE) -> int:
    """Train on `texts`, save the tokenizer with its chat template in `folder` and return its number of entries.

    The entries are the special tokens, the 256 bytes and then merges; a small text may not yield `vocab_size` of them.
    A text that spells out a special token is read as that token, as with any chat model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Untrimmed offsets: an answer's leading spaces belong to the answer, and the mask is found through offsets.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return len(fast)
