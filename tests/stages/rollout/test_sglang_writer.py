"""Answers by the real SGLang, on CPU, against transformers; its weights follow a trainer, and updates go wrong."""

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.engines import FAULTS, engines_end
from tests.models import EXPERTS, make_model, make_tokenizer
from tests.opened import load_student, student_in
from transformers import PreTrainedModel

from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.errors import CheckFailed, ConfigError
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.rollout.probe import Probe
from kdpipe.stages.rollout.sampling import Sampling
from kdpipe.stages.rollout.sglang_writer import SglangWriter
from kdpipe.stages.rollout.writer import Answer, Prompt
from kdpipe.stages.sglang import update

pytestmark = pytest.mark.timeout(600)
VOCAB, WRITABLE = 320, 300
CPU = torch.device("cpu")
TEXT = np.random.default_rng(0).integers(3, WRITABLE, 64).astype(np.int32)
PROMPTS = [Prompt(key=number, token_ids=TEXT[number : 2 * number + 1]) for number in (0, 1, 5, 20, 31)]
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


@dataclass(frozen=True)
class Engine:
    """A writer that runs, the models whose weights it is given, and the file that says what goes wrong in it.

    folder: of the first
    own: an end of text of the model's own, in the middle of its greedy answer to PROMPTS[3]
    """

    writer: SglangWriter
    folder: ModelFolder
    first: PreTrainedModel
    second: PreTrainedModel
    fault: Path
    own: int


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("writer")
    tied = {"tie_word_embeddings": True}
    models = [
        load_student(
            make_model("qwen3", folder / f"{seed}", vocab_size=VOCAB, seed=seed, sizes=tied), torch.float32, CPU
        )
        for seed in (0, 1)
    ]
    own = generated(models[0], PROMPTS[3], 12)[4]
    models[0].config.eos_token_id = models[0].generation_config.eos_token_id = own
    models[0].save_pretrained(folder / "own")
    make_tokenizer(folder / "own", vocab_size=WRITABLE)
    with engines_end(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDPIPE_FAULT", str(folder / "fault"))
        patch.setenv("PYTHONPATH", str(FAULTS), prepend=os.pathsep)
        student = student_in(folder / "own")
        writer = SglangWriter(
            student,
            dtype="float32",
            device="cpu",
            options=EngineOptions(timeout_s=120),
        )
        try:
            yield Engine(writer, student, models[0], models[1], folder / "fault", own)
        finally:
            writer.close()


@pytest.fixture
def healthy(engine: Engine) -> Iterator[Engine]:
    """With the weights of its first model before, and whatever goes wrong mended afterwards."""
    engine.writer.update(state_of(engine.first).items(), 0, changed_only=True)
    yield engine
    engine.fault.write_text("")


def state_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """As in a checkpoint: of tied tensors the first alone."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def load_of(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A copy with other weights."""
    changed = copy.deepcopy(model)
    changed.load_state_dict(state, strict=False)
    return changed


def generated(model: PreTrainedModel, prompt: Prompt, count: int) -> list[int]:
    """Tokens that transformers writes most likely, of those that may be written, past any end of text."""
    ids = torch.from_numpy(prompt.token_ids.astype(np.int64))[None]
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=VOCAB,
        pad_token_id=0,
        suppress_tokens=list(range(WRITABLE, VOCAB)),
    )
    return written[0, ids.shape[1] :].tolist()


@torch.no_grad()
def logprobs(
    model: PreTrainedModel, ids: np.ndarray, *, temperature: float = 1.0, vocab_size: int = VOCAB
) -> np.ndarray:
    """Of each token but the first, by one whole forward."""
    rows = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :, :vocab_size].double()
    scores = (rows / temperature).log_softmax(-1)
    return scores[:-1].gather(-1, torch.from_numpy(ids[1:].astype(np.int64))[:, None])[:, 0].numpy()


