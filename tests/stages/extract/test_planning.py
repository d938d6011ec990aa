"""A cache is gone on with only where all that decides its rows is the same."""

from dataclasses import replace
from pathlib import Path

import pytest
from tests.caches import make_plan, make_samples

from kdpipe.manifests.errors import CacheError
from kdpipe.manifests.plan import Plan
from kdpipe.stages.extract.planning import require_same
from kdpipe.stages.extract.spec import ExtractSpec

OTHER: dict[str, dict[str, object]] = {
    "fingerprint": {"teacher": "x", "tokenizer": "x", "template": "x"},
    "settings": {
        "max_length": 7,
        "overlong": "drop",
        "supervise": "last",
        "rows": "all",
        "codec": "x",
        "dtype": "float16",
        "seed": 7,
        "shard_tokens": 7,
    },
    "head": {
        "architecture": "x",
        "hidden_size": 7,
        "vocab_size": 7,
        "head_rows": 7,
        "dtype": "float16",
        "tied": True,
        "has_bias": True,
        "softcap": 7.0,
        "scale": 7.0,
    },
    "engine": {
        "name": "x",
        "version": "2",
        "determinism": "tolerance",
        "device": "cuda",
        "batch_tokens": 7,
        "arguments": {"quantization": "fp8"},
    },
}
FIELDS = [(group, name) for group, names in OTHER.items() for name in names]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan(tmp_path / "c", make_samples(3))


def test_every_field_that_decides_the_rows_is_named_with_both_values(plan: Plan) -> None:
    for group, name in FIELDS:
        part = getattr(plan, group).model_copy(update={name: OTHER[group][name]})
        other = plan.model_copy(update={group: part})
        with pytest.raises(CacheError) as caught:
            require_same(other, plan, Path("c"))
        said = f"was made with {group}.{name} = {getattr(getattr(plan, group), name)!r}, this command asks for "
        assert f"{said}{OTHER[group][name]!r}" in str(caught.value)
    for name, value in {"heldout_fraction": 0.75, "vocabulary_digest": "x"}.items():
        with pytest.raises(CacheError, match=name):
            require_same(plan.model_copy(update={name: value}), plan, Path("c"))


WAYS_OUT = [
    ("raw", "fisher kl=0.02", "rows that are there, .*: kdpipe cache convert 'a c' OUT --codec fisher --codec-kl 0.02"),
    ("raw", "int8", "kdpipe cache convert 'a c' OUT --codec int8"),
    ("fisher bytes=0.2", "raw", "or give --codec fisher --codec-bytes 0.2"),
    ("int8", "fisher kl=0.01", "or give --codec int8"),
    ("raw", "x", "or give --codec raw"),
]


@pytest.mark.parametrize(("there", "asked", "way_out"), WAYS_OUT)
def test_where_the_codec_alone_is_another_the_way_out_is_named(
    plan: Plan, there: str, asked: str, way_out: str
) -> None:
    existing, wanted = (
        plan.model_copy(update={"settings": plan.settings.model_copy(update={"codec": codec})})
        for codec in (there, asked)
    )
    with pytest.raises(CacheError, match=rf"{way_out}$"):
        require_same(wanted, existing, Path("a c"))
    elsewhere = wanted.model_copy(update={"heldout_fraction": 0.75})  # rows under another codec would not do then
    with pytest.raises(CacheError, match=r"or run the same kdpipe extract again$"):
        require_same(elsewhere, existing, Path("a c"))


def test_no_teacher_adds_to_a_side_car(plan: Plan) -> None:
    head = plan.head.model_copy(update={"architecture": "TopK", "hidden_size": 8})
    with pytest.raises(CacheError, match=r"it has 4 tokens of a row, no teacher adds to that; choose another --cache"):
        require_same(plan, plan.model_copy(update={"head": head}), Path("c"))


def test_no_field_of_what_decides_the_rows_is_left_out(plan: Plan) -> None:
    free = {("fingerprint", "data")}  # it may be added
    for group in OTHER:
        names = {(group, name) for name in type(getattr(plan, group)).model_fields}
        assert names - free == {each for each in FIELDS if each[0] == group}


def test_what_changes_as_a_cache_grows_may_differ(plan: Plan) -> None:
    data = plan.fingerprint.model_copy(update={"data": "x"})
    changes = {
        "fingerprint": data,
        "counts": {},
        "num_samples": 0,
        "samples_digest": "",
        "num_shards": 0,
        "num_rows": 0,
    }
    require_same(plan.model_copy(update=changes), plan, Path("c"))


def test_what_decides_no_sample_is_no_choice() -> None:
    spec = ExtractSpec(teacher=Path("t"), data=(Path("d"),))
    for field, value in {"prepare_workers": 7, "check_inputs": True, "group": 5, "teacher": Path("x")}.items():
        assert replace(spec, **{field: value}).choices() == spec.choices(), field
    for field, value in {"shard_tokens": 7, "codec": "x", "rows": "all", "grow": True}.items():
        assert replace(spec, **{field: value}).choices() != spec.choices(), field
