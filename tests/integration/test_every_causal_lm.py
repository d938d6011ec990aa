"""Every causal LM of transformers, as student and as teacher: equal to its own logits, or refused in one line."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tests.conftest import Bench
from tests.families import families, make_family
from tests.models import make_tokenizer
from tests.opened import load_student, student_in, teacher_in, teacher_of
from tests.stages.teacher.make_requests import make_request
from torch.distributed.device_mesh import init_device_mesh

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CheckFailed, KdpipeError, StudentError, TeacherError
from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.feed.packing import Packer
from kdpipe.stages.ranks import joined
from kdpipe.stages.student import Student, check_student, exam_text, load_teacher_head, shard
from kdpipe.stages.teacher.describe import describe_teacher
from kdpipe.stages.teacher.engine import Request, RowTarget
from kdpipe.stages.teacher.head import read_head
from kdpipe.stages.teacher.transformers_engine import TransformersEngine

CPU = torch.device("cpu")
ODD = ("llama4_text", "gpt2", "cohere2", "rwkv", "mamba", "cpmant", "bert")
"""Chunked attention and a backbone without a name; positions in a table; scaled logits; no attention; layers within
layers; a projection before the head."""


def own_logits(folder: Path, ids: np.ndarray) -> torch.Tensor:
    """[n, V] of one sample by transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0]
    return logits.double()


def worst(ours: torch.Tensor, own: torch.Tensor) -> float:
    return float((ours.double() - own).norm() / own.norm())


def wide(request: Request, width: int) -> Request:
    rows = np.zeros((len(request.positions), width), np.float32)
    return replace(request, target=RowTarget(array=rows, path=Path("unused"), offset=0))


def as_student(folder: Path, bench: Bench) -> float:
    """The error of the logits that its loss is computed from, over a batch of samples; a training step runs."""
    cache = Cache.open(bench.cache)
    check_student(student_in(folder), teacher_of(cache))
    rows = of_caches([cache])
    student = Student(load_student(folder, torch.float32, CPU)).train()
    shard(student, init_device_mesh("cpu", (1,)), torch.float32, CPU)
    student.examine(exam_text(rows, np.arange(len(cache)), student.model.config), folder)
    members = [3, 17, 4]
    batch = Packer(rows, padded=student.padded).pack(members)
    student(batch, [load_teacher_head(teacher_of(cache), CPU)], LossSpec(kd_weight=0.5))[0].backward()
    assert any(parameter.grad is not None for parameter in student.parameters())
    student.eval()
    with torch.no_grad():
        student.unshard()
        ours = student.head().logits(student.hidden(batch), student.head().weight.shape[0])
    views = [cache[member] for member in members]
    own = [own_logits(folder, view.token_ids)[np.flatnonzero(view.supervised[1:])] for view in views]
    return worst(ours, torch.cat(own))


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    with joined(CPU):
        yield


def as_teacher(folder: Path, bench: Bench) -> float:
    """The error of the logits recomputed from the rows that its engine writes for a batch of samples."""
    info = describe_teacher(teacher_in(folder), "float32")
    head = read_head(info)
    engine = TransformersEngine(teacher_in(folder), dtype="float32", device="cpu")
    requests = [wide(make_request(sample, length), info.hidden_size) for sample, length in ((0, 41), (1, 19))]
    engine.canary(head, [request.token_ids for request in requests])
    list(engine.run([requests]))
    ours = [head.entries(torch.from_numpy(each.target.array), 0, info.head_rows) for each in requests]
    own = [own_logits(folder, each.token_ids)[each.positions] for each in requests]
    return worst(torch.cat(ours), torch.cat(own))


def verdict(use: Callable[[Path, Bench], float], folder: Path, bench: Bench) -> str:
    """ "equal" or "refused: why"; anything else is a line that begins with WRONG or CRASH."""
    try:
        error = use(folder, bench)
    except (StudentError, TeacherError, CheckFailed) as err:
        return f"refused: {str(err).replace(str(folder), '')}"
    except KdpipeError as err:
        return f"CRASH {err}"
    except Exception as err:
        return f"CRASH {type(err).__name__}: {err}"
    return "equal" if error <= 1e-4 else f"WRONG by {error:.1e}"


@pytest.mark.parametrize("family", ODD)
def test_an_odd_family_is_equal_to_its_own_logits_or_refused(family: str, bench: Bench, tmp_path: Path) -> None:
    folder = make_tokenizer(make_family(family, tmp_path / family))
    for use in (as_student, as_teacher):
        found = verdict(use, folder, bench)
        assert found == "equal" or (found.startswith("refused: E-") and "\n" not in found), found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_family_is_equal_to_its_own_logits_or_refused(bench: Bench, tmp_path: Path) -> None:
    wrong, unbuilt = [], []
    for family in families():
        folder = tmp_path / family
        try:
            make_tokenizer(make_family(family, folder))
        except Exception as err:
            unbuilt.append(family)
            print(f"{family:28} not built: {type(err).__name__}: {' '.join(str(err).split())[:80]}")
            continue
        for use in (as_student, as_teacher):
            found = " ".join(verdict(use, folder, bench).split())
            print(f"{family:28} {use.__name__:10} {found[:160]}", flush=True)
            if not found.startswith(("equal", "refused: E-")):
                wrong.append(f"{family} {use.__name__}: {found}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    assert len(unbuilt) < 0.15 * len(families())
