"""Blocks and their layout: compiled is as plain, several threads and many shapes, no compiler."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.stages.loss.cases import SAMPLED, errors, make_inputs, outcome, truth
from torch._dynamo.exc import TorchDynamoException

from kdpipe.stages.loss import DIVERGENCES, fused_distill_loss, layout
from kdpipe.stages.loss.layout import chunk_size, has_compiler

# Each takes a compiler ten seconds or more: of the usual tests the three that differ most in what is compiled.
USUAL = ("jsd", "adaptive_kl", "top_k_kl")


@pytest.mark.parametrize(
    "divergence", [each if each in USUAL else pytest.param(each, marks=pytest.mark.slow) for each in DIVERGENCES]
)
def test_the_compiled_block_gives_what_the_plain_one_gives(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_compiler()
    inputs = make_inputs(53, 1031, dtype=torch.bfloat16)
    arguments: dict[str, Any] = {"divergence": divergence, "kd_weight": 0.5, "temperature": 2.0, "bias": True}
    plain = outcome(fused_distill_loss, inputs, **arguments)
    monkeypatch.setattr(layout, "WORTH_COMPILING", 0)
    monkeypatch.setitem(layout.COMPILED_ENTRIES, "cpu", 8 * 1031)
    made = []
    monkeypatch.setattr(
        torch, "compile", lambda *args, own=torch.compile, **kwargs: made.append(1) or own(*args, **kwargs)
    )
    compiled = outcome(fused_distill_loss, inputs, **arguments)
    assert made
    if divergence not in SAMPLED:  # bf16 logits draw other tokens than those of fp64
        assert max(errors(compiled, truth(inputs, **arguments))) < 1e-2
    for ours, theirs in zip((compiled.out.kd, *compiled.gradients), (plain.out.kd, *plain.gradients), strict=True):
        assert ours is not None
        assert theirs is not None
        # Of bf16 gradients single roundings may differ.
        assert (ours.double() - theirs.double()).norm() <= 2e-4 * theirs.double().norm()


@pytest.mark.slow  # it compiles ten times
def test_more_shapes_of_one_formula_than_torch_recompiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "WORTH_COMPILING", 0)
    inputs = make_inputs(11, 33)
    plain = truth(inputs).out.kd.float()
    for chunk_tokens in range(1, 11):
        found = outcome(fused_distill_loss, inputs, chunk_tokens=chunk_tokens).out.kd
        torch.testing.assert_close(found, plain)


def test_threads_may_compile_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "WORTH_COMPILING", 0)
    inputs, names = make_inputs(13, 35), ("tvd", "jsd", "reverse_kl")
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda name: outcome(fused_distill_loss, inputs, divergence=name).out.kd, names))
    for name, kd in zip(names, found, strict=True):
        torch.testing.assert_close(kd, truth(inputs, divergence=name).out.kd.float())


def test_where_compiling_fails_the_plain_step_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Any:
        def run(*_: object) -> None:
            raise TorchDynamoException("no compiler today")

        return run

    monkeypatch.setattr(layout, "WORTH_COMPILING", 0)
    monkeypatch.setattr(torch, "compile", broken)
    inputs = make_inputs(17, 39)
    with pytest.warns(UserWarning, match="losses take longer: no compiler today"):
        found = outcome(fused_distill_loss, inputs)
    assert max(errors(found, truth(inputs))) < 1e-6


def test_the_chunk_size_follows_from_the_shape_alone() -> None:
    assert chunk_size(0, 512, device="cpu", sums_head=True) == 1
    assert chunk_size(1024, 512, device="cpu", sums_head=True) == 1024  # one chunk is smaller than chunks and a sum
    assert chunk_size(1025, 512, device="cpu", sums_head=True) == 342
    assert chunk_size(1024, 512, device="cpu", sums_head=False) == 512
    assert chunk_size(8192, 512, device="cuda", sums_head=True) == 2048
