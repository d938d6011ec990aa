"""Small valid caches on disk, made of random rows: what tests and benchmarks read, and break.

Everything is a pure function of the arguments, so two calls with the same ones give byte-identical caches.
"""

# Shapes: n tokens of one sample, E teacher width, V rows of the teacher's head.

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from kdpipe.manifests.cache import Cache, teacher_files, write_head
from kdpipe.manifests.durable import canonical, write_once
from kdpipe.manifests.fitted import CODEC_FILE, Choice, fitted_bytes
from kdpipe.manifests.plan import (
    FOLDERS,
    PLAN_FILE,
    SAMPLES_FILE,
    EngineRecord,
    Fingerprint,
    Plan,
    Settings,
    plan_folder,
    read_plan,
)
from kdpipe.manifests.sample import Sample, content_id
from kdpipe.manifests.samples import Samples, SamplesWriter
from kdpipe.manifests.shard import Commit, ShardWriter
from kdpipe.manifests.shard_table import SHARDS_FILE, ShardTable, write_shards
from kdpipe.manifests.specs import Dtype, Io
from kdpipe.manifests.teacher import HeadRecord
from kdpipe.manifests.tensorfile import DTYPES, TAGS
from kdpipe.manifests.verify import Level, examine
from kdpipe.stages.codec.fit import fit
from kdpipe.stages.models.head import Head
from kdpipe.stages.rows import as_tensor


def array_dtype(dtype: Dtype) -> np.dtype:
    return DTYPES[TAGS[dtype]]


def make_samples(num_samples: int, *, seed: int = 0, vocab_size: int = 97) -> list[Sample]:
    """Random samples of 1 to 60 tokens with every kind of mask: a tail, runs, all, none."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(num_samples):
        length = int(rng.integers(1, 61))
        supervised = rng.random(length) < 0.5
        if index % 4 == 0:
            supervised = np.arange(length) >= length // 2
        elif index % 8 in (3, 5):
            supervised = np.full(length, index % 8 == 3)
        samples.append(
            Sample(
                content_id=content_id([seed, index]),
                source="data.jsonl",
                line=index + 1,
                token_ids=rng.integers(0, vocab_size, length).astype(np.int32),
                supervised=supervised,
            )
        )
    return samples


def make_plan(
    folder: Path,
    samples: Iterable[Sample],
    *,
    hidden_size: int = 19,
    dtype: Dtype = "bfloat16",
    rows: Literal["supervised", "all"] = "supervised",
    batch_tokens: int = 0,
    shard_tokens: int = 200,
    heldout_fraction: float = 0.25,
    vocab_size: int = 97,
    has_bias: bool = False,
    teacher: str = "teacher",
    seed: int = 0,
) -> Plan:
    """A cache folder with PLAN.json, samples.arrow and the teacher's head, and nothing else in its folders."""
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
    head = HeadRecord(
        architecture="RandomForCausalLM",
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        head_rows=vocab_size + 7,
        dtype=dtype,
        tied=False,
        has_bias=has_bias,
        softcap=None,
        scale=1.0,
    )
    write_teacher(folder / "teacher", head, seed=seed)
    writer = SamplesWriter(
        folder / SAMPLES_FILE, batch_tokens=batch_tokens, every_row=rows == "all", shard_tokens=shard_tokens
    )
    for sample in samples:
        writer.add(sample)
    shards = writer.close()
    plan = Plan(
        fingerprint=Fingerprint(teacher=teacher, tokenizer="tokenizer", template="", data=writer.data_digest()),
        settings=Settings(
            max_length=4096,
            overlong="truncate",
            supervise="assistant",
            rows=rows,
            codec="raw",
            dtype=dtype,
            seed=0,
            shard_tokens=shard_tokens,
        ),
        engine=EngineRecord(
            name="random",
            version="1",
            determinism="bitwise",
            device="cpu",
            batch_tokens=batch_tokens,
            arguments={},
        ),
        head=head,
        num_samples=total(shards, "num_samples"),
        num_tokens=total(shards, "num_tokens"),
        num_rows=total(shards, "num_rows"),
        num_shards=len(shards),
        heldout_fraction=heldout_fraction,
        counts={"kept": total(shards, "num_samples")},
        samples_digest=hashlib.sha256((folder / SAMPLES_FILE).read_bytes()).hexdigest(),
        vocabulary_digest="vocabulary",
        teacher_files=teacher_files(folder / "teacher"),
        shards_digest=write_shards(folder / SHARDS_FILE, shards),
        shards=shards,
        grown_from=(),
    )
    write_once(folder / PLAN_FILE, plan.to_bytes(), scratch_folder=folder / "tmp")
    return plan


def fit_codec(folder: Path, codec: str, *, rows: np.ndarray | None = None) -> Plan:
    """Give a planned cache, none of whose shards are filled, a codec fitted to rows [N, E], by default its own kind."""
    plan = read_plan(folder)
    arrays, record = Cache.open(folder).head(), plan.head
    if rows is None:
        rows = np.random.default_rng(5).standard_normal((600, record.hidden_size), dtype=np.float32)
        rows = rows.astype(array_dtype(plan.settings.dtype))
    fitted = fit(
        Choice.read(codec),
        rows,
        Head(as_tensor(np.array(arrays.weight)), softcap=record.softcap, scale=record.scale),
        vocab_size=record.vocab_size,
        head_digest=plan.teacher_files["head.safetensors"],
        device=torch.device("cpu"),
    )
    (folder / "teacher" / CODEC_FILE).write_bytes(fitted_bytes(fitted))
    settings = plan.settings.model_copy(update={"codec": codec})
    plan = plan.changed(settings=settings, teacher_files=teacher_files(folder / "teacher"))
    (folder / PLAN_FILE).write_bytes(plan.to_bytes())
    return plan


