"""The table of engines: what a name stands for, and what is refused before anything is loaded."""

import importlib.metadata
import subprocess
import sys

import pytest

from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.errors import ConfigError
from kdpipe.stages.sglang.version import TRIED
from kdpipe.stages.teacher import engine_class, pick_engine


def test_importing_the_stage_loads_no_torch() -> None:
    code = "import sys, kdpipe.stages.teacher as t; assert t.ENGINES; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_auto_takes_sglang_on_a_gpu_for_models_that_were_tried_and_says_why() -> None:
    chosen = pick_engine("auto", architecture="LlamaForCausalLM", device="cuda")
    assert (chosen.name, "runs LlamaForCausalLM" in chosen.reason) == ("sglang", True)
    chosen = pick_engine("auto", architecture="CohereForCausalLM", device="cuda")
    assert (chosen.name, "CohereForCausalLM was not tried" in chosen.reason) == ("transformers", True)
    chosen = pick_engine("auto", architecture="LlamaForCausalLM", device="cpu")
    assert (chosen.name, "no GPU" in chosen.reason) == ("transformers", True)
    assert pick_engine("sglang", architecture="anything", device="cpu").name == "sglang"
    with pytest.raises(ConfigError, match="did you mean 'transformers'"):
        pick_engine("transformer", architecture="LlamaForCausalLM", device="cpu")


def test_a_version_that_was_not_tried_is_refused_naming_those_that_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.7")
    with pytest.raises(ConfigError, match=f"sglang 0.4.7 is installed, kdpipe was tried with {TRIED[0]}"):
        engine_class("sglang").version()
    chosen = pick_engine("auto", architecture="LlamaForCausalLM", device="cuda")
    assert (chosen.name, "0.4.7" in chosen.reason) == ("transformers", True)


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ("transformers", EngineOptions(tp=2), "for --engine sglang"),
        ("transformers", EngineOptions(arguments=(("kv_cache_dtype", "fp8_e5m2"),)), "for --engine sglang"),
        ("sglang", EngineOptions(pp=2), "between pipeline stages"),
        ("sglang", EngineOptions(arguments=(("disable_radix_cache", "false"),)), "is set by kdpipe"),
    ],
)
def test_options_an_engine_cannot_have_are_refused(engine: str, options: EngineOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_class(engine).determinism("cpu", options)


def test_what_a_plan_records_of_the_options_is_what_a_recomputation_runs_with() -> None:
    asked = EngineOptions(quantization="fp8", deterministic=True, arguments=(("kv_cache_dtype", "fp8_e5m2"),))
    here = EngineOptions(tp=2, timeout_s=9.0, quantization="int4", arguments=(("a", "b"),))
    assert here.like(asked.identity()) == EngineOptions(
        tp=2, timeout_s=9.0, quantization="fp8", deterministic=True, arguments=(("kv_cache_dtype", "fp8_e5m2"),)
    )
    assert asked.like(EngineOptions().identity()) == EngineOptions()


def test_the_plan_records_what_decides_the_rows() -> None:
    options = EngineOptions(tp=2, quantization="fp8", deterministic=True, arguments=(("kv_cache_dtype", "fp8_e5m2"),))
    assert options.identity() == {"quantization": "fp8", "deterministic": "true", "kv_cache_dtype": "fp8_e5m2"}
    assert engine_class("sglang").determinism("cuda", options) == "bitwise"
    assert EngineOptions(tp=8, dp=4, mem_fraction=0.8).identity() == {}
