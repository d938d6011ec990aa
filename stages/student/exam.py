"""Exam: before the first step a student shows that what kdpipe computes of it is what the model itself computes.

    own forward, one sample at a time, its own attention -> hidden states and logits
        1. hidden states x lm_head x formula are those logits
        2. no token sees those after it
        3. samples packed end to end come out as they do alone; else padded to one length; else the student is refused

Invariant: the reference is taken before attention is switched, so nothing of ours is compared with itself.
Cost: about one forward over the longest question, which is long enough for every window and chunk of the model that the
longest sample can fill, and never longer than that sample.
"""

# Shapes: n tokens of a sample, D width, V vocabulary, k last rows of a sample.

import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kdpipe.manifests.errors import StudentError, is_of_others
from kdpipe.stages.feed.dataset import Dataset
from kdpipe.stages.feed.packing import PackedBatch
from kdpipe.stages.models.attention import use_packed_attention
from kdpipe.stages.models.backbone import hidden_states, packed_hidden
from kdpipe.stages.models.head import Head

SHORT = (17, 24)
"""Tokens of the short questions; the first is the beginning of the long one."""
LONG = 64
"""Of the long question where no window, chunk or table of positions asks for more."""
LOGIT_ROWS = 32
"""Last rows of a question whose logits are compared."""
BOUND = re.compile(r"window|chunk|block_size|index_topk")
"""Names of config fields that say from which length on attention, or a scan, sees other tokens than all before."""
ROW_ERROR = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Relative, of a row computed in two ways."""


def exam_length(config: Any, longest: int) -> int:
    """Tokens of the long question, for a model of this config and samples of at most `longest` tokens."""
    text = config.get_text_config()
    bounds = [
        value
        for name, value in text.to_dict().items()
        if BOUND.search(name) and isinstance(value, int) and not isinstance(value, bool)
    ]
    wanted = max(LONG, *(bound + bound // 2 + 8 for bound in bounds), 0)
    if getattr(text, "max_position_embeddings", None) and not getattr(text, "rope_parameters", None):
        wanted = longest  # positions may be a table that ends before it says so
    return min(wanted, longest)


def exam_text(dataset: Dataset, samples: np.ndarray, config: Any) -> np.ndarray:
    """Ids of the long question, int32 [n]: the beginning of the longest of the samples."""
    longest = int(samples[np.argmax(dataset.num_tokens[samples])])
    ids = dataset.tokens(longest).token_ids
    return ids[: exam_length(config, len(ids))]


def examine(model: PreTrainedModel, head: Head, text: np.ndarray, folder: Path) -> bool:
    """Whether batches must be padded because packed samples would see each other; attention is set for either.

    text: ids of the long question, at most as long as the longest sample; the others are made of it
    Raises StudentError for a student that the loss would train on other logits than its own, or whose logits are not
    finite.
    """
    texts = [np.resize(text, min(SHORT[0], len(text))), np.resize(text[::-1], min(SHORT[1], len(text))), text]
    questions = [torch.from_numpy(each.astype(np.int64)).to(model.device) for each in texts]
    alone = _alone(model, head, questions, folder)
    if _apart(alone[2][: len(questions[0])], alone[0]):
        raise StudentError(
            f"a token of {type(model).__name__} sees the tokens after it: not a causal LM as configured; "
            "for a model of encoders set is_decoder to true in its config.json",
            where=folder,
        )
    own = model.config._attn_implementation
    use_packed_attention(model, model.device)
    if not _differ(model, _packed(questions), alone):
        _require_training(model, _packed(questions[:2]), folder)
        return False
    model.set_attn_implementation(own)
    if not _differ(model, _padded(questions), alone):
        _require_training(model, _padded(questions[:2]), folder)
    else:
        raise StudentError(
            f"{type(model).__name__} gives a sample other hidden states in a batch than alone, packed and padded; "
            "it cannot be trained",
            where=folder,
        )
    return True


def _require_training(model: PreTrainedModel, batch: PackedBatch, folder: Path) -> None:
    """Dropout and whatever else evaluation leaves out must run too; random numbers are set anew before each step."""
    model.train()
    try:
        packed_hidden(model, batch)
    except Exception as err:
        # Any model's code, which may raise anything.
        if is_of_others(err):
            raise
        raise StudentError(
            f"{type(model).__name__} does not run in training mode: {_first_line(err)}; is a dropout in its "
            "config.json no number from 0 to 1?",
            where=folder,
        ) from err
    finally:
        model.eval()


def _alone(model: PreTrainedModel, head: Head, questions: Sequence[torch.Tensor], folder: Path) -> list[torch.Tensor]:
    """The model's own hidden states [n, D] of each question, whose logits by the head's formula are the model's own."""
    found: list[torch.Tensor] = []
    for question in questions:
        with hidden_states(model, LOGIT_ROWS) as states:
            try:
                logits = model(input_ids=question[None], use_cache=False).logits
            except Exception as err:
                # Any model's code, which may raise anything.
                if is_of_others(err):
                    raise
                raise StudentError(
                    f"{type(model).__name__} does not run on token ids alone: {_first_line(err)}", where=folder
                ) from err
        if len(states) != 1 or states[0].shape[:2] != (1, len(question)):
            raise StudentError(
                f"{type(model).__name__} does not make its logits from one hidden state a token; it cannot be trained",
                where=folder,
            )
        hidden = states[0][0]
        rows = hidden[-LOGIT_ROWS:].to(head.weight.dtype)
        if not bool(torch.isfinite(rows).all() and torch.isfinite(logits).all()):
            raise StudentError("its logits are not finite; are its weights?", where=folder)
        error = head.error(rows, logits[0])
        if not error <= head.allowed_error:
            raise StudentError(
                f"logits from hidden states and lm_head differ from the model's own by {error:.1e} "
                f"(allowed {head.allowed_error:.1e}): {type(model).__name__} does something between hidden state and "
                "logits that kdpipe does not know",
                where=folder,
            )
        found.append(hidden)
    return found


