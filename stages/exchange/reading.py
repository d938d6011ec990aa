"""Reading: top-k rows out of other projects' parquet files, checked, as the samples they are of.

Which format a file has is told by its columns; columns.py says what is in them. A row t is of token t + 1, which is so
a target.
Invariant: what is returned is a distribution's likeliest tokens, falling: ids of the vocabulary, each once, and
log-probabilities whose probabilities sum to at most 1; anything else is an error that names file and row.
"""

# Shapes: n tokens of a sample, R rows of it, K tokens of each.

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdpipe.manifests.errors import DataError
from kdpipe.manifests.sample import ID_BYTES, content_id
from kdpipe.stages.exchange.columns import index_bits
from kdpipe.stages.exchange.topk import Top

TOO_MUCH = 1e-3
"""What the probabilities of a row may sum to above 1: they were rounded to bfloat16, perhaps."""
BATCH_SAMPLES = 64
COMPRESSION = "compression_config.yaml"
EXACT = {"delta_encoding": "false", "error_diffusion": "false", "polynomial_terms": "null", "residual_bins": "[]"}
FLOATS = {"float32": "<f4", "float16": "<f2"}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Found:
    """A record: its tokens int32 [n], its targets bool [n], and the rows of those, in order."""

    content_id: bytes
    token_ids: np.ndarray
    supervised: np.ndarray
    top: Top


