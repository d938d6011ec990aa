"""Steps: what is left to do is a function of the run file and of what the folders say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.caches import make_cache
from tests.finished import write_record

from kdpipe.manifests.errors import ConfigError, IncompleteError
from kdpipe.manifests.specs import load, members_of
from kdpipe.pipeline.steps import Disk, Step, disk_of, steps_of

RUN = """
[teacher]
path = "t"
[data]
paths = ["d"]
[cache]
path = "c"
[student]
path = "s"
[sweep]
output = "out"
report = false
[sweep.grid]
train.lr = [1e-3, 3e-4]
"""
DONE = Disk(complete=frozenset({Path("c")}))
Steps = Callable[..., tuple[Step, ...]]


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    """The steps of a run file for a state of the disk."""

    def of(text: str = RUN, disk: Disk = DONE, sets: tuple[str, ...] = (), *, parts: int = 1) -> tuple[Step, ...]:
        (tmp_path / "run.toml").write_text(text)
        return steps_of(Path("run.toml"), load(tmp_path / "run.toml", sets), disk, sets, parts=parts)

    return of


def test_the_cache_is_made_and_sealed_before_its_students(steps: Steps) -> None:
    extract, seal, first, second = steps(disk=Disk())
    assert (extract.name, extract.argv, extract.needs) == ("extract", ("extract", "--config", "run.toml"), ())
    assert (seal.argv, seal.needs) == (("cache", "verify", "c", "--quick"), ("extract",))
    assert (first.name, second.name) == ("train/lr-0.001", "train/lr-0.0003")
    assert first.needs == second.needs == ("seal",)
    assert second.argv == (
        *("train", "--config", "run.toml", "--set", "train.lr=0.0003"),
        *("--output", "out/lr-0.0003"),
    )


def test_what_is_finished_has_no_step(steps: Steps) -> None:
    assert [step.name for step in steps()] == ["train/lr-0.001", "train/lr-0.0003"]
    assert all(not step.needs for step in steps())
    (left,) = steps(disk=replace(DONE, finished=frozenset({"lr-0.001"})))
    assert left.name == "train/lr-0.0003"
    everything = frozenset({"lr-0.001", "lr-0.0003"})
    assert steps(disk=Disk(finished=everything)) == (), "the cache is not wanted any more"


def test_an_extraction_in_parts_has_the_place_of_a_part_in_its_words(steps: Steps) -> None:
    extract = steps(disk=Disk(), parts=4)[0]
    assert (extract.parts, extract.argv[-2:]) == (4, ("--part", "{part}"))


def test_a_set_goes_to_each_command_that_reads_its_key(steps: Steps) -> None:
    sets = ("train.epochs=2", "teacher.dtype=float32", "data.max_length=64", "data.strict=true", "sweep.jobs=2")
    extract, _, student, _ = steps(disk=Disk(), sets=sets)
    assert extract.argv[4:] == ("teacher.dtype=float32", "data.max_length=64", "data.strict=true")
    assert student.argv[4:-2] == ("train.epochs=2", "data.max_length=64", "train.lr=0.001"), "what varies comes last"


def test_a_report_is_made_however_the_students_ended(steps: Steps) -> None:
    report = steps(RUN.replace("report = false", ""))[-1]
    assert (report.name, report.whatever, report.needs) == ("report", True, ("train/lr-0.001", "train/lr-0.0003"))
    assert report.argv == ("report", "out/lr-0.001", "out/lr-0.0003", "--out", "out/report.html")
    everything = Disk(complete=DONE.complete, finished=frozenset({"lr-0.001", "lr-0.0003"}))
    (page,) = steps(RUN.replace("report = false", ""), everything)
    assert (page.name, page.needs) == ("report", ()), "a sweep that was killed before its page makes it"
    assert steps(RUN.replace("report = false", ""), replace(everything, reported=True)) == ()


def test_students_of_the_live_commands_need_no_cache(steps: Steps) -> None:
    text = RUN.replace("[sweep]", "[sweep]\ncommand = 'onpolicy'").replace("[cache]\npath = ", "[live]\nlmbda = 1\n#")
    first, _ = steps(text, Disk())
    assert (first.name, first.argv[:2], first.needs) == ("onpolicy/lr-0.001", ("onpolicy", "--config"), ())


def test_without_a_sweep_there_is_one_student_in_its_own_folder(steps: Steps) -> None:
    (one,) = steps("[student]\npath = 's'\n[cache]\npath = 'c'\n[train]\noutput = 'o'\n[sweep]\nreport = false\n")
    assert one.argv == ("train", "--config", "run.toml", "--output", "o")


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (
            "teacher.dtype = ['float32']",
            "run dtype-float32: 'teacher.dtype' cannot vary: kdpipe train does not read it",
        ),
        ("live.lmbda = [0.5]", "kdpipe train does not read it, it is for kdpipe "),
        ("data.max_length = [8, 16]", "'data.max_length' cannot vary: the samples of a cache are made with one"),
        ("data.strict = [true]", "'data.strict' cannot vary"),
        ("cache.path = [[]]\ndata.paths = [[]]", "neither a cache.path nor data.paths"),
    ],
)
def test_a_key_that_the_command_does_not_read_cannot_vary(steps: Steps, grid: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        steps(RUN.replace("train.lr = [1e-3, 3e-4]", grid))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "grid", ["student.lora_rank = [0]\nstudent.lora_targets = ['q', 'v']", "student.lora_rank = [8, 0]"]
)
def test_keys_of_an_adapter_without_a_rank_are_refused_before_any_runs(steps: Steps, grid: str) -> None:
    text = RUN.replace("train.lr = [1e-3, 3e-4]", grid).replace("[student]", "[student]\nlora_targets = ['k']")
    with pytest.raises(ConfigError, match=r"run .*-0.*: student\.lora_targets is of use with student\.lora_rank alone"):
        steps(text)


def test_a_teacher_without_a_cache_is_not_left_out_unasked(steps: Steps) -> None:
    text = RUN.replace('[cache]\npath = "c"\n', "")
    with pytest.raises(ConfigError, match="the run file names a teacher and no cache of its rows"):
        steps(text)
    assert len(steps(text, sets=("data.paths=['d']",))) == 2
    assert len(steps(text.replace("train.lr = [1e-3, 3e-4]", "data.paths = ['d', 'e']"))) == 2


def test_a_student_is_wanted_of_every_run(steps: Steps) -> None:
    with pytest.raises(ConfigError, match=r"run lr-0\.001: it has no student.path"):
        steps(RUN.replace("[student]\npath", "[eval]\nstudent"))
    two = RUN.replace("[student]\npath", "[eval]\nstudent") + "student.path = ['a', 'b']\n"
    assert [step.argv[-1] for step in steps(two)][:2] == ["out/lr-0.001_student-a", "out/lr-0.001_student-b"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("train.lr=1", "'train.lr': the sweep varies train.lr; set sweep.grid.train.lr=[...] instead"),
        ("live.lmbda=0", "'live.lmbda': kdpipe train does not read it"),
    ],
)
def test_a_set_that_would_change_nothing_is_refused(steps: Steps, given: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        steps(sets=(given,))
    assert (caught.value.where, says in str(caught.value)) == ("--set", True)


@pytest.mark.parametrize("removed", ['[teacher]\npath = "t"', '[data]\npaths = ["d"]'])
def test_rows_that_nobody_here_can_make_are_missing(steps: Steps, removed: str) -> None:
    with pytest.raises(IncompleteError, match=r"E-INCOMPLETE c: the cache lacks rows"):
        steps(RUN.replace(removed, ""), Disk())


@pytest.mark.parametrize(
    ("asked", "allowed"), [("codec_kl = 0.02", 0.01), ("", 0.005), ("codec_bytes = 0.4", 0), ("codec_kl = 1e-6", 0)]
)
def test_a_codec_that_the_students_would_refuse_is_refused_before_it_is_made(
    steps: Steps, asked: str, allowed: float
) -> None:
    text = RUN.replace('path = "c"', f'path = "c"\ncodec = "fisher"\n{asked}\nmax_codec_kl = {allowed}')
    with pytest.raises(
        ConfigError, match=f"run lr-0.001: cache.max_codec_kl allows a loss of {allowed} nats, .*codec_kl"
    ):
        steps(text, disk=Disk())
    assert len(steps(text)) == 2, "of a cache that is there its students look at what was measured"
    assert len(steps(text.replace(f"max_codec_kl = {allowed}", "max_codec_kl = 0.02"), disk=Disk())) == 4


def test_the_disk_says_which_students_and_caches_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(RUN)
    run = load(Path("run.toml"))
    assert disk_of(run) == Disk()
    first, second = members_of(run)
    write_record(first, metrics={"heldout_kl": 0.5})
    write_record(second, metrics=None)
    assert disk_of(run).finished == {"lr-0.001"}, "one that is not measured is not finished"


def test_the_student_of_another_run_is_not_taken_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(RUN)
    write_record(members_of(load(Path("run.toml")))[0], metrics={"heldout_kl": 0.5})
    assert disk_of(load(Path("run.toml"), ("train.keep=5",))).finished == {"lr-0.001"}, "it decides nothing"
    for other in ("train.epochs=2", "loss.temperature=2", "data.heldout_fraction=0.5"):
        with pytest.raises(ConfigError, match=r"E-CONFIG out/lr-0\.001: it holds the student of another run: its "):
            disk_of(load(Path("run.toml"), (other,)))


def test_a_student_of_raw_rows_is_not_one_of_coded_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(RUN)
    make_cache(Path("c"))
    write_record(members_of(load(Path("run.toml")))[0], metrics={"heldout_kl": 0.5})
    assert disk_of(load(Path("run.toml"))).finished == {"lr-0.001"}
    make_cache(Path("coded"), codec="int8")
    with pytest.raises(ConfigError, match=r"another run: its codecs is \[\], this run's is \['int8 [0-9a-f]{16}'\]"):
        disk_of(load(Path("run.toml"), ("cache.path=coded",)))
