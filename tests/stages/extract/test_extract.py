"""Extraction: rows are the teacher's own bit for bit, made once; what does not fit is refused and leaves nothing."""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tests.caches import verified
from tests.chats import write_chats
from tests.conftest import Bench
from tests.models import KINDS, make_model, make_tokenizer
from transformers import PreTrainedTokenizerBase

from kdpipe.manifests import durable
from kdpipe.manifests.cache import HEAD_FILE, Cache
from kdpipe.manifests.durable import hold
from kdpipe.manifests.errors import (
    CacheError,
    ConfigError,
    CorruptError,
    DataError,
    IncompleteError,
    KdpipeError,
    LayoutError,
    SpaceError,
    TeacherError,
)
from kdpipe.manifests.plan import PLAN_FILE, read_plan
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.sample import row_positions
from kdpipe.manifests.shard import shard_path
from kdpipe.manifests.specs import DataSpec, Dtype
from kdpipe.manifests.verify import repair
from kdpipe.stages.extract import ExtractSpec, extract, forecast, planning, staging
from kdpipe.stages.models.formula import logit_formula
from kdpipe.stages.rows import as_tensor


def spec_for(folder: Path, teacher: Path, **changes: object) -> ExtractSpec:
    data = folder / "data.jsonl"
    if not data.exists():
        write_chats(data, 12, longest=60)
    spec = ExtractSpec(
        teacher=teacher, data=(data,), data_spec=DataSpec(max_length=200, heldout_fraction=0.2), device="cpu"
    )
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


def teacher_at(folder: Path, kind: str = "qwen3", *, dtype: Dtype = "float32", seed: int = 0) -> Path:
    return make_tokenizer(make_model(kind, folder, dtype=dtype, vocab_size=304, seed=seed))