def require_scored(model: PreTrainedModel, prompt: Prompt, answer: Answer, temperature: float = 1.0) -> None:
    whole = np.concatenate([prompt.token_ids, answer.token_ids])
    expected = logprobs(model, whole, temperature=temperature, vocab_size=WRITABLE)[len(prompt.token_ids) - 1 :]
    assert answer.logprobs == pytest.approx(expected, abs=1e-5)


def require_answers_of(model: PreTrainedModel, writer: SglangWriter) -> None:
    for prompt, answer in zip(PROMPTS, writer.write(PROMPTS, GREEDY, seed=0), strict=True):
        assert answer.token_ids.tolist() == generated(model, prompt, 12)
        require_scored(model, prompt, answer)
        assert (answer.ended, len(answer.entropies)) == (False, 0)


def test_greedy_answers_are_those_of_transformers_past_an_end_of_text_of_its_own(healthy: Engine) -> None:
    assert healthy.own in generated(healthy.first, PROMPTS[3], 12)[:-1]
    require_answers_of(healthy.first, healthy.writer)


def test_an_answer_ends_with_a_given_stop_token_or_has_no_end(healthy: Engine) -> None:
    whole = generated(healthy.first, PROMPTS[3], 12)
    for stop, length in ((whole[7], 1 + whole.index(whole[7])), (whole[-1], 1 + whole.index(whole[-1]))):
        sampling = Sampling(temperature=0.0, max_new_tokens=12, stop_ids=frozenset({stop, WRITABLE + 1}))
        (answer,) = healthy.writer.write([PROMPTS[3]], sampling, seed=0)
        assert (answer.token_ids.tolist(), answer.ended) == (whole[:length], True)
    (answer,) = healthy.writer.write([PROMPTS[3]], Sampling(temperature=0.0, max_new_tokens=3), seed=0)
    assert (answer.token_ids.tolist(), answer.ended) == (whole[:3], False)


def test_drawn_answers_are_scored_at_their_temperature_and_keep_to_the_vocabulary(healthy: Engine) -> None:
    prompts = [Prompt(key=number, token_ids=TEXT[:9]) for number in range(24)]
    sampling = Sampling(temperature=3.0, top_p=0.95, top_k=60, max_new_tokens=12)
    answers = healthy.writer.write(prompts, sampling, seed=0)
    assert len({answer.token_ids.tobytes() for answer in answers}) == 24
    assert max(answer.token_ids.max() for answer in answers) < WRITABLE
    for prompt, answer in zip(prompts, answers, strict=True):
        require_scored(healthy.first, prompt, answer, temperature=3.0)


def test_no_prompts_have_no_answers(healthy: Engine) -> None:
    assert healthy.writer.write([], GREEDY, seed=0) == []


def test_a_text_is_scored_as_one_forward_scores_it(healthy: Engine) -> None:
    found = healthy.writer.logprobs(TEXT)
    assert (found.dtype, len(found)) == (np.float32, len(TEXT) - 1)
    assert found == pytest.approx(logprobs(healthy.first, TEXT), abs=1e-5)


@pytest.mark.parametrize("bucket_bytes", [1, 30_000, update.BUCKET_BYTES])
def test_answers_are_those_of_the_new_weights_and_of_the_old_ones_again(
    bucket_bytes: int, healthy: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "BUCKET_BYTES", bucket_bytes)
    state = state_of(healthy.second)
    require_answers_of(healthy.first, healthy.writer)  # whose prompts are in the engine's cache from here on
    report = healthy.writer.update(state.items(), 1, changed_only=False)
    assert (report.num_tensors, report.num_bytes) == (len(state), sum(each.nbytes for each in state.values()))
    require_answers_of(healthy.second, healthy.writer)
    assert healthy.writer.version == 1
    healthy.writer.update(update.stored_tensors(healthy.folder), 2, changed_only=True)
    require_answers_of(healthy.first, healthy.writer)


