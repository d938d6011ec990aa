"""Tokenizers of model folders: ids are those of tokenizer.json, whatever class transformers would make of it."""

import json
from pathlib import Path

import pytest
import transformers
from tests.models import make_model, make_tokenizer
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors

from kdpipe.manifests.errors import StudentError, TeacherError
from kdpipe.stages.models.folder import ModelFolder

TEXT = "In 2023 it was 650841823, you'll see.\n    x = [1, 2]\tça va? 一种"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])
QWEN = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+|\s+|."), "isolated"), BYTES])


def edit(path: Path, **changes: object) -> None:
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def make_folder(path: Path, kind: str, cls: str | None, pre: object = None) -> Path:
    """A model of `kind` with a byte-level BPE tokenizer whose config names the class `cls`."""
    make_tokenizer(make_model(kind, path, vocab_size=304))
    if pre is not None:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer.pre_tokenizer = pre
        tokenizer.save(str(path / "tokenizer.json"))
    edit(path / "tokenizer_config.json", tokenizer_class=cls)
    return path


def ids_of_the_file(folder: Path, text: str, *, special: bool) -> list[int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=special).ids


LOST = [
    ("llama", "LlamaTokenizerFast", None),
    ("llama", "LlamaTokenizer", DIGITS),
    ("llama", "GPT2Tokenizer", DIGITS),
    ("qwen2", "PreTrainedTokenizerFast", None),
    ("qwen2", "Qwen2Tokenizer", None),
    ("qwen2", None, None),
    ("qwen3", None, None),
    ("cohere", None, DIGITS),
    ("gemma2", None, None),
    ("gemma2", "GemmaTokenizerFast", QWEN),
    ("phi", None, DIGITS),
]
KEPT = [("llama", "PreTrainedTokenizerFast", DIGITS), ("llama", "NoSuchTokenizer", DIGITS), ("granite", None, QWEN)]


@pytest.mark.parametrize(("kind", "cls", "pre"), [*LOST, *KEPT])
def test_ids_are_those_of_tokenizer_json(kind: str, cls: str | None, pre: object, tmp_path: Path) -> None:
    folder = ModelFolder(make_folder(tmp_path, kind, cls, pre), TeacherError)
    tokenizer = folder.tokenizer
    for special in (False, True):
        wanted = ids_of_the_file(tmp_path, TEXT, special=special)
        assert tokenizer(TEXT, add_special_tokens=special)["input_ids"] == wanted
    assert tokenizer.get_vocab() == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab()
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    assert tokenizer.chat_template.startswith("{% for message")


@pytest.mark.parametrize(("kind", "cls", "pre"), LOST)
def test_a_file_used_as_it_is_is_noted_in_one_line(kind: str, cls: str | None, pre: object, tmp_path: Path) -> None:
    """The class of transformers gives other ids, or transformers would not be needed for this at all."""
    folder = ModelFolder(make_folder(tmp_path, kind, cls, pre), TeacherError)
    made = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert made.get_vocab() != folder.tokenizer.get_vocab() or made(TEXT)["input_ids"] != ids_of_the_file(
        tmp_path, TEXT, special=True
    )
    (note,) = folder.notes
    assert note.startswith(f"{tmp_path / 'tokenizer.json'} is used as it is: ")
    assert "\n" not in note


@pytest.mark.parametrize(("kind", "cls", "pre"), KEPT)
def test_where_the_class_of_transformers_agrees_nothing_is_said(
    kind: str, cls: str | None, pre: object, tmp_path: Path
) -> None:
    folder = ModelFolder(make_folder(tmp_path, kind, cls, pre), TeacherError)
    _ = folder.tokenizer
    assert folder.notes == []


def test_a_stop_token_that_only_the_class_knows_is_kept(tmp_path: Path) -> None:
    """Old folders of GPT-2 and Qwen 2 leave it to the class that <|endoftext|> ends a text."""
    folder = make_folder(tmp_path, "qwen2", "Qwen2Tokenizer")
    edit(folder / "tokenizer_config.json", eos_token=None, pad_token=None)
    tokenizer = ModelFolder(folder, TeacherError).tokenizer
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer(TEXT)["input_ids"] == ids_of_the_file(folder, TEXT, special=True)


def test_a_class_that_cannot_be_made_of_the_file_is_not_needed(tmp_path: Path) -> None:
    folder = ModelFolder(make_folder(tmp_path, "llama", "T5TokenizerFast"), TeacherError)
    assert folder.tokenizer(TEXT)["input_ids"] == ids_of_the_file(tmp_path, TEXT, special=True)


def test_a_class_that_adds_other_special_tokens_than_the_file_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ids are those of the file but for what is put before a text."""
    make_folder(tmp_path, "llama", "PreTrainedTokenizerFast")
    made = transformers.AutoTokenizer.from_pretrained(tmp_path)
    bos = [("<|endoftext|>", made.convert_tokens_to_ids("<|endoftext|>"))]
    added = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=bos)
    made.backend_tokenizer.post_processor = added
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: made)
    folder = ModelFolder(tmp_path, TeacherError)
    assert (
        folder.tokenizer(TEXT)["input_ids"] == ids_of_the_file(tmp_path, TEXT, special=True) != made(TEXT)["input_ids"]
    )
    (note,) = folder.notes
    assert "gives other ids for" in note


def test_truncation_written_into_the_file_cuts_nothing(tmp_path: Path) -> None:
    make_folder(tmp_path, "llama", None)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    whole = tokenizer.encode(TEXT * 3).ids
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert ModelFolder(tmp_path, TeacherError).tokenizer(TEXT * 3)["input_ids"] == whole


def test_a_config_that_adds_a_token_to_the_files_is_heard(tmp_path: Path) -> None:
    make_folder(tmp_path, "llama", "PreTrainedTokenizerFast")
    edit(tmp_path / "tokenizer_config.json", extra_special_tokens=["<image>"])
    folder = ModelFolder(tmp_path, TeacherError)
    assert folder.tokenizer.convert_tokens_to_ids("<image>") == len(folder.tokenizer) - 1
    assert folder.notes == []


def test_a_config_that_makes_other_ids_than_the_file_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path, "llama", "PreTrainedTokenizerFast")
    edit(tmp_path / "tokenizer_config.json", extra_special_tokens=["2023"])
    with pytest.raises(TeacherError, match=r"ids of its tokenizer.json: .*'In 2023"):
        _ = ModelFolder(tmp_path, TeacherError).tokenizer


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model": {"type": "NewBPE", "vocab": {}, "merges": []}}'])
def test_a_broken_tokenizer_is_one_line(text: str, tmp_path: Path) -> None:
    make_folder(tmp_path, "llama", None)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(StudentError, match="its tokenizer does not load") as caught:
        _ = ModelFolder(tmp_path, StudentError).tokenizer
    assert "\n" not in str(caught.value)


def test_the_files_of_a_tokenizer_are_named(tmp_path: Path) -> None:
    make_folder(tmp_path, "llama", None)
    (tmp_path / "additional_chat_templates").mkdir()
    for name in ("tokenizer.model", "merges.txt", "additional_chat_templates/tool_use.jinja", "README.md"):
        (tmp_path / name).write_text("")
    assert ModelFolder(tmp_path, StudentError).tokenizer_files == (
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "merges.txt",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    )
