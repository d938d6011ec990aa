"""Decode: answers by a causal LM in this process, a batch at a time, through its key-value cache.

    prompts -> batches of like lengths -> padded on the left, one forward; then a token a step for those not ended

Some models cannot be padded on the left, and some lose something between a prompt and its next token. A trial at the
start compares both with the whole text in one forward: what fails is left out, and answers are written one prompt at a
time, or with a whole forward for each token.
Invariant: an answer is a function of weights, prompt, sampling, seed and key; another batch changes its logits by
rounding alone. Batches are a function of the prompts, so the same prompts give the same bits.
"""

# Shapes: B prompts of a batch, n tokens of the longest, D width, V vocabulary.

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdpipe.manifests.errors import is_of_others
from kdpipe.stages.draws import mixed_seed, uniform
from kdpipe.stages.models.attention import PACKED
from kdpipe.stages.models.backbone import backbone
from kdpipe.stages.models.head import Head
from kdpipe.stages.rollout.sampling import Picked, Sampling, pick
from kdpipe.stages.rollout.writer import Answer, Prompt

Way = Literal["padded", "alone", "whole"]
"""How a model may be asked: prompts padded to one length; one prompt at a time; without a key-value cache."""
TRIAL_TOKENS = 24
TRIAL_CUT = 16
"""Tokens of the trial's text that are its prompt; the others follow one by one."""
TRIAL_KEPT = 4
"""From this one on the trial's text goes on alone."""
ROW_ERROR = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Relative, of a row computed in two ways."""
CACHES = ("past_key_values", "cache_params", "state")
"""What models call that which they keep between two tokens, in their output and as an argument."""
BATCH_TOKENS = 1 << 16
"""Tokens of prompts and answers that are in a batch at a time at most: what its key-value cache has to hold."""
MAX_BATCH = 256

Ended = Callable[[int, Answer], None]
"""What is told of an answer that has ended: the place of its prompt, and the answer."""


def decode(
    model: PreTrainedModel,
    head: Callable[[], Head],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    *,
    way: Way = "padded",
    vocab_size: int | None = None,
    on_batch: Callable[[int], None] = lambda num_tokens: None,
    on_answer: Ended = lambda place, answer: None,
) -> list[Answer]:
    """One answer a prompt, in order.

    head: the lm_head as it is now, asked for once a batch
    way: as `trial` found it
    vocab_size: tokens that may be written; None: all that the head has rows for
    on_batch: called with the number of tokens that were written, after each batch
    on_answer: called with each answer as soon as it has ended, while others are still being written
    """
    answers: list[Answer | None] = [None] * len(prompts)
    with torch.no_grad(), _writing(model):
        for batch in batches([len(prompt.token_ids) for prompt in prompts], sampling.max_new_tokens, way):
            chosen = [prompts[each] for each in batch]
            for place, ended in _Batch(model, head(), chosen, sampling, seed, way, vocab_size).run():
                answers[batch[place]] = ended
                on_answer(batch[place], ended)
            on_batch(sum(len(answer.token_ids) for each in batch if (answer := answers[each]) is not None))
    return [answer for answer in answers if answer is not None]


def batches(lengths: Sequence[int], max_new_tokens: int, way: Way) -> Iterator[list[int]]:
    """Which prompts are written together: like lengths, the longest first, so that no memory is lacking later on."""
    order = sorted(range(len(lengths)), key=lambda each: (-lengths[each], each))
    at = 0
    while at < len(order):
        most = max(1, BATCH_TOKENS // (lengths[order[at]] + max_new_tokens))
        count = min(most, MAX_BATCH) if way == "padded" else 1
        yield order[at : at + count]
        at += count


def trial(model: PreTrainedModel, text: np.ndarray) -> Way:
    """How the model may be asked. text: int32 [any], what the trial's texts are made of; its weights may be any."""
    with torch.no_grad(), _writing(model):
        ids = torch.from_numpy(np.resize(text, TRIAL_TOKENS).astype(np.int64))[None].to(model.device)
        whole = _hidden(model, ids)[0]
        ways: tuple[Way, ...] = ("padded", "alone")
        for way in ways:
            if not _apart(_stepwise(model, ids, way == "padded"), whole):
                return way
    return "whole"


