"""Parts of a plan and growing, with records that are left out: nothing is lost, and what is said is so."""

import dataclasses
import json
from pathlib import Path

import pytest
from tests.chats import write_chats
from tests.stages.extracting import extract_small, files, small_spec
from tests.stages.ranks import Recorder

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.plan import plan_folder
from kdpipe.stages.extract import ExtractSpec

BAD = '{"prompt": "without an answer"}\n'


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ExtractSpec:
    """Twelve chats and three bad records among them, which are left out; beside them nine more chats and one."""
    folder = tmp_path_factory.mktemp("inputs")
    small = small_spec(folder)
    lines = small.data[0].read_text().splitlines(keepends=True)
    small.data[0].write_text("".join([BAD, *lines[:5], BAD, *lines[5:], BAD]))
    more = write_chats(folder / "more.jsonl", 9, seed=7, longest=60)
    more.write_text(BAD + more.read_text())
    data = small.data_spec.model_copy(update={"bad_records": "skip", "max_bad": 0.5})
    return dataclasses.replace(small, data_spec=data)


def left_out(cache: Path, generation: int = 0) -> list[tuple[str, int]]:
    """File and line of the bad records that a generation lists."""
    text = (plan_folder(cache, generation) / "runs" / "prepare.jsonl").read_text()
    listed = map(json.loads, text.splitlines())
    return [(Path(each["source"]).name, each["line"]) for each in listed if each["kind"] == "bad_record"]


def test_parts_leave_out_the_same_records_and_make_the_bytes_of_one_writer(spec: ExtractSpec, tmp_path: Path) -> None:
    extract_small(spec, tmp_path / "whole")
    for index in (2, 1, 3):
        extract_small(spec, tmp_path / "parts", part=(index, 3))
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    for name in ("parts", "whole"):
        assert left_out(tmp_path / name) == [("data.jsonl", line) for line in (1, 7, 15)]
        assert Cache.open(tmp_path / name).plan.counts["bad_record"] == 3


def test_a_cache_grows_by_data_with_bad_records_and_names_the_list_that_is_there(
    spec: ExtractSpec, tmp_path: Path
) -> None:
    """Defect: a list in grown/ was named where the cache did not grow."""
    cache, recorder = tmp_path / "cache", Recorder()
    extract_small(spec, cache)
    again = dataclasses.replace(spec, check_inputs=True)
    extract_small(again, cache, progress=recorder)
    assert [note for note in recorder.notes if "bad record" in note] == [
        "3 of 15 samples bad record: see runs/prepare.jsonl in the cache"
    ]
    more = dataclasses.replace(spec, data=(spec.data[0].with_name("more.jsonl"),), grow=True)
    extract_small(more, cache, part=(1, 2), progress=recorder)
    extract_small(more, cache, part=(2, 2))
    assert "1 of 10 samples bad record: see grown/000001/runs/prepare.jsonl in the cache" in recorder.notes
    assert left_out(cache, 1) == [("more.jsonl", 1)]
    assert len(left_out(cache)) == 3
    opened = Cache.open(cache)
    assert (opened.complete, len(opened), opened.plan.generation) == (True, 21, 1)
    extract_small(dataclasses.replace(again, data=(*spec.data, *more.data)), cache, progress=recorder)
    assert "4 of 25 samples bad record: see runs/prepare.jsonl and its like in grown/ in the cache" in recorder.notes
    assert Cache.open(cache).plan == opened.plan


def test_a_part_without_a_shard_does_not_say_that_all_are_there(spec: ExtractSpec, tmp_path: Path) -> None:
    cache, recorder = tmp_path / "cache", Recorder()
    extract_small(spec, cache, part=(1, 99), progress=recorder)
    total = len(Cache.open(cache).plan.shards)
    assert recorder.notes[-1] == (
        f"part 1 of 99 has none of the plan's shards ({total} in all, {total} missing): the others extract them"
    )
    extract_small(spec, cache, part=(2, 2))
    extract_small(spec, cache, part=(2, 2), progress=recorder)
    assert recorder.notes[-1].startswith(f"every shard of part 2 of 2 is there already ({total} in all, ")
    extract_small(spec, cache)
    extract_small(spec, cache, part=(1, 99), progress=recorder)
    assert recorder.notes[-1] == "every shard is there already"
