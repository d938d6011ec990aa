"""An answer's record, read again: the ids that were written, or it says that they are others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.stages.prepare.conftest import train_tokenizer
from tests.stages.prepare.real import REAL, Real, special_tokens
from transformers import PreTrainedTokenizerFast

from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.generate.answers import Answers
from kdpipe.stages.prepare import prepare
from kdpipe.stages.prepare.samples import Asked, prompts
from kdpipe.stages.rollout.writer import Answer

Write = Callable[[list[Any]], Path]
TOOLS = [{"type": "function", "function": {"name": "lookup", "description": "Looks it up"}}]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_jsonl(records: list[Any]) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        return path

    return write_jsonl


def ask(tokenizer: PreTrainedTokenizerFast, path: Path) -> Asked:
    [asked] = prompts([path], tokenizer, DataSpec(), on_incident=lambda incident: None)
    return asked


def written(tokenizer: PreTrainedTokenizerFast, text: str, *, ended: bool = True) -> Answer:
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    zeros = np.zeros(len(ids), np.float32)
    return Answer(token_ids=ids, logprobs=zeros - 1.5, entropies=zeros, ended=ended)


def record_of(tokenizer: PreTrainedTokenizerFast, asked: Asked, answer: Answer) -> dict[str, Any]:
    return Answers(tokenizer, ()).record(asked, answer, source="data.jsonl", number=2, key=7)


def learnt(tokenizer: PreTrainedTokenizerFast, path: Path) -> list[int]:
    """The ids that extract would have a student learn of the only record."""
    [sample] = prepare([path], tokenizer, DataSpec(), on_incident=lambda incident: None)
    return sample.token_ids[sample.supervised].tolist()


def model_of(real: Real) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(special=special_tokens(real), eos=real.eos)
    tokenizer.chat_template = real.source
    return tokenizer


@pytest.fixture
def qwen3() -> PreTrainedTokenizerFast:
    return model_of(REAL["qwen3"])


THOUGHT = "<think>\nLet me see.\n</think>\n\nIt is 2.<|im_end|>"


def test_a_thought_that_was_written_is_read_again_with_its_ids(qwen3: PreTrainedTokenizerFast, write: Write) -> None:
    asked = ask(qwen3, write([{"prompt": "1 + 1?"}]))
    answer = written(qwen3, THOUGHT)
    record = record_of(qwen3, asked, answer)
    assert record["kdpipe"]["read_again"] == "same"
    assert record["messages"][-1] == {"role": "assistant", "content": THOUGHT.removesuffix("<|im_end|>")}
    assert learnt(qwen3, write([record])) == answer.token_ids.tolist()


def test_an_answer_without_the_thought_that_a_template_adds_is_said_to_be_read_otherwise(
    qwen3: PreTrainedTokenizerFast, write: Write
) -> None:
    asked = ask(qwen3, write([{"prompt": "1 + 1?"}]))
    record = record_of(qwen3, asked, written(qwen3, "It is 2.<|im_end|>"))
    assert record["kdpipe"]["read_again"] == "otherwise"
    assert record["messages"][-1] == {"role": "assistant", "content": "It is 2."}


@pytest.mark.parametrize("name", REAL)
def test_of_every_template_the_verdict_is_true(name: str, write: Write) -> None:
    tokenizer, stop = model_of(REAL[name]), REAL[name].stops[0] if REAL[name].stops else REAL[name].eos
    asked = ask(tokenizer, write([{"prompt": "What is it?"}]))
    for text in ("Paris.", " Paris", "<think>\nHm.\n</think>\n\nParis."):
        answer = written(tokenizer, text + stop)
        record = record_of(tokenizer, asked, answer)
        [sample] = prepare([write([record])], tokenizer, DataSpec(), on_incident=lambda incident: None)
        whole = [*asked.sample.token_ids.tolist(), *answer.token_ids.tolist()]
        end = int(np.flatnonzero(sample.supervised)[-1]) + 1
        assert (sample.token_ids[:end].tolist() == whole) == (record["kdpipe"]["read_again"] == "same")


def test_a_record_keeps_what_its_prompt_has(qwen3: PreTrainedTokenizerFast, write: Write) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "A", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "not this"},
    ]
    record = record_of(
        qwen3, ask(qwen3, write([{"messages": messages, "tools": TOOLS}])), written(qwen3, "Paris.<|im_end|>")
    )
    assert record["messages"][:-1] == messages[:-1]
    assert record["tools"] == TOOLS
    assert record["finish_reason"] == "stop"
    said = record["kdpipe"]
    assert {"source", "line", "number", "key", "num_tokens", "mean_logprob", "read_again"} == said.keys()
    assert (said["source"], said["line"], said["number"], said["key"]) == ("data.jsonl", 1, 2, 7)
    assert said["mean_logprob"] == -1.5


def test_a_cut_answer_has_no_end_to_be_learnt(chatml: PreTrainedTokenizerFast, write: Write) -> None:
    asked = ask(chatml, write([{"prompt": "What is it?"}]))
    answer = written(chatml, "The capital of", ended=False)
    record = record_of(chatml, asked, answer)
    assert (record["finish_reason"], record["kdpipe"]["read_again"]) == ("length", "same")
    incidents: list[Any] = []
    [sample] = prepare([write([record])], chatml, DataSpec(strict=True), on_incident=incidents.append)
    assert sample.token_ids[sample.supervised].tolist() == answer.token_ids.tolist()
    assert incidents == []
    assert learnt(chatml, write([{**record, "finish_reason": "stop"}]))[:-1] == answer.token_ids.tolist()


def test_half_a_character_at_a_cut_is_left_out(chatml: PreTrainedTokenizerFast, write: Write) -> None:
    asked = ask(chatml, write([{"prompt": "What is it?"}]))
    whole = written(chatml, "a 蟹", ended=False)
    half = Answer(
        token_ids=whole.token_ids[:-1], logprobs=whole.logprobs[:-1], entropies=whole.entropies[:-1], ended=False
    )
    record = record_of(chatml, asked, half)
    assert record["messages"][-1]["content"] == "a "
    assert record["kdpipe"]["read_again"] == "otherwise"
    assert record["kdpipe"]["num_tokens"] == len(half.token_ids)


@pytest.mark.parametrize("ended", [True, False])
def test_a_running_prompt_and_its_completion(ended: bool, base: PreTrainedTokenizerFast, write: Write) -> None:
    asked = ask(base, write([{"instruction": "What is it?"}]))
    answer = written(base, " Paris." + "</s>" * ended, ended=ended)
    record = record_of(base, asked, answer)
    assert (record["prompt"], record["completion"]) == ("What is it?\n\n", " Paris.")
    assert learnt(base, write([record]))[-len(answer.token_ids) :] == answer.token_ids.tolist()


def test_an_answer_that_extract_leaves_out_says_why(chatml: PreTrainedTokenizerFast, write: Write) -> None:
    asked = ask(chatml, write([{"prompt": "What is it?"}]))
    for text, verdict in (
        ("<|im_end|>", "empty_completion"),
        ('[{"type": "text", "text": 3}]<|im_end|>', "bad_record"),
    ):
        assert record_of(chatml, asked, written(chatml, text))["kdpipe"]["read_again"] == verdict


def test_a_cut_completion_is_not_said_to_lack_its_end(base: PreTrainedTokenizerFast, write: Write) -> None:
    base.eos_token = None
    for reason, kinds in (("stop", ["no_stop_token"]), ("length", [])):
        incidents: list[Any] = []
        path = write([{"prompt": "a", "completion": " b", "finish_reason": reason}])
        assert len(list(prepare([path], base, DataSpec(), on_incident=incidents.append))) == 1
        assert [incident.kind for incident in incidents] == kinds
