"""Importing: top-k rows that another project has stored, as a cache, which says that it is biased.

    files -> Found (checked) -> samples.arrow, PLAN.json -> shards whose rows are K log-probabilities and K ids, float32

Every reader of a cache reads it; its head has one row of zeros and is never multiplied with. Of a row only what its K
tokens and the sum of all others say can be had, so a loss that needs more is refused (stages/train/training.py).
Invariant: the cache appears under its name whole. Cost: the files are read twice, a few records at a time.
"""

# Shapes: n tokens of a sample, R rows of it, K tokens of each.

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from kdpipe.manifests.cache import Cache, teacher_files
from kdpipe.manifests.durable import disk_error, fsync_folder, fsync_tree, make_folder
from kdpipe.manifests.errors import ConfigError, DataError, TeacherError
from kdpipe.manifests.plan import FOLDERS, PLAN_FILE, SAMPLES_FILE, EngineRecord, Fingerprint, Plan, Settings
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.provenance import digest_file, digest_json
from kdpipe.manifests.sample import Sample
from kdpipe.manifests.samples import Samples, SamplesWriter
from kdpipe.manifests.shard import ShardWriter
from kdpipe.manifests.shard_table import SHARDS_FILE, ShardTable, write_shards
from kdpipe.manifests.sidecar import LARGEST_ID, TOP_K
from kdpipe.manifests.specs import SHARD_TOKENS
from kdpipe.manifests.teacher import HeadRecord
from kdpipe.stages.exchange.export import RECORD
from kdpipe.stages.exchange.reading import Found, files_of, read_file
from kdpipe.stages.extract.staging import write_teacher
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.head import Head
from kdpipe.stages.models.vocabulary import real_vocab_size, tokenizer_digest, vocabulary_digest


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What the cache holds; left_out: mean probability of a row that its top_k tokens do not have."""

    num_samples: int
    num_rows: int
    top_k: int
    left_out: float
    without_rows: int
    """Records without a row, which are left out."""


def import_rows(
    cache: Path, sources: Sequence[Path], tokenizer: Path, *, heldout_fraction: float, progress: Progress
) -> Imported:
    """Make a cache of parquet files, or of folders of them. Raises ConfigError, DataError, TeacherError, SpaceError.

    tokenizer: folder of the teacher, or of any model, whose tokenizer made the ids
    """
    if os.path.lexists(cache):
        raise ConfigError("it is there already; name another folder", where=cache)
    folder = ModelFolder(tokenizer, TeacherError)
    scratch = cache.absolute().with_name(f".{cache.name}.import-{os.getpid()}")
    try:
        make_folder(scratch.parent)
        for name in FOLDERS:
            (scratch / name).mkdir(parents=True)
        work = _Work(
            folder=scratch,
            files=files_of(sources),
            tokenizer=folder.tokenizer,
            vocab_size=real_vocab_size(tokenizer, folder.tokenizer, LARGEST_ID),
            heldout_fraction=heldout_fraction,
            progress=progress,
        )
        found = _fill(work)
        fsync_tree(scratch)
        os.rename(scratch, cache.absolute())
        fsync_folder(cache.absolute().parent)
    except OSError as err:
        raise disk_error(err, cache) from err
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """An import, and the folder that becomes the cache."""

    folder: Path
    files: Sequence[Path]
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    heldout_fraction: float
    progress: Progress


def _fill(work: _Work) -> Imported:
    counted = _Counted()
    writer = SamplesWriter(work.folder / SAMPLES_FILE, shard_tokens=SHARD_TOKENS, batch_tokens=0, every_row=False)
    work.progress.begin("cache import", total=None, unit="samples")
    for source, line, found in counted.records(work):
        writer.add(
            Sample(
                content_id=found.content_id,
                source=source,
                line=line,
                token_ids=found.token_ids,
                supervised=found.supervised,
            )
        )
        work.progress.advance(1)
    shards = writer.close()
    if not counted.num_samples:
        raise DataError("no record with a row is in it", where=work.files[0])
    plan = _plan(work, counted, shards, data_digest=writer.data_digest())
    (work.folder / PLAN_FILE).write_bytes(plan.to_bytes())
    again = (found for _, _, found in _Counted().records(work))
    samples = Samples(work.folder, plan)
    for number, shard in enumerate(plan.shards):
        with ShardWriter(work.folder, plan, number, samples.shard(number)) as rows:
            at = 0
            for _ in range(shard.num_samples):
                top = next(again).top
                rows.hidden[at : at + len(top.ids)] = np.concatenate([top.logprobs, top.ids.astype(np.float32)], -1)
                at += len(top.ids)
            rows.commit()
    work.progress.end()
    Cache(work.folder, plan).require_complete()
    return counted.summary()


class _Counted:
    """Reads records, and counts what it has read."""

    def __init__(self) -> None:
        self.num_samples = self.num_rows = self.without_rows = self.longest = 0
        self.top_k: int | None = None
        self._left_out = 0.0

    def records(self, work: _Work) -> Iterator[tuple[str, int, Found]]:
        """Every record that has a row, with its file and its 1-based row there. Raises DataError for another K."""
        for path in work.files:
            for line, (place, found) in enumerate(read_file(path, work.vocab_size), start=1):
                if not len(found.top.ids):
                    self.without_rows += 1
                    continue
                width = found.top.ids.shape[1]
                if self.top_k not in (None, width):
                    raise DataError(f"{width} tokens of a row, those before have {self.top_k}", where=place)
                self.top_k = width
                self.num_samples += 1
                self.longest = max(self.longest, len(found.token_ids))
                self.num_rows += len(found.top.ids)
                kept = np.exp(found.top.logprobs.astype(np.float64)).sum(-1)
                self._left_out += float((1.0 - kept).clip(0.0).sum())
                yield str(path), line, found

    def summary(self) -> Imported:
        assert self.top_k is not None, "there is a record"
        return Imported(
            num_samples=self.num_samples,
            num_rows=self.num_rows,
            top_k=self.top_k,
            left_out=self._left_out / self.num_rows,
            without_rows=self.without_rows,
        )


def _plan(work: _Work, counted: _Counted, shards: ShardTable, *, data_digest: str) -> Plan:
    found = counted.summary()
    head = HeadRecord(
        architecture=TOP_K,
        hidden_size=2 * found.top_k,
        vocab_size=work.vocab_size,
        head_rows=1,
        dtype="float32",
        tied=False,
        has_bias=False,
        softcap=None,
        scale=1.0,
    )
    write_teacher(work.tokenizer, Head(torch.zeros(1, head.hidden_size)), head, work.folder / "teacher")
    return Plan(
        fingerprint=Fingerprint(
            teacher=digest_json([TOP_K, found.top_k, _teacher(work.files)]),
            tokenizer=tokenizer_digest(work.tokenizer),
            template=digest_json(work.tokenizer.chat_template),
            data=data_digest,
        ),
        settings=Settings(
            max_length=counted.longest,
            overlong="truncate",
            supervise="assistant",
            rows="supervised",
            codec="raw",
            dtype="float32",
            seed=0,
            shard_tokens=SHARD_TOKENS,
        ),
        engine=EngineRecord(
            name="import", version="1", determinism="bitwise", device="cpu", batch_tokens=0, arguments={}
        ),
        head=head,
        num_samples=int(shards.num_samples.sum()),
        num_tokens=int(shards.num_tokens.sum()),
        num_rows=int(shards.num_rows.sum()),
        num_shards=len(shards),
        heldout_fraction=work.heldout_fraction,
        counts={"kept": found.num_samples, "without_rows": found.without_rows},
        samples_digest=hashlib.sha256((work.folder / SAMPLES_FILE).read_bytes()).hexdigest(),
        vocabulary_digest=vocabulary_digest(work.tokenizer),
        teacher_files=teacher_files(work.folder / "teacher"),
        shards_digest=write_shards(work.folder / SHARDS_FILE, shards),
        shards=shards,
        grown_from=(),
    )


def _teacher(files: Sequence[Path]) -> str:
    """What the rows are of: the teacher that an export names, else the files themselves."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((files[0].parent / RECORD).read_text())["teacher"])
    return digest_json([digest_file(path) for path in files])
