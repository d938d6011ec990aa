"""A file of answers: the same after any interruption, drawn by seed, prompt and number, refused for other settings."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.chats import write_chats
from tests.conftest import Apart
from tests.models import make_adapter, make_model, make_tokenizer
from tests.parrots import make_parrot
from tests.stages.generating import WINDOW, generate_small
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import BusyError, ConfigError, DataError, KdpipeError, SpaceError, TeacherError
from kdpipe.manifests.generated import GeneratedRecord
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.record import read_record
from kdpipe.manifests.specs import DataSpec, LiveSpec
from kdpipe.stages.extract import ExtractSpec, extract
from kdpipe.stages.generate import GenerateSpec, generate, run
from kdpipe.stages.generate.file import AnswersFile
from kdpipe.stages.prepare.files import list_files

NUM_CHATS = 11
Lines = list[dict[str, Any]]


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setitem(run.WINDOW, "cpu", WINDOW)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    make_tokenizer(make_model("qwen3", folder / "model", vocab_size=304))
    write_chats(folder / "chats.jsonl", NUM_CHATS)
    return folder


@pytest.fixture
def spec(made: Path, tmp_path: Path) -> GenerateSpec:
    return GenerateSpec(
        model=made / "model",
        prompts=(made / "chats.jsonl",),
        out=tmp_path / "answers.jsonl",
        sampling=LiveSpec(max_new_tokens=8, samples_per_prompt=2),
        device="cpu",
    )


def lines(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(path: Path) -> list[str]:
    return [record["messages"][-1]["content"] for record in lines(path)]


def write_records(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_record_an_answer_in_the_order_of_prompts_and_numbers(spec: GenerateSpec) -> None:
    made = generate(spec, Silent())
    found = lines(spec.out)
    places = [(each["kdpipe"]["line"], each["kdpipe"]["number"]) for each in found]
    assert places == [(line, number) for line in range(1, NUM_CHATS + 1) for number in range(2)]
    asked = [json.loads(line)["messages"][0] for line in spec.prompts[0].read_text().splitlines()]
    assert [each["messages"][:-1] for each in found] == [[asked[line - 1]] for line, _ in places]
    assert made["num_answers"] == len(found) == 2 * NUM_CHATS
    assert made["num_tokens"] == sum(each["kdpipe"]["num_tokens"] for each in found)
    assert made["num_cut"] == sum(each["finish_reason"] == "length" for each in found) > 0
    assert len({each["kdpipe"]["key"] for each in found}) == len(found)


def test_greedy_answers_are_those_of_transformers(spec: GenerateSpec) -> None:
    generate(replace(spec, sampling=LiveSpec(max_new_tokens=8, temperature=0.0)), Silent())
    model = AutoModelForCausalLM.from_pretrained(spec.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    for record in lines(spec.out):
        ids = tokenizer.apply_chat_template(
            record["messages"][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        own = model.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=[2, 3], pad_token_id=0)
        answer = own[0, ids.shape[1] :].tolist()
        assert record["kdpipe"]["num_tokens"] == len(answer)
        text = tokenizer.decode(answer[:-1] if answer[-1] in (2, 3) else answer)
        assert record["messages"][-1]["content"].rstrip("\ufffd") == text.rstrip("\ufffd")


def test_what_is_written_is_read_again_by_extract_as_it_was_written(tmp_path: Path) -> None:
    parrot = make_parrot(tmp_path / "parrot", "Yes, two!")
    data = write_records(tmp_path / "p.jsonl", [{"prompt": "hi?"}, {"messages": [{"role": "user", "content": "so"}]}])
    spec = GenerateSpec(
        model=parrot, prompts=(data,), out=tmp_path / "a.jsonl", sampling=LiveSpec(temperature=0.0), device="cpu"
    )
    spec = replace(spec, sampling=LiveSpec(temperature=0.0, max_new_tokens=20))
    notes = Notes()
    made = generate(spec, notes)
    assert said(spec.out) == ["Yes, two!"] * 2
    assert (made["num_read_otherwise"], made["num_cut"], notes.said) == (0, 0, [])
    cache = extract(
        ExtractSpec(teacher=parrot, data=(spec.out,), data_spec=DataSpec(strict=True)), tmp_path / "c", Silent()
    )
    assert cache.plan.counts == {"read": 2, "kept": 2}
    assert [int(cache[each].supervised.sum()) for each in range(2)] == [
        each["kdpipe"]["num_tokens"] for each in lines(spec.out)
    ]
    again = generate(
        replace(spec, sampling=LiveSpec(temperature=0.0, max_new_tokens=4), out=tmp_path / "cut.jsonl"), notes
    )
    assert again["num_cut"] == 2
    assert "2 of 2 answers were cut at --max-new-tokens and have no end" in notes.said
    cut = extract(ExtractSpec(teacher=parrot, data=(tmp_path / "cut.jsonl",)), tmp_path / "cc", Silent())
    assert [int(cut[each].supervised.sum()) for each in range(2)] == [4, 4]


def test_an_answer_depends_on_seed_prompt_and_number_alone(spec: GenerateSpec, tmp_path: Path) -> None:
    generate(spec, Silent())
    whole = lines(spec.out)

    def other(name: str, **changes: Any) -> Lines:
        changed = replace(spec, out=tmp_path / f"{name}.jsonl", **changes)
        generate(changed, Silent())
        return lines(changed.out)

    one = other("one", sampling=LiveSpec(max_new_tokens=8))
    assert [each["messages"] for each in one] == [each["messages"] for each in whole[::2]]
    assert [each["messages"] for each in other("seed", seed=1)] != [each["messages"] for each in whole]
    text = spec.prompts[0].read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(text[:5]))
    few = other("few-answers", prompts=(tmp_path / "few.jsonl",))
    assert [each["messages"] for each in few] == [each["messages"] for each in whole[:10]]
    (tmp_path / "twice.jsonl").write_text(text[0] * 2)
    twice = [each["messages"][-1]["content"] for each in other("a2", prompts=(tmp_path / "twice.jsonl",))]
    assert twice[:2] == [each["messages"][-1]["content"] for each in whole[:2]]
    assert len(set(twice)) == 4


def test_killed_anywhere_it_ends_with_the_same_bytes(spec: GenerateSpec, apart: Apart, tmp_path: Path) -> None:
    generate(spec, Silent())
    for number, place in enumerate(("answers:written#2", "answers:begun#6")):
        killed = replace(spec, out=tmp_path / f"killed{number}.jsonl")
        assert apart(generate_small, killed, place) == -9
        assert killed.out.read_bytes() != spec.out.read_bytes()
        generate(killed, Silent())
        assert killed.out.read_bytes() == spec.out.read_bytes()


def test_torn_anywhere_it_ends_with_the_same_bytes(spec: GenerateSpec) -> None:
    generate(spec, Silent())
    whole = spec.out.read_bytes()
    for size in (0, 1, 700, len(whole) // 2, len(whole) - 1):
        os.truncate(spec.out, size)
        generate(spec, Silent())
        assert spec.out.read_bytes() == whole


def test_a_run_that_goes_on_writes_whole_windows(spec: GenerateSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed together decides the last bits."""
    generate(spec, Silent())
    kept = spec.out.read_text().splitlines(keepends=True)
    spec.out.write_text("".join(kept[: 2 * WINDOW + 3]))
    asked: list[list[int]] = []
    own = run.LocalWriter.write

    def write(self: Any, prompts: Any, *rest: Any) -> Any:
        asked.append([prompt.key for prompt in prompts])
        return own(self, prompts, *rest)

    monkeypatch.setattr(run.LocalWriter, "write", write)
    generate(spec, Silent())
    keys = [record["kdpipe"]["key"] for record in lines(spec.out)]
    assert asked == [keys[start : start + WINDOW] for start in range(2 * WINDOW, len(keys), WINDOW)]


