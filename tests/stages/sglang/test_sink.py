"""The sink on its own: which bytes it writes, from whole prompts and from chunks, and what its receipts say."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.stages.rows import TORCH_DTYPES, as_array
from kdpipe.stages.sglang.sink import OPEN_FILES, Order, Receipt, Sink, runs_of

WIDTH = 5


def make_order(path: Path, positions: list[int], *, dtype: str = "float32", offset: int = 40) -> Order:
    path.write_bytes(b"\xee" * (offset + len(positions) * WIDTH * TORCH_DTYPES[dtype].itemsize + 40))
    runs = runs_of(np.array(positions, dtype=np.int64))
    return Order(path=str(path), offset=offset, width=WIDTH, dtype=dtype, runs=runs)


def test_runs_are_positions_and_survive_an_engines_parameters(tmp_path: Path) -> None:
    assert runs_of(np.array([3, 4, 5, 9])) == (3, 6, 9, 10)
    assert runs_of(np.array([], dtype=np.int64)) == ()
    order = make_order(tmp_path / "rows", [3, 4, 5, 9])
    assert Order.from_params(order.to_params()) == order
    assert Order.from_params(None) is None
    assert Order.from_params({"thinking_budget": 3}) is None


@given(checksum=st.integers(0, 2**64 - 1), rows=st.integers(0, 2**40))
def test_receipts_survive_as_floats(checksum: int, rows: int) -> None:
    receipt = Receipt(num_positions=rows, num_rows=rows, num_bytes=rows, checksum=checksum)
    assert Receipt.from_floats(receipt.to_floats()) == receipt


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("cuts", [[], [1], [7], [4, 5, 11], list(range(1, 13))])
def test_exactly_the_ordered_rows_are_written_whatever_the_chunks(cuts: list[int], dtype: str, tmp_path: Path) -> None:
    positions = [0, 1, 4, 5, 6, 11, 12]
    order = make_order(tmp_path / "rows", positions, dtype=dtype)
    hidden = torch.arange(13 * WIDTH).view(13, WIDTH).to(TORCH_DTYPES[dtype])
    sink = Sink()
    for chunk in hidden.tensor_split(cuts):
        sink.take("a", order, chunk)
        sink.take("b", make_order(tmp_path / "other", [0]), chunk.float())  # another request in the same batches
    wanted = as_array(hidden[positions].contiguous()).tobytes()
    data = (tmp_path / "rows").read_bytes()
    assert data == b"\xee" * 40 + wanted + b"\xee" * 40
    assert sink.finish("a") == Receipt(
        num_positions=13, num_rows=7, num_bytes=len(wanted), checksum=xxhash.xxh3_64_intdigest(wanted)
    )


@pytest.mark.parametrize("hidden", [torch.ones(3, WIDTH + 1), torch.ones(3, WIDTH, dtype=torch.float16)])
def test_rows_of_another_width_or_dtype_are_not_written(hidden: torch.Tensor, tmp_path: Path) -> None:
    order = make_order(tmp_path / "rows", [0, 1], dtype="float32")
    before = (tmp_path / "rows").read_bytes()
    sink = Sink()
    sink.take("a", order, hidden)
    found = sink.finish("a")
    assert (found.num_positions, found.num_rows, found.num_bytes) == (3, 0, 0)
    assert (tmp_path / "rows").read_bytes() == before


def test_a_request_taken_back_starts_again_and_a_file_that_is_gone_is_no_crash(tmp_path: Path) -> None:
    order = make_order(tmp_path / "rows", [0, 2])
    hidden = torch.randn(3, WIDTH)
    sink = Sink()
    sink.take("a", order, hidden[:2] + 1)
    sink.restart("a")
    sink.take("a", order, hidden)
    assert sink.finish("a").num_positions == 3
    assert (tmp_path / "rows").read_bytes()[40:-40] == hidden[[0, 2]].numpy().tobytes()
    sink.take("b", Order(path=str(tmp_path / "gone"), offset=0, width=WIDTH, dtype="float32", runs=(0, 1)), hidden)
    assert sink.finish("b").num_rows == 0


def test_few_files_are_kept_open(tmp_path: Path) -> None:
    sink = Sink()
    for number in range(3 * OPEN_FILES):
        sink.take(str(number), make_order(tmp_path / str(number), [0]), torch.full((1, WIDTH), float(number)))
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    assert sum(os.readlink(link).startswith(str(tmp_path)) for link in links if os.path.lexists(link)) == OPEN_FILES
    for number in range(3 * OPEN_FILES):
        assert (tmp_path / str(number)).read_bytes()[40:-40] == np.full(WIDTH, number, np.float32).tobytes()
