"""Any system call of an extraction may fail: one clean error, nothing torn, and the next run succeeds."""

import errno
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Apart
from tests.stages.extracting import (
    coded_spec,
    committed_are_whole,
    convert_small,
    extract_on_full_disk,
    extract_small,
    files,
    require_exceptions,
    small_spec,
    work_failing,
)

from kdpipe.manifests.plan import PLAN_FILE
from kdpipe.stages.extract import ExtractSpec

HALF = 0
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EDQUOT": errno.EDQUOT, "EINTR": errno.EINTR, "half": HALF}
SOAK = [pytest.mark.slow, pytest.mark.timeout(3600)]
STRIDE = 331
"""The usual tests fail every 331st call, each error at its own; the long ones all of them."""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ExtractSpec:
    return small_spec(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def coded(spec: ExtractSpec) -> ExtractSpec:
    return coded_spec(spec)


@pytest.mark.parametrize("stride", [STRIDE, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("name", ERRORS)
def test_the_nth_system_call_fails(name: str, stride: int, spec: ExtractSpec, apart: Apart, tmp_path: Path) -> None:
    every_nth_call_fails(extract_small, spec, name, stride, apart, tmp_path)


@pytest.mark.parametrize(("name", "stride"), [pytest.param(name, 29, marks=SOAK) for name in ERRORS])
def test_the_nth_system_call_of_a_coded_extraction_fails(
    name: str, stride: int, coded: ExtractSpec, apart: Apart, tmp_path: Path
) -> None:
    every_nth_call_fails(extract_small, coded, name, stride, apart, tmp_path)
    require_exceptions(tmp_path / "whole" / "cache")


@pytest.mark.parametrize(
    ("name", "stride"), [("ENOSPC", STRIDE), *(pytest.param(name, 29, marks=SOAK) for name in ERRORS)]
)
def test_the_nth_system_call_of_a_conversion_fails(
    name: str, stride: int, spec: ExtractSpec, apart: Apart, tmp_path: Path
) -> None:
    assert apart(extract_small, spec, tmp_path / "raw" / "cache") == 0
    every_nth_call_fails(convert_small, tmp_path / "raw" / "cache", name, stride, apart, tmp_path)


def every_nth_call_fails(
    work: Callable[[Any, Path], None], of: object, name: str, stride: int, apart: Apart, tmp_path: Path
) -> None:
    """Each `stride`-th call on the folder of the cache that work(of, cache) makes fails, in a run of its own."""
    assert apart(work, of, tmp_path / "whole" / "cache") == 0
    whole = files(tmp_path / "whole" / "cache")
    raised = 0
    for nth in itertools.count(1 + list(ERRORS).index(name) % stride, stride):
        cache = tmp_path / f"{nth}" / "cache"
        cache.parent.mkdir()
        told = tmp_path / "told"
        assert apart(work_failing, work, of, cache, nth, ERRORS[name], told) == 0, f"call {nth}: not a clean error"
        count, _, error = told.read_text().partition("\n")
        assert "\n" not in error, f"call {nth}"
        raised += bool(error)
        if (cache / PLAN_FILE).exists():
            committed_are_whole(cache)
        assert apart(work, of, cache) == 0, f"call {nth}: the next run"
        assert files(cache) == whole, f"call {nth}"
        shutil.rmtree(cache.parent)
        if int(count) < nth:
            break
    assert nth > 50
    if name == "half":
        assert not raised, "what is left of a write is to be written"
    elif name == "EINTR":
        assert raised < nth / stride / 2, "flushes and writes are to be tried again"
    else:
        assert raised


def assert_told_at_once(told: Path, said: str) -> None:
    began, ended, error = told.read_text().split("\n", 2)
    assert error.startswith("E-SPACE ")
    assert said in error
    assert "\n" not in error
    assert float(ended) - float(began) < 5.0


@pytest.mark.parametrize(("shards", "codec"), [(1, "raw"), (3, "raw"), (2, "fisher")])
def test_a_disk_that_fills_up_is_told_at_once_and_nothing_is_lost(
    shards: int, codec: str, spec: ExtractSpec, apart: Apart, tmpfs: Callable[[str], Path], tmp_path: Path
) -> None:
    spec = spec if codec == "raw" else coded_spec(spec)
    small_disk = tmpfs("8m")
    assert apart(extract_small, spec, tmp_path / "whole" / "cache") == 0
    cache, told = small_disk / "cache", tmp_path / "told"
    assert apart(extract_on_full_disk, spec, cache, told, shards, 0) == 0
    assert_told_at_once(told, "no space left on device")
    assert committed_are_whole(cache) in (shards, shards + 1)  # one was allocated when the disk filled up
    (small_disk / "filler").unlink()
    assert apart(extract_on_full_disk, spec, cache, told, -1, 0) == 0
    assert files(cache) == files(tmp_path / "whole" / "cache")


def test_a_limit_on_the_size_of_files_is_told_at_once(spec: ExtractSpec, apart: Apart, tmp_path: Path) -> None:
    assert apart(extract_small, spec, tmp_path / "whole" / "cache") == 0
    whole = files(tmp_path / "whole" / "cache")
    limit = max(len(data) for name, data in whole.items() if name.startswith("shards/")) - 1
    cache, told = tmp_path / "cache", tmp_path / "told"
    assert apart(extract_on_full_disk, spec, cache, told, -1, limit) == 0
    assert_told_at_once(told, "file too large")
    assert apart(extract_small, spec, cache) == 0
    assert files(cache) == whole
