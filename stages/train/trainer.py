"""Trainer: optimizer steps of a student over batches. It knows no folder, no cache and no signal.

    batches.step(s) -> Student (hidden -> fused loss) -> backward -> clip -> AdamW

Invariant: the learning rate of step s, its random numbers and its loss's divisor are pure functions of the run's
inputs, so one rank and many see the same steps, and a state that is loaded goes on as if nothing had happened, bit for
bit on the same ranks. Sums over supervised tokens are divided once, by those of all ranks.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from kdpipe.manifests.errors import CheckFailed
from kdpipe.manifests.specs import LossSpec, TrainSpec
from kdpipe.stages.draws import mixed_seed
from kdpipe.stages.feed.batches import Batches
from kdpipe.stages.ranks import Ranks
from kdpipe.stages.student import LOSS_SUMS, Student, TeacherHead, reduce_gradients, trainable
from kdpipe.stages.train.schedule import learning_rate

MOMENTS = ("exp_avg", "exp_avg_sq")
MAX_SKIPPED = 20
"""Steps in a row that are left out before a run is given up: it will not recover by itself."""


class Trainer:
    """A sharded student, its optimizer, and the steps that were done.

    done, num_tokens, num_skipped, lr_factor: what a checkpoint has beside tensors
    """

    def __init__(
        self,
        student: Student,
        batches: Batches,
        heads: Sequence[TeacherHead],
        train: TrainSpec,
        loss: LossSpec,
        ranks: Ranks,
    ) -> None:
        self.student, self.batches, self.heads = student, batches, heads
        self.spec, self.loss, self.ranks = train, loss, ranks
        weights = [parameter for _, parameter in trainable(student)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in weights if p.ndim >= 2], "weight_decay": train.weight_decay},
                {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=train.lr,
            betas=train.betas,
            fused=True,
        )
        self.done = self.num_tokens = self.num_skipped = self._skipped_in_a_row = 0
        self.lr_factor = 1.0

    @property
    def num_steps(self) -> int:
        return self.batches.num_steps

    def step(self) -> dict[str, float]:
        """The next optimizer step; what to log of it. One without a supervised token changes nothing.

        Raises CheckFailed where loss or gradient is not finite.
        """
        started, step = time.perf_counter(), self.done
        # Random numbers are functions of the step, so that none have to be saved.
        torch.manual_seed(mixed_seed(self.spec.seed, step, self.ranks.rank))
        count = self.batches.num_supervised(step)
        sums = self.backward(step, max(count, 1))
        num_tokens = int(sums.pop("num_tokens"))
        logged = _means(sums, max(count, 1), taught=bool(self.heads) or self.student.own_teacher)
        norm = self._clip()
        lr = self.lr_factor * learning_rate(step, self.num_steps, self.spec)
        if not count:
            self.num_skipped += 1  # AdamW moves weights and moments by a gradient of zero too
        elif np.isfinite(logged["loss/mean"]) and np.isfinite(norm):
            self._skipped_in_a_row = 0
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        else:
            self._leave_out(step, logged["loss/mean"], norm)
        self.optimizer.zero_grad()
        self.num_tokens += num_tokens
        self.done += 1
        return logged | {
            "grad_norm": norm,
            "lr": lr,
            "num_tokens": num_tokens,
            "num_supervised": count,
            "num_skipped": self.num_skipped,
            "seconds": time.perf_counter() - started,
        }

    def backward(self, step: int, count: int) -> dict[str, float]:
        """Gradients of a step's mean loss over `count` tokens; LOSS_SUMS and num_tokens over all ranks."""
        seed = mixed_seed(self.spec.seed, step)
        device, last = self.ranks.device, self.spec.grad_accum - 1
        total = torch.zeros(len(LOSS_SUMS) + 1, dtype=torch.float64, device=device)
        for micro, batch in enumerate(self.batches.step(step)):
            reduce_gradients(self.student, micro == last)
            loss, sums = self.student(batch.to(device), self.heads, self.loss, seed, 1.0 / count)
            loss.backward()
            # The batch that keeps an idle rank in step has one token and nothing to learn from it.
            tokens = batch.seq_lens.sum() if len(batch.row_positions) else torch.zeros(())
            total += torch.cat([sums.double(), tokens.double().to(device)[None]])
        return dict(zip((*LOSS_SUMS, "num_tokens"), self.ranks.sums(total), strict=True))

    def state(self) -> dict[str, torch.Tensor]:
        """Trained weights and moments by name, this rank's shards of them: all that a checkpoint has in tensors."""
        self._make_moments(self.done - self.num_skipped)
        state: dict[str, torch.Tensor] = {}
        for name, parameter in trainable(self.student):
            state[f"weight.{name}"] = parameter.detach()
            for moment in MOMENTS:
                state[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        return state

    def resume(self, *, step: int, num_tokens: int, num_skipped: int, lr_factor: float) -> None:
        """Go on after `step` steps: the tensors of `state` are filled in afterwards."""
        self.done, self.num_tokens, self.num_skipped, self.lr_factor = step, num_tokens, num_skipped, lr_factor

    def _make_moments(self, num_updates: int) -> None:
        """AdamW's state of every parameter that has none yet, as it is after `num_updates` updates of zero."""
        for _, parameter in trainable(self.student):
            if not self.optimizer.state[parameter]:
                updates = torch.tensor(float(num_updates), dtype=torch.float32, device=parameter.device)
                moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
                self.optimizer.state[parameter] = {"step": updates, **moments}

    def _leave_out(self, step: int, loss: float, norm: float) -> None:
        """A step that is not finite, by train.on_nonfinite. Raises CheckFailed where it says stop."""
        policy = self.spec.on_nonfinite
        self.num_skipped += 1
        self._skipped_in_a_row += 1
        if policy == "stop" or self._skipped_in_a_row > MAX_SKIPPED:
            raise CheckFailed(
                f"loss {loss:.4g}, gradient norm {norm:.4g}: not finite; are the student's weights? "
                "Try a lower train.lr, train.dtype=float32, a longer warm-up, or train.on_nonfinite=skip",
                where=f"step {step + 1}",
            )
        if policy == "halve":
            self.lr_factor *= 0.5

    def _clip(self) -> float:
        """Clip the gradients to max_grad_norm (0: leave them); their global norm before."""
        limit = self.spec.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_([parameter for _, parameter in trainable(self.student)], limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _means(sums: dict[str, float], count: int, *, taught: bool) -> dict[str, float]:
    """What a step logs of its LOSS_SUMS over `count` tokens; nothing was ranked where no teacher was asked.

    taught: the run has a teacher
    """
    ranked = sums["num_ranked"]
    logged = {f"{name}/mean": sums[name] / count for name in ("loss", *(["kd"] if taught else []), "ce", "z")}
    if sums["router"]:
        logged["router/mean"] = sums["router"] / count
    if ranked:
        logged["teacher_entropy/mean"] = sums["teacher_entropy"] / sums["num_taught"]
        logged |= {"top1_agreement": sums["top1_agree"] / ranked, "top_k_mass": sums["top_k_mass"] / ranked}
    return logged
