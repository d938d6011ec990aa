"""Cores and GPUs of two roles on one machine."""

import pytest

from kdpipe.manifests.cores import Cores
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.specs import EngineSpec, LiveSpec
from kdpipe.pipeline.roles import Share, share_cores, share_gpus, visible_gpus


@pytest.mark.parametrize(
    ("count", "asked", "teacher", "student"),
    [(2, None, (0,), (1,)), (5, None, (0, 1), (2, 3, 4)), (5, 4, (0, 1, 2, 3), (4,)), (1, None, (), ())],
)
def test_no_core_is_both_roles(count: int, asked: int | None, teacher: tuple[int], student: tuple[int]) -> None:
    cores = Cores(count=count, numbers=tuple(range(count)))
    shares = share_cores(LiveSpec(teacher_cores=asked), cores)
    assert [share.cores.numbers if share.cores else () for share in shares] == [teacher, student]


def test_a_student_without_a_core_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 of 4 cores leave the student none"):
        share_cores(LiveSpec(teacher_cores=4), Cores(count=4))


@pytest.mark.parametrize(
    ("live", "tp", "teacher", "student"),
    [
        ({}, 1, "a", "bcd"),
        ({}, 2, "ab", "cd"),
        ({}, 8, "abc", "d"),
        ({"teacher_gpus": (2,)}, 1, "c", "abd"),
        ({"student_gpus": (0, 1)}, 1, "cd", "ab"),
        ({"teacher_gpus": (0, 1), "student_gpus": (1, 2)}, 1, "ab", "bc"),
        ({"student_gpus": (0, 1, 2, 3)}, 1, "abcd", "abcd"),
    ],
)
def test_gpus_are_shared_out_the_teachers_first(live: dict, tp: int, teacher: str, student: str) -> None:
    shares = share_gpus(LiveSpec(**live), EngineSpec(tp=tp), list("abcd"))
    assert ["".join(share.gpus) for share in shares] == [teacher, student]


def test_a_single_gpu_is_both_roles() -> None:
    assert share_gpus(LiveSpec(), EngineSpec(), ["0"]) == (Share(), Share())


def test_a_gpu_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="no GPU 4, 2 are visible"):
        share_gpus(LiveSpec(student_gpus=(4,)), EngineSpec(), ["0", "1"])


def test_a_process_has_no_more_threads_than_cores_whatever_the_user_has_set() -> None:
    for given, expected in (({}, "2"), ({"OMP_NUM_THREADS": "8"}, "2"), ({"OMP_NUM_THREADS": "1"}, "1")):
        Share(cores=Cores(count=2, numbers=(4, 5))).settle(given)
        assert given["OMP_NUM_THREADS"] == expected
    given = {}
    Share(gpus=("GPU-a", "3")).settle(given)
    assert given == {"CUDA_VISIBLE_DEVICES": "GPU-a,3"}


def test_visible_gpus_have_the_names_that_the_user_gave_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    assert visible_gpus(2) == ["4", "6"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus(3) == ["0", "1", "2"]
