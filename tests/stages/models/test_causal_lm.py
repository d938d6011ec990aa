"""What kdpipe must know of any causal LM."""

import contextlib
import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from tests.models import make_model, make_tokenizer

from kdpipe.manifests.errors import StudentError, TeacherError
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.formula import logit_formula
from kdpipe.stages.models.tokenizer import save_tokenizer
from kdpipe.stages.models.vocabulary import vocabulary_difference, vocabulary_digest


@pytest.mark.parametrize(
    ("config", "softcap", "scale"),
    [
        (transformers.Gemma2Config(final_logit_softcapping=30.0), 30.0, 1.0),
        (transformers.CohereConfig(logit_scale=0.0625), None, 0.0625),
        (transformers.GraniteConfig(logits_scaling=8.0), None, 0.125),
        (transformers.LlamaConfig(), None, 1.0),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_formula_is_read_from_the_config(
    config: transformers.PretrainedConfig, softcap: float | None, scale: float
) -> None:
    assert (logit_formula(config).softcap, logit_formula(config).scale) == (softcap, scale)


def test_equal_vocabularies_have_equal_digests_and_others_name_their_first_difference(tmp_path: Path) -> None:
    one, same, other = (
        ModelFolder(make_tokenizer(tmp_path / name, vocab_size=size), StudentError).tokenizer
        for name, size in (("one", 300), ("same", 300), ("other", 290))
    )
    assert vocabulary_digest(one) == vocabulary_digest(same) != vocabulary_digest(other)
    assert vocabulary_difference(one, same) == ""
    assert vocabulary_difference(other, one).startswith("id 290 is None to the student and ")


def test_a_student_may_know_more_tokens_than_its_teacher(tmp_path: Path) -> None:
    teacher, student = (
        ModelFolder(make_tokenizer(tmp_path / name), StudentError).tokenizer for name in ("teacher", "student")
    )
    student.add_tokens(["<image>"])
    assert vocabulary_digest(student) != vocabulary_digest(teacher)
    assert vocabulary_difference(student, teacher) == ""
    assert vocabulary_difference(teacher, student) == "id 300 is None to the student and '<image>' to the teacher"


def test_a_tokenizer_that_cannot_be_written_is_an_oserror(tmp_path: Path, tmpfs: Callable[[str], Path]) -> None:
    folder = make_tokenizer(make_model("llama", tmp_path / "model", vocab_size=304))
    tokenizer = ModelFolder(folder, TeacherError).tokenizer
    disk = tmpfs("64k")
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    with pytest.raises(OSError, match="No space left") as caught:
        save_tokenizer(tokenizer, disk)
    assert caught.value.errno == errno.ENOSPC
