"""Time of a step across tokenizers beside TRL's GOLD on the same tensors, and memory beside the loss of one tokenizer.

A step is value and gradients to hidden states and head. Rivals: TRL's ULDLoss, hybrid and plain, on the dense logits of
both models that it takes, matrix products included as ours are; merging by the chain rule in both. One process, one
thread, processor time; a round runs everything once, each ratio is taken within its round and the median over rounds is
printed. Memory is the peak of resident memory over the inputs, each in a fresh process; its base is the same-tokenizer
loss (forward KL) of as many rows at the larger of the two vocabularies. `make rivals` installs TRL.
"""

# Shapes: R rows of the student, P rows of the teacher, V and U their vocabularies, K spans.

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.loss import Head, Side, fused_distill_loss
from kdpipe.stages.loss.cross import METHODS, distill_across, extra_of
from kdpipe.stages.loss.memory import release_scratch
from kdpipe.stages.loss.spans import Spans

Step = Callable[[], object]
SHARE = 0.8
"""Of the smaller vocabulary that is shared, and of spans that are exact: the others are of two tokens on each side."""
WIDTHS = 512, 1024


@dataclass(frozen=True, slots=True)
class Case:
    """Shapes: spans, student's and teacher's vocabulary."""

    num_spans: int
    student_size: int
    teacher_size: int

    def __str__(self) -> str:
        return f"bf16 K={self.num_spans} D={WIDTHS[0]} E={WIDTHS[1]} V={self.student_size} U={self.teacher_size}"


@dataclass(frozen=True, slots=True)
class Vocabularies:
    student_ids: Tensor
    teacher_ids: Tensor
    student_size: int
    teacher_size: int
    student_bytes: list[bytes | None]
    teacher_bytes: list[bytes | None]


@dataclass(frozen=True, slots=True)
class Inputs:
    student: Side
    teacher: Side
    spans: Spans
    vocabulary: Vocabularies

    def drop_gradients(self) -> None:
        self.student.hidden.grad = self.student.head.weight.grad = None


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    make = partial(torch.randn, dtype=torch.bfloat16, generator=generator)
    lengths = 1 + (torch.rand(case.num_spans, generator=generator) > SHARE).long()
    runs = torch.stack([lengths.cumsum(0) - lengths, lengths], 1)
    rows, shared = int(lengths.sum()), int(SHARE * min(case.student_size, case.teacher_size))
    tokens = [torch.randint(0, size, (rows,), generator=generator) for size in (case.student_size, case.teacher_size)]
    theirs: list[bytes | None] = [index.to_bytes(3, "big") for index in range(case.teacher_size)]
    own: list[bytes | None] = [
        index.to_bytes(3, "big")
        if index < shared
        else (index % shared).to_bytes(3, "big") + (index * 7 % shared).to_bytes(3, "big")
        for index in range(case.student_size)
    ]
    heads = make(case.student_size, WIDTHS[0]).mul_(0.08), make(case.teacher_size, WIDTHS[1]).mul_(0.06)
    return Inputs(
        Side(make(rows, WIDTHS[0]).requires_grad_(), Head(heads[0].requires_grad_())),
        Side(make(rows, WIDTHS[1]), Head(heads[1])),
        Spans(student=runs, teacher=runs, student_tokens=tokens[0], teacher_tokens=tokens[1]),
        Vocabularies(torch.arange(shared), torch.arange(shared), case.student_size, case.teacher_size, own, theirs),
    )


def our_step(method: str, inputs: Inputs, **spec: Any) -> Step:
    loss = LossSpec(**spec)
    heads = Head(inputs.student.head.weight.detach()), inputs.teacher.head
    extra = extra_of(method, *WIDTHS, inputs.vocabulary, loss.options, heads=heads)

    def step() -> None:
        distill_across(
            inputs.student,
            inputs.teacher,
            inputs.spans,
            None,
            method=method,
            loss=loss,
            vocabulary=inputs.vocabulary,
            extra=extra,
        ).loss.backward()
        inputs.drop_gradients()
        if extra is not None:
            extra.zero_grad()

    return step


def one_tokenizer_step(case: Case, num_rows: int) -> Step:
    """The loss of one tokenizer, of as many rows and the larger vocabulary."""
    size = max(case.student_size, case.teacher_size)
    make = partial(torch.randn, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    hidden, theirs = make(num_rows, WIDTHS[0]).requires_grad_(), make(num_rows, WIDTHS[1])
    head, their_head = make(size, WIDTHS[0]).mul_(0.08).requires_grad_(), make(size, WIDTHS[1]).mul_(0.06)

    def step() -> None:
        fused_distill_loss(hidden, head, theirs, their_head).loss.backward()
        hidden.grad = head.grad = None

    return step


def trl_step(inputs: Inputs, *, hybrid: bool) -> Step:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gold.gold_trainer import ULDLoss

    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=hybrid,
        uld_token_merge_strategy="bayesian",
        uld_use_hybrid_loss=hybrid,
        uld_hybrid_matched_weight=None,
        uld_hybrid_unmatched_weight=None,
        beta=0.5,
    )
    shared = len(inputs.vocabulary.student_ids)
    names = [
        Tokenizer(models.WordLevel({f"{owner if index >= shared else ''}{index}": index for index in range(size)}))
        for owner, size in (("s", inputs.vocabulary.student_size), ("t", inputs.vocabulary.teacher_size))
    ]
    loss, pad = ULDLoss(config, *names), nn.functional.pad
    spans = inputs.spans
    tokens = [pad(each, (1, 0))[None] for each in (spans.student_tokens, spans.teacher_tokens)]
    labels = [pad(each, (1, 0), value=-100)[None] for each in (spans.student_tokens, spans.teacher_tokens)]
    offsets = [
        pad(offsets_of(runs, pace), (0, 0, 1, 0))[None] for runs, pace in ((spans.student, 7), (spans.teacher, 11))
    ]

    def step() -> None:
        with torch.no_grad():
            theirs = inputs.teacher.hidden @ inputs.teacher.head.weight.T
        own = inputs.student.hidden @ inputs.student.head.weight.T
        # fp32, as accelerate hands them on; one row more, of the last token, which predicts nothing.
        logits = [pad(each, (0, 0, 0, 1))[None].float() for each in (own, theirs)]
        loss(*logits, *labels, *tokens, *offsets).backward()
        inputs.drop_gradients()

    return step