def files(folder: Path) -> dict[str, bytes]:
    """Everything a cache is made of, without the logs of runs."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "runs"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_cache_read_back_is_transformers_own_hidden_state_bit_for_bit(kind: str, tmp_path: Path) -> None:
    teacher = teacher_at(tmp_path / "teacher", kind)
    cache = extract(spec_for(tmp_path, teacher), tmp_path / "cache", Silent())
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    head, formula = cache.head(), logit_formula(model.config)
    for view in cache:
        ids = torch.tensor(view.token_ids, dtype=torch.int64)[None]
        at = torch.from_numpy(row_positions(view.supervised))
        with torch.no_grad():
            hidden = model.base_model(ids).last_hidden_state[0]
            logits = model(ids).logits[0, at].double()
        assert np.array_equal(view.rows, hidden[at].numpy())
        ours = view.rows.astype(np.float64) @ head.weight.astype(np.float64).T
        ours = (ours + (0.0 if head.bias is None else head.bias)) * formula.scale
        if formula.softcap is not None:
            ours = formula.softcap * np.tanh(ours / formula.softcap)
        # Of float32 against float64: a few units in the last place of sums of 48 products.
        assert (torch.from_numpy(ours) - logits).abs().max() <= 2e-6 * logits.abs().max()


def test_bfloat16_rows_are_transformers_own_and_zero_copy(tmp_path: Path) -> None:
    teacher = teacher_at(tmp_path / "teacher", dtype="bfloat16")
    cache = extract(spec_for(tmp_path, teacher), tmp_path / "cache", Silent())
    assert cache.plan.settings.dtype == "bfloat16"
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16)
    for view in cache:
        with torch.no_grad():
            hidden = model.base_model(torch.tensor(view.token_ids, dtype=torch.int64)[None]).last_hidden_state[0]
        ours = as_tensor(np.array(view.rows))
        assert torch.equal(ours, hidden[torch.from_numpy(row_positions(view.supervised))])
        assert not view.rows.flags.owndata


def test_padded_batches_give_the_same_rows_to_rounding(tmp_path: Path) -> None:
    teacher = teacher_at(tmp_path / "teacher")
    alone = extract(spec_for(tmp_path, teacher), tmp_path / "alone", Silent())
    batched = extract(spec_for(tmp_path, teacher, batch_tokens=400), tmp_path / "batched", Silent())
    assert batched.samples.shard(0).column("batch").to_numpy().max() < len(batched) - 1
    for one, other in zip(alone, batched, strict=True):
        assert np.abs(one.rows - other.rows).max() <= 1e-5 * np.abs(one.rows).max()


def test_every_row_on_request_reads_back_as_the_supervised_ones(tmp_path: Path) -> None:
    teacher = teacher_at(tmp_path / "teacher")
    few = extract(spec_for(tmp_path, teacher), tmp_path / "few", Silent())
    every = extract(spec_for(tmp_path, teacher, rows="all"), tmp_path / "every", Silent())
    assert every.plan.num_rows == every.plan.num_tokens - len(every) > few.plan.num_rows
    for one, other in zip(few, every, strict=True):
        assert np.array_equal(one.rows, other.rows)


def test_forecast_is_what_extraction_makes(tmp_path: Path) -> None:
    spec = spec_for(tmp_path, teacher_at(tmp_path / "teacher"))
    said = forecast(spec, Silent())
    made = extract(spec, tmp_path / "cache", Silent()).info()
    for field in (
        "num_samples",
        "num_tokens",
        "num_rows",
        "hidden_size",
        "vocab_size",
        "dtype",
        "num_heldout",
        "counts",
    ):
        assert getattr(said, field) == made[field], field
    shards = sum(path.stat().st_size for path in (tmp_path / "cache" / "shards").iterdir())
    samples = (tmp_path / "cache" / "samples.arrow").stat().st_size
    assert said.bytes_per_codec["raw"] == pytest.approx(shards + samples, rel=0.1, abs=16384)


def test_extracting_again_changes_no_byte_and_fills_what_is_missing(tmp_path: Path) -> None:
    spec = spec_for(tmp_path, teacher_at(tmp_path / "teacher"), shard_tokens=150)
    first = extract(spec, tmp_path / "cache", Silent())
    assert len(first.plan.shards) > 3
    before = files(tmp_path / "cache")
    extract(spec, tmp_path / "cache", Silent())
    assert files(tmp_path / "cache") == before
    # As a kill between link and commit record leaves it, and a kill before the link.
    (tmp_path / "cache" / "commits" / "000001.json").unlink()
    (tmp_path / "cache" / "commits" / "000002.json").unlink()
    shard_path(tmp_path / "cache", 2).unlink()
    extract(spec, tmp_path / "cache", Silent())
    assert files(tmp_path / "cache") == before


@pytest.mark.parametrize("lost", [("tokenizer.json",), ("head.json", HEAD_FILE), ("",)])
def test_files_of_the_teachers_that_are_lost_are_made_again(lost: tuple[str, ...], tmp_path: Path) -> None:
    spec = spec_for(tmp_path, teacher_at(tmp_path / "teacher"))
    cache = tmp_path / "cache"
    extract(spec, cache, Silent())
    whole = files(cache)
    assert set(read_plan(cache).teacher_files) == {
        name.removeprefix("teacher/") for name in whole if name.startswith("teacher/")
    }
    for name in lost:
        (shutil.rmtree if name == "" else os.unlink)(cache / "teacher" / name)
    with pytest.raises(IncompleteError):
        verified(cache, "quick")
    extract(spec, cache, Silent())
    assert files(cache) == whole
    assert verified(cache, "deep")


def test_a_lost_file_that_comes_out_otherwise_is_not_put_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_for(tmp_path, teacher_at(tmp_path / "teacher"))
    cache = tmp_path / "cache"
    extract(spec, cache, Silent())
    (cache / "teacher" / "tokenizer_config.json").unlink()
    own = staging.save_tokenizer

    def of_another_version(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        own(tokenizer, folder)
        (folder / "tokenizer_config.json").write_text("{}")

    monkeypatch.setattr(staging, "save_tokenizer", of_another_version)
    with pytest.raises(CorruptError, match="put it back from a copy"):
        extract(spec, cache, Silent())
    assert not (cache / "teacher" / "tokenizer_config.json").exists()


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_committed_shard_that_is_not_there_is_told_and_repaired(damage: str, tmp_path: Path) -> None:
    spec, cache = spec_for(tmp_path, teacher_at(tmp_path / "teacher")), tmp_path / "cache"
    extract(spec, cache, Silent())
    whole, path = files(cache), shard_path(cache, 0)
    path.unlink()
    if damage == "cut":
        path.write_bytes(whole["shards/000000.safetensors"][:-1])
    with pytest.raises(CorruptError, match="kdpipe cache repair") as caught:
        extract(spec, cache, Silent())
    assert caught.value.where == str(path)
    assert len(repair(Cache.open(cache))) == 1
    extract(spec, cache, Silent())
    assert {name: data for name, data in files(cache).items() if not name.startswith("quarantine")} == whole


def test_a_cache_whose_plan_is_lost_is_not_called_something_else(tmp_path: Path) -> None:
    spec, cache = spec_for(tmp_path, teacher_at(tmp_path / "teacher")), tmp_path / "cache"
    extract(spec, cache, Silent())
    (cache / "PLAN.json").unlink()
    with pytest.raises(LayoutError, match="put it back from a copy"):
        extract(spec, cache, Silent())


def test_the_folder_one_is_in_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CacheError, match="the folder you are in"):
        extract(spec_for(tmp_path, teacher_at(tmp_path / "teacher")), Path(), Silent())


def test_names_like_those_of_work_in_progress_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "MOMENT_S", -1.0)
    for name in (".cache.plan.notes", ".cache.plan.12-abc", "xcache.plan.12-0123456789ab"):
        (tmp_path / name).write_text("a note")
    extract(spec_for(tmp_path, teacher_at(tmp_path / "teacher")), tmp_path / "cache", Silent())
    assert len(list(tmp_path.glob("*cache.plan*"))) == 3


def test_work_in_progress_behind_a_link_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "MOMENT_S", -1.0)
    spec = spec_for(tmp_path, teacher_at(tmp_path / "teacher"))
    extract(spec, tmp_path / "cache", Silent())
    (tmp_path / "cache" / "tmp").rename(tmp_path / "home")
    (tmp_path / "home" / "precious").write_text("a note")
    os.utime(tmp_path / "home" / "precious", (0, 0))
    (tmp_path / "cache" / "tmp").symlink_to(tmp_path / "home")
    with pytest.raises(LayoutError, match="is a link"):
        extract(spec, tmp_path / "cache", Silent())
    assert (tmp_path / "home" / "precious").exists()


def test_the_same_data_from_another_place_is_the_same_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_for(tmp_path, teacher_at(tmp_path / "teacher"))
    extract(spec, tmp_path / "cache", Silent())
    before = files(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    extract(dataclasses.replace(spec, data=(Path("data.jsonl"),)), Path("cache"), Silent())
    assert files(tmp_path / "cache") == before


def test_what_a_killed_run_left_is_swept_and_what_a_living_one_holds_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_for(tmp_path, teacher_at(tmp_path / "teacher"))
    extract(spec, tmp_path / "cache", Silent())
    scratch = tmp_path / "cache" / "tmp"
    (scratch / "000000.safetensors.4711-0123456789ab").write_bytes(b"half a shard")
    (tmp_path / ".cache.plan.4711-0123456789ab").mkdir()
    monkeypatch.setattr(durable, "MOMENT_S", 0.0)
    with open(scratch / "000001.safetensors.4712-0123456789ab", "wb") as living:
        hold(living.fileno())
        extract(spec, tmp_path / "cache", Silent())
        assert [path.name for path in scratch.iterdir()] == ["000001.safetensors.4712-0123456789ab"]
    assert not list(tmp_path.glob(".cache.plan.*"))
    extract(spec, tmp_path / "cache", Silent())
    assert not list(scratch.iterdir())


def test_the_size_of_shards_is_what_was_asked_for_and_changes_no_row(tmp_path: Path) -> None:
    teacher = teacher_at(tmp_path / "teacher")
    usual = extract(spec_for(tmp_path, teacher), tmp_path / "usual", Silent())
    small = extract(spec_for(tmp_path, teacher, shard_tokens=100), tmp_path / "small", Silent())
    assert (len(usual.plan.shards), usual.plan.settings.shard_tokens, small.plan.settings.shard_tokens) == (
        1,
        65536,
        100,
    )
    lengths = [len(view.token_ids) for view in usual]
    for shard, following in itertools.pairwise(small.plan.shards):
        assert shard.num_tokens <= 100 or shard.num_samples == 1
        assert shard.num_tokens + lengths[following.first_sample] > 100
    assert all(a.rows.tobytes() == b.rows.tobytes() for a, b in zip(usual, small, strict=True))
    assert forecast(spec_for(tmp_path, teacher, shard_tokens=100), Silent()).num_shards > 1
    assert small.plan.fingerprint == usual.plan.fingerprint


@pytest.mark.parametrize("size", [0, -5, (1 << 30) + 1])
def test_a_size_that_no_shard_can_have_is_refused(size: int, tmp_path: Path) -> None:
    spec = spec_for(tmp_path, teacher_at(tmp_path / "teacher"), shard_tokens=size)
    with pytest.raises(ConfigError, match=f"a shard of {size:,} tokens, expected 1 to"):
        extract(spec, tmp_path / "cache", Silent())
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "run", [lambda spec, cache: extract(spec, cache, Silent()), lambda spec, _: forecast(spec, Silent())]
)
def test_a_misspelt_codec_is_refused_with_the_nearest(
    run: Callable[[ExtractSpec, Path], object], tmp_path: Path
) -> None:
    spec = spec_for(tmp_path, teacher_at(tmp_path / "teacher"), codec="rwa")
    with pytest.raises(ConfigError, match=r"there is no codec 'rwa' here.*'raw'.*known: fisher, int8, raw") as caught:
        run(spec, tmp_path / "cache")
    assert caught.value.where == "--codec"


def test_a_staged_plan_has_the_digest_of_its_file(tmp_path: Path) -> None:
    """Another writer may have put the same plan in place by now: its shards are known by that digest."""
    spec = spec_for(tmp_path, teacher_at(tmp_path / "teacher"))
    with staging.staged(spec, tmp_path / "cache", Silent()) as found:
        assert found.folder is not None
        digest = hashlib.sha256((found.folder / PLAN_FILE).read_bytes()).hexdigest()
        assert found.plan.digest == found.plan.digest_in(0) == digest


def test_refused_extraction_leaves_no_parent_folders(tmp_path: Path) -> None:
    spec = spec_for(tmp_path, teacher_at(tmp_path / "teacher"), data=(tmp_path / "absent.jsonl",))
    with pytest.raises(DataError):
        extract(spec, tmp_path / "a" / "b" / "cache", Silent())
    assert not (tmp_path / "a").exists()


def test_parts_make_the_same_cache_as_one_run(tmp_path: Path) -> None:
    spec = spec_for(tmp_path, teacher_at(tmp_path / "teacher"), shard_tokens=150)
    extract(spec, tmp_path / "whole", Silent())
    part = extract(spec, tmp_path / "parts", Silent(), part=(2, 2))
    with pytest.raises(IncompleteError):
        part.require_complete()
    extract(spec, tmp_path / "parts", Silent(), part=(1, 2)).require_complete()
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("teacher", "fingerprint.teacher"),
        ("tokenizer", "fingerprint.tokenizer"),
        ("template", "fingerprint.template"),
        ("max_length", "settings.max_length"),
        ("heldout", "heldout_fraction"),
        ("shard_tokens", "settings.shard_tokens"),
    ],
)
def test_cache_of_something_else_is_refused_naming_field_and_both_values(
    change: str, field: str, tmp_path: Path
) -> None:
    teacher = teacher_at(tmp_path / "teacher")
    spec = spec_for(tmp_path, teacher)
    made = extract(spec, tmp_path / "cache", Silent()).plan
    before = files(tmp_path / "cache")
    if change == "teacher":
        teacher_at(teacher, seed=5)
    elif change == "tokenizer":
        make_tokenizer(teacher, vocab_size=290)
    elif change == "template":
        config = json.loads((teacher / "tokenizer_config.json").read_text())
        template = teacher / "chat_template.jinja"
        text = template.read_text() if template.exists() else config["chat_template"]
        template.write_text(text.replace("<|im_start|>{{", "<|im_start|> {{"))
    elif change == "shard_tokens":
        spec = dataclasses.replace(spec, shard_tokens=65535)
    elif change == "max_length":
        spec = dataclasses.replace(spec, data_spec=DataSpec(max_length=100, heldout_fraction=0.2))
    else:
        spec = dataclasses.replace(spec, data_spec=DataSpec(max_length=200, heldout_fraction=0.3))
    with pytest.raises(CacheError) as caught:
        extract(spec, tmp_path / "cache", Silent())
    value: object = made
    for name in field.split("."):
        value = getattr(value, name)
    assert field in str(caught.value)
    assert str(value) in str(caught.value)
    assert files(tmp_path / "cache") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data.jsonl", "teacher"]


def broken_teacher(folder: Path, how: str) -> Path:
    teacher = teacher_at(folder)
    if how == "no weights":
        (teacher / "model.safetensors").unlink()
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(teacher)
        model.model.norm.weight.data[3] = float("nan")
        model.save_pretrained(teacher)
    return teacher


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("no weights", TeacherError),
        ("nan", TeacherError),
        ("no data", DataError),
        ("nothing supervised", DataError),
        ("no template", DataError),
        ("full disk", SpaceError),
        ("not a cache", CacheError),
    ],
)
def test_refused_extraction_leaves_nothing_behind(
    case: str, error: type[KdpipeError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = case in {"no weights", "nan"}
    teacher = broken_teacher(tmp_path / "teacher", case) if broken else teacher_at(tmp_path / "teacher")
    spec = spec_for(tmp_path, teacher)
    target = tmp_path / "cache"
    if case == "no data":
        spec = dataclasses.replace(spec, data=(tmp_path / "absent.jsonl",))
    elif case == "nothing supervised":
        message = {"role": "assistant", "content": ""}
        spec.data[0].write_text(json.dumps({"messages": [{"role": "user", "content": "?"}, message]}) + "\n")
    elif case == "no template":
        (teacher / "chat_template.jinja").unlink()
    elif case == "full disk":
        usage = planning.os.statvfs(tmp_path)
        full = type("Full", (), {"f_bavail": 1, "f_frsize": usage.f_frsize})
        monkeypatch.setattr(planning.os, "statvfs", lambda _: full)
    elif case == "not a cache":
        shutil.copytree(teacher, target)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error) as caught:
        extract(spec, target, Silent())
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_sample_longer_than_the_teacher_takes_is_named_before_anything_runs(tmp_path: Path) -> None:
    sizes = {"max_position_embeddings": 30}
    teacher = make_tokenizer(make_model("llama", tmp_path / "teacher", vocab_size=304, sizes=sizes))
    spec = spec_for(tmp_path, teacher)
    for run in (lambda: extract(spec, tmp_path / "cache", Silent()), lambda: forecast(spec, Silent())):
        with pytest.raises(DataError, match=r"data.jsonl:\d+: \d+ tokens, the teacher takes 30 .* --max-length 30"):
            run()
    cut = dataclasses.replace(spec, data_spec=DataSpec(max_length=30))
    assert max(len(sample.token_ids) for sample in extract(cut, tmp_path / "cache", Silent())) == 30


def test_rows_that_turn_nan_later_stop_before_their_shard_is_committed(bench: Bench, tmp_path: Path) -> None:
    """The canary sees the first samples only; an id whose embedding is NaN comes later."""
    teacher = teacher_at(tmp_path / "teacher")
    data = tmp_path / "data.jsonl"
    write_chats(data, 8)
    with open(data, "a") as file:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Q~Q"}]
        file.write(json.dumps({"messages": messages}) + "\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    model.get_input_embeddings().weight.data[tokenizer("~")["input_ids"][0]] = float("nan")
    model.save_pretrained(teacher)
    with pytest.raises(TeacherError, match=r"sample 8: row \d+ .* not finite"):
        extract(spec_for(tmp_path, teacher), tmp_path / "cache", Silent())
    assert not list((tmp_path / "cache" / "shards").iterdir())
    assert not list((tmp_path / "cache" / "commits").iterdir())
    assert not list((tmp_path / "cache" / "tmp").iterdir())
