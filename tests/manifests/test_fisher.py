"""Fisher and int8: a row has the same bytes beside any others, and nothing a row can hold is beyond them."""

import numpy as np
import pytest
import torch
from tests.stages.codec.rows import Drawn, drawn

from kdpipe.manifests.codec import as_stored
from kdpipe.manifests.fisher import Fisher, integer_bits
from kdpipe.manifests.fitted import Choice, FittedCodec
from kdpipe.stages.codec.fit import fit


def codec_of(found: Drawn, name: str) -> FittedCodec:
    device = torch.device("cpu")
    return fit(
        Choice.read(name), found.rows, found.head, vocab_size=found.vocab_size, head_digest="0", device=device
    ).codec


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, bytes]:
    return {name: b"".join(part[name].tobytes() for part in parts) for name in parts[0]}


@pytest.mark.parametrize("name", ["fisher kl=0.01", "fisher kl=0.001", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_row_has_the_same_bytes_wherever_it_is_encoded(name: str, dtype: str) -> None:
    """Sums of other lengths and orders, as a library makes them of blocks of other sizes, end in the same codes."""
    found = drawn(dtype=dtype, outliers=True)
    codec, rows = codec_of(found, name), found.rows[:203]
    whole = joined([codec.encode(rows)])
    for cuts in ([1, 2, 3], [7, 100], [64, 128, 192], list(range(1, 203))):
        assert joined([codec.encode(part) for part in np.split(rows, cuts)]) == whole
    if isinstance(codec, Fisher):  # another order of the sums, which no rounding is left to tell from the first
        order = np.random.default_rng(3).permutation(rows.shape[1])
        shuffled = {each: codec.arrays[each][order] for each in ("mean", "spread", "analysis")}
        other = Fisher({**codec.arrays, **shuffled})
        assert np.array_equal(other.exact(np.ascontiguousarray(rows[:, order])), codec.exact(rows))


def test_the_widest_sum_of_integers_is_exact() -> None:
    for width in (1, 2, 37, 576, 4096, 16384):
        assert 2 * integer_bits(width) + int(np.ceil(np.log2(max(width, 1)))) <= 53


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_wild_rows_are_stored_as_they_are_and_tame_ones_beside_them_as_ever(dtype: str) -> None:
    found = drawn(dtype=dtype)
    codec, rows = codec_of(found, "fisher kl=0.01"), found.rows[:60].copy()
    wild = [0, 17, 59]
    rows[wild] = (np.random.default_rng(1).uniform(-3e4, 3e4, (3, rows.shape[1]))).astype(rows.dtype)
    rows[17] = np.finfo(np.float16).max if dtype == "float16" else 3e38
    parts, stored = codec.encode(rows), as_stored(codec, rows)
    assert np.array_equal(stored[wild], rows[wild])
    tame = np.setdiff1d(np.arange(60), wild)
    alone = codec.encode(rows[tame])
    assert np.array_equal(parts["packed"][tame], alone["packed"])
    assert np.array_equal(parts["num_exceptions"][tame], alone["num_exceptions"])
    # The same codes; a product of fewer rows may sum otherwise.
    scale = 2.0**-6 if dtype == "bfloat16" else 1e-2 if dtype == "float16" else 1e-5
    np.testing.assert_allclose(
        stored[tame].astype(np.float32), as_stored(codec, rows[tame]).astype(np.float32), rtol=scale, atol=1e-5
    )


def test_what_is_beyond_its_levels_is_an_exception_and_no_further_off_than_the_rest() -> None:
    found = drawn(dtype="float32")
    codec = codec_of(found, "fisher kl=0.05")
    assert isinstance(codec, Fisher)
    rows = found.rows[:200] + 0.2 * np.random.default_rng(2).standard_t(1.2, (200, 37)).clip(-60, 60).astype(np.float32)
    parts = codec.encode(rows)
    assert parts["num_exceptions"].max() > 3
    off = codec.steps(as_stored(codec, rows)) - codec.steps(rows)
    assert np.abs(off).max() <= 1  # what is left of it is rounding to whole steps again


@pytest.mark.filterwarnings("ignore:overflow")
def test_int8_gives_a_number_for_every_number() -> None:
    found = drawn(dtype="bfloat16")
    rows = found.rows[:4].copy()
    rows[1] = 3e38
    rows[2, 5] = -3e38
    stored = as_stored(codec_of(found, "int8"), rows).astype(np.float32)
    assert np.isfinite(stored).all()
    assert (stored[1] > 1e34).all()
    assert stored[2, 5] < -1e34


@pytest.mark.parametrize("name", ["fisher kl=0.01", "int8"])
def test_a_row_of_zeros_and_no_row_at_all(name: str) -> None:
    found = drawn()
    codec = codec_of(found, name)
    assert np.isfinite(as_stored(codec, np.zeros((2, 37), found.rows.dtype)).astype(np.float32)).all()
    assert as_stored(codec, found.rows[:0]).shape == (0, 37)


def test_a_row_that_is_the_mean_of_all_is_that_again() -> None:
    codec = codec_of(drawn(dtype="float32"), "int8")
    mean = codec.arrays["mean"][None]
    with np.errstate(invalid="raise"):  # nothing is divided by 0
        assert np.array_equal(as_stored(codec, mean), mean)


def test_components_that_take_no_room_have_the_one_step_that_is_theirs() -> None:
    """Which need not be 0: here rows are counted from another point than the mean."""
    found = drawn(dtype="float32")
    codec, rows = codec_of(found, "fisher kl=0.05"), found.rows[:50]
    assert isinstance(codec, Fisher)
    rest = slice(codec.num_packed, None)
    arrays = {name: array.copy() for name, array in codec.arrays.items()}
    assert len(arrays["lowest"][rest]) > 5
    arrays["lowest"][rest] += 40
    arrays["mean"] -= 40 * arrays["synthesis"][rest].sum(0)
    off, wanted = (np.abs(as_stored(each, rows) - rows).mean() for each in (Fisher(arrays), codec))
    assert off == pytest.approx(wanted, rel=0.02)
