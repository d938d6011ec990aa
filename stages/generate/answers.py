"""Answers: what a model wrote as a record of a data file, and whether reading the record gives the ids it wrote.

A record has the prompt's own form: `messages` (and `tools`) with the answer as their last turn, or `prompt` and
`completion` where the tokenizer has no chat template. `finish_reason` is "stop", or "length" where the answer was cut:
then no end of it is learnt. `kdpipe` says where it comes from.
Invariant: the text is that of the ids that were written, less the stop token. A template may show it otherwise, so each
record is read again as extract reads it, and `read_again` says what comes of that: "same", "otherwise", or why it is
left out.
Cost: about 1 ms an answer.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.prepare.columns import CUT, PROVENANCE
from kdpipe.stages.prepare.forms import Chat, Pair
from kdpipe.stages.prepare.rendered import inline_thought
from kdpipe.stages.prepare.samples import Asked
from kdpipe.stages.prepare.sources import RawRecord
from kdpipe.stages.prepare.work import Preparing
from kdpipe.stages.rollout.writer import Answer

SAME, OTHERWISE = "same", "otherwise"
UNFINISHED = "\ufffd"
"""What the bytes of a character that is not whole become."""
LONGEST = 1 << 31

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reread:
    """What comes of a record: the verdict, and the kinds of incident it has."""

    verdict: str
    kinds: frozenset[str]


class Answers:
    """Makes records of answers, for one tokenizer.

    stop_ids: tokens at which an answer ends, beside the tokenizer's end of text
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._preparing = Preparing(tokenizer, DataSpec(max_length=LONGEST), stop_ids)

    def record(self, asked: Asked, answer: Answer, *, source: str, number: int, key: int) -> Record:
        """One answer to a prompt. source: the name of its file; number: which of the prompt's answers, from 0"""
        ids = np.concatenate([asked.sample.token_ids, answer.token_ids])
        finish = "stop" if answer.ended else "length"
        found = [
            (record, self._read(record, ids)) for record in self._ways(asked.form, self._text(asked, answer), finish)
        ]
        record, again = min(found, key=_badness)
        provenance = {
            "source": source,
            "line": asked.sample.line,
            "number": number,
            "key": key,
            "num_tokens": len(answer.token_ids),
            "mean_logprob": round(float(answer.logprobs.mean(dtype=np.float64)), 6),
            "read_again": again.verdict,
        }
        return {**record, PROVENANCE: provenance}

    def _text(self, asked: Asked, answer: Answer) -> str:
        """The answer's text as it stands behind its prompt: some tokenizers drop a blank at a text's beginning."""
        written = answer.token_ids[:-1] if answer.ended else answer.token_ids
        before = self._decoded(asked.sample.token_ids)
        while True:
            whole = self._decoded(np.concatenate([asked.sample.token_ids, written]))
            text = whole[len(before) :] if whole.startswith(before) else self._decoded(written)
            if answer.ended or not text.endswith(UNFINISHED) or not len(written):
                return text
            written = written[:-1]

    def _decoded(self, ids: np.ndarray) -> str:
        text: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _ways(self, form: Chat | Pair, text: str, finish: str) -> Iterator[Record]:
        """The record in the ways it may be written: a thought within the answer, or beside it."""
        if isinstance(form, Pair) and not self._tokenizer.chat_template:
            yield {"prompt": form.prompt + form.glue, "completion": text, CUT: finish}
            return
        chat = form.chat() if isinstance(form, Pair) else form
        messages = [
            {**message, "weight": 0} if index in chat.unsupervised else message
            for index, message in enumerate(chat.messages)
        ]
        thought, said = inline_thought(text)
        ways = [{"content": text}]
        if thought:
            ways.append({"content": said.lstrip("\n"), "reasoning_content": thought.strip("\n")})
        for way in ways:
            record: Record = {"messages": [*messages, {"role": "assistant", **way}]}
            yield record | ({"tools": chat.tools} if chat.tools else {}) | {CUT: finish}

    def _read(self, record: Record, ids: np.ndarray) -> _Reread:
        raw = RawRecord(source="answer", line=1, place="answer", fields=record)
        (outcome,) = self._preparing([raw]).outcomes
        kinds = frozenset(incident.kind for incident in outcome.incidents)
        if outcome.sample is None:
            return _Reread(verdict=outcome.incidents[-1].kind, kinds=kinds)
        end = int(np.flatnonzero(outcome.sample.supervised)[-1]) + 1
        is_same = np.array_equal(outcome.sample.token_ids[:end], ids)
        return _Reread(verdict=SAME if is_same else OTHERWISE, kinds=kinds)


def _badness(found: tuple[Record, _Reread]) -> tuple[bool, bool, bool]:
    again = found[1]
    return again.verdict != SAME, again.verdict != OTHERWISE, "thought_left_out" in again.kinds
