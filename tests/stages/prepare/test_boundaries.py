"""Boundaries: spans of a text cover it on both sides, in order, with equal bytes, and none can be cut further."""

import itertools
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from tests import tokenizers
from tokenizers import normalizers

from kdpipe.stages.models.vocabularies import token_bytes
from kdpipe.stages.prepare.boundaries import INSIDE, Text, common_spans, cuts, cuts_within, token_ends

Make = Callable[[], Any]
EXACT: dict[str, Make] = {
    "byte-level": tokenizers.byte_level,
    "byte-level, trimmed": lambda: tokenizers.byte_level(700, trim_offsets=True),
    "unigram": tokenizers.unigram,
    "llama": tokenizers.llama,
}
"""Tokenizers whose tokens' bytes, end to end, are the text."""
CHANGING: dict[str, Make] = {
    "wordpiece": tokenizers.wordpiece,
    "nfkc": lambda: tokenizers.unigram(800, normalizer=normalizers.NFKC()),
    "nfd": lambda: tokenizers.unigram(800, normalizer=normalizers.Sequence([normalizers.NFD()])),
}
"""Tokenizers that change a text before they cut it."""
PIECES = (
    *"abcxyzAZ019.,!?'\"()[]{}<>#@\\/_-",
    *(" ", "  ", "     ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2028"),
    *("é", "e\u0301", "A\u030a\u0323", "ñ", "ﬁ", "①", "½", "Å", "ǅ", "İ", "ẞ", "ﷺ"),
    *("🙂", "👍🏽", "👩‍👩‍👧‍👦", "🇫🇷", "☕️", "❤️‍🔥", "1️⃣"),
    *("中文", "一", "。", "日本語", "カ", "ﾊﾝ", "안녕", "가"),
    *("שלום", "עולם", "مرحبا", "العالم", "\u200f", "\u202e"),
    *("नमस्ते", "१२३", "สวัสดี", "ไทย", "Привет", "мир", "Γειά"),
    *("\u200b", "\ufeff", "\x00", "\x07", "\U0001f9ff", "\U00020000", "\U0010ffff", "▁", "Ġ", "<0x41>", "##"),
    *("2023", "650841823", "3.14159", "1,234.50", "007", "٣٤"),
    *("the", " the", "row", " teacher", "ing", " student", "kdpipe", "    return"),
)


def texts(count: int, seed: int = 0) -> Iterator[str]:
    """Random strings of these pieces, some of any character at all."""
    chance = random.Random(seed)
    for _ in range(count):
        size = min(int(chance.expovariate(1 / 8)), 60)
        yield "".join(
            chance.choice(PIECES)
            if chance.random() < 0.95
            else chr(chance.choice([0x20, 0x300, 0x3000, 0x1F300]))
            if chance.random() < 0.5
            else chr(chance.randrange(0xE000, 0x110000) if chance.random() < 0.5 else chance.randrange(1, 0xD800))
            for _ in range(size)
        )


@cache
def made(name: str) -> tuple[Any, list[bytes | None]]:
    tokenizer = (EXACT | CHANGING)[name]()
    return tokenizer, token_bytes(tokenizer)


