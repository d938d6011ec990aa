"""Rows as bytes: what is not finite is found in every dtype, and nothing else is."""

import ml_dtypes
import numpy as np
import pytest

from kdpipe.stages.rows import as_array, as_tensor, checksum, not_finite

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_65536_numbers_are_finite_or_not_as_numpy_says(dtype: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[dtype])[:, None]
    assert not_finite(every).tolist() == np.flatnonzero(~np.isfinite(every[:, 0].astype(np.float32))).tolist()
    assert not_finite(every)[0] > 0


def test_numbers_of_float32_around_the_last_finite_one() -> None:
    last = np.finfo(np.float32).max
    every = np.array([0, -0.0, 1e-45, last, -last, np.inf, -np.inf, np.nan, -np.nan], np.float32)[:, None]
    assert not_finite(every).tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_number_in_a_row_is_enough(value: float, dtype: str) -> None:
    rows = np.linspace(-3, 3, 5 * 7).reshape(5, 7).astype(DTYPES[dtype])
    assert not_finite(rows).tolist() == []
    rows[1, 6], rows[4, 0] = value, value
    assert not_finite(rows).tolist() == [1, 4]
    assert not_finite(rows[:0]).tolist() == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_and_its_array_are_the_same_memory(dtype: str) -> None:
    rows = np.linspace(-3, 3, 12).reshape(3, 4).astype(DTYPES[dtype])
    before, tensor = checksum(rows), as_tensor(rows)
    assert tensor.tolist() == rows.astype(np.float64).tolist()
    assert np.shares_memory(as_array(tensor), rows)
    assert as_array(tensor).dtype == rows.dtype
    tensor[2, 3] = 7.0
    assert rows[2, 3] == 7.0
    assert checksum(rows) != before