def total(shards: ShardTable, name: str) -> int:
    return int(shards.columns[name].sum())


def grow_plan(folder: Path, samples: Iterable[Sample]) -> Plan:
    """The plan of a cache that gets more samples, in place; its new shards are not there yet."""
    before = read_plan(folder)
    place = plan_folder(folder, before.generation + 1)
    place.mkdir(parents=True)
    writer = SamplesWriter(
        place / SAMPLES_FILE,
        batch_tokens=before.engine.batch_tokens,
        every_row=before.settings.rows == "all",
        shard_tokens=before.settings.shard_tokens,
        after=Samples(folder, before),
    )
    for sample in samples:
        writer.add(sample)
    brought = writer.close()
    shards = ShardTable.joined([before.shards, brought])
    changes = {
        "fingerprint": before.fingerprint.model_copy(update={"data": writer.data_digest()}),
        **{name: total(shards, name) for name in ("num_samples", "num_tokens", "num_rows")},
        "num_shards": len(shards),
        "samples_digest": hashlib.sha256((place / SAMPLES_FILE).read_bytes()).hexdigest(),
        "shards_digest": write_shards(place / SHARDS_FILE, brought),
        "shards": shards,
        "grown_from": (*before.grown_from, before.as_ancestor()),
    }
    plan = Plan.model_validate(before.model_dump() | changes)
    (place / PLAN_FILE).write_bytes(plan.to_bytes())
    return plan


def random_rows(plan: Plan, index: int, *, seed: int = 0) -> np.ndarray:
    """The rows [R, E] of a shard, drawn from (seed, index)."""
    shape = (plan.shards[index].num_rows, plan.head.hidden_size)
    rng = np.random.default_rng([seed, index])
    return rng.standard_normal(shape, dtype=np.float32).astype(array_dtype(plan.settings.dtype))


def fill_shard(
    folder: Path,
    index: int,
    *,
    seed: int = 0,
    rows: Callable[[Plan, int], np.ndarray] | None = None,
) -> Commit:
    """Write and commit one shard of a planned cache, of random rows unless `rows` gives others."""
    plan = read_plan(folder)
    with ShardWriter(folder, plan, index, Samples(folder, plan).shard(index)) as writer:
        writer.hidden[:] = random_rows(plan, index, seed=seed) if rows is None else rows(plan, index)
        return writer.commit()


def write_teacher(folder: Path, head: HeadRecord, *, seed: int = 0) -> None:
    """head.json and head.safetensors of random numbers, scaled so that logits are of order one; no tokenizer."""
    (folder / "head.json").write_bytes(canonical(head.model_dump()))
    rng = np.random.default_rng([seed, 1 << 20])
    weight = rng.standard_normal((head.head_rows, head.hidden_size), dtype=np.float32) / np.sqrt(head.hidden_size)
    bias = rng.standard_normal(head.head_rows, dtype=np.float32).astype(DTYPES[TAGS[head.dtype]])
    write_head(
        folder,
        weight.astype(DTYPES[TAGS[head.dtype]]),
        bias if head.has_bias else None,
        dtype=head.dtype,
    )


def make_cache(
    folder: Path,
    *,
    num_samples: int = 21,
    hidden_size: int = 19,
    dtype: Dtype = "bfloat16",
    rows: Literal["supervised", "all"] = "supervised",
    seed: int = 0,
    samples: Sequence[Sample] | None = None,
    shard_tokens: int = 200,
    heldout_fraction: float = 0.25,
    vocab_size: int = 97,
    has_bias: bool = False,
    teacher: str = "teacher",
    codec: str = "raw",
) -> Cache:
    """A complete cache in `folder` (which must not hold one), open: random rows, head and (if not given) samples.

    The defaults give several shards, samples with no rows, and sizes that are multiples of nothing.
    """
    make_plan(
        folder,
        make_samples(num_samples, seed=seed, vocab_size=vocab_size) if samples is None else samples,
        hidden_size=hidden_size,
        dtype=dtype,
        rows=rows,
        shard_tokens=shard_tokens,
        heldout_fraction=heldout_fraction,
        vocab_size=vocab_size,
        has_bias=has_bias,
        teacher=teacher,
        seed=seed,
    )
    if codec != "raw":
        fit_codec(folder, codec)
    cache = Cache.open(folder)
    for index in range(len(cache.plan.shards)):
        fill_shard(folder, index, seed=seed)
    return cache


def verified(folder: Path, level: Level = "full", io: Io = "mmap") -> list[int]:
    """Numbers of the shards found good; raises the first finding that is not."""
    good = []
    for finding in examine(Cache.open(folder, io=io), level):
        if finding.error is not None:
            raise finding.error
        if isinstance(finding.part, int):
            good.append(finding.part)
    return good
