"""Evaluate: a student against the teacher on held-out rows of a cache, with no teacher in memory; or alone.

All figures are means per supervised token, in nats, at temperature 1 over the real vocabulary; sums are taken over all
ranks and divided once.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CheckFailed, ConfigError, StudentError
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.run import in_order, read_run
from kdpipe.manifests.specs import DataSpec, DeviceChoice, DtypeChoice, Io, LossSpec, Unmatched
from kdpipe.stages.align import Aligned, Asked, cross
from kdpipe.stages.feed.dataset import ONE_TEACHER, Dataset, by_teacher, of_caches
from kdpipe.stages.feed.order import cut_steps, deal
from kdpipe.stages.feed.packing import PackedBatch, Packer
from kdpipe.stages.loss import TokenMetrics
from kdpipe.stages.loss.cross_metrics import NAMES as CROSS
from kdpipe.stages.loss.cross_metrics import CrossMetrics
from kdpipe.stages.models.device import pick_device
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.vocabularies import token_bytes
from kdpipe.stages.ranks import Ranks
from kdpipe.stages.student import (
    Across,
    Student,
    TeacherHead,
    check_student,
    checkpoint_dtype,
    exam_text,
    load_sharded,
    load_teacher_heads,
    require_context,
)

AS_EXTRACTED = DataSpec()
ALONE = ("heldout_ce", "perplexity", "num_tokens")
"""Metrics of a student without a teacher."""


def batches(
    dataset: Dataset, packer: Packer, samples: np.ndarray, batch_tokens: int, *, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[PackedBatch, int]]:
    """This rank's share of the samples, the same number of batches on every rank, each with the tokens of all ranks."""
    cuts = cut_steps(samples, dataset.num_tokens[samples], batch_tokens * world_size)
    shares = [deal(cut, dataset.num_tokens[cut], world_size)[rank] for cut in cuts]
    for number, (cut, mine) in enumerate(zip(cuts, shares, strict=True)):
        for share in shares[number + 1 : number + 2]:
            for teacher in dataset.teachers:
                teacher.rows.want(share)
        yield (packer.pack(mine) if len(mine) else packer.empty()), int(dataset.num_tokens[cut].sum())


def measure(
    student: Student,
    teachers: Sequence[TeacherHead],
    feed: Iterator[tuple[PackedBatch, int]],
    device: torch.device,
    progress: Progress,
    stop: Callable[[], None] = lambda: None,
    *,
    num_bytes: int = 0,
) -> dict[str, float]:
    """The metrics over all batches of all ranks; `stop` is called after each batch and may raise. Collective.

    num_bytes: of text that the tokens of all batches of all ranks stand for; 0 where that is not known
    """
    student.eval()
    taught = bool(teachers) and all(teacher.sidecar is None for teacher in teachers)
    several = len(teachers) if taught and len(teachers) > 1 else 0
    across = student.across is not None and taught
    total = torch.zeros(len(CROSS) if across else 6 + 2 * several, dtype=torch.float64, device=device)
    for batch, num_tokens in feed:
        total += student.measure(batch.to(device), teachers).flat()
        progress.advance(num_tokens)
        stop()
    student.train()
    if dist.is_initialized():
        dist.all_reduce(total)
    if across:
        found = cross_summary(CrossMetrics.of_flat(total))
    else:
        found = summary(TokenMetrics.of_flat(total), taught=taught)
    return in_order(found | bits_per_byte(found, num_bytes))


def token_sizes(student: ModelFolder) -> np.ndarray | None:
    """Bytes of text that each id of the student's tokenizer stands for; None where it has no fast backend to ask."""
    if not student.tokenizer.is_fast:
        return None
    return np.array([len(piece or b"") for piece in token_bytes(student.tokenizer)], dtype=np.int64)


def text_bytes(dataset: Dataset, samples: np.ndarray, sizes: np.ndarray | None) -> int:
    """Bytes of text that the supervised tokens of some samples stand for; special tokens stand for none."""
    if sizes is None:
        return 0
    texts = (dataset.tokens(sample) for sample in samples.tolist())
    return sum(int(sizes[text.token_ids[1:][text.supervised[1:]]].sum()) for text in texts)


