"""K students on one cache, against the ideal T + K*S and against a teacher that runs in every student's step.

    kdpipe   planning + extraction (gate, checksums, fsync and all) + K epochs of training from the cache
    ideal    reading the data + the teacher's forward passes, rows thrown away, + K epochs on rows that lie in memory
    live     reading the data + K times (the teacher's forward passes + an epoch on rows that lie in memory)

What both sides do alike (loading models, compiling kernels) is done once beforehand and timed for neither. Extraction
and bare passes alternate, training steps from the cache and from memory alternate step by step; each repetition gives
one ratio, the median is printed.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all Python adds

from tests.chats import write_chats
from tests.models import make_model, make_tokenizer

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import TeacherError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.specs import RunSpec, TrainSpec
from kdpipe.stages.extract import ExtractSpec, forecast
from kdpipe.stages.extract.shards import fill, missing_shards
from kdpipe.stages.extract.staging import staged
from kdpipe.stages.feed.packing import PackedBatch
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.ranks import joined
from kdpipe.stages.teacher.transformers_engine import TransformersEngine
from kdpipe.stages.train.run import Run
from kdpipe.stages.train.training import Training, find

STUDENTS = 4
TEACHER = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
STUDENT = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


class Sweep:
    """Models, data and the two ways of doing everything."""

    def __init__(self, folder: Path, num_samples: int, sizes: Mapping[str, int] = TEACHER) -> None:
        self.folder = folder
        teacher = make_tokenizer(
            make_model("qwen3", folder / "teacher", dtype="bfloat16", vocab_size=2048, sizes=sizes)
        )
        student = make_tokenizer(make_model("llama", folder / "student", vocab_size=2048, seed=1, sizes=STUDENT))
        data = write_chats(folder / "data.jsonl", num_samples, longest=150)
        self.spec = ExtractSpec(teacher=teacher, data=(data,), device="cpu")
        self.engine = TransformersEngine(ModelFolder(teacher, TeacherError), dtype="bfloat16", device="cpu")
        self.model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16)
        self.training = Training(
            student=student,
            caches=(folder / "cache-0",),
            output=folder / "out",
            spec=RunSpec(train=TrainSpec(batch_tokens=4096, epochs=100)),
        )

    def extract(self, number: int) -> float:
        """Seconds of planning and filling a cache, the engine loaded beforehand."""

        def action() -> None:
            with staged(self.spec, self.folder / f"cache-{number}", Silent()) as plan:
                todo = missing_shards(plan.plan, plan.cache, None)
                fill(plan.publish(), self.engine, plan.head, Silent(), todo)

        return seconds(action)

    def teacher_alone(self, cache: Cache) -> float:
        """Seconds of reading the data and the bare forward passes over it, without lm_head, rows thrown away."""

        @torch.inference_mode()
        def action() -> None:
            forecast(self.spec, Silent())
            for view in cache:
                self.model.base_model(torch.tensor(view.token_ids, dtype=torch.int64)[None], use_cache=False)

        return seconds(action)

    def train(self, run: Run, epoch: int) -> tuple[float, float]:
        """Seconds of an epoch's steps from the cache, and of the same steps on batches that lie in memory."""
        cached = memory = 0.0
        for step in range(run.planned.steps_per_epoch):
            held = [hold(batch) for batch in run.batches.step(step)]
            for from_cache in (True, False) if (step + epoch) % 2 else (False, True):
                if from_cache:
                    cached += seconds(partial(take_step, run, step))
                else:
                    with fed_from(run, held):
                        memory += seconds(partial(take_step, run, step))
        return cached, memory


def hold(batch: PackedBatch) -> PackedBatch:
    """The batch with rows of its own."""
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return PackedBatch(
        **fields
        | {"teacher_rows": tuple(rows.clone() for rows in batch.teacher_rows if isinstance(rows, torch.Tensor))}
    )


@contextmanager
def fed_from(run: Run, held: list[PackedBatch]) -> Iterator[None]:
    """The run's batches are these, whatever the step."""
    own = run.batches.step
    run.batches.step = lambda step: iter(held)  # type: ignore[method-assign]
    yield
    run.batches.step = own  # type: ignore[method-assign]


def take_step(run: Run, step: int) -> None:
    run.trainer.done = step
    run.trainer.step()


def measure(folder: Path, num_samples: int, repetitions: int) -> dict[str, list[float]]:
    """Ratios of every repetition: kdpipe over ideal, live over ideal."""
    sweep = Sweep(folder, num_samples)
    ratios: dict[str, list[float]] = {"kdpipe": [], "live teacher": []}
    sweep.extract(0)
    cache = Cache.open(folder / "cache-0")
    with joined(torch.device("cpu")) as ranks:
        run = Run(sweep.training, find(sweep.training), ranks)
        sweep.train(run, 0)  # kernels are compiled for every length of batch
        for repetition in range(1, repetitions + 1):
            times = {}
            for what in ("extract", "alone") if repetition % 2 else ("alone", "extract"):
                times[what] = sweep.extract(repetition) if what == "extract" else sweep.teacher_alone(cache)
            cached, memory = sweep.train(run, repetition)
            ideal = times["alone"] + STUDENTS * memory
            ratios["kdpipe"].append((times["extract"] + STUDENTS * cached) / ideal)
            ratios["live teacher"].append(STUDENTS * (times["alone"] + memory) / ideal)
            print(f"T {times} cached {cached:.2f} memory {memory:.2f}", file=sys.stderr)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="less data, within a minute")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        ratios = measure(Path(name), *((40, 3) if options.quick else (150, 5)))
    found = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
    record = {
        "bench": "sweep",
        "case": f"{STUDENTS} students, teacher 8x512, student 4x256, bf16",
        "metric": "time",
        "unit": "x (T + 4 S)",
        "kdpipe": found.pop("kdpipe"),
        "rivals": found,
    }
    if options.json:
        print(json.dumps(record))
    else:
        print(f"{record['case']}: kdpipe {record['kdpipe']}, {found} {record['unit']}")


if __name__ == "__main__":
    main()
