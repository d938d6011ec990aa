"""Metrics across tokenizers against their definition, dense and in float64."""

import pytest
import torch

from kdpipe.stages.loss import Head, Side
from kdpipe.stages.loss.cross_metrics import CrossMetrics, cross_metrics
from kdpipe.stages.loss.spans import Spans
from kdpipe.stages.models.vocabularies import SharedVocabulary


def test_they_are_those_of_the_dense_definition() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows, others, sizes = 7, 9, (31, 43)
    student, teacher = Side(draw(rows, 5), Head(draw(35, 5))), Side(draw(others, 6), Head(draw(43, 6), softcap=2.0))
    shared = SharedVocabulary(
        student_ids=torch.tensor([2, 5, 6, 20]),
        teacher_ids=torch.tensor([40, 1, 7, 8]),
        student_size=sizes[0],
        teacher_size=sizes[1],
        student_bytes=[],
        teacher_bytes=[],
    )
    spans = Spans(
        student=torch.tensor([[0, 1], [1, 2], [4, 1], [6, 1]]),
        teacher=torch.tensor([[1, 1], [2, 1], [3, 3], [8, 1]]),
        student_tokens=torch.zeros(rows, dtype=torch.int64),
        teacher_tokens=torch.zeros(others, dtype=torch.int64),
    )
    labels = torch.tensor([3, 30, -100, 4, 5, 6, 7])
    found = cross_metrics(student, teacher, spans, labels, shared)

    logits = (student.hidden.double() @ student.head.weight.double().T)[:, : sizes[0]]
    raw = teacher.hidden.double() @ teacher.head.weight.double().T
    theirs = 2.0 * torch.tanh(raw / 2.0)
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    s = logits[[0, 6]][:, shared.student_ids].log_softmax(-1)
    t = theirs[[1, 8]][:, shared.teacher_ids].log_softmax(-1)
    expected = {
        "ce": ce,
        "num_tokens": 6,
        "num_exact": 2,
        "forward_kl": (t.exp() * (t - s)).sum(),
        "reverse_kl": (s.exp() * (s - t)).sum(),
        "top1_agree": (s.argmax(-1) == t.argmax(-1)).sum(),
        "teacher_mass": theirs[[1, 8]].softmax(-1)[:, shared.teacher_ids].sum(),
        "student_mass": logits[[0, 6]].softmax(-1)[:, shared.student_ids].sum(),
    }
    for name, value in expected.items():
        assert float(getattr(found, name)) == pytest.approx(float(value), rel=1e-5), name
    again = CrossMetrics.of_flat(found.flat() * 2)
    assert float(again.ce) == pytest.approx(2 * float(ce), rel=1e-5)