def test_a_folder_of_answers_is_data(spec: GenerateSpec) -> None:
    generate(spec, Silent())
    assert {path.name for path in spec.out.parent.iterdir()} == {"answers.jsonl", "answers.jsonl.json"}
    said: list[str] = []
    assert list_files([spec.out.parent], said.append) == [spec.out]
    assert said == []


def test_a_finished_file_is_left_alone(spec: GenerateSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    made = generate(spec, Silent())
    before = spec.out.stat().st_mtime_ns

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("neither the model nor the prompts are read")

    monkeypatch.setattr(run.LocalWriter, "__init__", never)
    monkeypatch.setattr(run, "prompts", never)
    notes = Notes()
    assert generate(spec, notes) == made
    assert notes.said == [f"all {2 * NUM_CHATS} answers are there already"]
    assert spec.out.stat().st_mtime_ns == before


OTHER: dict[str, Callable[[GenerateSpec], GenerateSpec]] = {
    "seed": lambda spec: replace(spec, seed=3),
    "temperature": lambda spec: replace(spec, sampling=spec.sampling.model_copy(update={"temperature": 0.5})),
    "top_p": lambda spec: replace(spec, sampling=spec.sampling.model_copy(update={"top_p": 0.5})),
    "top_k": lambda spec: replace(spec, sampling=spec.sampling.model_copy(update={"top_k": 5})),
    "max_new_tokens": lambda spec: replace(spec, sampling=spec.sampling.model_copy(update={"max_new_tokens": 9})),
    "samples_per_prompt": lambda spec: replace(
        spec, sampling=spec.sampling.model_copy(update={"samples_per_prompt": 3})
    ),
    "max_length": lambda spec: replace(spec, data_spec=DataSpec(max_length=99)),
    "dtype": lambda spec: replace(spec, dtype="bfloat16"),
}


def test_other_settings_are_refused_by_name(spec: GenerateSpec, tmp_path: Path) -> None:
    generate(spec, Silent())
    before = spec.out.read_bytes()
    for name, change in OTHER.items():
        with pytest.raises(ConfigError, match=rf"answers\.jsonl: it was written with {name} = "):
            generate(change(spec), Silent())
    other = make_tokenizer(make_model("qwen3", tmp_path / "other", vocab_size=304, seed=5))
    with pytest.raises(ConfigError, match="it was written with model = "):
        generate(replace(spec, model=other), Silent())
    with pytest.raises(ConfigError, match="it was written with prompts = "):
        generate(replace(spec, prompts=(write_chats(tmp_path / "more.jsonl", 12),)), Silent())
    assert spec.out.read_bytes() == before


def test_a_file_of_somebody_else_is_refused(spec: GenerateSpec, tmp_path: Path) -> None:
    spec.out.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"no answers\.jsonl\.json says that kdpipe generate wrote it"):
        generate(spec, Silent())
    assert spec.out.read_text() == "{}\n"
    (tmp_path / "in").mkdir()
    data = write_chats(tmp_path / "in" / "d.jsonl", 3)
    for prompts, out in (((data,), data), ((tmp_path / "in",), tmp_path / "in" / "a.jsonl")):
        with pytest.raises(ConfigError, match="its answers would be read as prompts"):
            generate(replace(spec, prompts=prompts, out=out), Silent())
    with pytest.raises(ConfigError, match=r"name it \*\.jsonl"):
        generate(replace(spec, out=tmp_path / "a.json"), Silent())
    with pytest.raises(ConfigError, match="it lies in the model"):
        generate(replace(spec, out=spec.model / "a.jsonl"), Silent())


