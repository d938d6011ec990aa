"""Local: a model folder that writes answers in this process, on a CPU or one GPU.

Before it writes it is tried on a text of its prompts: that hidden states, lm_head and formula give the model's own
logits, that no token sees those after it, and in which way it may be asked (decode.trial).
Cost: a few forwards over a short text; then those of the answers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdpipe.manifests.errors import TeacherError, is_of_others
from kdpipe.stages.models.backbone import hidden_states
from kdpipe.stages.models.folder import ModelFolder, in_one_line
from kdpipe.stages.models.formula import logit_formula
from kdpipe.stages.models.head import Head
from kdpipe.stages.models.vocabulary import real_vocab_size
from kdpipe.stages.rollout.decode import Way, batches, decode, trial
from kdpipe.stages.rollout.sampling import Sampling
from kdpipe.stages.rollout.writer import Answer, Prompt

TRIED_TOKENS = 24
BEGINNING = 16
ROW_ERROR = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Relative, of rows computed with and without the tokens after them."""
NOTES: dict[Way, str] = {
    "padded": "",
    "alone": "answers are written one by one: in a padded batch this model gives others",
    "whole": "answers are written one by one, each token by a forward over the whole text: this model loses something "
    "between a prompt and its next token",
}


class LocalWriter:
    """Writer: answers of a causal LM in this process; the bits of an answer depend on what is written with it.

    way: how the model is asked
    notes: what the user should know of that
    """

    def __init__(
        self,
        folder: ModelFolder,
        *,
        dtype: torch.dtype,
        device: torch.device,
        text: np.ndarray,
        on_answers: Callable[[int, int], None] = lambda num_answers, num_tokens: None,
    ) -> None:
        """Load the model and try it.

        text: int32 [any], ids of prompts
        on_answers: told of answers, and of the tokens in them, as they are finished
        Raises TeacherError for one that cannot write; the folder's error class for what is wrong with its files.
        """
        self._folder, self._on_answers = folder, on_answers
        self._model = folder.load(dtype, device).eval().requires_grad_(False)
        formula, layer = logit_formula(folder.config), self._model.get_output_embeddings()
        bias = getattr(layer, "bias", None)
        self._head = Head(weight=layer.weight, bias=bias, softcap=formula.softcap, scale=formula.scale)
        self._vocab_size = real_vocab_size(folder.path, folder.tokenizer, len(layer.weight))
        self._require_own(text)
        self.way = trial(self._model, text)
        self.notes = [NOTES[self.way]] if NOTES[self.way] else []

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> list[Answer]:
        """One answer a prompt, in order."""
        found: dict[int, Answer] = {}
        for batch in batches([len(prompt.token_ids) for prompt in prompts], sampling.max_new_tokens, self.way):
            written = decode(
                self._model,
                lambda: self._head,
                [prompts[each] for each in batch],
                sampling,
                seed,
                way=self.way,
                vocab_size=self._vocab_size,
            )
            found.update(zip(batch, written, strict=True))
            self._on_answers(len(batch), sum(len(answer.token_ids) for answer in written))
        return [found[number] for number in range(len(prompts))]

    def close(self) -> None:
        """There is nothing to end."""

    @torch.no_grad()
    def _require_own(self, text: np.ndarray) -> None:
        ids = torch.from_numpy(np.resize(text, TRIED_TOKENS).astype(np.int64))[None].to(self._model.device)
        hidden, logits = self._forward(ids)
        if not bool(torch.isfinite(hidden).all() and torch.isfinite(logits).all()):
            raise self._refused(
                f"its logits are not finite in {self._head.dtype}; are its weights? Try another --dtype"
            )
        error = self._head.error(hidden.to(self._head.weight.dtype), logits)
        if not error <= self._head.allowed_error:
            raise self._refused(
                f"logits from hidden states and lm_head differ from the model's own by {error:.1e} (allowed "
                f"{self._head.allowed_error:.1e}): it does something between them that kdpipe does not know"
            )
        begins = self._forward(ids[:, :BEGINNING])[0].double()
        apart = (hidden[:BEGINNING].double() - begins).norm(dim=1) / begins.norm(dim=1).clamp_min(1e-30)
        if not float(apart.median()) <= ROW_ERROR.get(hidden.dtype, 1e-3):
            raise self._refused(
                "a token sees the tokens after it: not a causal LM as configured; for a model of encoders set "
                "is_decoder to true in its config.json"
            )

    def _forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Head inputs [n, D] and the model's own logits [n, V] of one text [1, n]."""
        model: Any = self._model
        with hidden_states(model, ids.shape[1]) as states:
            try:
                logits = model(input_ids=ids, use_cache=False).logits
            except Exception as err:
                # Any model's code, which may raise anything.
                if is_of_others(err):
                    raise
                raise self._refused(f"it does not run on token ids alone: {in_one_line(err)}") from err
        if len(states) != 1 or states[0].shape[:2] != ids.shape:
            raise self._refused("it does not make its logits from one hidden state a token")
        return states[0][0], logits[0]

    def _refused(self, why: str) -> TeacherError:
        model: PreTrainedModel = self._model
        return TeacherError(f"{type(model).__name__} cannot write answers: {why}", where=self._folder.path)
