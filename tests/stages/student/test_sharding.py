"""The parts that ranks read are, together, what from_pretrained gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.models import KINDS, make_model
from tests.opened import load_student, student_in
from tests.stages.student.sharded import CPU, load_and_keep

from kdpipe.manifests.errors import StudentError
from kdpipe.pipeline.launch import launch
from kdpipe.stages.ranks import joined
from kdpipe.stages.student import load_sharded


def make_mixture(folder: Path) -> Path:
    """A mixture of experts, whose weights transformers puts together while it loads them."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=61, num_local_experts=3, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def make_split(folder: Path) -> Path:
    """A model in several files, its vocabulary divisible by no number of ranks."""
    model = transformers.AutoModelForCausalLM.from_pretrained(make_model("llama", folder / "one", vocab_size=253))
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path, list[list[str]], list[str]]:
    """Folders of every kind, what two ranks have of them, each rank's notes, its error where one's file is short."""
    made = tmp_path_factory.mktemp("sharded")
    folders = [make_model(kind, made / kind, dtype="bfloat16", vocab_size=253) for kind in KINDS]
    folders += [make_split(made / "split"), make_mixture(made / "mixture")]
    short = make_model("llama", made / "short")
    return folders, made, *launch(load_and_keep, folders, short, made, nproc=2)


def test_parts_of_two_ranks_are_the_loaded_model_bit_for_bit(loaded: tuple[list[Path], Path, object, object]) -> None:
    folders, made, *_ = loaded
    for folder in folders:
        model = load_student(folder, torch.float32, CPU)
        found = load_file(made / f"{folder.name}-0.safetensors")
        for name, tensor in model.state_dict().items():
            assert torch.equal(found[f"model.{name}"], tensor), (folder.name, name)
        buffers = {f"buffer.model.{name}": tensor for name, tensor in model.named_buffers()}
        assert buffers
        others = load_file(made / f"{folder.name}-1.safetensors")
        assert others.keys() == buffers.keys()
        for name, tensor in buffers.items():
            assert torch.equal(others[name], tensor), (folder.name, name)


def test_a_student_is_whole_on_no_rank_but_where_transformers_converts_it(
    loaded: tuple[object, object, list[list[str]], object],
) -> None:
    (note,), (other,) = loaded[2]  # the launch fails where a rank loads any other folder
    assert note == other
    assert note.startswith("rank 0 reads the whole student, and sends each rank its part: transformers converts")


def test_a_rank_that_cannot_read_its_part_ends_the_others(loaded: tuple[object, object, object, list[str]]) -> None:
    first, second = loaded[3]
    assert first == "PeerError: E-PEER: another rank failed, which says why; run it again"
    assert second.startswith("StudentError: ")
    assert second.endswith("OSError: model.safetensors ends before its header says")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"1 weight \('model.norm.weight'\) missing"),
        (lambda tensors: tensors.update(more=torch.zeros(3)), r"1 weight \('more'\) left over"),
    ],
    ids=["missing", "left over"],
)
def test_weights_that_are_not_those_of_the_config_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object], said: str, tmp_path: Path
) -> None:
    path = make_model("llama", tmp_path) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    with joined(CPU) as ranks, pytest.raises(StudentError, match=said):
        load_sharded(student_in(tmp_path), ranks, stored=torch.float32, computed=torch.float32)
