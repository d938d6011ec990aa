"""Fitted codecs: those whose numbers were fitted to a teacher before the first row was stored, and what they lose.

    CACHE/teacher/codec.safetensors      the codec's arrays; in its metadata the record

PLAN.json has its digest among the teacher's files, and in `settings.codec` what was asked for: "fisher kl=0.01".
Invariant: the file is whole and of that digest, or the cache is not read: without it rows mean nothing.
Cost: 8 bytes for each two columns of a row (E=4,096: 134 MB) on disk, read once a process. Format: FORMAT.md section 6.
"""

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import xxhash
from pydantic import ValidationError

from kdpipe.manifests.codec import CODECS, Codec
from kdpipe.manifests.durable import canonical, open_regular
from kdpipe.manifests.errors import CacheError, ConfigError, CorruptError, IncompleteError, LayoutError
from kdpipe.manifests.fisher import Fisher
from kdpipe.manifests.int8 import Int8
from kdpipe.manifests.made_with import extract_again, repair, repairable
from kdpipe.manifests.nearest import nearest
from kdpipe.manifests.plan import Plan
from kdpipe.manifests.prepared import Prepared
from kdpipe.manifests.record import Record, first_problem
from kdpipe.manifests.specs import Dtype
from kdpipe.manifests.tensorfile import DTYPES, TAGS, lay_out, parse

CODEC_FILE = "codec.safetensors"
DEFAULT_KL = 1e-2
LARGEST_KL = 1.0
"""Nats. Beyond it the metric says nothing of the divergence."""


class FittedCodec(Codec, Protocol):
    """A codec that is made of arrays."""

    ARRAYS: ClassVar[tuple[str, ...]]
    arrays: dict[str, np.ndarray]

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None: ...


FITTED: dict[str, type[FittedCodec]] = {"int8": Int8, "fisher": Fisher}
"""By the first word of what a plan has."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What is asked of a codec, as `settings.codec` in a plan says it: a name, and for fisher how good or how small.

    kl: mean KL in nats between the teacher's distribution and that of a stored row
    share: bytes of a stored row over those of a raw one
    """

    name: str
    kl: float | None = None
    share: float | None = None

    def __str__(self) -> str:
        asked = (("kl", self.kl), ("bytes", self.share))
        return " ".join([self.name, *(f"{key}={value!r}" for key, value in asked if value is not None)])

    @classmethod
    def read(cls, text: str, where: object = None) -> "Choice":
        """What a plan says. Raises LayoutError where it says something else."""
        name, *asked = text.split(" ")
        try:
            given = {key: float(value) for key, _, value in (each.partition("=") for each in asked)}
            choice = cls(name, kl=given.get("kl"), share=given.get("bytes"))
        except ValueError:
            raise LayoutError(f"'settings.codec': '{text}' is no codec", where=where) from None
        if str(choice) != text:
            raise LayoutError(f"'settings.codec': '{text}' is no codec, '{choice}' would be", where=where)
        return choice

    @property
    def flags(self) -> str:
        """The options that ask for it."""
        asked = (("--codec", self.name), ("--codec-kl", self.kl), ("--codec-bytes", self.share))
        return " ".join(f"{flag} {value}" for flag, value in asked if value is not None)

    @property
    def is_fitted(self) -> bool:
        return self.name in FITTED and self.name not in CODECS


def choose(name: str, kl: float | None = None, share: float | None = None) -> Choice:
    """What the options say. Raises ConfigError for a codec that is not known, or for a bound that it does not take."""
    require_known(name, where="--codec")
    for option, value in (("--codec-kl", kl), ("--codec-bytes", share)):
        if value is not None and name != "fisher":
            raise ConfigError(f"it is for --codec fisher; {name} takes no bound", where=option)
    if kl is not None and share is not None:
        raise ConfigError(
            "what it may lose and what it may take decide each other: give one of the two", where="--codec-kl"
        )
    if name == "fisher" and share is None:
        kl = DEFAULT_KL if kl is None else kl
    return Choice(name, kl=kl, share=share)


