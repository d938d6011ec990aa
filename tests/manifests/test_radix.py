"""Radix: codes of any number of levels come back, and hardly a bit is lost between them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.manifests.radix import MOST_LEVELS, Radix, arrange, pack, unpack


def radix_of(levels: list[int]) -> Radix:
    order, words = arrange(np.array(levels))
    assert sorted(order.tolist()) == list(range(len(levels)))
    return Radix.of(np.array(levels)[order], words)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, MOST_LEVELS), min_size=1, max_size=60), st.integers(0, 2**32 - 1))
def test_codes_of_any_levels_come_back(levels: list[int], seed: int) -> None:
    radix = radix_of(levels)
    drawn = np.random.default_rng(seed).random((5, len(levels)))
    codes = np.floor(drawn * radix.levels).astype(np.int64)
    codes[0], codes[1] = 0, radix.levels - 1
    words = pack(codes, radix)
    assert words.shape == (5, radix.num_words)
    assert np.array_equal(unpack(words, radix), codes)


@pytest.mark.parametrize("usual", [4, 10, 30, 60])
def test_a_hundredth_of_the_bits_is_lost_at_most(usual: int) -> None:
    levels = 2 + (usual * np.exp(np.random.default_rng(usual).standard_normal(600))).astype(np.int64)
    radix = radix_of(levels.tolist())
    assert 32 * radix.num_words <= 1.01 * np.log2(levels).sum() + 8


def test_a_row_is_packed_as_it_would_be_alone() -> None:
    radix = radix_of([3, 5, 4, 70000 % MOST_LEVELS, 2, 2, 9])
    codes = np.floor(np.random.default_rng(0).random((9, 7)) * radix.levels).astype(np.int64)
    assert np.array_equal(pack(codes, radix)[4:6], pack(codes[4:6], radix))


def test_no_codes_are_no_words() -> None:
    radix = radix_of([])
    words = pack(np.zeros((3, 0), np.int64), radix)
    assert words.shape == unpack(words, radix).shape == (3, 0)
