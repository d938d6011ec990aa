"""The command line: what it loads, what it refuses in one line, what it hands to the stages."""

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import click
import numpy as np
import pytest
from tests.caches import make_cache
from tests.conftest import Main

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.durable import canonical
from kdpipe.manifests.errors import DataError, TemporaryError
from kdpipe.manifests.run import CheckpointRecord, RunInputs
from kdpipe.manifests.sample import Sample, content_id
from kdpipe.manifests.shard import commit_path, shard_path
from kdpipe.manifests.specs import RunSpec
from kdpipe.pipeline import cli, launch, outlook
from kdpipe.pipeline.memory import ModelSizes
from kdpipe.pipeline.options import spread
from kdpipe.stages.extract.spec import ExtractSpec


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A complete cache of three shards, one sample of 7 tokens each."""
    supervised = np.array([0, 0, 1, 1, 1, 0, 1], dtype=bool)
    samples = [
        Sample(
            content_id=content_id(number),
            source="d",
            line=number + 1,
            token_ids=np.arange(7, dtype=np.int32) + number,
            supervised=supervised,
        )
        for number in range(3)
    ]
    folder = tmp_path / "cache"
    make_cache(folder, samples=samples, hidden_size=5, dtype="float32", shard_tokens=7, heldout_fraction=0.0)
    return folder


# What it loads


def test_help_and_cache_load_no_torch(python: Callable[..., subprocess.CompletedProcess[str]], cache: Path) -> None:
    lines = [["--help"], ["--version"], ["cache", "--help"], ["cache", "info", str(cache)]]
    lines += [["cache", "verify", str(cache)], ["train", "--help"], ["extract", "--dta"], ["nonsense"]]
    lines += [["status", str(cache)]]
    code = f"""
import sys
from kdpipe.pipeline.cli import main
for line in {lines!r}:
    try:
        main(line)
    except SystemExit:
        pass
    assert "torch" not in sys.modules, line
    assert "transformers" not in sys.modules, line
