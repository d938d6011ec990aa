"""The text of batch scripts: what it is, to the byte, and how bash runs it to its end.

A wanted change of the text: python -m pytest tests/pipeline/test_slurm.py with KDPIPE_GOLDEN=1 writes the files anew.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.specs import load
from kdpipe.pipeline.slurm import Batch, array_words, batches_of, render
from kdpipe.pipeline.steps import Disk, steps_of

GOLDEN = Path(__file__).parent / "golden"
RUN = """
[teacher]
path = "models/large"
[data]
paths = ["chat.jsonl"]
[cache]
path = "/scratch/my cache"
[student]
path = "models/small"
[sweep]
output = "runs/first"
runs = [
    { name = "a", train.lr = 3e-4 },
    { name = "b", train.lr = 1e-4, loss.divergence = "reverse_kl" },
    { name = "wide", student.path = "models/medium", slurm.nodes = 2, slurm.gpus_per_node = 4, slurm.time = "1-00" },
]
[slurm]
partition = "gpu"
account = "lab"
gpus_per_node = 1
cpus_per_task = 8
mem = "64G"
time = "4:00:00"
extract_tasks = 4
extract_parallel = 2
options = ["--exclude=node7"]
mail_user = "a@b.example"
mail_type = "END,FAIL"
setup = ["module load cuda/12", "source venv/bin/activate"]
stage_dir = "/local/$USER"
stage_max_bytes = 2_000_000_000_000
[slurm.extract]
gres = "gpu:a100:4"
time = 90
[slurm.light]
partition = "cpu"
"""


def batches(tmp_path: Path, text: str = RUN, *sets: str, parts: list[int] | None = None) -> tuple[Batch, ...]:
    (tmp_path / "run.toml").write_text(text)
    run = load(tmp_path / "run.toml", sets)
    steps = steps_of(Path("/project/runs/first/submit/run.toml"), run, Disk(), sets, parts=run.slurm.extract_tasks)
    return batches_of(steps, run.slurm, parts)


def script(batch: Batch, python: Path | None = None) -> str:
    return render(
        batch, folder=Path("/project"), submission=Path("/project/runs/first/submit"), name="first", python=python
    )


@pytest.mark.parametrize("name", ["extract", "seal", "train", "train-2", "report"])
def test_the_script_is_the_golden_one(name: str, tmp_path: Path) -> None:
    text = script(next(batch for batch in batches(tmp_path) if batch.name == name))
    golden = GOLDEN / f"{name}.sbatch"
    if "KDPIPE_GOLDEN" in os.environ:
        golden.write_text(text)
    assert text == golden.read_text()


def test_every_script_is_bash(tmp_path: Path) -> None:
    for batch in batches(tmp_path):
        subprocess.run(["bash", "-n"], input=script(batch), text=True, check=True)


def test_students_that_ask_for_the_same_are_one_array(tmp_path: Path) -> None:
    assert [(batch.name, batch.indices) for batch in batches(tmp_path)] == [
        ("extract", (1, 2, 3, 4)),
        ("seal", ()),
        ("train", (1, 2)),
        ("train-2", ()),
        ("report", ()),
    ]


def test_ranks_of_another_number_are_another_job(tmp_path: Path) -> None:
    text = RUN.replace('name = "b"', 'name = "b", train.nproc = 2')
    assert [batch.name for batch in batches(tmp_path, text)][2:5] == ["train", "train-2", "train-3"]


def test_a_thousand_and_one_students_are_two_arrays(tmp_path: Path) -> None:
    runs = ", ".join(f"{{ name = 'r{number}', train.seed = {number} }}" for number in range(1001))
    text = f"[student]\npath = 's'\n[data]\npaths = ['d']\n[sweep]\noutput = 'o'\nreport = false\nruns = [{runs}]\n"
    first, second = batches(tmp_path, text)
    assert (first.name, first.indices[-1], second.name, second.indices) == ("train", 1000, "train-2", ())


def test_only_the_parts_that_are_left_are_tasks(tmp_path: Path) -> None:
    (extract, *_) = batches(tmp_path, parts=[4, 2])
    assert "#SBATCH --array=2,4%2\n" in script(extract)
    assert [(task.index, task.part, task.parts) for task in extract.tasks(Path("/project"))] == [(2, 2, 4), (4, 4, 4)]


def test_array_words() -> None:
    assert array_words([3, 1, 2, 7, 9, 10]) == "1-3,7,9-10"
    assert array_words([5], 2) == "5%2"


def test_a_live_run_is_one_job_that_needs_no_cache(tmp_path: Path) -> None:
    sets = ("sweep.command=onpolicy", "sweep.runs=[]", "sweep.report=false", "live.teacher_gpus=[0, 1]")
    (live,) = batches(tmp_path, RUN.replace('path = "/scratch/my cache"', ""), *sets)
    assert (live.name, live.indices, live.needs) == ("onpolicy", (), ())
    assert "\nrun kdpipe onpolicy " in script(live)
    assert "'live.teacher_gpus=[0, 1]'" in script(live)
    assert "stage" not in script(live).partition("run kdpipe")[2]


def test_a_container_goes_before_each_command(tmp_path: Path) -> None:
    sets = ("slurm.container=apptainer exec --nv kdpipe.sif", "slurm.setup=[]")
    extract, _, train, wide, _ = batches(tmp_path, RUN, *sets)
    assert "run apptainer exec --nv kdpipe.sif kdpipe extract" in script(extract)
    assert "run apptainer exec --nv kdpipe.sif kdpipe train" in script(train)
    assert "    apptainer exec --nv kdpipe.sif bash -c 'exec torchrun" in script(wide)


def test_python_decides_where_kdpipe_is_looked_for(tmp_path: Path) -> None:
    (extract, *_) = batches(tmp_path)
    assert 'export PATH=/venv/bin:"$PATH"\n' in script(extract, Path("/venv/bin/python"))
    assert "PATH" not in script(extract)


@pytest.mark.parametrize(
    ("gres", "ranks"), [("gpu:2", 2), ("gpu:a100:4,lscratch:100", 4), ("gpu", 1), ("lscratch:9", 1)]
)
def test_ranks_of_a_node_are_its_gpus(tmp_path: Path, gres: str, ranks: int) -> None:
    text = RUN.replace("slurm.gpus_per_node = 4", f'slurm.gres = "{gres}"').replace("gpus_per_node = 1\n", "")
    assert f"--nproc-per-node={ranks} " in script(batches(tmp_path, text)[3])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("slurm.options=['--array=1-3']", "'--array=1-3' is what kdpipe submit sets itself"),
        ("slurm.options=['-d afterok:1']", "'-d afterok:1' is what kdpipe submit sets itself"),
        ("slurm.options=['exclusive']", "expected an option of sbatch such as --exclusive, got 'exclusive'"),
        ("slurm.time=soon", "expected a time as Slurm takes it"),
        ("slurm.mem=much", "expected an amount of memory as Slurm takes it"),
        ("slurm.partition=a b", "expected a name without spaces or quotes"),
        ("slurm.nodes=0", "expected greater than or equal to 1"),
        ("slurm.extract.nodes=2", "unknown key 'slurm.extract.nodes'"),
        ("slurm.partiton=a", "did you mean 'partition'?"),
    ],
)
def test_what_sbatch_would_not_take_is_refused(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, (override,))
    assert says in str(caught.value)


@pytest.mark.parametrize("time", ["90", "1:30:00", "01:30:00", "1-12", "2-00:30:00", "UNLIMITED"])
def test_times_as_slurm_takes_them(time: str) -> None:
    assert load(None, (f"slurm.time={time}",)).slurm.time == time


def test_tables_of_the_extraction_and_of_light_jobs_win_over_slurm() -> None:
    spec = load(None, ("slurm.gpus_per_node=4", "slurm.nodes=2", "slurm.mem=8G", "slurm.extract.gres=gpu:2")).slurm
    extract, light = spec.for_extract(), spec.for_light()
    assert (extract.gpus_per_node, extract.gres, extract.nodes, extract.mem) == (None, "gpu:2", 1, "8G")
    assert (light.gpus_per_node, light.gres, light.nodes, light.mem) == (None, None, 1, "8G")


# --- how it runs: bash with a scontrol that notes what it is asked, and a kdpipe that does as it is told ------------

KDPIPE = """#!/bin/bash
case $KDPIPE_DOES in
  listen) trap 'echo heard; exit 75' USR2; echo ready; while :; do sleep 0.02; done ;;
  deaf) echo ready; exec sleep 30 ;;
  *) exit "$KDPIPE_DOES" ;;
