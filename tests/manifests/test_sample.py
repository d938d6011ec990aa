"""Which positions have a row, and which samples are held out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.manifests.errors import DataError
from kdpipe.manifests.sample import (
    ID_BYTES,
    SampleTokens,
    content_id,
    is_heldout,
    is_in_subset,
    num_rows,
    prompt_of,
    row_positions,
)

masks = st.lists(st.booleans(), max_size=40).map(lambda mask: np.array(mask, dtype=bool))
ids = st.lists(st.binary(min_size=ID_BYTES, max_size=ID_BYTES), min_size=1, max_size=50).map(
    lambda parts: np.frombuffer(b"".join(parts), np.uint8).reshape(-1, ID_BYTES)
)


def test_the_example_of_the_docstring() -> None:
    assert row_positions(np.array([0, 0, 1, 1, 0, 1], dtype=bool)).tolist() == [1, 2, 4]


@given(masks)
def test_a_row_sits_one_before_each_supervised_token_but_the_first(mask: np.ndarray) -> None:
    assert row_positions(mask).tolist() == [t for t in range(len(mask) - 1) if mask[t + 1]]


@given(masks)
def test_every_row_means_every_position_with_a_next_token(mask: np.ndarray) -> None:
    assert row_positions(mask, every=True).tolist() == list(range(len(mask) - 1))
    assert set(row_positions(mask)) <= set(row_positions(mask, every=True))


@given(ids, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_holds_out_a_superset(content_ids: np.ndarray, one: float, other: float) -> None:
    smaller, larger = (is_heldout(content_ids, fraction) for fraction in sorted((one, other)))
    assert not (smaller & ~larger).any()


@given(ids)
def test_no_fraction_holds_out_nothing_and_the_whole_everything(content_ids: np.ndarray) -> None:
    content_ids = np.concatenate([content_ids, np.full((1, ID_BYTES), 255, np.uint8)])
    assert not is_heldout(content_ids, 0.0).any()
    assert is_heldout(content_ids, 1.0).all()


def test_which_samples_are_held_out_never_changes() -> None:
    """By hand: the first eight bytes are the digits of a fraction to the base of 256."""
    digits = [(0x80, 0, 0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0, 0, 0x80), (0x40, 0xFF, 0, 0, 0, 0, 0, 0), (0xFF,) * 8]
    content_ids = np.array([each + (0x99,) * 8 for each in digits], np.uint8)
    edges = [0.5, 0.0, 0x40FF / 0x10000, 1 - 2**-53]
    for index, edge in enumerate(edges):
        assert not is_heldout(content_ids, edge)[index]
        assert is_heldout(content_ids, float(np.nextafter(edge, 1)))[index]
    assert content_id({"b": "ü", "a": [1, None]}).hex() == "99d384bcceb172977f6eaf4ef3a0327d"


def test_the_share_held_out_is_near_the_fraction() -> None:
    content_ids = np.frombuffer(b"".join(content_id(i) for i in range(4000)), np.uint8).reshape(-1, ID_BYTES)
    assert is_heldout(content_ids, 0.1).mean() == pytest.approx(0.1, abs=0.02)


def test_equal_content_has_an_equal_id_and_falls_on_one_side() -> None:
    one, same = content_id({"prompt": "a", "completion": "b"}), content_id({"completion": "b", "prompt": "a"})
    assert one == same
    assert content_id({"prompt": "a", "completion": "c"}) != one
    twice = np.frombuffer(one + same, np.uint8).reshape(2, ID_BYTES)
    for fraction in np.linspace(0, 1, 23):
        assert len(set(is_heldout(twice, float(fraction)))) == 1


def test_text_that_is_no_valid_unicode_has_an_id_too() -> None:
    assert len(content_id("\ud800")) == ID_BYTES


@given(masks, st.booleans())
def test_rows_are_counted_as_they_are_placed(supervised: np.ndarray, every: bool) -> None:
    assert num_rows(supervised, every=every) == len(row_positions(supervised, every=every))


@pytest.mark.parametrize(
    ("mask", "length"), [("00000", 5), ("00111", 2), ("00100", 2), ("0011011", 5), ("0010100", 4), ("0101", 3)]
)
def test_a_prompt_ends_where_the_last_answer_begins(mask: str, length: int) -> None:
    ids = np.arange(10, 10 + len(mask), dtype=np.int32)
    prompt = prompt_of(SampleTokens(ids, np.array([each == "1" for each in mask])))
    assert prompt.tolist() == ids[:length].tolist()
    assert prompt.base is ids or prompt is ids


def test_running_text_has_no_prompt() -> None:
    text = SampleTokens(np.arange(4, dtype=np.int32), np.array([False, True, True, True]))
    with pytest.raises(DataError, match=r"d\.jsonl:3: there is no prompt in it"):
        prompt_of(text, "d.jsonl:3")


def test_a_subset_is_a_share_of_those_that_are_held_out_and_of_those_that_are_not() -> None:
    ids = np.random.default_rng(0).integers(0, 256, (20_000, 16), dtype=np.uint8)
    heldout = is_heldout(ids, 0.2)
    for of in (heldout, ~heldout):
        assert is_in_subset(ids, 0.25)[of].mean() == pytest.approx(0.25, abs=0.02)
    assert is_in_subset(ids, 1.0).all()
