"""Records become samples or incidents, one for one, streamed; the same content is the same sample in every file."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdpipe.manifests.errors import DataError
from kdpipe.manifests.sample import Incident
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.prepare import prepare
from kdpipe.stages.prepare import samples as samples_module

Run = Callable[..., Any]
Write = Callable[..., Path]


def exchange(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


CHATS = [exchange(f"What is {i}? 🙂", f"It is {i}. 你好" * (1 + i % 3)) for i in range(23)]


def test_every_file_and_form_gives_the_same_samples(chatml: Any, write: Write, run: Run, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(CHATS)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "a.json").write_text(json.dumps(CHATS))
    (tmp_path / "saved").mkdir()
    with pa.ipc.new_stream(str(tmp_path / "saved" / "d.arrow"), table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "d.arrow"}]}')
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in chat["messages"]]}
        for chat in CHATS
    ]
    pairs = [{"prompt": c["messages"][0]["content"], "response": c["messages"][1]["content"]} for c in CHATS]
    paths = [tmp_path / name for name in ("a.parquet", "a.arrow", "a.json", "saved")]
    paths += [write(CHATS, "a.jsonl"), write(sharegpt, "b.jsonl"), write(pairs, "c.jsonl")]
    found = [
        [(s.content_id, s.token_ids.tobytes(), s.supervised.tobytes()) for s in run(path, chatml).samples]
        for path in paths
    ]
    assert len(found[0]) == len(set(found[0])) == len(CHATS)
    for path, samples in zip(paths, found, strict=True):
        assert samples == found[0], path.name


def test_samples_say_where_they_come_from(chatml: Any, write: Write, run: Run) -> None:
    first, second = write(CHATS[:3], "a.jsonl"), write(CHATS[3:5], "b.jsonl")
    found = [(sample.source, sample.line) for sample in run([first, second], chatml).samples]
    assert found == [(str(first), 1), (str(first), 2), (str(first), 3), (str(second), 1), (str(second), 2)]


def test_the_id_does_not_depend_on_other_columns_or_on_the_tokenizer(
    kit: Any, chatml: Any, base: Any, write: Write, run: Run
) -> None:
    pair = {"prompt": "q", "completion": "a"}
    path = write([pair, {**pair, "id": 3}, {**pair, "completion": "b"}])
    with_template, without = ([s.content_id for s in run(path, tokenizer).samples] for tokenizer in (chatml, base))
    assert with_template == without
    assert with_template[0] == with_template[1] != with_template[2]


def test_a_long_sample_loses_its_tail(chatml: Any, write: Write, run: Run) -> None:
    path = write([exchange("q", "It is a long answer. " * 9), exchange("q", "a")])
    [whole, short], none = run(path, chatml)
    assert none == []
    length = len(whole.token_ids) - 5
    [cut, same], incidents = run(path, chatml, max_length=length)
    assert cut.truncated
    assert not same.truncated
    assert cut.token_ids.tolist() == whole.token_ids[:length].tolist()
    assert cut.supervised.tolist() == whole.supervised[:length].tolist()
    assert same.token_ids.tolist() == short.token_ids.tolist()
    detail = f"{length + 5} tokens, at most {length} are kept"
    assert incidents == [Incident(source=str(path), line=1, kind="truncated", detail=detail)]


def test_a_sample_of_exactly_the_longest_length_is_whole(chatml: Any, write: Write, run: Run) -> None:
    path = write([exchange("q", "an answer")])
    length = len(run(path, chatml).samples[0].token_ids)
    for overlong in ("truncate", "drop"):
        [sample], incidents = run(path, chatml, max_length=length, overlong=overlong)
        assert not sample.truncated
        assert incidents == []


def test_every_record_is_a_sample_or_an_incident_in_order(chatml: Any, write: Write, run: Run) -> None:
    records = [
        exchange("q", "a"),
        {**exchange("q", " "), "prompt": [{"role": "user", "content": "q"}]},
        exchange("question " * 30, "a"),
        {"text": "\n"},
        exchange("q", "answer " * 30),
        exchange("q", "b"),
    ]
    path = write(records)
    samples, incidents = run(path, chatml, max_length=30)
    assert [sample.line for sample in samples] == [1, 5, 6]
    kinds = [(2, "empty_completion"), (3, "no_supervised_token"), (4, "empty_text"), (5, "truncated")]
    assert [(incident.line, incident.kind) for incident in incidents] == kinds
    assert sum(incident.dropped for incident in incidents) + len(samples) == len(records)
    samples, incidents = run(path, chatml, max_length=30, overlong="drop")
    assert [sample.line for sample in samples] == [1, 6]
    assert [incident.kind for incident in incidents if incident.line in (3, 5)] == ["dropped_overlong"] * 2
    assert "question" not in str(incidents)


def test_a_text_of_one_token_has_no_target(kit: Any, write: Write, run: Run) -> None:
    tokenizer = kit.train()
    tokenizer.eos_token = None
    samples, incidents = run(write([{"text": "a"}, {"text": "a b"}]), tokenizer)
    assert [sample.line for sample in samples] == [2]
    told = [(i.line, i.kind) for i in incidents]
    assert told == [(1, "no_stop_token"), (1, "no_supervised_token"), (2, "no_stop_token")]
    assert incidents[1].detail == "none of 1 tokens is a target"


def test_no_sample_at_all_is_an_error_that_says_why(chatml: Any, write: Write, run: Run) -> None:
    path = write([exchange("q", "")] * 3 + [exchange("question " * 30, "a")] * 2)
    message = r"data\.jsonl: none of the 5 records read can be used: 3 empty_completion, 2 no_supervised_token$"
    with pytest.raises(DataError, match=message) as caught:
        run(path, chatml, max_length=30)
    assert caught.value.exit_code == 4


def test_the_first_sample_comes_before_the_file_is_read_to_its_end(chatml: Any, write: Write, tmp_path: Path) -> None:
    path = write(CHATS * 40)
    with path.open("a") as file:
        file.write('{"messages": "a late mistake"}\n')
    samples = prepare([path], chatml, DataSpec(), on_incident=lambda incident: None)
    assert next(samples).line == 1
    with pytest.raises(DataError, match=f":{len(CHATS) * 40 + 1}: column 'messages'"):
        list(samples)


def test_long_records_are_not_collected_into_one_batch(
    chatml: Any, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "BATCH_CHARS", 100)
    path = write([exchange("q", "answer " * 20), exchange("q", "a"), {"messages": 3}])
    samples = prepare([path], chatml, DataSpec(), on_incident=lambda incident: None)
    assert next(samples).line == 1


def test_batches_do_not_change_the_samples(
    chatml: Any, write: Write, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write([*CHATS, {"text": "mixed in"}, exchange("q", ""), *CHATS])
    whole = run(path, chatml)
    monkeypatch.setattr(samples_module, "BATCH_RECORDS", 5)
    parts = run(path, chatml)
    assert [s.token_ids.tolist() for s in parts.samples] == [s.token_ids.tolist() for s in whole.samples]
    assert [s.line for s in parts.samples] == [s.line for s in whole.samples]
    assert parts.incidents == whole.incidents


def test_paths_are_checked_at_the_call(chatml: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        prepare([tmp_path / "gone.jsonl"], chatml, DataSpec(), on_incident=lambda incident: None)


def test_records_are_counted_by_what_was_not_read(chatml: Any, write: Write) -> None:
    path = write([{**exchange("q", "a"), "id": 1}, {**exchange("q", "b"), "id": 2, "source": "web"}])
    unread: Counter[str] = Counter()
    list(prepare([path], chatml, DataSpec(), on_incident=lambda incident: None, unread=unread))
    assert unread == {"id": 2, "source": 1}


def test_a_key_of_messages_that_the_template_reads_is_refused_unless_it_is_known(kit: Any, write: Write) -> None:
    chat = exchange("q", "a")
    chat["messages"][1] |= {"plan": "first", "id": 3}
    for read, is_read in (("m.plan", True), ("m['plan']", True), ("m.planet", False), ("m.id", False)):
        tokenizer = kit.train()
        template = kit.template("chatml", marked=False)
        tokenizer.chat_template = "{% for m in messages %}{{ " + read + " or '' }}{% endfor %}" + template
        samples = prepare([write([chat])], tokenizer, DataSpec(), on_incident=lambda incident: None)
        if is_read:
            with pytest.raises(DataError, match=r"data\.jsonl:1: the chat template reads 'plan' of a message"):
                next(samples)
        else:
            next(samples)


def test_with_strict_a_text_that_is_not_the_records_is_an_error(kit: Any, write: Write, run: Run) -> None:
    tokenizer = kit.train()
    tokenizer.chat_template = kit.template("chatml", marked=False)
    tokenizer.eos_token = "<|im_end|>"
    chat = exchange("q", "a")
    chat["messages"][1]["reasoning_content"] = "a thought that this template does not show"
    path = write([exchange("q", "a"), chat])
    _, incidents = run(path, tokenizer)
    assert [(each.line, each.kind) for each in incidents] == [(2, "thought_left_out")]
    with pytest.raises(DataError, match=r"data\.jsonl:2: thought left out, and --strict is given: "):
        run(path, tokenizer, strict=True)
    run(write([exchange("q", "")] * 2 + [exchange("q", "a")], "empty.jsonl"), tokenizer, strict=True)


def test_blank_files_alone_are_an_error_that_says_so(chatml: Any, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("\n\n")
    with pytest.raises(DataError, match=r"a\.jsonl and 1 more: holds no record"):
        list(prepare([tmp_path], chatml, DataSpec(), on_incident=lambda incident: None))


def test_a_file_without_records_among_others_is_noted(chatml: Any, write: Write, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(CHATS[:2])
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "b.parquet")
    notes: list[str] = []
    samples = prepare([tmp_path], chatml, DataSpec(), on_incident=lambda incident: None, on_note=notes.append)
    assert len(list(samples)) == 2
    assert notes == [f"{tmp_path / 'b.parquet'}: holds no record"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_only_records_with_the_values_that_are_asked_for_become_samples(
    kind: str, chatml: Any, write: Write, run: Run, tmp_path: Path
) -> None:
    records = [chat | {"domain": ("math", "code")[i % 3 == 0], "level": i % 2} for i, chat in enumerate(CHATS)]
    path = write(records, "a.jsonl") if kind == "jsonl" else tmp_path / f"a.{kind}"
    if kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif kind == "arrow":
        table = pa.Table.from_pylist(records)
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    whole = {sample.content_id for sample in run(path, chatml).samples}
    parts = [
        {sample.content_id for sample in run(path, chatml, where=where).samples}
        for where in ({"domain": "math", "level": "0"}, {"domain": "math", "level": "1"}, {"domain": "code"})
    ]
    assert [len(part) for part in parts] == [
        sum(record["domain"] == domain and level in (record["level"], None) for record in records)
        for domain, level in (("math", 0), ("math", 1), ("code", None))
    ]
    assert set.union(*parts) == whole
    assert sum(map(len, parts)) == len(whole)


def test_a_value_that_no_record_has_and_a_record_without_the_column_are_errors(
    chatml: Any, write: Write, run: Run
) -> None:
    path = write([CHATS[0] | {"domain": "math"}, CHATS[1]], "a.jsonl")
    with pytest.raises(DataError, match=r"a.jsonl:2: it has no 'domain', by which data.where chooses records"):
        run(path, chatml, where={"domain": "math"})
    with pytest.raises(DataError, match=r"holds no record with domain = art \(data.where\)"):
        run(write([CHATS[0] | {"domain": "math"}], "b.jsonl"), chatml, where={"domain": "art"})


def test_the_column_that_chooses_records_is_not_counted_as_unread(chatml: Any, write: Write) -> None:
    path, unread = write([CHATS[0] | {"domain": "math", "other": 1}], "a.jsonl"), Counter[str]()
    list(prepare([path], chatml, DataSpec(where={"domain": "math"}), on_incident=print, unread=unread))
    assert unread == {"other": 1}