def bits_per_byte(metrics: Mapping[str, float], num_bytes: int) -> dict[str, float]:
    """The cross-entropy over bytes of text instead of tokens: what students of different tokenizers have in common."""
    if not num_bytes:
        return {}
    return {"heldout_bits_per_byte": metrics["heldout_ce"] * metrics["num_tokens"] / num_bytes / math.log(2.0)}


def cross_summary(sums: CrossMetrics) -> dict[str, float]:
    """Means from sums of a student with another tokenizer: per token of its own, or per span of one token each."""
    count, exact = max(float(sums.num_tokens), 1.0), float(sums.num_exact)
    ce = float(sums.ce) / count
    found = {"heldout_ce": ce, "perplexity": math.exp(min(ce, 700.0)), "num_tokens": int(sums.num_tokens)}
    if not exact:
        return found
    shared = float(sums.teacher_mass) / exact
    return {
        "heldout_kl": float(sums.forward_kl) / exact,
        "heldout_reverse_kl": float(sums.reverse_kl) / exact,
        "top1_agreement": float(sums.top1_agree) / exact,
        **found,
        "exact_tokens": int(exact),
        "shared_mass": shared,
        "unmatched_mass": 1.0 - shared,
    }


def summary(sums: TokenMetrics, *, taught: bool) -> dict[str, float]:
    """Means per supervised token from sums; without a teacher those of the student alone.

    Of several teachers each has its own divergence beside that from their average, numbered from 1.
    """
    count = max(float(sums.num_tokens), 1.0)
    ce = float(sums.ce) / count
    found = {
        "heldout_kl": float(sums.forward_kl) / count,
        "heldout_reverse_kl": float(sums.reverse_kl) / count,
        "top1_agreement": float(sums.top1_agree) / count,
        "heldout_ce": ce,
        "perplexity": math.exp(min(ce, 700.0)),
        "teacher_ce": float(sums.teacher_ce) / count,
        "num_tokens": int(sums.num_tokens),
    }
    for number, (kl, tokens) in enumerate(zip(sums.each_kl.tolist(), sums.each_tokens.tolist(), strict=True), start=1):
        found[f"heldout_kl_teacher_{number}"] = kl / max(tokens, 1.0)
    return found if taught else {name: found[name] for name in ALONE}


def unmeasured(dataset: Dataset) -> Iterator[str]:
    """Why no divergence from a teacher can be measured, a line for each side-car."""
    for teacher in dataset.teachers:
        if (sidecar := teacher.record.sidecar) is not None:
            yield (
                f"{teacher.where} has {sidecar.has}: no divergence from its teacher is measured; for that take a cache "
                "of the teacher's whole rows"
            )


class Measures(Protocol):
    """Figures beside those of a data set's own answers."""

    def measure(
        self, student: Student, heads: Sequence[TeacherHead], ranks: Ranks | None, batch_tokens: int
    ) -> dict[str, float]:
        """On held-out samples. Collective where there are ranks."""


def score(
    student: ModelFolder,
    dataset: Dataset,
    samples: np.ndarray,
    *,
    dtype: str,
    batch_tokens: int,
    device: torch.device,
    progress: Progress,
    ranks: Ranks | None = None,
    stop: Callable[[], None] = lambda: None,
    own: Measures | None = None,
    aligned: Aligned | None = None,
) -> dict[str, float]:
    """Metrics of the student in a folder on some samples: what `kdpipe eval` and the end of `kdpipe train` both say.

    ranks: those that share the work, each with its part of the weights; None where there is one
    stop: called after each batch, may raise
    own: measures more; there need be no samples then
    aligned: how the samples lie beside the teacher's, where the student has another tokenizer
    Raises StudentError, CorruptError; CheckFailed where a figure is not finite. Collective where there are ranks.
    """
    precision = getattr(torch, dtype)
    if ranks is not None and ranks.world_size > 1:
        model = load_sharded(student, ranks, stored=precision, computed=precision, vocab_size=dataset.vocab_size)
    else:
        model = Student(student.load(precision, device), dataset.vocab_size)
    texts = samples if len(samples) else np.arange(len(dataset))
    if aligned is not None:
        model.across = Across(aligned.vocabulary.to(device), method="")
    model.examine(exam_text(dataset, texts, model.model.config), student.path)
    teachers = load_teacher_heads(dataset.teachers, device, as_rows=aligned is not None, ranks=ranks)
    packer = Packer(dataset, padded=model.padded, pin=device.type == "cuda")
    rank, world_size = (ranks.rank, ranks.world_size) if ranks is not None else (0, 1)
    feed = batches(dataset, packer, samples, batch_tokens, rank=rank, world_size=world_size)
    progress.begin("eval", total=int(dataset.num_tokens[samples].sum()), unit="tokens")
    progress.advance(0, f"in {dtype}")
    num_bytes, metrics = text_bytes(dataset, samples, token_sizes(student)), {}
    if len(samples):
        metrics = measure(model, teachers, feed, device, progress, stop, num_bytes=num_bytes)
    if aligned is not None:
        figures = aligned.record.figures
        metrics |= {"aligned_token_share": figures.share_of_rows, "aligned_byte_share": figures.share_of_bytes}
    if own is not None:
        metrics |= own.measure(model, teachers, ranks, batch_tokens)
    progress.end()
    if not all(math.isfinite(value) for value in metrics.values()):
        raise CheckFailed("its logits are not finite; are its weights?", where=student.path)
    return metrics


