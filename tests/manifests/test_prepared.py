"""PREPARED.json: what samples were made of, read back whole or not at all."""

from pathlib import Path

import pytest
from tests.caches import make_plan, make_samples

from kdpipe.manifests.plan import Plan
from kdpipe.manifests.prepared import PREPARED_FILE, Prepared, SamplesFingerprint, SamplesSettings, read_prepared
from kdpipe.manifests.samples import Samples
from kdpipe.manifests.shard_table import SHARDS_FILE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Samples without a teacher: those of a plan, and no more of it."""
    plan = make_plan(tmp_path, make_samples(21))
    (tmp_path / PREPARED_FILE).write_bytes(of_plan(plan).to_bytes())
    (tmp_path / "PLAN.json").unlink()
    return tmp_path


def of_plan(plan: Plan) -> Prepared:
    fields = {name: getattr(plan, name) for name in Prepared.model_fields}
    kinds = {"fingerprint": SamplesFingerprint, "settings": SamplesSettings}
    parts = {
        name: kind(**{each: getattr(fields[name], each) for each in kind.model_fields}) for name, kind in kinds.items()
    }
    return Prepared.model_validate(fields | parts)


def test_a_record_comes_back_with_its_samples(folder: Path) -> None:
    prepared = read_prepared(folder)
    assert prepared is not None
    assert (prepared.generation, prepared.brought()) == (0, [range(prepared.num_shards)])
    samples = Samples(folder, prepared)
    samples.verify()
    texts = [samples.tokens(index) for index in range(prepared.num_samples)]
    assert [text.token_ids.tolist() for text in texts] == [each.token_ids.tolist() for each in make_samples(21)]


def test_what_a_kill_left_half_is_none(folder: Path) -> None:
    for name in (SHARDS_FILE, PREPARED_FILE):
        whole = (folder / name).read_bytes()
        for left in (b"", whole[: len(whole) // 2], whole.replace(b"1", b"2")):
            (folder / name).write_bytes(left)
            assert read_prepared(folder) is None, name
        (folder / name).write_bytes(whole)
    assert read_prepared(folder) is not None
    (folder / PREPARED_FILE).unlink()
    assert read_prepared(folder) is None


def test_changed_is_another_record_of_the_same_kind(folder: Path, tmp_path: Path) -> None:
    prepared = read_prepared(folder)
    assert prepared is not None
    other = prepared.changed(counts={"read": 5})
    assert type(other) is Prepared
    assert other != prepared
    assert len(other.shards) == prepared.num_shards
