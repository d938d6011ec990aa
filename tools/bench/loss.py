"""Time and memory of one loss step (value and gradients to hidden and head) against the matrix products alone.

The floor is the four products a loss cannot do without: both models' logits, the gradients of hidden and head. The
rivals are the dense formulas as KDFlow and others write them, eager and under torch.compile, and the installed Liger
(LigerFusedLinearJSDLoss, compiled) and TRL (generalized_jsd_loss on whole logits; for forward KL its fused loss too,
whose products are fp32 on a CPU) where they have the divergence. One process, one thread, processor time; a round runs
everything once, each ratio is taken within its round and the median over rounds is printed. Memory is the peak of
resident memory over the inputs, each in a fresh process. `make rivals` installs Liger and TRL; without them only the
dense formulas are run.
"""

# Shapes: T tokens, V vocabulary, D student width, E teacher width.

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kdpipe.stages.draws import uniform
from kdpipe.stages.loss import DIVERGENCES, fused_distill_loss
from kdpipe.stages.loss.memory import release_scratch

Step = Callable[[], object]
CHEAP = 4.0
"""Times the floor up to which each timed step follows an untimed one of the same: a step that frees gigabytes makes the
next one's memory dear where a host takes freed pages back from its virtual machines, whoever that next one is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One shape and divergence; the widths are 512 for the student and 1024 for the teacher."""

    divergence: str
    num_tokens: int
    vocab_size: int
    dtype: str = "bf16"

    def __str__(self) -> str:
        return f"{self.divergence} {self.dtype} N={self.num_tokens} D=512 E=1024 V={self.vocab_size}"


@dataclass(frozen=True, slots=True)
class Inputs:
    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
"""What of the table Liger and TRL have, by their beta."""


def make_inputs(num_tokens: int, vocab_size: int, dtype: str = "bf16") -> Inputs:
    make = partial(torch.randn, dtype=DTYPES[dtype], generator=torch.Generator().manual_seed(0))
    student, teacher = make(num_tokens, 512), make(num_tokens, 1024)
    heads = make(vocab_size, 512).mul_(0.08), make(vocab_size, 1024).mul_(0.06)
    return Inputs(student.requires_grad_(), heads[0].requires_grad_(), teacher, heads[1])


def dense_value(divergence: str, student: Tensor, teacher: Tensor) -> Tensor:
    """The divergence of two [T, V] logits by its dense definition, as KDFlow and others write it."""
    chosen = DIVERGENCES[divergence]
    log_s, log_t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    options: dict[str, Any] = dict(chosen.resolve({}))
    if chosen.of_token:
        options["draws"] = next_tokens(student)[:, None]
    if chosen.draws is not None:
        keys = torch.arange(len(student), device=student.device)
        options["draws"] = uniform(keys, int(options[chosen.draws]), 0)
    return chosen.reference(log_t, log_s, **options).sum()


def next_tokens(rows: Tensor) -> Tensor:
    """Some token of a small vocabulary for each row, int64 [T]."""
    return torch.arange(len(rows), device=rows.device) % 1000


def dense_step(value: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> None:
    with torch.no_grad():
        teacher = inputs.teacher_hidden @ inputs.teacher_head.T
    value(inputs.student_hidden @ inputs.student_head.T, teacher).backward()
    drop_gradients(inputs)


def liger_step(inputs: Inputs, beta: float) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=True)
    labels = torch.zeros(len(inputs.student_hidden), dtype=torch.int64, device=inputs.student_hidden.device)

    def step() -> None:
        hidden, head = inputs.student_hidden, inputs.student_head
        loss(hidden, head, inputs.teacher_hidden, inputs.teacher_head, labels).backward()
        drop_gradients(inputs)

    return step


def trl_steps(inputs: Inputs, beta: float) -> dict[str, Step]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, len(inputs.student_hidden))

    def whole(student: Tensor, teacher: Tensor) -> Tensor:
        return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="sum")

    def fused() -> None:
        hidden = inputs.student_hidden[None], inputs.teacher_hidden[None]
        _chunked_divergence_loss(*hidden, inputs.student_head, inputs.teacher_head, mask, beta)[0].backward()
        drop_gradients(inputs)

    steps: dict[str, Step] = {"trl-gkd": partial(dense_step, whole, inputs)}
    return steps | ({"trl-fused": fused} if beta == 0.0 else {})


def fused_step(divergence: str, inputs: Inputs) -> None:
    hidden, head = inputs.student_hidden, inputs.student_head
    teacher = inputs.teacher_hidden, inputs.teacher_head
    tokens = next_tokens(hidden)
    fused_distill_loss(hidden, head, *teacher, divergence=divergence, next_tokens=tokens).loss.backward()
    drop_gradients(inputs)


def drop_gradients(inputs: Inputs) -> None:
    inputs.student_hidden.grad = inputs.student_head.grad = None


def floor_step(inputs: Inputs) -> Step:
    """The four products into buffers made beforehand."""
    hidden, head = inputs.student_hidden.detach(), inputs.student_head.detach()
    student = hidden.new_empty(hidden.shape[0], head.shape[0])
    teacher, grad_hidden, grad_head = torch.empty_like(student), torch.empty_like(hidden), torch.empty_like(head)

    def step() -> None:
        torch.mm(hidden, head.T, out=student)
        torch.mm(inputs.teacher_hidden, inputs.teacher_head.T, out=teacher)
        torch.mm(student, head, out=grad_hidden)
        torch.mm(student.T, hidden, out=grad_head)

    return step


