"""A training step by adapters (LoRA, QLoRA) beside one of all weights: time, and the peak of resident memory.

Each case runs in a fresh process: a random Llama is written once, a few steps are trained on random tokens with a
cross-entropy loss, the first of them not timed. Rounds run every case once and a ratio is taken within its round; the
median over the rounds is printed. Memory is the peak over a process that has imported the same and loaded nothing.
`head` is the loss alone, value and gradients, with its head frozen, with an adapter on it, and trained.
"""

# Shapes: T tokens, V vocabulary, D width, r rank of an adapter.

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_rank": 8},
    "lora with head": {"lora_rank": 8, "lora_head": True},
    "qlora": {"lora_rank": 8, "lora_base_bits": 4},
}
HEADS = ("trained", "frozen", "adapter")


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Of the student, and of its batches."""

    hidden: int
    layers: int
    vocab: int
    tokens: int
    steps: int

    def __str__(self) -> str:
        return f"llama D={self.hidden} L={self.layers} V={self.vocab} T={self.tokens}"


FULL = Size(hidden=768, layers=12, vocab=32768, tokens=1024, steps=4)
QUICK = Size(hidden=256, layers=4, vocab=8192, tokens=256, steps=3)


def main() -> None:
    options = arguments()
    if options.case:
        print(json.dumps(measured(options.case, Path(options.folder), QUICK if options.quick else FULL)))
        return
    size, rounds = (QUICK, 3) if options.quick else (FULL, 5)
    cases = [name for name in CASES if name != "qlora" or find_spec("bitsandbytes")]
    with tempfile.TemporaryDirectory() as folder:
        write_student(Path(folder), size)
        base = run("nothing", folder, quick=options.quick)["bytes"]
        found = [{name: run(name, folder, quick=options.quick) for name in cases} for _ in range(rounds)]
    ratios = {
        name: statistics.median(each[name]["seconds"] / each["full"]["seconds"] for each in found) for name in cases
    }
    over = {name: statistics.median(each[name]["bytes"] - base for each in found) for name in cases}
    for metric, unit, values in (
        ("time", "x a step of all weights", ratios),
        ("memory", "MiB over nothing loaded", {name: value / 2**20 for name, value in over.items()}),
    ):
        told(str(size), metric, unit, values, as_json=options.json)
    head = head_ratios(size, rounds)
    told(f"loss T={size.tokens} V={size.vocab} D={size.hidden}", "time", "x a trained head", head, as_json=options.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="within a minute")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def told(case: str, metric: str, unit: str, values: dict[str, float], *, as_json: bool) -> None:
    for name, value in values.items():
        line = {"bench": "lora", "case": f"{case} {name}", "metric": metric, "unit": unit, "kdpipe": round(value, 3)}
        print(json.dumps(line) if as_json else f"{line['case']:60} {metric:7} {value:10.3f} {unit}", flush=True)


def run(name: str, folder: str, *, quick: bool) -> dict[str, float]:
    """A case in a process of its own, on one thread."""
    words = [sys.executable, __file__, "--case", name, "--folder", folder, *(["--quick"] if quick else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_student(folder: Path, size: Size) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 128,
        vocab_size=size.vocab,
        max_position_embeddings=4096,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def measured(name: str, folder: Path, size: Size) -> dict[str, float]:
    """Processor seconds of a step, the median, and the peak of resident memory."""
    import torch

    from kdpipe.manifests.errors import StudentError
    from kdpipe.manifests.specs import LossSpec, StudentSpec, TrainSpec
    from kdpipe.stages.models.folder import ModelFolder
    from kdpipe.stages.ranks import joined
    from kdpipe.stages.student import load_sharded, lora_of
    from kdpipe.stages.train.trainer import Trainer

    seconds = []
    if name != "nothing":
        model = ModelFolder(folder, StudentError)
        lora = lora_of(model, StudentSpec(**CASES[name]))
        stored = torch.float32 if lora is None else torch.bfloat16
        with joined(torch.device("cpu")) as ranks:
            student = load_sharded(model, ranks, stored=stored, computed=torch.bfloat16, lora=lora).train()
            student.examine(torch.arange(3, 67).numpy().astype("int32"), folder)
            spec, loss = TrainSpec(max_steps=size.steps), LossSpec(kd_weight=0.0)
            trainer = Trainer(student, Tokens(size), [], spec, loss, ranks)  # type: ignore[arg-type]
            for _ in range(size.steps):
                started = time.process_time()
                trainer.step()
                seconds.append(time.process_time() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(seconds[1:] or [0.0]), "bytes": peak}


class Tokens:
    """Batches of random tokens, all of them supervised."""

    def __init__(self, size: Size) -> None:
        self.size, self.num_steps = size, size.steps

    def num_supervised(self, step: int) -> int:
        return self.size.tokens

    def step(self, step: int) -> Any:
        import torch

        from kdpipe.stages.feed.packing import PackedBatch

        count = self.size.tokens + 1  # of which the last predicts nothing
        ids = torch.randint(3, self.size.vocab, (1, count), generator=torch.Generator().manual_seed(step))
        places = torch.arange(count)
        yield PackedBatch(
            input_ids=ids,
            position_ids=places[None],
            seq_lens=torch.tensor([count], dtype=torch.int32),
            bounds=(0, count),
            attention_mask=None,
            row_positions=places[:-1],
            labels=ids[0, 1:],
            keys=places[:-1],
            teacher_rows=(),
        )


def head_ratios(size: Size, rounds: int) -> dict[str, float]:
    """Processor time of the loss with each kind of head over that with a trained one."""
    import torch

    from kdpipe.manifests.specs import LossSpec
    from kdpipe.stages.loss import Head, LowRank, Side, distill, pose

    torch.set_num_threads(1)
    made = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.bfloat16)

    hidden, weight, low = (
        random(size.tokens, size.hidden),
        random(size.vocab, size.hidden) * 0.05,
        random(size.tokens, 8),
    )
    up, labels = random(size.vocab, 8) * 0.05, torch.randint(0, size.vocab, (size.tokens,), generator=made)

    def step(kind: str) -> Callable[[], None]:
        def taken() -> None:
            own = weight.clone().requires_grad_(kind == "trained")
            adapter = LowRank(low.clone().requires_grad_(), up.clone().requires_grad_()) if kind == "adapter" else None
            side = Side(hidden.clone().requires_grad_(), Head(own), adapter)
            distill(pose(side, [], labels, loss=LossSpec(kd_weight=0.0))).loss.backward()

        return taken

    steps = {kind: step(kind) for kind in HEADS}
    for each in steps.values():
        each()
    seconds = [{kind: clocked(each) for kind, each in steps.items()} for _ in range(2 * rounds)]
    return {kind: statistics.median(each[kind] / each["trained"] for each in seconds) for kind in HEADS}


def clocked(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
