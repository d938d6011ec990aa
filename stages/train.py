"""Train: a student on the rows of a cache, one process a rank, FSDP2 on gloo (CPU) or nccl (GPU).

    Feed.step(s) -> Student (hidden -> fused loss) -> backward -> clip -> AdamW -> next s

Invariant: the samples of step s, its learning rate and its loss's divisor are pure functions of the run's inputs, so
one rank and many see the same steps. Sums over supervised tokens are divided once, by those of all ranks.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.durable import canonical, disk_error, fsync_folder
from kdpipe.manifests.errors import CheckFailed, ConfigError, SpaceError
from kdpipe.manifests.progress import Progress, Silent
from kdpipe.manifests.provenance import digest_model, num_bytes
from kdpipe.manifests.run import RUN_FILE, RunInputs, RunRecord, read_run
from kdpipe.manifests.specs import RunSpec
from kdpipe.stages import evaluate
from kdpipe.stages.draws import mixed_seed
from kdpipe.stages.feed import Feed, Packer, Rows
from kdpipe.stages.loss import find_divergence
from kdpipe.stages.schedule import learning_rate
from kdpipe.stages.student import (
    LOSS_SUMS,
    Student,
    TeacherHead,
    check_student,
    checkpoint_dtype,
    export,
    load_student,
    load_teacher_head,
    pick_device,
    reduce_gradients,
    shard,
)

UNFINISHED = {"events.jsonl", "tmp"}
"""What an interrupted run leaves in its output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob:
    """One student to train.

    student: folder that from_pretrained loads
    caches: caches of one teacher
    output: folder the trained student is written to
    device: "auto", "cpu" or "cuda"
    """

    student: Path
    caches: tuple[Path, ...]
    output: Path
    spec: RunSpec
    device: str = "auto"


def check_job(job: TrainJob, nproc: int) -> None:
    """Raises every input error that can be found before a rank is started or a file written."""
    rows = Rows([Cache.open(path) for path in job.caches])
    for cache in rows.caches:
        check_student(job.student, cache)
        _check_settings(job.spec, cache)
    find_divergence(job.spec.loss.divergence).resolve(job.spec.loss.options)
    training, _ = rows.split(_heldout_fraction(job.spec))
    if not len(training):
        raise ConfigError(
            "every sample is held out, none is left to train on; lower data.heldout_fraction", where="data"
        )
    Feed(rows, training, seed=job.spec.train.seed, batch_tokens=job.spec.train.batch_tokens, world_size=nproc)
    device = pick_device(job.device)
    if device.type == "cuda" and nproc > torch.cuda.device_count():
        raise ConfigError(f"{nproc} ranks for {torch.cuda.device_count()} GPUs", where="--nproc")
    if finished(job, rows) is None:
        _check_output(job)


def _check_output(job: TrainJob) -> None:
    """The output must be free, or hold no more than a run that was interrupted leaves; and the student must fit."""
    output = job.output
    if output.exists() and not output.is_dir():
        raise ConfigError("this is a file, not a folder", where=output)
    foreign = sorted(path.name for path in output.glob("*") if path.name not in UNFINISHED)
    if foreign:
        raise ConfigError(f"it holds other things ({foreign[0]}); choose another --output", where=output)
    there = output.absolute()
    while not there.exists():
        there = there.parent
    needed, free = num_bytes(job.student), shutil.disk_usage(there).free
    if needed > free:
        raise SpaceError(f"the trained student takes {needed:,} bytes, {free:,} are free; free some room", where=output)


def finished(job: TrainJob, rows: Rows) -> RunRecord | None:
    """The record of this very job, if it is done already. Raises ConfigError where `output` is another run's."""
    record = read_run(job.output)
    if record is None:
        return None
    inputs = _inputs(job, rows)
    ours, theirs = (_leaves(one.model_dump(mode="json")) for one in (inputs, record.inputs))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise ConfigError(
                f"it holds the student of another run: its {key} is {theirs.get(key)}, this run's is {ours.get(key)}; "
                "choose another --output or remove the folder",
                where=job.output,
            )
    return record


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """{"spec.train.lr": 0.0001, ...}"""
    found: dict[str, object] = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def train(job: TrainJob, progress: Progress) -> dict[str, object]:
    """Train as one rank of those the environment names (RANK, WORLD_SIZE; alone where it names none); final metrics.

    Running a finished job again returns its metrics. Raises what check_job raises, and CheckFailed for a loss or
    gradient that is not finite.
    """
    device = pick_device(job.device)
    rows = Rows([Cache.open(path) for path in job.caches])
    if (done := finished(job, rows)) is not None:
        progress.note(f"{job.output} holds this run's student already")
        return _result(done)
    try:
        job.output.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise disk_error(err, job.output) from err
    with process_group(device) as (rank, world_size):
        run = Run(job, rows, device, rank=rank, world_size=world_size)
        metrics = run.steps(progress)
        record = run.save(metrics)
    return _result(record)


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int]]:
    """(rank, world size), with torch.distributed up for as long as the block lasts."""
    backend = {"cpu": "gloo", "cuda": "nccl"}[device.type]
    if "RANK" in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