def test_an_edited_answer_is_found(spec: GenerateSpec) -> None:
    generate(spec, Silent())
    kept = spec.out.read_text().splitlines(keepends=True)
    spec.out.write_text("".join([*kept[:2], *kept[3:9]]))
    with pytest.raises(DataError, match=r"answers\.jsonl:3: it is not the answer that belongs here"):
        generate(spec, Silent())


def test_a_second_run_at_the_same_file_is_refused(spec: GenerateSpec) -> None:
    generate(spec, Silent())
    os.truncate(spec.out, 100)
    with AnswersFile(spec.out), pytest.raises(BusyError, match="another run writes to it"):
        generate(spec, Silent())


def test_a_full_disk_is_said_and_gone_on_from(spec: GenerateSpec, tmpfs: Callable[[str], Path]) -> None:
    generate(spec, Silent())
    disk = tmpfs("16k")
    small = replace(spec, out=disk / "a.jsonl")
    (disk / "ballast").write_bytes(b"x" * 6000)
    with pytest.raises(SpaceError):
        generate(small, Silent())
    (disk / "ballast").unlink()
    assert spec.out.stat().st_size < 12_000
    generate(small, Silent())
    assert small.out.read_bytes() == spec.out.read_bytes()


def test_records_that_are_no_prompts_are_counted_or_refused(spec: GenerateSpec, tmp_path: Path) -> None:
    records = [
        {"prompt": "one"},
        {"prompt": "word " * 300},
        {"prompt": ""},
        {"text": "running"},
        {"prompt": "two", "id": 3},
    ]
    data = write_records(tmp_path / "p.jsonl", records)
    few = replace(spec, prompts=(data,), data_spec=DataSpec(max_length=50))
    with pytest.raises(DataError, match=r"p\.jsonl:4: running text has no prompt"):
        generate(few, Silent())
    assert not few.out.exists()
    notes = Notes()
    generate(replace(few, data_spec=DataSpec(max_length=50, bad_records="skip", max_bad=0.5)), notes)
    assert [each["kdpipe"]["line"] for each in lines(few.out)] == [1, 1, 5, 5]
    record = read_record(few.out.with_name("answers.jsonl.json"), GeneratedRecord)
    assert record is not None
    counts = {"read": 5, "kept": 2, "bad_record": 1, "dropped_overlong": 1, "empty_text": 1, "not read: id": 1}
    assert record.counts == counts
    told = "\n".join(notes.said)
    assert "1 of 5 prompts dropped overlong" in told
    assert "p.jsonl:2" in told
    assert "id (1)" in told


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused(spec: GenerateSpec) -> None:
    with pytest.raises(DataError, match=r"chats\.jsonl:1: a prompt of \d+ tokens, the model reads 512"):
        generate(replace(spec, sampling=LiveSpec(max_new_tokens=500)), Silent())


