"""What is read in parts is what from_pretrained loads; what cannot be is named."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.families import make_family
from tests.models import KINDS, make_model, make_own
from tests.opened import student_in

from kdpipe.stages.models import parts
from kdpipe.stages.models.own_code import code_digest
from kdpipe.stages.models.parts import WholeOnlyError, files_of, make_buffers, tensors_aside

CPU = torch.device("cpu")
ODD = ("llama4_text", "gpt2", "rwkv", "mamba", "bert", "gemma3_text", "bloom", "gpt_neox", "opt", "falcon_h1")
"""Scaled positions, transposed weights, buffers of states, names that change, biases that are tied."""


def require_equal(folder: Path, trust: str | None = None, dtype: torch.dtype = torch.float32) -> None:
    """Every weight and buffer, and what save_pretrained will ask of the model."""
    student = student_in(folder, trust)
    whole = student.load(dtype, CPU)
    model = student.skeleton(dtype)
    files = files_of(model, student.weights)
    make_buffers(model)
    state = whole.state_dict()
    assert files.keys() == state.keys()
    for name, tensor in state.items():
        assert model.state_dict()[name].dtype == tensor.dtype
        read = torch.full_like(tensor, 7)
        files[name].read(read)
        assert torch.equal(read, tensor), name
    buffers = dict(model.named_buffers())
    for name, buffer in whole.named_buffers():
        assert name in files or torch.equal(buffers[name], buffer), name
    assert model.generation_config.to_dict() == whole.generation_config.to_dict()
    assert model.config.to_dict() == whole.config.to_dict()
    assert [str(each) for each in model._weight_conversions] == [str(each) for each in whole._weight_conversions]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_read_in_parts_is_the_loaded_model(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    require_equal(make_model(kind, tmp_path, dtype="bfloat16"), dtype=dtype)


@pytest.mark.parametrize("family", ODD)
def test_odd_families_read_in_parts_are_the_loaded_model(family: str, tmp_path: Path) -> None:
    require_equal(make_family(family, tmp_path))


def test_a_model_of_its_own_code_is_read_in_parts(tmp_path: Path) -> None:
    folder = make_own(make_model("llama", tmp_path / "model"), tmp_path / "marker")
    require_equal(folder, trust=code_digest(folder))


def test_any_range_of_elements_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "BLOCK_BYTES", 24)
    tensor = torch.randn(23, 5).to(torch.bfloat16)
    save_file({"before": torch.zeros(3), "tensor": tensor, "empty": torch.zeros(0, 4)}, tmp_path / "file.safetensors")
    stored = parts._stored_in(tmp_path / "file.safetensors")
    for first, rows in ((0, 23), (7, 9), (22, 1), (23, 0)):
        out = torch.zeros(rows, 5)
        stored["tensor"].read(out, first=first * 5)
        assert torch.equal(out, tensor[first : first + rows].float())
    stored["empty"].read(torch.zeros(0, 4))


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    save_file({"tensor": torch.zeros(100)}, path)
    stored = parts._stored_in(path)["tensor"]
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(OSError, match="ends before"):
        stored.read(torch.zeros(100))


def tie(folder: Path) -> None:
    """The files keep the head's own weights, which the config ties to the embedding's."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def store_in_float8(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def lose_the_norm(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (tie, "is tied by its config and has weights of its own"),
        (store_in_float8, "'model.norm.weight' holds F8_E4M3"),
        (lose_the_norm, "'model.norm.weight' is not in the files"),
    ],
)
def test_what_cannot_be_read_in_parts_is_named(change: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    folder = make_model("qwen2", tmp_path)
    change(folder)
    student = student_in(folder)
    with pytest.raises(WholeOnlyError, match=said):
        files_of(student.skeleton(), student.weights)


def test_experts_that_are_put_together_are_not_read_in_parts(tmp_path: Path) -> None:
    student = student_in(make_family("qwen3_moe", tmp_path))
    with pytest.raises(WholeOnlyError, match="transformers converts"):
        files_of(student.skeleton(), student.weights)


def test_a_tensor_beside_parameters_and_buffers_is_seen(tmp_path: Path) -> None:
    student = student_in(make_model("llama", tmp_path))
    model = student.skeleton()
    assert not tensors_aside(model)
    model.model.norm.aside = torch.empty(3, device="meta")
    with pytest.raises(WholeOnlyError, match="neither parameters nor buffers"):
        files_of(model, student.weights)


def test_a_model_that_keeps_some_weights_in_float32_is_loaded_whole(tmp_path: Path) -> None:
    student = student_in(make_model("llama", tmp_path))
    model = student.skeleton(torch.bfloat16)
    model._keep_in_fp32_modules_strict = {"norm"}
    with pytest.raises(WholeOnlyError, match="stay in float32 beside"):
        files_of(model, student.weights)


def test_a_model_whose_buffers_need_its_weights_is_loaded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = student_in(make_model("llama", tmp_path)).skeleton()

    def needs(self: transformers.PreTrainedModel) -> None:
        float(next(self.parameters()).detach().sum())

    monkeypatch.setattr(type(model), "initialize_weights", needs)
    with pytest.raises(WholeOnlyError, match="its buffers need its weights"):
        make_buffers(model)
