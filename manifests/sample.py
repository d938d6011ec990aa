"""Samples: token ids and which of them are targets, made once by `prepare` and never again.

Invariant: the row stored for position t is the head input whose next token t+1 is supervised. Only `row_positions`
and `num_rows` know this shift; everybody else calls them.
"""

# Shapes: n tokens of one sample, R stored rows of it.

import hashlib
import json
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from kdpipe.manifests.errors import DataError

ID_BYTES = 16
IGNORED = -100
"""The label of a token that is left out of the cross entropy, as in torch and transformers."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """One tokenised sample.

    content_id: digest of the text it came from (`content_id`), the same under every tokenizer
    source, line: the data file as the user named it, and the line (or the 1-based record) in it
    token_ids: int32 [n]
    supervised: bool [n], True where the token is a target
    truncated: whether tokens beyond the longest allowed length were cut off
    """

    content_id: bytes
    source: str
    line: int
    token_ids: np.ndarray
    supervised: np.ndarray
    truncated: bool = False


KeptKind = Literal[
    "truncated",
    "thought_left_out",
    "tools_left_out",
    "prompt_changed",
    "no_stop_token",
    "special_token_in_text",
    "doubled_token",
    "rendered_already",
]
LeftOutKind = Literal[
    "dropped_overlong",
    "empty_completion",
    "empty_text",
    "no_supervised_token",
    "answer_changed",
    "tool_call_left_out",
    "bad_record",
]
IncidentKind = KeptKind | LeftOutKind
KEPT: frozenset[IncidentKind] = frozenset(get_args(KeptKind))
"""Kinds of incident of a record that becomes a sample all the same."""
STRICT: frozenset[IncidentKind] = frozenset({*KEPT - {"truncated"}, "answer_changed", "tool_call_left_out"})
"""Kinds that say that the text which is trained on is not what the record says; --strict makes errors of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Incident:
    """A record that did not become a sample, or not the sample that it says, and why.

    A record that is left out has one incident that says so, its last; what else is wrong with it has one of each kind.
    So records read = samples + incidents whose `dropped` is true.
    detail: counts, roles and reasons only, never the text of the data
    """

    source: str
    line: int
    kind: IncidentKind
    detail: str

    @property
    def dropped(self) -> bool:
        return self.kind not in KEPT


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleView:
    """One sample of a cache: views into the mapping.

    token_ids: int32 [n]
    supervised: bool [n]
    rows: [R, E]; row j belongs to the j-th t with supervised[t+1]. A zero-copy view, bfloat16 through ml_dtypes; a copy
        only where the cache keeps every row and the supervised ones are not adjacent.
    """

    token_ids: np.ndarray
    supervised: np.ndarray
    rows: np.ndarray


class SampleTokens(NamedTuple):
    """What is known of a sample without its rows: token_ids int32 [n], supervised bool [n].

    imitated: its targets are learnt by cross entropy too; False for an answer that the student wrote itself
    written: float32, the log-probability of each target when an older student wrote it; None for other samples. Like
        `imitated` it stays in its process
    """

    token_ids: np.ndarray
    supervised: np.ndarray
    imitated: bool = True
    written: np.ndarray | None = None

    def to_bytes(self) -> bytes:
        """Four bytes a token, for another process: an id is below 2^31, the highest bit says that it is supervised."""
        return (self.token_ids.astype(np.uint32) | self.supervised.astype(np.uint32) << np.uint32(31)).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "SampleTokens":
        words = np.frombuffer(data, np.uint32)
        return cls((words & np.uint32(2**31 - 1)).astype(np.int32), (words >> np.uint32(31)).astype(bool))


def content_id(content: object) -> bytes:
    """16 bytes of sha256 over the canonical JSON of a sample's text (messages, prompt, completion)."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:ID_BYTES]


def prompt_of(text: SampleTokens, where: object = None) -> np.ndarray:
    """The token ids that a sample's last answer follows, int32 [any], a view: what a model is given to answer anew.

    They are those before the last run of supervised tokens; all of a sample without any. That is exactly the prompt:
    the span of an assistant turn begins where the generation prompt ends (stages/prepare/turns.py), and between two
    answers stands the second one's header, which is no target. A sample that was cut within a question has the prompt
    of the answer before.
    Raises DataError, with `where`, for running text: everything in it is a target.
    """
    begins = _answers(text)
    if not len(begins):
        return text.token_ids
    if begins[-1] <= 1:  # the first token of a sample is never a target
        raise DataError(
            "there is no prompt in it, all of its tokens are targets; give prompts (docs/data.md)", where=where
        )
    return text.token_ids[: begins[-1]]


def num_answers(text: SampleTokens) -> int:
    """How many runs of supervised tokens a sample has, by `prompt_of` an answer each."""
    return len(_answers(text))


def _answers(text: SampleTokens) -> np.ndarray:
    """Where each run of supervised tokens begins."""
    targets = np.flatnonzero(text.supervised)
    return targets[np.flatnonzero(np.diff(targets, prepend=-2) > 1)]


def row_positions(supervised: np.ndarray, *, every: bool = False) -> np.ndarray:
    """Positions t [R] (int64) whose hidden state is kept: those with supervised[t+1], or all that have a next token.

    supervised  [0 0 1 1 0 1]
    positions      1 2   4        (the row at 1 predicts token 2)
    """
    if every:
        return np.arange(max(len(supervised) - 1, 0), dtype=np.int64)
    return np.flatnonzero(np.asarray(supervised)[1:]).astype(np.int64)


def num_rows(supervised: np.ndarray, *, every: bool = False) -> int:
    """How many positions `row_positions` gives, a sixth of the time."""
    return max(len(supervised) - 1, 0) if every else int(np.count_nonzero(supervised[1:]))


def is_heldout(content_ids: np.ndarray, fraction: float) -> np.ndarray:
    """Which samples are held out: bool [N], a pure function of each sample's content.

    content_ids: uint8 [N, 16]. A sample is held out when its id, read as a number in [0, 1), is below `fraction`; so
    copies of a text fall on the same side, and a larger fraction holds out a superset of a smaller one.
    """
    return _share(content_ids[:, :8]) < fraction


def is_in_subset(content_ids: np.ndarray, fraction: float) -> np.ndarray:
    """Which samples belong to a share of them: bool [N], a pure function of each sample's content.

    As `is_heldout`, by the other half of the id: which samples are held out has no part in it.
    """
    return _share(content_ids[:, 8:]) < fraction


def _share(halves: np.ndarray) -> np.ndarray:
    """Eight bytes of a digest as a number in [0, 1): uint8 [N, 8] -> float64 [N]."""
    number = np.ascontiguousarray(halves).view(">u8").reshape(-1)
    # 53 bits are exact in a float64: 64 would round the largest ids up to 1.
    return (number >> np.uint64(11)).astype(np.float64) / 2.0**53
