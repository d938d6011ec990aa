"""What is written is for its owner alone unless a group is asked for; no text of the data is in a log or a message."""

import grp
import json
import os
from pathlib import Path

import pytest
from tests.conftest import Bench, Main

SECRET = "zebrafish"


def modes(folder: Path) -> set[tuple[bool, str]]:
    """(is a folder, mode in octal) of everything from `folder` down."""
    return {(path.is_dir(), f"{path.stat().st_mode & 0o7777:o}") for path in (folder, *folder.rglob("*"))}


@pytest.mark.parametrize("group", [False, True])
def test_files_are_private_unless_a_group_is_asked_for(group: bool, bench: Bench, main: Main, tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        name = grp.getgrgid(os.getgid()).gr_name
        asked = ["--group", name] if group else []
        cache, output = tmp_path / "cache", tmp_path / "out"
        data = ["--teacher", bench.teacher, "--data", bench.data, "--max-length", 128, "--heldout-fraction", 0.25]
        assert main("extract", *data, "--cache", cache, *asked)[0] == 0
        more = tmp_path / "more.jsonl"
        more.write_text(bench.data.read_text() + bench.data.read_text().splitlines()[0] + "\n")
        os.umask(0o022)
        grown = [*data[:2], "--data", more, *data[4:]]
        assert main("extract", *grown, "--cache", cache)[0] == 0  # whoever could read it can read what is added
        assert (cache / "grown").is_dir()
        os.umask(0o022)
        words = ["--student", bench.student, "--cache", cache, "--output", output, *asked]
        assert main("train", *words, "--set", "train.max_steps=1", "train.save_every=1")[0] == 0
        wanted = {(True, "2750"), (False, "640")} if group else {(True, "700"), (False, "600")}
        assert modes(cache) == wanted
        assert modes(output) == wanted
    finally:
        os.umask(umask)


def test_a_group_that_is_none_is_refused(bench: Bench, main: Main, tmp_path: Path) -> None:
    words = ["--teacher", bench.teacher, "--data", bench.data, "--cache", tmp_path / "c", "--group", "nobodyhere"]
    code, _, err = main("extract", *words)
    assert code == 4
    assert "no group 'nobodyhere'" in err
    assert not (tmp_path / "c").exists()


BAD_LINES = [
    f'{{"messages": [{{"role": "{SECRET} and its friends", "content": "{SECRET}"}}]}}',
    f'{{"messages": [{{"role": "user", "content": ["{SECRET}"]}}]}}',
    f'{{"messages": "{SECRET}"}}',
    f'{{"prompt": "{SECRET}", "completion": {{"{SECRET}": 1}}}}',
    f'{{"prompt": "{SECRET}"',
    f'"{SECRET}"',
]


def test_no_text_of_the_data_is_told(bench: Bench, main: Main, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{SECRET} {n}"}, {"role": "assistant", "content": SECRET * n}]}
        for n in range(40)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache, output, told = tmp_path / "cache", tmp_path / "out", []
    words = ["--teacher", bench.teacher, "--data", data, "--max-length", 64, "--heldout-fraction", 0.3]
    told += main("plan", *words)
    told += main("extract", *words, "--cache", cache)
    told += main(
        "train", "--student", bench.student, "--cache", cache, "--output", output, "--set", "train.max_steps=2"
    )
    told += main("eval", "--student", output, "--cache", cache)
    told += main("cache", "verify", cache)
    assert [code for code in told if isinstance(code, int)] == [0] * 5
    for number, line in enumerate(BAD_LINES):
        bad = tmp_path / f"bad{number}.jsonl"
        bad.write_text(json.dumps(rows[3]) + "\n" + line + "\n")
        code, *said = main("extract", *words[:2], "--data", bad, "--cache", tmp_path / f"c{number}")
        assert code == 4, line
        told += said
    logs = [path for folder in (cache, output) for path in folder.rglob("*") if path.suffix in {".json", ".jsonl"}]
    logs = [path for path in logs if "tokenizer" not in path.name]
    assert any(path.name == "prepare.jsonl" and path.stat().st_size for path in logs)
    assert any(path.name == "events.jsonl" for path in logs)
    for text in [*map(str, told), *(path.read_text() for path in logs)]:
        assert SECRET not in text