def test_what_has_not_changed_is_not_sent(healthy: Engine) -> None:
    state = state_of(healthy.first)
    assert healthy.writer.update(state.items(), 1, changed_only=True).num_bytes == 0
    name = "model.layers.1.mlp.up_proj.weight"
    report = healthy.writer.update((state | {name: state[name] * 2}).items(), 2, changed_only=True)
    assert (report.num_tensors, report.num_bytes) == (1, state[name].nbytes)
    found = healthy.writer.logprobs(TEXT)
    assert np.abs(found - logprobs(healthy.first, TEXT)).max() > 1e-3


def test_tensors_are_cast_as_the_engine_computes(healthy: Engine) -> None:
    state = {name: tensor.double() for name, tensor in state_of(healthy.second).items()}
    healthy.writer.update(state.items(), 1, changed_only=True)
    assert healthy.writer.logprobs(TEXT) == pytest.approx(logprobs(healthy.second, TEXT), abs=1e-5)


def flipping(descriptor: int, data: memoryview, offset: int) -> None:
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 1
    os.pwrite(descriptor, changed, offset)


@pytest.mark.parametrize(
    ("fault", "changed_only", "message"),
    [
        ("skip", True, "no receipt of rank 0"),
        ("lose a tensor", True, "tensors were lost on the way"),
        ("ignore", False, r"\d+ parameters are not numbers after an update of all tensors, model.embed_tokens.weight"),
        ("drop a name", False, r"1 parameters are not numbers after an update of all tensors, model.norm.weight"),
    ],
)
def test_an_update_that_the_engine_did_not_take_is_an_error_and_a_whole_one_mends_it(
    fault: str, changed_only: bool, message: str, healthy: Engine
) -> None:
    state = state_of(healthy.second)
    healthy.fault.write_text(fault)
    with pytest.raises(CheckFailed, match=f"version 1 of the weights: .*{message}"):
        healthy.writer.update(state.items(), 1, changed_only=changed_only)
    require_refused_until_whole(healthy, 1)


def test_a_bit_that_changes_on_the_way_is_an_error(healthy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "write_all", flipping)
    with pytest.raises(CheckFailed, match=r"model\.embed_tokens\.weight has the digest"):
        healthy.writer.update(state_of(healthy.second).items(), 1, changed_only=True)
    monkeypatch.undo()
    require_refused_until_whole(healthy, 1)