def require_known(name: str, *, where: object) -> None:
    """Raises ConfigError for a codec that is neither in CODECS nor in FITTED; where: what asks for it."""
    if name not in CODECS and name not in FITTED:
        known = CODECS.keys() | FITTED.keys()
        raise ConfigError(
            f"there is no codec '{name}' here{nearest(name, known)} (known: {', '.join(sorted(known))}); one of your "
            "own is added to kdpipe.manifests.codec.CODECS first",
            where=where,
        )


class CodecRecord(Record):
    """What is known of a fitted codec."""

    codec: str
    """What was asked for, as in the plan."""
    head: str
    """xxh3-128 of the head.safetensors that it was fitted to."""
    dtype: str
    """Of the rows."""
    fit_rows: int
    """Rows that it was fitted to."""
    test_rows: int
    """Other rows, on which the loss was measured."""
    kl_mean: float
    """KL in nats between the teacher's distribution and that of a stored row, over those."""
    kl_p99: float
    same_top: float
    """Share of them whose likeliest token is the same."""
    share: float
    """Bytes of their stored rows, exceptions too, over those of raw ones."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fitted:
    """A fitted codec and its record."""

    codec: FittedCodec
    record: CodecRecord

    @property
    def is_of_few(self) -> bool:
        """Whether it was fitted to fewer rows than they have columns: in some directions it has seen none."""
        return self.record.fit_rows < len(self.codec.arrays["mean"])


def fitted_bytes(fitted: Fitted) -> bytes:
    """codec.safetensors"""
    arrays = {name: np.ascontiguousarray(fitted.codec.arrays[name]) for name in fitted.codec.ARRAYS}
    tags = {dtype: tag for tag, dtype in DTYPES.items()}
    body = b"".join(array.tobytes() for array in arrays.values())
    metadata = {
        "format": "kdpipe-codec",
        "version": "1",
        "record": canonical(fitted.record.model_dump()).decode(),
        "xxh3_128": xxhash.xxh3_128_hexdigest(body),
    }
    layout = lay_out([(name, tags[array.dtype], array.shape) for name, array in arrays.items()], metadata)
    return layout.header + body


def read_fitted(path: Path, *, digest: str) -> Fitted:
    """The codec in a file of this xxh3-128. Raises FileNotFoundError, CorruptError, LayoutError."""
    with repairable(path.parent.parent):
        descriptor = open_regular(path)
    with open(descriptor, "rb") as file:
        data = file.read()
    if (found := xxhash.xxh3_128_hexdigest(data)) != digest:
        raise CorruptError(f"xxh3-128 {found}, PLAN.json says {digest}", where=path, hint=repair(path.parent.parent))
    layout, metadata = parse(memoryview(data), path)
    try:
        record = CodecRecord.model_validate_json(metadata.get("record", ""))
    except ValidationError as err:
        raise LayoutError(f"not a codec's record: {first_problem(err)}", where=path) from None
    kind = FITTED[Choice.read(record.codec, path).name]
    if tuple(layout.tensors) != kind.ARRAYS:
        raise LayoutError(f"it has {', '.join(layout.tensors)}; expected {', '.join(kind.ARRAYS)}", where=path)
    buffer = np.frombuffer(data, np.uint8)
    return Fitted(codec=kind({name: tensor.view(buffer) for name, tensor in layout.tensors.items()}), record=record)


@functools.lru_cache(maxsize=8)
def _kept(path: Path, digest: str, stamp: tuple[int, ...]) -> Fitted:
    """read_fitted, once for a file as it is. stamp: what changes with its content"""
    return read_fitted(path, digest=digest)


def open_fitted(cache: Path, plan: Plan) -> Fitted:
    """The codec of a cache that has a fitted one; read again only where the file has changed.

    Raises IncompleteError where it is missing, CorruptError, LayoutError.
    """
    path = cache / "teacher" / CODEC_FILE
    try:
        status = os.stat(path, follow_symlinks=False)
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return _kept(path, plan.teacher_files.get(CODEC_FILE, "nothing"), stamp)
    except FileNotFoundError:
        raise IncompleteError(
            "the codec is missing, without which no row can be read", where=path, hint=extract_again(cache)
        ) from None


def expected_share(cache: Path, plan: Plan) -> float:
    """Bytes of a stored row over those of a raw one: as measured, or before there is a codec as experience has it."""
    if CODEC_FILE in plan.teacher_files and (cache / "teacher" / CODEC_FILE).exists():
        return open_fitted(cache, plan).record.share
    return usual_share(Choice.read(plan.settings.codec), plan.head.hidden_size, plan.settings.dtype)


def usual_share(choice: Choice, width: int, dtype: Dtype) -> float:
    """What a codec usually comes to, before it is fitted: as tools/bench/codec.py has it of SmolLM2."""
    raw = width * DTYPES[TAGS[dtype]].itemsize
    if choice.name == "int8":
        return (width + 4) / raw
    if choice.share is not None or choice.kl is None:
        return choice.share or 1.0
    bits = BITS_AT_A_CENTINAT - math.log2(choice.kl / 1e-2) / 2
    return min(max(bits, 0.5) * width / 8 / raw, 1.0)


def file_bytes(choice: Choice, width: int) -> int:
    """What codec.safetensors takes, less its header and what a column has one of."""
    return 8 * width * width if choice.name == "fisher" else 0


BITS_AT_A_CENTINAT = 3.8
"""Of each number of a row at a mean KL of 0.01; a fourth of the KL costs a bit more."""


def require_kl(cache: Path, plan: Plan, most: float | None) -> None:
    """Its codec, or that of the cache it was derived from, must not lose more than this, nats.

    Raises CacheError naming codec and loss.
    """
    is_derived = plan.head.sidecar is not None
    codec = plan.engine.arguments.get("codec", "raw") if is_derived else plan.settings.codec
    if most is None or codec == "raw":
        return
    whose = f"the codec '{codec}' of the cache it was made of" if is_derived else f"its codec '{codec}'"
    found = loss_of(cache, plan)
    if found is None:
        raise CacheError(f"what {whose} loses was not measured; leave --max-codec-kl out", where=cache)
    if found > most:
        finer = f"with --codec fisher --codec-kl {most:g}" if most else "raw"
        again = "derive from a finer cache" if is_derived else f"extract {finer}"
        if most and not is_derived:
            again += ", or kdpipe cache convert a raw cache so,"
        raise CacheError(
            f"{whose} loses a mean KL of {found:.2g} nats, --max-codec-kl allows {most:g}; allow more, or {again} into "
            "another folder",
            where=cache,
        )


def source_codec(plan: Plan) -> str | None:
    """Of a side-car the codec of the cache that it was derived from; None of one that was imported."""
    return plan.engine.arguments.get("codec")


def loss_of(cache: Path, plan: Plan) -> float | None:
    """The mean KL in nats that its codec loses, or that of the cache it was derived from; None: not measured."""
    if plan.head.sidecar is not None:
        found = plan.engine.arguments.get("codec_kl")
        return None if found is None else float(found)
    return open_fitted(cache, plan).record.kl_mean if Choice.read(plan.settings.codec, cache).is_fitted else None


def all_stored_as(plans: Sequence[Prepared]) -> tuple[str, ...]:
    """How the rows of some caches are stored; () where all are raw."""
    found = tuple(stored_as(plan) if isinstance(plan, Plan) else "raw" for plan in plans)
    return found if set(found) - {"raw"} else ()


def stored_as(plan: Plan) -> str:
    """Its codec with a digest of the numbers that it has; of a side-car, the codec and rows of what it was made of."""
    if plan.head.sidecar is None:
        codec, numbers = plan.settings.codec, plan.teacher_files.get(CODEC_FILE, "")
    else:
        codec, numbers = plan.engine.arguments.get("codec", "raw"), plan.engine.arguments.get("rows", "")
    return codec if codec == "raw" else f"{codec} {numbers[:16]}"


def codec_of(cache: Path, plan: Plan) -> Codec:
    """The codec of a cache's rows. Raises ConfigError for one that is not known here, and as open_fitted."""
    choice = Choice.read(plan.settings.codec, cache)
    require_known(choice.name, where=cache)
    return open_fitted(cache, plan).codec if choice.is_fitted else CODECS[choice.name]
