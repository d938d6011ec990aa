"""Teachers that are mixtures of experts, by both engines: their rows are those of transformers' own model."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tests.chats import write_chats
from tests.engines import engines_end
from tests.models import EXPERTS, make_model, make_tokenizer

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.sample import row_positions
from kdpipe.manifests.specs import DataSpec, Dtype
from kdpipe.stages.extract import ExtractSpec, extract
from kdpipe.stages.rows import as_tensor


def cached(kind: str, folder: Path, engine: str, dtype: Dtype, **options: int) -> Cache:
    """A cache of a few chats by a teacher in folder/teacher."""
    teacher = folder / "teacher"
    if not teacher.exists():
        make_tokenizer(make_model(kind, teacher, dtype=dtype, vocab_size=304))
    spec = ExtractSpec(
        teacher=teacher,
        data=(write_chats(folder / "data.jsonl", 12),),
        data_spec=DataSpec(max_length=128),
        engine=engine,
        device="cpu",
        options=EngineOptions(timeout_s=120, **options),
    )
    return extract(spec, folder / engine, Silent())


def errors(cache: Cache, teacher: Path) -> np.ndarray:
    """Of each row how far it is from that of transformers' own model, in float32 and each sample alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        teacher, dtype=torch.float32, experts_implementation="eager"
    )
    found = []
    for view in cache:
        ids = torch.from_numpy(view.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            own = model.model(ids).last_hidden_state[0][row_positions(view.supervised)]
        rows = as_tensor(np.array(view.rows)).float()
        found.append(((rows - own).norm(dim=1) / own.norm(dim=1)).numpy())
    return np.concatenate(found)


@pytest.mark.parametrize("kind", EXPERTS)
def test_rows_of_transformers_are_its_own(kind: str, tmp_path: Path) -> None:
    assert errors(cached(kind, tmp_path, "transformers", "float32"), tmp_path / "teacher").max() < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", EXPERTS)
def test_rows_of_sglang_are_transformers_own(kind: str, dtype: Dtype, tmp_path: Path) -> None:
    """In bfloat16 rounding sends a token to another expert here and there."""
    with engines_end():
        found = errors(cached(kind, tmp_path, "sglang", dtype), tmp_path / "teacher")
    if dtype == "float32":
        assert found.max() < 1e-5
    else:
        assert np.median(found) < 0.03


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", EXPERTS)
def test_sglang_shares_the_experts_out_among_ranks(kind: str, tmp_path: Path) -> None:
    with engines_end():
        assert errors(cached(kind, tmp_path, "sglang", "float32", tp=2), tmp_path / "teacher").max() < 1e-5