esac
"""
SCONTROL = """#!/bin/bash
echo "$*" >> scontrol.txt
[ "$1" != show ] || echo "JobId=$3 JobState=${JOB_STATE:-RUNNING} Reason=None"
"""


class Job:
    """A script at work in a folder, as slurmd would start it."""

    def __init__(self, folder: Path, does: str, **env: str) -> None:
        (extract, *_) = batches(folder, RUN, "slurm.setup=[]", "slurm.max_requeues=3")
        text = render(extract, folder=folder, submission=folder, name="j", python=folder / "python")
        for name, body in (
            ("kdpipe", KDPIPE),
            ("scontrol", SCONTROL),
            ("sleep", "#!/bin/bash\nexec /bin/sleep 0.02\n"),
        ):
            (folder / name).write_text(body)
            (folder / name).chmod(0o755)
        if does == "deaf":
            (folder / "sleep").unlink()
        (folder / "scontrol.txt").write_text("")
        self.folder = folder
        ours = {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "69", "SLURM_ARRAY_TASK_ID": "2", "KDPIPE_DOES": does}
        self.process = subprocess.Popen(
            [shutil.which("bash") or "bash", "-c", text],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | ours | env,
        )

    def ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ends(self) -> tuple[int, list[str]]:
        """Exit code, and what scontrol was asked."""
        self.out, _ = self.process.communicate(timeout=30)
        return self.process.returncode, (self.folder / "scontrol.txt").read_text().splitlines()


REQUEUED = ["show job 70", "requeue 69_2"]


@pytest.mark.parametrize(("code", "asked"), [(0, []), (1, []), (4, []), (70, []), (75, REQUEUED)])
def test_only_75_queues_the_task_again(tmp_path: Path, code: int, asked: list[str]) -> None:
    assert Job(tmp_path, str(code)).ends() == (code, asked)


def test_a_signal_is_passed_on_and_the_task_is_queued_again_when_the_command_has_saved(tmp_path: Path) -> None:
    job = Job(tmp_path, "listen")
    job.ready()
    job.process.send_signal(signal.SIGUSR2)
    assert job.ends() == (75, REQUEUED)
    assert "heard" in job.out


def test_a_command_that_the_signal_kills_before_it_listens_is_queued_again(tmp_path: Path) -> None:
    job = Job(tmp_path, "deaf")
    job.ready()
    job.process.send_signal(signal.SIGUSR2)
    assert job.ends() == (75, REQUEUED)


def test_term_to_the_shell_does_not_end_the_wait_for_the_command(tmp_path: Path) -> None:
    job = Job(tmp_path, "listen")
    job.ready()
    for _ in range(3):
        job.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert job.process.poll() is None
    job.process.send_signal(signal.SIGUSR2)
    assert job.ends() == (75, REQUEUED)


def test_a_job_that_was_cancelled_is_not_queued_again(tmp_path: Path) -> None:
    assert Job(tmp_path, "75", JOB_STATE="CANCELLED").ends() == (75, ["show job 70"])


def test_requeues_have_an_end(tmp_path: Path) -> None:
    assert Job(tmp_path, "75", SLURM_RESTART_COUNT="2").ends() == (75, REQUEUED)
    job = Job(tmp_path, "75", SLURM_RESTART_COUNT="3")
    assert job.ends() == (75, [])
    assert "has been queued again 3 times (slurm.max_requeues): it fails" in job.out


def test_a_node_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    text = script(batches(tmp_path)[0]).replace("cd /project ", f"cd {tmp_path / 'absent'} ")
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, "does not see this folder" in done.stderr) == (4, True)
