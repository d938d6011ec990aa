"""Recipes run as they are written, on tiny models; a misspelt key of any of them is refused."""

import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tests.chats import write_chats
from tests.conftest import Bench, Main
from tests.models import make_model
from tests.tokenizers import CHAT, byte_level

from kdpipe.manifests.run import read_run
from kdpipe.pipeline.commands.recipe import recipes

Record = Callable[[str, str], dict[str, object]]


def sharegpt(question: str, answer: str) -> dict[str, object]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns}


def alpaca(question: str, answer: str) -> dict[str, object]:
    return {"instruction": question, "input": "", "output": answer}


def dojo(question: str, answer: str) -> dict[str, object]:
    """Its prompts are the messages, whose last turn is empty."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
    return {"prompt": question, "messages": turns}


DATA: Mapping[str, Record] = {"kdflow": sharegpt, "torchtune": alpaca, "llm": dojo}


def commands(text: str) -> list[list[str]]:
    """The words after `kdpipe` of the commands at a recipe's top."""
    return [shlex.split(line)[1:] for line in re.findall(r"^#\s+(kdpipe .*)$", text, re.MULTILINE)]


def with_values(text: str, values: Mapping[str, object]) -> str:
    """A run file with other values of keys that it has, and with further ones."""
    for key, value in values.items():
        table, _, leaf = key.partition(".")
        before, heading, rest = text.partition(f"[{table}]")
        if not heading:
            continue
        rest, count = re.subn(rf"(?m)^{leaf} = .*$", f"{leaf} = {json.dumps(value)}", rest, count=1)
        text = f"{before}{heading}{rest}" if count else f"{before}{heading}\n{leaf} = {json.dumps(value)}{rest}"
    return text


@pytest.mark.parametrize("name", recipes())
def test_it_runs_from_end_to_end(
    name: str, bench: Bench, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record = DATA[name.partition("-")[0]]
    chats = [json.loads(line)["messages"] for line in write_chats(Path("chats.jsonl"), 24).read_text().splitlines()]
    Path("data.json").write_text(json.dumps([record(*(turn["content"] for turn in chat)) for chat in chats]))
    student = bench.student
    if "align = " in recipes()[name]:
        student = make_model("llama", tmp_path / "other", vocab_size=920, seed=2)
        byte_level(900).save_pretrained(student)
        (student / "chat_template.jinja").write_text(CHAT)
    values = {
        "teacher.path": str(bench.teacher),
        "student.path": str(student),
        "data.paths": ["data.json"],
        "data.max_length": 128,
        "data.heldout_fraction": 0.25,
        "live.max_new_tokens": 8,
        "train.batch_tokens": 300,
        "train.max_steps": 2,
        "train.grad_accum": 1,
        "train.device": "cpu",
    }
    text = with_values(recipes()[name], values)
    Path("run.toml").write_text(text)
    for words in commands(text):
        code, _, err = main(*words)
        assert code == 0, err
    (output,) = re.findall(r'(?m)^output = "(.*?)"', text)
    done = read_run(Path(output))
    assert done is not None
    assert done.num_steps == 2


@pytest.mark.parametrize("name", recipes())
def test_a_misspelt_key_is_refused_by_name(
    name: str, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = recipes()[name]
    for key in re.findall(r"(?m)^(\w+) = ", text):
        Path("run.toml").write_text(re.sub(rf"(?m)^{key} = ", f"{key[:-1]}{key[-1] * 2}z = ", text))
        code, _, err = main(*commands(text)[-1])
        assert (code, f"{key[:-1]}{key[-1] * 2}z" in err) == (4, True), err


def test_it_is_written_once_and_never_over_another_file(main: Main, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    assert main("recipe", "kdflow-sft", "--out", file)[0] == 0
    assert file.read_text() == recipes()["kdflow-sft"] == main("recipe", "kdflow-sft")[1]
    file.write_text("mine")
    code, _, err = main("recipe", "kdflow-sft", "--out", file)
    assert (code, file.read_text()) == (4, "mine")
    assert "exists" in err


def test_all_are_listed_and_an_unknown_one_is_refused_with_the_nearest(main: Main) -> None:
    code, out, _ = main("recipe")
    assert (code, [line.split()[0] for line in out.splitlines()]) == (0, list(recipes()))
    assert max(map(len, out.splitlines())) <= 80
    code, _, err = main("recipe", "kdflow-stf")
    assert (code, "did you mean 'kdflow-sft'" in err) == (4, True)
