"""What a folder says of its teacher, against the model that transformers loads from it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.models import KINDS, make_model, make_tokenizer
from tests.opened import teacher_in

from kdpipe.manifests.errors import TeacherError
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.vocabulary import real_vocab_size
from kdpipe.stages.teacher.describe import describe_teacher
from kdpipe.stages.teacher.head import head_record, read_head


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def rename_tensors(folder: Path, **names: str | None) -> None:
    """Rename tensors of the weight file; None drops one. Dots are written as double underscores."""
    tensors = load_file(folder / "model.safetensors")
    for old, new in names.items():
        tensor = tensors.pop(old.replace("__", "."))
        if new is not None:
            tensors[new] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_description_and_head_are_those_of_the_loaded_model(kind: str, tmp_path: Path) -> None:
    make_model(kind, tmp_path)
    info = describe_teacher(teacher_in(tmp_path), "auto")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    own = model.get_output_embeddings()
    head = read_head(info)
    assert torch.equal(head.weight, own.weight)
    assert (head.bias is None) == (own.bias is None)
    assert head.bias is None or torch.equal(head.bias, own.bias)
    assert (info.head_rows, info.hidden_size) == own.weight.shape
    assert info.architecture == type(model).__name__
    assert info.num_params == model.num_parameters()
    assert info.tied == (own.weight is model.get_input_embeddings().weight)
    assert (info.dtype, info.max_positions) == ("float32", 512)
    assert (head.softcap, head.scale) == (info.softcap, info.scale)
    assert head_record(info, 250).vocab_size == 250


def test_softcap_and_scales_come_from_the_config(tmp_path: Path) -> None:
    found = {kind: describe_teacher(teacher_in(make_model(kind, tmp_path / kind))) for kind in KINDS}
    assert {kind: info.softcap for kind, info in found.items() if info.softcap is not None} == {"gemma2": 3.0}
    scales = {kind: info.scale for kind, info in found.items() if info.scale != 1.0}
    assert scales == {"cohere": 0.25, "granite": pytest.approx(1 / 3)}
    assert [kind for kind, info in found.items() if info.has_bias] == ["phi"]
    assert {kind for kind, info in found.items() if info.tied} == {"qwen2", "gemma2", "cohere", "granite"}


def test_head_is_found_in_a_sharded_checkpoint(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    whole = read_head(describe_teacher(teacher_in(tmp_path)))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(read_head(describe_teacher(teacher_in(tmp_path))).weight, whole.weight)


def test_tied_head_without_the_base_models_prefix_is_found(tmp_path: Path) -> None:
    make_model("qwen2", tmp_path)
    rename_tensors(tmp_path, model__embed_tokens__weight="embed_tokens.weight")
    assert describe_teacher(teacher_in(tmp_path)).head_key == "embed_tokens.weight"


def test_head_under_an_old_name_is_found_by_its_shape(tmp_path: Path) -> None:
    make_model("qwen3", tmp_path)
    truth = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    rename_tensors(tmp_path, lm_head__weight="embed_out.weight")
    assert torch.equal(read_head(describe_teacher(teacher_in(tmp_path))).weight, truth)


def test_tied_head_with_a_tensor_of_its_own_is_the_one_transformers_uses(tmp_path: Path) -> None:
    make_model("qwen2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1.0
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    head = read_head(describe_teacher(teacher_in(tmp_path)))
    assert torch.equal(head.weight, model.get_output_embeddings().weight)


def test_dtype_is_the_configs_then_the_files_then_what_was_asked(tmp_path: Path) -> None:
    make_model("llama", tmp_path, dtype="bfloat16")
    assert describe_teacher(teacher_in(tmp_path)).dtype == "bfloat16"
    assert describe_teacher(teacher_in(tmp_path), "float32").dtype == "float32"
    edit_config(tmp_path, dtype=None)
    assert describe_teacher(teacher_in(tmp_path)).dtype == "bfloat16"
    assert read_head(describe_teacher(teacher_in(tmp_path), "float16")).weight.dtype == torch.float16


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:200])


def shard_is_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_is_no_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[]")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{nope")


def unknown_type(folder: Path) -> None:
    edit_config(folder, model_type="nope")


def encoder_decoder(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]})
    )


def masked_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))


def wrong_value(folder: Path) -> None:
    edit_config(folder, hidden_size="x")


def headless(folder: Path) -> None:
    rename_tensors(folder, lm_head__weight=None)


def head_of_another_size(folder: Path) -> None:
    edit_config(folder, vocab_size=999)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_folder, "no such folder"),
        (no_config, "no config.json"),
        (no_weights, "no weights"),
        (only_a_pickle, "convert to safetensors"),
        (truncated_weights, "cannot be read"),
        (shard_is_missing, "model-00001-of-00002.safetensors"),
        (index_is_no_index, "cannot be read"),
        (broken_config, "JSON"),
        (unknown_type, "nope"),
        (encoder_decoder, "not a causal LM"),
        (masked_model, "not a causal LM"),
        (wrong_value, "hidden_size"),
        (headless, "lm_head.weight"),
        (head_of_another_size, "[999, 48]"),
    ],
)
def test_folder_that_is_no_teacher_is_one_line_with_exit_code_4(
    damage: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    folder = make_model("llama", tmp_path / "teacher")
    damage(folder)
    with pytest.raises(TeacherError) as caught:
        describe_teacher(teacher_in(folder))
    assert caught.value.exit_code == 4
    assert said in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokenizer_comes_from_the_folder_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="no tokenizer"):
        _ = ModelFolder(tmp_path, TeacherError).tokenizer
    tokenizer = ModelFolder(make_tokenizer(tmp_path), TeacherError).tokenizer
    text = "Ein Lehrer, <user> 1 234"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    (tmp_path / "tokenizer.json").write_text("{nope")
    with pytest.raises(TeacherError, match="does not load"):
        _ = ModelFolder(tmp_path, TeacherError).tokenizer


def test_chat_template_marks_the_assistants_tokens(tmp_path: Path) -> None:
    tokenizer = ModelFolder(make_tokenizer(tmp_path), TeacherError).tokenizer
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A row."}]
    made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mask in zip(made["input_ids"], made["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == "A row.<|im_end|>"
    assert tokenizer.eos_token == "<|im_end|>"


def test_real_vocabulary_is_the_tokenizers_and_fits_the_head(tmp_path: Path) -> None:
    tokenizer = ModelFolder(make_tokenizer(tmp_path, vocab_size=300), TeacherError).tokenizer
    assert real_vocab_size(tmp_path, tokenizer, 320) == len(tokenizer) == 300
    with pytest.raises(TeacherError, match="up to 299, the lm_head has 299 rows"):
        real_vocab_size(tmp_path, tokenizer, 299)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert real_vocab_size(tmp_path, tokenizer, 320) == 301
    assert real_vocab_size(tmp_path, tokenizer, 300) == 300  # an added token that the model has no row for