def _stepwise(model: PreTrainedModel, ids: Tensor, padded: bool) -> Tensor | None:
    """Hidden states of the trial's text [n - cut + 1, D], from its prompt's last on; None where it does not run."""
    prompts = [ids[0, :TRIAL_CUT], ids[0]] if padded else [ids[0, :TRIAL_CUT]]
    try:
        states = _States(model, prompts, padded=padded)
        rows = [states.hidden[0]]
        for number, token in enumerate(ids[0, TRIAL_CUT:]):
            if number == TRIAL_KEPT:
                states.keep(torch.zeros(1, dtype=torch.int64, device=model.device))
            states.step(token.expand(len(states.hidden)))
            rows.append(states.hidden[0])
    except Exception as err:
        # Any model's code, which may raise anything.
        if is_of_others(err):
            raise
        return None
    return torch.stack(rows)


def _apart(ours: Tensor | None, whole: Tensor) -> bool:
    if ours is None:
        return True
    own = whole[TRIAL_CUT - 1 :].double()
    errors = (ours.double() - own).norm(dim=1) / own.norm(dim=1).clamp_min(1e-30)
    # By the median of a third: a lost state shows in each, a token that rounding sends to another expert in none.
    worst = max(float(part.median()) for part in errors.tensor_split(3))
    return not worst <= ROW_ERROR.get(whole.dtype, 1e-3)


class _States:
    """A batch of texts that grow by a token a step, with the key-value cache of what was read; hidden: [B, D].

    padded: the model is told which tokens are padding and where each one stands, also where none is padding, so that
    every batch goes the way that was tried; otherwise it counts by itself, and takes one text
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Tensor], *, padded: bool) -> None:
        self._model = model
        lengths = torch.tensor([len(ids) for ids in prompts], device=model.device)
        longest = int(lengths.max())
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64, device=model.device)
        for row, prompt in zip(ids, prompts, strict=True):
            row[longest - len(prompt) :] = prompt
        at = torch.arange(longest, device=model.device) - (longest - lengths)[:, None]
        self._mask = at >= 0 if padded else None
        self._position = lengths
        self._past: dict[str, Any] = {}
        self.hidden = self._read(ids, at.clamp_min(0))

    def step(self, ids: Tensor) -> None:
        """The next token of every text, int64 [B]."""
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=True)
        self.hidden = self._read(ids[:, None], self._position[:, None])
        self._position = self._position + 1

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the texts only: int64 [any], in order."""
        self._past = {name: _rows_of(kept, rows) for name, kept in self._past.items()}
        self._position, self.hidden = self._position[rows], self.hidden[rows]
        self._mask = None if self._mask is None else self._mask[rows]

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The last hidden state of each text [B, D], its cache kept."""
        masked = {} if self._mask is None else {"attention_mask": self._mask.long(), "position_ids": positions}
        output = backbone(self._model)(input_ids=ids, use_cache=True, **masked, **self._past)
        name = next(name for name in CACHES if output.get(name) is not None)
        self._past = {name: output[name]}
        if name == "cache_params":
            self._mask = None  # nothing of the padding is in a state, and a mask would count for the new token
        last: Tensor = output.last_hidden_state[:, -1]
        return last


def _rows_of(kept: Any, rows: Tensor) -> Any:
    """Of a cache, or of tensors [B, ...] in lists: what belongs to some of the texts."""
    if isinstance(kept, Tensor):
        return kept[rows]
    if isinstance(kept, list | tuple):
        return [_rows_of(each, rows) for each in kept]
    kept.reorder_cache(rows)  # not batch_select_indices, which layers without attention lack
    return kept


class _Whole:
    """As _States, without a cache: every step reads the whole text again. For one text."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Tensor]) -> None:
        self._model, (self._ids,) = model, prompts
        self.hidden = _hidden(model, self._ids[None])[:, -1]

    def step(self, ids: Tensor) -> None:
        self._ids = torch.cat([self._ids, ids])
        self.hidden = _hidden(self._model, self._ids[None])[:, -1]

    def keep(self, rows: Tensor) -> None:
        raise AssertionError("there is one text")


