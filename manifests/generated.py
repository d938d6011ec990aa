"""Generated: what is said beside a file of answers of how they were written, and whether a run may go on with it.

Invariant: answers of one file were written with one model, sampling and seed to one set of prompts.
"""

from typing import Annotated, Literal

from pydantic import Field

from kdpipe.manifests.made_with import MadeWith
from kdpipe.manifests.record import Record
from kdpipe.manifests.specs import Device, Dtype

SIDECAR_ENDING = ".json"
"""answers.jsonl -> answers.jsonl.json"""

Count = Annotated[int, Field(ge=0)]


class SamplingRecord(Record):
    """How answers were drawn; see stages/rollout/sampling.py."""

    max_new_tokens: Count
    temperature: float
    top_p: float
    top_k: Count
    samples_per_prompt: Count
    stop_ids: tuple[int, ...]
    """Tokens that end an answer."""


class WritingRecord(Record):
    """All that decides the answers."""

    model: str
    """sha256 of its config and weights, and of its own code if that ran."""
    tokenizer: str
    """sha256 of the tokenizer's definition."""
    template: str
    """sha256 of the chat template."""
    prompts: str
    """sha256 over the data files' xxh3-128, in order."""
    max_length: Count
    bad_records: str
    strict: bool
    sampling: SamplingRecord
    seed: int
    dtype: Dtype
    device: Device
    engine: str
    version: str
    """Of what wrote them."""
    arguments: dict[str, str]
    """What else was asked of the engine that decides the answers."""


class GeneratedRecord(Record):
    """ANSWERS.jsonl.json, written before the first answer."""

    format_version: Literal[1] = 1
    writing: WritingRecord
    num_prompts: Count
    num_answers: Count
    counts: dict[str, int]
    """What prepare did: records read, kept, dropped and why."""
    made_with: MadeWith | None

    def difference(self, wanted: WritingRecord) -> str:
        """The first thing that another run wants otherwise, in words; "" for none."""
        there, ours = _flat(self.writing.model_dump()), _flat(wanted.model_dump())
        name = next((name for name, value in ours.items() if there[name] != value), None)
        return "" if name is None else f"{name} = {there[name]!r}, this command asks for {ours[name]!r}"


def _flat(fields: dict[str, object]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in fields.items():
        found.update(_flat(value) if isinstance(value, dict) else {name: value})
    return found
