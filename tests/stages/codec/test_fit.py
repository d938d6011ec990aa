"""Fitting: a codec loses what was asked for, on rows that it was not fitted to, whatever the head and the rows are."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.stages.codec.rows import DTYPES, HEADS, Drawn, drawn

from kdpipe.manifests.codec import as_stored
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.fisher import Fisher
from kdpipe.manifests.fitted import Choice, Fitted, choose
from kdpipe.stages.codec.fit import fit, require_fittable
from kdpipe.stages.codec.metric import Lens
from kdpipe.stages.rows import as_tensor

CPU = torch.device("cpu")


def fitted_to(found: Drawn, codec: str) -> Fitted:
    return fit(
        Choice.read(codec), found.rows[:-1500], found.head, vocab_size=found.vocab_size, head_digest="0", device=CPU
    )


def lost(found: Drawn, fitted: Fitted) -> float:
    """Mean KL over rows that nobody fitted anything to."""
    rows = found.rows[-1500:]
    lens = Lens.of(found.head, found.vocab_size, CPU)
    return lens.compare(*(as_tensor(each).float() for each in (rows, as_stored(fitted.codec, rows)))).mean


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_the_kl_asked_for_is_the_kl_lost(kind: str, outliers: bool) -> None:
    found = drawn(outliers=outliers, **HEADS[kind])
    fitted = fitted_to(found, "fisher kl=0.01")
    assert 0.8 * 0.01 <= fitted.record.kl_mean <= 0.01
    assert lost(found, fitted) == pytest.approx(0.01, rel=0.25)
    assert fitted.record.share < 0.35
    assert fitted.record.kl_mean < fitted.record.kl_p99 < 0.15


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_dtype_come_back_in_it(dtype: str) -> None:
    found = drawn(dtype=dtype, outliers=True)
    for codec, most in (("fisher kl=0.001", 0.0013), ("int8", 0.003)):
        fitted = fitted_to(found, codec)
        assert as_stored(fitted.codec, found.rows).dtype == DTYPES[dtype]
        assert lost(found, fitted) < most
        assert fitted.record.dtype == dtype


@pytest.mark.parametrize("codec", ["fisher kl=0.01", "fisher bytes=0.3", "int8"])
def test_what_the_record_says_was_measured_on_the_last_rows(codec: str) -> None:
    """To which neither the basis nor the levels were fitted."""
    found = drawn()
    fitted = fitted_to(found, codec)
    record, rows = fitted.record, found.rows[:-1500]
    test = rows[int(0.85 * len(rows)) :]
    assert (record.fit_rows, record.test_rows) == (len(rows) - len(test), len(test))
    lens = Lens.of(found.head, found.vocab_size, CPU)
    loss = lens.compare(*(as_tensor(each).float() for each in (test, as_stored(fitted.codec, test))))
    right = [loss.mean, float(loss.kl.quantile(0.99)), float(loss.same_top.double().mean())]
    assert [record.kl_mean, record.kl_p99, record.same_top] == pytest.approx(right, rel=1e-5)
    assert record.share == sum(part.nbytes for part in fitted.codec.encode(test).values()) / test.nbytes


@pytest.mark.parametrize(("width", "share"), [(96, 0.2), (96, 0.35), (96, 0.4), (48, 0.25), (48, 0.22), (48, 0.5)])
def test_the_bytes_asked_for_are_used_and_not_exceeded(width: int, share: float) -> None:
    """But for a word of each row, which is 4 bytes."""
    found = drawn(width=width)
    fitted = fitted_to(found, f"fisher bytes={share}")
    stored = fitted.codec.encode(found.rows[-400:])
    taken = sum(part.nbytes for part in stored.values()) / found.rows[-400:].nbytes
    assert 0.95 * (share - 2 / width) < fitted.record.share <= share
    assert 0.95 * (share - 2 / width) < taken < 1.05 * share


def test_more_bytes_lose_less_and_int8_lies_on_the_way() -> None:
    found = drawn(width=96)
    losses = [lost(found, fitted_to(found, f"fisher bytes={share}")) for share in (0.15, 0.25, 0.5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < lost(found, fitted_to(found, "int8")) < losses[1]


def test_outlier_channels_cost_int8_nothing() -> None:
    plain, outliers = (drawn(outliers=each, width=96) for each in (False, True))
    calm, wild = (lost(each, fitted_to(each, "int8")) for each in (plain, outliers))
    assert wild < 2 * calm


def test_fitting_twice_gives_the_same_bytes() -> None:
    found = drawn()
    first, second = (fitted_to(found, "fisher kl=0.01") for _ in range(2))
    assert first.record == second.record
    for name in Fisher.ARRAYS:
        assert first.codec.arrays[name].tobytes() == second.codec.arrays[name].tobytes()


def test_padding_of_the_vocabulary_counts_for_nothing() -> None:
    found = drawn()
    found.head.weight[found.vocab_size :] = 30.0
    assert fitted_to(found, "fisher kl=0.01").record.share == fitted_to(drawn(), "fisher kl=0.01").record.share


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: choose("int8", kl=0.01), "--codec-kl: it is for --codec fisher; int8 takes no bound"),
        (lambda: choose("raw", share=0.5), "--codec-bytes: it is for --codec fisher; raw takes no bound"),
        (lambda: choose("fisher", kl=0.01, share=0.5), "give one of the two"),
        (lambda: choose("fischer"), r"no codec 'fischer' here, did you mean 'fisher'|no codec 'fischer'.*fisher"),
        (lambda: fitted_to(drawn(), "fisher kl=1e-09"), "rows of bfloat16 take .* of their bytes; allow more"),
        (
            lambda: fitted_to(drawn(), "fisher bytes=0.01"),
            "of their bytes at least; give them more|of their bytes rows lose",
        ),
        (lambda: fitted_to(drawn(num_rows=1540), "fisher kl=0.01"), "40 rows are too few.*store them raw"),
        (
            lambda: require_fittable(64, 21846, np.dtype("float16")),
            "rows of 21,846 columns, at most 21,845 are coded in float16; store them raw",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_in_a_line(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ask()
