"""Aligned samples: joined to a cache's, made once, and refused where they would not be what they say."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import tokenizers
from tests.chats import write_chats
from tests.conftest import Bench
from tests.models import make_model
from tests.opened import student_in
from tests.stages.ranks import Recorder

from kdpipe.manifests.aligned import ALIGNED, SPANS_FILE
from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import ConfigError, DataError, InputError, StudentError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.align import Asked, Crossing, cross, joining
from kdpipe.stages.extract import ExtractSpec, extract
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.feed.packing import Packer
from kdpipe.stages.models.vocabularies import token_bytes

Copied = Callable[[], Path]


@pytest.fixture
def cache(far_bench: Bench, tmp_path: Path) -> Path:
    """A cache of its own: nothing is aligned with it yet."""
    return Path(shutil.copytree(far_bench.cache, tmp_path / "cache", ignore=shutil.ignore_patterns(ALIGNED)))


def raising_memory(*_: Any, **__: Any) -> Any:
    raise MemoryError


def test_a_lack_of_memory_is_not_the_fault_of_a_caches_tokenizer(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining.PreTrainedTokenizerFast, "from_pretrained", raising_memory)
    with pytest.raises(MemoryError):
        joining.cache_tokenizer(Cache.open(cache))


def crossing(bench: Bench, *caches: Path, progress: Any = None, **asked: Any) -> Crossing:
    opened = [Cache.open(path) for path in caches]
    asked = {"data": (bench.data,)} | asked
    found = cross(student_in(bench.student), of_caches(opened), opened, Asked(**asked), progress or Silent())
    assert found is not None
    return found


def test_samples_are_joined_to_the_rows_of_their_own_texts(far_bench: Bench, cache: Path) -> None:
    """Every span of a batch reads the same on both sides; the teacher's rows are those of the cache, bit for bit."""
    found, opened = crossing(far_bench, cache), Cache.open(cache)
    dataset, teacher = found.dataset, found.tokenizer
    assert len(dataset) == len(opened) == 60
    samples = np.array([5, 17, 40])
    batch = Packer(dataset).pack(samples)
    places = [int(found.aligned.spans.places[sample]) for sample in samples]
    rows = np.concatenate([opened.rows(place) for place in places])
    assert batch.teacher_rows[0].numpy().tobytes() == rows.tobytes()
    ((student_runs, teacher_runs, predicted),) = batch.aligned
    assert len(rows) == len(predicted)
    assert len(student_runs) > 60
    ours, theirs = token_bytes(student_in(far_bench.student).tokenizer), token_bytes(teacher)
    own, exact = batch.next_tokens.tolist(), 0
    for (first, count), (other, number) in zip(student_runs.tolist(), teacher_runs.tolist(), strict=True):
        texts = [
            b"".join(table[index] or b"<end>" for index in ids)
            for table, ids in (
                (ours, own[first : first + count]),
                (theirs, predicted[other : other + number].tolist()),
            )
        ]
        exact += count == number == 1
        assert texts[0].strip() == texts[1].strip()
    assert exact > 20
    padded = Packer(dataset, padded=True).pack(samples)
    assert all((one == another).all() for one, another in zip(batch.aligned[0], padded.aligned[0], strict=True))
    empty = Packer(dataset).empty()
    assert [len(each) for each in empty.aligned[0]] == [0, 0, 0]
    assert Packer(dataset.without_teachers()).pack(samples).aligned == ()


def test_it_is_made_once_and_again_where_it_is_damaged(far_bench: Bench, cache: Path) -> None:
    first, second, third = Recorder(), Recorder(), Recorder()
    made = crossing(far_bench, cache, progress=first)
    assert [task for task, _, _ in first.tasks] == ["align"]
    again = crossing(far_bench, cache, progress=second)
    assert (second.tasks, again.aligned.record) == ([], made.aligned.record)
    (folder,) = (cache / ALIGNED).iterdir()
    data = (folder / SPANS_FILE).read_bytes()
    (folder / SPANS_FILE).write_bytes(data[:900] + bytes([data[900] ^ 1]) + data[901:])
    mended = crossing(far_bench, cache, progress=third)
    assert any("made again" in note for note in third.notes)
    assert mended.aligned.record == made.aligned.record
    assert (folder / SPANS_FILE).read_bytes() == data
    crossing(far_bench, cache, spec=DataSpec(max_length=64))
    assert len(list((cache / ALIGNED).iterdir())) == 2, "another length, another folder"