print("none")
"""
    done = python("-c", code)
    assert done.stdout.endswith("none\n"), done.stderr


def test_every_command_teaches_its_use() -> None:
    for name in cli.COMMANDS:
        found = importlib.import_module(f"kdpipe.pipeline.commands.{name}").command
        leaves = list(found.commands.values()) if isinstance(found, click.Group) else [found]
        for command in leaves:
            assert f"kdpipe {name}" in command.help, f"{name}: no example"
            for param in command.params:
                if isinstance(param, click.Option):
                    assert param.help, f"{name} {param.name}"


def test_the_list_of_commands_says_whole_sentences(main: Main) -> None:
    said = main("cache", "--help")[1].partition("Commands:")[2]
    assert said.count("...") == 0
    assert len(said.split()) > 100


# What it refuses

ROOT = Path(__file__).parents[2]
DATA = ("--teacher", "t", "--data", "d")
RUN = ("--student", "s", "--cache", "c", "--output", "o")
SFT = ("--student", "s", "--data", "d", "--output", "o")
ONPOLICY = ("onpolicy", "--teacher", "t", "--student", "s", "--prompts", "d", "--output", "o")
REFUSED = {
    "answers of the student's own without a divergence": (
        [*ONPOLICY, "--set", "loss.kd_weight=0"],
        "nothing to learn from the teacher; kdpipe train --data",
    ),
    "a cache of answers that are replaced": ([*ONPOLICY, "--seq-kd", "--cache", "c"], "take the place of those whose"),
    "one answer twice": ([*ONPOLICY, "--temperature", "0", "--samples-per-prompt", "2"], "the same answer 2 times"),
    "beta of another divergence": (
        [*ONPOLICY, "--beta", "0.5", "--set", "loss.divergence=forward_kl"],
        "beta is that of the divergence jsd",
    ),
    "a misspelt command": (["extrct"], "did you mean 'extract'"),
    "a misspelt option": (["extract", *DATA, "--cach", "c"], "--cache"),
    "a misspelt group option": (["--versoin"], "--version"),
    "a missing option": (["extract", *DATA], "option '--cache' is missing, or cache.path of a run file; see"),
    "a number that is none": (
        ["extract", *DATA, "--cache", "c", "--tp", "two"],
        "--tp: 'two': expected a valid integer",
    ),
    "two caches where one is made": (
        ["extract", *DATA, "--cache", "c", "d"],
        "--cache: one is taken here, 2 were named",
    ),
    "a group that is none": (["extract", *DATA, "--cache", "c", "--group", "no-such"], "no group 'no-such'"),
    "what only recompute uses": (["cache", "verify", "c", "--tp", "2"], "--tp: it is of use with --recompute N alone"),
    "a missing value": (["extract", "--data"], "kdpipe extract: option '--data' lacks its value; see"),
    "a missing value of a key": (["train", *RUN, "--set"], "kdpipe train: option '--set' lacks its value"),
    "an option for a value": (["train", "--cache", "--output", "o"], "kdpipe train: option '--cache' lacks its value"),
    "a value missing below a group": (["cache", "verify", "c", "--tp"], "kdpipe cache verify: option '--tp' lacks"),
    "two answers to one question": (["cache", "verify", "c", "--deep", "--quick"], "one choice, --quick or --deep"),
    "another command's key": (
        ["eval", *RUN[:4], "--set", "loss.temperature=2"],
        "eval does not read 'loss.temperature'",
    ),
    "another command's table": (
        ["extract", *DATA, "--cache", "c", "--set", "train={lr=1}"],
        "extract does not read 'train'",
    ),
    "a key that is an option": (["eval", *RUN[:4], "--set", "train.dtype=float32"], "give --dtype instead"),
    "a key that is not compared": (["train", *RUN, "--set", "data.strict=true"], "--strict: it is of use with --data"),
    "an option of data with a cache": (["train", *RUN, "--bad-records", "skip"], "--bad-records: it is of use with"),
    "an option of caches with data": (["train", *SFT, "--io", "pread"], "--io: it is of use with --cache alone"),
    "neither data nor a cache": (
        ["train", "--student", "s", "--output", "o"],
        "kdpipe train: option '--cache' (a teacher's rows) or '--data' (no teacher) is missing; see",
    ),
    "a weight for rows that there are none of": (
        ["train", *SFT, "--set", "loss.kd_weight=0.5"],
        "E-CONFIG loss.kd_weight: 0.5 is for a teacher's rows, which data alone do not have: leave it out",
    ),
    "a preset for rows that there are none of": (["train", *SFT, "--loss-preset", "trl"], "loss.preset: 'trl' is for"),
    "a divergence without a teacher": (["train", *SFT, "--set", "loss.divergence=forward_kl"], "'forward_kl' is for"),
    "a temperature without a teacher": (["train", *SFT, "--set", "loss.temperature=1"], "loss.temperature: 1.0 is for"),
    "a scale without a teacher": (["train", *SFT, "--set", "loss.scale_t2=false"], "loss.scale_t2: False is for"),
    "a divergence's option without a teacher": (["train", *SFT, "--set", "loss.options.beta=0.5"], "loss.options: {'b"),
    "data that are not there": (["train", *SFT, "--device", "cpu"], "E-STUDENT s: no such folder"),
    "another command's key as an option": (
        ["extract", *DATA, "--cache", "c", "--lr", "1"],
        "no option '--lr': it is a key of the run file for kdpipe plan, train, stream or onpolicy; see",
    ),
    "answers older than they may be": (
        [*ONPOLICY, "--overlap", "3", "--max-staleness", "2"],
        "live.overlap: answers are 3 optimizer steps old when they are trained on, live.max_staleness allows 2",
    ),
    "answers older than they may be by default": ([*ONPOLICY, "--overlap", "5"], "live.max_staleness allows 4"),
    "importance of answers that are never old": (
        [*ONPOLICY, "--importance-cap", "2"],
        "live.importance_cap: live.overlap 0 trains on every answer with the weights that wrote it",
    ),
    "importance of answers that are not drawn": (
        [*ONPOLICY, "--importance-cap", "2", "--overlap", "1", "--temperature", "0"],
        "live.importance_cap: temperature 0 takes the most likely token",
    ),
    "an unknown choice": (["plan", *DATA, "--overlong", "cut"], "truncate"),
    "an unknown key": (["train", "--student", "s", "--cache", "c", "--output", "o", "--set", "train.lrr=1"], "'lr'"),
    "an unknown table": (["eval", "--student", "s", "--cache", "c", "--set", "trian.lr=1"], "'train'"),
    "a value out of range": (
        ["plan", *DATA, "--heldout-fraction", "1.5"],
        "--heldout-fraction: '1.5': expected less than or equal to 1",
    ),
    "a value of a key out of range": (["plan", *DATA, "--set", "data.max_length=0"], "data.max_length"),
    "a key as an option": (["train", *RUN, "--lr", "1e-4"], "use --set train.lr=1e-4"),
    "a key as an option with a dash": (["train", *RUN, "--max-steps=9"], "use --set train.max_steps=9"),
    "a key's other name as an option": (["train", *RUN, "--learning-rate", "1"], "use --set train.lr=1;"),
    "a loss's option as an option": (["train", *RUN, "--beta"], "use --set loss.options.beta=VALUE"),
    "a misspelt key as an option": (["train", *RUN, "--temprature", "2"], "use --set loss.temperature=2"),
    "an option that is nothing": (["cache", "info", "c", "--lr"], "no option '--lr'; see"),
    "a loss's option in the table": (["train", *RUN, "--set", "loss.beta=1"], "did you mean 'loss.options.beta'?"),
    "a key without its table": (["train", *RUN, "--set", "lr=1"], "did you mean 'train.lr'?"),
    "a key in another table": (["train", *RUN, "--set", "train.temperature=1"], "did you mean 'loss.temperature'?"),
    "a value's other name": (["train", *RUN, "--set", "train.dtype=bf16"], "did you mean 'bfloat16'?"),
    "a choice's other name": (["plan", *DATA, "--dtype", "half"], "did you mean 'float16'?"),
    "no run file": (["extract", *DATA, "--cache", "c", "--config", "nowhere.toml"], "nowhere.toml"),
    "a part beyond the last": (["extract", *DATA, "--cache", "c", "--part", "5/3"], "1 <= i <= n"),
    "a part that is none": (["extract", *DATA, "--cache", "c", "--part", "half"], "1 <= i <= n"),
    "a bound that is none": (
        ["extract", *DATA, "--cache", "c", "--engine-timeout", "nan"],
        "'nan': expected a finite number",
    ),
    "a bound that is a word": (
        ["cache", "convert", "c", "d", "--codec", "fisher", "--codec-kl", "little"],
        "'--codec-kl': 'little' is not a number",
    ),
    "a tolerance that is none": (["cache", "compare", "c", "d", "--tolerance", "inf"], "'inf' is not a number"),
    "an engine's argument that is none": (["extract", *DATA, "--cache", "c", "--engine-arg", "x"], "not NAME=VALUE"),
    "a digest that is too short": (["train", *RUN, "--trust-remote-code", "abc123"], "12 to 64 hexadecimal digits"),
    "a digest that is none": (["extract", *DATA, "--cache", "c", "--trust-remote-code", "yes" * 5], "'yesyesyes"),
    "an unknown preset": (["train", "--student", "s", "--cache", "c", "--output", "o", "--loss-preset", "tlr"], "trl"),
    "a preset's key that is none": (["eval", "--student", "s", "--cache", "c", "--set", "loss.preset=x"], "kdflow"),
    "an argument too many": (["cache", "info", "c", "d"], "unexpected extra argument"),
    "no cache": (["cache", "info", "nowhere"], "PLAN.json is missing"),
    "no cache to verify": (["cache", "verify", "nowhere", "--json"], "PLAN.json is missing"),
    "a student without weights": (["plan", *DATA, "--student", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_with_the_way_out(
    main: Main, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args, hint = REFUSED[case]
    code, out, err = main(*args)
    assert (code, out, err.count("\n")) == (4, "", 1), err
    assert err.startswith("E-")
    assert hint in err
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


def test_a_file_where_a_cache_belongs_is_told_to_be_data(main: Main, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("{}")
    err = main("train", "--student", "s", "--cache", tmp_path / "chats.jsonl", "--output", "o")[2]
    assert "this is a file, a cache is a folder; make one of data with kdpipe extract, or train on them with --d" in err


def test_a_model_where_a_cache_belongs_is_told_from_an_empty_folder(main: Main, tmp_path: Path) -> None:
    assert "no cache here: PLAN.json is missing" in main("cache", "info", tmp_path)[2]
    (tmp_path / "config.json").write_text("{}")
    code, _, err = main("cache", "info", tmp_path)
    assert (code, err.count("\n")) == (4, 1)
    assert "this is a model, not a cache: PLAN.json is missing; name a folder that kdpipe extract made" in err


def test_a_swapped_student_and_cache_are_told_where_there_are_both(main: Main, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for words in (["train", "--output", tmp_path / "out"], ["eval"]):
        code, _, err = main(*words, "--student", cache, "--cache", tmp_path / "model")
        assert (code, err.count("\n")) == (4, 1)
        assert f"{cache} is a cache, the student is another folder: are they swapped?" in err


def test_a_run_file_may_hold_what_other_commands_read(main: Main, stages: list, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        "[data]\nheldout_fraction = 0.5\n[loss]\ntemperature = 2.0\n[train]\nlr = 1e-3\n"
    )
    assert main("eval", "--student", "s", "--cache", "c", "--config", tmp_path / "run.toml")[0] == 0
    assert stages[-1][-1]["heldout_fraction"] == 0.5


@pytest.mark.parametrize("step", [None, 3])
def test_a_training_ended_at_once_says_which_checkpoint_is_kept(
    step: int | None, main: Main, stages: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect: what a second Ctrl-C ended said nothing of what is kept."""
    inputs = RunInputs(student="s", tokenizer="t", caches=("c",), heldout_fraction=0.1, spec=RunSpec())
    record = CheckpointRecord(inputs=inputs, step=3, num_tokens=9, num_skipped=0, lr_factor=1.0, files=())
    if step is not None:
        (tmp_path / "checkpoints" / "000003").mkdir(parents=True)
        (tmp_path / "checkpoints" / "000003" / "checkpoint.json").write_bytes(canonical(record.model_dump(mode="json")))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["kdpipe.stages.train"], "train", interrupted)
    code, _, err = main("train", "--student", "s", "--cache", "c", "--output", tmp_path, "--device", "cpu")
    kept = "no checkpoint was saved" if step is None else "its checkpoint of step 3 is kept"
    said = f"E-INTERRUPTED {tmp_path}: stopped by SIGINT; {kept}; run the same command again\n"
    assert (code, err) == (130, said)


