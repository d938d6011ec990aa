"""Many writers of one plan at once, some killed, some stopped for longer than a claim lives: the same tree always."""

import multiprocessing
import os
import random
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tests.caches import make_cache
from tests.conftest import Apart
from tests.stages.extracting import coded_spec, committed_are_whole, extract_small, files, small_spec

from kdpipe.manifests.claims import Claims
from kdpipe.manifests.durable import QUARANTINE
from kdpipe.manifests.progress import Silent
from kdpipe.stages.extract import ExtractSpec
from kdpipe.stages.extract.shelf import ShardShelf
from kdpipe.stages.models.head import loaded_head

CLAIM_S = 0.4
WRITERS = 8


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ExtractSpec:
    return small_spec(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize(
    "races",
    [
        pytest.param(3, marks=pytest.mark.timeout(600)),
        pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
    ],
)
def test_writers_that_race_are_killed_and_stopped_make_one_tree(
    races: int, spec: ExtractSpec, apart: Apart, tmp_path: Path
) -> None:
    make_one_tree(races, spec, apart, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_writers_that_each_fit_a_codec_make_one_tree(spec: ExtractSpec, apart: Apart, tmp_path: Path) -> None:
    make_one_tree(30, coded_spec(spec), apart, tmp_path)


def make_one_tree(races: int, spec: ExtractSpec, apart: Apart, tmp_path: Path) -> None:
    """Some writers at once, one of them killed and two stopped for longer than a claim lives."""
    assert apart(extract_small, spec, tmp_path / "whole" / "cache") == 0
    whole, draw = files(tmp_path / "whole" / "cache"), random.Random(races)
    context = multiprocessing.get_context("forkserver")
    for race in range(races):
        cache = tmp_path / str(race) / "cache"
        arguments = {"kill": "", "part": None, "moment": 30.0, "claim": CLAIM_S}
        writers = [context.Process(target=extract_small, args=(spec, cache), kwargs=arguments) for _ in range(WRITERS)]
        for writer in writers:
            writer.start()
        stopped = draw.sample(writers, 2)
        for writer in stopped:
            time.sleep(draw.uniform(0.0, 0.3))
            if writer.is_alive() and writer.pid:
                os.kill(writer.pid, signal.SIGSTOP)
        victim = draw.choice([writer for writer in writers if writer not in stopped])
        victim.kill()
        for writer in writers:
            if writer not in stopped:
                writer.join(60)
                assert writer.exitcode in ((-signal.SIGKILL, 0) if writer is victim else (0,)), "a writer failed"
        committed_are_whole(cache)
        time.sleep(CLAIM_S)
        for writer in stopped:
            if writer.is_alive() and writer.pid:
                os.kill(writer.pid, signal.SIGCONT)
            writer.join(60)
            assert writer.exitcode == 0, "a writer that slept failed"
        assert apart(extract_small, spec, cache) == 0  # sweeps what the killed one left
        assert files(cache) == whole
        assert not (cache / QUARANTINE).exists()


def test_writers_share_the_work(spec: ExtractSpec, apart: Apart, tmp_path: Path) -> None:
    """Each shard is made once where nobody fails: the runs' logs would otherwise name one twice."""
    told = tmp_path / "told"
    context = multiprocessing.get_context("forkserver")
    writers = [
        context.Process(target=extract_small, args=(spec, tmp_path / "cache"), kwargs={"told": told, "claim": 30.0})
        for _ in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    made = told.read_text().split()
    shards = len(files(tmp_path / "cache" / "shards"))
    assert sorted(made) == sorted(str(number) for number in range(shards)), "claims are there to share the work"


def test_what_another_writer_has_finished_by_now_is_not_made_again(tmp_path: Path) -> None:
    """It was missing when the work was listed, and its claim is gone when it is this writer's turn."""
    cache = make_cache(tmp_path / "cache")
    head = loaded_head(cache.head(), cache.plan.head, torch.device("cpu"))
    with closing(Claims(cache.path)) as claims, ShardShelf(cache, head, claims, Silent()) as shelf:
        assert not shelf.open(1)
        assert not claims.path(1).exists()