def _hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    found: Tensor = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    return found


class _Batch:
    """Answers to prompts that are written together."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        way: Way,
        vocab_size: int | None,
    ) -> None:
        self._head, self._prompts, self._sampling, self._seed = head, prompts, sampling, seed
        self._vocab_size = vocab_size or len(head.weight)
        self._device = model.device
        texts = [torch.from_numpy(prompt.token_ids.astype(np.int64)).to(model.device) for prompt in prompts]
        self._states = _Whole(model, texts) if way == "whole" else _States(model, texts, padded=way == "padded")
        self._steps: list[tuple[Tensor, Picked]] = []
        self._written = [np.zeros(0, kind) for kind in (np.int64, np.int32, np.float32, np.float32)]

    def run(self) -> Iterator[tuple[int, Answer]]:
        """The answers with the places of their prompts, each as soon as it has ended."""
        stops = torch.tensor(sorted(self._sampling.stop_ids), dtype=torch.int64, device=self._device)
        keys = torch.tensor([prompt.key for prompt in self._prompts], dtype=torch.int64)
        rows = torch.arange(len(self._prompts), device=self._device)
        alive = torch.ones_like(rows, dtype=torch.bool)
        picked: Picked | None = None
        for position in range(self._sampling.max_new_tokens):
            if picked is not None:
                self._states.step(picked.ids)
            numbers = uniform(keys[rows.cpu()], 1, mixed_seed(self._seed, position))[:, 0]
            hidden = self._states.hidden.to(self._head.weight.dtype)
            picked = pick(self._head.logits(hidden, self._vocab_size), numbers, self._sampling)
            self._steps.append((rows.where(alive, -1), picked))
            before, alive = alive, alive & ~torch.isin(picked.ids, stops)
            living = int(alive.sum())
            if living < int(before.sum()):
                yield from self._answers(rows[before & ~alive])
            if not living:
                return
            if 2 * living <= len(rows) and len(rows) > 1:  # the others are computed for nothing
                kept = alive.nonzero()[:, 0]
                self._states.keep(kept)
                rows, alive = rows[kept], alive[kept]
                picked = Picked(picked.ids[kept], picked.logprobs[kept], picked.entropies[kept])
        yield from self._answers(rows[alive])

    def _answers(self, places: Tensor) -> Iterator[tuple[int, Answer]]:
        """Of some prompts, from the tokens that were written so far."""
        if self._steps:
            tokens = [(rows, each.ids, each.logprobs, each.entropies) for rows, each in self._steps]
            new = [torch.cat(parts).cpu().numpy() for parts in zip(*tokens, strict=True)]
            pairs = zip(self._written, new, strict=True)
            self._written = [np.concatenate([old, more.astype(old.dtype)]) for old, more in pairs]
            self._steps.clear()
        rows, ids, logprobs, entropies = self._written
        for place in places.tolist():
            mine = np.flatnonzero(rows == place)
            ended = int(ids[mine[-1]]) in self._sampling.stop_ids
            answer = Answer(token_ids=ids[mine], logprobs=logprobs[mine], entropies=entropies[mine], ended=ended)
            yield place, answer


@contextmanager
def _writing(model: PreTrainedModel) -> Iterator[None]:
    """The model as it answers: no dropout, nothing kept for gradients, an attention that knows a key-value cache."""
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    if attention == PACKED:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if attention == PACKED:
            model.set_attn_implementation(attention)
        model.train(training)
