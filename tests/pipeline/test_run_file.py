"""One run file for all commands: every table reaches its command, and an option wins over --set over the file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic.fields import FieldInfo
from tests.conftest import Main
from tests.pipeline.test_flags import given as given

from kdpipe.manifests.specs import fields
from kdpipe.pipeline.options import KeyOption
from kdpipe.pipeline.reads import READS

RUN = """
[teacher]
path = "t"
dtype = "float32"
[engine]
name = "transformers"
batch_tokens = 64
args = { chunked_prefill_size = 8192, enable-x = true, ratio = 0.5, name = "a b" }
[data]
paths = ["d1", "d2"]
max_length = 77
[cache]
path = "c"
rows = "all"
io = "pread"
seed = 5
[student]
path = "s"
trust_remote_code = "ABCDEF012345"
[loss]
preset = "kdflow"
[train]
output = "o"
nproc = 1
device = "cpu"
lr = 0.5
[eval]
dtype = "float16"
batch_tokens = 9
"""


@pytest.fixture
def run(given: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """What a command gives to its stage with the run file RUN and further words."""
    (tmp_path / "run.toml").write_text(RUN)
    return lambda *words: given(words[0], "--config", "run.toml", *words[1:])


def test_every_command_reads_its_part_of_one_file(run: Callable[..., Any], main: Main) -> None:
    made = run("extract")
    assert (made.teacher, made.data) == (Path("t"), (Path("d1"), Path("d2")))
    assert (made.dtype, made.engine) == ("float32", "transformers")
    assert (made.data_spec.max_length, made.rows, made.seed, made.batch_tokens) == (77, "all", 5, 64)
    training = run("train")
    assert (training.student, training.caches, training.output, training.io) == (
        Path("s"),
        (Path("c"),),
        Path("o"),
        "pread",
    )
    assert (training.trust, training.spec.loss.kd_weight, training.spec.train.lr) == ("abcdef012345", 0.5, 0.5)
    measured = run("eval")
    assert (measured["dtype"], measured["batch_tokens"], measured["io"]) == ("float16", 9, "pread")
    assert main("plan", "--config", "run.toml") == (4, "", "E-STUDENT s: no such folder\n"), "it is compared with"


def test_an_engines_arguments_are_texts_as_on_a_command_line(run: Callable[..., Any]) -> None:
    asked = dict(run("extract", "--engine-arg", "ratio=0.75", "other=1").options.arguments)
    assert asked == {
        "chunked_prefill_size": "8192",
        "enable_x": "true",
        "ratio": "0.75",
        "name": "a b",
        "other": "1",
    }, "one of them can be given anew"


def test_an_option_wins_over_set_and_set_over_the_file(run: Callable[..., Any]) -> None:
    assert run("extract", "--set", "cache.seed=6").seed == 6
    assert run("extract", "--set", "cache.seed=6", "--seed", "7").seed == 7
    assert run("train", "--cache", "c2", "c3").caches == (Path("c2"), Path("c3")), "instead of the file's"
    assert run("extract", "--no-strict").data_spec.strict is False


def test_the_student_that_is_measured_is_the_one_that_the_file_trains(
    main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for lines, meant in (
        ('[student]\npath = "s"\n[train]\noutput = "o"\n[eval]\nstudent = "e"', "e"),
        ('[student]\npath = "s"\n[train]\noutput = "o"', "o"),
        ('[student]\npath = "s"', "s"),
    ):
        Path("run.toml").write_text(lines)
        seen: list[object] = []
        monkeypatch.setattr(
            "kdpipe.stages.evaluate.evaluate_student", lambda *of, seen=seen, **_: seen.append(of) or {}
        )
        assert main("eval", "--config", "run.toml", "--cache", "c")[0] == 0
        assert seen == [(Path(meant), (Path("c"),))]


GOOD = {
    "teacher.trust_remote_code": '"123456789012"',
    "student.trust_remote_code": '"123456789012"',
    "loss.preset": "trl",
    "cache.weights": "[0.5]",
    "loss.teacher_mix": "losses",
    "loss.teacher_weights": "[0.5]",
    "train.export": "merged",
    "student.lora_base_bits": "4",
    "loss.options": "{}",
    "engine.args": "{}",
    "data.where": "{}",
    "train.betas": "[0.5, 0.5]",
    "sweep.runs": "[]",
    "train.loggers": "tensorboard",
}
"""Values of the keys whose default and type say too little of what they take."""
for table in ("slurm", "slurm.extract", "slurm.light"):
    GOOD |= {f"{table}.mem": "64G", f"{table}.time": "60", f"{table}.options": "[]"}


def good_value(key: str, entry: FieldInfo) -> object:
    default = entry.get_default(call_default_factory=True)
    if key in GOOD or default not in (None, ()):
        return GOOD.get(key, str(default).lower() if isinstance(default, bool) else default)
    kinds = str(entry.annotation)
    return 2 if "int" in kinds else 0.5 if "float" in kinds else "x"


@pytest.mark.parametrize("command", READS)
def test_set_reaches_every_key_that_the_command_reads_and_refuses_every_other(
    command: str, main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    argument = ["c"] if command == "cache verify" else []
    for key, entry in fields().items():
        _, _, err = main(*command.split(), *argument, "--set", f"{key}={good_value(key, entry)}")
        assert (f"does not read '{key}'" in err) != READS[command].includes(key), err


@pytest.mark.parametrize("command", READS)
def test_no_two_options_of_a_command_have_one_name(command: str) -> None:
    names = [name for key in READS[command].of_options() for name in KeyOption(key).opts]
    assert len(names) == len(set(names))


def test_every_key_is_read_by_a_command() -> None:
    assert [key for key in fields() if not any(reads.includes(key) for reads in READS.values())] == []


def test_in_training_only_what_a_file_says_of_the_data_is_compared_with_the_cache(run: Callable[..., Any]) -> None:
    assert run("train").spec.data.model_fields_set == {"max_length"}
