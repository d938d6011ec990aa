"""Causal LMs as transformers gives them: what kdpipe must know of any of them, teacher or student.

Nothing here knows a model by name: the formula between hidden state and logits is read from the config and checked
numerically by whoever relies on it.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from kdpipe.manifests.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitFormula:
    """logits = softcap * tanh(scale * (hidden @ head.T + bias) / softcap); softcap None: no tanh."""

    softcap: float | None
    scale: float


def logit_formula(config: PretrainedConfig) -> LogitFormula:
    """The formula a config asks for: Gemma's final_logit_softcapping, Cohere's logit_scale, Granite's logits_scaling."""
    text = config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    divisor = getattr(text, "logits_scaling", None)
    factor = getattr(text, "logit_scale", None)
    scale = float(factor) if factor is not None else 1.0 / float(divisor) if divisor is not None else 1.0
    return LogitFormula(softcap=None if softcap is None else float(softcap), scale=scale)


def load_tokenizer(folder: Path, error: type[InputError]) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder; `error` where there is none that loads."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise error("no tokenizer in this folder; copy tokenizer.json and tokenizer_config.json into it", where=folder)
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as err:
        raise error(f"its tokenizer does not load: {err}", where=folder) from None


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids the tokenizer can make are below this: its real size, gaps counted, padding not."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over every (id, token): equal digests mean that ids of one can be fed to a model of the other."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def vocabulary_difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str:
    """The lowest id on which two tokenizers disagree, in words; "" where there is none."""
    first, second = ({index: token for token, index in one.get_vocab().items()} for one in (ours, theirs))
    for index in range(max(len(first), len(second), 1)):
        if first.get(index) != second.get(index):
            return f"id {index} is {first.get(index)!r} here and {second.get(index)!r} there"
    return ""
