"""What commands print: JSON that any reader takes, lists that a person reads."""

import json

import numpy as np
import pytest

from kdpipe.pipeline.output import human_bytes, jsonable, listing, to_json


def test_numbers_that_are_not_finite_become_null() -> None:
    assert json.loads(to_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": np.int64(3)})) == {
        "a": None,
        "b": [None, 1.5],
        "c": 3,
    }


def test_what_has_no_place_in_json_is_our_bug() -> None:
    with pytest.raises(TypeError):
        jsonable({"a": object()})


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (7 << 30, "7.0 GiB"), (3 << 60, "3072.0 PiB")],
)
def test_byte_sizes_are_readable(num_bytes: int, text: str) -> None:
    assert human_bytes(num_bytes) == text


def test_a_list_of_texts_has_a_line_for_each_and_a_digest_is_short() -> None:
    assert listing({"problems": ["one", "two"], "fingerprint": "0123456789ab" + "c" * 52}).splitlines() == [
        "problems     one",
        "             two",
        "fingerprint  0123456789ab",
    ]
    assert listing({"problems": ["x"] * 60}).splitlines()[-1].strip() == "... and 10 more, all with --json"


def test_a_list_has_two_aligned_columns_and_spells_out_nested_records() -> None:
    record = {"num_rows": 12345, "complete": True, "settings": {"codec": "raw"}, "bytes_per_codec": {"raw": 2048}}
    assert listing(record).splitlines() == [
        "num rows             12,345",
        "complete             yes",
        "settings codec       raw",
        "bytes per codec raw  2.0 KiB",
    ]
