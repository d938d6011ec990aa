"""Causal LMs as transformers gives them: what kdpipe must know of any of them, teacher or student.

The formula between hidden state and logits is read from the config; the teacher's canary checks it numerically.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from kdpipe.manifests.errors import InputError, TeacherError
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.head import Finish

# Where each family keeps the soft cap on its final logits.
SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# Where each family keeps the longest text it reads; others are mapped to the first by transformers.
CONTEXT_FIELDS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
SCALED_ROPES = ("linear", "dynamic")

# Start of model_type, config field, and whether logits are multiplied (+1) or divided (-1) by it. A family that is not
# listed and scales all the same is found out by the teacher's canary.
SCALE_FIELDS = (
    ("cohere", "logit_scale", 1),
    ("granite", "logits_scaling", -1),
    ("minicpm3", "logits_scaling", -1),
    ("hyperclovax", "logits_scaling", 1),
    ("falcon_h1", "lm_head_multiplier", 1),
)


def logit_formula(config: PretrainedConfig) -> Finish:
    """What a model's config puts between the matrix product and the logits."""
    text = config.get_text_config()
    caps = (getattr(text, name, None) for name in SOFTCAP_FIELDS)
    scale = 1.0
    for family, field, power in SCALE_FIELDS:
        if text.model_type.startswith(family):
            scale = float(getattr(text, field)) ** power
    return Finish(softcap=next((float(cap) for cap in caps if cap), None), scale=scale)


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


def load_tokenizer(folder: Path, error: type[InputError], trust: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder; `error` where there is none that loads.

    trust: digest of the folder's own code that may run
    """
    return ModelFolder(folder, error, trust).tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's files. Raises OSError."""
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as err:
        # tokenizers' own code tells a failed write by a bare Exception with the system's number in its text.
        number = re.search(r"\(os error (\d+)\)", str(err))
        if number is None or isinstance(err, OSError):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from err


def real_vocab_size(path: Path, tokenizer: PreTrainedTokenizerBase, head_rows: int) -> int:
    """Ids the tokenizer can make, counted from 0: at most the rows of the head, which a checkpoint may pad.

    Raises TeacherError where ordinary tokens have no row in the head. Added tokens beyond it are left out: Gemma 3 1B
    lists an image token that its text model has no row for.
    """
    ids = set(tokenizer.get_vocab().values())
    size = max(len(tokenizer), max(ids, default=-1) + 1)
    if size > head_rows:
        ordinary = max(ids - set(tokenizer.added_tokens_decoder), default=-1) + 1
        if ordinary > head_rows:
            raise TeacherError(
                f"the tokenizer makes ids up to {ordinary - 1}, the lm_head has {head_rows} rows; "
                "is it the tokenizer of another model?",
                where=path,
            )
        size = head_rows
    return size


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over every (id, token): equal digests mean that ids of one can be fed to a model of the other."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def vocabulary_difference(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
    """The lowest of the teacher's ids that is another token to the student, in words; "" where there is none.

    A student may know more tokens than its teacher: those ids never come.
    """
    known = {index: token for token, index in student.get_vocab().items()}
    for token, index in sorted(teacher.get_vocab().items(), key=lambda item: item[1]):
        if known.get(index) != token:
            return f"id {index} is {known.get(index)!r} to the student and {token!r} to the teacher"
    return ""
