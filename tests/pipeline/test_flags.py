"""Every flag reaches the stage it is for: what a command line asks and what the stage is given."""

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tests.conftest import Bench, Main

from kdpipe.manifests import access
from kdpipe.manifests.errors import DataError

EXTRACT = ("extract", "--teacher", "t", "--data", "d", "--cache", "c")
PLAN = ("plan", "--teacher", "t", "--data", "d")
TRAIN = ("train", "--student", "s", "--cache", "c", "--output", "o", "--nproc", "1", "--device", "cpu")
EVAL = ("eval", "--student", "s", "--cache", "c")
STAGES = {
    "extract": "kdpipe.stages.extract.extract",
    "plan": "kdpipe.stages.extract.forecast",
    "train": "kdpipe.stages.train.check_training",
    "eval": "kdpipe.stages.evaluate.evaluate_student",
}


@pytest.fixture
def given(main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """What a command gives to its stage, which goes no further: spec or training, of eval the options by name."""
    monkeypatch.chdir(tmp_path)

    def of(*words: str) -> Any:
        seen: list[Any] = []

        def stage(first: object, *others: object, **options: object) -> None:
            seen.append(options if words[0] == "eval" else first)
            raise DataError("seen")

        monkeypatch.setattr(STAGES[words[0]], stage)
        monkeypatch.setattr("kdpipe.pipeline.commands.train.find_data", lambda training: None)  # opens what is named
        assert main(*words) == (4, "", "E-DATA: seen\n")
        return seen[0]

    return of


OF_DATA = [
    (("--max-length", "77"), "data_spec.max_length", 77),
    (("--overlong", "drop"), "data_spec.overlong", "drop"),
    (("--supervise", "last"), "data_spec.supervise", "last"),
    (("--heldout-fraction", "0.5"), "data_spec.heldout_fraction", 0.5),
    (("--bad-records", "skip"), "data_spec.bad_records", "skip"),
    (("--max-bad", "0.25"), "data_spec.max_bad", 0.25),
    (("--strict",), "data_spec.strict", True),
    (("--where", "domain=math", "level=3"), "data_spec.where", {"domain": "math", "level": "3"}),
    (("--rows", "all"), "rows", "all"),
    (("--dtype", "float16"), "dtype", "float16"),
    (("--set", "data.supervise=completion"), "data_spec.supervise", "completion"),
]
OF_EXTRACT = [
    (("--grow",), "grow", True),
    (("--check-inputs",), "check_inputs", True),
    (("--seed", "5"), "seed", 5),
    (("--shard-tokens", "1000"), "shard_tokens", 1000),
    (("--batch-tokens", "64"), "batch_tokens", 64),
    (("--device", "cpu"), "device", "cpu"),
    (("--engine", "sglang"), "engine", "sglang"),
    (("--tp", "2"), "options.tp", 2),
    (("--dp", "3"), "options.dp", 3),
    (("--pp", "4"), "options.pp", 4),
    (("--ep", "5"), "options.ep", 5),
    (("--quantization", "fp8"), "options.quantization", "fp8"),
    (("--mem-fraction", "0.5"), "options.mem_fraction", 0.5),
    (("--deterministic",), "options.deterministic", True),
    (("--engine-timeout", "9"), "options.timeout_s", 9),
    (("--engine-arg", "a-b=c-d", "e=1"), "options.arguments", (("a_b", "c-d"), ("e", "1"))),
]
OF_TRAIN = [
    (("--io", "pread"), "io", "pread"),
    (("--resume", "never"), "resume", "never"),
    (("--resume", "o/checkpoints/000002"), "resume", "o/checkpoints/000002"),
    (("--loss-preset", "kdflow"), "spec.loss.preset", "kdflow"),
    (("--lora-rank", "4", "--lora-targets", "q_proj", "v_proj"), "spec.student.lora_targets", ("q_proj", "v_proj")),
    (("--set", "train.seed=7"), "spec.train.seed", 7),
    (("--cache", "d", "e"), "caches", (Path("c"), Path("d"), Path("e"))),
    (("--set", "cache.weights=[2]"), "weights", (2.0,)),
    (("--set", "cache.unmatched=leave_out"), "unmatched", "leave_out"),
]
FLAGS = [
    *((EXTRACT, *each) for each in OF_DATA + OF_EXTRACT),
    *((PLAN, *each) for each in OF_DATA),
    *((TRAIN, *each) for each in OF_TRAIN),
]


@pytest.mark.parametrize(("line", "flag", "field", "value"), FLAGS, ids=lambda value: None)
def test_a_flag_reaches_its_stage(
    line: tuple[str, ...], flag: tuple[str, ...], field: str, value: object, given: Callable[..., Any]
) -> None:
    read = attrgetter(field)
    assert read(given(*line)) != value, "it says nothing that does not hold without it"
    assert read(given(*line, *flag)) == value


@pytest.mark.parametrize("text", ['["q_proj", "v_proj"]', "['q_proj','v_proj']"])
def test_an_option_takes_a_list_as_the_run_file_writes_it(text: str, given: Callable[..., Any]) -> None:
    made = given(*TRAIN, "--lora-rank", "4", "--lora-targets", text)
    assert made.spec.student.lora_targets == ("q_proj", "v_proj")
    assert given(*TRAIN, "--cache", '["d", "[e"]', "[f]").caches == (Path("c"), Path("d"), Path("[e"), Path("[f]"))


@pytest.mark.parametrize(
    ("flag", "field", "value"),
    [
        (("--io", "pread"), "io", "pread"),
        (("--device", "cpu"), "device", "cpu"),
        (("--dtype", "float16"), "dtype", "float16"),
        (("--batch-tokens", "64"), "batch_tokens", 64),
        (("--set", "train.batch_tokens=99"), "batch_tokens", 99),
        (("--heldout-fraction", "0.5"), "heldout_fraction", 0.5),
    ],
)
def test_a_flag_of_eval_reaches_its_stage(
    flag: tuple[str, ...], field: str, value: object, given: Callable[..., Any]
) -> None:
    assert given(*EVAL)[field] != value
    assert given(*EVAL, *flag)[field] == value


@pytest.mark.parametrize("part", ["0/3", "4/3", "1/0", "-1/3", "1/3/5", "1", "/3", "1.0/3"])
def test_a_part_that_is_none_is_refused(part: str, main: Main) -> None:
    code, out, err = main(*EXTRACT, f"--part={part}")
    assert (code, out, err.count("\n")) == (4, "", 1)
    assert f"'{part}' is not i/n with 1 <= i <= n" in err


@pytest.mark.parametrize("part", [(1, 1), (1, 3), (3, 3)])
def test_a_part_is_read(part: tuple[int, int], main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[object] = []

    def stage(*others: object, part: object) -> None:
        seen.append(part)
        raise DataError("seen")

    monkeypatch.setattr(STAGES["extract"], stage)
    assert main(*EXTRACT, "--part", "/".join(map(str, part)))[0] == 4
    assert seen == [part]


def test_with_pread_neither_train_nor_eval_maps_a_file_of_the_cache(
    bench: Bench, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(bench.cache.resolve())

    def refuse(path: object, *others: object) -> object:
        assert not str(path).startswith(cache), "it is mapped"
        return own(path, *others)

    own = pa.memory_map
    monkeypatch.setattr(pa, "memory_map", refuse)
    monkeypatch.setattr(access, "MappedFile", lambda path, num_bytes: pytest.fail("it is mapped"))
    words = ["--student", bench.student, "--cache", bench.cache, "--io", "pread", "--device", "cpu"]
    sets = ["train.max_steps=1", "train.batch_tokens=300", "train.dtype=float32"]
    code, _, err = main("train", *words, "--output", tmp_path / "out", "--set", *sets)
    assert code == 0, err
    words[1] = tmp_path / "out"
    assert main("eval", *words)[0] == 0
