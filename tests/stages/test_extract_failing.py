"""Any system call of an extraction may fail: one clean error, nothing torn, and the next run succeeds."""

import errno
import itertools
import shutil
from pathlib import Path

import pytest
from tests.conftest import Apart
from tests.stages.extracting import committed_are_whole, extract_failing, extract_small, files, small_spec

from kdpipe.manifests.plan import PLAN_FILE
from kdpipe.stages.extract import ExtractSpec

HALF = 0
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EDQUOT": errno.EDQUOT, "EINTR": errno.EINTR, "half": HALF}
STRIDE = 151
"""The usual tests fail every 151st call, each error at its own; the long ones all of them."""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ExtractSpec:
    return small_spec(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("stride", [STRIDE, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("name", ERRORS)
def test_the_nth_system_call_fails(name: str, stride: int, spec: ExtractSpec, apart: Apart, tmp_path: Path) -> None:
    assert apart(extract_small, spec, tmp_path / "whole" / "cache") == 0
    whole = files(tmp_path / "whole" / "cache")
    raised = 0
    for nth in itertools.count(1 + list(ERRORS).index(name) % stride, stride):
        cache = tmp_path / f"{nth}" / "cache"
        cache.parent.mkdir()
        told = tmp_path / "told"
        assert apart(extract_failing, spec, cache, nth, ERRORS[name], told) == 0, f"call {nth}: not a clean error"
        count, _, error = told.read_text().partition("\n")
        assert "\n" not in error, f"call {nth}"
        raised += bool(error)
        if (cache / PLAN_FILE).exists():
            committed_are_whole(cache)
        assert apart(extract_small, spec, cache) == 0, f"call {nth}: the next run"
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
