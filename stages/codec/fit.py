"""Fit: a codec's numbers from some of a teacher's rows, and what it loses measured on others.

    rows -> fit (basis) | tune (levels, a first step) | test (the loss, to which the step is brought)

The rows come in an order that says nothing of them, so that each part is like all. Invariant: what the record says was
measured on rows that nothing was fitted to but the size of the step, decoded as a reader decodes them.
Cost: the head once forth and back for FISHER_ROWS rows, twice for each row that a loss is measured on and each step
tried; two eigenvalue problems of size E, in float64.
"""

# Shapes: N rows, E teacher width.

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kdpipe.manifests.codec import Codec, as_stored
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.fisher import MOST_PLACES, Fisher, integer_bits
from kdpipe.manifests.fitted import LARGEST_KL, Choice, CodecRecord, Fitted, FittedCodec
from kdpipe.manifests.int8 import Int8
from kdpipe.manifests.radix import arrange
from kdpipe.stages.codec.levels import levels_of
from kdpipe.stages.codec.metric import Divergences, Lens
from kdpipe.stages.models.head import Head
from kdpipe.stages.rows import as_tensor

LEAST_ROWS = 64
"""A codec fitted to fewer would say nothing of the others."""
FIT, TUNE = 0.7, 0.85
"""Where the rows are cut."""
FISHER_ROWS, FIRST_ROWS, TEST_ROWS = 2048, 256, 2048
FLOOR = 1e-9
"""Smallest eigenvalue of the metric, over its largest: what the head does not see at all."""
CLOSE = 0.02
"""The KL asked for is met to this share of it, from below."""
TRIES, SIZE_TRIES = 7, 9


def wanted_rows(width: int) -> int:
    """Rows that a codec is fitted to and measured on where there are as many."""
    return max(4096, min(16 * width, 32768))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Parts:
    """The rows [N, E] as the teacher gave them, in three; and the head."""

    fit: np.ndarray
    tune: np.ndarray
    test: np.ndarray
    lens: Lens

    @classmethod
    def of(cls, rows: np.ndarray, head: Head, vocab_size: int, device: torch.device) -> "_Parts":
        """Raises ConfigError for too few rows, or too wide ones."""
        require_fittable(len(rows), rows.shape[1], rows.dtype)
        fitted, tune, test = np.split(rows, [int(len(rows) * share) for share in (FIT, TUNE)])
        lens = Lens.of(head, vocab_size, device)
        return cls(fit=fitted, tune=tune, test=some(test, TEST_ROWS), lens=lens)

    @cached_property
    def basis(self) -> "Basis":
        return Basis.of(self.doubles(self.fit), self.lens)

    @cached_property
    def z(self) -> Tensor:
        """Of the rows for tuning, float64 [N, E], each column rising."""
        return ((self.doubles(self.tune) - self.basis.mean) @ self.basis.analysis).sort(0).values

    def loss(self, codec: Codec, rows: np.ndarray) -> Divergences:
        """What the codec loses of these rows."""
        device = self.lens.weight.device
        exact, stored = (
            as_tensor(np.ascontiguousarray(each)).to(device).float() for each in (rows, as_stored(codec, rows))
        )
        return self.lens.compare(exact, stored)

    def doubles(self, rows: np.ndarray) -> Tensor:
        return as_tensor(np.ascontiguousarray(rows)).to(self.lens.weight.device).double()


def require_fittable(num_rows: int, width: int, dtype: np.dtype) -> None:
    """A codec can be fitted to so many rows. Raises ConfigError for too few of them, or too wide ones."""
    if num_rows < LEAST_ROWS:
        raise ConfigError(
            f"{num_rows} rows are too few to fit it to, it takes {LEAST_ROWS}; store them raw", where="--codec"
        )
    widest = MOST_PLACES // (1 + dtype.itemsize)
    if width > widest:
        raise ConfigError(
            f"rows of {width:,} columns, at most {widest:,} are coded in {dtype.name}; store them raw", where="--codec"
        )


def fit(
    choice: Choice, rows: np.ndarray, head: Head, *, vocab_size: int, head_digest: str, device: torch.device
) -> Fitted:
    """The codec that is asked for, fitted to rows [N, E] in an order that says nothing of them.

    Raises ConfigError for too few rows, and for a KL or a size that is out of reach.
    """
    return _fitted(choice, _Parts.of(rows, head, vocab_size, device), head_digest)


