"""A student sees each packed sample as if it were alone, and shards without changing a gradient."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tests.conftest import Bench
from tests.opened import load_student, teacher_of
from tests.stages.conftest import STUDENTS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.feed.packing import PackedBatch, Packer
from kdpipe.stages.ranks import joined
from kdpipe.stages.student import (
    Student,
    load_teacher_head,
    shard,
)

CPU = torch.device("cpu")
LOSSES = [
    LossSpec(divergence="forward_kl", kd_weight=0.5),
    LossSpec(divergence="reverse_kl", temperature=2.0),
    LossSpec(divergence="jsd", options={"beta": 0.3}),
    LossSpec(kd_weight=0.0),
]


def opened(folder: Path) -> Student:
    student = Student(load_student(folder, torch.float32, CPU))
    student.examine(np.arange(3, 45), folder)
    return student


def gradients(
    student: Student, batches: Sequence[PackedBatch], bench: Bench, loss: LossSpec
) -> dict[str, torch.Tensor]:
    """Gradients summed over the batches, by parameter, with the loss under "loss"."""
    teacher = [load_teacher_head(teacher_of(Cache.open(bench.cache)), CPU)]
    student.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        value, _ = student(batch, teacher, loss)
        value.backward()
        total += value.detach()
    return {"loss": total} | {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["plain", *STUDENTS])
def test_rows_and_head_of_a_cache_give_the_teachers_own_logits(
    kind: str, bench: Bench, families: dict[str, Bench]
) -> None:
    """What a student distils from is the teacher's distribution: bias, scale and soft cap with it."""
    some = families.get(kind, bench)
    cache = Cache.open(some.cache)
    teacher = load_teacher_head(teacher_of(cache), CPU)
    model = transformers.AutoModelForCausalLM.from_pretrained(some.teacher, dtype=torch.float32)
    view = cache[0]
    with torch.no_grad():
        logits = model(torch.tensor(view.token_ids, dtype=torch.int64)[None]).logits[0]
    at = torch.nonzero(torch.tensor(view.supervised)[1:])[:, 0]
    ours = teacher.head.logits(torch.tensor(view.rows), teacher.vocab_size)
    assert (ours - logits[at, :300]).abs().max() <= 2e-6 * logits.abs().max()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.divergence}-{loss.kd_weight}")
@pytest.mark.parametrize("padded", [False, True])
def test_packing_changes_neither_loss_nor_gradient(loss: LossSpec, padded: bool, bench: Bench) -> None:
    rows = of_caches([Cache.open(bench.cache)])
    members = [3, 17, 4, 29, 50]
    student = opened(bench.student)
    alone = gradients(student, [copy(Packer(rows).pack([member])) for member in members], bench, loss)
    if padded:
        student.model.set_attn_implementation("sdpa")
    together = gradients(student, [Packer(rows, padded=padded).pack(members)], bench, loss)
    assert together.keys() == alone.keys()
    for name, gradient in alone.items():
        assert (together[name] - gradient).abs().max() <= 2e-6 * gradient.abs().max(), name


def copy(batch: PackedBatch) -> PackedBatch:
    """A batch that outlives its packer's buffer."""
    return PackedBatch(
        **{name: getattr(batch, name) for name in batch.__dataclass_fields__}
        | {"teacher_rows": tuple(rows.clone() for rows in batch.teacher_rows)}
    )


def test_swapping_two_samples_rows_changes_the_loss(bench: Bench) -> None:
    """The comparison above can fail: the same ids with another sample's teacher rows give another loss."""
    rows = of_caches([Cache.open(bench.cache)])
    student = opened(bench.student)
    batch = Packer(rows).pack([3, 17])
    right = gradients(student, [batch], bench, LOSSES[0])["loss"]
    batch.teacher_rows[0].copy_(batch.teacher_rows[0].flip(0))
    wrong = gradients(student, [batch], bench, LOSSES[0])["loss"]
    assert abs(wrong - right) > 1e-4 * abs(right)


def test_an_exam_leaves_the_parameters_sharded(bench: Bench) -> None:
    """An optimizer made of whole ones would train copies that the next step throws away."""
    with joined(CPU):
        student = Student(load_student(bench.student, torch.float32, CPU))
        shard(student, init_device_mesh("cpu", (1,)), torch.bfloat16, CPU)
        student.examine(np.arange(3, 45), bench.student)
        assert all(isinstance(parameter, DTensor) for parameter in student.parameters())