def test_the_same_holds_for_the_program(kdpipe: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = kdpipe("cache", "info", "nowhere", "--jsn")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    assert "see: kdpipe cache info --help" in done.stderr


def test_a_file_that_may_not_be_read_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    def read() -> None:
        raise PermissionError(13, "Permission denied", "secret.jsonl")

    assert cli.guard(read) == 4
    wanted = "E-INPUT secret.jsonl: permission denied; get the right to it (chmod, chown) or name another place\n"
    assert capsys.readouterr().err == wanted


def test_an_interruption_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert cli.guard(interrupt) == 130
    assert capsys.readouterr().err == "E-INTERRUPTED: stopped by SIGINT; run the same command again\n"


def printing(
    *args: object, stdout: int | IO[str] = subprocess.PIPE, stderr: int | IO[str] = subprocess.PIPE
) -> subprocess.Popen[str]:
    """The program, with its streams where they are wanted."""
    typing = Path(__file__).parent.parent.parent / "tools" / "typing"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(typing), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "kdpipe.pipeline.cli", *map(str, args)]
    return subprocess.Popen(command, stdout=stdout, stderr=stderr, text=True, env=env)


def test_a_reader_that_leaves_is_no_error() -> None:
    process = printing("--help")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)


@pytest.mark.parametrize("words", [["cache", "info"], ["cache", "info", "--json"], ["--help"]])
def test_a_full_stdout_is_one_line_and_exit_code_4(cache: Path, words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        process = printing(*words, *([cache] if words[0] == "cache" else []), stdout=full)
        said = process.communicate(timeout=60)[1]
    assert (process.returncode, said.count("\n")) == (4, 1), said
    assert said.startswith("E-SPACE stdout: the result could not be written: no space left on device")


def test_a_full_or_closed_stderr_changes_no_exit_code(cache: Path) -> None:
    for damaged, wanted in ((False, 0), (True, 2)):
        if damaged:
            commit_path(cache, 2).unlink()
        for target in ("/dev/full", None):
            with open(target or "/dev/null", "w") as stream:
                words = ["cache", "verify", str(cache), "--json"]
                process = printing(*words, stderr=stream) if target else closing_stderr(*words)
                out = process.communicate(timeout=60)[0]
            assert (process.returncode, json.loads(out)["ok"]) == (wanted, not damaged)


def closing_stderr(*args: str) -> subprocess.Popen[str]:
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "kdpipe.pipeline.cli", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


# kdpipe cache


def test_cache_info_prints_one_object(main: Main, cache: Path) -> None:
    code, out, err = main("cache", "info", cache, "--json")
    info = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert (info["num_rows"], info["shards"], info["complete"], info["hidden_size"]) == (12, 3, True, 5)
    assert "num rows" in main("cache", "info", cache)[1]


def test_verify_counts_the_good_shards(main: Main, cache: Path) -> None:
    code, out, err = main("cache", "verify", cache, "--json")
    assert (code, json.loads(out)) == (
        0,
        {
            "ok": True,
            "level": "full",
            "shards": 3,
            "shards_good": 3,
            "shards_missing": 0,
            "determinism": "bitwise",
        },
    )
    assert err.splitlines()[0] == "verify: 0% 0/3 shards"


def test_verify_exits_1_on_damage_and_2_on_missing_shards(main: Main, cache: Path) -> None:
    commit_path(cache, 2).unlink()
    code, out, err = main("cache", "verify", cache, "--json")
    assert (code, json.loads(out)["shards_good"]) == (2, 2)
    assert err.splitlines()[-1].startswith("E-INCOMPLETE")
    path = shard_path(cache, 1)
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    code, out, err = main("cache", "verify", cache, "--json")
    assert (code, json.loads(out)["ok"], json.loads(out)["shards_good"]) == (1, False, 1)
    assert "000001.safetensors" in err.splitlines()[-1]
    code, out, err = main("cache", "verify", cache)
    assert (out + err).count("do not match their checksum") == 1, "each problem once"
    assert re.search(r"^problems +E-CORRUPT \S+000001\.safetensors: ", out, re.MULTILINE)
    assert "[" not in out
    code, out, err = main("cache", "repair", cache)
    assert (code, out.count("E-CORRUPT"), "repair" in out) == (2, 1, False)


def test_damage_names_the_way_out_wherever_it_is_found(main: Main, cache: Path) -> None:
    path = shard_path(cache, 1)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1])
    for words in (["cache", "compare", cache, cache], ["cache", "verify", cache, "--quick"]):
        code, _, err = main(*words)
        assert (code, err.count("E-")) == (1, 1)
        said = f"put it aside with: kdpipe cache repair {cache} ; then run the same kdpipe extract again"
        assert said in err.splitlines()[-1]