def curve(
    choices: Sequence[Choice], rows: np.ndarray, head: Head, *, vocab_size: int, device: torch.device
) -> list[Fitted]:
    """Several codecs, of no head's digest; those that are out of reach are left out. Raises ConfigError."""
    parts, found = _Parts.of(rows, head, vocab_size, device), []
    for choice in choices:
        with contextlib.suppress(ConfigError):
            found.append(_fitted(choice, parts, ""))
    return found


def _fitted(choice: Choice, parts: _Parts, head_digest: str) -> Fitted:
    codec, loss = FITS[choice.name](choice, parts)
    share, dtype = share_of(codec, parts.test), parts.test.dtype.name
    if share >= 1:
        raise ConfigError(
            f"for that, rows of {dtype} take {share:.2f} of their bytes; allow more loss, or store them raw",
            where=f"--codec {choice.name}",
        )
    record = CodecRecord(
        codec=str(choice),
        head=head_digest,
        dtype=dtype,
        fit_rows=len(parts.fit) + len(parts.tune),
        test_rows=len(parts.test),
        kl_mean=loss.mean,
        kl_p99=float(loss.kl.quantile(0.99)),
        same_top=float(loss.same_top.double().mean()),
        share=share,
    )
    return Fitted(codec=codec, record=record)


def some(rows: np.ndarray, count: int) -> np.ndarray:
    """At most so many of the rows, from all over them."""
    return rows if len(rows) <= count else rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]


def _fit_int8(choice: Choice, parts: _Parts) -> tuple[FittedCodec, Divergences]:
    """The scales of the channels: by how large their numbers are, and a little by what the head makes of them."""
    rows = parts.doubles(parts.fit)
    mean = rows.mean(0)
    spread = (rows - mean).square().mean(0).sqrt()
    spread = spread.clamp_min(float(spread.max()) * 1e-6 + 1e-30)
    seen = parts.lens.information(parts.doubles(some(parts.fit, FISHER_ROWS)).float()).diagonal().clamp_min(0)
    share = (seen * spread.square()).clamp_min(1e-30)
    share = share / share.log().mean().exp()
    codecs = [
        Int8({"mean": mean.float().cpu().numpy(), "spread": (spread * share**-power).float().cpu().numpy()})
        for power in (0.0, 0.1, 0.2)
    ]
    best = min(codecs, key=lambda codec: parts.loss(codec, some(parts.tune, 2 * FIRST_ROWS)).mean)
    return best, parts.loss(best, parts.test)


def _fit_fisher(choice: Choice, parts: _Parts) -> tuple[FittedCodec, Divergences]:
    """The basis, and the step that has the KL or the size asked for."""
    if choice.share is not None:
        return _of_size(choice.share, parts)
    assert choice.kl is not None, "a choice has one of the two"
    return _of_loss(choice.kl, parts)


def _of_loss(kl: float, parts: _Parts) -> tuple[FittedCodec, Divergences]:
    """The codec that loses so much, from below. Raises ConfigError where that is out of reach."""
    # Each component is off by step^2 / 12 in the mean, and half of that is nats. It goes with the square of the step.
    step, rows = (24 * kl / parts.z.shape[1]) ** 0.5, some(parts.tune, FIRST_ROWS)
    best: tuple[FittedCodec, Divergences] | None = None
    for _ in range(TRIES):
        codec = parts.basis.codec(step, parts.z)
        loss = parts.loss(codec, rows)
        if rows is parts.test and loss.mean <= kl and (best is None or loss.mean > best[1].mean):
            best = codec, loss
        if best is not None and best[1].mean >= (1 - 3 * CLOSE) * kl:
            return best
        rows = parts.test
        step *= float((1 - CLOSE) * kl / max(loss.mean, 1e-12)) ** 0.5
    if best is not None:
        return best
    raise ConfigError(
        f"a mean KL of {kl:g} is out of reach, {loss.mean:.2g} was reached: rounding rows to {parts.test.dtype.name} "
        "loses about as much; allow more, or store them raw",
        where="--codec-kl",
    )


