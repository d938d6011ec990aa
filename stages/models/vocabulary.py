"""Vocabulary: which ids a tokenizer makes, and whether two models mean the same by them."""

import hashlib
import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kdpipe.manifests.errors import InputError, TeacherError
from kdpipe.manifests.provenance import digest_json


def real_vocab_size(
    path: Path, tokenizer: PreTrainedTokenizerBase, head_rows: int, error: type[InputError] = TeacherError
) -> int:
    """Ids the tokenizer can make, counted from 0: at most the rows of the head, which a checkpoint may pad.

    Raises `error` where ordinary tokens have no row in the head. Added tokens beyond it are left out: Gemma 3 1B
    lists an image token that its text model has no row for.
    """
    ids = set(tokenizer.get_vocab().values())
    size = max(len(tokenizer), max(ids, default=-1) + 1)
    if size > head_rows:
        ordinary = max(ids - set(tokenizer.added_tokens_decoder), default=-1) + 1
        if ordinary > head_rows:
            raise error(
                f"the tokenizer makes ids up to {ordinary - 1}, the lm_head has {head_rows} rows; "
                "is it the tokenizer of another model?",
                where=path,
            )
        size = head_rows
    return size


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the definition of a tokenizer with a fast backend."""
    return digest_json(json.loads(tokenizer.backend_tokenizer.to_str()))


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
