"""The real SGLang, on CPU, writes a file of answers: greedy ones are those of transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.chats import write_chats
from tests.conftest import Bench
from tests.engines import engines_end

from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.specs import LiveSpec
from kdpipe.stages.generate import GenerateSpec, generate, run

pytestmark = pytest.mark.timeout(600)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_greedy_answers_of_sglang_are_those_of_transformers(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(run.WINDOW, "cpu", 4)
    spec = GenerateSpec(
        model=bench.teacher,
        prompts=(write_chats(tmp_path / "chats.jsonl", 6),),
        out=tmp_path / "a.jsonl",
        sampling=LiveSpec(temperature=0.0, max_new_tokens=12),
        dtype="float32",
        device="cpu",
    )
    generate(spec, Silent())
    by_sglang = replace(spec, out=tmp_path / "b.jsonl", engine="sglang")
    with engines_end():
        made = generate(by_sglang, Silent())
    assert [each["messages"] for each in lines(by_sglang.out)] == [each["messages"] for each in lines(spec.out)]
    for ours, own in zip(lines(by_sglang.out), lines(spec.out), strict=True):
        assert ours["finish_reason"] == own["finish_reason"]
        assert ours["kdpipe"]["mean_logprob"] == pytest.approx(own["kdpipe"]["mean_logprob"], abs=1e-3)
    assert generate(by_sglang, Silent()) == made
    with pytest.raises(ConfigError, match=r"b\.jsonl: it was written with engine = 'sglang'"):
        generate(replace(by_sglang, engine="transformers"), Silent())


def test_options_of_another_engine_are_refused(bench: Bench, tmp_path: Path) -> None:
    spec = GenerateSpec(model=bench.teacher, prompts=(bench.data,), out=tmp_path / "a.jsonl", device="cpu")
    with pytest.raises(ConfigError, match="are for --engine sglang"):
        generate(replace(spec, options=EngineOptions(quantization="fp8")), Silent())
    assert not spec.out.exists()
