"""The container: its layout is known beforehand, and only what it says is accepted."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize

from kdpipe.manifests.errors import LayoutError
from kdpipe.manifests.tensorfile import DTYPES, PAGE, lay_out, parse

names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
tensors = st.lists(
    st.tuples(names, st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
    max_size=6,
    unique_by=lambda tensor: tensor[0],
)
metadata = st.dictionaries(st.text(max_size=8), st.text(max_size=60), max_size=4)


def file_of(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@given(tensors, metadata)
def test_what_is_laid_out_is_what_is_parsed(wanted: list, meta: dict) -> None:
    layout = lay_out(wanted, meta)
    found, found_meta = parse(memoryview(layout.header + bytes(layout.num_bytes - layout.body)), "here")
    assert (found, found_meta) == (layout, meta)
    assert layout.body % PAGE == 0
    assert layout.num_bytes == layout.body + sum(math.prod(s) * DTYPES[d].itemsize for _, d, s in wanted)


@given(tensors, st.integers(0, 2**32))
def test_the_safetensors_library_reads_the_same_numbers(wanted: list, seed: int) -> None:
    layout = lay_out(wanted, {"a": "b"})
    body = np.random.default_rng(seed).bytes(layout.num_bytes - layout.body)
    data = layout.header + body
    theirs = dict(deserialize(data))
    assert theirs.keys() == layout.tensors.keys()
    for name, tensor in layout.tensors.items():
        ours = tensor.view(memoryview(data))
        assert (tensor.dtype, list(ours.shape)) == (theirs[name]["dtype"], theirs[name]["shape"])
        assert ours.tobytes() == theirs[name]["data"]


def test_the_first_tensor_starts_on_a_page_whatever_the_header_takes() -> None:
    for length in range(PAGE - 120, PAGE + 8):
        layout = lay_out([("x", "U8", (3,))], {"m": "a" * length})
        assert layout.body % PAGE == 0
        assert layout.tensors["x"].begin == layout.body == 8 + int.from_bytes(layout.header[:8], "little")


ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "0 bytes, a header length takes 8"),
        (b"\0\0\0", "3 bytes, a header length takes 8"),
        (file_of({})[:-1], "a header of 2 bytes in a file of 9"),
        ((2**63).to_bytes(8, "little") + b"{}", "a header of 9223372036854775808 bytes"),
        (file_of(b" " * (1 << 20) + b"{}"), "a header of 1048578 bytes"),
        (file_of(b"{"), "header: JSONDecodeError"),
        (file_of(b"\xff\xfe{}"), "header: "),
        (file_of(b"[" * 100_000), "header: RecursionError"),
        (file_of([]), "header: TypeError"),
        (file_of({"x": 3}), "header: TypeError"),
        (file_of({"__metadata__": [], "x": ENTRY}, bytes(4)), "header: AttributeError"),
        (file_of({"x": {"dtype": "U8", "shape": [4]}}, bytes(4)), "header: KeyError"),
        (file_of({"x": {**ENTRY, "dtype": "Q7"}}, bytes(4)), "'x' is Q7 [4]"),
        (file_of({"x": {**ENTRY, "dtype": []}}, bytes(4)), "header: TypeError"),
        (file_of({"x": {**ENTRY, "shape": [-4]}}, bytes(4)), "'x' is U8 [-4]"),
        (file_of({"x": {**ENTRY, "shape": [math.inf]}}, bytes(4)), "header: OverflowError"),
        (file_of({"x": {**ENTRY, "shape": [math.nan]}}, bytes(4)), "header: ValueError"),
        (file_of({"x": {**ENTRY, "data_offsets": [0, 4, 8]}}, bytes(4)), "header: ValueError"),
        (file_of({"x": {**ENTRY, "shape": [5]}}, bytes(4)), "'x' lies at"),
        (file_of({"x": {**ENTRY, "data_offsets": [1, 5]}}, bytes(5)), "'x' lies at"),
        (file_of({"x": {**ENTRY, "data_offsets": [-4, 0]}}), "'x' lies at"),
        (file_of({"x": ENTRY, "y": {**ENTRY, "data_offsets": [2, 6]}}, bytes(6)), "'y' lies at"),
        (file_of({"x": ENTRY}, bytes(3)), "tensors end at byte"),
        (file_of({"x": ENTRY}, bytes(5)), "tensors end at byte"),
    ],
)
def test_whatever_is_not_a_tensor_file_is_refused_by_name(data: bytes, says: str) -> None:
    with pytest.raises(LayoutError) as caught:
        parse(memoryview(data), "some/file")
    assert str(caught.value).startswith("E-LAYOUT some/file: not a tensor file: ")
    assert says in str(caught.value)


@given(st.data())
def test_a_damaged_header_is_refused_or_still_a_layout_of_the_whole_file(data: st.DataObject) -> None:
    layout = lay_out([("x", "BF16", (3, 5)), ("y", "I64", (2,))], {"a": "b"})
    broken = bytearray(layout.header + bytes(layout.num_bytes - layout.body))
    used = 8 + len(layout.header[8:].rstrip())
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, used - 1))] = data.draw(st.integers(0, 255))
    try:
        found, _ = parse(memoryview(broken), "here")
    except LayoutError:
        return
    assert found.num_bytes == len(broken)
    for tensor in found.tensors.values():
        tensor.view(memoryview(broken))
