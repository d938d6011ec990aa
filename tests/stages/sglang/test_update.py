"""Tensors of any sizes through shared memory: what the trainer sends is what a scheduler's loader reads.

The loader runs in this process, on a model of torch's; tests/stages/rollout/test_sglang_writer.py has the real engine.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import make_model
from tests.opened import student_in

from kdpipe.manifests.errors import CheckFailed
from kdpipe.stages.sglang import update, weights


class Model(torch.nn.Module):
    """Parameters of these shapes, loaded by name as SGLang's models do: unknown names are passed over."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.given = torch.nn.ParameterDict({f"t{number}": torch.zeros(shape) for number, shape in enumerate(shapes)})

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        known = dict(self.named_parameters())
        for name, tensor in tensors:
            if name in known:
                assert known[name].shape == tensor.shape
                known[name].data.copy_(tensor)

    def state(self, seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return {name: torch.randn(parameter.shape) for name, parameter in self.named_parameters()}


class InProcess:
    """A process whose scheduler is this one."""

    def __init__(self, model: Model) -> None:
        self.model, self.folder, self.loads = model, Path("nowhere"), 0

    def start(self) -> None: ...

    def next_number(self) -> int:
        return 1

    def exchange(self, messages: Sequence[weights.Load], timeout_s: float, who: str) -> Iterator[weights.Loaded]:
        (message,) = messages
        self.loads += 1
        problem = weights._load(self.model, json.loads(json.dumps(asdict(message))))
        held = weights._held
        receipt = weights.Receipt(rank=0, num_tensors=len(held), digest=weights.digest_of(held), problem=problem)
        yield weights.Loaded(number=message.number, receipts=(receipt,))


def updates_of(model: Model, dtype: Any = "float32") -> update.Updates:
    return update.Updates(InProcess(model), dtype=dtype, num_ranks=1, timeout_s=1.0)  # type: ignore[arg-type]


@settings(max_examples=40)
@given(
    shapes=st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=6),
    bucket_bytes=st.sampled_from([1, 64, 200, 1 << 30]),
    every=st.booleans(),
)
def test_every_byte_arrives_whatever_the_sizes_and_the_buckets(
    shapes: list[tuple[int, ...]], bucket_bytes: int, every: bool
) -> None:
    model = Model(shapes)
    updates = updates_of(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "BUCKET_BYTES", bucket_bytes)
        for version in range(3):
            state = model.state(version)
            report = updates.send(state.items(), version, changed_only=not every)
            assert report.num_tensors == len(state)
            assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_tensors_are_cast_and_those_that_stay_the_same_after_it_are_not_sent() -> None:
    model = Model([(3, 5), (7,)])
    updates, state = updates_of(model, "bfloat16"), model.state(0)
    updates.send(state.items(), 0, changed_only=True)
    assert torch.equal(model.given["t0"], state["given.t0"].bfloat16().float())
    state["given.t0"] *= 1 + 1e-6
    state["given.t1"] *= 2
    assert updates.send(state.items(), 1, changed_only=True).num_bytes == 2 * 7
    assert (updates.version, updates.broken) == (1, "")


def test_a_first_update_that_lacks_a_parameter_is_an_error_and_has_no_version() -> None:
    model = Model([(3, 5), (7,)])
    updates, state = updates_of(model), model.state(0)
    with pytest.raises(CheckFailed, match=r"1 parameters are not numbers .* given\.t1 is the first"):
        updates.send([("given.t0", state["given.t0"])], 0, changed_only=True)
    assert (updates.version, updates.broken) == (None, "the update to version 0 was not finished")
    assert updates.send(state.items(), 1, changed_only=True).num_tensors == 2


def test_names_are_those_of_the_last_whole_version_even_after_one_that_failed() -> None:
    model = Model([(3, 5), (7,)])
    updates, state = updates_of(model), model.state(0)
    updates.send(state.items(), 0, changed_only=True)
    for _ in range(2):
        with pytest.raises(CheckFailed, match="1 tensors are new, first more; the version before had 2"):
            updates.send([*state.items(), ("more", state["given.t1"])], 1, changed_only=True)
    assert updates.send(state.items(), 2, changed_only=True).num_tensors == 2


def test_a_folders_tensors_are_those_of_its_model(tmp_path: Path) -> None:
    folder = student_in(make_model("llama", tmp_path))
    found, model = dict(update.stored_tensors(folder)), folder.load(torch.float32, torch.device("cpu"))
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.items())