def run_dtype(student: ModelFolder, dtype: DtypeChoice) -> str:
    """The dtype a student is measured in: for "auto" the one it is stored in."""
    return str(checkpoint_dtype(student)).removeprefix("torch.") if dtype == "auto" else dtype


def evaluate_student(
    student: Path,
    caches: Sequence[Path],
    *,
    heldout_fraction: float | None,
    device: DeviceChoice,
    dtype: DtypeChoice,
    batch_tokens: int,
    progress: Progress,
    io: Io = "mmap",
    trust: str | None = None,
    loss: LossSpec = ONE_TEACHER,
    unmatched: Unmatched = "refuse",
    data: tuple[Path, ...] = (),
    data_spec: DataSpec = AS_EXTRACTED,
    workers: int | None = None,
) -> dict[str, float]:
    """Metrics of the student in a folder on the held-out rows of one or more caches.

    heldout_fraction: None takes the one the student was trained with, else the caches'.
    loss: what several teachers are to the student; where it does not say, what they were when it was trained
    unmatched: as in of_caches
    data: what the caches were made of, for a student with another tokenizer
    data_spec, workers: how they become its samples, and in how many processes
    io: how the cache is read
    trust: digest of the student's own code that may run, or its start; None where it brings none
    device, dtype: "auto" picks a GPU if there is one, and the dtype the student is stored in.
    Raises StudentError, CacheError, IncompleteError, CorruptError; ConfigError where no sample is held out.
    """
    opened, record = [Cache.open(cache, io=io) for cache in caches], read_run(student)
    if len(by_teacher(opened)) > 1 and loss.teacher_mix is None and record is not None:
        loss = record.inputs.spec.loss
    dataset, model = of_caches(opened, loss, unmatched=unmatched), ModelFolder(student, StudentError, trust)
    crossing = cross(model, dataset, opened, Asked(data=data, spec=data_spec, workers=workers), progress)
    if crossing is not None:
        dataset = crossing.dataset
    check_student(model, *dataset.teachers)
    for note in (*dataset.notes, *unmeasured(dataset)):
        progress.note(note)
    if record is not None:
        trained = record.inputs.heldout_fraction
        heldout_fraction = trained if heldout_fraction is None else heldout_fraction
        if heldout_fraction > trained:
            seen = set(record.inputs.caches) & set().union(*(one.fingerprints() for one in opened))
            progress.note(
                f"this student held out {trained} of its samples, {heldout_fraction} are measured: it was trained on "
                f"some of them{'' if seen else ', where its data had the texts of this cache'}"
            )
    _, samples = dataset.split(heldout_fraction)
    if not len(samples) and record is not None and heldout_fraction == record.inputs.heldout_fraction:
        raise ConfigError(
            f"it was trained with {heldout_fraction} of the samples held out, which is none of {dataset.names}; "
            "measure it on a cache of other texts, all of them with --heldout-fraction 1",
            where=student,
        )
    if not len(samples):
        raise ConfigError("no sample of this cache is held out; give a larger --heldout-fraction", where=dataset.names)
    require_context(model, dataset, samples)
    return score(
        model,
        dataset,
        samples,
        dtype=run_dtype(model, dtype),
        batch_tokens=batch_tokens,
        device=pick_device(device),
        progress=progress,
        aligned=None if crossing is None else crossing.aligned,
    )
