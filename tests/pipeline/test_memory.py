"""Estimates of memory against the measured peak of a small run, which is as large as a test can be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.chats import write_chats
from tests.models import make_model, make_tokenizer

from kdpipe.pipeline.forecast import count_parameters
from kdpipe.pipeline.memory import WITHIN, ModelSizes, extract_bytes, train_bytes

ROOT = Path(__file__).parents[2]
LARGE = {
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 4,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
MEASURE = """
import json, sys, torch
from pathlib import Path
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.specs import DataSpec, RunSpec, TrainSpec
from kdpipe.stages.extract import ExtractSpec, extract
from kdpipe.stages.train import Training, train

folder, data = Path(sys.argv[1]), DataSpec(max_length=1024, heldout_fraction=0.0)

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

def peak(work):
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    made = work()
    return resident("VmHWM") - before, made

def both(size, batch_tokens):
    spec = ExtractSpec(teacher=folder / size, data=(folder / f"{size}.jsonl",), data_spec=data)
    of_extract, cache = peak(lambda: extract(spec, folder / f"{size} cache", Silent()))
    run = RunSpec(data=data, train=TrainSpec(dtype="float32", batch_tokens=batch_tokens, max_steps=1, save_every=0))
    training = Training(student=folder / size, caches=(cache.path,), output=folder / f"{size} out", spec=run)
    of_train, _ = peak(lambda: train(training, Silent()))
    return {"extract": of_extract, "train": of_train, "rows": cache.plan.num_rows, "tokens": cache.plan.num_tokens}

torch.set_num_threads(1)
both("small", 256)  # what libraries load when they are first used is theirs, not the model's
print(json.dumps(both("large", 3072)))
"""


def sizes(folder: Path) -> ModelSizes:
    return ModelSizes.of(json.loads((folder / "config.json").read_text()), count_parameters(folder))


@pytest.mark.timeout(600)
def test_the_peak_of_a_small_run_is_within_the_stated_factor_of_the_estimate(tmp_path: Path) -> None:
    for size, config, count, longest in (("small", {}, 12, 20), ("large", LARGE, 5, 900)):
        make_tokenizer(make_model("llama", tmp_path / size, vocab_size=2048, sizes=config))
        write_chats(tmp_path / f"{size}.jsonl", count, longest=longest, seed=3)
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found, model = json.loads(done.stdout.splitlines()[-1]), sizes(tmp_path / "large")
    tokens = min(found["tokens"], 3072)
    estimates = {
        "extract": extract_bytes(model, dtype="float32", batch_tokens=0, longest=1024, shard_rows=found["rows"]),
        "train": train_bytes(
            model,
            dtype="float32",
            batch_tokens=tokens,
            longest=1024,
            teacher_width=model.hidden,
            teacher_vocab=model.vocab,
            teacher_dtype="float32",
            supervised=found["rows"] / found["tokens"],
        ),
    }
    print(found, estimates)
    for stage, parts in estimates.items():
        ratio = found[stage] / parts["total_bytes"]
        assert 1 / WITHIN < ratio < WITHIN, f"{stage}: {found[stage]:,} bytes measured, estimated {parts}"


def test_what_is_shared_out_or_made_again_takes_less() -> None:
    model = ModelSizes(params=10**9, layers=20, hidden=2048, queries=2048, keys=512, intermediate=8192, vocab=50_000)
    load = {
        "dtype": "bfloat16",
        "batch_tokens": 65_536,
        "longest": 4096,
        "teacher_width": 4096,
        "teacher_vocab": 50_000,
    }
    alone = train_bytes(model, **load)
    assert alone["state_bytes"] == 16 * 10**9
    assert alone["total_bytes"] == sum(size for name, size in alone.items() if name != "total_bytes")
    eight = train_bytes(model, ranks=8, **load)
    assert eight["state_bytes"] * 8 == alone["state_bytes"]
    assert eight["activations_bytes"] * 8 == alone["activations_bytes"]
    assert train_bytes(model, ranks=8, sharded_over=4, **load)["state_bytes"] == 2 * eight["state_bytes"]
    assert train_bytes(model, grad_accum=4, **load)["activations_bytes"] * 4 == alone["activations_bytes"]
    assert train_bytes(model, grad_accum=64, **load)["activations_bytes"] * 16 == alone["activations_bytes"], (
        "a micro-batch has the longest sample at least"
    )
    assert train_bytes(model, grad_checkpointing=True, **load)["activations_bytes"] < alone["activations_bytes"] / 5
    longer = extract_bytes(model, dtype="bfloat16", batch_tokens=0, longest=8192, shard_rows=0)
    assert (
        longer["batch_bytes"]
        == 2 * extract_bytes(model, dtype="bfloat16", batch_tokens=4096, longest=512, shard_rows=0)["batch_bytes"]
    )


def test_configs_are_read_by_the_names_that_models_have() -> None:
    gpt2 = ModelSizes.of({"n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None, "vocab_size": 50257}, 124)
    assert (gpt2.hidden, gpt2.layers, gpt2.queries, gpt2.keys, gpt2.intermediate) == (768, 12, 768, 768, 3072)
    qwen = ModelSizes.of(
        {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 9}, 1
    )
    assert (qwen.queries, qwen.keys, qwen.params) == (2048, 1024, 1)
