"""Members: what a run file with [sweep] comes to, run by run, and what is wrong with one is said of its key."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.run import EVENTS, LOG, RUN_FILE, TEACHERS, TENSORBOARD, WANDB
from kdpipe.manifests.specs import RunFile, StudentTable, TrainTable, load, members_of, override, with_keys
from kdpipe.manifests.specs.members import MOST_RUNS, Member
from kdpipe.manifests.specs.run import _apply

BASE = '[student]\npath = "s"\n[train]\noutput = "out"\n'
Members = Callable[..., tuple[Member, ...]]


@pytest.fixture
def members(tmp_path: Path) -> Members:
    """The members of a run file with some more lines, and some --set."""

    def of(text: str, *sets: str) -> tuple[Member, ...]:
        (tmp_path / "run.toml").write_text(BASE + text)
        return members_of(load(tmp_path / "run.toml", sets))

    return of


@pytest.fixture
def names(members: Members) -> Callable[..., list[str]]:
    return lambda text, *sets: [member.name for member in members(text, *sets)]


@pytest.fixture
def refused(members: Members) -> Callable[..., str]:
    def of(text: str, *sets: str) -> str:
        with pytest.raises(ConfigError) as caught:
            members(text, *sets)
        return str(caught.value)

    return of


def test_every_combination_of_the_grid_is_a_run_in_a_folder_of_its_name(members: Members) -> None:
    found = members("[sweep.grid]\ntrain.lr = [1e-3, 3e-4]\ntrain.seed = [0, 1]\n")
    assert [member.name for member in found] == [
        "lr-0.001_seed-0",
        "lr-0.001_seed-1",
        "lr-0.0003_seed-0",
        "lr-0.0003_seed-1",
    ]
    assert found[3].overrides == {"train.lr": 0.0003, "train.seed": 1}
    assert (found[3].run.train.lr, found[3].run.train.seed) == (0.0003, 1)
    assert found[3].output == Path("out/lr-0.0003_seed-1")
    assert not found[3].run.sweep.grid, "a member is no sweep"


def test_a_run_file_without_a_sweep_is_one_run_in_its_own_output(members: Members) -> None:
    (member,) = members("")
    assert (member.name, member.overrides, member.output) == ("out", {}, Path("out"))


@pytest.mark.parametrize(
    "text",
    [
        "[sweep.grid]\ntrain.lr = [1, 2]\ntrain.seed = [3]\n",
        '[sweep.grid]\n"train.lr" = [1, 2]\n"train.seed" = [3]\n',
        "[sweep.grid.train]\nlr = [1, 2]\nseed = [3]\n",
        '[sweep]\ngrid = { train = { lr = [1, 2] }, "train.seed" = [3] }\n',
        '[sweep.grid]\n" train . lr " = [1, 2]\ntrain.seed = [3]\n',
    ],
)
def test_however_a_key_is_written_it_is_the_same_key(names: Callable[..., list[str]], text: str) -> None:
    assert names(text) == ["lr-1_seed-3", "lr-2_seed-3"]


def test_listed_runs_have_their_names_or_are_named_and_are_combined_with_the_grid(members: Members) -> None:
    text = """