def rivals(divergence: str, inputs: Inputs, *, quick: bool = False) -> dict[str, Step]:
    """Whatever else can do it here; a compiled one only where a C++ compiler is found."""
    value = partial(dense_value, divergence)
    steps: dict[str, Step] = {} if quick else {"dense-eager": partial(dense_step, value, inputs)}
    compiler = shutil.which("g++")
    if compiler:
        steps["dense-compiled"] = partial(dense_step, torch.compile(value), inputs)
    if divergence in BETAS and not quick and find_spec("trl"):
        steps |= trl_steps(inputs, BETAS[divergence])
    if divergence in BETAS and compiler and find_spec("liger_kernel"):
        steps["liger"] = liger_step(inputs, BETAS[divergence])
    return steps


def processor_time(step: Step, *, after: Step | None = None) -> float:
    """Seconds a step takes, after an untimed one."""
    if after is not None:
        after()
    start = time.process_time()
    step()
    return time.process_time() - start


def time_case(case: Case, rounds: int, *, quick: bool = False) -> dict[str, object]:
    inputs = make_inputs(case.num_tokens, case.vocab_size, case.dtype)
    steps: dict[str, Step] = {"floor": floor_step(inputs), "kdpipe": partial(fused_step, case.divergence, inputs)}
    steps |= rivals(case.divergence, inputs, quick=quick)
    for step in steps.values():
        step()
    floor = processor_time(steps["floor"])
    cheap = [name for name, step in steps.items() if processor_time(step) < CHEAP * floor]
    times = [
        {name: processor_time(step, after=step if name in cheap else None) for name, step in steps.items()}
        for _ in range(rounds)
    ]
    ratio = {
        name: round(statistics.median(taken[name] / taken["floor"] for taken in times), 3)
        for name in steps
        if name != "floor"
    }
    return record(case, "time", "x floor", ratio)


def memory_case(case: Case, *, alone: bool = False) -> dict[str, object]:
    """alone: of kdpipe only."""
    names = ["kdpipe"] if alone else ["kdpipe", *rivals(case.divergence, make_inputs(1, 8))]
    peaks = {}
    for name in names:
        child = [sys.executable, __file__, "--peak", name, str(case.num_tokens), str(case.vocab_size), case.divergence]
        peaks[name] = float(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return record(case, "memory", "MiB over inputs", peaks)


def print_peak(name: str, num_tokens: int, vocab_size: int, divergence: str) -> None:
    """In a fresh process: peak resident MiB of one step, over what is resident before it."""
    # A smaller step first: libraries and compiled code are not the step's memory, kept buffers are.
    small, inputs = make_inputs(512, vocab_size), make_inputs(num_tokens, vocab_size)
    for each in (small, inputs):
        steps = {"kdpipe": partial(fused_step, divergence, each)} | rivals(divergence, each)
        release_scratch()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at the present size
        before = resident_kib("VmRSS")
        steps[name]()
    print(round((resident_kib("VmHWM") - before) / 1024, 1))


def resident_kib(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def record(case: Case, metric: str, unit: str, values: dict[str, float]) -> dict[str, object]:
    others = {name: value for name, value in values.items() if name != "kdpipe"}
    named = {"bench": "loss", "case": str(case), "metric": metric, "unit": unit}
    return {**named, "kdpipe": values["kdpipe"], "rivals": others}


def usual(divergence: str, dtype: str = "bf16") -> Case:
    return Case(divergence=divergence, num_tokens=1024, vocab_size=32768, dtype=dtype)


WIDE = Case(divergence="forward_kl", num_tokens=512, vocab_size=151936)
QUICK = [partial(time_case, usual(name), 3, quick=True) for name in ("forward_kl", "jsd")]
FULL = [
    *(partial(time_case, usual(name), 5) for name in DIVERGENCES),
    *(partial(time_case, usual(name, "fp32"), 5) for name in ("forward_kl", "jsd")),
    partial(time_case, WIDE, 5),
    *(
        partial(memory_case, Case(divergence=name, num_tokens=count, vocab_size=32768))
        for name in ("forward_kl", "jsd")
        for count in (2048, 8192)
    ),
    *(
        partial(memory_case, Case(divergence=name, num_tokens=8192, vocab_size=32768), alone=True)
        for name in sorted(DIVERGENCES.keys() - {"forward_kl", "jsd"})
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="within a minute: one shape, few rounds, no memory")
    parser.add_argument("--divergence", choices=DIVERGENCES, help="only the time of this one, at the first shape")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        name, num_tokens, vocab_size, divergence = arguments.peak
        print_peak(name, int(num_tokens), int(vocab_size), divergence)
        return
    only = [partial(time_case, usual(arguments.divergence), 5)] if arguments.divergence else []
    for measure in only or (QUICK if arguments.quick else FULL):
        line = measure()
        print(json.dumps(line) if arguments.json else "  ".join(str(value) for value in line.values()), flush=True)


if __name__ == "__main__":
    main()