def test_no_id_is_written_that_is_no_token(spec: GenerateSpec, tmp_path: Path) -> None:
    folder = make_tokenizer(make_model("llama", tmp_path / "padded", vocab_size=400))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight[350:] *= 50.0
    model.save_pretrained(folder)
    made = generate(replace(spec, model=folder, sampling=LiveSpec(max_new_tokens=4, temperature=0.0)), Silent())
    assert made["num_answers"] == NUM_CHATS
    assert sum(map(bool, said(spec.out))) > NUM_CHATS // 2  # an id without a token has no text


def test_a_model_that_cannot_write_is_refused(spec: GenerateSpec, made: Path, tmp_path: Path) -> None:
    folder = make_tokenizer(make_model("llama", tmp_path / "nan", vocab_size=304))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = np.nan
    model.save_pretrained(folder)
    with pytest.raises(TeacherError, match="its logits are not finite"):
        generate(replace(spec, model=folder), Silent())
    with pytest.raises(KdpipeError, match=r"no config\.json here"):
        generate(replace(spec, model=made), Silent())


def test_chats_with_answers_and_without_are_the_same_prompts(spec: GenerateSpec, tmp_path: Path) -> None:
    asked = [{"messages": json.loads(line)["messages"][:1]} for line in spec.prompts[0].read_text().splitlines()]
    generate(spec, Silent())
    other = replace(spec, prompts=(write_records(tmp_path / "asked.jsonl", asked),), out=tmp_path / "b.jsonl")
    generate(other, Silent())
    assert said(other.out) == said(spec.out)
    cache = extract(ExtractSpec(teacher=spec.model, data=(other.out,)), tmp_path / "cache", Silent())
    assert isinstance(cache, Cache)
    assert not any(name.startswith("not read") for name in cache.plan.counts)


def test_a_model_whose_adapter_changes_its_head_writes_as_the_merged_one(made: Path, spec: GenerateSpec) -> None:
    from peft import PeftModel

    folder = spec.out.parent
    adapter = make_adapter(made / "model", folder / "adapter", targets=["q_proj", "lm_head"])
    base = AutoModelForCausalLM.from_pretrained(made / "model")
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(made / "model").save_pretrained(folder / "merged")
    written = []
    for name in ("adapter", "merged"):
        generate(replace(spec, model=folder / name, out=folder / f"{name}.jsonl"), Silent())
        written.append([json.loads(line)["messages"] for line in (folder / f"{name}.jsonl").read_text().splitlines()])
    assert written[0] == written[1]
    with pytest.raises(TeacherError, match="output head"):
        extract(ExtractSpec(teacher=adapter, data=(made / "chats.jsonl",)), folder / "cache", Silent())
