"""Student: a causal LM whose forward pass ends in the loss, sharded by FSDP2 on any number of ranks.

The loss is computed inside the root module's forward because only there FSDP2 holds the lm_head whole; hidden states
leave the backbone, logits never exist outside the fused loss. Weights, sums of gradients and moments are float32;
`dtype` is that of the forward and backward pass.
"""

# Shapes: L tokens of a batch, R supervised rows, D student width, E teacher width, V vocabulary.

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from kdpipe.manifests.sidecar import Sidecar
from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.feed.dataset import Teacher
from kdpipe.stages.feed.decoding import Decoder, decoder_of
from kdpipe.stages.feed.packing import PackedBatch, TeacherRows
from kdpipe.stages.loss import (
    DrawnSide,
    Head,
    Importance,
    LowRank,
    Side,
    TokenMetrics,
    TokenSide,
    TopKSide,
    distill,
    pose,
    token_metrics,
)
from kdpipe.stages.loss.cross_metrics import CrossMetrics
from kdpipe.stages.models.adapter import NAME, has_adapter, low_of, product, without_adapter
from kdpipe.stages.models.backbone import backbone, packed_hidden, packed_output
from kdpipe.stages.models.formula import logit_formula
from kdpipe.stages.models.head import loaded_head
from kdpipe.stages.models.router import router_loss, router_weight
from kdpipe.stages.rollout.decode import Ended, Way, decode, trial
from kdpipe.stages.rollout.sampling import Sampling
from kdpipe.stages.rollout.writer import Answer, Prompt
from kdpipe.stages.student.across import Across
from kdpipe.stages.student.exam import examine
from kdpipe.stages.student.lora import merged_weights, whole

LOSS_SUMS = (
    "loss",
    "kd",
    "ce",
    "z",
    "teacher_entropy",
    "top1_agree",
    "top_k_mass",
    "num_taught",
    "num_ranked",
    "router",
)
"""What a training batch's forward pass tells of itself, sums over its rows; see loss.Metrics, and models/router.py."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherHead:
    """The teacher's lm_head on this rank, frozen, and the vocabulary both models are cut to.

    weight: beside other teachers of the same samples
    sidecar: of a teacher whose rows are no hidden states and need no head
    decoder: of one whose rows travel as they are stored
    origin: int32 [V], the bits of the float32 bias of one whose codec is folded into its head (folding.py): a sharded
        student casts the floats that it is given to the dtype of its pass
    """

    head: Head
    vocab_size: int
    weight: float = 1.0
    sidecar: Sidecar | None = None
    decoder: Decoder | None = None
    origin: torch.Tensor | None = None

    @property
    def rows_are(self) -> str:
        """How its rows meet its head: as "rows" that travel, or "decoded" on the device, or "folded"."""
        return "rows" if self.decoder is None else "decoded" if self.origin is None else "folded"

    def side(self, rows: TeacherRows, tokens: torch.Tensor) -> Side:
        """Its half of a loss on these rows, which these tokens follow."""
        if isinstance(rows, dict):
            assert self.decoder is not None, "a teacher whose rows travel coded has a decoder"
            # As rows that travel would come: in the head's dtype, which a sharded student has cast with them.
            rows = self.decoder.rows(rows).to(self.head.weight.dtype)
        if self.origin is not None:
            return Side(rows, replace(self.head, bias=self.origin.view(torch.float32)))
        if self.sidecar is None:
            return Side(rows, self.head)
        if self.sidecar.kind == "sampled":
            return DrawnSide.of(rows, self.vocab_size)
        numbers = rows.view(torch.float32)  # they travel as their bits: Teacher.carried_as
        if self.sidecar.kind == "logprob":
            return TokenSide.of_tokens(numbers, tokens, self.vocab_size)
        return TopKSide.of(numbers, self.vocab_size)


def load_teacher_head(teacher: Teacher, device: torch.device) -> TeacherHead:
    """A teacher's head as tensors on `device`, in the dtype it was extracted in."""
    record = teacher.record
    return TeacherHead(
        head=loaded_head(teacher.read_head(), record, device),
        vocab_size=record.vocab_size,
        weight=teacher.weight,
        sidecar=record.sidecar,
        decoder=None if teacher.codec is None else decoder_of(teacher.codec, teacher.dtype, device),
    )


