"""Golden runs: what the two commands made before the walls moved, bit for bit; a move of code changes none of it.

golden/runs.json holds digests of a cache's files, and of each training run the losses in hexadecimal and a digest of
the student's weights. They are those of one kind of processor and one version of torch: elsewhere sums round otherwise,
and numbers are compared within their rounding there. Made anew, where a change of numbers is meant, by

    KDPIPE_GOLDEN=write python -m pytest -n 0 tests/integration/test_golden.py
"""

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.chats import write_chats
from tests.conftest import Main
from tests.models import make_model, make_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "runs.json"
SETS = ["train.dtype=float32", "train.lr=1e-3", "train.batch_tokens=400", "train.max_steps=4", "loss.kd_weight=0.7"]
SLOW = {(2, "packed", 1), (2, "padded", 1), (2, "padded", 3)}
RUNS = [
    # A launch takes seconds of each core: of those with two ranks one is fast.
    pytest.param(kind, nproc, accum, marks=[pytest.mark.slow] * ((nproc, kind, accum) in SLOW))
    for kind in ("packed", "padded")
    for nproc in (1, 2)
    for accum in (1, 3)
]
MODEL = ("vendor_id", "cpu family", "model")
"""Of a processor, as /proc/cpuinfo names it."""
LOGGED = ("loss/mean", "grad_norm", "lr", "num_tokens", "num_supervised")


def machine() -> dict[str, str]:
    """What decides how sums round: libraries choose their kernels by the maker and the model of the processor too."""
    told = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    processor = {name.strip(): value.strip() for name, value in told.items()}
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": " ".join([platform.machine(), *(processor.get(name, "") for name in MODEL)]),
        "transformers": transformers.__version__,
    }


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """The file, or an empty one to fill where it is to be written."""
    if os.environ.get("KDPIPE_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps({"machine": machine(), "cache": {}, "runs": {}}))
    found: dict[str, Any] = json.loads(GOLDEN.read_text())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, a packed and a padded student, data."""
    made = tmp_path_factory.mktemp("golden")
    make_tokenizer(make_model("qwen3", made / "teacher", vocab_size=304))
    make_tokenizer(make_model("llama", made / "packed", vocab_size=320, seed=1, sizes={"hidden_size": 32}))
    config = transformers.MambaConfig(
        vocab_size=320, hidden_size=32, state_size=4, num_hidden_layers=2, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(2)
    transformers.MambaForCausalLM(config).save_pretrained(made / "padded")
    make_tokenizer(made / "padded")
    write_chats(made / "data.jsonl", 40)
    return made


@pytest.fixture
def one_thread_a_rank(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks' too: they read it when torch loads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def extracted(main: Main, folder: Path) -> Path:
    """The cache, made by the first test that asks."""
    cache = folder / "cache"
    if not (cache / "PLAN.json").exists():
        chosen = ["--max-length", 128, "--heldout-fraction", 0.25, "--engine", "transformers", "--device", "cpu"]
        code, _, err = main(
            "extract", "--teacher", folder / "teacher", "--data", folder / "data.jsonl", "--cache", cache, *chosen
        )
        assert code == 0, err
    return cache


def kept(golden: dict[str, Any], table: str, name: str, found: Any) -> Any:
    """What the file has, or has from now on where it is written."""
    if os.environ.get("KDPIPE_GOLDEN") == "write":
        golden[table][name] = found
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    return golden[table][name]


def test_cache_has_the_bytes_it_had(main: Main, golden: dict[str, Any], folder: Path, one_thread_a_rank: None) -> None:
    cache = extracted(main, folder)
    files = [path for path in sorted(cache.rglob("*")) if path.is_file() and "runs" not in path.parts]
    found = {path.relative_to(cache).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    wanted = kept(golden, "cache", "files", found)
    # Ids, masks and order hold on any machine; rows, and what has their digest in it, on one that rounds alike.
    assert found.keys() == wanted.keys()
    assert found["samples.arrow"] == wanted["samples.arrow"]
    if machine() == golden["machine"]:
        assert found == wanted


@pytest.mark.parametrize(("kind", "nproc", "accum"), RUNS)
def test_training_takes_the_steps_it_took(
    main: Main,
    golden: dict[str, Any],
    folder: Path,
    kind: str,
    nproc: int,
    accum: int,
    one_thread_a_rank: None,
) -> None:
    cache, output = extracted(main, folder), folder / f"{kind}-{nproc}-{accum}"
    paths = ["--student", folder / kind, "--cache", cache, "--output", output, "--device", "cpu"]
    code, _, err = main("train", *paths, "--nproc", nproc, "--set", *SETS, f"train.grad_accum={accum}")
    assert code == 0, err
    assert ("batches are padded" in err) == (kind == "padded")
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    steps = [[event[name] for name in LOGGED] for event in events if event["kind"] == "step"]
    assert len(steps) == 4
    weights = load_file(output / "model.safetensors")
    digest = hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()
    found = {"steps": [[float(value).hex() for value in step] for step in steps], "weights": digest}
    wanted = kept(golden, "runs", output.name, found)
    if machine() == golden["machine"]:
        assert found == wanted
    for step, was in zip(steps, wanted["steps"], strict=True):
        assert step == pytest.approx([float.fromhex(value) for value in was], rel=1e-4)