def test_an_equal_cache_shows_how_many_rows_are_equal_and_no_worst_one(main: Main, cache: Path) -> None:
    _, out, _ = main("cache", "compare", cache, cache)
    lines = dict(line.split("  ", 1) for line in out.splitlines())
    assert (lines["rows equal"].strip(), lines["worst sample"].strip()) == ("12 of 12 bit for bit", "-")
    assert json.loads(main("cache", "compare", cache, cache, "--json")[1])["worst_sample"] is None


# What it hands to the stages


SEEN = Sample(
    content_id=b"\xee" * 16, source="d", line=1, token_ids=np.arange(21, dtype=np.int32), supervised=np.ones(21, bool)
)
"""The one sample of the forecast, which is not held out."""


@dataclass(frozen=True)
class FakeForecast:
    num_rows: int = 12
    num_tokens: int = 21
    num_shards: int = 3
    num_files: int = 38
    longest: int = 7
    hidden_size: int = 5
    vocab_size: int = 11
    dtype: str = "float32"
    teacher_params: int = 7000
    head_bytes: int = 220
    bytes_per_codec: dict[str, int] = field(default_factory=lambda: {"raw": 240})


@dataclass(kw_only=True)
class FakeTraining:
    student: Path
    caches: tuple[Path, ...]
    data: tuple[Path, ...]
    workers: int | None
    output: Path
    spec: RunSpec
    device: str
    io: str
    trust: str | None
    resume: str
    group: int | None
    made_with: object
    inputs: object = None
    copies: object = None
    weights: tuple[float, ...] = ()
    unmatched: str = "refuse"
    max_codec_kl: float | None = None
    align: str = "auto"
    align_floor: float = 0.5
    loggers: tuple[str, ...] = ()


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[list[tuple[object, ...]]]:
    """Stages that only write down what they were given."""
    calls: list[tuple[object, ...]] = []

    def forecast(spec: object, progress: object, see: Callable[[Sample], None]) -> FakeForecast:
        calls.append((spec,))
        see(SEEN)
        print("a library says hello")
        return FakeForecast()

    def extract(spec: object, folder: Path, progress: object, part: object = None) -> Cache:
        calls.append((spec, folder, part))
        progress.event("plan")  # type: ignore[attr-defined]
        progress.event("shard", number=0)  # type: ignore[attr-defined]
        if spec.seed == 13:  # type: ignore[attr-defined]
            raise DataError("seven is not a list", where="d:3")
        os.write(1, b"a library says hello\n")
        return Cache.open(folder)

    def train(training: object, progress: object, found: object = None) -> dict[str, object]:
        calls.append((training, type(progress).__name__))
        return {"loss": 1.5}

    def evaluate_student(*args: object, **options: object) -> dict[str, float]:
        calls.append((*args, options))
        return {"heldout_kl": 0.25}

    def find(training: object, progress: object = None) -> object:
        calls.append(("find", training))
        return "found"

    def check_training(training: object, nproc: int, found: object = None) -> object:
        calls.append(("check", nproc))
        return types.SimpleNamespace(inputs="as found", crossing=None)

    sizes = ModelSizes(params=7000, layers=2, hidden=5, queries=5, keys=5, intermediate=20, vocab=11)
    monkeypatch.setattr(outlook, "sizes_of", lambda folder, params: sizes)
    fakes = {
        "extract": {"ExtractSpec": ExtractSpec, "forecast": forecast, "extract": extract},
        "train": {
            "train": train,
            "Training": FakeTraining,
            "check_training": check_training,
            "find": find,
            "samples_beside": contextlib.nullcontext,
            "__path__": [str(ROOT / "stages" / "train")],
        },
        "evaluate": {"evaluate_student": evaluate_student},
        "student": {"check_student_of": lambda *given: calls.append(("check", *given))},
    }
    for name, members in fakes.items():
        module = types.ModuleType(f"kdpipe.stages.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_several_values_after_one_flag_are_the_flag_repeated() -> None:
    flags = {"--data"}
    assert spread(["--data", "a", "b", "--json", "--data", "c"], flags) == [
        *("--data", "a", "--data", "b", "--json", "--data", "c")
    ]
    assert spread(["--data=a", "b", "--cache", "c", "d"], flags) == ["--data=a", "--data", "b", "--cache", "c", "d"]


def test_plan_reads_every_data_file_and_prints_only_json(main: Main, stages: list, tmp_path: Path) -> None:
    code, out, err = main("plan", "--teacher", "t", "--data", "a", "b", "--data", "c", "--json", "--cache", tmp_path)
    found = json.loads(out)
    assert (code, err) == (0, "a library says hello\n")
    assert (found["break_even_students"], found["fits"], found["bytes_per_codec"]) == (2, True, {"raw": 240})
    spec = stages[0][0]
    assert (spec.data, spec.data_spec.max_length, spec.rows) == ((Path("a"), Path("b"), Path("c")), 4096, "supervised")


def test_the_flags_of_the_line_win_over_set_and_set_over_the_file(main: Main, stages: list, tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text('[data]\nmax_length = 10\nheldout_fraction = 0.5\nsupervise = "last"\n[train]\nepochs = 3\n')
    args = ["--config", run, "--set", "data.max_length=20", "data.heldout_fraction=0.25", "--max-length", "30"]
    _, out, _ = main("plan", *DATA, *args, "--json")
    data = stages[0][0].data_spec
    assert (data.max_length, data.heldout_fraction, data.supervise) == (30, 0.25, "last")
    assert json.loads(out)["break_even_students"] == 1


def test_plan_compares_the_cost_for_a_given_student(main: Main, stages: list, tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [30, 10], "data_offsets": [0, 1200]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    _, out, _ = main("plan", *DATA, "--student", tmp_path, "--set", "train.epochs=2", "--json")
    found = json.loads(out)
    assert found["student_params"] == 300
    assert stages[0] == ("check", tmp_path, Path("t"), None), "before the data is read"
    assert found["estimated_seconds"].keys() == {"extract", "train"}
    assert all(0 < seconds < 1 for seconds in found["estimated_seconds"].values())
    # Two epochs of 21 tokens: for each 2 * 7000 operations of the teacher and 6 * 300 of the student, and for each of
    # 12 rows 2 * 55 of the teacher's head.
    teacher, student = 2 * 7000 * 21, 2 * (6 * 300 * 21 + 2 * 55 * 12)
    assert found["live_over_cached"]["1"] == pytest.approx((2 * teacher + student) / (teacher + student))


def test_extract_ends_with_the_cache_and_keeps_its_events(main: Main, stages: list, cache: Path) -> None:
    code, out, _ = main("extract", *DATA, "--cache", cache, "--part", "1/3", "--seed", "7", "--json")
    assert (code, json.loads(out)["num_rows"]) == (0, 12)
    spec, folder, part = stages[0]
    assert (folder, part, spec.seed, spec.engine, spec.batch_tokens) == (cache, (1, 3), 7, "auto", None)
    (log,) = (cache / "runs").glob("*.jsonl")
    assert [json.loads(line)["kind"] for line in log.read_text().splitlines()] == ["run", "plan", "shard", "finished"]


def test_a_refused_extraction_leaves_no_folder(main: Main, stages: list, tmp_path: Path) -> None:
    code, out, err = main("extract", *DATA, "--cache", tmp_path / "new", "--seed", "13")
    assert (code, out, err) == (4, "", "E-DATA d:3: seven is not a list\n")
    assert not (tmp_path / "new").exists()


TRAIN = ("train", "--student", "s", "--cache", "c1", "c2", "--output", "nowhere", "--device", "cpu")


def test_one_process_trains_in_this_one(main: Main, stages: list) -> None:
    code, out, _ = main(*TRAIN, "--set", "train.lr=0.5", "--json")
    assert (code, json.loads(out)) == (0, {"loss": 1.5})
    (_, nproc), (training, progress) = stages
    assert (nproc, training.caches, training.spec.train.lr) == (1, (Path("c1"), Path("c2")), 0.5)
    assert (training.device, progress) == ("cpu", "ConsoleProgress")


def test_the_digest_of_own_code_reaches_every_stage_that_loads_it(main: Main, stages: list, cache: Path) -> None:
    flag = ("--trust-remote-code", "ABCDEF012345")
    for line in (("plan", *DATA), ("extract", *DATA, "--cache", cache), TRAIN, ("eval", *RUN[:4])):
        assert main(*line, *flag)[0] == 0
    (planned,), (extracted, *_), _, (training, _), (*_, evaluated) = stages
    told = (planned.options.trust, extracted.options.trust, training.trust, evaluated["trust"])
    assert told == ("abcdef012345",) * 4


def test_data_in_place_of_a_cache_are_trained_on_by_cross_entropy(main: Main, stages: list, tmp_path: Path) -> None:
    line = ("train", "--student", "s", "--output", "o", "--device", "cpu")
    flags = ("--data", "d", "e", "--max-length", "77", "--prepare-workers", "3", "--set", "loss.z_loss=0.5")
    assert main(*line, *flags)[0] == 0
    (_, found), _, (training, _) = stages
    assert found is training
    assert (training.caches, training.data, training.workers) == ((), (Path("d"), Path("e")), 3)
    assert (training.spec.data.max_length, training.spec.loss.kd_weight, training.spec.loss.z_loss) == (77, 0.0, 0.5)
    assert training.made_with.paths.keys() == {"student", "data", "output"}


def test_a_run_files_data_are_those_of_its_cache(
    main: Main, stages: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_file = tmp_path / "run.toml"
    run_file.write_text("[data]\npaths = 'd'\nstrict = true\n[cache]\npath = 'c'\nseed = 3\n")
    line = ("train", "--config", run_file, "--student", "s", "--output", "o", "--device", "cpu")
    assert main(*line)[0] == 0
    assert (stages[-1][0].caches, stages[-1][0].data) == ((Path("c"),), (Path("d"),))
    assert main(*line, "--data", "e", "--set", "cache.path=[]")[0] == 0
    assert (stages[-1][0].caches, stages[-1][0].data) == ((), (Path("e"),))


def test_a_run_file_of_a_teacher_is_not_trained_from_without_one_unasked(
    main: Main, stages: list, tmp_path: Path
) -> None:
    run_file = tmp_path / "run.toml"
    line = ("train", "--config", run_file, "--student", "s", "--output", tmp_path / "o", "--device", "cpu")
    run_file.write_text("[data]\npaths = 'd'\n")
    assert main(*line)[0] == 0
    run_file.write_text("[teacher]\npath = 't'\n[data]\npaths = 'd'\n")
    code, _, err = main(*line)
    assert (code, err.count("\n")) == (4, 1)
    assert "E-CONFIG --cache: the run file names a teacher (t) and no cache of its rows: make one with" in err
    assert main(*line, "--data", "d")[0] == 0


def test_the_help_of_train_shows_the_options_of_data_apart(main: Main) -> None:
    general, _, of_data = main("train", "--help")[1].partition("With --data, in place of --cache:")
    for option in ("--max-length", "--bad-records", "--prepare-workers"):
        assert option in of_data
        assert option not in general
    assert "--data FILE..." in general


def test_a_loss_preset_is_where_the_loss_starts(main: Main, stages: list) -> None:
    assert main(*TRAIN, "--loss-preset", "torchtune", "--set", "loss.kd_weight=0.9", "--json")[0] == 0
    loss = stages[1][0].spec.loss
    assert (loss.preset, loss.divergence, loss.kd_weight) == ("torchtune", "soft_cross_entropy", 0.9)


def test_more_processes_are_launched_after_the_check(main: Main, stages: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "launch", lambda function, *_, nproc, **__: {"function": function.__name__, "n": nproc})
    _, out, _ = main(*TRAIN, "--nproc", "3", "--json")
    assert json.loads(out) == {"function": "train_rank", "n": 3}
    assert stages == [("check", 3)]


def test_what_ended_the_ranks_is_an_event(
    main: Main, stages: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*args: object, **options: object) -> None:
        raise TemporaryError("killed by SIGKILL", where="rank 1")

    monkeypatch.setattr(launch, "launch", lose)
    args = ["train", "--student", "s", "--cache", "c", "--output", tmp_path, "--device", "cpu", "--nproc", "2"]
    assert main(*args) == (75, "", "E-TEMPORARY rank 1: killed by SIGKILL\n")
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert (event["kind"], event["exit_code"]) == ("launch_failed", 75)


def test_a_rank_of_torchrun_trains_here_and_only_rank_0_speaks(
    main: Main, stages: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(*TRAIN, "--json") == (0, "", "")
    assert (stages[0], stages[1][1]) == (("check", 2), "Silent")
    assert main(*TRAIN, "--nproc", "2")[0] == 4


def test_eval_takes_the_caches_fraction_unless_told(main: Main, stages: list) -> None:
    args = ("eval", "--student", "s", "--cache", "c", "--json")
    assert json.loads(main(*args)[1]) == {"heldout_kl": 0.25}
    main(*args, "--set", "data.heldout_fraction=0.5", "--dtype", "float32")
    main(*args, "--set", "data.heldout_fraction=0.5", "--heldout-fraction", "0", "--batch-tokens", "99")
    told = [(options["heldout_fraction"], options["dtype"], options["batch_tokens"]) for *_, options in stages]
    assert told == [(None, "auto", 16384), (0.5, "float32", 16384), (0.0, "auto", 99)]