[[sweep.runs]]
name = "kl"
[[sweep.runs]]
name = "gkd"
loss.divergence = "jsd"
loss.options = { beta = 0.5 }
[[sweep.runs]]
loss.temperature = 2.0
[sweep.grid]
train.seed = [0, 1]
"""
    found = members(text)
    kinds = ("kl", "gkd", "temperature-2.0")
    assert [member.name for member in found] == [f"{kind}_seed-{seed}" for kind in kinds for seed in (0, 1)]
    assert found[2].run.loss.options == {"beta": 0.5}
    assert (found[4].overrides, found[4].run.loss.temperature) == ({"loss.temperature": 2.0, "train.seed": 0}, 2.0)


def test_a_run_that_differs_in_nothing_is_the_base(names: Callable[..., list[str]]) -> None:
    assert names("[[sweep.runs]]\n[[sweep.runs]]\ntrain.lr = 1\n") == ["base", "lr-1"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('student.path = ["m/small", "m/tiny/"]', ["student-small", "student-tiny"]),
        ('student.path = ["a/small", "b/small"]', ["student-a-small", "student-b-small"]),
        ('cache.path = ["c", ["c", "/x/d"]]', ["cache-c", "cache-c+d"]),
        ("loss.temperature = [2]\nlive.temperature = [1]", ["loss.temperature-2_live.temperature-1"]),
        ("train.grad_checkpointing = [true, false]", ["grad_checkpointing-true", "grad_checkpointing-false"]),
        ("train.betas = [[0.9, 0.95], [0.8, 0.9]]", ["betas-0.9+0.95", "betas-0.8+0.9"]),
        ("loss.options = [{ beta = 0.5 }, { beta = 1 }]", ["options-beta-0.5", "options-beta-1"]),
        ("loss.options.beta = [0.5]", ["beta-0.5"]),
        ("train.weight_decay = [1e-05]", ["weight_decay-1e-05"]),
        ('loss.divergence = ["a b/c:d"]', ["divergence-a-b-c-d"]),
    ],
)
def test_names_say_what_varies_in_letters_that_a_file_may_have(
    names: Callable[..., list[str]], text: str, expected: list[str]
) -> None:
    assert names(f"[sweep.grid]\n{text}\n") == expected


def test_set_makes_a_grid_too(names: Callable[..., list[str]]) -> None:
    assert names("", "sweep.grid.train.lr=[1, 2]", "sweep.output=other") == ["lr-1", "lr-2"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[sweep.grid]\ntrain.lrr = [1]\n", "run lrr-1: unknown key 'train.lrr'; did you mean 'lr'?"),
        ("[sweep.grid]\nlr = [1]\n", "run lr-1: unknown key 'lr'; did you mean 'train.lr'?"),
        ("[sweep.grid]\ntrain.lr = [1, 'fast']\n", "run lr-fast: 'train.lr' = 'fast': expected a valid number"),
        ("[sweep.grid]\ntrain.lr = [0]\n", "run lr-0: 'train.lr' = 0: expected greater than 0"),
        ("[sweep.grid]\ntrain.lr.x = [0]\n", "run x-0: 'train.lr' = {'x': 0}"),
        ("[sweep.grid]\ntrain.lr = 3\n", "train.lr takes a list of values"),
        ("[sweep.grid]\ntrain.grad_checkpointing = true\n", "train.grad_checkpointing takes a list of values"),
        ("[sweep.grid]\ntrain.lr = []\n", "train.lr has no value"),
        ('[sweep.grid]\ntrain.lr = [1]\n"train.lr" = [2]\n', "'train.lr' is given twice"),
        ('[sweep.grid]\n"train..lr" = [2]\n', "'train..lr' is not of the form table.key"),
        ("[sweep.grid]\ntrain.lr = [1e-4, 0.0001]\n", "the value train.lr=0.0001 is given twice; leave one out"),
        ("[[sweep.runs]]\ntrain.lr = 1\n[[sweep.runs]]\ntrain.lr = '1'\n", "runs lr-1 and lr-1 are the same"),
        ("[[sweep.runs]]\nname = 'a'\n[[sweep.runs]]\nname = 'a'\ntrain.lr = 1\n", "two runs are named 'a'; name them"),
        ("[sweep.grid]\ntrain.lr = [nan]\n", "'sweep.grid.train.lr.0' = nan: expected a finite number"),
        ("[[sweep.runs]]\ntrain.betas = [nan, 1]\n", "'sweep.runs.0.train.betas' = nan: expected a finite number"),
        ("[sweep.runs]\nname = 'a'\n", "expected a list of tables ([[sweep.runs]])"),
        ("[[sweep.runs]]\nname = ''\n", "a name is a text, got ''; leave it out"),
        ("[sweep.grid]\ntrain.lr = [1, 1.0]\n", "runs lr-1 and lr-1.0 are the same"),
        ("[sweep.grid]\ntrain.output = ['x']\n", "run output-x: 'train.output' cannot vary"),
        ("[sweep.grid]\nsweep.jobs = [1]\n", "'sweep.jobs' cannot vary"),
        ("[sweep.grid]\ntrain.lr = [1]\n[[sweep.runs]]\ntrain.lr = 2\n", "varies in sweep.grid ('train.lr') and in"),
        (
            "[sweep.grid]\nloss.options.k = [1]\n[[sweep.runs]]\nloss.options = {}\n",
            "'loss.options' varies in sweep.grid ('loss.options.k')",
        ),
        ("[[sweep.runs]]\nname = '../x'\n", "'../x' cannot be a run's name"),
        ("[[sweep.runs]]\nname = 'submit'\n", "'submit' cannot be a run's name"),
        ("[[sweep.runs]]\nname = '.hidden'\n", "'.hidden' cannot be a run's name"),
        ("[[sweep.runs]]\nname = 3\n", "a name is a text, got 3"),
        ("[sweep]\nruns = [1]\n", "'sweep.runs.0' = 1: expected a table"),
        ("[sweep]\njob = 2\n", "unknown key 'sweep.job'; did you mean 'jobs'?"),
        ("[sweep]\njobs = 0\n", "'sweep.jobs' = 0: "),
        (f"[sweep.grid]\nloss.divergence = ['{'x' * 300}']\n", "the name of a run is 311 characters long"),
    ],
)
def test_what_is_wrong_with_a_run_is_said_before_any_runs(refused: Callable[..., str], text: str, says: str) -> None:
    message = refused(text)
    assert message.startswith("E-CONFIG ")
    assert says in message


def test_one_folder_spelt_twice_is_one_run(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to("student")
    for other in ("x/../student", "student/", "linked"):
        grid = f"[sweep.grid]\nstudent.path = ['{tmp_path}/student', '{tmp_path}/{other}']\n"
        assert refused(grid).endswith("are the same; keep one")
    assert refused("[sweep.grid]\ndata.paths = [['./d', 'e'], ['d', 'e']]\n").endswith("are the same; keep one")


@pytest.mark.parametrize("name", [RUN_FILE, LOG, EVENTS, TEACHERS, TENSORBOARD, WANDB, "checkpoints", "aligned"])
def test_no_run_has_the_name_of_a_file_of_an_output(refused: Callable[..., str], name: str) -> None:
    assert f"'{name}' cannot be a run's name" in refused(f"[[sweep.runs]]\nname = '{name}'\n")


def test_more_runs_than_anyone_means_are_counted_not_made(refused: Callable[..., str]) -> None:
    values = list(range(1000))
    text = f"[sweep.grid]\ntrain.seed = {values}\ncache.seed = {values}\ntrain.keep = {values}\n"
    assert f"1,000,000,000 runs; {MOST_RUNS:,} are the most" in refused(text)


def test_no_folder_for_the_students_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"sweep\.output"):
        members_of(RunFile())


def test_a_member_is_what_the_same_set_by_hand_is(members: Members, tmp_path: Path) -> None:
    grid = 'loss.divergence = ["forward_kl", "jsd"]\nloss.preset = ["kdflow", "trl"]\n'
    found = members(f'[loss]\npreset = "trl"\n[sweep.grid]\n{grid}')
    for member in found:
        sets = [override(key, value) for key, value in member.overrides.items()]
        by_hand = load(tmp_path / "run.toml", (*sets, f"train.output={member.output}"))
        assert member.run.training() == by_hand.training()
    assert [member.run.loss.options for member in found] == [{}, {}, {}, {"beta": 0.5}]


def test_a_run_file_made_in_python_takes_other_keys_too() -> None:
    run = RunFile(student=StudentTable(path=Path("s")), train=TrainTable(lr=0.5, seed=3))
    other = with_keys(run, {"train.lr": 0.25}, where="here")
    assert (other.train.lr, other.train.seed, other.student.path) == (0.25, 3, Path("s"))
    assert run.train.lr == 0.5, "the first is left as it was"


VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60)
@given(VALUES)
def test_set_reads_back_every_value_that_it_is_given(value: JsonValue) -> None:
    tree: dict[str, object] = {}
    _apply(tree, override("a.b", value))
    assert tree == {"a": {"b": value}}
