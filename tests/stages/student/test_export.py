"""What is exported is the folder that training began with: new weights, every other file as it was or for a reason."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from tests.conftest import Bench
from tests.models import CHAT_TEMPLATE, make_model, make_tokenizer
from tests.opened import load_student, student_in

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import StudentError
from kdpipe.manifests.sample import SampleTokens
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.student import Student, checkpoint_dtype
from kdpipe.stages.student.export import Companions, companions, export, trained_stops

CPU = torch.device("cpu")
ODD = {"do_sample": False, "temperature": 0.6, "pad_token_id": -1, "eos_token_id": 3}


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return make_tokenizer(make_model("llama", tmp_path / "student", vocab_size=320, dtype="bfloat16"))


def beside(student: Path, bench: Bench) -> Companions:
    return companions(student_in(student), of_caches([Cache.open(bench.cache)]), checkpoint_dtype(student_in(student)))


def exported(student: Path, bench: Bench, folder: Path) -> Path:
    files = beside(student, bench)
    export(Student(load_student(student, torch.float32, CPU)), files, folder, rank=0)
    return folder


def test_files_that_need_no_change_are_byte_for_byte_those_of_the_folder(
    student: Path, bench: Bench, tmp_path: Path
) -> None:
    (student / "generation_config.json").write_text(json.dumps(ODD, indent=7))
    (student / "tokenizer_config.json").write_text((student / "tokenizer_config.json").read_text() + "\n\n")
    (student / "merges.txt").write_text("#version: 0.2\n")
    (student / "additional_chat_templates").mkdir()
    (student / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    out = exported(student, bench, tmp_path / "out")
    for name in (
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "merges.txt",
        "additional_chat_templates/rag.jinja",
    ):
        assert (out / name).read_bytes() == (student / name).read_bytes(), name
    assert not beside(student, bench).notes


def test_the_weights_have_the_dtype_they_began_with(student: Path, bench: Bench, tmp_path: Path) -> None:
    out = exported(student, bench, tmp_path / "out")
    with safe_open(out / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118 - not a dict
    assert transformers.AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


@pytest.mark.parametrize(("stated", "wanted"), [(None, 3), (2, [2, 3]), ([2, 0], [2, 0, 3])])
def test_generation_stops_where_the_student_learns_to_end(
    stated: object, wanted: object, student: Path, bench: Bench, tmp_path: Path
) -> None:
    (student / "generation_config.json").write_text(json.dumps({"eos_token_id": stated, "top_k": 7}))
    out = exported(student, bench, tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": wanted, "top_k": 7}
    assert any("stops at <|im_end|> (3) too" in note for note in beside(student, bench).notes)


def test_a_folder_without_a_generation_config_gets_one_that_stops(student: Path, bench: Bench, tmp_path: Path) -> None:
    (student / "generation_config.json").unlink()
    out = exported(student, bench, tmp_path / "out")
    assert 3 in json.loads((out / "generation_config.json").read_text())["eos_token_id"]


def test_the_template_is_the_one_the_data_was_rendered_with(student: Path, bench: Bench, tmp_path: Path) -> None:
    (student / "chat_template.jinja").unlink()
    config = json.loads((student / "tokenizer_config.json").read_text())
    (student / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    out = exported(student, bench, tmp_path / "out")
    assert (out / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == CHAT_TEMPLATE
    assert any("chat template of the cache" in note for note in beside(student, bench).notes)


def test_plain_texts_leave_the_students_template_alone(
    student: Path, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (student / "chat_template.jinja").write_text("{{ messages }}")
    plain = [SampleTokens(np.array([40, 50, 60]), np.array([False, True, True]))]
    monkeypatch.setattr("kdpipe.stages.student.export._sampled", lambda cache: plain)
    out = exported(student, bench, tmp_path / "out")
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"


def test_only_special_tokens_that_end_answers_are_stops(bench: Bench) -> None:
    tokenizer = ModelFolder(bench.student, StudentError).tokenizer

    def sample(*ids: int, targets: str) -> SampleTokens:
        return SampleTokens(np.array(ids), np.array([each == "x" for each in targets]))

    ended = [sample(40, 50, 3, 60, 3, targets="-xx-x")] * 20
    cut = [sample(40, 50, targets="-x")] * 20
    by_chance = [sample(40, 2, targets="-x")]
    assert trained_stops([*ended, *cut, *by_chance], tokenizer) == (3,)
    assert trained_stops(cut, tokenizer) == ()
