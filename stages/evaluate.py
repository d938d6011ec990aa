"""Evaluate: a student against the teacher on held-out rows of a cache, with no teacher in memory.

All figures are means per supervised token, in nats, at temperature 1 over the real vocabulary; sums are taken over all
ranks and divided once.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CheckFailed, ConfigError
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.run import read_run
from kdpipe.manifests.specs import DeviceChoice, DtypeChoice, Io
from kdpipe.stages.feed import PackedBatch, Packer, Rows, cut_steps, deal
from kdpipe.stages.loss import TokenMetrics
from kdpipe.stages.student import (
    Student,
    TeacherHead,
    check_student,
    checkpoint_dtype,
    load_student,
    load_teacher_head,
    pick_device,
    probe_text,
    require_context,
    shard,
)


def batches(
    rows: Rows, packer: Packer, members: np.ndarray, batch_tokens: int, *, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[PackedBatch, int]]:
    """This rank's share of the samples, the same number of batches on every rank, each with the tokens of all ranks."""
    cuts = cut_steps(members, rows.num_tokens[members], batch_tokens * world_size)
    shares = [deal(cut, rows.num_tokens[cut], world_size)[rank] for cut in cuts]
    for number, (cut, mine) in enumerate(zip(cuts, shares, strict=True)):
        for member in shares[number + 1] if number + 1 < len(shares) else ():
            rows.prefetch(int(member))
        yield (packer.pack(mine) if len(mine) else packer.empty()), int(rows.num_tokens[cut].sum())


def measure(
    student: Student,
    teacher: TeacherHead,
    feed: Iterator[tuple[PackedBatch, int]],
    device: torch.device,
    progress: Progress,
    stop: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The metrics over all batches of all ranks; `stop` is called after each batch and may raise. Collective."""
    student.eval()
    total = torch.zeros(len(fields(TokenMetrics)), dtype=torch.float64, device=device)
    for batch, num_tokens in feed:
        sums = student.measure(batch.to(device), teacher)
        total += torch.stack([getattr(sums, field.name) for field in fields(TokenMetrics)])
        progress.advance(num_tokens)
        stop()
    student.train()
    if dist.is_initialized():
        dist.all_reduce(total)
    return summary(dict(zip((field.name for field in fields(TokenMetrics)), total.tolist(), strict=True)))


def summary(sums: dict[str, float]) -> dict[str, float]:
    """Means per supervised token from sums."""
    count = max(sums["num_tokens"], 1.0)
    ce = sums["ce"] / count
    return {
        "heldout_kl": sums["forward_kl"] / count,
        "heldout_reverse_kl": sums["reverse_kl"] / count,
        "top1_agreement": sums["top1_agree"] / count,
        "heldout_ce": ce,
        "perplexity": math.exp(min(ce, 700.0)),
        "teacher_ce": sums["teacher_ce"] / count,
        "num_tokens": int(sums["num_tokens"]),
    }


def score(
    student: Path,
    rows: Rows,
    members: np.ndarray,
    *,
    dtype: str,
    batch_tokens: int,
    device: torch.device,
    progress: Progress,
    trust: str | None = None,
    mesh: DeviceMesh | None = None,
    stop: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Metrics of the student in a folder on some samples: what `kdpipe eval` and the end of `kdpipe train` both say.

    mesh: the ranks that share the work, each with its shard of the weights; None where there is one
    stop: called after each batch, may raise
    Raises StudentError, CorruptError; CheckFailed where a figure is not finite. Collective where there is a mesh.
    """
    precision = getattr(torch, dtype)
    model = Student(load_student(student, precision, device, trust))
    if mesh is not None:
        model = shard(model, mesh, precision, device)
    model.examine(probe_text(rows, members, model.model.config), student)
    teacher = load_teacher_head(rows.caches[0], device)
    packer = Packer(rows, padded=model.padded, pin=device.type == "cuda")
    rank, world_size = (mesh.get_rank(), mesh.size()) if mesh is not None else (0, 1)
    feed = batches(rows, packer, members, batch_tokens, rank=rank, world_size=world_size)
    progress.begin("eval", total=int(rows.num_tokens[members].sum()), unit="tokens")
    progress.advance(0, f"in {dtype}")
    metrics = measure(model, teacher, feed, device, progress, stop)
    progress.end()
    if not all(math.isfinite(value) for value in metrics.values()):
        raise CheckFailed("its logits are not finite; are its weights?", where=student)
    return metrics


def run_dtype(student: Path, dtype: DtypeChoice, trust: str | None = None) -> str:
    """The dtype a student is measured in: for "auto" the one it is stored in."""
    return str(checkpoint_dtype(student, trust)).removeprefix("torch.") if dtype == "auto" else dtype


def evaluate_student(
    student: Path,
    cache: Path,
    *,
    heldout_fraction: float | None,
    device: DeviceChoice,
    dtype: DtypeChoice,
    batch_tokens: int,
    progress: Progress,
    io: Io = "mmap",
    trust: str | None = None,
) -> dict[str, float]:
    """Metrics of the student in a folder on the held-out rows of a cache.

    heldout_fraction: None takes the one the student was trained with, else the cache's.
    io: how the cache is read
    trust: digest of the student's own code that may run, or its start; None where it brings none
    device, dtype: "auto" picks a GPU if there is one, and the dtype the student is stored in.
    Raises StudentError, CacheError, IncompleteError, CorruptError; ConfigError where no sample is held out.
    """
    rows = Rows([Cache.open(cache, io=io)])
    check_student(student, rows.caches[0], trust)
    record = read_run(student)
    if record is not None:
        trained = record.inputs.heldout_fraction
        heldout_fraction = trained if heldout_fraction is None else heldout_fraction
        if heldout_fraction > trained:
            seen = rows.caches[0].fingerprints() & set(record.inputs.caches)
            progress.note(
                f"this student held out {trained} of its samples, {heldout_fraction} are measured: it was trained on "
                f"some of them{'' if seen else ', where its data had the texts of this cache'}"
            )
    _, members = rows.split(heldout_fraction)
    if not len(members) and record is not None and heldout_fraction == record.inputs.heldout_fraction:
        raise ConfigError(
            f"it was trained with {heldout_fraction} of the samples held out, which is none of {cache}; measure it on "
            "a cache of other texts, all of them with --heldout-fraction 1",
            where=student,
        )
    if not len(members):
        raise ConfigError("no sample of this cache is held out; give a larger --heldout-fraction", where=cache)
    require_context(student, rows, members, trust)
    return score(
        student,
        rows,
        members,
        dtype=run_dtype(student, dtype, trust),
        batch_tokens=batch_tokens,
        device=pick_device(device),
        progress=progress,
        trust=trust,
    )
