"""The bench of codecs draws what it has printed."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RIVALS = {"top-64": 0.4, "top-8": 0.05}


def lines_of(teacher: str, *cases: tuple[str, float, float]) -> list[dict]:
    """Cases of a name, a share and a KL; the percentile is four times it, and a tenth of the KL are other tokens."""
    found = []
    for case, share, kl in (("raw", 1.0, 0.0), *cases):
        name = {"bench": "codec", "case": case, "teacher": teacher}
        found.append({**name, "metric": "bytes", "kdpipe": share, "raw_bytes": 1000, "rivals": RIVALS})
        rivals = {"rivals": {"top-64": 0.5, "top-8": 1.5}, "rivals_p99": {"top-64": 1.0, "top-8": 3.0}}
        found.append({**name, "metric": "error", "kdpipe": kl, "p99": 4 * kl, "top1": 1 - kl / 10, **rivals})
    return found


def test_the_plot_has_every_codec_of_both_teachers_and_top_k_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "bench"))
    plot, drawn = importlib.import_module("codec_plot"), []
    monkeypatch.setattr(plot.pyplot, "close", drawn.append)  # the figure is looked at before it goes
    cases = [("int8", 0.5, 0.001), ("fisher kl=1e-3", 0.3, 0.002), ("fisher kl=1e-2", 0.2, 0.01)]
    plot.draw([*lines_of("one", *cases), *lines_of("two", *cases[1:])], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    curves = [{line.get_label(): line.get_xydata().tolist() for line in axis.lines} for axis in drawn[0].axes]
    assert [line.get_label() for line in drawn[0].axes[0].lines].count("top-k") == 1
    fisher = [[200, 0.01], [300, 0.002]]
    assert curves[0]["fisher, one"] == curves[0]["fisher, two"] == fisher
    assert curves[0]["int8, one"] == [[500, 0.001]]
    assert curves[0]["top-k"] == [[50, 1.5], [400, 0.5]]
    assert curves[1]["top-k"] == [[50, 3.0], [400, 1.0]]
    assert curves[1]["fisher, one"] == [[200, 0.04], [300, 0.008]]
    assert curves[2]["fisher, one"] == [[200, pytest.approx(0.001)], [300, pytest.approx(0.0002)]]
    assert curves[2]["top-k"] == []


def test_what_the_bench_prints_is_drawn_without_measuring_again(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("".join(json.dumps(line) + "\n" for line in lines_of("one", ("int8", 0.5, 0.001))))
    command = ["tools/bench/codec.py", "--lines", tmp_path / "lines", "--plot", tmp_path / "plot.png"]
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, timeout=120)
    assert (tmp_path / "plot.png").exists()
