"""A codec in the teacher's head: the logits of decoded rows, no further off than rounding, or else not folded."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.caches import fill_shard, fit_codec, make_cache, make_plan, make_samples
from tests.models import make_model
from tests.stages.codec.rows import HEADS, drawn

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import StudentError
from kdpipe.manifests.fisher import Fisher
from kdpipe.manifests.fitted import Choice, Fitted
from kdpipe.manifests.row_source import SOME_SAMPLES, CacheRows
from kdpipe.stages.codec.fit import fit
from kdpipe.stages.feed.dataset import Teacher, of_caches
from kdpipe.stages.feed.decoding import FisherDecoder, stored_rows
from kdpipe.stages.feed.packing import Packer
from kdpipe.stages.loss import Side
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.ranks import Ranks, joined
from kdpipe.stages.student import TeacherHead, exam_text, load_sharded, load_teacher_head, load_teacher_heads
from kdpipe.stages.student.folding import folded, is_exact_enough, lost

CPU = torch.device("cpu")
FIT = 4000
"""Rows of those drawn that a codec is fitted to."""


class Stored:
    """Rows that a cache could have."""

    def __init__(self, fitted: Fitted, rows: np.ndarray) -> None:
        self.fitted, self._rows = fitted, rows

    def some_parts(self) -> list[dict[str, np.ndarray]]:
        return [self.fitted.codec.encode(self._rows)]


def heads(kl: float, *, dtype: str, **of_head: Any) -> tuple[TeacherHead, TeacherHead, Teacher, np.ndarray]:
    """A head beside the same with the codec folded in, their teacher, and rows that nothing was fitted to."""
    some = drawn(dtype=dtype, **of_head)
    fitted = fit(
        Choice("fisher", kl=kl), some.rows[:FIT], some.head, vocab_size=some.vocab_size, head_digest="", device=CPU
    )
    codec, rows = fitted.codec, some.rows[FIT : FIT + 256]
    assert isinstance(codec, Fisher)
    decoder = FisherDecoder(codec, getattr(torch, dtype), CPU)
    plain = TeacherHead(head=some.head, vocab_size=some.vocab_size, decoder=decoder)
    teacher = dataclasses.replace(NOBODY, rows=Stored(fitted, rows))  # type: ignore[type-var]
    return plain, folded(plain, codec, CPU), teacher, rows


@dataclasses.dataclass(frozen=True)
class Nobody:
    """As much of a Teacher as a comparison looks at."""

    rows: Any = None
    fitted = property(lambda self: self.rows.fitted)
    codec = property(lambda self: self.rows.fitted.codec)


NOBODY: Any = Nobody()


@pytest.mark.parametrize("kl", [1e-2, 1e-5])
@pytest.mark.parametrize("kind", HEADS)
def test_logits_of_a_folded_head_are_those_of_decoded_rows(kind: str, kl: float) -> None:
    plain, other, teacher, rows = heads(kl, dtype="float32", **HEADS[kind])
    assert teacher.codec is not None
    rows = rows.copy()
    rows[::50] = 30.0  # stored as they are
    stored = stored_rows(teacher.codec, [teacher.codec.encode(rows)])
    assert len(stored["whole_row"]) == 6
    exact, found = plain.side(stored, stored["row"]), other.side(stored, stored["row"])
    wanted, got = (side.dense(plain.vocab_size) for side in (exact, found))
    uncapped = dataclasses.replace(exact.head, softcap=None)
    size = Side(exact.hidden, uncapped).dense(plain.vocab_size).abs().amax(1, keepdim=True)
    assert ((wanted - got).abs() <= 1e-6 * (5 + 2 * size)).all()
    assert torch.equal(found.head.bias, other.side(stored, stored["row"]).head.bias), "a bias was added to"  # type: ignore[arg-type]


@pytest.mark.parametrize("kl", [1e-2, 1e-5])
def test_steps_are_whole_numbers_that_every_dtype_has(kl: float) -> None:
    _, other, teacher, rows = heads(kl, dtype="float32")
    assert teacher.codec is not None
    assert other.decoder is not None
    columns = other.decoder.rows(stored_rows(teacher.codec, [teacher.codec.encode(rows)]))
    more = columns.shape[1] - rows.shape[1]
    assert columns.shape[1] % 8 == 0
    assert more >= (8 if kl < 1e-4 else 3)
    within = columns.abs() <= 256
    assert within.float().mean() > 0.999  # the others are exceptions
    assert torch.equal(columns[within].bfloat16().float(), columns[within])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_loss_in_bfloat16_is_nearer_to_exact_rows_than_by_rounding_them(dtype: str) -> None:
    plain, other, teacher, _ = heads(1e-2, dtype=dtype, bias=True)
    (_, rounded), (_, found) = lost((plain, other), teacher)
    assert 0 < found < 0.7 * rounded
    assert is_exact_enough(other, plain, teacher)


def test_where_weights_lose_more_by_rounding_than_the_codec_nothing_is_folded() -> None:
    plain, other, teacher, _ = heads(1e-5, dtype="bfloat16")
    (wide, _), (found, _) = lost((plain, other), teacher)
    assert found > 2 * wide
    assert not is_exact_enough(other, plain, teacher)


def test_steps_of_a_row_beyond_what_float16_has_are_numbers_still() -> None:
    _, other, teacher, rows = heads(1e-5, dtype="float16")
    assert teacher.codec is not None
    rows = rows.copy()
    rows[0] = 300.0
    stored = stored_rows(teacher.codec, [teacher.codec.encode(rows)])
    side = other.side(stored, stored["row"])
    assert side.hidden.dtype == torch.float16
    assert side.dense(other.vocab_size).isfinite().all()


def coded(folder: Path, codec: str = "fisher kl=0.01") -> Cache:
    return make_cache(folder, samples=make_samples(41), codec=codec, vocab_size=97)


def test_a_cache_of_a_codec_folds_it_and_others_do_not(tmp_path: Path) -> None:
    found = [
        [head.rows_are for head in load_teacher_heads(of_caches([cache]).teachers, CPU)]
        for cache in (coded(tmp_path / "a"), coded(tmp_path / "b", "int8"), make_cache(tmp_path / "c"))
    ]
    assert found == [["folded"], ["decoded"], ["rows"]]
    teachers = of_caches([Cache.open(tmp_path / "a")]).teachers
    assert [head.rows_are for head in load_teacher_heads(teachers, CPU, as_rows=True)] == ["decoded"]


class Doubted(Ranks):
    """Of which another one finds a folded head worse."""

    def largest(self, values: Any) -> list[float]:
        return [1.0 for _ in values]


def test_what_one_rank_finds_worse_no_rank_folds(tmp_path: Path) -> None:
    teachers = of_caches([coded(tmp_path / "c")]).teachers
    (head,) = load_teacher_heads(teachers, CPU, ranks=Doubted(rank=0, world_size=2, device=CPU))
    assert head.rows_are == "decoded"


def test_a_cache_is_looked_at_all_over_and_always_at_the_same_rows(tmp_path: Path) -> None:
    make_plan(tmp_path / "c", make_samples(41))
    fit_codec(tmp_path / "c", "fisher kl=0.01")
    cache = Cache.open(tmp_path / "c")
    for number in range(len(cache.plan.shards)):
        fill_shard(cache.path, number)
    source = CacheRows([cache])
    found = source.some_parts()
    assert len(found) == SOME_SAMPLES
    codec, sizes = cache_codec(source), []
    for sample, parts in zip(np.arange(SOME_SAMPLES) * 41 // SOME_SAMPLES, found, strict=True):
        out = np.empty((len(parts["packed"]), 19), cache.rows(0).dtype)
        codec.decode(parts, out)
        rows, places = cache.rows(int(sample)), np.arange(len(out)) * len(cache.rows(int(sample))) // max(len(out), 1)
        # Numbers are summed in another order where there are fewer rows.
        assert np.allclose(out.astype(np.float32), rows[places].astype(np.float32), rtol=1e-2, atol=1e-2)
        sizes.append((len(rows), len(out)))
    assert {kept for all_of, kept in sizes if all_of >= 8} == {8}
    assert {all_of - kept for all_of, kept in sizes if all_of < 8} == {0}
    assert all(
        np.array_equal(one[name], two[name])
        for one, two in zip(found, CacheRows([cache]).some_parts(), strict=True)
        for name in one
    )


def cache_codec(source: CacheRows) -> Fisher:
    assert source.fitted is not None
    assert isinstance(source.fitted.codec, Fisher)
    return source.fitted.codec


SIDES: list[Side] = []


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Seen(TeacherHead):
    """One that remembers the halves of a loss that it was asked for."""

    def side(self, rows: Any, tokens: torch.Tensor) -> Side:
        SIDES.append(TeacherHead.side(self, rows, tokens))
        return SIDES[-1]


def test_a_sharded_student_is_given_the_bias_as_it_is_and_the_rest_in_its_own_dtype(tmp_path: Path) -> None:
    dataset = of_caches([coded(tmp_path / "c")])
    (head,) = load_teacher_heads(dataset.teachers, CPU)
    folder = ModelFolder(make_model("llama", tmp_path / "student", vocab_size=97), StudentError)
    batch = Packer(dataset).pack(np.arange(9))
    SIDES.clear()
    with joined(CPU) as ranks:
        student = load_sharded(folder, ranks, stored=torch.float32, computed=torch.float32).eval()
        student.examine(exam_text(dataset, np.arange(9), student.model.config), folder.path)
        seen = Seen(**{field.name: getattr(head, field.name) for field in dataclasses.fields(head)})
        student.measure(batch, [seen])
        half = load_sharded(folder, ranks, stored=torch.float32, computed=torch.bfloat16).eval()
        half.examine(exam_text(dataset, np.arange(9), half.model.config), folder.path)
        half.measure(batch, [seen])
    own = head.side(batch.teacher_rows[0], batch.taught_tokens[0])
    assert own.head.bias is not None
    assert own.head.bias.dtype == torch.float32
    assert [side.head.weight.dtype for side in SIDES] == [torch.float32, torch.bfloat16]
    for side in SIDES:
        assert side.head.bias is not None
        assert torch.equal(side.head.bias, own.head.bias)
        assert torch.equal(side.hidden.float(), own.hidden.float())
        assert side.hidden.dtype == side.head.weight.dtype


def test_a_plain_head_stays_as_it_was(tmp_path: Path) -> None:
    """A float32 bias is the head's own memory, which a folded one adds to."""
    plain, other, _, _ = heads(1e-2, dtype="float32", bias=True)
    again = drawn(dtype="float32", bias=True).head
    assert plain.head.bias is not None
    assert again.bias is not None
    assert torch.equal(plain.head.bias, again.bias)
    assert load_teacher_head(of_caches([coded(tmp_path / "c")]).teachers[0], CPU).rows_are == "decoded"
    assert other.head.bias is None
