"""What a student shows before its first step: its own logits, and samples in a batch that come out as they do alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.models import KINDS, make_model
from tests.opened import load_student

from kdpipe.manifests.errors import StudentError
from kdpipe.stages.models import formula
from kdpipe.stages.models.attention import PACKED
from kdpipe.stages.models.backbone import backbone
from kdpipe.stages.student import Student
from kdpipe.stages.student.exam import exam_length

CPU = torch.device("cpu")
TEXT = np.random.default_rng(0).integers(3, 250, 64)
SIZES: dict[str, Any] = {
    "vocab_size": 251,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
}


def made(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).float()


def examined(model: transformers.PreTrainedModel, text: np.ndarray = TEXT) -> Student:
    student = Student(model)
    student.examine(text, Path("student"))
    return student


def llama4(chunk: int) -> transformers.PreTrainedModel:
    config = transformers.Llama4TextConfig(
        **SIZES, head_dim=12, num_local_experts=2, intermediate_size_mlp=80, attention_chunk_size=chunk
    )
    return made(config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_packs_its_samples_and_has_its_own_logits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert not examined(load_student(make_model(kind, tmp_path), dtype, CPU)).padded


@pytest.mark.parametrize(("kind", "lost"), [("granite", "SCALE_FIELDS"), ("gemma2", "SOFTCAP_FIELDS")])
def test_a_step_that_kdpipe_does_not_know_is_refused(
    kind: str, lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formula, lost, ())
    model = load_student(make_model(kind, tmp_path), torch.float32, CPU)
    with pytest.raises(StudentError, match="does something between hidden state and logits") as caught:
        examined(model)
    assert caught.value.exit_code == 4


def test_state_space_layers_are_padded() -> None:
    config = transformers.MambaConfig(vocab_size=251, hidden_size=32, state_size=4, num_hidden_layers=2)
    assert examined(made(config)).padded


def test_chunked_attention_is_seen_and_padded_with_the_models_own() -> None:
    model = llama4(chunk=8)
    own = model.config._attn_implementation
    assert examined(model).padded
    assert model.config._attn_implementation == own != PACKED


def test_chunks_longer_than_any_sample_do_not_stop_packing() -> None:
    assert not examined(llama4(chunk=64)).padded


@pytest.mark.parametrize("window", [8, 200])
def test_a_window_is_packed(window: int) -> None:
    model = made(transformers.MistralConfig(**SIZES, sliding_window=window))
    assert not examined(model, np.resize(TEXT, 320)).padded


def leaking(share: float, place: int, last: int) -> transformers.PreTrainedModel:
    """To the last tokens of a row that has more than `place`, a share of the token at that place is added.

    Alone that is one of the sample's own, in a packed row one of another sample.
    """

    def leak(_module: torch.nn.Module, _args: Any, hidden: torch.Tensor) -> torch.Tensor:
        added = torch.zeros_like(hidden)
        added[:, -last:] = share * hidden[:, place : place + 1] if hidden.shape[1] > place + last else 0.0
        return hidden + added

    model = made(transformers.LlamaConfig(**SIZES))
    model.model.layers[0].register_forward_hook(leak)
    return model


@pytest.mark.parametrize(("share", "last"), [(0.02, 40), (0.5, 14)])
def test_a_little_of_another_sample_is_seen_wherever_it_is(share: float, last: int) -> None:
    """A fiftieth in most rows of the longest sample; half in its last fifth."""
    assert examined(leaking(share, 20, last)).padded
    assert not examined(leaking(1e-6, 20, last)).padded


@pytest.mark.parametrize(("off", "dtype"), [(1e-4, torch.float32), (0.05, torch.bfloat16)], ids=str)
def test_logits_a_little_off_the_formula_are_refused(off: float, dtype: torch.dtype) -> None:
    model = made(transformers.LlamaConfig(**SIZES)).to(dtype)
    handle = model.lm_head.register_forward_hook(lambda _module, _args, logits: logits * (1.0 + off))
    with pytest.raises(StudentError, match="differ from the model's own by"):
        examined(model)
    handle.remove()
    examined(model)


def test_an_encoder_that_sees_later_tokens_is_refused() -> None:
    with pytest.raises(StudentError, match="sees the tokens after it"):
        examined(made(transformers.BertGenerationConfig(**SIZES)))


def test_a_model_that_needs_more_than_ids_is_refused_in_one_line() -> None:
    model = made(transformers.LlamaConfig(**SIZES))
    model.forward = lambda **_: (_ for _ in ()).throw(TypeError("pixel_values is missing\nand more"))
    with pytest.raises(StudentError, match=r"on token ids alone: TypeError: pixel_values is missing$"):
        examined(model)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = made(transformers.LlamaConfig(**SIZES))
    model.lm_head.weight.data[7, 7] = torch.nan
    with pytest.raises(StudentError, match="not finite"):
        examined(model)


@pytest.mark.parametrize("dropout", [1.5, -1.0, None])
def test_what_runs_in_evaluation_alone_is_refused(dropout: float | None) -> None:
    model = made(transformers.LlamaConfig(**SIZES))
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    with pytest.raises(StudentError, match="training mode"):
        examined(model)
    assert not model.training


@pytest.mark.parametrize("forward", [1, 4, 5], ids=["alone", "packed", "training"])
@pytest.mark.parametrize("lack", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")], ids=["host", "GPU"])
def test_a_lack_of_memory_is_not_the_models_fault_and_pads_nothing(forward: int, lack: Exception) -> None:
    model, ran = made(transformers.LlamaConfig(**SIZES)), []

    def full(*_: object) -> None:
        ran.append(1)
        if len(ran) == forward:
            raise lack

    backbone(model).register_forward_pre_hook(full)
    with pytest.raises(type(lack)):
        examined(model)


@pytest.mark.parametrize("length", [1, 2, 5, 20])
def test_short_samples_are_enough(length: int) -> None:
    assert not examined(made(transformers.LlamaConfig(**SIZES)), TEXT[:length]).padded


def test_the_long_probe_fills_windows_and_tables_of_positions_and_no_more_than_the_longest_sample() -> None:
    plain = transformers.LlamaConfig(**SIZES)
    assert [exam_length(plain, longest) for longest in (9, 64, 5000)] == [9, 64, 64]
    window = transformers.MistralConfig(**SIZES, sliding_window=100)
    assert [exam_length(window, longest) for longest in (9, 120, 5000)] == [9, 120, 158]
    assert exam_length(transformers.GPT2Config(n_positions=900), 900) == 900
