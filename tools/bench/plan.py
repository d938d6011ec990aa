"""Planning: samples a second from a data file to PLAN.json and its two tables, in one process and in two.

    kdpipe       describing the teacher, tokenising, digests, tables, fsync: all but the copy of the teacher's head
    tokenizer    one thread of the tokenizer alone over the same texts, rendered beforehand, with ids and offsets: the
                 floor of what one process can do

The three take turns; each repetition gives a ratio, the median is printed. The two processes of a machine whose two
processors are one core's threads share it: the ratio is then far from two.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all Python adds
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in the pool: one process is one thread

from tests.chats import write_chats
from tests.models import make_model, make_tokenizer

from kdpipe.manifests.errors import TeacherError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.extract import ExtractSpec
from kdpipe.stages.extract.staging import staged
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.prepare.forms import read_form
from kdpipe.stages.prepare.sources import read_records
from kdpipe.stages.prepare.tokens import Tokenizing

BATCH = 256


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


class Planning:
    """A teacher, data, and the three ways through it."""

    def __init__(self, folder: Path, num_samples: int) -> None:
        teacher = make_tokenizer(make_model("qwen3", folder / "teacher", vocab_size=304))
        data = write_chats(folder / "data.jsonl", num_samples)
        self.spec = ExtractSpec(teacher=teacher, data=(data,), data_spec=DataSpec(), device="cpu")
        self.folder, self._count = folder, 0
        tokenizer = ModelFolder(teacher, TeacherError).tokenizer
        marked = Tokenizing(tokenizer, "assistant")
        self.texts = [marked.mark(read_form(record, set()), record.place).text for record in read_records(data)]
        self.backend = tokenizer.backend_tokenizer

    def plan(self, workers: int) -> float:
        """Seconds of planning in so many processes."""

        def action() -> None:
            self._count += 1
            with staged(replace(self.spec, prepare_workers=workers), self.folder / f"c{self._count}", Silent()):
                pass

        return seconds(action)

    def tokenize(self) -> float:
        """Seconds of the tokenizer alone."""

        def action() -> None:
            for first in range(0, len(self.texts), BATCH):
                for found in self.backend.encode_batch(self.texts[first : first + BATCH], add_special_tokens=False):
                    _ = found.ids, found.offsets

        return seconds(action)


def measure(folder: Path, num_samples: int, repetitions: int) -> dict[str, float]:
    """Samples a second by way; of the repetitions the medians."""
    planning = Planning(folder, num_samples)
    ways: dict[str, Callable[[], float]] = {
        "one process": lambda: planning.plan(1),
        "two processes": lambda: planning.plan(2),
        "tokenizer": planning.tokenize,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    planning.plan(1)  # libraries are loaded
    for repetition in range(repetitions):
        for name, way in reversed(ways.items()) if repetition % 2 else ways.items():
            found[name].append(num_samples / way())
            print(f"{name} {found[name][-1]:,.0f} samples/s", file=sys.stderr)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="less data, within a minute")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), *((16_000, 3) if options.quick else (100_000, 3)))
    floor = found.pop("tokenizer")
    for name, speed in found.items():
        record = {
            "bench": "plan",
            "case": f"short chats, {name}",
            "metric": "throughput",
            "unit": "samples/s",
            "kdpipe": round(speed),
            "rivals": {"tokenizer alone, one thread": round(floor)},
        }
        if options.json:
            print(json.dumps(record))
        else:
            print(f"{record['case']}: {speed:,.0f} samples/s, the tokenizer alone {floor:,.0f}")


if __name__ == "__main__":
    main()
