"""What a real cluster does to running jobs: all but scancel end as if nothing had happened, without anybody's help."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.chats import write_chats
from tests.conftest import Bench, Main
from tests.integration.lab import Lab
from tests.integration.lab import lab as lab
from tests.integration.lab import on_lab as on_lab
from tests.integration.running import steps_of
from tests.integration.test_slurm import contents, logs, weights

from kdpipe.manifests.submission import read_submission

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

RUN = """
[teacher]
path = "{bench.teacher}"
[data]
paths = ["{data}"]
max_length = 128
[cache]
path = "cache"
shard_tokens = 2000
[student]
path = "{bench.student}"
[train]
output = "out"
dtype = "float32"
batch_tokens = 300
device = "cpu"
epochs = {epochs}
save_every = 10
[sweep]
report = false
[slurm]
extract_tasks = 2
cpus_per_task = 2
time = 10
signal_seconds = 20
max_requeues = 30
"""
PHASES = ("extract", "train", "train-wide")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "data.jsonl", 3000)


@pytest.fixture
def prepared(
    bench: Bench, data: Path, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """A run file of a phase to disturb; for training the cache is there."""

    def make(phase: str) -> None:
        monkeypatch.chdir(tmp_path)
        text = RUN.format(bench=bench, data=data, epochs=0.4 if phase != "extract" else 0.05)
        Path("run.toml").write_text(text + ("nodes = 2\n" if phase == "train-wide" else ""))
        if phase != "extract":
            code, _, err = main("extract", "--config", "run.toml")
            assert code == 0, err

    return make


def under_way(lab: Lab, phase: str) -> str:
    """The task to disturb, once it is in the middle of its work."""
    record = read_submission(Path("out"))
    assert record is not None
    if phase == "extract":
        lab.wait(lambda: list(Path("cache/commits").glob("*.json")))
        return f"{record.jobs[0].id}_1"
    lab.wait(lambda: steps_of(Path("out")) > 12)
    return f"{record.jobs[0].id}"


def preempt(lab: Lab, task: str) -> None:
    lab.ask("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")


def requeue(lab: Lab, task: str) -> None:
    lab.ask("scontrol", "requeue", task)


def kill_node(lab: Lab, task: str) -> None:
    (node, *_) = lab.ask("squeue", "--noheader", f"--jobs={task}", "--format=%B").split()
    lab.kill_node(node)
    lab.wait(lambda: "down" in lab.ask("sinfo", "--noheader", f"--nodes={node}", "--format=%T"), 120)
    lab.start()  # the administrator


FAULTS = {"preemption": preempt, "scontrol requeue": requeue, "a killed slurmd": kill_node}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_result_is_that_of_an_undisturbed_run(
    fault: str, phase: str, on_lab: Lab, main: Main, prepared: Callable[[str], None]
) -> None:
    prepared(phase)
    code, _, err = main("submit", "run.toml")
    assert code == 0, err
    task = under_way(on_lab, phase)
    FAULTS[fault](on_lab, task)
    ends_as_undisturbed(on_lab, main, phase)
    # The processes of a node whose daemon died live on, and may end their work before Slurm misses the node.
    assert restarts(on_lab, task) >= 1 or fault == "a killed slurmd"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("phase", PHASES)
def test_a_time_limit_that_is_too_short_is_reached_and_gone_on_after(
    phase: str, on_lab: Lab, main: Main, prepared: Callable[[str], None]
) -> None:
    prepared(phase)
    longer = {"extract": "cache.shard_tokens=500", "train": "train.epochs=4", "train-wide": "train.epochs=1.5"}[phase]
    code, _, err = main("submit", "run.toml", "--set", "slurm.time=2", longer)
    assert code == 0, err
    task = under_way(on_lab, phase)
    ends_as_undisturbed(on_lab, main, phase, longer)
    assert phase == "extract" or restarts(on_lab, task) >= 1


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("phase", PHASES)
def test_scancel_leaves_what_the_next_submit_goes_on_with(
    phase: str, on_lab: Lab, main: Main, prepared: Callable[[str], None]
) -> None:
    prepared(phase)
    main("submit", "run.toml")
    task = under_way(on_lab, phase)
    code, out, _ = main("cancel", "run.toml", "--json")
    assert code == 0
    assert json.loads(out)["cancelled"]
    states = on_lab.wait_for_the_end()
    assert states[task] == "CANCELLED"
    assert not Path("out/kdpipe.json").exists()
    code, _, err = main("submit", "run.toml")
    assert code == 0, err
    ends_as_undisturbed(on_lab, main, phase)


def restarts(lab: Lab, task: str) -> int:
    return int(lab.ask("scontrol", "show", "job", task).partition("Restarts=")[2].split()[0])


def ends_as_undisturbed(lab: Lab, main: Main, phase: str, *sets: str) -> None:
    """All that was submitted ends well by itself, with the bytes of one process that nobody disturbed."""
    lab.wait_for_the_end(900)
    record = read_submission(Path("out"))
    assert record is not None
    states = lab.states()
    last = {job.task_id(task): states[job.task_id(task)] for job, task in record.latest().values()}
    assert set(last.values()) == {"COMPLETED"}, logs()
    some = ["--set", *sets] if sets else []
    if phase == "extract":
        code, _, err = main("extract", "--config", "run.toml", *some, "--cache", "alone")
        assert code == 0, err
        assert contents(Path("cache")) == contents(Path("alone"))
    ranks = 2 if phase == "train-wide" else 1
    some = ["--set", *(each for each in sets if each.startswith("train."))] if phase != "extract" and sets else []
    code, _, err = main("train", "--config", "run.toml", *some, "--nproc", ranks, "--output", "plain")
    assert code == 0, err
    assert weights(Path("plain")) == weights(Path("out"))
