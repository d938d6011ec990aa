"""Whole small runs of the model families that do more between hidden state and logits than a matrix product."""

import pytest
from tests.chats import write_chats
from tests.conftest import Bench
from tests.models import make_model, make_tokenizer

from kdpipe.manifests.progress import Silent
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.extract import ExtractSpec, extract

STUDENTS: dict[str, dict[str, float]] = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 1.5},
    "phi": {},
}
"""A soft cap, a scale, a divisor and a bias; each student's is another than its teacher's (tests.models.OWN)."""


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bench]:
    """A teacher, its cache and a student of each of these kinds."""
    folder = tmp_path_factory.mktemp("families")
    data = write_chats(folder / "data.jsonl", 12)
    made = {}
    for kind, sizes in STUDENTS.items():
        teacher = make_tokenizer(make_model(kind, folder / kind / "teacher", vocab_size=304))
        student = make_model(kind, folder / kind / "student", vocab_size=320, seed=1, sizes=sizes)
        cache = folder / kind / "cache"
        data_spec = DataSpec(max_length=128, heldout_fraction=0.4)
        extract(ExtractSpec(teacher=teacher, data=(data,), data_spec=data_spec), cache, Silent())
        made[kind] = Bench(teacher=teacher, student=make_tokenizer(student), data=data, cache=cache)
    return made
