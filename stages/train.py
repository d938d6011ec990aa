"""Train: a student on the rows of a cache, one process a rank, FSDP2 on gloo (CPU) or nccl (GPU).

    Feed.step(s) -> Student (hidden -> fused loss) -> backward -> clip -> AdamW -> next s

Invariant: the samples of step s, its learning rate, its random numbers and its loss's divisor are pure functions of the
run's inputs, so one rank and many see the same steps, and a run that goes on from a checkpoint is the one that was
never interrupted, bit for bit on the same ranks. Sums over supervised tokens are divided once, by those of all ranks.
"""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from kdpipe.manifests.durable import canonical, disk_error, fsync_tree, make_folder, usual_modes, write_once
from kdpipe.manifests.errors import CheckFailed, ConfigError, SpaceError, StudentError, TemporaryError
from kdpipe.manifests.failpoints import failpoint
from kdpipe.manifests.progress import Progress, Silent
from kdpipe.manifests.provenance import digest_json
from kdpipe.manifests.run import ELASTIC, RUN_FILE, CheckpointRecord, RunInputs, RunRecord
from kdpipe.stages import evaluate
from kdpipe.stages.checkpoint import UNFINISHED, Checkpoints, written
from kdpipe.stages.draws import mixed_seed
from kdpipe.stages.feed import Feed, Packer, Rows
from kdpipe.stages.job import TrainJob, finished, heldout_fraction, move_in, open_rows, run_inputs
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.schedule import learning_rate
from kdpipe.stages.student import (
    LOSS_SUMS,
    Student,
    TeacherHead,
    check_student,
    checkpoint_dtype,
    load_student,
    load_teacher_head,
    pick_device,
    probe_text,
    reduce_gradients,
    shard,
)
from kdpipe.stages.student.export import companions, export

MOMENTS = ("exp_avg", "exp_avg_sq")
MAX_SKIPPED = 20
"""Steps in a row that are left out before a run is given up: it will not recover by itself."""


def train(job: TrainJob, progress: Progress) -> dict[str, object]:
    """Train as one rank of those the environment names (RANK, WORLD_SIZE; alone where it names none); final metrics.

    Running a finished job again returns its metrics, an interrupted one goes on from its checkpoint. Raises what
    check_job raises, CheckFailed for a loss or gradient that is not finite, TemporaryError where SIGTERM or SIGUSR2
    asked it to stop: the state is saved then.
    """
    device = pick_device(job.device)
    rows = open_rows(job, progress)
    if (done := finished(job, rows)) is not None:
        progress.note(f"{job.output} holds this run's student already")
        return _result(done)
    with process_group(device) as (rank, world_size):
        run = Run(job, rows, device, rank=rank, world_size=world_size)
        try:
            make_folder(job.output, job.group)  # a student that is refused leaves none
        except OSError as err:
            raise disk_error(err, job.output) from err
        with asked_to_stop() as asked:
            run.resume(progress)
            metrics = run.steps(progress, asked)
        record = run.save(metrics)
    return _result(record)


