"""A teacher and a student with code of their own, from plan to eval; and a launch whose ranks look for themselves."""

import json
from pathlib import Path

import pytest
import transformers
from tests.chats import write_chats
from tests.conftest import Bench, Main
from tests.models import make_model, make_own, make_tokenizer
from tests.stages.ranks import train_and_record

from kdpipe.manifests.errors import StudentError
from kdpipe.manifests.plan import read_plan
from kdpipe.manifests.specs import RunSpec, TrainSpec
from kdpipe.pipeline.launch import launch
from kdpipe.stages.models.own_code import code_digest
from kdpipe.stages.train.training import Training

SETS = ("--set", "train.dtype=float32", "train.max_steps=2", "train.batch_tokens=600")


def make_own_student(folder: Path) -> Path:
    make_model("llama", folder / "student", vocab_size=320, seed=1, sizes={"hidden_size": 32})
    return make_own(make_tokenizer(folder / "student"), folder / "student ran")


def allow(folder: Path) -> tuple[str, str]:
    return "--trust-remote-code", code_digest(folder)


def test_teacher_and_student_with_own_code_from_plan_to_eval(main: Main, tmp_path: Path) -> None:
    teacher = make_own(make_tokenizer(make_model("llama", tmp_path / "teacher", vocab_size=304)), tmp_path / "ran")
    student, cache, out = make_own_student(tmp_path), tmp_path / "cache", tmp_path / "out"
    data = ("--teacher", teacher, "--data", write_chats(tmp_path / "chats.jsonl", 30), "--heldout-fraction", 0.25)
    for line in (("plan", *data), ("extract", *data, "--cache", cache)):
        code, printed, err = main(*line)
        assert (code, printed) == (4, "")
        # transformers' own bars of writing the models above may come before it
        assert [line for line in err.splitlines() if line.startswith("E-")] == err.splitlines()[-1:]
        assert err.endswith(" ".join(allow(teacher)) + "\n")
    assert not cache.exists()
    assert not (tmp_path / "ran").exists()

    code, _, err = main("plan", *data, "--student", student, *allow(teacher))
    assert (code, "student brings its own code: train checks the student" in err) == (0, True), err
    assert not (tmp_path / "student ran").exists()
    plain = make_tokenizer(make_model("llama", tmp_path / "plain", vocab_size=320))
    code, _, err = main("plan", *data, "--student", plain, *allow(teacher))
    assert (code, "brings its own code" in err) == (0, False), err
    assert main("extract", *data, "--cache", cache, *allow(teacher), "--json")[0] == 0
    assert (tmp_path / "ran").exists()
    train = ("train", "--student", student, "--cache", cache, "--output", out, "--nproc", 2, "--device", "cpu", *SETS)
    assert main(*train)[0] == 4
    assert not (tmp_path / "student ran").exists()
    code, printed, err = main(*train, *allow(student), "--json")
    assert code == 0, err
    assert len((tmp_path / "student ran").read_text().splitlines()) == 3, (
        "one line of the launcher, which examines it, and of each rank"
    )
    assert json.loads(main(*train, *allow(student), "--json")[1]) == json.loads(printed), "it is finished"

    # What was allowed is what the trained student has: the same digest allows it.
    assert code_digest(out) == code_digest(student)
    assert "kdpipe-code" not in (out / "config.json").read_text() + (out / "tokenizer_config.json").read_text()
    evaluate = ("eval", "--student", out, "--cache", cache, "--json")
    assert main(*evaluate)[0] == 4
    code, scores, err = main(*evaluate, *allow(student))
    assert code == 0, err
    assert json.loads(scores)["heldout_kl"] == pytest.approx(json.loads(printed)["heldout_kl"], rel=1e-5)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(loaded).__name__ == "TinyForCausalLM"


def test_a_cache_is_of_the_code_that_made_it(main: Main, tmp_path: Path) -> None:
    teacher = make_own(make_tokenizer(make_model("llama", tmp_path / "teacher", vocab_size=304)), tmp_path / "ran")
    chats, cache = write_chats(tmp_path / "chats.jsonl", 9), tmp_path / "cache"
    extract = ("extract", "--teacher", teacher, "--data", chats, "--cache", cache)
    before = allow(teacher)
    assert main(*extract, *before)[0] == 0
    made = read_plan(cache).fingerprint
    (teacher / "modeling_tiny.py").write_text((teacher / "modeling_tiny.py").read_text() + "# more\n")
    assert "the code has changed" in main(*extract, *before)[2]
    code, _, err = main(*extract, *allow(teacher))
    assert (code, "made with fingerprint.teacher" in err) == (4, True)
    assert read_plan(cache).fingerprint == made


def test_a_finished_run_is_of_the_code_it_ran(main: Main, bench: Bench, tmp_path: Path) -> None:
    student = make_own_student(tmp_path)
    train = ("train", "--student", student, "--cache", bench.cache, "--output", tmp_path / "out", *SETS)
    assert main(*train, *allow(student))[0] == 0
    (student / "modeling_tiny.py").write_text((student / "modeling_tiny.py").read_text() + "# more\n")
    code, _, err = main(*train, *allow(student))
    assert (code, "it holds the student of another run: its student is" in err) == (4, True)


def test_every_rank_looks_at_the_digest_itself(bench: Bench, tmp_path: Path) -> None:
    student = make_own_student(tmp_path)
    training = Training(
        student=student,
        caches=(bench.cache,),
        output=tmp_path / "out",
        spec=RunSpec(train=TrainSpec(max_steps=1)),
        device="cpu",
        trust=code_digest(student),
    )
    (student / "modeling_tiny.py").write_text((student / "modeling_tiny.py").read_text() + "# more\n")
    with pytest.raises(StudentError, match="the code has changed"):
        launch(train_and_record, training, nproc=2)
    assert not (tmp_path / "student ran").exists()


def test_a_student_is_compared_with_a_teacher_whose_tokenizer_is_code(main: Main, tmp_path: Path) -> None:
    teacher = make_tokenizer(make_model("llama", tmp_path / "teacher", vocab_size=304))
    source = "from transformers import PreTrainedTokenizerFast\nclass TinyTokenizerFast(PreTrainedTokenizerFast): ...\n"
    (teacher / "tokenization_tiny.py").write_text(source)
    config = json.loads((teacher / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "tokenization_tiny.TinyTokenizerFast"]}}
    (teacher / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "TinyTokenizer"}))
    cache = tmp_path / "cache"
    data = ("--teacher", teacher, "--data", write_chats(tmp_path / "chats.jsonl", 30))
    assert main("extract", *data, "--cache", cache, *allow(teacher))[0] == 0
    make_tokenizer(make_model("llama", tmp_path / "student", vocab_size=320), vocab_size=280)
    train = ("train", "--student", tmp_path / "student", "--cache", cache, "--output", tmp_path / "out", *SETS)
    assert "id 280 is None to the student" in main(*train)[2]
