"""Faults of model folders and data files: the right result, or one line and exit 4; never a traceback or half a folder.

The faults are in loading_faults.py. A few run in the usual tests, all of them in the long ones.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import Main
from tests.integration.loading_faults import FAULTS, write_data
from tests.models import make_model, make_tokenizer

from kdpipe.manifests.cache import Cache

EVERY = 30
"""One of so many faults is tried in the usual tests."""
TRAIN = ("--device", "cpu", "--nproc", 1, "--json", "--set", "train.max_steps=1", "data.heldout_fraction=0.5")
Sample = tuple[list[int], list[bool], bytes]


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Folders and data as they are without a fault, and what comes of them."""

    teacher: Path
    student: Path
    data: Path
    cache: Path
    metrics: dict[str, object]


def samples(cache: Path) -> list[Sample]:
    opened = Cache.open(cache)
    return sorted((v.token_ids.tolist(), v.supervised.tolist(), np.asarray(v.rows).tobytes()) for v in opened)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    from kdpipe.manifests.progress import Silent
    from kdpipe.manifests.specs import DataSpec, RunSpec, TrainSpec
    from kdpipe.stages.extract import ExtractSpec, extract
    from kdpipe.stages.train import train
    from kdpipe.stages.train.training import Training

    folder = tmp_path_factory.mktemp("whole")
    teacher = make_tokenizer(make_model("qwen3", folder / "teacher", vocab_size=304))
    student = make_tokenizer(make_model("llama", folder / "student", vocab_size=304, seed=1))
    write_data(data := folder / "d.jsonl")
    spec = ExtractSpec(teacher=teacher, data=(data,), data_spec=DataSpec(heldout_fraction=0))
    extract(spec, folder / "cache", Silent())
    run = RunSpec(train=TrainSpec(max_steps=1), data=DataSpec(heldout_fraction=0.5))
    training = Training(student=student, caches=(folder / "cache",), output=folder / "out", spec=run, device="cpu")
    metrics = train(training, Silent())
    return Whole(teacher=teacher, student=student, data=data, cache=folder / "cache", metrics=metrics)


FAST = set(list(FAULTS)[::EVERY])


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS]
)
def test_a_fault_changes_nothing_or_is_one_line(name: str, whole: Whole, main: Main, tmp_path: Path) -> None:
    fault = FAULTS[name]
    given, made = tmp_path / "given", tmp_path / "made"
    if fault.role == "data":
        given.mkdir()
    else:
        shutil.copytree(getattr(whole, fault.role), given)
    fault.change(given)
    made.mkdir()
    teacher, data = (given if fault.role == "teacher" else whole.teacher), whole.data
    if fault.role == "data":
        data = given / name.split()[1]
    if fault.role == "student":
        args = ("train", "--student", given, "--cache", whole.cache, "--output", made / "out", *TRAIN)
    else:
        args = ("extract", "--teacher", teacher, "--data", data, "--cache", made / "out", "--heldout-fraction", 0)
    code, out, err = main(*args)
    assert "Traceback" not in err
    if code:
        errors = [line for line in err.splitlines() if line.startswith("E-")]
        assert (code, out, len(errors), err.splitlines()[-1:]) == (4, "", 1, errors), err
        assert list(made.iterdir()) == [], "nothing is half written"
        return
    if fault.role == "student":
        assert json.loads(out)["heldout_kl"] == whole.metrics["heldout_kl"]
    else:
        assert samples(made / "out") == samples(whole.cache)
