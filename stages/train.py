"""Train: a student on the rows of a cache, one process a rank, FSDP2 on gloo (CPU) or nccl (GPU).

    Feed.step(s) -> Student (hidden -> fused loss) -> backward -> clip -> AdamW -> next s
    last step -> student exported, kdpipe.json -> measured on all held-out samples -> its metrics in kdpipe.json

Invariant: the samples of step s, its learning rate, its random numbers and its loss's divisor are pure functions of the
run's inputs, so one rank and many see the same steps, and a run that goes on from a checkpoint is the one that was
never interrupted, bit for bit on the same ranks. Sums over supervised tokens are divided once, by those of all ranks.
"""

import gc
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from kdpipe.manifests.durable import canonical, disk_error, fsync_tree, make_folder, usual_modes, write_once
from kdpipe.manifests.errors import CheckFailed, ConfigError, KdpipeError, StudentError, TemporaryError, stopped
from kdpipe.manifests.failpoints import failpoint
from kdpipe.manifests.progress import Progress, Silent
from kdpipe.manifests.provenance import digest_json
from kdpipe.manifests.run import ELASTIC, RUN_FILE, CheckpointRecord, Metrics, RunInputs, RunRecord
from kdpipe.manifests.running import alone_in
from kdpipe.stages import evaluate
from kdpipe.stages.checkpoint import UNFINISHED, Checkpoints, written
from kdpipe.stages.draws import mixed_seed
from kdpipe.stages.feed import Feed, Packer, Rows
from kdpipe.stages.job import TrainJob, finished, heldout_fraction, move_in, open_rows, run_inputs
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.schedule import learning_rate
from kdpipe.stages.signals import asked_to_stop
from kdpipe.stages.student import (
    LOSS_SUMS,
    Student,
    TeacherHead,
    check_student,
    checkpoint_dtype,
    load_teacher_head,
    load_to_shard,
    pick_device,
    probe_text,
    reduce_gradients,
    shard,
)
from kdpipe.stages.student.export import companions, export

MOMENTS = ("exp_avg", "exp_avg_sq")
MAX_SKIPPED = 20
"""Steps in a row that are left out before a run is given up: it will not recover by itself."""
FEW_STEPS = 8
"""An epoch of fewer is worth a word: the default batch takes small data in one step."""

T = TypeVar("T")


def train(job: TrainJob, progress: Progress) -> dict[str, object]:
    """Train as one rank of those the environment names (RANK, WORLD_SIZE; alone where it names none); final metrics.

    Running a finished job again returns its metrics, an interrupted one goes on from its checkpoint, one whose student
    was exported is only measured. Raises what check_job raises, CheckFailed for a loss or gradient that is not finite,
    BusyError where another run is at work in the output, TemporaryError or StoppedError where a signal asked it to
    stop: the state is saved then.
    """
    device = pick_device(job.device)
    rows = open_rows(job, progress)
    with process_group(device) as (rank, world_size):
        record = from_rank_0(lambda: finished(job, rows))
        if record is None or record.metrics is None:
            record = _complete(job, rows, record, device, progress, rank=rank, world_size=world_size)
        else:
            progress.note(f"{job.output} holds this run's student already")
    progress.note(f"the student is in {job.output}; {_next_command(job, record)}")
    return _result(record)


def _next_command(job: TrainJob, record: RunRecord) -> str:
    """How the student is measured; what was held out of its training is the fair choice."""
    measure = ["kdpipe", "eval", "--student", str(job.output), "--cache"]
    if record.metrics:
        return f"measure it on any cache of its teacher: {shlex.join([*measure, str(job.caches[0])])}"
    return (
        "nothing was held out of its training, so measure it on a cache of other texts: "
        f"{shlex.join([*measure, 'OTHER', '--heldout-fraction', '1'])}"
    )


def _complete(
    job: TrainJob,
    rows: Rows,
    record: RunRecord | None,
    device: torch.device,
    progress: Progress,
    *,
    rank: int,
    world_size: int,
) -> RunRecord:
    """Whatever is left to do of a job of which `record` is done: steps and export, then the last evaluation."""
    run = Run(job, rows, device, rank=rank, world_size=world_size) if record is None else None
    try:
        make_folder(job.output, job.group)  # a student that is refused leaves none
    except OSError as err:
        raise disk_error(err, job.output) from err
    with ExitStack() as stack:
        keep = stack.enter_context(alone_in(job.output)) if rank == 0 else (lambda: None)
        if (record := from_rank_0(lambda: finished(job, rows))) is not None:
            run = None  # the run that was here until now has ended well
        progress.event("accepted")
        asked = stack.enter_context(asked_to_stop(say=rank == 0))
        if run is not None:
            run.resume(progress)
            run.steps(progress, asked, keep)
            record = run.save(progress)
            del run  # the exported student takes the place of weights, gradients and moments
            gc.collect()
        assert record is not None
        if record.metrics is None:
            record = _measured(job, rows, record, device, progress, asked, rank=rank, world_size=world_size)
        return record


