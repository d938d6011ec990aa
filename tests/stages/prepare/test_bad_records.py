"""What is said of bad records, and the way past them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdpipe.manifests.errors import DataError
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.prepare import bad_records, prepare

Write = Callable[..., Path]
Run = Callable[..., Any]
GOOD = {"prompt": "q", "completion": "a"}
BAD: list[dict[str, Any]] = [
    {"prompt": "q", "completion": 3},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": None}]},
    {"id": 7},
]


def error_of(path: Path, tokenizer: Any, **spec: Any) -> tuple[DataError, list[str]]:
    notes: list[str] = []
    with pytest.raises(DataError) as caught:
        list(prepare([path], tokenizer, DataSpec(**spec), on_incident=lambda incident: None, on_note=notes.append))
    return caught.value, notes


def test_the_first_error_shows_ten_with_a_count_by_kind(chatml: Any, write: Write) -> None:
    path = write([GOOD, BAD[0], GOOD, *BAD[1:3], *[GOOD] * 300, *[BAD[3]] * 9])
    error, notes = error_of(path, chatml)
    assert str(error).startswith(
        f"E-DATA {path}:2: column 'completion': expected a list of messages, found a number; 12 of the 314 records "
        "read so far are bad: 9 x no known form of record; "
    )
    assert ", 2 x messages[N] (user): 'content' is null, 1 x column 'completion': expected" in str(error)
    assert str(error).endswith("--bad-records skip leaves such records out")
    assert [re.findall(r":(\d+): ", note)[0] for note in notes] == ["2", "4", "5", *map(str, range(306, 313))]
    assert notes[1] == f"bad record {path}:4: messages[0] (user): 'content' is null"


def test_one_bad_record_is_one_line(chatml: Any, write: Write) -> None:
    error, notes = error_of(write([GOOD, BAD[1], GOOD]), chatml)
    assert error.args[0] == "messages[0] (user): 'content' is null; --bad-records skip leaves such records out"
    assert notes == []


def test_nobody_is_told_to_leave_out_all_records(chatml: Any, write: Write) -> None:
    error, _ = error_of(write([BAD[1]] * 3), chatml)
    assert "so are all 3 records read so far" in str(error)
    assert "skip" not in str(error)


def test_a_long_file_is_not_read_to_its_end_for_an_error(
    chatml: Any, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdpipe.stages.prepare.samples.LOOK_AHEAD", 50)
    error, _ = error_of(write([GOOD] * 9 + [BAD[1]] + [GOOD] * 400 + [BAD[1]]), chatml)
    assert error.args[0] == "messages[0] (user): 'content' is null; --bad-records skip leaves such records out"
    error, _ = error_of(write([GOOD] * 9 + [BAD[1]] + [GOOD] * 40 + [BAD[1]] * 100), chatml)
    assert "10 of the 59 records read so far are bad" in str(error)


def test_skipped_records_are_incidents_and_the_others_samples(chatml: Any, write: Write, run: Run) -> None:
    path = write([GOOD, *BAD, GOOD, GOOD])
    with path.open("ab") as file:
        file.write(b'{"prompt": "secr\n{"prompt": "caf\xe9"}\n')
    samples, incidents = run(path, chatml, bad_records="skip", max_bad=0.7)
    assert [sample.line for sample in samples] == [1, 6, 7]
    assert [(each.line, each.kind, each.dropped) for each in incidents] == [
        (line, "bad_record", True) for line in (2, 3, 4, 5, 8, 9)
    ]
    assert incidents[1].detail == "messages[0] (user): 'content' is null"
    assert "secr" not in str(incidents)


def test_what_is_skipped_leaves_the_samples_of_the_good_ones(chatml: Any, write: Write, run: Run) -> None:
    good = [{"prompt": f"q {i}", "completion": "a" * i} for i in range(1, 40)]
    mixed = [each for record in good for each in (record, BAD[0])]
    wanted = run(write(good, "good.jsonl"), chatml).samples
    found = run(write(mixed, "mixed.jsonl"), chatml, bad_records="skip", max_bad=0.5).samples
    assert [each.content_id for each in found] == [each.content_id for each in wanted]
    assert [each.token_ids.tolist() for each in found] == [each.token_ids.tolist() for each in wanted]


def test_more_bad_records_than_allowed_are_an_error(chatml: Any, write: Write) -> None:
    path = write([*[GOOD] * 97, *BAD[:3]])
    error, notes = error_of(path, chatml, bad_records="skip", max_bad=0.029)
    assert str(error).startswith(f"E-DATA {path}: 3 of 100 records are bad, more than --max-bad 0.029 allows: 2 x mess")
    assert len(notes) == 3
    samples = prepare([path], chatml, DataSpec(bad_records="skip", max_bad=0.03), on_incident=lambda incident: None)
    assert len(list(samples)) == 97


def test_a_record_that_the_template_refuses_can_be_skipped(kit: Any, write: Write, run: Run) -> None:
    tokenizer = kit.train()
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refusal + kit.template("chatml", marked=False)
    path = write([GOOD, {"system": "be brief", **GOOD}, GOOD])
    samples, incidents = run(path, tokenizer, bad_records="skip", max_bad=0.5)
    [incident] = [each for each in incidents if each.kind == "bad_record"]
    assert [sample.line for sample in samples] == [1, 3]
    assert "no system role" in incident.detail


def test_a_file_that_is_cut_is_not_skipped(chatml: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "q", "completion": "a"}, {"prompt": "q", ')
    error, _ = error_of(path, chatml, bad_records="skip", max_bad=1.0)
    assert "not JSON" in str(error)


def test_what_is_shown_is_bounded() -> None:
    bad = bad_records.BadRecords()
    for kind in "abcdefg":
        bad.add(DataError(kind * 300, where="x"))
    error = bad.too_many(7, 0.0, "x", lambda note: None)
    assert str(error).endswith(", 2 of 2 other kinds")
    assert len(str(error)) < 600