def _differ(model: PreTrainedModel, batch: PackedBatch, alone: Sequence[torch.Tensor]) -> bool:
    """Whether a sample comes out of the batch otherwise than alone, or the batch does not run."""
    try:
        hidden = packed_hidden(model, batch)
    except Exception as err:
        if is_of_others(err):
            raise  # or a lack of memory would decide that batches are padded
        return True  # a forward without position_ids, for one; what runs in no way is refused
    lengths = [len(each) for each in alone]
    samples = hidden[0].split(lengths) if batch.attention_mask is None else zip_rows(hidden, lengths)
    return any(_apart(ours, own) for ours, own in zip(samples, alone, strict=True))


def zip_rows(hidden: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """The samples [n, D] of a padded batch [S, L, D]."""
    return [rows[:length] for rows, length in zip(hidden, lengths, strict=True)]


def _apart(ours: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether two computations of a sample's rows [n, D] differ by more than rounding in any third of it.

    By the median of a third: a window shows at the end, a neighbour's state at the beginning, and a token that rounding
    sends to another expert shows in neither.
    """
    errors = (ours.double() - own.double()).norm(dim=1) / own.double().norm(dim=1).clamp_min(1e-30)
    worst = max(float(part.median()) for part in errors.tensor_split(3) if len(part))
    return not worst <= ROW_ERROR[own.dtype]


def _packed(questions: Sequence[torch.Tensor]) -> PackedBatch:
    device = questions[0].device
    return _batch(
        torch.cat(list(questions))[None],
        torch.cat([torch.arange(len(ids), device=device) for ids in questions])[None],
        [len(ids) for ids in questions],
        None,
    )


def _padded(questions: Sequence[torch.Tensor]) -> PackedBatch:
    lengths = [len(ids) for ids in questions]
    ids = torch.nn.utils.rnn.pad_sequence(list(questions), batch_first=True)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    mask = positions < torch.tensor(lengths, device=ids.device)[:, None]
    return _batch(ids, positions, lengths, mask)


def _batch(
    ids: torch.Tensor, positions: torch.Tensor, lengths: Sequence[int], mask: torch.Tensor | None
) -> PackedBatch:
    """A batch with nothing to learn."""
    nothing = torch.zeros(0, dtype=torch.int64, device=ids.device)
    return PackedBatch(
        input_ids=ids,
        position_ids=positions,
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=ids.device),
        bounds=(0, *accumulate(lengths)) if mask is None else (),
        attention_mask=mask,
        row_positions=nothing,
        labels=nothing,
        keys=nothing,
        teacher_rows=(),
    )


def _first_line(err: Exception) -> str:
    return f"{type(err).__name__}: {(str(err).strip() or 'no message').splitlines()[0]}"