def _measured(
    job: TrainJob,
    rows: Rows,
    record: RunRecord,
    device: torch.device,
    progress: Progress,
    asked: Sequence[signal.Signals],
    *,
    rank: int,
    world_size: int,
) -> RunRecord:
    """The exported student measured on all held-out samples as `kdpipe eval` does it; the record with its metrics."""
    _, heldout = rows.split(heldout_fraction(job.spec))
    metrics: Metrics = {}

    def stop() -> None:
        if (name := first_signal(asked, device)) is not None:
            kept = "the student is written, only its last evaluation is left"
            raise stopped(name, where=job.output, kept=kept)

    if len(heldout):
        dtype = evaluate.run_dtype(job.output, "auto", job.trust)
        metrics |= evaluate.score(
            job.output,
            rows,
            heldout,
            dtype=dtype,
            batch_tokens=max(job.spec.train.batch_tokens // (world_size * job.spec.train.grad_accum), 1),
            device=device,
            progress=progress,
            trust=job.trust,
            mesh=init_device_mesh(device.type, (world_size,)) if world_size > 1 else None,
            stop=stop,
        )
        metrics |= {"dtype": dtype}
        progress.event("eval", step=record.num_steps, **metrics)
    record = record.model_copy(update={"metrics": metrics})
    if rank == 0:
        scratch = job.output / UNFINISHED
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
        except OSError as err:
            raise disk_error(err, scratch) from err
        publish_record(record, scratch, job)
    dist.barrier()
    return record


def publish_record(record: RunRecord, scratch: Path, job: TrainJob) -> None:
    """Rank 0: write a run's record beside the files it names, then give all of them their place in the output."""
    write_once(scratch / RUN_FILE, canonical(record.model_dump(mode="json")), scratch_folder=scratch)
    failpoint("export:written")
    move_in(scratch, job.output)


def from_rank_0(find: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank: two clients of a network file system may not see the same. Collective."""
    found = [find() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]


def first_signal(asked: Sequence[signal.Signals], device: torch.device) -> str | None:
    """The name of the signal that asked a rank to stop, the same on all ranks; None while none did. Collective."""
    numbers = torch.tensor(int(asked[0]) if asked else 0, dtype=torch.int32, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return signal.Signals(int(numbers)).name if int(numbers) else None


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
        model = load_to_shard(job.student, job.trust, rank=rank)
        if spec.grad_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student = Student(model).train()
        mesh = init_device_mesh(device.type, (world_size,))
        self.student = shard(student, mesh, getattr(torch, spec.dtype), device)
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
            with_rows=job.spec.loss.kd_weight > 0.0,
        )
        wanted = max(round(self.feed.steps_per_epoch * spec.epochs), 1)
        self.num_steps = min(wanted, spec.max_steps or wanted)
        self.checkpoints = Checkpoints(job.output, spec.keep, device)
        self.done = self.num_tokens = self.num_skipped = self.skipped_in_a_row = 0
        self.lr_factor, self.stopping, self.save_due = 1.0, 0, False
        self.saved_at = time.monotonic()

    def resume(self, progress: Progress) -> None:
        """Take up the state of the checkpoint to go on from, where there is one. Collective."""
        wanted = self.job.resume
        if wanted == "never":
            if self.checkpoints.numbers():
                progress.note("starting again: what checkpoints there are in the output are removed")
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
        self._require_this_run(record, path)
        for there, other in from_rank_0(self.checkpoints.records):
            self._require_this_run(other, there)
        self._make_moments(record.step - record.num_skipped)
        self.checkpoints.load(self._state(), path)
        self.done, self.num_tokens, self.num_skipped = record.step, record.num_tokens, record.num_skipped
        self.lr_factor = record.lr_factor
        self.checkpoints.forget(after=self.done)
        progress.note(f"going on from the checkpoint of step {record.step}")
        progress.event("resume", step=record.step, ranks_before=len(record.files))

    def _require_this_run(self, record: CheckpointRecord, path: Path) -> None:
        """A run neither goes on from another's checkpoint nor removes one."""
        if difference := self.inputs.difference(record.inputs, but=ELASTIC):
            raise ConfigError(
                f"it is a checkpoint of another run: {difference}; choose another --output, or --resume never to "
                "start again",
                where=path,
            )

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
        self.saved_at = time.monotonic()
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

    def steps(
        self, progress: Progress, asked: Sequence[signal.Signals] = (), keep: Callable[[], None] = lambda: None
    ) -> None:
        """All steps that are left, with evaluations and checkpoints on the way; `keep` is called after each."""
        self._introduce(progress)
        for note in self.beside.notes:
            progress.note(note)
        if self.done == 0 and len(self.heldout):
            before = self.evaluate_now(progress)
            progress.note(
                f"before training: held-out KL {before['heldout_kl']:.4f}, top-1 agreement "
                f"{before['top1_agreement']:.3f}, over {before['num_tokens']:,} tokens"
            )
        total = self.feed.num_tokens_before(self.num_steps) - self.feed.num_tokens_before(self.done)
        progress.begin("train", total=total, unit="tokens")
        if self.done < self.num_steps:
            self.feed.want(self.done)
        while self.done < self.num_steps:
            fields = self.step(self.done, asked)
            self.done += 1
            progress.event("step", step=self.done, **fields)
            progress.advance(
                int(fields["num_tokens"]), f"step {self.done}/{self.num_steps} loss {fields['loss/mean']:.4f}"
            )
            keep()
            if self.done < self.num_steps:
                self._between_steps(progress)
        progress.end()

    def _introduce(self, progress: Progress) -> None:
        """What is about to be done, and what of it may not be what was meant."""
        spec, steps = self.job.spec.train, self.feed.steps_per_epoch
        # Steps from first_step on that stand before this event in the file were made by a run that was interrupted.
        progress.event(
            "start",
            num_steps=self.num_steps,
            steps_per_epoch=steps,
            ranks=self.world_size,
            first_step=self.done + 1,
            dtype=spec.dtype,
        )
        lengths = self.rows.num_tokens[self.training]
        if self.student.padded:
            progress.note("this model's layers cannot tell packed samples apart: batches are padded")
        if steps <= FEW_STEPS:
            progress.note(
                f"an epoch is {steps} step{'s' * (steps > 1)} of about {int(lengths.sum()) // steps:,} tokens; "
                "a smaller train.batch_tokens gives more and smaller ones"
            )
        if spec.batch_tokens < np.median(lengths):
            progress.note(
                f"train.batch_tokens={spec.batch_tokens} is less than most samples have: a step takes one sample, of "
                f"{int(lengths.mean()):,} tokens on average"
            )
        if not len(self.heldout):
            progress.note("no sample is held out: nothing will be measured (data.heldout_fraction)")
        if self.done < self.num_steps:
            progress.note("the first step takes longer than the others: what it needs is made and read then")

    def _between_steps(self, progress: Progress) -> None:
        """What is due after this step. Raises TemporaryError or StoppedError where a rank was asked to stop."""
        spec = self.job.spec.train
        due = self.stopping or self.save_due or self.done % spec.save_every == 0 if spec.save_every else False
        if due:
            self.checkpoint(progress)
        if self.stopping:
            kept = f"its state after step {self.done} is saved" if due else "train.save_every=0 saves nothing"
            raise stopped(signal.Signals(self.stopping).name, where=self.job.output, kept=kept)
        if spec.eval_every and self.done % spec.eval_every == 0 and len(self.heldout):
            self.evaluate_now(progress)

    def step(self, step: int, asked: Sequence[signal.Signals] = ()) -> dict[str, float]:
        """One optimizer step; what to log of it. Raises CheckFailed where loss or gradient is not finite."""
        started = time.perf_counter()
        # Random numbers are functions of the step, so that none have to be saved.
        torch.manual_seed(mixed_seed(self.job.spec.train.seed, step, self.rank))
        count = self.feed.num_supervised(step)
        if step + 1 < self.num_steps:
            self.feed.want(step + 1)
        sums = self._backward(step, count, asked)
        num_tokens, self.stopping = int(sums.pop("num_tokens")), int(sums.pop("stopping"))
        self.save_due = sums.pop("save_due") > 0
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
        """Gradients of a step's mean loss over `count` tokens; over all ranks LOSS_SUMS, num_tokens, and what is due.

        stopping: number of the signal that asked a rank to stop, 0 where none did
        save_due: 1 where the last checkpoint is train.save_minutes old by the clock of rank 0
        """
        last, seed = self.job.spec.train.grad_accum - 1, mixed_seed(self.job.spec.train.seed, step)
        total = torch.zeros(len(LOSS_SUMS) + 1, dtype=torch.float64, device=self.device)
        for micro, batch in enumerate(self.feed.step(step)):
            reduce_gradients(self.student, micro == last)
            loss, sums = self.student(batch.to(self.device), self.teacher, self.job.spec.loss, seed, 1.0 / count)
            loss.backward()
            # The batch that keeps an idle rank in step has one token and nothing to learn from it.
            tokens = batch.seq_lens.sum() if len(batch.rows) else torch.zeros(())
            total += torch.cat([sums.double(), tokens.double().to(self.device)[None]])
        dist.all_reduce(total)
        minutes = self.job.spec.train.save_minutes
        overdue = self.rank == 0 and 0 < minutes <= (time.monotonic() - self.saved_at) / 60
        asks = torch.tensor([int(asked[0]) if asked else 0, overdue], dtype=torch.float64, device=self.device)
        dist.all_reduce(asks, dist.ReduceOp.MAX)
        names = (*LOSS_SUMS, "num_tokens", "stopping", "save_due")
        return dict(zip(names, torch.cat([total, asks]).tolist(), strict=True))

    def _clip(self) -> float:
        """Clip the gradients to max_grad_norm (0: leave them); their global norm before."""
        limit = self.job.spec.train.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def evaluate_now(self, progress: Progress) -> dict[str, float]:
        """Held-out metrics of the student as it is, over the first samples up to train.eval_tokens. Collective."""
        spec = self.job.spec.train
        within = np.cumsum(self.rows.num_tokens[self.heldout]) <= spec.eval_tokens
        members = self.heldout[: max(int(within.sum()), 1)]
        packer = Packer(self.rows, padded=self.student.padded, pin=self.device.type == "cuda")
        share = max(spec.batch_tokens // (self.world_size * spec.grad_accum), 1)
        feed = evaluate.batches(self.rows, packer, members, share, rank=self.rank, world_size=self.world_size)
        metrics = evaluate.measure(self.student, self.teacher, feed, self.device, Silent())
        progress.event("eval", step=self.done, **metrics, dtype=spec.dtype)
        return metrics

    def save(self, progress: Progress) -> RunRecord:
        """Export the student with the record of its run, not measured yet. Collective; rank 0 writes."""
        scratch, problem = self.job.output / UNFINISHED, None
        try:
            if self.rank == 0:
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
            export(self.student, self.beside, scratch, rank=self.rank)
        except Exception as err:
            problem = err  # whatever it is, no step is to be lost by it
        self._require_exported(problem, progress)
        record = RunRecord(
            inputs=self.inputs,
            num_steps=self.num_steps,
            num_tokens=self.num_tokens,
            num_skipped=self.num_skipped,
            metrics=None,
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
            publish_record(record, scratch, self.job)
        record = from_rank_0(lambda: record)
        self.checkpoints.remove()
        return record

    def _require_exported(self, problem: Exception | None, progress: Progress) -> None:
        """Where a rank could not export the student, keep the last step's state and raise why. Collective."""
        failed = torch.tensor(float(problem is not None), device=self.device)
        dist.all_reduce(failed)
        if not float(failed):
            return
        if self.job.spec.train.save_every:
            try:
                self.checkpoint(progress)
            except KdpipeError as err:
                progress.note(f"nor could its state be saved: {err}")
        if problem is None:
            raise TemporaryError("another rank could not write the student; run it again", where=self.job.output)
        if isinstance(problem, SafetensorError) and (number := re.search(r"\(os error (\d+)\)", str(problem))):
            problem = OSError(int(number[1]), os.strerror(int(number[1])))
        if isinstance(problem, OSError) and problem.errno is not None:
            raise disk_error(problem, self.job.output) from problem
        raise problem


def _means(sums: dict[str, float], count: int) -> dict[str, float]:
    """What a step logs of its LOSS_SUMS over `count` tokens; without a teacher nothing was ranked."""
    ranked = sums["num_ranked"]
    logged = {f"{name}/mean": sums[name] / count for name in ("loss", "kd", "ce", "z")}
    if ranked:
        logged["teacher_entropy/mean"] = sums["teacher_entropy"] / count
        logged |= {"top1_agreement": sums["top1_agree"] / ranked, "top_k_mass": sums["top_k_mass"] / ranked}
    return logged


def _result(record: RunRecord) -> dict[str, object]:
    return {**(record.metrics or {}), "num_steps": record.num_steps, "trained_tokens": record.num_tokens}