def offsets_of(runs: Tensor, pace: int) -> Tensor:
    """Byte offsets [rows, 2] in a text of 100 bytes a span, whose tokens end every `pace` bytes and at its end."""
    ends = [
        100 * span + (100 if place == count - 1 else pace * (place + 1))
        for span, (_, count) in enumerate(runs.tolist())
        for place in range(count)
    ]
    return torch.tensor([[start, end] for start, end in zip([0, *ends[:-1]], ends, strict=True)])


GOLD = {"divergence": "jsd"}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "gold": ("gold", GOLD),
    "xtoken-hybrid": ("xtoken", {"options": {"hybrid": 1}}),
}
"""By the name printed: method, keys of [loss]."""
RIVALS = {"gold": True, "uld": False}
"""What TRL has, by whether it is its hybrid loss."""


def processor_time(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def time_cases(case: Case, rounds: int, names: list[str]) -> list[dict[str, object]]:
    """A line a method: its time and TRL's over that of the loss of one tokenizer."""
    inputs = make_inputs(case)
    steps: dict[str, Step] = {"one tokenizer": one_tokenizer_step(case, len(inputs.spans.student_tokens))}
    steps |= {name: our_step(OURS[name][0], inputs, **OURS[name][1]) for name in names}
    if find_spec("trl"):
        steps |= {f"trl-{name}": trl_step(inputs, hybrid=RIVALS[name]) for name in names if name in RIVALS}
    for step in steps.values():
        step()
    times = [{name: processor_time(step) for name, step in steps.items()} for _ in range(rounds)]

    def ratio(name: str) -> float:
        return round(statistics.median(taken[name] / taken["one tokenizer"] for taken in times), 3)

    return [
        record(case, name, "time", "x loss of one tokenizer", ratio(name), {rival: ratio(rival)})
        if (rival := f"trl-{name}") in steps
        else record(case, name, "time", "x loss of one tokenizer", ratio(name), {})
        for name in names
    ]


def memory_cases(case: Case, names: list[str]) -> list[dict[str, object]]:
    """A line a method: its peak over the inputs beside that of the loss of one tokenizer, and TRL's."""

    def peak(name: str) -> float:
        child = [
            sys.executable,
            __file__,
            "--peak",
            name,
            *map(str, (case.num_spans, case.student_size, case.teacher_size)),
        ]
        return float(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout)

    base, lines = peak("one tokenizer"), []
    for name in names:
        rivals = {"one tokenizer": base}
        if name in RIVALS and find_spec("trl"):
            rivals[f"trl-{name}"] = peak(f"trl-{name}")
        lines.append(record(case, name, "memory", "MiB over inputs", peak(name), rivals))
    return lines


def step_of(name: str, case: Case) -> Step:
    if name == "one tokenizer":
        return one_tokenizer_step(case, int(make_inputs(case).spans.student[:, 1].sum()))
    if name.startswith("trl-"):
        return trl_step(make_inputs(case), hybrid=RIVALS[name.removeprefix("trl-")])
    return our_step(OURS[name][0], make_inputs(case), **OURS[name][1])


def print_peak(name: str, case: Case) -> None:
    """In a fresh process: peak resident MiB of one step, over what is resident before it."""
    # A smaller step first: libraries and compiled code are not the step's memory, kept buffers are.
    for each in (Case(64, case.student_size, case.teacher_size), case):
        step = step_of(name, each)
        release_scratch()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at the present size
        before = resident_kib("VmRSS")
        step()
    print(round((resident_kib("VmHWM") - before) / 1024, 1))


def resident_kib(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def record(case: Case, name: str, metric: str, unit: str, value: float, rivals: dict[str, float]) -> dict[str, object]:
    named = {"bench": "across", "case": f"{name} {case}", "metric": metric, "unit": unit}
    return {**named, "kdpipe": value, "rivals": rivals}


QUICK = Case(256, 16384, 20000)
USUAL = Case(800, 32768, 49152)
LONG = Case(3200, 32768, 49152)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="within a minute: a small shape, few rounds, no memory")
    parser.add_argument("--methods", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        name, *sizes = arguments.peak
        print_peak(name, Case(*map(int, sizes)))
        return
    names = arguments.methods
    lines = time_cases(QUICK, 2, names) if arguments.quick else time_cases(USUAL, 5, names)
    if not arguments.quick:
        lines += [line for case in (USUAL, LONG) for line in memory_cases(case, names)]
    for line in lines:
        print(json.dumps(line) if arguments.json else "  ".join(str(value) for value in line.values()), flush=True)


if __name__ == "__main__":
    main()