def _of_size(share: float, parts: _Parts) -> tuple[FittedCodec, Divergences]:
    """The codec whose rows take the most of so much of their bytes. Raises ConfigError for too large a loss.

    Bits are asked for until rows take that: words are whole, and exceptions are as many as there are.
    """
    bits = 8 * share * parts.test[0].nbytes
    low, high = bits / 4, 2 * bits
    best: tuple[float, FittedCodec] | None = None
    least = 1.0
    for _ in range(SIZE_TRIES):
        codec = parts.basis.codec(_step_of_size(parts.z, bits), parts.z)
        found = share_of(codec, parts.test)
        least = min(least, found)
        if found > share:
            high = bits
        else:
            low = bits
            if best is None or found > best[0]:
                best = found, codec
            if found >= (1 - CLOSE / 2) * share:
                break
        aim = bits * share / found
        bits = aim if low < aim < high and abs(aim - bits) > 2 * CLOSE * bits else (low + high) / 2
    if best is None:
        raise ConfigError(f"rows take {least:.3g} of their bytes at least; give them more", where="--codec-bytes")
    loss = parts.loss(best[1], parts.test)
    if not loss.mean <= LARGEST_KL:
        raise ConfigError(
            f"in {best[0]:.3g} of their bytes rows lose {loss.mean:.2g} nats; give them more", where="--codec-bytes"
        )
    return best[1], loss


def share_of(codec: Codec, rows: np.ndarray) -> float:
    """Bytes of rows as they are stored over those of raw ones."""
    return sum(part.nbytes for part in codec.encode(rows).values()) / rows.nbytes


def _step_of_size(z: Tensor, num_bits: float) -> float:
    """The step at which a row takes so many bits; z: float64 [N, E], each column rising."""
    low, high = -40.0, 20.0  # of its logarithm to base 2
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if levels_of(z, 2.0**middle).bits > num_bits else (low, middle)
    return float(2.0**high)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Basis:
    """The components of a teacher's rows: z = (row - mean) @ analysis, row = mean + z @ synthesis; float64."""

    mean: Tensor
    spread: Tensor
    analysis: Tensor
    synthesis: Tensor

    @classmethod
    def of(cls, rows: Tensor, lens: Lens) -> "Basis":
        """From float64 rows [N, E]."""
        mean = rows.mean(0).float().double()
        values, vectors = torch.linalg.eigh(lens.information(some_of(rows, FISHER_ROWS).float()))
        roots = values.clamp_min(float(values[-1]) * FLOOR).sqrt()
        root, inverse = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
        z = (rows - mean) @ root
        _, axes = torch.linalg.eigh(z.T @ z / len(z))
        spread = (rows - mean).square().mean(0).sqrt()
        spread = torch.exp2(spread.clamp_min(float(spread.max()) * 1e-6 + 1e-30).log2().round())
        return cls(mean=mean, spread=spread, analysis=root @ axes, synthesis=axes.T @ inverse)

    def codec(self, step: float, z: Tensor) -> Fisher:
        """The codec of this step; z: of rows that the basis was not fitted to, float64 [N, E], each column rising."""
        levels = levels_of(z, step)
        order, words = arranged(levels.count.cpu().numpy())
        columns = self.analysis[:, order] * self.spread[:, None] / step
        _, exponents = torch.frexp(columns.abs().amax(0))
        exponents = integer_bits(len(self.mean)) - exponents
        found = {
            "mean": self.mean.float(),
            "spread": self.spread.float(),
            "analysis": torch.ldexp(columns, exponents).round().to(torch.int32),
            "unit": torch.ldexp(torch.ones(len(order), dtype=torch.float64, device=columns.device), -exponents),
            "lowest": levels.lowest[order].to(torch.int32),
            "levels": levels.count[order].to(torch.int32),
            "words": torch.from_numpy(words.astype(np.int32)),
            "synthesis": (self.synthesis[order] * step).float(),
        }
        return Fisher({name: np.ascontiguousarray(array.cpu().numpy()) for name, array in found.items()})


def arranged(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All components in the order in which they are packed, those of one level last; the words of the others."""
    packed = np.flatnonzero(levels > 1)
    order, words = arrange(levels[packed])
    return np.concatenate([packed[order], np.flatnonzero(levels <= 1)]), words


def some_of(rows: Tensor, count: int) -> Tensor:
    """As `some`, of a tensor."""
    places = torch.linspace(0, len(rows) - 1, min(count, len(rows)), device=rows.device).long()
    return rows[places]


FITS: dict[str, Callable[[Choice, _Parts], tuple[FittedCodec, Divergences]]] = {
    "int8": _fit_int8,
    "fisher": _fit_fisher,
}
