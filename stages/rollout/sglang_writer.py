"""The writer in SGLang: answers by an engine in a process of its own, whose weights follow a trainer's.

    write     prompts --ids--> SGLang --ids, log-probabilities--> answers
    update    the trainer's tensors -> the engine, through shared memory (stages/sglang/update.py)
    logprobs  of a fixed text, by which the engine is compared with the trainer (probe.py)

Only the stop ids of the sampling end an answer: where SGLang stops at an end of text of the model's own, it is asked to
go on from there. Every answer bears the version of the weights that wrote it, which must be that of the last update.
What repeats: greedy answers do, but for rounding. Drawn ones repeat by seed and key where the engine is
`deterministic`; else SGLang draws from a generator of its own, and the same seed gives other answers each time.
"""

# Shapes: n tokens of a prompt or text, m of an answer.

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.errors import CheckFailed, ConfigError
from kdpipe.manifests.specs import Device, Dtype
from kdpipe.stages.draws import mixed_seed
from kdpipe.stages.models.context import context_of
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.vocabulary import real_vocab_size
from kdpipe.stages.rollout.sampling import Sampling
from kdpipe.stages.rollout.writer import Answer, Prompt
from kdpipe.stages.sglang.arguments import server_arguments
from kdpipe.stages.sglang.process import SglangProcess
from kdpipe.stages.sglang.update import UpdateReport, Updates
from kdpipe.stages.sglang.version import sglang_version
from kdpipe.stages.sglang.weights import LOADER
from kdpipe.stages.sglang.writing import FOLDER_WEIGHTS, Score, Write, Written

ARGUMENTS = {"custom_weight_loader": [LOADER], "weight_version": FOLDER_WEIGHTS}
SEED_MASK = (1 << 63) - 1
"""SGLang takes seeds as int64 that are not negative."""


class SglangWriter:
    """Writer over sglang.Engine in a process of its own, started by the first use, with the weights of its folder.

    notes: what it has to say to whoever watches, oldest first; a reader takes them out
    """

    def __init__(
        self,
        folder: ModelFolder,
        *,
        dtype: Dtype,
        device: Device,
        options: EngineOptions,
        vocab_size: int | None = None,
    ) -> None:
        """Nothing is started yet. vocab_size: tokens that may be written; None: those that its tokenizer has.

        Raises ConfigError for a version or options that cannot be.
        """
        sglang_version()
        _check_options(options)
        context = context_of(folder.config)
        arguments = server_arguments(
            folder.place, dtype, context.tokens if context else None, device, options, ARGUMENTS
        )
        self.process = SglangProcess(folder.base.path, arguments, device, options)
        self.process.advice = "the last checkpoint is kept, run the same command again"
        self.notes: list[str] = []
        self._options = options
        self._barred = _padding(folder, vocab_size)
        self._updates = Updates(self.process, dtype=dtype, num_ranks=options.tp, timeout_s=options.timeout_s)
        if not options.deterministic:
            self.notes.append(
                "SGLang draws from a generator of its own: with the same seed other answers are written each time"
            )

    @property
    def version(self) -> int | None:
        """Of the weights that the engine has; None for those of its folder."""
        return self._updates.version

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> list[Answer]:
        """One answer a prompt, in order; see Writer.write. Entropies are empty.

        Raises CheckFailed for answers of other weights than those of the last update, or that are not numbers,
        EngineError where SGLang is gone.
        """
        self._require_whole()
        answers = [_Growing(prompt, sampling) for prompt in prompts]
        going = list(range(len(prompts)))
        while going:
            number = self.process.next_number()
            asked = [
                Write(
                    number=number,
                    place=place,
                    token_ids=answers[place].text,
                    sampling=self._parameters(answers[place], seed),
                )
                for place in going
            ]
            for written in self._exchange(asked, f"{len(going)} prompts"):
                answers[written.place].take(written)
            going = [place for place in going if not answers[place].is_done]
        return [answer.answer() for answer in answers]

    def update(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: int, changed_only: bool = True
    ) -> UpdateReport:
        """Make the engine's weights those of `version`; see Updates.send."""
        return self._updates.send(tensors, version, changed_only=changed_only)

    def logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """Log-probability of each token but the first after those before it: int32 [n] -> float32 [n-1].

        Raises CheckFailed, EngineError, as `write` does.
        """
        self._require_whole()
        message = Score(number=self.process.next_number(), token_ids=token_ids)
        (scored,) = self._exchange([message], "the probe")
        if not np.array_equal(scored.token_ids, token_ids[1:]):
            raise CheckFailed("the engine scored other tokens than it was given", where="the probe")
        found: np.ndarray = scored.logprobs
        return found

    def close(self) -> None:
        """End SGLang and everything it started. Running it twice is fine."""
        self.process.end()

    def _exchange(self, messages: Sequence[Write | Score], who: str) -> Iterator[Any]:
        expected = FOLDER_WEIGHTS if self.version is None else str(self.version)
        for reply in self.process.exchange(messages, self._options.timeout_s, who):
            if reply.version != expected:
                raise CheckFailed(
                    f"the engine answers with weights '{reply.version}', expected '{expected}'", where=who
                )
            if not np.isfinite(reply.logprobs).all():
                raise CheckFailed("the engine's log-probabilities are not numbers", where=who)
            yield reply

    def _require_whole(self) -> None:
        if self._updates.broken:
            raise CheckFailed(
                f"the engine's weights are of no one version: {self._updates.broken}; update it again", where="SGLang"
            )

    def _parameters(self, answer: "_Growing", seed: int) -> dict[str, Any]:
        sampling = answer.sampling
        parameters = {
            "max_new_tokens": answer.num_left,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop_token_ids": sorted(sampling.stop_ids),
        }
        if self._options.deterministic:
            parameters["sampling_seed"] = mixed_seed(seed, answer.prompt.key) & SEED_MASK
        if self._barred:
            parameters["logit_bias"] = self._barred
        return parameters