def tokenised(name: str, some: list[str]) -> list[tuple[list[int], np.ndarray]]:
    """Ids and ends of each text."""
    tokenizer, table = made(name)
    encoded = tokenizer(some, return_offsets_mapping=True, add_special_tokens=False)
    rows = zip(some, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [(ids, token_ends(Text(text), ids, offsets, table)) for text, ids, offsets in rows]


def spans_of(text: str, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    whole = Text(text)
    both = (cuts_within(whole, cuts(ends), 0, len(whole.bytes)) for ends in (ours, theirs))
    return common_spans(*both)


def places(name: str, ids: list[int], text: bytes) -> set[int]:
    """Where tokens end by their bytes alone, laid end to end; what was put before the text stands for none of it."""
    _, table = made(name)
    pieces = [table[index] for index in ids]
    assert None not in pieces
    ends = np.cumsum([len(piece or b"") for piece in pieces])
    whole = b"".join(piece or b"" for piece in pieces)
    before = len(whole) - len(text)
    assert whole[before:] == text
    assert whole[:before] in (b"", b" ")
    return {max(int(end) - before, 0) for end in ends}


@pytest.mark.parametrize("count", [400, pytest.param(17_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pair", itertools.combinations(EXACT, 2), ids=" and ".join)
def test_spans_are_all_that_can_be_cut_on_both_sides(pair: tuple[str, str], count: int) -> None:
    """Against the bytes of the tokens, which know nothing of offsets; 102,000 strings over all pairs."""
    some = [text for text in texts(count, seed=sum(map(len, pair))) if "▁" not in text and "<0x" not in text]
    for text, (ids, ends), (other, other_ends) in zip(some, *(tokenised(name, some) for name in pair), strict=True):
        data = text.encode()
        spans = spans_of(text, ends, other_ends)
        shared = {0} | places(pair[0], ids, data) & places(pair[1], other, data)
        assert [0, *np.cumsum(spans[:, 4])] == sorted(shared), (text, spans)
        for (_, table), tokens, first, number in ((made(pair[0]), ids, 0, 1), (made(pair[1]), other, 2, 3)):
            assert (spans[:, number] >= 1).all()
            assert (spans[1:, first] == spans[:-1, first] + spans[:-1, number]).all()
            assert not len(spans) or (spans[0, first], spans[-1, first] + spans[-1, number]) == (0, len(tokens))
            at = 0
            for begin, size, length in spans[:, [first, number, 4]].tolist():
                run = b"".join(table[index] or b"" for index in tokens[begin : begin + size])
                assert run == data[at : at + length] or (not at and run == b" " + data[:length])
                at += length


@pytest.mark.parametrize("count", [400, pytest.param(17_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("changing", CHANGING)
def test_a_normaliser_leaves_spans_that_cover_the_text_in_order(changing: str, count: int) -> None:
    """Where a token ends in a text that was changed is known to the character, and never doubted on the way."""
    some = list(texts(count, seed=7))
    pairs = zip(some, tokenised(changing, some), tokenised("byte-level", some), strict=True)
    for text, (ids, ends), (other, other_ends) in pairs:
        spans, data = spans_of(text, ends, other_ends), text.encode()
        if not ids or not other:
            assert not len(spans)
            continue
        assert int(spans[:, 4].sum()) == len(data)
        for first, number, tokens in ((0, 1, ids), (2, 3, other)):
            assert (spans[:, number] >= 1).all()
            assert (spans[1:, first] == spans[:-1, first] + spans[:-1, number]).all()
            assert spans[-1, first] + spans[-1, number] == len(tokens)


def test_tokens_that_share_a_character_are_cut_by_their_bytes() -> None:
    text, table = "a🙂", [b"a", b"\xf0\x9f", b"\x99\x82", b"\xf0", b"\x9f\x99", b"\x82"]
    whole = token_ends(Text(text), [0, 1, 2], [(0, 1), (1, 2), (1, 2)], table)
    other = token_ends(Text(text), [0, 3, 4, 5], [(0, 1), (1, 2), (1, 2), (1, 2)], table)
    assert (whole.tolist(), other.tolist()) == ([1, 3, 5], [1, 2, 4, 5])
    assert spans_of(text, whole, other)[:, [0, 1, 2, 3]].tolist() == [[0, 1, 0, 1], [1, 2, 1, 3]]
    changed = token_ends(Text(text), [0, 1, 2], [(0, 1), (1, 2), (1, 2)], [b"A", *table[1:]])
    assert changed.tolist() == [1, 3, 5]
    other_bytes = token_ends(Text(text), [0, 1, 2], [(0, 1), (1, 2), (1, 2)], [b"a", b"?", b"\x99\x82"])
    assert other_bytes.tolist() == [1, INSIDE, 5]


def test_blanks_that_offsets_leave_out_belong_to_the_token_that_has_them() -> None:
    offsets = [(0, 1), (3, 4)]
    assert token_ends(Text("a  b"), [0, 1], offsets, [b"a", b"  b"]).tolist() == [1, 4]
    assert token_ends(Text("a  b"), [0, 1], offsets, [b"a ", b" b"]).tolist() == [2, 4]
    assert token_ends(Text("a  b"), [0, 1], offsets, [b"a", b"b"]).tolist() == [1, 4]  # WordPiece has them nowhere


def test_a_token_that_ends_behind_a_later_one_ends_no_span() -> None:
    assert token_ends(Text("abc"), [0, 0, 0], [(0, 3), (1, 2), (2, 3)], [b"?"]).tolist() == [INSIDE, 2, 3]
    assert token_ends(Text("abc"), [0, 0, 0], [(0, 2), (2, 3), (1, 2)], [b"?"]).tolist() == [2, INSIDE, 3]
    # Normal forms put marks below a letter before those above it: two of them here before one.
    offsets = [(0, 1), (2, 3), (3, 4), (1, 2), (4, 5)]
    ends = token_ends(Text("q\u0307\u0323\u0331x"), [0] * 5, offsets, [b"?"])
    assert ends.tolist() == [1, INSIDE, INSIDE, 3, 8]


def test_blanks_around_a_piece_are_the_templates() -> None:
    """[INST] Hi [/INST]▁Yes</s> and ...assistant\\nYes<|im_end|> have one answer: "Yes"."""
    text = Text("x Yes \ny")
    spaced = cuts(token_ends(text, [0, 1, 2], [(0, 1), (1, 5), (5, 8)], [None] * 3))
    assert [each.tolist() for each in cuts_within(text, spaced, 2, 5)] == [[0, 3], [1, 2]]
    crossing = cuts(token_ends(text, [0, 1], [(0, 3), (3, 8)], [None] * 2))
    assert cuts_within(text, crossing, 2, 5).places.tolist() == [1]
    assert spans_of("ab", np.array([1, 2]), np.array([INSIDE, 2])).tolist() == [[0, 2, 0, 2, 2]]
