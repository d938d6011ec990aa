"""Deriving: a side-car of a cache, for who has less disk: a few numbers of each row's distribution.

    samples -> samples.arrow, PLAN.json; each shard's rows -> kept.py -> the same shard of OUT

The samples are the cache's own, in its order, with the rows of supervised tokens alone. PLAN.json says of which cache
it was made (engine.arguments), and its head's record what its rows have (manifests/sidecar.py).
Invariant: OUT appears with its plan, and each shard when it is whole; the same command goes on after a kill, and what
comes out is the same. A shard of the cache is checked against its digest before its rows are used.
Cost: of each row a product with the head and a softmax in fp32; no teacher.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdpipe.manifests.cache import HEAD_FILE, Cache, restore_teacher_files, teacher_files, write_head
from kdpipe.manifests.durable import (
    as_disk_error,
    canonical,
    fsync_tree,
    make_folder,
    scratch_folder,
    scratch_of,
    sweep,
)
from kdpipe.manifests.errors import CacheError
from kdpipe.manifests.failpoints import failpoint
from kdpipe.manifests.fitted import CODEC_FILE, loss_of
from kdpipe.manifests.parts import shards_to_make
from kdpipe.manifests.places import nearest_folder, require_outside
from kdpipe.manifests.plan import FOLDERS, PLAN_FILE, SAMPLES_FILE, EngineRecord, Plan, read_plan
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.provenance import digest_json
from kdpipe.manifests.sample import Sample
from kdpipe.manifests.samples import Samples, SamplesWriter
from kdpipe.manifests.shard import ShardWriter
from kdpipe.manifests.shard_table import SHARDS_FILE, write_shards
from kdpipe.manifests.sidecar import ARCHITECTURES, Kind, row_width
from kdpipe.manifests.teacher import HeadRecord, require_derivable
from kdpipe.manifests.tensorfile import DTYPES, TAGS
from kdpipe.manifests.verify import examine
from kdpipe.stages.exchange.kept import Asked, CheckedRows, Maker, chunks
from kdpipe.stages.extract.planning import require_room

NAMES = {"tokens": "number of tokens (--samples, --top-k)", "kind": "--kind", "seed": "--seed", "rows": "source"}
"""What a person calls an argument."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Derived:
    """A side-car that is there; row_bytes, whole_row_bytes: of its rows, and of the teacher's as they came."""

    kind: Kind
    num_rows: int
    row_bytes: int
    whole_row_bytes: int
    num_bytes: int
    serves: str
    bias: str


def derive(cache: Cache, out: Path, asked: Asked, device: torch.device, progress: Progress) -> Derived:
    """Make a side-car of a complete cache, or what is missing of one.

    Raises ConfigError for a cache that is one itself, CacheError where OUT is something else, CorruptError where the
    cache is damaged, SpaceError.
    """
    cache.require_complete()
    require_derivable(cache.plan.head, asked.sidecar, where=cache.path)
    for finding in examine(cache, "full"):
        if isinstance(finding.part, int):
            break  # a shard is checked when its turn comes
        if finding.error is not None:
            raise finding.error
    if not (out / PLAN_FILE).exists():
        if os.path.lexists(out):
            raise CacheError("it exists and is not a cache; choose another name or remove it", where=out)
        require_outside(out, option="OUT")
    with as_disk_error(out):
        _stage(cache, out, asked, device, progress)
        made = Cache.open(out)
        _fill(cache, made, Maker(cache, asked, device), progress)
    made.require_complete()
    return _summary(cache, made)


def _stage(cache: Cache, out: Path, asked: Asked, device: torch.device, progress: Progress) -> None:
    """Put the plan, the samples and what is kept of the teacher in place, unless the same plan is there."""
    parent = out.absolute().parent
    near, staged = nearest_folder(parent), f".{out.name}.derive"
    sweep(scratch_of(near, staged))
    with scratch_folder(near, staged) as scratch:
        for name in FOLDERS:
            (scratch / name).mkdir(parents=True)
        plan = _plan(cache, scratch, asked, device)
        if (out / PLAN_FILE).exists():
            _require_same(plan, out)
        require_room(plan, scratch, out, or_else="fewer --samples or --top-k")
        if not (out / PLAN_FILE).exists():
            fsync_tree(scratch)
            make_folder(parent)
            with suppress(OSError):  # another process may have been quicker
                os.rename(scratch, out.absolute())
            failpoint("derive:planned")
        _require_same(plan, out)
        restore_teacher_files(plan, scratch / "teacher", out)
        progress.event("plan", digest=plan.digest, num_shards=len(plan.shards))


def _require_same(plan: Plan, out: Path) -> None:
    there = read_plan(out)
    if there == plan:
        return
    if there.head.sidecar is None:
        raise CacheError("it is a whole cache, and none that this command makes; choose another OUT", where=out)
    ours, theirs = ({**one.engine.arguments, "device": one.engine.device} for one in (plan, there))
    name = next((name for name in ours if ours[name] != theirs.get(name)), "source")
    raise CacheError(
        f"it was made with another {NAMES.get(name, name)}: {theirs.get(name)}, not {ours.get(name)}; "
        "choose another OUT",
        where=out,
    )


