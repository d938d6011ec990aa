"""Memory does not grow with the cache: extracting and training on ten times as much costs no more of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.chats import write_chats
from tests.models import make_model, make_tokenizer

ROOT = Path(__file__).parent.parent.parent

# Anonymous memory alone: pages mapped from files are the page cache's, and the kernel takes them back at will.
MEASURE = """
import json, sys, threading, time
from pathlib import Path
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.specs import RunSpec, TrainSpec
from kdpipe.stages.extract import ExtractSpec, extract
from kdpipe.stages.train.training import Training
from kdpipe.stages.train import train

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

folder, peak, over = Path(sys.argv[1]), [0], threading.Event()

def watch():
    while not over.wait(0.01):
        peak[0] = max(peak[0], anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
found = {}
spec = ExtractSpec(teacher=folder / "teacher", data=(folder / "data.jsonl",), device="cpu")
cache = extract(spec, folder / "cache", Silent())
found["bytes"], found["extract"], peak[0] = cache.num_bytes(), peak[0], 0
run = RunSpec(train=TrainSpec(batch_tokens=2048, dtype="float32", max_steps=int(sys.argv[2])))
train(Training(student=folder / "student", caches=(folder / "cache",), output=folder / "out", spec=run), Silent())
found["train"] = peak[0]
over.set()
watcher.join()
print(json.dumps(found))
"""


def measure(folder: Path, num_samples: int, max_steps: int) -> dict[str, int]:
    """Bytes of the cache, and KiB of anonymous memory at the peak of extraction and of training."""
    make_tokenizer(make_model("qwen3", folder / "teacher", vocab_size=304, sizes={"hidden_size": 256}))
    make_tokenizer(make_model("llama", folder / "student", vocab_size=304, seed=1))
    write_chats(folder / "data.jsonl", num_samples)
    command = [sys.executable, "-c", MEASURE, str(folder), str(max_steps)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_times_the_cache_takes_no_more_memory(tmp_path: Path) -> None:
    small = measure(tmp_path / "small", 250, 8)
    large = measure(tmp_path / "large", 2500, 80)
    # Rows of the large cache are a sixth of the memory allowed: held in memory they would show.
    assert large["bytes"] > 9 * small["bytes"]
    assert large["bytes"] / 1024 > 0.2 * small["train"]
    for stage in ("extract", "train"):
        assert large[stage] < 1.1 * small[stage], (stage, small, large)