def require_agreement(inputs: RunInputs, device: torch.device) -> None:
    """Every rank must have found the same student, caches and settings. Collective.

    Raises TemporaryError, on every rank: a cache may have grown between the first rank's look at it and the last's.
    """
    digest = list(bytes.fromhex(digest_json(inputs.model_dump(mode="json"))))
    largest = torch.tensor([*digest, *(-byte for byte in digest)], dtype=torch.int32, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    if bool((largest[: len(digest)] != -largest[len(digest) :]).any()):
        raise TemporaryError("ranks found other inputs than others: did a cache grow just now? run it again")


@contextmanager
def asked_to_stop() -> Iterator[list[signal.Signals]]:
    """A list that SIGTERM and SIGUSR2, as schedulers send them before they kill, add themselves to.

    A second SIGTERM does what it did before. Only a main thread can have handlers; elsewhere the list stays empty.
    """
    asked: list[signal.Signals] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: object) -> None:
        asked.append(signal.Signals(number))
        signal.signal(number, before[signal.Signals(number)])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR2):
            before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        self.inputs = run_inputs(job, rows)
        require_agreement(self.inputs, device)
        tokenizer = check_student(job.student, rows.caches[0], job.trust)
        code = ModelFolder(job.student, StudentError, job.trust).code
        # As they are now: what is exported is what was trained, whatever becomes of the folder meanwhile.
        self.beside = companions(job.student, tokenizer, rows.caches[0], checkpoint_dtype(job.student, job.trust), code)
        self.teacher: TeacherHead = load_teacher_head(rows.caches[0], device)
        model = load_student(job.student, torch.float32, device, job.trust)
        if spec.grad_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student = Student(model).train()
        mesh = init_device_mesh(device.type, (world_size,))
        self.student = shard(student, mesh, getattr(torch, spec.dtype))
        everything = np.arange(len(rows.num_tokens))
        student.examine(probe_text(rows, everything, model.config), job.student)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in student.parameters() if p.ndim >= 2], "weight_decay": spec.weight_decay},
                {"params": [p for p in student.parameters() if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=spec.lr,
            betas=spec.betas,
            fused=True,
        )
        self.training, self.heldout = rows.split(heldout_fraction(job.spec))
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
        self.checkpoints = Checkpoints(job.output, spec.keep, device)
        self.done = self.num_tokens = self.num_skipped = self.skipped_in_a_row = 0
        self.lr_factor, self.stopping = 1.0, False

    def resume(self, progress: Progress) -> None:
        """Take up the state of the checkpoint to go on from, where there is one. Collective."""
        wanted = self.job.resume
        if wanted == "never":
            self.checkpoints.forget(after=0)
            return
        if wanted == "auto":
            record = self.checkpoints.newest(progress)
            if record is None:
                if self.checkpoints.numbers():
                    progress.note("no checkpoint is whole: starting from the first step")
                return
            path = self.checkpoints.path(record.step)
        else:
            path = Path(wanted)
            record = self.checkpoints.read(path)
        if difference := self.inputs.difference(record.inputs, but=ELASTIC):
            raise ConfigError(
                f"it is a checkpoint of another run: {difference}; choose another --output, or --resume never to "
                "start again",
                where=path,
            )
        self._make_moments(record.step - record.num_skipped)
        self.checkpoints.load(self._state(), path)
        self.done, self.num_tokens, self.num_skipped = record.step, record.num_tokens, record.num_skipped
        self.lr_factor = record.lr_factor
        self.checkpoints.forget(after=self.done)
        progress.note(f"going on from the checkpoint of step {record.step}")
        progress.event("resume", step=record.step, ranks_before=len(record.files))

    def checkpoint(self, progress: Progress) -> None:
        """Save the state as it is. Collective."""
        started = time.perf_counter()
        record = CheckpointRecord(
            inputs=self.inputs,
            step=self.done,
            num_tokens=self.num_tokens,
            num_skipped=self.num_skipped,
            lr_factor=self.lr_factor,
            files=(),
        )
        self._make_moments(self.done - self.num_skipped)
        self.checkpoints.save(self._state(), record)
        progress.event("checkpoint", step=self.done, seconds=time.perf_counter() - started)

    def _state(self) -> dict[str, torch.Tensor]:
        """Weights and moments by name, this rank's shards of them: all that a checkpoint has in tensors."""
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self.student.named_parameters():
            state[f"weight.{name}"] = parameter.detach()
            for moment in MOMENTS:
                state[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        return state

    def _make_moments(self, num_updates: int) -> None:
        """AdamW's state of every parameter that has none yet, as it is after `num_updates` updates of zero."""
        for parameter in self.student.parameters():
            if not self.optimizer.state[parameter]:
                updates = torch.tensor(float(num_updates), dtype=torch.float32, device=self.device)
                moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
                self.optimizer.state[parameter] = {"step": updates, **moments}

    def steps(self, progress: Progress, asked: Sequence[signal.Signals] = ()) -> dict[str, float]:
        """All steps that are left, with evaluations and checkpoints on the way; the metrics of the last evaluation."""
        progress.event(
            "start", num_steps=self.num_steps, steps_per_epoch=self.feed.steps_per_epoch, ranks=self.world_size
        )
        for note in self.beside.notes:
            progress.note(note)
        if self.student.padded:
            progress.note("this model's layers cannot tell packed samples apart: batches are padded")
        left = self.feed.num_tokens_before(self.num_steps) - self.feed.num_tokens_before(self.done)
        progress.begin("train", total=left, unit="tokens")
        while self.done < self.num_steps:
            fields = self.step(self.done, asked)
            self.done += 1
            progress.event("step", step=self.done, **fields)
            progress.advance(
                int(fields["num_tokens"]), f"step {self.done}/{self.num_steps} loss {fields['loss/mean']:.4f}"
            )
            if self.done < self.num_steps:
                self._between_steps(progress, asked)
        progress.end()
        if not len(self.heldout):
            return {}
        progress.begin("eval", total=int(self.rows.num_tokens[self.heldout].sum()), unit="tokens")
        metrics = self.evaluate(progress, None)
        progress.end()
        progress.event("eval", step=self.num_steps, **metrics)
        return metrics

    def _between_steps(self, progress: Progress, asked: Sequence[signal.Signals]) -> None:
        """What is due after this step. Raises TemporaryError where a rank was asked to stop."""
        spec = self.job.spec.train
        if spec.save_every and (self.stopping or self.done % spec.save_every == 0):
            self.checkpoint(progress)
        if self.stopping:
            name = asked[0].name if asked else "a signal to another rank"
            saved = (
                f"its state after step {self.done} is saved" if spec.save_every else "train.save_every=0 saves nothing"
            )
            raise TemporaryError(f"stopped by {name}, {saved}; run the same command again", where=self.job.output)
        if spec.eval_every and self.done % spec.eval_every == 0:
            progress.event("eval", step=self.done, **self.evaluate(Silent(), spec.eval_tokens))

    def step(self, step: int, asked: Sequence[signal.Signals] = ()) -> dict[str, float]:
        """One optimizer step; what to log of it. Raises CheckFailed where loss or gradient is not finite."""
        started = time.perf_counter()
        # Random numbers are functions of the step, so that none have to be saved.
        torch.manual_seed(mixed_seed(self.job.spec.train.seed, step, self.rank))
        count = self.feed.num_supervised(step)
        sums = self._backward(step, count, asked)
        num_tokens, self.stopping = int(sums.pop("num_tokens")), sums.pop("stopping") > 0
        logged = _means(sums, count)
        norm = self._clip()
        lr = self.lr_factor * learning_rate(step, self.num_steps, self.job.spec.train)
        if np.isfinite(logged["loss/mean"]) and np.isfinite(norm):
            self.skipped_in_a_row = 0
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        else:
            self._leave_out(step, logged["loss/mean"], norm)
        self.optimizer.zero_grad()
        self.num_tokens += num_tokens
        return logged | {
            "grad_norm": norm,
            "lr": lr,
            "num_tokens": num_tokens,
            "num_supervised": count,
            "num_skipped": self.num_skipped,
            "seconds": time.perf_counter() - started,
        }

    def _leave_out(self, step: int, loss: float, norm: float) -> None:
        """A step that is not finite, by train.on_nonfinite. Raises CheckFailed where it says stop."""
        policy = self.job.spec.train.on_nonfinite
        self.num_skipped += 1
        self.skipped_in_a_row += 1
        if policy == "stop" or self.skipped_in_a_row > MAX_SKIPPED:
            raise CheckFailed(
                f"loss {loss:.4g}, gradient norm {norm:.4g}: not finite; are the student's weights? "
                "Try a lower train.lr, train.dtype=float32, a longer warm-up, or train.on_nonfinite=skip",
                where=f"step {step + 1}",
            )
        if policy == "halve":
            self.lr_factor *= 0.5

    def _backward(self, step: int, count: int, asked: Sequence[signal.Signals] = ()) -> dict[str, float]:
        """Gradients of a step's mean loss over `count` tokens; LOSS_SUMS, num_tokens and stopping over all ranks."""
        last, seed = self.job.spec.train.grad_accum - 1, mixed_seed(self.job.spec.train.seed, step)
        total = torch.zeros(len(LOSS_SUMS) + 2, dtype=torch.float64, device=self.device)
        for micro, batch in enumerate(self.feed.step(step)):
            reduce_gradients(self.student, micro == last)
            loss, sums = self.student(batch.to(self.device), self.teacher, self.job.spec.loss, seed, 1.0 / count)
            loss.backward()
            # The batch that keeps an idle rank in step has one token and nothing to learn from it.
            tokens = batch.seq_lens.sum() if len(batch.rows) else torch.zeros(())
            total[:-1] += torch.cat([sums.double(), tokens.double().to(self.device)[None]])
        total[-1] = len(asked)
        dist.all_reduce(total)
        return dict(zip((*LOSS_SUMS, "num_tokens", "stopping"), total.tolist(), strict=True))

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
        output = self.job.output
        scratch = output / UNFINISHED
        if self.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        try:
            export(self.student, self.beside, scratch, rank=self.rank)
        except (OSError, SafetensorError) as err:
            raise SpaceError(f"the student could not be written: {err}", where=output) from err
        record = RunRecord(
            inputs=self.inputs,
            num_steps=self.num_steps,
            num_tokens=self.num_tokens,
            num_skipped=self.num_skipped,
            metrics=metrics,
            files={},
            made_with=self.job.made_with,
        )
        if self.rank == 0:
            usual_modes(scratch)
            fsync_tree(scratch)
            files = {
                path.relative_to(scratch).as_posix(): written(path) for path in scratch.rglob("*") if path.is_file()
            }
            record = record.model_copy(update={"files": files})
            write_once(scratch / RUN_FILE, canonical(record.model_dump(mode="json")), scratch_folder=scratch)
            failpoint("export:written")
            move_in(scratch, output)
        dist.barrier()
        self.checkpoints.remove()
        return record


def _means(sums: dict[str, float], count: int) -> dict[str, float]:
    """What a step logs of its LOSS_SUMS over `count` tokens; without a teacher nothing was ranked."""
    ranked = sums["num_ranked"]
    logged = {f"{name}/mean": sums[name] / count for name in ("loss", "kd", "ce", "z")}
    if ranked:
        logged["teacher_entropy/mean"] = sums["teacher_entropy"] / count
        logged |= {"top1_agreement": sums["top1_agree"] / ranked, "top_k_mass": sums["top_k_mass"] / ranked}
    return logged


def _result(record: RunRecord) -> dict[str, object]:
    return {**record.metrics, "num_steps": record.num_steps, "trained_tokens": record.num_tokens}
