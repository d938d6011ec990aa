"""Loop: the steps that are left, with what is due between them: events, checkpoints, evaluations, a wish to stop.

    what is due before a step -> step -> event -> stop asked? save and raise -> checkpoint due? -> evaluation due?

Invariant: a run that is asked to stop loses no step, where it keeps checkpoints at all.
"""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kdpipe.manifests.errors import ConfigError, stopped
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.run import ELASTIC, CheckpointRecord, RunInputs
from kdpipe.stages.train.checkpoint import Checkpoints
from kdpipe.stages.train.trainer import Trainer


class Loop:
    """The steps of one run in one output folder. Every method is collective."""

    def __init__(self, trainer: Trainer, checkpoints: Checkpoints, inputs: RunInputs, output: Path) -> None:
        self.trainer, self.checkpoints = trainer, checkpoints
        self._inputs, self._output = inputs, output
        self._saved_at = time.monotonic()

    def resume(self, wanted: str, progress: Progress) -> None:
        """Take up the state of the checkpoint to go on from, where there is one; wanted: as in Training."""
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
        for there, other in self.trainer.ranks.from_first(self.checkpoints.records):
            self._require_this_run(other, there)
        self.trainer.resume(
            step=record.step, num_tokens=record.num_tokens, num_skipped=record.num_skipped, lr_factor=record.lr_factor
        )
        self.trainer.batches.resume(record.batches)
        self.checkpoints.load(self.trainer.state(), path)
        self.checkpoints.forget(after=record.step)
        progress.note(f"going on from the checkpoint of step {record.step}")
        progress.event("resume", step=record.step, ranks_before=len(record.files))

    def run(
        self,
        progress: Progress,
        *,
        asked: Sequence[signal.Signals],
        before: Callable[[int], Mapping[str, float]],
        keep: Callable[[], None],
        evaluate: Callable[[], object] | None,
    ) -> None:
        """All steps that are left.

        asked: signals that asked this rank to stop
        before: called before each step with those that were made; figures for the step's event
        keep: called after each step
        evaluate: measures the student as it is; None where nothing is held out
        Raises TemporaryError or StoppedError where a rank was asked to stop.
        """
        trainer = self.trainer
        num_tokens = trainer.batches.num_tokens(trainer.done, trainer.num_steps)
        if num_tokens is None:  # answers that are not written yet: how far it is can be said in steps alone
            progress.begin("train", total=trainer.num_steps - trainer.done, unit="steps")
        else:
            progress.begin("train", total=num_tokens, unit="tokens")
        while trainer.done < trainer.num_steps:
            due = before(trainer.done)
            fields = trainer.step()
            progress.event("step", step=trainer.done, **fields, **trainer.batches.told(trainer.done - 1), **due)
            where = f"step {trainer.done}/{trainer.num_steps}"
            amount = 1 if num_tokens is None else int(fields["num_tokens"])
            progress.advance(amount, f"{where} loss {fields['loss/mean']:.4f}")
            keep()
            if trainer.done < trainer.num_steps:
                self._between_steps(progress, asked, evaluate)
        progress.end()

    def save(self, progress: Progress) -> None:
        """Save the state as it is."""
        trainer, started = self.trainer, time.perf_counter()
        record = CheckpointRecord(
            inputs=self._inputs,
            step=trainer.done,
            num_tokens=trainer.num_tokens,
            num_skipped=trainer.num_skipped,
            lr_factor=trainer.lr_factor,
            batches=trainer.batches.state(),
            files=(),
        )
        self.checkpoints.save(trainer.state(), record)
        self._saved_at = time.monotonic()
        progress.event("checkpoint", step=trainer.done, seconds=time.perf_counter() - started)

    def _between_steps(
        self, progress: Progress, asked: Sequence[signal.Signals], evaluate: Callable[[], object] | None
    ) -> None:
        spec, done = self.trainer.spec, self.trainer.done
        # The clock of rank 0 decides for all; any rank may have been asked to stop.
        minutes = (time.monotonic() - self._saved_at) / 60
        overdue = self.trainer.ranks.rank == 0 and 0 < spec.save_minutes <= minutes
        stop, late = self.trainer.ranks.largest([float(asked[0]) if asked else 0.0, float(overdue)])
        due = bool(spec.save_every) and bool(stop or late or done % spec.save_every == 0)
        if due:
            self.save(progress)
        if stop:
            kept = f"its state after step {done} is saved" if due else "train.save_every=0 saves nothing"
            raise stopped(signal.Signals(int(stop)).name, where=self._output, kept=kept)
        if evaluate is not None and spec.eval_every and done % spec.eval_every == 0:
            evaluate()

    def _require_this_run(self, record: CheckpointRecord, path: Path) -> None:
        """A run neither goes on from another's checkpoint nor removes one."""
        if difference := self._inputs.difference(record.inputs, but=ELASTIC):
            raise ConfigError(
                f"it is a checkpoint of another run: {difference}; choose another --output, or --resume never to "
                "start again",
                where=path,
            )
