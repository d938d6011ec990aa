"""Tiny byte-level BPE tokenizers trained on the spot, chat templates of common families, and a way to run prepare."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kdpipe.manifests.sample import Incident, Sample
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.prepare import prepare

CORPUS = [
    "system user assistant tool: You are a helpful assistant. Answer the question with care.",
    "What is the capital of France? The capital of France is Paris.\n\nHello world, hello there!",
    "<think>\nLet me see.\n</think>\n\nYes, 1 + 1 = 2.  你好 世界。 日本語の文章です。 🙂🙃 naïve café",
    "one\n\n\ntwo\n\n\nthree\n\n\nfour\n\n\nfive",
] * 3

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}GEN{{ m.content }}<|im_end|>ENDGEN\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}GEN {{ m.content.strip() }} {{ eos_token }}"
    "ENDGEN{% else %}[INST] {{ m.content.strip() }} [/INST]{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n"
    "{% if m.role == 'assistant' %}GEN{{ m.content | trim }}<|im_end|>ENDGEN"
    "{% else %}{{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# A final end of text after the last turn only; the mark holds the answer without its end marker.
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}GEN{{ m.content }}ENDGEN<|im_end|>\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# Ignores add_generation_prompt, and the mark holds the newline after the marker.
NO_FLAG = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}GEN{{ m.content }}<|im_end|>\n"
    "ENDGEN{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "phi": PHI, "no_flag": NO_FLAG}


def template(name: str, *, marked: bool) -> str:
    """A template with its {% generation %} marks, or without them."""
    start, end = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    # jinja drops a newline that follows a block tag; the marks must not change the text.
    text = TEMPLATES[name].replace("ENDGEN\n", f"{end}{{{{ '\\n' }}}}").replace("ENDGEN", end).replace("GEN", start)
    return text.replace("<|im_end|>\n{%", "<|im_end|>{{ '\\n' }}{%").replace("]\n{%", "]{{ '\\n' }}{%")


SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>")


def train_tokenizer(
    *,
    use_regex: bool = True,
    trim_offsets: bool = False,
    adds_bos: bool = False,
    adds_eos: bool = False,
    special: tuple[str, ...] = SPECIAL,
    eos: str = "</s>",
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500 + len(special),
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if adds_bos or adds_eos:
        single = f"{'<s> ' if adds_bos else ''}$A{' </s>' if adds_eos else ''}"
        ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        steps.append(processors.TemplateProcessing(single=single, special_tokens=ids))
    backend.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos)


class Kit(NamedTuple):
    """What the tests build tokenizers from."""

    train: Callable[..., PreTrainedTokenizerFast]
    template: Callable[..., str]
    names: tuple[str, ...]


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit(train_tokenizer, template, tuple(TEMPLATES))


@pytest.fixture
def chatml(kit: Kit) -> PreTrainedTokenizerFast:
    tokenizer = kit.train()
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = kit.template("chatml", marked=False)
    return tokenizer


@pytest.fixture
def base(kit: Kit) -> PreTrainedTokenizerFast:
    """A tokenizer without a chat template."""
    return kit.train()


class Prepared(NamedTuple):
    samples: list[Sample]
    incidents: list[Incident]


@pytest.fixture
def run() -> Callable[..., Prepared]:
    """run(path or paths, tokenizer, **spec) -> every sample and incident"""

    def run_prepare(paths: Path | list[Path], tokenizer: PreTrainedTokenizerFast, **spec: Any) -> Prepared:
        incidents: list[Incident] = []
        named = paths if isinstance(paths, list) else [paths]
        samples = list(prepare(named, tokenizer, DataSpec(**spec), on_incident=incidents.append))
        return Prepared(samples, incidents)

    return run_prepare


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(records, name="data.jsonl") -> the path of a JSON Lines file"""

    def write_jsonl(records: list[Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        return path

    return write_jsonl


@pytest.fixture
def targets() -> Callable[..., str]:
    """targets(sample, tokenizer) -> the supervised tokens as text"""

    def decode(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> str:
        return tokenizer.decode(sample.token_ids[sample.supervised].tolist())

    return decode