class Student(torch.nn.Module):
    """A causal LM that answers with losses: `student(batch, teachers, loss)` and `student.measure(batch, teachers)`.

    It is examined first; `padded` says then that its layers cannot tell packed samples apart: batches must be padded.
    vocab_size: ids that its data can have, where no teacher says how many; the rows of its head when not given
    importance: weighs rows that an older student wrote, where that is wanted
    across: what it needs to learn from a teacher with another tokenizer; None where it has the student's
    own_teacher: it is taught by its own base, the model without its adapter
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int | None = None) -> None:
        super().__init__()
        self.model, self._vocab_size = model, vocab_size
        self.importance: Importance | None = None
        self.across: Across | None = None
        self.own_teacher = False
        self._formula = logit_formula(model.config)
        self._padded: bool | None = None
        self._text = np.zeros(0, np.int32)
        self._way: Way | None = None

    @property
    def padded(self) -> bool:
        assert self._padded is not None, "examine the student first"
        return self._padded

    def examine(self, text: np.ndarray, folder: Path) -> None:
        """Find out how its samples share a batch; see exam.examine. Collective where the student is sharded."""
        training, self._text = self.training, text
        self.eval()
        with torch.no_grad():
            self._padded = self.examined(text, folder)
        self.train(training)
        if isinstance(self, FSDPModule):
            self.reshard()  # parameters() would give an optimizer the root's whole parameters, which are made anew

    def write(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        vocab_size: int,
        on_answer: Ended = lambda place, answer: None,
    ) -> list[Answer]:
        """Answers with the weights as they are, of tokens below vocab_size. Collective where the student is sharded.

        on_answer: as of decode
        Every rank holds all weights, in the dtype of the pass, for as long as it writes: to gather them for each token
        anew would take longer than to write.
        """
        sharded = [module for module in self.modules() if isinstance(module, FSDPModule)]
        for module in sharded:
            module.set_reshard_after_forward(False, recurse=False)
        try:
            with torch.no_grad():
                return self.written(prompts, sampling, seed, vocab_size, on_answer)
        finally:
            for module in sharded:
                module.set_reshard_after_forward(module is not self, recurse=False)
                module.reshard()

    def written(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, vocab_size: int, on_answer: Ended
    ) -> list[Answer]:
        """A forward method to FSDP: parameters are whole inside."""
        if self._way is None:
            self._way = trial(self.model, self._text)
        if not prompts:  # the others wait for this rank's part of the weights
            backbone(self.model)(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.model.device))
        way = self._way
        return decode(
            self.model, self.head, prompts, sampling, seed, way=way, vocab_size=vocab_size, on_answer=on_answer
        )

    @torch.no_grad()
    def logprobs(self, text: np.ndarray) -> np.ndarray:
        """Log-probability of each token of a text but the first: int32 [n] -> float32 [n-1]. Collective."""
        training = self.training
        self.eval()
        found = self.scored(torch.from_numpy(text.astype(np.int64)).to(self.model.device)).cpu().numpy()
        self.train(training)
        if isinstance(self, FSDPModule):
            self.reshard()
        return found

    def weights(self, dtype: torch.dtype, *, keep: bool, as_filed: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight as it is now, an adapter merged in, whole, on the CPU, by the model's own name.

        Collective where it is sharded.
        keep: on this rank; the others only send their parts
        as_filed: by the names and shapes of its files: a mixture's experts have others in the model
        """
        if isinstance(self, FSDPModule):
            self.reshard()  # what the last pass put together lies in memory that the next one takes
        filed = as_filed and bool(getattr(self.model, "_weight_conversions", None))
        for name, weight in merged_weights(self.model, keep=keep):
            found = {name: weight.to("cpu", dtype)}
            yield from (revert_weight_conversion(self.model, found) if filed else found).items()

    def scored(self, ids: torch.Tensor) -> torch.Tensor:
        """A forward method to FSDP: parameters are whole inside."""
        hidden = backbone(self.model)(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
        head = self.head()
        logits = head.entries(hidden.to(head.weight.dtype), 0, len(head.weight))
        return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]

    def examined(self, text: np.ndarray, folder: Path) -> bool:
        """A forward method to FSDP: parameters are whole inside."""
        return examine(self.model, self.head(), text, folder)

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Head inputs of the supervised rows, [R, D], in the head's dtype: Mamba's last norm gives float32."""
        return self._rows(packed_hidden(self.model, batch), batch)

    def _rows(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        rows = hidden.flatten(0, 1)[batch.row_positions]
        return rows.to(self.model.get_output_embeddings().weight.dtype)

    def _routed(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """As `hidden`, and the batch's router loss once for each of its rows."""
        output = packed_output(self.model, batch, output_router_logits=True)
        found = router_loss(self.model, output.router_logits, batch.attention_mask)
        return self._rows(output.last_hidden_state, batch), found * len(batch.row_positions)

    def head(self) -> Head:
        """The lm_head as it is now, an adapter merged in: whole, in the dtype of the pass, if called inside forward."""
        head, layer = self._own_head(), self.model.get_output_embeddings()
        if not has_adapter(layer):
            return head
        return replace(head, weight=(head.weight.float() + product(layer, *low_of(layer))).to(head.weight.dtype))

    def _own_head(self) -> Head:
        """The lm_head without an adapter."""
        layer = self.model.get_output_embeddings()
        return Head(
            weight=layer.weight,
            bias=getattr(layer, "bias", None),
            softcap=self._formula.softcap,
            scale=self._formula.scale,
        )

    def side(self, hidden: torch.Tensor) -> Side:
        """Its half of a loss, an adapter on the head apart; rows that enter the head [R, D]."""
        layer = self.model.get_output_embeddings()
        if not has_adapter(layer):
            return Side(hidden, self._own_head())
        down, up = low_of(layer)
        rows = torch.nn.functional.linear(layer.lora_dropout[NAME](hidden), down) * layer.scaling[NAME]
        return Side(hidden, self._own_head(), LowRank(rows, up))

    def whole_head(self) -> Head:
        """The lm_head as it is now, whole. Collective where the student is sharded."""
        head = self.head()
        return replace(head, weight=whole(head.weight), bias=None if head.bias is None else whole(head.bias))

    @torch.no_grad()
    def _base_side(self, batch: PackedBatch) -> Side:
        """Its base as a teacher: the same pass without the adapter and without dropout."""
        training = self.model.training
        self.model.eval()
        with without_adapter(self.model):
            rows = self.hidden(batch)
        self.model.train(training)
        return Side(rows, self._own_head())

    def forward(
        self,
        batch: PackedBatch,
        teachers: Sequence[TeacherHead],
        loss: LossSpec | None,
        seed: int = 0,
        scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor] | TokenMetrics | CrossMetrics:
        """The loss of the batch with its gradients, and LOSS_SUMS for reading; metrics where loss is None.

        A batch without teacher rows is for a loss of cross-entropy alone, for which no teacher is needed.
        seed: a sampled divergence draws by it; another one for every step. scale: multiplies the loss, not LOSS_SUMS
        """
        base = [self._base_side(batch)] if self.own_teacher and loss is not None and loss.kd_weight else []
        balance = 0.0 if loss is None else router_weight(self.model, loss.router_weight)
        hidden, routed = self._routed(batch) if balance else (self.hidden(batch), None)
        own = not teachers or self.across is not None
        vocab_size = self._vocab_size if own else teachers[0].vocab_size
        # Rows whose teacher nobody asked for are not in the batch: the loss is cross-entropy alone then.
        sides = base or [
            teacher.side(rows, tokens)
            for rows, tokens, teacher in zip(batch.teacher_rows, batch.taught_tokens, teachers, strict=False)
        ]
        student, weights = self.side(hidden), None
        crossing = self.across if batch.aligned else None
        if loss is None and crossing is not None:
            return crossing.metrics(Side(hidden, self.head()), sides, batch)
        if loss is None:
            # Of a few tokens of a row no divergence over the vocabulary can be said.
            known = sides if all(teacher.sidecar is None for teacher in teachers) else []
            shares = [teacher.weight for teacher in teachers]
            return measured(Side(hidden, self.head()), known, batch, shares, vocab_size)
        if self.importance is not None and batch.stale:
            size = vocab_size or len(student.head.weight)
            rows, bits = batch.stale
            written = bits.view(torch.float32)
            weights = self.importance.weights(Side(hidden, self.head()), batch.next_tokens, rows, written, size)
        outs, losses, sums = [], [], []
        if crossing is not None:
            side = Side(hidden, self.head())
            outs = [crossing.loss(side, sides, batch, loss, weights=weights, seed=seed, scale=scale)]
        for taught in [] if outs else lessons(student, sides, batch, weights):
            problem = pose(
                taught.student,
                taught.teachers,
                taught.labels,
                loss=loss,
                vocab_size=vocab_size,
                weights=taught.weights,
                keys=taught.keys,
                tokens=taught.tokens,
                seed=seed,
                loss_scale=scale,
            )
            outs.append(distill(problem, chunk_tokens=loss.chunk_tokens, head_grad_fp32=loss.head_grad_fp32))
        for out in outs:
            losses.append(out.loss)
            counts = (torch.full_like(out.kd, each) for each in (out.metrics.num_taught, out.metrics.num_ranked))
            seen = out.metrics.teacher_entropy, out.metrics.top1_agree, out.metrics.top_k_mass
            sums.append(torch.stack([out.loss.detach() / scale, out.kd, out.ce, out.z, *seen, *counts]))
        total, told = torch.stack(losses).sum(), torch.stack(sums).sum(0)
        if routed is None:
            return total, torch.nn.functional.pad(told, (0, 1))
        told[0] += balance * routed.detach()
        return total + scale * balance * routed, torch.cat([told, routed.detach()[None]])

    @torch.no_grad()
    def measure(self, batch: PackedBatch, teachers: Sequence[TeacherHead]) -> TokenMetrics | CrossMetrics:
        """Sums of the evaluation metrics over the batch's supervised tokens."""
        metrics = self(batch, teachers, None)
        assert isinstance(metrics, TokenMetrics | CrossMetrics)
        return metrics


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lesson:
    """Rows of a batch that are learnt together: the student's, their teachers', and what PackedBatch has of them."""

    student: Side
    teachers: Sequence[Side]
    labels: torch.Tensor
    keys: torch.Tensor
    tokens: torch.Tensor
    weights: torch.Tensor | None


