"""A plan with prompts in it: records without an answer are samples without rows; all others are what they were."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tests.stages.extracting import files, small_spec

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.sample import is_heldout, prompt_of
from kdpipe.stages.extract import ExtractSpec, forecast
from kdpipe.stages.extract.staging import staged
from kdpipe.stages.prepare import samples as samples_module


def planned(spec: ExtractSpec, folder: Path) -> Cache:
    with staged(replace(spec, keep_rows=False), folder, Silent()) as found:
        return found.publish()


def asking(spec: ExtractSpec, path: Path) -> ExtractSpec:
    """The same data with every other answer left out, each in another way."""
    lines = []
    for number, line in enumerate(spec.data[0].read_text().splitlines()):
        record = json.loads(line)
        question = record["messages"][0]
        ways: list[Any] = [
            record,
            {"messages": [question]},
            record,
            {"messages": [question, {"role": "assistant", "content": ""}]},
            record,
            {"prompt": question["content"]},
        ]
        lines.append(json.dumps(ways[number % len(ways)]))
    path.write_text("\n".join(lines) + "\n")
    return replace(spec, data=(path,), prompts=True)


def test_records_with_answers_make_the_same_plan_with_prompts_and_without(tmp_path: Path) -> None:
    spec = small_spec(tmp_path)
    made = []
    for number, prompts in enumerate((False, True)):
        with staged(replace(spec, prompts=prompts), tmp_path / f"cache{number}", Silent()) as found:
            assert found.folder is not None
            made.append(files(found.folder) | {"log": (found.folder / "runs" / "prepare.jsonl").read_bytes()})
    assert made[0].keys() >= {"PLAN.json", "samples.arrow", "shards.arrow"}
    assert made[0] == made[1]


def test_a_record_without_an_answer_is_a_sample_without_rows(tmp_path: Path) -> None:
    spec = small_spec(tmp_path)
    whole = planned(spec, tmp_path / "whole")
    cache = planned(asking(spec, tmp_path / "asked.jsonl"), tmp_path / "asked")
    assert len(cache) == len(whole) == 12
    rows, targets = cache.samples.column("num_rows"), cache.samples.column("num_supervised")
    assert (rows[1::2] == 0).all()
    assert (targets == rows).all()
    assert cache.plan.num_rows == rows.sum()
    for sample in range(len(cache)):
        ours, theirs = cache.samples.tokens(sample), whole.samples.tokens(sample)
        assert prompt_of(ours).tolist() == prompt_of(theirs).tolist()
        if sample % 2:
            assert not ours.supervised.any()
            assert prompt_of(ours).tolist() == ours.token_ids.tolist()
        else:
            assert ours.token_ids.tolist() == theirs.token_ids.tolist()
            assert rows[sample] == whole.samples.column("num_rows")[sample]
    cache.samples.check_counts()
    assert planned(asking(spec, tmp_path / "asked.jsonl"), tmp_path / "asked").plan == cache.plan


def test_shards_of_prompts_alone_are_planned_and_opened_again(tmp_path: Path) -> None:
    spec = small_spec(tmp_path)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {number}?"}) + "\n" for number in range(40)))
    made = planned(replace(spec, data=(path,), prompts=True), tmp_path / "cache")
    cache = Cache.open(tmp_path / "cache")
    assert len(cache.plan.shards) > 1
    assert (cache.plan.num_rows, cache.plan.num_samples) == (0, 40)
    assert cache.plan == made.plan
    ids = cache.samples.column("content_id")
    assert 0 < is_heldout(ids, 0.5).sum() < 40
    assert len(np.unique(ids, axis=0)) == 40


def test_a_forecast_counts_prompts_without_rows(tmp_path: Path) -> None:
    spec = asking(small_spec(tmp_path), tmp_path / "asked.jsonl")
    found, cache = forecast(spec, Silent()), planned(spec, tmp_path / "cache")
    assert (found.num_samples, found.num_tokens, found.num_rows) == (12, cache.plan.num_tokens, cache.plan.num_rows)


def test_processes_make_the_same_prompts(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(samples_module, "BATCH_RECORDS", 3)
    spec = asking(small_spec(tmp_path), tmp_path / "asked.jsonl")
    made = [planned(replace(spec, prepare_workers=workers), tmp_path / f"c{workers}") for workers in (1, 2)]
    assert made[0].plan == made[1].plan
