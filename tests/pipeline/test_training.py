"""How many ranks a training has, and where its caches are read."""

from pathlib import Path

import pytest
from tests.caches import make_cache
from tests.conftest import Bench, Main

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.specs import load
from kdpipe.pipeline.training import choose_nproc, node_copies


@pytest.fixture
def under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of four ranks each."""
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("under_torchrun")
def test_a_run_file_may_say_how_many_ranks_a_node_has_under_torchrun_too() -> None:
    assert choose_nproc(None, "cpu", 0) == choose_nproc(4, "cpu", 0) == 8
    with pytest.raises(ConfigError, match="torchrun has already decided"):
        choose_nproc(8, "cpu", 0)


def test_caches_are_read_from_copies_on_the_nodes_disk(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    run = load(None, (f"cache.path={bench.cache}", "cache.stage_dir=$SCRATCH/copies"))
    with node_copies(run, tmp_path / "out") as (copy,):
        assert copy.parent == tmp_path / "scratch" / "copies"
        assert (copy / "PLAN.json").read_bytes() == (bench.cache / "PLAN.json").read_bytes()
    with node_copies(load(None, (f"cache.path={bench.cache}",)), tmp_path / "out") as copies:
        assert copies == ()


def test_a_cache_that_has_no_room_there_is_read_in_place(bench: Bench, tmp_path: Path) -> None:
    sets = (f"cache.path={bench.cache}", f"cache.stage_dir={tmp_path / 'copies'}", "cache.stage_max_bytes=1000")
    with node_copies(load(None, sets), tmp_path / "out") as copies:
        assert copies == (bench.cache,)


def test_a_cache_that_is_too_coarse_is_refused_before_it_is_copied(main: Main, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", codec="int8").path
    words = ("--student", "absent", "--cache", cache, "--output", tmp_path / "out", "--stage-dir", tmp_path / "copies")
    code, _, err = main("train", *words, "--max-codec-kl", "1e-9")
    assert (code, "its codec 'int8' loses a mean KL of " in err) == (4, True), err
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