def test_processes_make_what_one_makes(far_bench: Bench, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = crossing(far_bench, cache, workers=1).aligned.record
    shutil.rmtree(cache / ALIGNED)
    assert crossing(far_bench, cache, workers=2).aligned.record == one


def test_a_cache_that_cannot_be_written_to_is_aligned_elsewhere(
    far_bench: Bench, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def refused(self: Path, *args: Any, **kwargs: Any) -> None:
        if cache in self.parents:
            raise PermissionError(13, "Permission denied")
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refused)  # the tests run as root, whom no mode keeps out
    with pytest.raises(InputError, match="permission denied; choose another place"):
        crossing(far_bench, cache)
    recorder, places = Recorder(), (cache, tmp_path / "out")
    found = crossing(far_bench, cache, places=places, progress=recorder)
    assert found.aligned.folder.parent == tmp_path / "out" / ALIGNED
    assert any("cannot be written to" in note for note in recorder.notes)
    assert crossing(far_bench, cache, places=places).aligned.folder == found.aligned.folder


def test_what_only_one_has_is_counted_and_left_out(far_bench: Bench, cache: Path, tmp_path: Path) -> None:
    lines = far_bench.data.read_text().splitlines()
    others = write_chats(tmp_path / "others.jsonl", 7, seed=5).read_text().splitlines()
    some = tmp_path / "some.jsonl"
    some.write_text("\n".join([*lines[:50], *others, *lines[:3]]) + "\n")
    found = crossing(far_bench, cache, data=(some,))
    figures = found.aligned.record.figures
    assert (figures.num_samples, figures.not_in_cache, figures.not_in_data) == (53, 7, 10)
    assert any("7 samples of the data are not in the caches" in note for note in found.dataset.notes)
    assert any("10 samples of the caches are not in the data" in note for note in found.dataset.notes)
    places = found.aligned.spans.places.tolist()
    assert places[50:] == places[:3]
    none = tmp_path / "none.jsonl"
    none.write_text("\n".join(others) + "\n")
    with pytest.raises(
        DataError, match=r"none.jsonl: none of the 7 samples of these data is in .*; give the data that"
    ):
        crossing(far_bench, cache, data=(none,))
    assert len(list((cache / ALIGNED).iterdir())) == 1, "what failed leaves nothing"


def test_several_caches_of_one_teacher_are_one_row_of_samples(far_bench: Bench, cache: Path, tmp_path: Path) -> None:
    more = write_chats(tmp_path / "more.jsonl", 20, seed=3)
    spec = ExtractSpec(
        teacher=far_bench.teacher, data=(more,), data_spec=DataSpec(max_length=128, heldout_fraction=0.5)
    )
    extract(spec, tmp_path / "second", Silent())
    found = crossing(far_bench, cache, tmp_path / "second", data=(more, far_bench.data))
    assert len(found.dataset) == 80
    assert found.aligned.spans.places[:20].tolist() == list(range(60, 80))
    assert found.dataset.heldout_fraction == 0.5
    Packer(found.dataset).pack([0, 79])
    extract(
        ExtractSpec(teacher=far_bench.teacher, data=(more,), data_spec=DataSpec(max_length=100)),
        tmp_path / "shorter",
        Silent(),
    )
    with pytest.raises(InputError, match=r"extracted with max_length = 100, .* with 128; a student with another token"):
        crossing(far_bench, cache, tmp_path / "shorter")


def test_other_tokens_than_the_caches_are_refused(
    far_bench: Bench, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another version of kdpipe might make of the same record."""
    load = joining.cache_tokenizer

    def other(cache: Cache) -> Any:
        tokenizer = load(cache)
        tokenizer.chat_template = tokenizer.chat_template.replace("content'] }}<", "content'] }} <")
        return tokenizer

    monkeypatch.setattr("kdpipe.stages.align.aligned.cache_tokenizer", other)
    with pytest.raises(DataError, match=r"data.jsonl:1: the teacher's tokenizer and chat template make other tokens"):
        crossing(far_bench, cache)


def test_what_cannot_be_aligned_is_refused_by_its_key(far_bench: Bench, bench: Bench, cache: Path) -> None:
    assert cross(student_in(bench.student), of_caches([Cache.open(cache)]), [], Asked(), Silent()) is None
    with pytest.raises(StudentError, match=r"id 0 is .* to the student and .*; give the data that .* \(--data\)"):
        crossing(far_bench, cache, data=())
    with pytest.raises(
        ConfigError, match=r"student.align: its tokenizer is not the teacher's and student.align is none"
    ):
        crossing(far_bench, cache, align="none")
    with pytest.raises(ConfigError, match=r"student.align_floor: \d+\.\d% of the supervised bytes are aligned with"):
        crossing(far_bench, cache, floor=1.0, spec=DataSpec(max_length=60))
    assert crossing(far_bench, cache).method == "shared-vocab"
    assert crossing(far_bench, cache, align="uld").method == "uld"


def test_text_that_the_students_template_leaves_out_shows_in_the_figures(
    far_bench: Bench, cache: Path, tmp_path: Path
) -> None:
    """Its answers shout: no word of them is the teacher's."""
    shouting = make_model("llama", tmp_path / "student", vocab_size=560, sizes={"hidden_size": 32})
    template = tokenizers.CHAT.replace("message['content'] }}", "message['content'] | upper }}")
    tokenizers.save_chatting(tokenizers.unigram(540), shouting, template=template)
    bench = Bench(teacher=far_bench.teacher, student=shouting, data=far_bench.data, cache=cache)
    with pytest.raises(InputError):
        crossing(bench, cache, floor=0.5)


def test_digests_of_both_sides_are_in_the_record(far_bench: Bench, cache: Path) -> None:
    found = crossing(far_bench, cache)
    record = json.loads((found.aligned.folder / "align.json").read_text())
    plan = Cache.open(cache).plan
    assert record["caches"] == [plan.digest]
    assert found.aligned.folder.name == record["asked"][:16]
    assert record["teacher_template"] == plan.fingerprint.template
    assert record["student_tokenizer"] != record["teacher_tokenizer"]
    stop = student_in(far_bench.student).tokenizer.convert_tokens_to_ids("<|stop|>")
    assert record["ends"] == [[stop, found.tokenizer.convert_tokens_to_ids("<|im_end|>")]]
    figures = found.aligned.record.figures
    assert 0 < figures.exact_rows < figures.aligned_rows <= figures.num_rows
    assert 0.9 < figures.share_of_bytes <= 1.0
