"""Model folders: what is wrong with one is one line, and a model is loaded whole or not at all."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import KINDS, make_model, make_own

from kdpipe.manifests.errors import StudentError, TeacherError
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.own_code import code_digest

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]


def change_weights(folder: Path, change: Callable[[Weights], Weights]) -> Path:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path) -> torch.nn.Module:
    return ModelFolder(folder, StudentError).load(torch.float32, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_loads_with_or_without_its_tied_head(kind: str, tmp_path: Path) -> None:
    folder = make_model(kind, tmp_path)
    stored, model = load_file(folder / "model.safetensors"), load(folder)
    loaded = model.state_dict()
    assert stored.keys() <= loaded.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


NORM = "model.layers.1.input_layernorm.weight"
HARM: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "a weight missing": (lambda w: {k: v for k, v in w.items() if k != NORM}, f"1 weight ('{NORM}') missing"),
    "one left over": (lambda w: {**w, "model.norm.gain": torch.ones(3)}, "1 weight ('model.norm.gain') left over"),
    "compiled": (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, "start with '_orig_mod.' (torch.compile)"),
    "of DDP": (lambda w: {f"module.{k}": v for k, v in w.items()}, "start with 'module.' (DistributedDataParallel)"),
    "of peft": (lambda w: {f"base_model.model.{k}": v for k, v in w.items()}, "start with 'base_model.model.' (peft)"),
    "wrapped": (lambda w: {f"student.{k}": v for k, v in w.items()}, "start with 'student.'; save"),
    "of another shape": (lambda w: {**w, NORM: torch.ones(3)}, f"'{NORM}' has shape [3] in the weight files and [48]"),
    "of integers": (lambda w: {**w, NORM: w[NORM].long()}, f"'{NORM}' holds I64"),
    "none at all": (lambda w: {}, "the weight files hold 0 weights"),
}


@pytest.mark.parametrize("harm", HARM)
def test_weights_that_are_not_the_models_are_refused_by_name(harm: str, tmp_path: Path) -> None:
    change, said = HARM[harm]
    folder = change_weights(make_model("llama", tmp_path), change)
    with pytest.raises(StudentError) as caught:
        load(folder)
    assert said in str(caught.value)
    assert caught.value.where in (str(folder), str(folder / "model.safetensors"))


def test_an_index_that_names_a_tensor_which_its_file_lacks_is_refused_before_the_load(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": dict.fromkeys([*load_file(folder / "a.safetensors"), "model.absent"], "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TeacherError, match=r"a\.safetensors: .*'model\.absent'"):
        ModelFolder(folder, TeacherError).examine()


@pytest.mark.parametrize("named", [None, "", "gone/away", 3])
def test_an_adapter_that_names_no_base_here_is_refused(named: object, tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    with pytest.raises(StudentError, match="which is no folder here; put the path of the base model there"):
        load(folder)


def test_an_adapter_without_its_config_is_refused(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(StudentError, match=r"only an adapter without its adapter_config\.json"):
        load(folder)


@pytest.mark.parametrize(
    "raised", [RuntimeError("a\nb"), OverflowError(), SystemExit(3), type("PanicException", (BaseException,), {})("x")]
)
def test_whatever_a_library_raises_is_one_line_of_the_folder(
    raised: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ModelFolder(make_model("llama", tmp_path), TeacherError)

    def fail(*args: object, **kwargs: object) -> None:
        raise raised

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    with pytest.raises(TeacherError) as caught:
        _ = folder.config
    assert type(raised).__name__ in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), MemoryError()])
def test_an_interrupt_and_lack_of_memory_are_not_the_folders_fault(
    raised: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ModelFolder(make_model("llama", tmp_path), TeacherError)

    def fail(*args: object, **kwargs: object) -> None:
        raise raised

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    with pytest.raises(type(raised)):
        _ = folder.config


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [2, 7]}, {"eos_token_id": 3}, {2, 7}),
        ({"eos_token_id": 5}, {"eos_token_id": [3, 4]}, {5}),
        ({"eos_token_id": None}, {"eos_token_id": [3, 4]}, {3, 4}),
        ({}, {"eos_token_id": 3}, {3}),
        (None, {"eos_token_id": 3}, {3}),
        (None, {"eos_token_id": None}, set()),
    ],
)
def test_generation_ends_where_generate_ends_it(
    generation: dict | None, config: dict, ends: set[int], tmp_path: Path
) -> None:
    for name, held in (("generation_config.json", generation), ("config.json", config)):
        if held is not None:
            (tmp_path / name).write_text(json.dumps(held))
    assert ModelFolder(tmp_path, TeacherError).stop_ids == ends


def test_a_models_own_code_is_part_of_its_digest(tmp_path: Path) -> None:
    folder = make_own(make_model("llama", tmp_path / "own"), tmp_path / "ran")

    def digest() -> str:
        return ModelFolder(folder, TeacherError, code_digest(folder)).digest()

    before = digest()
    assert before == digest()
    modeling = folder / "modeling_tiny.py"
    modeling.write_text(modeling.read_text() + "# another line\n")
    assert digest() != before
    assert not (tmp_path / "ran").exists()


def test_a_folder_is_read_once(tmp_path: Path) -> None:
    folder = ModelFolder(make_model("llama", tmp_path), TeacherError)
    config = folder.config
    (tmp_path / "config.json").unlink()
    assert folder.config is config


@pytest.mark.parametrize("name", ["tokenizer_config.json", "additional_chat_templates/tool_use.jinja", "README.md"])
def test_a_link_that_leads_nowhere_is_not_taken_for_no_file(name: str, tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "model")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(tmp_path / "gone")
    if name == "README.md":
        assert ModelFolder(folder, StudentError).config.model_type == "llama"
        return
    with pytest.raises(StudentError, match=rf"{name} is a link to .*gone, which is missing; copy the folder again"):
        ModelFolder(folder, StudentError).config  # noqa: B018


@pytest.mark.filterwarnings("error")
def test_a_size_of_nothing_is_one_line_and_no_warning(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 0}))
    with pytest.raises(StudentError, match="is it the config of another model") as caught:
        ModelFolder(folder, StudentError).examine()
    assert str(caught.value).count("\n") == 0


def test_a_folder_that_is_missing_is_not_one_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="no such folder"):
        _ = ModelFolder(tmp_path / "nowhere", TeacherError).tokenizer
