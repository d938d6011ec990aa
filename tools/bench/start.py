"""Memory of two ranks that start a student of 1 GB in float32, over each rank's share of it.

From the folder to the weights as FSDP2 has them, by the processes' own accounts in /proc: what the larger of the two
ranks has above a process that has done nothing but import torch and the student's class from transformers.

    kdpipe           each rank reads its part of the files (`load_sharded`), the folder examined before
    rank 0 reads     one rank loads the whole student and sends each layer to the others, as kdpipe does for mixtures
    from_pretrained  every rank loads the whole student, then keeps its part

anonymous: pages of the process's own, sampled every 2 ms; resident: with pages of mapped files (libraries, weights),
the kernel's own high-water mark. --quick: a student of 0.25 GB, where what is imported on the way weighs four times.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all Python adds

from kdpipe.manifests.errors import StudentError
from kdpipe.pipeline.launch import launch
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.ranks import Ranks, joined
from kdpipe.stages.student import Student, load_sharded, shard

RANKS = 2
VOCAB_SIZE = 32768
LAYER = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
NUM_LAYERS = 14
CPU = torch.device("cpu")
STATUS = Path("/proc/self/status")
EMPTY = f"""
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # `import transformers` alone imports next to nothing
print(open("{STATUS}").read())
"""
SAMPLED = {"anonymous": "RssAnon", "resident": "VmHWM"}
"""Fields of /proc/self/status."""


def make_student(folder: Path, *, quick: bool) -> int:
    """A llama of random weights in several files; its bytes."""
    sizes = LAYER | ({"hidden_size": 512, "intermediate_size": 1408} if quick else {})
    config = transformers.LlamaConfig(vocab_size=VOCAB_SIZE, num_hidden_layers=NUM_LAYERS, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="300MB")
    return sum(parameter.nbytes for parameter in model.parameters())


def kib(status: str) -> dict[str, int]:
    """Of /proc/PID/status."""
    lines = {line.partition(":")[0]: line.partition(":")[2] for line in status.splitlines()}
    return {name: int(lines[field].split()[0]) for name, field in SAMPLED.items()}


def empty() -> dict[str, int]:
    """KiB of a process that has imported torch and transformers, nothing else."""
    done = subprocess.run([sys.executable, "-c", EMPTY], capture_output=True, text=True, timeout=120, check=True)
    return kib(done.stdout)


@contextmanager
def peaks() -> Iterator[dict[str, int]]:
    """KiB at the peak of the block."""
    found, over = dict.fromkeys(SAMPLED, 0), threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            for name, size in kib(STATUS.read_text()).items():
                found[name] = max(found[name], size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def in_parts(folder: ModelFolder, ranks: Ranks) -> Student:
    return load_sharded(folder, ranks, stored=torch.float32, computed=torch.bfloat16)


def first_reads(folder: ModelFolder, ranks: Ranks) -> Student:
    model = folder.load(torch.float32, CPU) if ranks.rank == 0 else folder.skeleton(torch.float32)
    return shard(Student(model), ranks.mesh(), torch.bfloat16, CPU)


def all_read(folder: ModelFolder, ranks: Ranks) -> Student:
    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32)
    return shard(Student(model), ranks.mesh(), torch.bfloat16, CPU)


WAYS: dict[str, Callable[[ModelFolder, Ranks], Student]] = {
    "kdpipe": in_parts,
    "rank 0 reads": first_reads,
    "from_pretrained": all_read,
}


def start(way: str, path: Path) -> dict[str, int]:
    """As one rank: KiB at the peak of the worst rank."""
    with peaks() as found, joined(CPU) as ranks:
        student = WAYS[way](ModelFolder(path, StudentError), ranks)
        assert not any(parameter.is_meta for parameter in student.parameters())
        ranks.barrier()
        worst = ranks.largest([float(found[name]) for name in SAMPLED])
    return dict(zip(SAMPLED, map(int, worst), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--quick", action="store_true", help="a student of 0.25 GB")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        num_bytes, base = make_student(folder, quick=args.quick), empty()
        found = {way: launch(start, way, folder, nproc=RANKS) for way in WAYS}
    share = num_bytes / RANKS
    for name in SAMPLED:
        ratios = {way: round((peak[name] - base[name]) * 1024 / share, 3) for way, peak in found.items()}
        case = f"{RANKS} ranks, {num_bytes / 1e9:.2f} GB in fp32, V={VOCAB_SIZE}, {name}"
        report("memory", case, "x share", ratios, as_json=args.json)


def report(metric: str, case: str, unit: str, ratios: dict[str, float], *, as_json: bool) -> None:
    ours, rivals = ratios["kdpipe"], {name: ratio for name, ratio in ratios.items() if name != "kdpipe"}
    if as_json:
        head = {"bench": "start", "case": case, "metric": metric, "unit": unit}
        print(json.dumps({**head, "kdpipe": ours, "rivals": rivals}))
    else:
        others = ", ".join(f"{name} {ratio}" for name, ratio in rivals.items())
        print(f"{case}: kdpipe {ours} {unit}; {others}")


if __name__ == "__main__":
    main()
