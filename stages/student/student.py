"""Student: a causal LM whose forward pass ends in the loss, sharded by FSDP2 on any number of ranks.

The loss is computed inside the root module's forward because only there FSDP2 holds the lm_head whole; hidden states
leave the backbone, logits never exist outside the fused loss. Weights, sums of gradients and moments are float32;
`dtype` is that of the forward and backward pass.
"""

# Shapes: L tokens of a batch, R supervised rows, D student width, E teacher width, V vocabulary.

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import ConfigError, StudentError
from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.causal_lm import (
    logit_formula,
)
from kdpipe.stages.feed import PackedBatch
from kdpipe.stages.loss import Head, TokenMetrics, fused_distill_loss, token_metrics
from kdpipe.stages.models.backbone import packed_hidden
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.student.exam import examine

LOSS_SUMS = ("loss", "kd", "ce", "z", "teacher_entropy", "top1_agree", "top_k_mass", "num_ranked")
"""What a training batch's forward pass tells of itself, sums over its tokens; see loss.Metrics."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherHead:
    """The teacher's lm_head on this rank, frozen, and the vocabulary both models are cut to."""

    head: Head
    vocab_size: int


def load_teacher_head(cache: Cache, device: torch.device) -> TeacherHead:
    """The head in a cache as tensors on `device`, in the dtype it was extracted in."""
    arrays, record = cache.head(), cache.plan.head

    def tensor(array: np.ndarray | None) -> torch.Tensor | None:
        if array is None:
            return None
        with warnings.catch_warnings():
            # Read-only by intent: the head is frozen.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            bits = torch.from_numpy(array.view(np.uint8))
        return bits.view(getattr(torch, record.dtype)).to(device)

    weight = tensor(arrays.weight)
    assert weight is not None
    return TeacherHead(
        head=Head(weight=weight, bias=tensor(arrays.bias), softcap=record.softcap, scale=record.scale),
        vocab_size=record.vocab_size,
    )


def pick_device(wanted: str) -> torch.device:
    """ "auto", "cpu" or "cuda" as a device: auto is a GPU where there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no GPU that torch can see; leave it out or say cpu", where="--device")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu")


def load_student(folder: Path, dtype: torch.dtype, device: torch.device, trust: str | None = None) -> PreTrainedModel:
    """The model with its weights in `dtype` on `device`."""
    return ModelFolder(folder, StudentError, trust).load(dtype, device)


class Student(torch.nn.Module):
    """A causal LM that answers with losses: `student(batch, teacher, loss)` and `student.measure(batch, teacher)`.

    It is examined first; `padded` says then that its layers cannot tell packed samples apart: batches must be padded.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._formula = logit_formula(model.config)
        self._padded: bool | None = None

    @property
    def padded(self) -> bool:
        assert self._padded is not None, "examine the student first"
        return self._padded

    def examine(self, text: np.ndarray, folder: Path) -> None:
        """Find out how its samples share a batch; see exam.examine. Collective where the student is sharded."""
        training = self.training
        self.eval()
        with torch.no_grad():
            self._padded = self.examined(text, folder)
        self.train(training)
        if isinstance(self, FSDPModule):
            self.reshard()  # parameters() would give an optimizer the root's whole parameters, which are made anew

    def examined(self, text: np.ndarray, folder: Path) -> bool:
        """A forward method to FSDP: parameters are whole inside."""
        return examine(self.model, self.head(), text, folder)

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Head inputs of the supervised rows, [R, D], in the head's dtype: Mamba's last norm gives float32."""
        rows = packed_hidden(self.model, batch).flatten(0, 1)[batch.rows]
        return rows.to(self.model.get_output_embeddings().weight.dtype)

    def head(self) -> Head:
        """The lm_head as it is now: whole, in the dtype of the pass, when called inside forward."""
        layer = self.model.get_output_embeddings()
        return Head(
            weight=layer.weight,
            bias=getattr(layer, "bias", None),
            softcap=self._formula.softcap,
            scale=self._formula.scale,
        )

    def forward(
        self, batch: PackedBatch, teacher: TeacherHead, loss: LossSpec | None, seed: int = 0, scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor] | TokenMetrics:
        """The loss of the batch with its gradients, and LOSS_SUMS [8] for reading; metrics where loss is None.

        seed: a sampled divergence draws by it; another one for every step. scale: multiplies the loss, not LOSS_SUMS
        """
        hidden, head = self.hidden(batch), self.head()
        if loss is None:
            return token_metrics(
                hidden, head, batch.teacher_rows, teacher.head, batch.labels, vocab_size=teacher.vocab_size
            )
        out = fused_distill_loss(
            hidden,
            head.weight,
            batch.teacher_rows,
            teacher.head.weight,
            batch.labels,
            vocab_size=teacher.vocab_size,
            student_bias=head.bias,
            teacher_bias=teacher.head.bias,
            student_softcap=head.softcap,
            teacher_softcap=teacher.head.softcap,
            student_scale=head.scale,
            teacher_scale=teacher.head.scale,
            token_keys=batch.keys,
            seed=seed,
            loss_scale=scale,
            **loss_arguments(loss),
        )
        ranked = torch.full_like(out.kd, out.metrics.num_ranked)
        seen = out.metrics.teacher_entropy, out.metrics.top1_agree, out.metrics.top_k_mass
        return out.loss, torch.stack([out.loss.detach() / scale, out.kd, out.ce, out.z, *seen, ranked])

    @torch.no_grad()
    def measure(self, batch: PackedBatch, teacher: TeacherHead) -> TokenMetrics:
        """Sums of the evaluation metrics over the batch's supervised tokens."""
        metrics = self(batch, teacher, None)
        assert isinstance(metrics, TokenMetrics)
        return metrics


def loss_arguments(spec: LossSpec) -> dict[str, Any]:
    """A run file's [loss] as arguments of fused_distill_loss."""
    chosen = spec.model_dump(exclude={"preset", "options"})
    return chosen | spec.options
