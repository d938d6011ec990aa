"""The damage table: kdpipe's column has nothing silent in it, and what others let pass is seen to be let pass."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = "tools/bench/damage.py --json --cases 12 --kills 2 --rivals torch.save"


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    ended = subprocess.run(
        [sys.executable, *COMMAND.split()], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_nothing_is_silent_in_a_cache(lines: list[dict]) -> None:
    bad = [line for line in lines if line["metric"] in ("silent", "crashed", "lost")]
    assert len(bad) == 2 * 7 + 1
    assert not [line for line in bad if line["kdpipe"]]


def test_a_flipped_bit_is_noticed_and_told_where(lines: list[dict]) -> None:
    told = {line["metric"]: line["kdpipe"] for line in lines if line["case"] == "bit flip"}
    assert told["noticed"] == told["file named"] == told["bytes named"] == 1


def test_what_others_do_not_notice_is_seen(lines: list[dict]) -> None:
    (flips,) = [line["rivals"] for line in lines if (line["case"], line["metric"]) == ("bit flip", "silent")]
    assert all(share > 0.5 for share in flips.values())


def test_every_case_is_counted_once(lines: list[dict]) -> None:
    for case in {line["case"] for line in lines}:
        shares = [line for line in lines if line["case"] == case and line["rivals"]]
        assert sum(line["kdpipe"] for line in shares) == pytest.approx(1, abs=1e-3)
        for name in shares[0]["rivals"]:
            assert sum(line["rivals"][name] for line in shares) == pytest.approx(1, abs=1e-3), (case, name)