class Run:
    """One rank of a training run: model, optimizer, feed."""

    def __init__(self, job: TrainJob, rows: Rows, device: torch.device, *, rank: int, world_size: int) -> None:
        spec = job.spec.train
        torch.manual_seed(spec.seed)
        self.job, self.rows, self.device, self.rank, self.world_size = job, rows, device, rank, world_size
        self.tokenizer: PreTrainedTokenizerBase = check_student(job.student, rows.caches[0])
        self.teacher: TeacherHead = load_teacher_head(rows.caches[0], device)
        model = load_student(job.student, torch.float32, device)
        if spec.grad_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student = Student(model).train()
        mesh = init_device_mesh(device.type, (world_size,))
        self.student = shard(student, mesh, getattr(torch, spec.dtype))
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in student.parameters() if p.ndim >= 2], "weight_decay": spec.weight_decay},
                {"params": [p for p in student.parameters() if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=spec.lr,
            betas=spec.betas,
            fused=True,
        )
        self.training, self.heldout = rows.split(_heldout_fraction(job.spec))
        self.feed = Feed(
            rows,
            self.training,
            seed=spec.seed,
            batch_tokens=spec.batch_tokens,
            grad_accum=spec.grad_accum,
            rank=rank,
            world_size=world_size,
            padded=student.padded,
            pin=device.type == "cuda",
        )
        wanted = max(round(self.feed.steps_per_epoch * spec.epochs), 1)
        self.num_steps = min(wanted, spec.max_steps or wanted)
        self.num_tokens = 0

    def steps(self, progress: Progress) -> dict[str, float]:
        """All steps, with evaluations on the way; the metrics of the last evaluation."""
        spec = self.job.spec.train
        epoch_tokens = int(self.rows.num_tokens[self.training].sum())
        progress.event(
            "start", num_steps=self.num_steps, steps_per_epoch=self.feed.steps_per_epoch, ranks=self.world_size
        )
        if self.student.padded:
            progress.note("this model's layers cannot tell packed samples apart: batches are padded")
        total = epoch_tokens * self.num_steps // self.feed.steps_per_epoch
        progress.begin("train", total=total, unit="tokens")
        for step in range(self.num_steps):
            fields = self.step(step)
            progress.event("step", step=step + 1, **fields)
            progress.advance(
                int(fields["num_tokens"]), f"step {step + 1}/{self.num_steps} loss {fields['loss/mean']:.4f}"
            )
            if spec.eval_every and (step + 1) % spec.eval_every == 0 and step + 1 < self.num_steps:
                progress.event("eval", step=step + 1, **self.evaluate(Silent(), spec.eval_tokens))
        progress.end()
        if not len(self.heldout):
            return {}
        progress.begin("eval", total=int(self.rows.num_tokens[self.heldout].sum()), unit="tokens")
        metrics = self.evaluate(progress, None)
        progress.end()
        progress.event("eval", step=self.num_steps, **metrics)
        return metrics

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step; what to log of it. Raises CheckFailed where loss or gradient is not finite."""
        started = time.perf_counter()
        count = self.feed.num_supervised(step)
        sums = self._backward(step, count)
        num_tokens = int(sums.pop("num_tokens"))
        logged = _means(sums, count)
        loss = logged["loss/mean"]
        norm = self._clip()
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise CheckFailed(
                f"loss {loss:.4g}, gradient norm {norm:.4g}: not finite; are the student's weights? "
                "Try a lower train.lr, train.dtype=float32 or a longer warm-up",
                where=f"step {step + 1}",
            )
        lr = learning_rate(step, self.num_steps, self.job.spec.train)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_tokens += num_tokens
        return logged | {
            "grad_norm": norm,
            "lr": lr,
            "num_tokens": num_tokens,
            "num_supervised": count,
            "seconds": time.perf_counter() - started,
        }

    def _backward(self, step: int, count: int) -> dict[str, float]:
        """Gradients of a step's mean loss over `count` tokens; LOSS_SUMS and num_tokens over all ranks."""
        last, seed = self.job.spec.train.grad_accum - 1, mixed_seed(self.job.spec.train.seed, step)
        total = torch.zeros(len(LOSS_SUMS) + 1, dtype=torch.float64, device=self.device)
        for micro, batch in enumerate(self.feed.step(step)):
            reduce_gradients(self.student, micro == last)
            loss, sums = self.student(batch.to(self.device), self.teacher, self.job.spec.loss, seed)
            (loss / count).backward()
            # The batch that keeps an idle rank in step has one token and nothing to learn from it.
            tokens = batch.seq_lens.sum() if len(batch.rows) else torch.zeros(())
            total += torch.cat([sums.double(), tokens.double().to(self.device)[None]])
        dist.all_reduce(total)
        return dict(zip((*LOSS_SUMS, "num_tokens"), total.tolist(), strict=True))

    def _clip(self) -> float:
        """Clip the gradients to max_grad_norm (0: leave them); their global norm before."""
        limit = self.job.spec.train.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def evaluate(self, progress: Progress, max_tokens: int | None) -> dict[str, float]:
        """Held-out metrics, over the first samples up to max_tokens where one is given. Collective."""
        members = self.heldout
        if max_tokens is not None:
            within = np.cumsum(self.rows.num_tokens[members]) <= max_tokens
            members = members[: max(int(within.sum()), 1)]
        packer = Packer(self.rows, padded=self.student.padded, pin=self.device.type == "cuda")
        share = max(self.job.spec.train.batch_tokens // (self.world_size * self.job.spec.train.grad_accum), 1)
        feed = evaluate.batches(self.rows, packer, members, share, rank=self.rank, world_size=self.world_size)
        return evaluate.measure(self.student, self.teacher, feed, self.device, progress)

    def save(self, metrics: dict[str, float]) -> RunRecord:
        """Export the student, then write the record that says it is finished. Collective; rank 0 writes."""
        output, dtype = self.job.output, checkpoint_dtype(self.job.student)
        scratch = output / "tmp"
        if self.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        try:
            export(self.student, self.tokenizer, scratch, dtype, rank=self.rank)
        except (OSError, SafetensorError) as err:
            raise SpaceError(f"the student could not be written: {err}", where=output) from err
        record = RunRecord(
            inputs=_inputs(self.job, self.rows), num_steps=self.num_steps, num_tokens=self.num_tokens, metrics=metrics
        )
        if self.rank == 0:
            (scratch / RUN_FILE).write_bytes(canonical(record.model_dump(mode="json")))
            _move_in(scratch, output)
        dist.barrier()
        return record


def _means(sums: dict[str, float], count: int) -> dict[str, float]:
    """What a step logs of its LOSS_SUMS over `count` tokens; without a teacher nothing was ranked."""
    ranked = sums["num_ranked"]
    logged = {f"{name}/mean": sums[name] / count for name in ("loss", "kd", "ce", "teacher_entropy")}
    if ranked:
        logged |= {"top1_agreement": sums["top1_agree"] / ranked, "top_k_mass": sums["top_k_mass"] / ranked}
    return logged


def _move_in(scratch: Path, output: Path) -> None:
    """Move finished files to their place, flushed, the record last."""
    for path in sorted(scratch.iterdir(), key=lambda path: path.name == RUN_FILE):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        path.replace(output / path.name)
    scratch.rmdir()
    fsync_folder(output)


def _heldout_fraction(spec: RunSpec) -> float | None:
    """The run file's own fraction, None (the cache's) where it has none."""
    return spec.data.heldout_fraction if "heldout_fraction" in spec.data.model_fields_set else None


def _check_settings(spec: RunSpec, cache: Cache) -> None:
    """A run file that says how data was to be prepared must say what the cache was made with."""
    for field in spec.data.model_fields_set - {"heldout_fraction"}:
        asked, made = getattr(spec.data, field), getattr(cache.plan.settings, field)
        if asked != made:
            raise ConfigError(
                f"data.{field} is {asked!r}, the cache was extracted with {made!r}; extract again or drop the key",
                where=cache.path,
            )


def _inputs(job: TrainJob, rows: Rows) -> RunInputs:
    fraction = _heldout_fraction(job.spec)
    return RunInputs(
        student=digest_model(job.student),
        caches=tuple(cache.plan.fingerprint.overall() for cache in rows.caches),
        heldout_fraction=rows.caches[0].plan.heldout_fraction if fraction is None else fraction,
        spec=job.spec,
    )


def _result(record: RunRecord) -> dict[str, object]:
    return {**record.metrics, "num_steps": record.num_steps, "trained_tokens": record.num_tokens}
