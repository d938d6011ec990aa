"""However a student lies on its ranks, its steps, its checkpoints and its export are those of the plain run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Bench
from tests.stages.student.ways import take, train_in_every_way
from tests.stages.train.test_train import training_for
from torch.distributed.fsdp import CPUOffloadPolicy

from kdpipe.manifests.specs import FsdpSpec
from kdpipe.pipeline.launch import launch
from kdpipe.stages.student.sharding import _offload
from kdpipe.stages.train.training import Training

PLAIN = FsdpSpec()
COPIES = FsdpSpec(shard_size=1)
ON_CPU = FsdpSpec(optimizer_on_cpu=True)
COMPILED = FsdpSpec(compile=True)
ALL = FsdpSpec(shard_size=1, optimizer_on_cpu=True, compile=True)
STEPS = 4
Found = tuple[dict[str, list[float]], Path]


@pytest.fixture(scope="module")
def training(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Training]:
    folder = tmp_path_factory.mktemp("ways")
    steps = {"max_steps": STEPS, "epochs": 9}
    return lambda name, way, **changes: take(training_for(bench, folder / name, **steps), way, **changes)


@pytest.fixture(scope="module")
def found(training: Callable[..., Training]) -> Found:
    """What two ranks log, and where the students are."""
    trainings = {
        "plain": training("plain", PLAIN),
        "copies": training("copies", COPIES),
        "on the cpu": training("on the cpu", ON_CPU),
    }
    switched = training("switched", PLAIN)
    logged = launch(train_in_every_way, trainings, switched, [COPIES, PLAIN, ON_CPU, COPIES], nproc=2)
    return logged, switched.output.parent


def assert_as_plain(found: Found, way: str) -> None:
    logged, folder = found
    assert len(logged[way]) == 2 * STEPS
    assert logged[way] == pytest.approx(logged["plain"], rel=2e-5)
    plain, weights = (load_file(folder / name / "model.safetensors") for name in ("plain", way))
    assert weights.keys() == plain.keys()
    for name, tensor in plain.items():
        assert float((weights[name] - tensor).norm()) <= 1e-4 * float(tensor.norm()), name


@pytest.mark.parametrize("way", ["copies", "switched"])
def test_groups_with_copies_take_the_steps_of_the_plain_run_and_go_on_from_one_another(way: str, found: Found) -> None:
    assert_as_plain(found, way)
    assert (found[0]["mesh of plain"], found[0]["mesh of copies"]) == ([2], [2, 1])


def test_an_optimizer_on_the_cpu_is_the_plain_one_there(found: Found) -> None:
    logged, folder = found
    assert logged["on the cpu"] == logged["plain"]
    one, other = (folder / name / "model.safetensors" for name in ("plain", "on the cpu"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_an_optimizer_on_the_cpu_is_asked_of_fsdp(device: str, pinned: bool) -> None:
    policy = _offload(ON_CPU, torch.device(device))
    assert isinstance(policy, CPUOffloadPolicy)
    assert policy.pin_memory == pinned
    assert not isinstance(_offload(PLAIN, torch.device(device)), CPUOffloadPolicy)


@pytest.mark.slow
def test_compiled_layers_take_the_steps_of_the_plain_run(bench: Bench, tmp_path: Path) -> None:
    trainings = {
        way: take(training_for(bench, tmp_path / way, max_steps=STEPS, epochs=9), spec, grad_checkpointing=way == "all")
        for way, spec in {"plain": PLAIN, "compiled": COMPILED, "all": ALL}.items()
    }
    logged = launch(train_in_every_way, trainings, trainings["plain"], [], nproc=2)
    for way in ("compiled", "all"):
        assert_as_plain((logged, tmp_path), way)
        assert logged[f"graphs of {way}"] > logged["graphs of plain"] == [0]


@pytest.mark.slow
def test_two_groups_of_two_ranks_take_the_steps_of_the_plain_run(
    training: Callable[..., Training], tmp_path: Path
) -> None:
    trainings = {"plain": training("four", PLAIN), "two by two": training("two by two", FsdpSpec(shard_size=2))}
    switched = training("two by two, then four", PLAIN)
    logged = launch(train_in_every_way, trainings, switched, [FsdpSpec(shard_size=2), PLAIN, COPIES], nproc=4)
    assert (logged["mesh of plain"], logged["mesh of two by two"]) == ([4], [2, 2])
    assert logged["two by two"] == pytest.approx(logged["plain"], rel=2e-5)
    assert logged["switched"] == pytest.approx(logged["plain"], rel=2e-5)
