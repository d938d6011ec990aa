"""Export: all samples of a cache with their likeliest tokens, into a folder of a format that others read.

    OUT/export.json, train-00000.parquet, test-00000.parquet                          files = "parquet"
    OUT/export.json, dataset_dict.json, train/{data-...arrow, state.json, ...}, test/ files = "dataset"

"test" are the samples that the cache holds out, so that a student trained elsewhere can be measured fairly.
Invariant: the folder appears under its name when all is in it. What it holds is biased, and export.json says by how
much: the mean probability that the k tokens leave out.
"""

# Shapes: R stored rows of a sample, K tokens kept of each.

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import JsonValue

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.durable import disk_error, fsync_folder, fsync_tree, make_folder
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.fitted import loss_of
from kdpipe.manifests.places import require_outside
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.sample import row_positions
from kdpipe.stages.exchange.columns import COLUMNS, Cut
from kdpipe.stages.exchange.topk import TopK
from kdpipe.stages.feed.dataset import of_caches

BATCH_ROWS = 4096
"""Stored rows, and tokens, of the samples that are written at a time."""
RECORD = "export.json"
STATE: dict[str, JsonValue] = {
    "_fingerprint": "kdpipe",
    "_format_columns": None,
    "_format_kwargs": {},
    "_format_type": None,
    "_output_all_columns": False,
    "_split": None,
}
"""What load_from_disk wants to know of an Arrow file beside it."""
Files = Literal["parquet", "dataset"]
Write = Callable[[pa.RecordBatch], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written; left_out: mean probability of a row that its k tokens do not have."""

    num_train: int
    num_test: int
    num_rows: int
    without_rows: int
    """Samples that have no supervised token and so are in neither."""
    left_out: float


def export_cache(
    cache: Cache, out: Path, *, columns: str, files: Files, top_k: int, device: torch.device, progress: Progress
) -> Exported:
    """Write a complete cache into a folder that is not there. Raises ConfigError, SpaceError; what the cache raises."""
    require_outside(out, option="OUT")
    (teacher,) = of_caches([cache]).teachers
    if (sidecar := teacher.record.sidecar) is not None:
        raise ConfigError(f"it has {sidecar.has}: export the cache that it was made of", where=cache.path)
    top = TopK(teacher, top_k, device)
    if os.path.lexists(out):
        raise ConfigError("it is there already; name another folder", where=out)
    scratch = out.absolute().with_name(f".{out.name}.export-{os.getpid()}")
    try:
        make_folder(scratch.parent)
        scratch.mkdir()
        found = _written(cache, scratch, top, columns=columns, files=files, progress=progress)
        record = _record(cache, found, columns=columns, top_k=top_k, vocab_size=top.vocab_size)
        (scratch / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        if columns == "distillkit":
            (scratch / "compression_config.yaml").write_text(_compressor(top))
        fsync_tree(scratch)
        os.rename(scratch, out.absolute())
        fsync_folder(out.absolute().parent)
    except OSError as err:
        raise disk_error(err, out) from err
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def _written(cache: Cache, folder: Path, top: TopK, *, columns: str, files: Files, progress: Progress) -> Exported:
    heldout, counts, left_out = cache.heldout(), {"train": 0, "test": 0}, 0.0
    without = int((cache.num_supervised() == 0).sum())
    num_rows = 0
    progress.begin("cache export", total=len(cache), unit="samples")
    with ExitStack() as stack:
        sinks: dict[str, Write] = {}
        for split, numbers in (("train", np.flatnonzero(~heldout)), ("test", np.flatnonzero(heldout))):
            for cuts in _batches(cache, numbers, top):
                batch = pa.RecordBatch.from_pydict(COLUMNS[columns](cuts, top.vocab_size))
                if split not in sinks:
                    sinks[split] = stack.enter_context(_sink(folder, split, batch.schema, files))
                sinks[split](batch)
                counts[split] += len(cuts)
                num_rows += sum(len(cut.positions) for cut in cuts)
                kept = np.concatenate([np.exp(cut.top.logprobs.astype(np.float64)).sum(-1) for cut in cuts])
                left_out += float((1.0 - kept).clip(0.0).sum())
                progress.advance(len(cuts))
    progress.end()
    if files == "dataset":
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": [each for each in counts if counts[each]]}))
    return Exported(
        num_train=counts["train"],
        num_test=counts["test"],
        num_rows=num_rows,
        without_rows=without,
        left_out=left_out / max(num_rows, 1),
    )


def _batches(cache: Cache, samples: np.ndarray, top: TopK) -> Iterator[list[Cut]]:
    """The samples that have a row to learn from, some at a time."""
    every, waiting, size = cache.plan.settings.rows == "all", list[Cut](), 0
    ids = cache.samples.column("content_id")
    for index in samples[cache.num_supervised()[samples] > 0].tolist():
        text = cache.samples.tokens(index)
        rows = top.of(cache.stored_rows(index))
        cut = Cut(
            content_id=ids[index].tobytes(),
            place=cache.samples.place(index),
            token_ids=text.token_ids,
            supervised=text.supervised,
            positions=row_positions(text.supervised, every=every),
            top=rows,
        )
        waiting.append(cut)
        size += len(text.token_ids)
        if size >= BATCH_ROWS:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


@contextmanager
def _sink(folder: Path, split: str, schema: pa.Schema, files: Files) -> Iterator[Write]:
    """What writes the batches of a split: into a parquet file, or into the Arrow stream that load_from_disk reads."""
    if files == "parquet":
        with pq.ParquetWriter(folder / f"{split}-00000.parquet", schema, compression="zstd") as writer:
            yield writer.write_batch
        return
    (folder / split).mkdir()
    name = "data-00000-of-00001.arrow"
    (folder / split / "state.json").write_text(json.dumps(STATE | {"_data_files": [{"filename": name}]}))
    (folder / split / "dataset_info.json").write_text("{}")
    with pa.OSFile(str(folder / split / name), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        yield stream.write_batch


def _record(cache: Cache, found: Exported, *, columns: str, top_k: int, vocab_size: int) -> dict[str, object]:
    fingerprint = cache.plan.fingerprint
    return {
        "format": columns,
        "biased": f"{top_k} tokens of {vocab_size} a row; the others' probability, {found.left_out:.3g} on average, is "
        "not in it",
        "top_k": top_k,
        "vocab_size": vocab_size,
        "temperature": 1.0,
        "left_out": found.left_out,
        "num_train": found.num_train,
        "num_test": found.num_test,
        "num_rows": found.num_rows,
        "cache": fingerprint.overall(),
        "teacher": fingerprint.teacher,
        "tokenizer": fingerprint.tokenizer,
        "codec": cache.plan.settings.codec,
        "codec_kl": loss_of(cache.path, cache.plan),
    }


def _compressor(top: TopK) -> str:
    """`logprob_compressor` of DistillKit's run file: every value as it is."""
    return (
        f"d: {top.vocab_size}\nk: {top.k}\nexact_k: {top.k}\nexact_dtype: float32\npolynomial_terms: null\n"
        "residual_bins: []\ndelta_encoding: false\nerror_diffusion: false\n"
    )
