"""Export: what other projects read out of the files is what the teacher's own logits say."""

# Shapes: n tokens of a sample, R stored rows of it, K tokens kept of each, V vocabulary.

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tests.caches import make_cache, make_samples
from tests.conftest import Main

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.sample import row_positions
from kdpipe.stages.exchange import export_cache
from kdpipe.stages.exchange.columns import COLUMNS

K, VOCAB = 7, 97


@pytest.fixture(scope="module", params=["supervised", "all"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("export") / "c"
    return make_cache(folder, samples=make_samples(24, vocab_size=VOCAB), rows=request.param, has_bias=True)


def exported(cache: Cache, out: Path, columns: str, **options: Any) -> Path:
    asked: dict[str, Any] = {"files": "parquet", "top_k": K} | options
    export_cache(cache, out, columns=columns, device=torch.device("cpu"), progress=Silent(), **asked)
    return out


def logprobs_of(cache: Cache, index: int) -> np.ndarray:
    """By the definition, in fp64: of every stored row [R, V]."""
    head = cache.head()
    assert head.bias is not None
    rows, weight, bias = (each.astype(np.float64) for each in (cache.stored_rows(index), head.weight, head.bias))
    logits = (rows @ weight.T + bias)[:, :VOCAB]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def in_order(cache: Cache) -> dict[str, list[int]]:
    """The samples of each split that have a row to learn from."""
    heldout, some = cache.heldout(), cache.num_supervised() > 0
    return {"train": np.flatnonzero(~heldout & some).tolist(), "test": np.flatnonzero(heldout & some).tolist()}


def positions(cache: Cache, index: int) -> np.ndarray:
    return row_positions(cache.samples.tokens(index).supervised, every=cache.plan.settings.rows == "all")


@pytest.mark.parametrize("files", ["parquet", "dataset"])
def test_plain_columns_have_every_rows_likeliest_tokens(files: str, cache: Cache, tmp_path: Path) -> None:
    out = exported(cache, tmp_path / "out", "top-k", files=files)
    for split, samples in in_order(cache).items():
        if files == "parquet":
            rows = pq.read_table(out / f"{split}-00000.parquet").to_pylist()
        else:
            rows = datasets.load_from_disk(str(out))[split].to_list()
        assert len(rows) == len(samples)
        for row, index in zip(rows, samples, strict=True):
            text, right = cache.samples.tokens(index), logprobs_of(cache, index)
            assert row["content_id"] == cache.samples.column("content_id")[index].tobytes().hex()
            assert row["source"] == f"data.jsonl:{index + 1}"
            assert row["input_ids"] == text.token_ids.tolist()
            targets = [t for t in range(1, len(text.token_ids)) if text.supervised[t]]
            assert [t for t, label in enumerate(row["labels"]) if label != -100] == targets
            assert all(row["labels"][t] == text.token_ids[t] for t in targets)
            assert row["positions"] == positions(cache, index).tolist()
            best = np.sort(right, -1)[:, ::-1][:, :K]
            np.testing.assert_allclose(row["logprobs"], best, atol=2e-5)
            np.testing.assert_allclose(np.take_along_axis(right, np.array(row["token_ids"]), -1), best, atol=2e-5)


def unpacked(data: list[int], bits: int, count: int) -> list[int]:
    """DistillKit's indices: a stream of so many bits an id, the highest first."""
    stream = "".join(f"{byte:08b}" for byte in data)
    return [int(stream[bits * place : bits * (place + 1)], 2) for place in range(count)]


def test_distillkit_reads_back_each_row_whole_where_its_mask_looks(cache: Cache, tmp_path: Path) -> None:
    out = exported(cache, tmp_path / "out", "distillkit", files="dataset")
    config = dict(line.split(": ") for line in (out / "compression_config.yaml").read_text().splitlines())
    assert (config["d"], config["k"], config["exact_k"], config["exact_dtype"]) == ("97", "7", "7", "float32")
    assert (config["delta_encoding"], config["residual_bins"]) == ("false", "[]")
    rows, samples = datasets.load_from_disk(str(out))["train"].to_list(), in_order(cache)["train"]
    masked = 0
    for row, index in zip(rows, samples, strict=True):
        text, at, right = cache.samples.tokens(index), positions(cache, index).tolist(), logprobs_of(cache, index)
        assert len(row["compressed_logprobs"]) == len(row["bytepacked_indices"]) == len(row["input_ids"])
        for t in range(len(row["input_ids"])):
            values = np.array(row["compressed_logprobs"][t], np.uint8).view("<f4")
            ids = unpacked(row["bytepacked_indices"][t], 7, K)
            assert (np.diff(values) <= 0).all()
            if t in at:
                np.testing.assert_allclose(right[at.index(t)][ids], values, atol=2e-5)
            counts = row["labels"][t] >= 0  # the mask of the divergence, in its trainer
            assert counts == (t in at and t > 0 and bool(text.supervised[t]))
            masked += counts
    assert masked


def test_axolotl_takes_the_rows_of_the_next_labels_as_distributions(cache: Cache, tmp_path: Path) -> None:
    out = exported(cache, tmp_path / "out", "axolotl")
    rows, samples = pq.read_table(out / "train-00000.parquet").to_pylist(), in_order(cache)["train"]
    for row, index in zip(rows, samples, strict=True):
        right, at = logprobs_of(cache, index), positions(cache, index).tolist()
        length = len(row["input_ids"])
        assert row["attention_mask"] == [1] * length
        for t in range(length):
            assert len(row["target_token_ids"][t]) == len(row["target_logprobs"][t]) == K
            assert np.exp(row["target_logprobs"][t]).sum() == pytest.approx(1.0, abs=1e-5)
            # "target_mask[j] -> 0 where labels[j + 1] == -100"
            wanted = t + 1 < length and row["labels"][t + 1] != -100
            assert row["target_mask"][t] == [int(wanted)] * K
            if wanted:
                kept = right[at.index(t)][row["target_token_ids"][t]]
                np.testing.assert_allclose(row["target_logprobs"][t], kept - np.log(np.exp(kept).sum()), atol=2e-5)


def test_what_is_left_out_is_said(cache: Cache, tmp_path: Path) -> None:
    out = exported(cache, tmp_path / "out", "top-k")
    record = json.loads((out / "export.json").read_text())
    left = [1 - np.exp(np.sort(logprobs_of(cache, index), -1)[:, -K:]).sum(-1) for index in range(len(cache))]
    every = np.concatenate([part for index, part in enumerate(left) if cache.num_supervised()[index]])
    assert record["left_out"] == pytest.approx(every.mean(), abs=1e-6)
    assert record["biased"].startswith("7 tokens of 97 a row; the others' probability, ")
    assert record["num_rows"] == len(every)
    assert record["cache"] == cache.plan.fingerprint.overall()
    assert (record["codec"], record["codec_kl"]) == ("raw", None)
    coded = make_cache(tmp_path / "coded", codec="int8")
    record = json.loads((exported(coded, tmp_path / "of-coded", "top-k") / "export.json").read_text())
    assert (record["codec"], record["codec_kl"]) == ("int8", coded.info()["codec_kl_mean"])
    whole = exported(cache, tmp_path / "whole", "top-k", top_k=VOCAB)
    assert json.loads((whole / "export.json").read_text())["left_out"] < 1e-6


def test_a_folder_that_is_there_and_more_tokens_than_there_are_are_refused(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="it is there already; name another folder"):
        exported(cache, tmp_path / "out", "top-k")
    with pytest.raises(ConfigError, match="--top-k: 98 tokens of a vocabulary of 97; keep fewer"):
        exported(cache, tmp_path / "other", "top-k", top_k=98)
    with pytest.raises(ConfigError, match="lies in the cache"):
        exported(cache, cache.path / "inside", "top-k")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_writes_a_folder_and_prints_what_is_in_it(cache: Cache, main: Main, tmp_path: Path) -> None:
    code, out, _ = main("cache", "export", cache.path, tmp_path / "out", "--top-k", "5", "--json")
    found = json.loads(out)
    splits = in_order(cache)
    assert code == 0
    assert (found["num_train"], found["num_test"]) == (len(splits["train"]), len(splits["test"]))
    assert found["without_rows"] == int((cache.num_supervised() == 0).sum())
    assert "column" in main("cache", "export", cache.path, tmp_path / "x", "--columns", "trl")[2]
    assert set(COLUMNS) == {"top-k", "distillkit", "axolotl"}