Row = Mapping[str, pa.Scalar]
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Positions [R], ids [R, K], log-probabilities [R, K]; of them those that count."""


def read_file(path: Path, vocab_size: int) -> Iterator[tuple[str, Found]]:
    """Every record with its place. Raises DataError."""
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as err:
        raise DataError(f"not a parquet file: {err}", where=path) from None
    with file:
        name = _format_of(set(file.schema_arrow.names), path)
        read, number = FORMATS[name][1](path), 0
        for batch in file.iter_batches(batch_size=BATCH_SAMPLES):
            for index in range(batch.num_rows):
                number += 1
                place = f"{path}:{number}"
                row = {column: batch.column(column)[index] for column in batch.schema.names}
                yield place, _checked(row, read(row, place), vocab_size, place)


def _format_of(names: set[str], path: Path) -> str:
    for name, (needed, _) in FORMATS.items():
        if needed <= names:
            return name
    known = "; ".join(f"{name}: {', '.join(sorted(needed))}" for name, (needed, _) in FORMATS.items())
    raise DataError(
        f"none of the formats that are known ({known}); its columns: {', '.join(sorted(names))}", where=path
    )


def _plain(path: Path) -> Callable[[Row, str], Rows]:
    def read(row: Row, place: str) -> Rows:
        positions = _flat(row["positions"], place, "positions")
        return positions, _matrix(row["token_ids"], place, "token_ids"), _matrix(row["logprobs"], place, "logprobs")

    return read


def _axolotl(path: Path) -> Callable[[Row, str], Rows]:
    def read(row: Row, place: str) -> Rows:
        ids, logprobs = (_matrix(row[name], place, name) for name in ("target_token_ids", "target_logprobs"))
        mask = _matrix(row["target_mask"], place, "target_mask")
        if not len(ids) == len(logprobs) == len(mask):
            raise DataError(f"{len(ids)}, {len(logprobs)} and {len(mask)} rows of its three columns", where=place)
        there = np.flatnonzero(mask.all(-1)) if mask.size else np.zeros(0, np.int64)
        return there, ids[there], logprobs[there]

    return read


def _distillkit(path: Path) -> Callable[[Row, str], Rows]:
    config = _compression(path.parent / COMPRESSION)
    k, bits, dtype = int(config["k"]), index_bits(int(config["d"])), FLOATS[config["exact_dtype"]]

    def read(row: Row, place: str) -> Rows:
        values = _matrix(row["compressed_logprobs"], place, "compressed_logprobs").astype(np.uint8)
        packed = _matrix(row["bytepacked_indices"], place, "bytepacked_indices").astype(np.uint8)
        if len(values) != len(packed) or (len(values) and values.shape[1] != k * np.dtype(dtype).itemsize):
            raise DataError(f"its rows are not of {k} values of {config['exact_dtype']}", where=place)
        digits = np.unpackbits(packed, axis=-1)[:, : k * bits].reshape(len(packed), k, bits)
        ids = digits.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1))
        logprobs = np.ascontiguousarray(values).view(dtype).astype(np.float32)
        count = len(_flat(row["input_ids"], place, "input_ids"))
        counts = np.arange(len(ids)) < count - 1
        if "labels" in row:  # its trainer takes row t where label t is there
            counts &= _flat(row["labels"], place, "labels")[: len(ids)] >= 0
        there = np.flatnonzero(counts)
        return there, ids[there], logprobs[there]

    return read


FORMATS: Mapping[str, tuple[frozenset[str], Callable[[Path], Callable[[Row, str], Rows]]]] = {
    "top-k": (frozenset({"input_ids", "positions", "token_ids", "logprobs"}), _plain),
    "axolotl": (frozenset({"input_ids", "target_token_ids", "target_logprobs", "target_mask"}), _axolotl),
    "distillkit": (frozenset({"input_ids", "compressed_logprobs", "bytepacked_indices"}), _distillkit),
}
"""By name: the columns by which a file is known, and what reads them."""


def _compression(path: Path) -> dict[str, str]:
    """DistillKit's settings, of which those that keep every value as it is are read. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise DataError("it is missing: it says how DistillKit's columns are packed", where=path) from None
    config = {name.strip(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}
    missing = [name for name in ("d", "k", "exact_k", "exact_dtype") if name not in config]
    if missing:
        raise DataError(f"it lacks '{missing[0]}'", where=path)
    wrong = next((name for name, value in EXACT.items() if config.get(name, value) != value), None)
    if wrong is None and config["exact_k"] != config["k"]:
        wrong = "exact_k"
    if wrong is None and config["exact_dtype"] not in FLOATS:
        wrong = "exact_dtype"
    if wrong is not None:
        raise DataError(
            f"{wrong} is {config.get(wrong) or 'a list'}: values that were approximated cannot be read; capture them "
            f"with exact_k = k in {' or '.join(FLOATS)}",
            where=path,
        )
    return config


def _checked(row: Row, rows: Rows, vocab_size: int, place: str) -> Found:
    """A record whose rows are what they should be. Raises DataError."""
    positions, ids, logprobs = rows
    token_ids = _flat(row["input_ids"], place, "input_ids")
    if not len(positions) == len(ids) == len(logprobs) or ids.shape != logprobs.shape:
        raise DataError(f"{len(positions)} positions, {ids.shape} ids, {logprobs.shape} log-probabilities", where=place)
    if len(positions) and not (
        positions[0] >= 0 and (np.diff(positions) > 0).all() and positions[-1] + 1 < len(token_ids)
    ):
        raise DataError(f"positions that are not rising, or beyond its {len(token_ids)} tokens", where=place)
    if len(token_ids) and not (token_ids.min() >= 0 and token_ids.max() < vocab_size):
        raise DataError(f"token ids beyond the vocabulary of {vocab_size}; is it another tokenizer's?", where=place)
    supervised = np.zeros(len(token_ids), dtype=bool)
    supervised[positions + 1] = True
    order = np.argsort(-logprobs, axis=-1, kind="stable")
    ids, logprobs = (np.take_along_axis(each, order, -1) for each in (ids, logprobs))
    _check_rows(ids, logprobs, vocab_size, place)
    text = token_ids.astype(np.int32)
    own = row["content_id"].as_py() if "content_id" in row else None
    return Found(
        content_id=_id(own, place) if own is not None else content_id(text.tolist()),
        token_ids=text,
        supervised=supervised,
        top=Top(ids=ids.astype(np.int32), logprobs=logprobs.astype(np.float32)),
    )


def _check_rows(ids: np.ndarray, logprobs: np.ndarray, vocab_size: int, place: str) -> None:
    if not ids.size:
        return
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise DataError(f"likely tokens beyond the vocabulary of {vocab_size}; is it another tokenizer's?", where=place)
    ordered = np.sort(ids, -1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise DataError("a row has a token twice", where=place)
    if not np.isfinite(logprobs).all():
        raise DataError("a log-probability that is not finite", where=place)
    if (most := float(np.exp(logprobs.astype(np.float64)).sum(-1).max())) > 1 + TOO_MUCH:
        raise DataError(f"the probabilities of a row sum to {most:.4g}: are they logits?", where=place)


def _id(text: str, place: str) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != ID_BYTES:
        raise DataError(f"its content_id is not {ID_BYTES} bytes in hexadecimal", where=place)
    return found


def _flat(scalar: pa.Scalar, place: str, name: str) -> np.ndarray:
    """A list of whole numbers, int64 [n]."""
    if not scalar.is_valid or not hasattr(scalar, "values"):
        raise DataError(f"'{name}' is not a list", where=place)
    try:
        return scalar.values.to_numpy(zero_copy_only=False).astype(np.int64)
    except (ValueError, TypeError):
        raise DataError(f"'{name}' is not a list of whole numbers", where=place) from None


def _matrix(scalar: pa.Scalar, place: str, name: str) -> np.ndarray:
    """A list of lists of one length, [R, K]."""
    if not scalar.is_valid or not hasattr(scalar, "values") or not hasattr(scalar.values, "flatten"):
        raise DataError(f"'{name}' is not a list of lists", where=place)
    values = scalar.values
    if not len(values):
        return np.zeros((0, 0))
    lengths = set(pc.list_value_length(values).fill_null(0).to_pylist())
    if len(lengths) > 1 or not lengths - {0}:
        raise DataError(
            f"rows of '{name}' have {min(lengths)} to {max(lengths)} entries, expected one number", where=place
        )
    try:
        return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), -1)
    except (ValueError, TypeError):
        raise DataError(f"'{name}' does not hold numbers", where=place) from None


def files_of(paths: Sequence[Path]) -> list[Path]:
    """Parquet files, those of folders in the order of their names. Raises DataError where there are none."""
    found = [file for path in paths for file in (sorted(path.glob("*.parquet")) if path.is_dir() else [path])]
    if not found:
        raise DataError("no parquet file is in it", where=", ".join(map(str, paths)))
    return found