def _plan(cache: Cache, folder: Path, asked: Asked, device: torch.device) -> Plan:
    """The plan of the side-car; its samples and its teacher's files are in the folder then."""
    source = cache.plan
    writer = SamplesWriter(
        folder / SAMPLES_FILE, shard_tokens=source.settings.shard_tokens, batch_tokens=0, every_row=False
    )
    for sample in _samples(cache):
        writer.add(sample)
    shards = writer.close()
    sidecar = asked.sidecar
    head = HeadRecord(
        architecture=next(name for name, kind in ARCHITECTURES.items() if kind == sidecar.kind),
        hidden_size=row_width(sidecar, source.head.vocab_size),
        vocab_size=source.head.vocab_size,
        head_rows=1,
        dtype="uint8" if sidecar.kind == "sampled" else "float32",
        tied=False,
        has_bias=False,
        softcap=None,
        scale=1.0,
    )
    _write_teacher(cache, head, folder / "teacher")
    plan = Plan(
        fingerprint=source.fingerprint.model_copy(
            update={
                "teacher": digest_json([head.architecture, asked.arguments, source.fingerprint.teacher]),
                "data": writer.data_digest(),
            }
        ),
        settings=source.settings.model_copy(update={"rows": "supervised", "codec": "raw", "dtype": head.dtype}),
        engine=EngineRecord(
            name="derive",
            version="1",
            determinism="bitwise" if device.type == "cpu" else "tolerance",
            device=device.type,
            batch_tokens=0,
            arguments={
                **asked.arguments,
                "cache": source.fingerprint.overall(),
                "codec": source.settings.codec,
                **({} if (lost := loss_of(cache.path, source)) is None else {"codec_kl": repr(lost)}),
                "rows": cache.digest(),
            },
        ),
        head=head,
        num_samples=int(shards.num_samples.sum()),
        num_tokens=int(shards.num_tokens.sum()),
        num_rows=int(shards.num_rows.sum()),
        num_shards=len(shards),
        heldout_fraction=source.heldout_fraction,
        counts=source.counts,
        samples_digest=hashlib.sha256((folder / SAMPLES_FILE).read_bytes()).hexdigest(),
        vocabulary_digest=source.vocabulary_digest,
        teacher_files=teacher_files(folder / "teacher"),
        shards_digest=write_shards(folder / SHARDS_FILE, shards),
        shards=shards,
        grown_from=(),
    )
    (folder / PLAN_FILE).write_bytes(plan.to_bytes())
    return plan


def _samples(cache: Cache) -> Iterator[Sample]:
    """Every sample of a cache, in order."""
    index = 0
    for number in range(len(cache.plan.shards)):
        batch = cache.samples.shard(number)
        names = ("content_id", "source", "line")
        for content_id, source, line in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
            text = cache.samples.tokens(index)
            yield Sample(
                content_id=content_id,
                source=source,
                line=line,
                token_ids=text.token_ids,
                supervised=text.supervised,
            )
            index += 1


def _write_teacher(cache: Cache, head: HeadRecord, folder: Path) -> None:
    """The tokenizer's files as they are, and a head of zeros that none is multiplied with."""
    for name in cache.plan.teacher_files.keys() - {HEAD_FILE, CODEC_FILE, "head.json"}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(cache.teacher_folder / name, folder / name)
    (folder / "head.json").write_bytes(canonical(head.model_dump()))
    weight = np.zeros((1, head.hidden_size), DTYPES[TAGS[head.dtype]])
    write_head(folder, weight, None, dtype=head.dtype)


def _fill(cache: Cache, made: Cache, maker: Maker, progress: Progress) -> None:
    """Make every shard that is missing."""
    folder, plan = made.path, made.plan
    for name in FOLDERS:
        (folder / name).mkdir(exist_ok=True)
    sweep((folder / "tmp").glob("*"))
    todo = shards_to_make(plan, folder, None, progress)
    progress.begin("cache derive", total=sum(plan.shards[number].num_rows for number in todo), unit="rows")
    samples, source = Samples(folder, plan), CheckedRows(cache)
    for number in todo:
        first = int(plan.shards.starts[number])
        with ShardWriter(folder, plan, number, samples.shard(number)) as writer:
            at = 0
            for chunk in chunks(source, range(first, first + plan.shards[number].num_samples)):
                writer.hidden[at : at + len(chunk.rows)] = maker.of(chunk)
                at += len(chunk.rows)
                progress.advance(len(chunk.rows))
            writer.commit()
        failpoint("derive:shard")
    progress.end()


def _summary(cache: Cache, made: Cache) -> Derived:
    sidecar = made.plan.head.sidecar
    assert sidecar is not None

    def row_bytes(one: Cache) -> int:
        return one.plan.head.hidden_size * DTYPES[TAGS[one.plan.settings.dtype]].itemsize

    return Derived(
        kind=sidecar.kind,
        num_rows=made.plan.num_rows,
        row_bytes=row_bytes(made),
        whole_row_bytes=row_bytes(cache),
        num_bytes=made.num_bytes(),
        serves=sidecar.serves,
        bias=sidecar.bias,
    )
