"""The command a cache was made with: kept for people, named where it has to be run again."""

import json
from pathlib import Path

import pytest
from tests.caches import make_cache, make_plan, make_samples

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import IncompleteError
from kdpipe.manifests.made_with import RUNS, extract_again, last_extraction, made_with

ARGV = ("kdpipe", "extract", "--teacher", "big model", "--data", "a.jsonl", "--cache", "cache")


def log(cache: Path, name: str, argv: tuple[str, ...], *, command: str = "extract") -> None:
    (cache / RUNS).mkdir(exist_ok=True)
    made = made_with(argv, teacher=Path("big model"), data=(Path("a.jsonl"),), cache=cache)
    event = {"kind": "run", "command": command, "made_with": made.model_dump()}
    (cache / RUNS / name).write_text(json.dumps(event) + "\n" + '{"kind": "finished"}\n')


def test_the_last_extraction_of_a_cache_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    make_cache(cache)
    assert last_extraction(cache) is None
    assert extract_again(cache) == "run the same kdpipe extract again"
    log(cache, "20260102T000000Z-7.jsonl", ARGV)
    log(cache, "20260101T000000Z-9.jsonl", (*ARGV, "--older"))
    log(cache, "20260103T000000Z-9.jsonl", (*ARGV, "--other"), command="train")
    log(cache, "prepare.jsonl", (*ARGV, "--nothing"))
    (cache / RUNS / "20260104T000000Z-9.jsonl").write_text('{"kind": "ru')
    (cache / RUNS / "20260105T000000Z-9.jsonl").symlink_to("prepare.jsonl")
    assert extract_again(cache) == "run again: kdpipe extract --teacher 'big model' --data a.jsonl --cache cache"
    info = Cache.open(cache).info()["made_with"]
    assert isinstance(info, dict)
    assert (info["folder"], info["teacher"]) == (str(tmp_path), (str(tmp_path / "big model"),))


def test_from_another_folder_the_command_goes_there_first_and_names_the_cache_where_it_lies_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_cache(tmp_path / "cache")
    log(tmp_path / "cache", "20260102T000000Z-7.jsonl", ARGV)
    (tmp_path / "cache").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    wanted = f"cd {tmp_path} && kdpipe extract --teacher 'big model' --data a.jsonl --cache {tmp_path / 'moved'}"
    assert extract_again(tmp_path / "moved") == f"run again: {wanted}"


@pytest.mark.parametrize("part", [("--part", "1/4"), ("--part=1/4",)])
def test_the_share_of_one_writer_is_left_out(tmp_path: Path, part: tuple[str, ...]) -> None:
    make_cache(tmp_path)
    log(tmp_path, "20260102T000000Z-7.jsonl", (*ARGV[:2], *part, *ARGV[2:]))
    assert "1/4" not in extract_again(tmp_path)


def test_an_unfinished_cache_says_with_which_command_it_is_finished(tmp_path: Path) -> None:
    make_plan(tmp_path, make_samples(5, seed=0, vocab_size=97))
    log(tmp_path, "20260102T000000Z-7.jsonl", ARGV)
    with pytest.raises(IncompleteError, match=r"shards are extracted; run again: kdpipe extract --teacher 'big model'"):
        Cache.open(tmp_path).require_complete()
