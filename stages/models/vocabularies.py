"""Vocabularies: what the tokens of two tokenizers stand for, as bytes of text, and which of them are the same.

    tokenizer -> token_bytes: id -> bytes        b" row" for "Ġrow" of a byte-level BPE and for "▁row" of SentencePiece
    two of them -> SharedVocabulary              the ids, on either side, of tokens with the same bytes

A special token stands for no text. Two of them are the same where they have one name, or one role: what ends a turn or
a text pairs with what ends it on the other side, whatever the two are called.
Cost: a vocabulary is read once, about 0.2 s for 150,000 tokens.
"""

# Shapes: V' tokens that both vocabularies have.

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""SentencePiece's name of a byte for which it has no piece."""
BYTES = {char: bytes([number]) for number, char in bytes_to_unicode().items()}
"""The alphabet of byte-level tokenizers: "Ġ" -> b" "."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spelling:
    """How a tokenizer's tokens spell text.

    byte_level: each of their characters is a byte
    blank: the character that stands for a blank, such as "▁"; "" for none
    byte_fallback: "<0x41>" is a byte
    continuing: what begins a token that goes on a word, such as "##"; "" where no token is marked so
    word_end: what ends a token that ends a word, such as "</w>"
    """

    byte_level: bool
    blank: str
    byte_fallback: bool
    continuing: str
    word_end: str

    def spelt(self, token: str) -> bytes:
        """The bytes of text that a token stands for."""
        if self.byte_fallback and (found := BYTE.fullmatch(token)):
            return bytes([int(found[1], 16)])
        if self.byte_level:
            return b"".join(BYTES.get(char) or char.encode() for char in token)
        if self.continuing:
            # A word begins behind a blank, unless it is a sign or one of the scripts that are written without any.
            begins = not token.startswith(self.continuing) and token[:1].isalnum() and not _is_ideograph(token[0])
            token = " " * begins + token.removeprefix(self.continuing)
        text = token.removesuffix(self.word_end) if self.word_end else token
        return (text.replace(self.blank, " ") if self.blank else text).encode("utf-8", "surrogatepass")


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes of text that each id stands for; None for a special token, the unknown one and an id without a token.

    As the token stands within a text: what begins a word of SentencePiece or WordPiece has its blank.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    spelling, vocabulary = _spelling(definition), tokenizer.get_vocab()
    found: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        found[index] = spelling.spelt(token)
    for index, added in tokenizer.added_tokens_decoder.items():
        if index < len(found):
            found[index] = None if added.special else added.content.encode("utf-8", "surrogatepass")
    unknown = definition["model"].get("unk_token")
    unknown_ids = {definition["model"].get("unk_id"), vocabulary.get(unknown) if unknown else None}
    for special in (*tokenizer.all_special_ids, *unknown_ids):
        if special is not None and special < len(found):
            found[special] = None
    return found


def _spelling(definition: Mapping[str, Any]) -> _Spelling:
    """How the tokens of a tokenizer.json spell text."""
    parts = [part for name in ("normalizer", "pre_tokenizer", "decoder") for part in _parts(definition.get(name))]
    kinds, model = {part["type"] for part in parts}, definition["model"]
    marks = [part["replacement"] for part in parts if part["type"] == "Metaspace"]
    marks += [
        part["content"]
        for part in _parts(definition.get("normalizer"))
        if part["type"] == "Replace" and part["pattern"] == {"String": " "}
    ]
    marks += [
        part["pattern"]["String"]
        for part in _parts(definition.get("decoder"))
        if part["type"] == "Replace" and part["content"] == " " and "String" in part["pattern"]
    ]
    return _Spelling(
        byte_level="ByteLevel" in kinds,
        blank=next(filter(None, marks), ""),
        byte_fallback=bool(model.get("byte_fallback")) or "ByteFallback" in kinds,
        continuing=(model.get("continuing_subword_prefix") or "") if model["type"] == "WordPiece" else "",
        word_end=model.get("end_of_word_suffix") or "",
    )


def _parts(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A part of a tokenizer.json, and those that it is a sequence of."""
    if part is not None:
        yield part
        for inner in (*part.get("normalizers", ()), *part.get("pretokenizers", ()), *part.get("decoders", ())):
            yield from _parts(inner)


