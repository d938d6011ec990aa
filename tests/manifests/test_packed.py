"""Packed files: blocks come back as they were, and no damaged byte is used."""

import importlib.util
import itertools
import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tests.caches import make_cache
from tests.manifests.packing import PLENTY, make_grown, tree

from kdpipe.manifests import packed as module
from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CheckFailed, InputError
from kdpipe.manifests.pack import pack
from kdpipe.manifests.packed import Cut, compressed, cuts_of, in_order, is_packed, restored
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.shard import shard_path
from kdpipe.manifests.unpack import check_packed, unpack


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    pack(make_grown(folder / "cache"), folder / "cache.kdpack", Silent(), most_bytes=PLENTY)
    return folder / "cache.kdpack"


def test_a_block_comes_back_as_it_was() -> None:
    rng = np.random.default_rng(0)
    for rows, columns, width in itertools.product((1, 2, 9), (1, 3, 7), (1, 2, 4, 8)):
        data = rng.bytes(rows * columns * width)
        cut = Cut(file=0, begin=0, size=len(data), width=width, columns=columns)
        assert restored(compressed(data, cut), cut) == data, cut


def test_rows_take_less_room_shuffled_than_as_they_are() -> None:
    rng = np.random.default_rng(0)
    scales = np.exp(rng.normal(size=8) * 3)
    rows = (rng.standard_normal((50000, 8)) * scales).astype(ml_dtypes.bfloat16)
    shuffled, plain = (
        compressed(rows.tobytes(), Cut(file=0, begin=0, size=rows.nbytes, width=width, columns=columns))
        for width, columns in ((2, 8), (1, 1))
    )
    assert len(shuffled) < 0.85 * len(plain)


def test_a_shard_is_cut_between_rows_and_every_byte_of_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    cache = make_cache(tmp_path / "cache")
    path = shard_path(cache.path, 1)
    cuts = list(cuts_of(3, path))
    assert [cut.begin for cut in cuts] == [0, *np.cumsum([cut.size for cut in cuts])[:-1]]
    assert sum(cut.size for cut in cuts) == path.stat().st_size
    of_rows = [cut for cut in cuts if (cut.width, cut.columns) == (2, cache.plan.head.hidden_size)]
    assert len(of_rows) > 1
    assert all(cut.file == 3 and cut.size % (cut.width * cut.columns) == 0 for cut in cuts)
    assert all(cut.size <= 1000 for cut in of_rows)


def test_a_tensor_file_of_another_kind_is_cut_like_any_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"no header")
    assert list(cuts_of(0, path)) == [Cut(file=0, begin=0, size=9, width=1, columns=1)]


def test_results_come_in_order_and_a_failure_ends_them() -> None:
    def half(value: int) -> float:
        return 10 / (value - 40)

    assert list(in_order(half, range(30))) == [half(value) for value in range(30)]
    with pytest.raises(ZeroDivisionError):
        list(in_order(half, range(100)))


def damaged(whole: Path, copy: Path, data: bytes) -> str:
    """What is said of a packed file with these bytes; "" where nothing is."""
    copy.write_bytes(data)
    try:
        problems = check_packed(copy, Silent())
    except (CheckFailed, InputError) as err:
        problems = [err]
    return str(problems[0]) if problems else ""


def test_a_flipped_bit_is_found_wherever_it_is(whole: Path, tmp_path: Path) -> None:
    data, rng = whole.read_bytes(), random.Random(1)
    assert damaged(whole, tmp_path / "copy", data) == ""
    for _ in range(150):
        flipped = bytearray(data)
        at = rng.randrange(len(data))
        flipped[at] ^= 1 << rng.randrange(8)
        assert damaged(whole, tmp_path / "copy", bytes(flipped)), f"byte {at}"


def test_a_file_that_is_cut_short_or_goes_on_is_named_as_that(whole: Path, tmp_path: Path) -> None:
    data, rng = whole.read_bytes(), random.Random(2)
    for size in (0, 5, 12, 40, *(rng.randrange(len(data)) for _ in range(20)), len(data) - 1):
        assert damaged(whole, tmp_path / "copy", data[:size]), size
    assert "its last note is missing" in damaged(whole, tmp_path / "copy", data[:-200])
    assert damaged(whole, tmp_path / "copy", data + b"x" * 300)


def test_a_damaged_block_names_the_file_that_it_is_of(whole: Path, tmp_path: Path) -> None:
    with module.PackedFile(whole) as packed:
        block = [block for block in packed.blocks() if packed.files[block.cut.file][0] == "shards/000002.safetensors"][
            1
        ]
    data = bytearray(whole.read_bytes())
    data[block.at + 3] ^= 4
    said = damaged(whole, tmp_path / "copy", bytes(data))
    assert f"bytes {block.at}-{block.at + block.num_bytes - 1} do not match their digest" in said
    assert f"bytes {block.cut.begin}-{block.cut.begin + block.cut.size - 1} of shards/000002.safetensors" in said


def test_zstd_itself_tests_a_packed_file_and_reads_its_blocks(whole: Path) -> None:
    zstandard = importlib.import_module("zstandard") if importlib.util.find_spec("zstandard") else None
    if zstandard is None:
        pytest.skip("zstandard is not installed")
    with open(whole, "rb") as file:
        plain = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()
    with module.PackedFile(whole) as packed:
        assert len(plain) == sum(size for _, size in packed.files)
        first = next(packed.blocks())
        assert plain[: first.cut.size] == packed.cut_of(first)[1] == (whole.parent / "cache/PLAN.json").read_bytes()


def test_a_name_outside_of_the_folder_is_refused(whole: Path, tmp_path: Path) -> None:
    for name in ("../evil", "/etc/evil", "shards/../../evil"):
        head = module.note({module.KEY: module.VERSION, "cache": "", "files": [[name, 0]]})
        (tmp_path / "bad").write_bytes(head + module.end_note(0))
        with pytest.raises(CheckFailed, match="names a file that is in no cache"):
            unpack(tmp_path / "bad", tmp_path / "out", Silent(), most_bytes=PLENTY)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_note_that_says_of_no_block_is_refused_whatever_it_says(whole: Path, tmp_path: Path) -> None:
    head = module.note({module.KEY: module.VERSION, "cache": "", "files": [["PLAN.json", 10]]})
    cut = {"file": 0, "begin": 0, "size": 10, "width": 1, "columns": 1, "num_bytes": 3, "xxh3_128": ""}
    for wrong in (
        {"file": 1},
        {"begin": 1},
        {"size": 1 << 40},
        {"size": 0},
        {"width": 0},
        {"columns": 3},
        {"size": "x"},
    ):
        (tmp_path / "bad").write_bytes(head + module.note(cut | wrong) + b"abc" + module.end_note(1))
        assert "says of no block where it belongs" in str(check_packed(tmp_path / "bad", Silent())[0]), wrong
    (tmp_path / "bad").write_bytes(head + module.end_note(7))
    assert "it has 0 blocks of 7" in str(check_packed(tmp_path / "bad", Silent())[0])


def test_another_version_and_other_files_are_told_apart(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "next").write_bytes(module.note({module.KEY: 2, "files": []}) + module.end_note(0))
    with pytest.raises(CheckFailed, match="of version 2, this kdpipe reads version 1"):
        module.PackedFile(tmp_path / "next")
    (tmp_path / "text").write_text("hello")
    assert [is_packed(path) for path in (whole, tmp_path / "next", tmp_path / "text", tmp_path, tmp_path / "no")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert tree(whole.parent / "cache") == tree(Cache.open(whole.parent / "cache").path)
