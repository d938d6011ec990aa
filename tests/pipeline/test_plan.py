"""kdpipe plan on real models: rates, a sweep's sum, and what it says of how it knows."""

import json
from pathlib import Path

import pytest
from tests.conftest import Bench, Main

from kdpipe.manifests.sample import Sample, content_id
from kdpipe.stages.extract.probe import Drawn


@pytest.fixture
def plan(bench: Bench, tmp_path: Path) -> Path:
    """A run file with a sweep of four students."""
    path = tmp_path / "run.toml"
    path.write_text(
        f'teacher.path = "{bench.teacher}"\nstudent.path = "{bench.student}"\ncache.path = "{tmp_path / "cache"}"\n'
        f'[data]\npaths = "{bench.data}"\nmax_length = 128\nheldout_fraction = 0.25\n'
        f'[train]\noutput = "{tmp_path / "runs"}"\nbatch_tokens = 600\n'
        "[sweep.grid]\ntrain.epochs = [1, 3]\ntrain.seed = [0, 1]\n"
    )
    return path


def test_a_sweep_is_summed_over_its_students_at_a_given_rate(main: Main, plan: Path, tmp_path: Path) -> None:
    code, out, err = main("plan", "--config", plan, "--teacher-tokens-per-second", 1000, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["teacher"] == {
        "tokens_per_second": 1000,
        "rate": "given",
        "seconds": found["num_tokens"] / 1000,
        "hours": pytest.approx(found["num_tokens"] / 3.6e6),
    }
    names = ["epochs-1_seed-0", "epochs-1_seed-1", "epochs-3_seed-0", "epochs-3_seed-1"]
    assert [run["name"] for run in found["runs"]] == names
    assert found["students"]["seconds"] == pytest.approx(sum(run["seconds"] for run in found["runs"]))
    assert found["students"]["longest_hours"] == pytest.approx(3 * found["students"]["shortest_hours"], rel=0.01)
    assert found["room"]["output_bytes"] == sum(run["output_bytes"] for run in found["runs"])
    live = (found["students"]["seconds"] + sum(run["trained_tokens"] for run in found["runs"]) / 1000) / 3600
    assert found["total"]["live_teacher_hours"] == pytest.approx(live)
    assert found["break_even_epochs"]["4"] == 0.25
    assert found["fits"] is found["room"]["fits"] is True
    assert found["room"]["files"] == found["num_files"] > 2 * found["num_shards"]
    assert "by the rate that was given" in found["how"][0]
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "runs").exists()
    assert "runs" not in main("plan", "--config", plan)[1].split(), "a list is for programs"


def test_a_probe_runs_the_teacher_for_real(main: Main, plan: Path) -> None:
    code, out, err = main("plan", "--config", plan, "--probe", 5, "--json")
    assert code == 0, err
    found = json.loads(out)
    probe = found["probe"]
    assert (probe["engine"], probe["device"], probe["num_samples"]) == ("transformers", "cpu", 5)
    assert probe["tokens_per_second"] == pytest.approx(probe["num_tokens"] / probe["seconds"])
    assert found["teacher"]["tokens_per_second"] == probe["tokens_per_second"]
    assert (found["teacher"]["rate"], found["teacher"]["seconds"]) == (
        "measured",
        pytest.approx(found["num_tokens"] / probe["tokens_per_second"]),
    )


def test_two_rates_are_refused(main: Main, plan: Path) -> None:
    code, _, err = main("plan", "--config", plan, "--probe", 5, "--teacher-tokens-per-second", 9)
    assert (code, err.count("\n")) == (4, 1)
    assert "take one of the two" in err
    assert main("plan", "--config", plan, "--teacher-tokens-per-second", "inf")[0] == 4
    assert main("plan", "--config", plan, "--probe", 0)[0] == 4


def test_samples_are_drawn_by_content_whatever_their_order(bench: Bench) -> None:
    import numpy as np

    samples = [
        Sample(
            content_id=content_id(number),
            source="d",
            line=number,
            token_ids=np.arange(3, dtype=np.int32),
            supervised=np.ones(3, bool),
        )
        for number in range(100)
    ]

    def drawn(count: int, seen: list[Sample]) -> list[int]:
        draw = Drawn(count)
        for sample in seen:
            draw.see(sample)
        return [sample.line for sample in draw.samples()]

    forth, back = drawn(10, samples), drawn(10, samples[::-1])
    assert forth == sorted(forth)
    assert sorted(back) == forth
    assert max(forth) - min(forth) > 30, "from all over"
    assert drawn(200, samples) == list(range(100))