def _is_ideograph(char: str) -> bool:
    """Whether WordPiece makes a word of the character alone."""
    return "\u3400" <= char <= "\u9fff" or "\uf900" <= char <= "\ufaff" or "\U00020000" <= char <= "\U0002fa1f"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SharedVocabulary:
    """The tokens that two models share.

    student_ids, teacher_ids: int64 [V']: a token of the same bytes on either side, or of the same role; in the order of
        the student's ids, no id twice
    student_size, teacher_size: ids that either tokenizer makes, to which the two heads are cut
    student_bytes, teacher_bytes: of every id below the size, as token_bytes gives them
    """

    student_ids: Tensor
    teacher_ids: Tensor
    student_size: int
    teacher_size: int
    student_bytes: Sequence[bytes | None]
    teacher_bytes: Sequence[bytes | None]

    def __len__(self) -> int:
        return len(self.student_ids)

    @classmethod
    def of(
        cls,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        *,
        student_size: int,
        teacher_size: int,
        ends: Sequence[tuple[int, int]] = (),
    ) -> "SharedVocabulary":
        """What the two share.

        ends: ids, (student's, teacher's), that end a turn or a text on either side; the ends of text that the
            tokenizers name are paired too
        """
        ours, theirs = _table(student, student_size), _table(teacher, teacher_size)
        pairs = _paired_specials(student, teacher, ends, student_size, teacher_size)
        other = _ids_by_bytes(theirs, teacher)
        taken = set(pairs.values())
        for piece, index in _ids_by_bytes(ours, student).items():
            match = other.get(piece)
            if match is not None and index not in pairs and match not in taken:
                pairs[index] = match
        ids = torch.tensor(sorted(pairs.items()), dtype=torch.int64).reshape(-1, 2)
        return cls(
            student_ids=ids[:, 0].contiguous(),
            teacher_ids=ids[:, 1].contiguous(),
            student_size=student_size,
            teacher_size=teacher_size,
            student_bytes=ours,
            teacher_bytes=theirs,
        )

    def to(self, device: torch.device) -> "SharedVocabulary":
        """The same with its ids on another device."""
        return replace(self, student_ids=self.student_ids.to(device), teacher_ids=self.teacher_ids.to(device))


def _table(tokenizer: PreTrainedTokenizerBase, size: int) -> list[bytes | None]:
    found = token_bytes(tokenizer)[:size]
    return found + [None] * (size - len(found))


def _ids_by_bytes(table: Sequence[bytes | None], tokenizer: PreTrainedTokenizerBase) -> dict[bytes, int]:
    """The token that a tokenizer makes of some bytes where several stand for them.

    SentencePiece has "A" and "<0x41>": the byte is for texts that have no piece. Otherwise the lower id.
    """
    found: dict[bytes, int] = {}
    fallback = {index for token, index in tokenizer.get_vocab().items() if BYTE.fullmatch(token)}
    for index in sorted(range(len(table)), key=lambda index: (index in fallback, index)):
        piece = table[index]
        if piece:
            found.setdefault(piece, index)
    return found


def _paired_specials(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    ends: Sequence[tuple[int, int]],
    student_size: int,
    teacher_size: int,
) -> dict[int, int]:
    """Special tokens of one role or one name, student's id -> teacher's; each id once, roles first."""
    names = {added.content: index for index, added in teacher.added_tokens_decoder.items() if added.special}
    candidates = [*ends, (student.eos_token_id, teacher.eos_token_id)]
    candidates += [
        (index, names[added.content])
        for index, added in sorted(student.added_tokens_decoder.items())
        if added.special and added.content in names
    ]
    pairs: dict[int, int] = {}
    for ours, theirs in candidates:
        if ours is None or theirs is None or not (ours < student_size and theirs < teacher_size):
            continue
        if ours not in pairs and theirs not in pairs.values():
            pairs[ours] = theirs
    return pairs
