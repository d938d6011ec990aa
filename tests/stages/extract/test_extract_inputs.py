"""Inputs that did not change are not read again; what did change is found, whatever its size and times say."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.chats import write_chats
from tests.stages.extracting import extract_small, files, small_spec

from kdpipe.manifests import durable, provenance
from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CacheError, CorruptError
from kdpipe.manifests.plan import SAMPLES_FILE
from kdpipe.manifests.progress import Silent
from kdpipe.stages.extract import ExtractSpec, inputs, reading
from kdpipe.stages.teacher.transformers_engine import TransformersEngine

Reads = list[str]


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def spec(tmp_path: Path) -> ExtractSpec:
    return small_spec(tmp_path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """What was read in full: "data" for each preparation of it, else the name of a file."""
    told: Reads = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            told.append(name or Path(args[0].name).name)
            return function(*args, **options)

        return call

    monkeypatch.setattr(reading, "prepare", counting("data", reading.prepare))
    monkeypatch.setattr(inputs, "digest_stream", counting("", provenance.digest_stream))
    return told


def test_every_part_of_a_plan_and_a_finished_cache_read_nothing_again(
    spec: ExtractSpec, tmp_path: Path, reads: Reads
) -> None:
    extract_small(spec, tmp_path / "whole")
    assert "data" in reads
    assert {"data.jsonl", "model.safetensors"} <= set(reads)
    extract_small(spec, tmp_path / "cache", part=(1, 2), moment=-1.0)
    reads.clear()
    extract_small(spec, tmp_path / "cache", part=(2, 2), moment=-1.0)
    extract_small(spec, tmp_path / "cache", moment=-1.0)
    assert reads == []
    assert files(tmp_path / "cache") == files(tmp_path / "whole"), "and the bytes are those of one pass"


def test_a_file_changed_a_moment_ago_is_read_but_the_data_is_not_tokenised(
    spec: ExtractSpec, tmp_path: Path, reads: Reads
) -> None:
    extract_small(spec, tmp_path / "cache", moment=3600.0)
    reads.clear()
    extract_small(spec, tmp_path / "cache", moment=3600.0)
    assert {"data.jsonl", "model.safetensors"} <= set(reads)
    assert "data" not in reads


def test_check_inputs_reads_everything(spec: ExtractSpec, tmp_path: Path, reads: Reads) -> None:
    extract_small(spec, tmp_path / "cache", moment=-1.0)
    reads.clear()
    extract_small(replace(spec, check_inputs=True), tmp_path / "cache", moment=-1.0)
    assert {"data", "data.jsonl", "model.safetensors"} <= set(reads)


def change(path: Path) -> None:
    """Another byte in the middle of a file; size and time of modification as they were."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_changed_teacher_is_refused_by_name(spec: ExtractSpec, tmp_path: Path) -> None:
    extract_small(spec, tmp_path / "cache", moment=-1.0)
    change(spec.teacher / "model.safetensors")
    with pytest.raises(CacheError, match=r"fingerprint\.teacher"):
        extract_small(spec, tmp_path / "cache", moment=-1.0)


def test_changed_data_is_refused_by_name_also_where_another_file_took_its_place(
    spec: ExtractSpec, tmp_path: Path
) -> None:
    extract_small(spec, tmp_path / "cache", moment=-1.0)
    shutil.copy2(spec.data[0], tmp_path / "other.jsonl")
    text = (tmp_path / "other.jsonl").read_text()
    (tmp_path / "other.jsonl").write_text(text.replace("teacher", "teachre"))
    shutil.copystat(spec.data[0], tmp_path / "other.jsonl")
    (tmp_path / "other.jsonl").replace(spec.data[0])
    with pytest.raises(CacheError, match=r"fingerprint\.data"):
        extract_small(spec, tmp_path / "cache", moment=-1.0)


def test_a_changed_tokenizer_or_template_is_refused_by_name(spec: ExtractSpec, tmp_path: Path) -> None:
    extract_small(spec, tmp_path / "cache", moment=-1.0)
    template = spec.teacher / "chat_template.jinja"
    template.write_text(template.read_text().replace("user", "User").replace("im_start|>{{", "im_start|> {{"))
    with pytest.raises(CacheError, match=r"fingerprint\.template"):
        extract_small(spec, tmp_path / "cache", moment=-1.0)


def test_what_decides_the_stop_tokens_is_an_input_too(spec: ExtractSpec, tmp_path: Path, reads: Reads) -> None:
    extract_small(spec, tmp_path / "cache", moment=-1.0)
    reads.clear()
    path = spec.teacher / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"top_p": 0.5}))
    extract_small(spec, tmp_path / "cache", moment=-1.0)
    assert "data" in reads


def test_data_that_a_cache_grew_by_is_not_all_of_it(spec: ExtractSpec, tmp_path: Path) -> None:
    extract_small(spec, tmp_path / "cache", moment=-1.0)
    more = replace(spec, data=(write_chats(tmp_path / "more.jsonl", 9, seed=7),))
    extract_small(replace(more, grow=True), tmp_path / "cache", moment=-1.0)
    with pytest.raises(CacheError, match="not in this data"):
        extract_small(more, tmp_path / "cache", moment=-1.0)


@pytest.mark.parametrize("content", [b"", b'{"asked": 7}', b"\x00" * 80])
def test_a_torn_side_car_costs_a_reading_and_nothing_else(
    content: bytes, spec: ExtractSpec, tmp_path: Path, reads: Reads
) -> None:
    extract_small(spec, tmp_path / "cache", moment=-1.0)
    (tmp_path / "cache" / "runs" / "inputs.json").write_bytes(content)
    reads.clear()
    extract_small(spec, tmp_path / "cache", moment=-1.0)
    assert "data" in reads
    reads.clear()
    extract_small(spec, tmp_path / "cache", moment=-1.0)
    assert reads == [], "it was written anew"


def test_damaged_samples_are_found_without_reading_the_data(spec: ExtractSpec, tmp_path: Path) -> None:
    extract_small(spec, tmp_path / "cache", moment=-1.0)
    change(tmp_path / "cache" / SAMPLES_FILE)
    with pytest.raises(CorruptError, match="says which sample is where"):
        extract_small(spec, tmp_path / "cache", moment=-1.0)


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "MOMENT_S", -1.0)
    (tmp_path / "runs").mkdir()
    data = tmp_path / "data"
    data.write_text("one")
    known = inputs.Inputs()
    known.digest(data)
    data.write_text("two")
    known.remember(tmp_path, "asked")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_finished_cache_on_a_read_only_disk_needs_no_more(
    spec: ExtractSpec, tmp_path: Path, tmpfs: Callable[[str], Path]
) -> None:
    disk = tmpfs("64m")
    extract_small(spec, disk / "cache", moment=-1.0)
    (disk / "cache" / "runs" / "inputs.json").unlink()
    assert os.system(f"mount -o remount,ro {disk}") == 0
    seen = Notes()
    extract_small(spec, disk / "cache", moment=-1.0, progress=seen)
    assert "every shard is there already" in seen.notes
    assert Cache.open(disk / "cache").complete


def test_what_an_engine_has_to_say_reaches_the_progress(
    spec: ExtractSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TransformersEngine.canary

    def canary(engine: TransformersEngine, *args: Any) -> Any:
        engine.notes.append("long samples run whole")
        return whole(engine, *args)

    monkeypatch.setattr(TransformersEngine, "canary", canary)
    seen = Notes()
    extract_small(spec, tmp_path / "cache", progress=seen)
    assert seen.notes.count("long samples run whole") == 1
