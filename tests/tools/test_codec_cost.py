"""What coded rows cost: a disk that is slow is as slow as it says, and every case has its line."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "bench" / "codec_cost.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = importlib.util.spec_from_file_location("codec_cost", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "codec_cost", module)
    found.loader.exec_module(module)
    return module


def test_a_slow_disk_reads_one_piece_after_the_other_each_once(bench: ModuleType) -> None:
    disk, one, other = bench.SlowDisk(), Path("one"), Path("other")
    piece, began = bench.PIECE / bench.DISK_RATE, time.perf_counter()
    first = disk.ask(one, 5, 40 * bench.PIECE)
    assert first - began == pytest.approx(40 * piece, rel=0.5)
    assert disk.ask(other, 0, 10 * bench.PIECE) - first == pytest.approx(10 * piece)
    assert first - disk.ask(one, bench.PIECE, bench.PIECE + 1) == pytest.approx(38 * piece)
    assert disk.free_at - first == pytest.approx(10 * piece)


@pytest.mark.slow
def test_every_case_has_its_line() -> None:
    command = [sys.executable, str(SCRIPT), "--json", "--quick"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    found = {(line["case"].split(",")[0].split(" at ")[0], line["metric"]) for line in lines}
    assert found == {
        ("step", "share"),
        ("step", "time"),
        ("cold epoch", "time"),
        ("extraction", "time"),
        ("extraction", "calibration"),
    }
    assert all(0 < line["kdpipe"] < 1 for line in lines if line["metric"] == "share")