def lessons(
    student: Side, teachers: Sequence[Side], batch: PackedBatch, weights: torch.Tensor | None = None
) -> list[Lesson]:
    """All rows of a batch with all teachers, or those of each teacher where each row has one.

    weights: of all rows [R]
    """
    if not (teachers and batch.teacher_places):
        return [
            Lesson(
                student=student,
                teachers=teachers,
                labels=batch.labels,
                keys=batch.keys,
                tokens=batch.next_tokens,
                weights=weights,
            )
        ]
    return [
        Lesson(
            student=student.at(places),
            teachers=[teacher],
            labels=batch.labels[places],
            keys=batch.keys[places],
            tokens=batch.next_tokens[places],
            weights=None if weights is None else weights[places],
        )
        for teacher, places in zip(teachers, batch.teacher_places, strict=True)
    ]


def measured(
    student: Side, teachers: Sequence[Side], batch: PackedBatch, weights: Sequence[float], vocab_size: int | None
) -> TokenMetrics:
    """The metrics of a batch; where each row has one teacher, against its own."""
    if not (teachers and batch.teacher_places):
        given = weights if teachers else ()
        return token_metrics(student, teachers, batch.labels, weights=given, vocab_size=vocab_size)
    each = [
        token_metrics(lesson.student, lesson.teachers, lesson.labels, vocab_size=vocab_size)
        for lesson in lessons(student, teachers, batch)
    ]
    kl, tokens = (torch.stack([getattr(one, name) for one in each]) for name in ("forward_kl", "num_tokens"))
    return TokenMetrics.of_flat(torch.cat([torch.stack([one.flat() for one in each]).sum(0), kl, tokens]))
