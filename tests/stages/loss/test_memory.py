import gc
import threading
from collections.abc import Iterator

import pytest
import torch

from kdpipe.stages.loss.memory import HUGE_PAGE_BYTES, IDLE_BYTES, release_scratch, scratch, zeros

LIKE = torch.empty(0)
PLACES = 2 * HUGE_PAGE_BYTES  # 16 MiB of fp32


@pytest.fixture(autouse=True)
def no_idle_memory() -> Iterator[None]:
    release_scratch()
    yield
    release_scratch()


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def test_a_large_buffer_is_zeros_of_the_dtype_asked_for() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        buffer = zeros((PLACES // 4, 4), like=LIKE, dtype=dtype)
        assert buffer.dtype == dtype
        assert buffer.shape == (PLACES // 4, 4)
        assert not buffer.any()


def test_memory_is_used_again_and_is_zeros_again() -> None:
    first = zeros((PLACES,), like=LIKE).fill_(1.0)
    place = first.data_ptr()
    del first
    again = zeros((PLACES // 2, 2, 2), like=LIKE, dtype=torch.bfloat16)
    assert again.data_ptr() == place
    assert not again.any()


def test_memory_is_not_used_again_while_a_view_lives() -> None:
    first = zeros((PLACES,), like=LIKE)
    view = first[1:].view(-1, 1)
    del first
    gc.collect()
    zeros((PLACES,), like=LIKE).fill_(1.0)
    assert not view.any()


def test_idle_memory_is_bounded_and_given_back_on_request() -> None:
    before = resident_bytes()
    buffers = [zeros((PLACES,), like=LIKE).fill_(1.0) for _ in range(8)]
    assert resident_bytes() - before > 7 * 4 * PLACES
    buffers.clear()
    assert resident_bytes() - before < IDLE_BYTES + 4 * PLACES
    release_scratch()
    assert resident_bytes() - before < 4 * PLACES


def test_released_scratch_is_not_kept_once_its_last_view_is_gone() -> None:
    before = resident_bytes()
    view = scratch("student", (PLACES,), like=LIKE).fill_(1.0)
    release_scratch()
    assert float(view[-1]) == 1.0
    del view
    assert resident_bytes() - before < 2 * PLACES


def test_a_buffer_larger_than_what_is_kept_goes_back_at_once_and_drives_nothing_out() -> None:
    small = zeros((PLACES,), like=LIKE)
    place = small.data_ptr()
    del small
    before = resident_bytes()
    large = zeros((IDLE_BYTES + HUGE_PAGE_BYTES,), like=LIKE, dtype=torch.uint8).fill_(1)
    del large
    assert resident_bytes() - before < HUGE_PAGE_BYTES
    assert zeros((PLACES,), like=LIKE).data_ptr() == place


def test_threads_never_share_a_buffer() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            buffer = zeros((HUGE_PAGE_BYTES,), like=LIKE, dtype=torch.uint8).fill_(number)
            if not bool((buffer == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)
