"""On a GPU: is the fused loss exact there, and how far is it from its four products and from the roofline?

    python tools/gpu/loss.py [--json]

Errors are against fp64 on the same inputs, beside those of the dense formulas in the same dtype. Times are of CUDA
events, rivals interleaved, median of rounds, each over the products alone; memory is torch's peak over the inputs. The
roofline is the products' operations over the rate of one large product, plus the logits' bytes over the rate of one
large copy. Not yet run on a GPU: none was at hand. With --device cpu and small sizes it shows that it works.
"""

# Shapes: T tokens, V vocabulary, D student width, E teacher width.

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from kdpipe.stages.loss import DIVERGENCES, fused_distill_loss, reference_distill_loss

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from loss import BETAS, Inputs, Step, dense_step, dense_value, floor_step, fused_step, liger_step, next_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    tokens: int = 8192
    student_width: int = 2048
    teacher_width: int = 4096
    vocab: int = 151936

    @property
    def product_flops(self) -> float:
        return 2.0 * self.tokens * self.vocab * (3 * self.student_width + self.teacher_width)

    @property
    def logit_bytes(self) -> float:
        """bf16: both models' logits written and read, the gradient written and read by two products."""
        return 2.0 * self.tokens * self.vocab * 7


def make_inputs(sizes: Sizes, device: torch.device) -> Inputs:
    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    student, teacher = make(sizes.tokens, sizes.student_width), make(sizes.tokens, sizes.teacher_width)
    heads = (make(sizes.vocab, sizes.student_width) * 0.04, make(sizes.vocab, sizes.teacher_width) * 0.03)
    return Inputs(student.requires_grad_(), heads[0].requires_grad_(), teacher, heads[1])


def worst_errors(divergence: str, device: torch.device) -> dict[str, float]:
    """Relative errors of value, hidden's and head's gradient against fp64, and of the dense formula's gradient."""
    sizes = Sizes(tokens=509, student_width=128, teacher_width=96, vocab=32771)
    inputs = make_inputs(sizes, device)
    tensors = [getattr(inputs, field.name) for field in fields(inputs)]
    wide = [each.detach().double() for each in tensors]
    for each in wide[:2]:
        each.requires_grad_()

    def result(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    given = {"divergence": divergence, "next_tokens": next_tokens(tensors[0])}
    right = result(reference_distill_loss(*wide, **given).loss, wide[:2])
    ours = result(fused_distill_loss(*tensors, **given).loss, tensors[:2])
    logits = inputs.student_hidden @ inputs.student_head.T, inputs.teacher_hidden @ inputs.teacher_head.T
    dense = result(dense_value(divergence, *logits), tensors[:2])

    def error(found: Tensor, truth: Tensor) -> float:
        return float((found.double() - truth).norm() / truth.norm())

    names = ("value", "hidden", "head")
    told = {name: error(a, b) for name, a, b in zip(names, ours, right, strict=True)}
    return told | {f"dense {name}": error(a, b) for name, a, b in zip(names, dense, right, strict=True)}


def seconds(step: Step, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def best(step: Step, device: torch.device) -> float:
    step()
    return min(seconds(step, device) for _ in range(5))


def roofline(sizes: Sizes, device: torch.device) -> float:
    """Seconds the step cannot do without, at this device's own rates."""
    side = 8192 if device.type == "cuda" else 512
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    rate = 2.0 * side**3 / best(lambda: square @ square, device)
    copy = torch.empty_like(square)
    bandwidth = 2 * square.nbytes / best(lambda: copy.copy_(square), device)
    return sizes.product_flops / rate + sizes.logit_bytes / bandwidth


def peak_mib(step: Step, device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(divergence: str, sizes: Sizes, device: torch.device, rounds: int) -> list[dict[str, object]]:
    inputs = make_inputs(sizes, device)
    floor = floor_step(inputs)
    steps: dict[str, Step] = {"kdpipe": partial(fused_step, divergence, inputs)}
    steps["dense-compiled"] = partial(dense_step, torch.compile(partial(dense_value, divergence)), inputs)
    if divergence in BETAS and find_spec("liger_kernel"):
        steps["liger"] = liger_step(inputs, BETAS[divergence])
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, float] = {}
    for name, step in list(steps.items()):
        try:
            step()
            peaks[name] = round(peak_mib(step, device), 1)
        except torch.OutOfMemoryError:
            del steps[name], ratios[name]  # it does not fit: no figure
    floor_seconds = []
    for _ in range(rounds):
        floor_seconds.append(seconds(floor, device))
        for name, step in steps.items():
            ratios[name].append(seconds(step, device) / floor_seconds[-1])
    times = {name: round(statistics.median(each), 3) for name, each in ratios.items()}
    times["roofline"] = round(roofline(sizes, device) / statistics.median(floor_seconds), 3)
    case = f"{divergence} bf16 N={sizes.tokens} D={sizes.student_width} E={sizes.teacher_width} V={sizes.vocab}"
    named = {"bench": "loss-gpu", "case": case}
    return [
        {**named, "metric": "time", "unit": "x floor", "kdpipe": times.pop("kdpipe"), "rivals": times},
        {**named, "metric": "memory", "unit": "MiB over inputs", "kdpipe": peaks.pop("kdpipe"), "rivals": peaks},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=10)
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=getattr(Sizes(), field.name))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    sizes = Sizes(**{field.name: getattr(arguments, field.name) for field in fields(Sizes)})
    show: Callable[[dict[str, object]], None] = (
        (lambda line: print(json.dumps(line), flush=True)) if arguments.json else (lambda line: print(line, flush=True))
    )
    torch.manual_seed(0)
    for divergence in DIVERGENCES:
        if divergence != "sampled_kl":  # fp64 draws other tokens
            show({"bench": "loss-gpu", "case": divergence, "metric": "error", **worst_errors(divergence, device)})
    for divergence in DIVERGENCES:
        for line in measure(divergence, sizes, device, arguments.rounds):
            show(line)


if __name__ == "__main__":
    main()
