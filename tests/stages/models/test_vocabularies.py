"""Vocabularies: the bytes of a tokenizer's tokens are its texts, and two share the tokens of the same bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tokenizers
from tests.models import make_tokenizer
from transformers import AddedToken, AutoTokenizer

from kdpipe.stages.models.vocabularies import SharedVocabulary, token_bytes

KINDS: dict[str, Callable[[], Any]] = {
    "byte-level": tokenizers.byte_level,
    "unigram": tokenizers.unigram,
    "llama": tokenizers.llama,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_are_the_text(kind: str) -> None:
    tokenizer, text = KINDS[kind](), "".join(tokenizers.SCRIPTS) + " \n\x00 🧿 row"
    table = token_bytes(tokenizer)
    assert len(table) == len(tokenizer)
    pieces = [table[index] for index in tokenizer(text, add_special_tokens=False).input_ids]
    assert None not in pieces
    assert b"".join(filter(None, pieces)).decode().removeprefix("" if kind == "byte-level" else " ") == text


def test_special_and_unknown_tokens_stand_for_no_text_and_added_ones_for_their_own() -> None:
    tokenizer = tokenizers.unigram()
    tokenizer.add_tokens([AddedToken("<rows>", special=False), AddedToken("<|x|>", special=True)])
    table = token_bytes(tokenizer)
    for token, expected in {"<unk>": None, "</s>": None, "<|x|>": None, "<rows>": b"<rows>", "<0x0A>": b"\n"}.items():
        assert table[tokenizer.convert_tokens_to_ids(token)] == expected


def test_wordpiece_begins_a_word_with_a_blank_and_goes_on_without() -> None:
    tokenizer = tokenizers.wordpiece()
    table = token_bytes(tokenizer)
    ids = tokenizer("teachers, rows 一", add_special_tokens=False).input_ids
    text = b"".join(table[index] or b"?" for index in ids).decode()
    assert text == " teachers, rows一"


def test_two_vocabularies_share_what_has_the_same_bytes_once() -> None:
    ours, theirs = tokenizers.byte_level(), tokenizers.unigram()
    shared = SharedVocabulary.of(ours, theirs, student_size=len(ours), teacher_size=len(theirs))
    pairs = list(zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True))
    assert len({pair[0] for pair in pairs}) == len({pair[1] for pair in pairs}) == len(pairs) == len(shared) > 300
    for student, teacher in pairs:
        if student == ours.eos_token_id:
            assert teacher == theirs.eos_token_id
        else:
            assert shared.student_bytes[student] == shared.teacher_bytes[teacher] is not None
    both = {*filter(None, token_bytes(ours))} & {*filter(None, token_bytes(theirs))}
    assert len(pairs) == len(both) + 1
    the = theirs.convert_tokens_to_ids("▁the")
    assert (ours.convert_tokens_to_ids("Ġthe"), the) in pairs
    letter = (ours.convert_tokens_to_ids("A"), theirs.convert_tokens_to_ids("A"))
    assert letter in pairs, "<0x41> is for texts without a piece"
    assert shared.to(torch.device("meta")).student_ids.device.type == "meta"


def test_special_tokens_pair_by_role_then_by_name(tmp_path: Path) -> None:
    folder = tokenizers.save_chatting(tokenizers.unigram(), tmp_path / "one")
    ours, theirs = (
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "two")),
    )
    ours.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    stop, end = ours.convert_tokens_to_ids(["<|stop|>", "</s>"])
    im_start, im_end, text_end = theirs.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])

    def paired(**sizes: int) -> dict[int, int]:
        given = {"student_size": len(ours), "teacher_size": len(theirs)} | sizes
        shared = SharedVocabulary.of(ours, theirs, ends=[(end, text_end)], **given)
        return dict(zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True))

    found = paired()
    assert found[end] == text_end
    assert found[stop] == im_end, "the ends of a turn, whatever their names"
    assert found[ours.convert_tokens_to_ids("<|im_start|>")] == im_start
    assert ours.convert_tokens_to_ids("<|im_end|>") not in found, "the teacher's is taken"
    assert stop not in paired(student_size=stop)
