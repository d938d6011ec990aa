"""Two caches that hold the same texts: all of one is refused, a part is said."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.caches import make_cache, make_samples

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CacheError
from kdpipe.manifests.overlap import shared_samples
from kdpipe.manifests.sample import Sample

SAMPLES = make_samples(30)


def cache_of(folder: Path, samples: Sequence[Sample]) -> Cache:
    """With other token ids each time: of texts alone it is known that they are the same."""
    ids = len(folder.name)
    return make_cache(folder, samples=[replace(each, token_ids=np.full_like(each.token_ids, ids)) for each in samples])


def test_a_cache_whose_texts_are_all_in_another_is_refused(tmp_path: Path) -> None:
    whole, less = cache_of(tmp_path / "whole", SAMPLES), cache_of(tmp_path / "less", SAMPLES[7:20])
    again, others = cache_of(tmp_path / "again!", SAMPLES[::-1]), cache_of(tmp_path / "others", make_samples(9, seed=3))
    for caches, smaller, count, line in (
        ((whole, less), less, 13, 8),
        ((less, others, whole), less, 13, 8),
        ((whole, again), whole, 30, 1),
    ):
        with pytest.raises(
            CacheError, match=rf"all its {count} texts are in .*\(the first is data\.jsonl:{line}\)"
        ) as err:
            shared_samples(caches)
        assert err.value.where == str(smaller.path)


def test_a_part_that_two_caches_share_is_said_and_others_are_silent(tmp_path: Path) -> None:
    first, second = (
        cache_of(tmp_path / "first", SAMPLES[:20]),
        cache_of(tmp_path / "second", [*SAMPLES[15:], SAMPLES[29]]),
    )
    third = cache_of(tmp_path / "third", make_samples(9, seed=3))
    [note] = shared_samples((first, third, second))
    assert re.fullmatch(
        rf"5 of the 15 texts of {second.path} are in {first.path} too \(the first is data\.jsonl:16\): .*twice", note
    )
    assert shared_samples((first, third)) == shared_samples((second,)) == []
