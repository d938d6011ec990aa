"""Answers against transformers' own generation, and what they depend on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.families import make_family
from tests.models import make_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kdpipe.stages.models.head import Head
from kdpipe.stages.rollout.decode import Way, batches, decode, trial
from kdpipe.stages.rollout.sampling import Sampling
from kdpipe.stages.rollout.writer import Answer, Prompt

GREEDY = Sampling(temperature=0.0, max_new_tokens=12, stop_ids=frozenset({7, 9}))
LENGTHS = (5, 11, 3, 11, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return loaded("llama", tmp_path_factory.mktemp("model"))


def loaded(kind: str, folder: Path) -> PreTrainedModel:
    """A tiny model whose distributions are not flat, so that its answers differ."""
    found = AutoModelForCausalLM.from_pretrained(make_model(kind, folder), dtype=torch.float32).eval()
    with torch.no_grad():
        found.get_output_embeddings().weight.mul_(8.0)
    return found


def head_of(model: PreTrainedModel) -> Head:
    return Head(weight=model.get_output_embeddings().weight)


def prompts(seed: int = 0) -> list[Prompt]:
    numbers = np.random.default_rng(seed)
    return [
        Prompt(key=number, token_ids=numbers.integers(20, 250, length).astype(np.int32))
        for number, length in enumerate(LENGTHS)
    ]


def answers(model: PreTrainedModel, asked: list[Prompt], sampling: Sampling, way: Way = "padded", seed: int = 0):  # type: ignore[no-untyped-def]
    return decode(model, lambda: head_of(model), asked, sampling, seed, way=way)


def ids(found: list[Answer]) -> list[list[int]]:
    return [answer.token_ids.tolist() for answer in found]


@pytest.mark.parametrize("way", ["padded", "alone", "whole"])
def test_greedy_answers_are_those_of_transformers(model: PreTrainedModel, way: Way) -> None:
    found = answers(model, prompts(), GREEDY, way)
    for prompt, answer in zip(prompts(), found, strict=True):
        text = torch.from_numpy(prompt.token_ids.astype(np.int64))[None]
        own = model.generate(text, do_sample=False, max_new_tokens=12, eos_token_id=[7, 9], pad_token_id=0)
        assert answer.token_ids.tolist() == own[0, text.shape[1] :].tolist()
        assert answer.ended == (answer.token_ids[-1] in (7, 9))


WAYS: dict[str, Way] = {
    "qwen3": "padded",
    "gemma2": "padded",
    "mamba": "padded",  # a state, and no positions
    "rwkv": "alone",
    "bart": "alone",
    "recurrent_gemma": "whole",  # its state is out of reach
}


@pytest.mark.parametrize(("family", "expected"), WAYS.items())
def test_a_model_is_asked_in_a_way_that_gives_its_own_answers(family: str, expected: Way, tmp_path: Path) -> None:
    make_family(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    way = trial(model, np.arange(20, 60))
    assert way == expected
    assert ids(answers(model, prompts(), GREEDY, way)) == ids(answers(model, prompts(), GREEDY, "whole"))


def test_log_probabilities_are_those_of_a_whole_forward(model: PreTrainedModel) -> None:
    sampling = Sampling(temperature=0.7, max_new_tokens=9)
    for prompt, answer in zip(prompts(), answers(model, prompts(), sampling), strict=True):
        text = torch.from_numpy(np.concatenate([prompt.token_ids, answer.token_ids]).astype(np.int64))
        logits = model(text[None]).logits[0, len(prompt.token_ids) - 1 : -1]
        own = (logits / 0.7).log_softmax(-1).gather(-1, text[len(prompt.token_ids) :, None])[:, 0]
        assert np.allclose(answer.logprobs, own.detach().numpy(), atol=2e-5)


def test_an_answer_depends_on_its_key_and_the_seed_and_not_on_its_neighbours(model: PreTrainedModel) -> None:
    sampling = Sampling(max_new_tokens=10)
    together = ids(answers(model, prompts(), sampling))
    assert together == [ids(answers(model, [prompt], sampling))[0] for prompt in prompts()]
    assert together != ids(answers(model, prompts(), sampling, seed=1))
    others = [Prompt(key=prompt.key + 100, token_ids=prompt.token_ids) for prompt in prompts()]
    assert together != ids(answers(model, others, sampling))


def test_an_answer_that_is_cut_has_no_end_that_it_did_not_write(model: PreTrainedModel) -> None:
    stops = frozenset(range(20, 250))
    (ended, *_) = answers(model, prompts(), Sampling(max_new_tokens=4, stop_ids=stops))
    assert (ended.ended, len(ended.token_ids)) == (True, 1)
    (cut, *_) = answers(model, prompts(), Sampling(max_new_tokens=4))
    assert (cut.ended, len(cut.token_ids)) == (False, 4)


def test_rows_that_have_ended_are_not_computed_further(model: PreTrainedModel) -> None:
    """Answers of very different lengths are the same as one by one."""
    sampling = Sampling(max_new_tokens=40, stop_ids=frozenset(range(0, 250, 12)))
    many = [Prompt(key=number, token_ids=prompts()[number % 5].token_ids) for number in range(20)]
    found = answers(model, many, sampling)
    assert len({len(answer.token_ids) for answer in found}) > 4
    assert ids(found) == [ids(answers(model, [prompt], sampling))[0] for prompt in many]


@pytest.mark.parametrize("longest", range(1, 9))
def test_each_answer_is_told_of_once_as_soon_as_it_has_ended(model: PreTrainedModel, longest: int) -> None:
    """Also where some end with the last token that is allowed, and others are cut there."""
    sampling = Sampling(max_new_tokens=longest, stop_ids=frozenset(range(0, 250, 4)))
    many = [Prompt(key=number, token_ids=prompts()[number % 5].token_ids) for number in range(20)]
    told: list[tuple[int, Answer]] = []
    head = head_of(model)
    found = decode(model, lambda: head, many, sampling, 0, on_answer=lambda *each: told.append(each))
    assert sorted(place for place, _ in told) == list(range(20))
    assert all(found[place] is answer for place, answer in told)
    lengths = [len(answer.token_ids) for _, answer in told]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > min(longest, 4) // 2
    assert ids(found) == [ids(answers(model, [prompt], sampling))[0] for prompt in many]


def test_batches_hold_no_more_than_the_memory_that_was_meant() -> None:
    lengths = [10, 30_000, 20, 40_000, 10]
    found = list(batches(lengths, 1000, "padded"))
    assert sorted(each for batch in found for each in batch) == [0, 1, 2, 3, 4]
    assert found[0] == [3]
    assert list(batches(lengths, 1000, "alone")) == [[3], [1], [2], [0], [4]]


SMALL = {
    "vocab_size": 304,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 24,
    "mamba_d_state": 8,
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1},
    "bamba": {"attn_layer_indices": [1], "mamba_n_groups": 1},
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_model_of_states_and_attention_writes_as_in_whole_forwards(family: str) -> None:
    """Defects: it failed where an answer ended before the others, for layers without attention had no
    batch_select_indices; prompts of one length went without the positions that the trial had used."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL, **HYBRIDS[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
        for name, weight in model.named_parameters():
            if "self_attn" in name:
                weight.mul_(20.0)
    assert trial(model, np.arange(20, 60)) == "padded"
    sampling = Sampling(max_new_tokens=12, stop_ids=frozenset(range(0, 300, 6)))
    same_length = [Prompt(key=each.key, token_ids=np.resize(each.token_ids, 9)) for each in prompts()]
    for asked in (prompts(), same_length):
        found, own = answers(model, asked, sampling), answers(model, asked, sampling, "whole")
        assert len({len(answer.token_ids) for answer in found}) > 1
        assert ids(found) == ids(own)
        for one, other in zip(found, own, strict=True):
            assert np.allclose(one.logprobs, other.logprobs, atol=1e-4)
