"""What is found wrong with a student, for its caches, before a weight is read."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers
from tests.caches import make_cache
from tests.conftest import Bench
from tests.models import make_model, make_tokenizer
from tests.opened import student_in, teacher_of

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CorruptError, IncompleteError, KdpipeError, LayoutError, StudentError
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.models.context import Context, context_of
from kdpipe.stages.student import check, check_student, require_context


def test_student_of_another_tokenizer_is_refused_naming_the_first_difference(bench: Bench, tmp_path: Path) -> None:
    make_tokenizer(make_model("llama", tmp_path, vocab_size=320), vocab_size=280)
    with pytest.raises(StudentError, match=r"tokenizer is not that of .*: id 280 is None to the student"):
        check_student(student_in(tmp_path), teacher_of(Cache.open(bench.cache)))


def test_student_with_too_small_a_vocabulary_is_refused(bench: Bench, tmp_path: Path) -> None:
    make_tokenizer(make_model("llama", tmp_path, vocab_size=290))
    with pytest.raises(StudentError, match="290 ids, the cache's has 300"):
        check_student(student_in(tmp_path), teacher_of(Cache.open(bench.cache)))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_student_folder_that_lacks_a_part_is_refused(missing: str, bench: Bench, tmp_path: Path) -> None:
    make_tokenizer(make_model("llama", tmp_path, vocab_size=320))
    (tmp_path / missing).unlink()
    with pytest.raises(StudentError) as caught:
        check_student(student_in(tmp_path), teacher_of(Cache.open(bench.cache)))
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "error"), [("missing", IncompleteError), ("changed", CorruptError), ("a pipe", LayoutError)]
)
def test_a_caches_tokenizer_that_is_not_what_was_written_is_named(
    how: str, error: type[KdpipeError], bench: Bench, tmp_path: Path
) -> None:
    """It is read where a student's vocabulary is not the teacher's to the last token."""
    cache = shutil.copytree(bench.cache, tmp_path / "cache")
    path = cache / "teacher" / "tokenizer.json"
    before = path.read_text()
    path.unlink()
    if how == "changed":
        path.write_text(before.replace("0", "1", 1))
    elif how == "a pipe":
        os.mkfifo(path)
    other = make_tokenizer(make_model("llama", tmp_path / "student", vocab_size=320), vocab_size=290)
    with pytest.raises(error) as caught:
        check_student(student_in(other), teacher_of(Cache.open(cache)))
    assert caught.value.where == str(path)


def student_with(folder: Path, file: str, change: dict[str, object]) -> Path:
    """A student of the bench whose JSON file has other values."""
    make_tokenizer(make_model("llama", folder, vocab_size=320))
    before = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(before | change))
    return folder


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", {"eos_token_id": 50256}, "eos_token_id is 50256, the student's vocabulary has 320 ids"),
        ("config.json", {"eos_token_id": [2, 400]}, "eos_token_id is 400"),
        ("generation_config.json", {"eos_token_id": [2, 400]}, "eos_token_id is 400"),
        ("generation_config.json", {"pad_token_id": 320}, "pad_token_id is 320"),
        ("generation_config.json", {"eos_token_id": True}, "eos_token_id is True"),
        ("generation_config.json", {"max_new_tokens": -5}, "it does not load"),
    ],
)
def test_ids_outside_the_vocabulary_and_settings_that_do_not_load_are_refused(
    file: str, change: dict[str, object], words: str, bench: Bench, tmp_path: Path
) -> None:
    student = student_with(tmp_path, file, change)
    with pytest.raises(StudentError) as caught:
        check_student(student_in(student), teacher_of(Cache.open(bench.cache)))
    assert words in str(caught.value)
    assert caught.value.where == str(tmp_path / file)
    assert "\n" not in str(caught.value)


def test_a_lack_of_memory_is_not_the_fault_of_a_generation_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(check.GenerationConfig, "from_pretrained", fail)
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(MemoryError):
        check._check_generation(tmp_path / "generation_config.json", 300)


def test_a_generation_config_that_is_no_json_is_refused(bench: Bench, tmp_path: Path) -> None:
    make_tokenizer(make_model("llama", tmp_path, vocab_size=320))
    (tmp_path / "generation_config.json").write_text("{nope")
    with pytest.raises(StudentError, match=r"generation_config.json"):
        check_student(student_in(tmp_path), teacher_of(Cache.open(bench.cache)))


@pytest.mark.parametrize("change", [{"temperature": 0.6, "do_sample": False}, {"pad_token_id": -1}])
def test_a_generation_config_that_is_only_odd_is_let_through(
    change: dict[str, object], bench: Bench, tmp_path: Path
) -> None:
    check_student(
        student_in(student_with(tmp_path, "generation_config.json", change)), teacher_of(Cache.open(bench.cache))
    )


def test_samples_longer_than_the_context_are_counted_and_refused(tmp_path: Path) -> None:
    rows = of_caches([make_cache(tmp_path / "cache")])
    student = make_model("llama", tmp_path / "student", sizes={"max_position_embeddings": 40})
    everything = np.arange(len(rows.num_tokens))
    longer = int((rows.num_tokens > 40).sum())
    assert longer
    with pytest.raises(StudentError) as caught:
        require_context(student_in(student), rows, everything)
    said = str(caught.value)
    assert f"context is 40 tokens (max_position_embeddings), {longer} of the 21 samples" in said
    assert f"up to {rows.num_tokens.max()}; extract with --max-length 40" in said
    assert "raise max_position_embeddings in its config.json" in said
    require_context(student_in(student), rows, everything[rows.num_tokens <= 40])


def test_positions_in_a_table_cannot_be_raised(tmp_path: Path) -> None:
    rows = of_caches([make_cache(tmp_path / "cache")])
    transformers.GPT2Config(vocab_size=97, n_positions=40).save_pretrained(tmp_path / "student")
    with pytest.raises(StudentError, match="40 tokens") as caught:
        require_context(student_in(tmp_path / "student"), rows, np.arange(len(rows.num_tokens)))
    assert "raise" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (transformers.GPT2Config(n_positions=99), (99, "max_position_embeddings", False)),
        (transformers.MptConfig(max_seq_len=99), (99, "max_seq_len", False)),
        (transformers.MambaConfig(), None),
        (
            transformers.LlamaConfig(
                max_position_embeddings=99, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
            ),
            (198, "max_position_embeddings", True),
        ),
        (
            transformers.Qwen2Config(
                max_position_embeddings=99,
                rope_parameters={
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 50,
                    "rope_theta": 1e4,
                },
            ),
            (200, "max_position_embeddings", True),
        ),
    ],
)
def test_the_context_is_read_from_each_familys_config(
    config: transformers.PretrainedConfig, context: tuple[int, str, bool] | None
) -> None:
    tokens, field, rotary = context or (0, "", False)
    assert context_of(config) == (Context(tokens=tokens, field=field, rotary=rotary) if context else None)