class _Growing:
    """An answer that is being written."""

    def __init__(self, prompt: Prompt, sampling: Sampling) -> None:
        self.prompt, self.sampling = prompt, sampling
        self._ids: list[np.ndarray] = [np.zeros(0, np.int32)]
        self._logprobs: list[np.ndarray] = [np.zeros(0, np.float32)]
        self.is_done = False

    @property
    def text(self) -> np.ndarray:
        """int32: the prompt and what was written so far."""
        return np.concatenate([self.prompt.token_ids.astype(np.int32), *self._ids])

    @property
    def num_left(self) -> int:
        return self.sampling.max_new_tokens - sum(map(len, self._ids))

    def take(self, written: Written) -> None:
        """What SGLang wrote next. Raises CheckFailed for what is not an answer to it."""
        who = f"prompt {written.place}"
        if written.reason not in ("stop", "length") or not len(written.token_ids):
            raise CheckFailed(
                f"SGLang wrote {len(written.token_ids)} tokens and ended with '{written.reason}'", where=who
            )
        if not np.array_equal(written.scored_ids, written.token_ids) or len(written.token_ids) > self.num_left:
            raise CheckFailed("SGLang's tokens and its log-probabilities are not of one answer", where=who)
        self._ids.append(written.token_ids)
        self._logprobs.append(written.logprobs)
        # "stop" at a token that is none of ours is an end of text of the model's own: the answer goes on.
        self.is_done = written.reason == "length" or self._has_ended or self.num_left == 0

    @property
    def _has_ended(self) -> bool:
        return int(self._ids[-1][-1]) in self.sampling.stop_ids

    def answer(self) -> Answer:
        return Answer(
            token_ids=np.concatenate(self._ids),
            logprobs=np.concatenate(self._logprobs),
            entropies=np.zeros(0, np.float32),
            ended=self._has_ended,
        )


def _check_options(options: EngineOptions) -> None:
    """Raises ConfigError for what an engine whose weights change cannot have."""
    if options.dp > 1:
        raise ConfigError("SGLang takes new weights with one copy of the model only; use --tp", where="--dp")
    if options.quantization is not None:
        raise ConfigError("weights that change at every step are not quantised", where="--quantization")


def _padding(folder: ModelFolder, vocab_size: int | None) -> dict[str, float]:
    """A bias that bars the ids that no token has, as SGLang takes it."""
    rows = folder.config.get_text_config().vocab_size
    known = real_vocab_size(folder.path, folder.tokenizer, rows, folder.error) if vocab_size is None else vocab_size
    return {str(token_id): -np.inf for token_id in range(known, rows)}