def test_a_trainer_that_leaves_a_tensor_out_or_stops_half_way_is_noticed(healthy: Engine) -> None:
    state = state_of(healthy.second)
    *most, (name, tensor) = state.items()
    with pytest.raises(CheckFailed, match=f"1 tensors are missing, first {name}; the version before had {len(state)}"):
        healthy.writer.update(most, 1, changed_only=True)
    require_refused_until_whole(healthy, 1)
    with pytest.raises(CheckFailed, match=f"1 tensors are missing, first {name} and 1 tensors are new, first other"):
        healthy.writer.update([*most, ("other", tensor)], 3, changed_only=True)
    with pytest.raises(CheckFailed, match=f"'{name}' is given twice"):
        healthy.writer.update([*state.items(), (name, tensor)], 5, changed_only=True)
    with pytest.raises(ZeroDivisionError):
        healthy.writer.update(((name, tensor / (1 // 0)) for name, tensor in most), 6, changed_only=True)
    require_refused_until_whole(healthy, 6)


def test_a_tensor_of_another_shape_is_an_error_even_where_sglang_would_take_it(healthy: Engine) -> None:
    state = state_of(healthy.second)
    names = ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight")
    for name in names:
        for wrong in (state[name][1:], state[name][..., 1:], state[name][:1, ...], state[name][None]):
            with pytest.raises(CheckFailed, match=f"'{name}' has the shape .*, the version before "):
                healthy.writer.update((state | {name: wrong}).items(), 1, changed_only=True)
    require_refused_until_whole(healthy, 1)
    healthy.writer._updates._shapes.clear()  # as before a first update
    name = "model.layers.0.self_attn.k_proj.weight"
    with pytest.raises(CheckFailed, match="rank 0 of the engine: AssertionError"):
        healthy.writer.update((state | {name: state[name][:, 1:]}).items(), 3, changed_only=True)
    require_refused_until_whole(healthy, 3)


def require_refused_until_whole(engine: Engine, version: int) -> None:
    """No answers after an update that failed; the next one sends all tensors, and they are right again."""
    with pytest.raises(CheckFailed, match=f"the update to version {version} was not finished; update it again"):
        engine.writer.write(PROMPTS, GREEDY, seed=0)
    engine.fault.write_text("")
    state = state_of(engine.second)
    assert engine.writer.update(state.items(), version + 1, changed_only=True).num_tensors == len(state)
    require_answers_of(engine.second, engine.writer)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("ignore", "the engine answers as version 0 did: the update was skipped"),
        ("drop a name", "as no version that is remembered: the update was partial, or corrupted"),
        ("flip", "as no version that is remembered: the update was partial, or corrupted"),
    ],
)
def test_the_probe_notices_what_the_engine_computes_with(fault: str, message: str, healthy: Engine) -> None:
    probe = Probe("float32")
    assert probe.check(0, healthy.writer.logprobs(TEXT), logprobs(healthy.first, TEXT)) < 1e-10
    healthy.fault.write_text(fault)
    # As large as a step of training makes it: each weight by a thousandth.
    state = {name: tensor * 1.001 for name, tensor in state_of(healthy.first).items()}
    trained = load_of(healthy.first, state)
    healthy.writer.update(state.items(), 1, changed_only=True)
    with pytest.raises(CheckFailed, match=message):
        probe.check(1, healthy.writer.logprobs(TEXT), logprobs(trained, TEXT))
    healthy.fault.write_text("")
    healthy.writer.update(state.items(), 2, changed_only=False)
    assert probe.check(2, healthy.writer.logprobs(TEXT), logprobs(trained, TEXT)) < 1e-10


def test_answers_of_other_weights_than_the_last_update_are_refused(healthy: Engine) -> None:
    healthy.writer.update(state_of(healthy.first).items(), 7, changed_only=True)
    healthy.writer._updates.version = 8
    with pytest.raises(CheckFailed, match="5 prompts: the engine answers with weights '7', expected '8'"):
        healthy.writer.write(PROMPTS, GREEDY, seed=0)
    healthy.writer._updates.version = 7


@pytest.mark.parametrize(
    ("options", "where"), [({"dp": 2}, "--dp"), ({"quantization": "fp8"}, "--quantization"), ({"pp": 2}, "--pp")]
)
def test_an_engine_that_cannot_take_weights_is_refused_before_it_starts(
    options: dict[str, int | str], where: str, tmp_path: Path
) -> None:
    folder = student_in(make_tokenizer(make_model("llama", tmp_path, vocab_size=304)))
    with pytest.raises(ConfigError, match=where):
        SglangWriter(folder, dtype="float32", device="cpu", options=EngineOptions(**options))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPERTS)
def test_an_engine_whose_model_is_a_mixture_of_experts_follows_it(kind: str, tmp_path: Path) -> None:
    """Every weight is proved to be there; then a text is scored as transformers scores it."""
    first, second = (
        make_tokenizer(make_model(kind, tmp_path / f"{seed}", vocab_size=VOCAB, seed=seed), vocab_size=WRITABLE)
        for seed in (0, 1)
    )
    with engines_end():
        options = EngineOptions(timeout_s=120)
        writer = SglangWriter(student_in(first), dtype="float32", device="cpu", options=options)
        try:
            for version, folder in enumerate((first, second, first)):
                writer.update(load_file(folder / "model.safetensors").items(), version, changed_only=version > 1)
                own = logprobs(load_student(folder, torch.float32, CPU), TEXT)
                assert writer.logprobs(TEXT) == pytest.approx(own, abs=1e-4)
        finally:
            writer.close()
