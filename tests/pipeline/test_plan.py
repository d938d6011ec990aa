"""kdpipe plan on real models: rates, a sweep's sum, and what it says of how it knows."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from tests.conftest import Bench, Main

from kdpipe.manifests.sample import Sample, content_id
from kdpipe.manifests.specs import load
from kdpipe.pipeline.prospect import Prospect, prospect_of
from kdpipe.pipeline.steps import disk_of, steps_of
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
    assert found["fits"] is found["room"]["fits"] is True
    assert found["room"]["files"] == found["num_files"] > 2 * found["num_shards"]
    assert "by the rate that was given" in found["how"][0]
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "runs").exists()
    assert "runs" not in main("plan", "--config", plan)[1].split(), "a list is for programs"


@pytest.mark.parametrize(
    ("sets", "runs"),
    [
        (("sweep.grid={}",), 1),
        (("sweep.grid={}", "train.max_steps=1", "train.epochs=10"), 1),
        (("sweep.grid={}", "data.subset=0.3"), 1),
        (("data.subset=0.5",), 4),
        (('sweep.grid={"data.heldout_fraction"=[0.25, 0.6]}',), 2),
    ],
)
def test_what_pays_is_reckoned_of_the_steps_that_are_planned(
    main: Main, plan: Path, sets: tuple[str, ...], runs: int
) -> None:
    rate = ("--teacher-tokens-per-second", 1000)
    code, out, err = main("plan", "--config", plan, *rate, "--json", "--set", *sets, "train.dtype=float32")
    assert code == 0, err
    found = json.loads(out)
    trained = found["students"]["trained_tokens"]
    passes = Fraction(trained, found["num_tokens"] * runs)
    students = found["break_even_students"]
    assert students * passes > 1 >= (students - 1) * passes
    assert found["live_over_cached"][f"{runs}"] == pytest.approx(found["total"]["live_over_cached"])
    assert found["epochs"] / found["break_even_epochs"]["1"] == pytest.approx(float(passes))
    assert sum(run["passes"] for run in found["runs"]) == pytest.approx(float(passes) * runs)
    seconds = found["estimated_seconds"]
    assert found["dtype"] == "float32", "as the student's: one speed of both"
    assert seconds["train"] / seconds["extract"] == pytest.approx(
        6 * found["student_params"] * trained / (2 * found["teacher_params"] * found["num_tokens"])
    )


def test_steps_and_tokens_are_those_of_the_cache_before_there_is_one(main: Main, plan: Path, bench: Bench) -> None:
    sets = ('sweep.grid={"data.heldout_fraction"=[0.25, 0.5], "data.subset"=[1.0, 0.4]}', "train.epochs=2.5")

    def foreseen(*more: str) -> Prospect:
        run = load(plan, (*sets, *more))
        return prospect_of(plan, run, steps_of(plan, run, disk_of(run), (*sets, *more)), (*sets, *more))

    there = foreseen(f"cache.path={bench.cache}").work
    code, out, err = main("plan", "--config", plan, "--json", "--set", *sets)
    assert code == 0, err
    found = json.loads(out)["students"]
    assert there is not None
    assert (found["num_steps"], found["trained_tokens"]) == (there.num_steps, there.num_tokens)
    assert foreseen().work == there


def test_a_plan_without_a_sample_to_train_on_has_nothing_to_break_even(main: Main, plan: Path) -> None:
    code, out, err = main("plan", "--config", plan, "--json", "--set", "data.heldout_fraction=1")
    assert code == 0, err
    found = json.loads(out)
    assert (found["students"]["trained_tokens"], found["live_over_cached"]["4"]) == (0, 0)
    assert (found["epochs"], found["break_even_students"], found["break_even_epochs"]) == (0, None, None)


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


def test_a_probe_shows_a_table_of_codecs(main: Main, plan: Path) -> None:
    table = main("plan", "--config", plan, "--probe", 12)[1].partition("\n\n")[2].splitlines()
    assert " ".join(table[0].split()) == "codec share of raw kl mean kl p99 same top"
    assert table[1].startswith("int8 ")
    assert [line[: line.index("=")] for line in table[2:]] == ["fisher kl"] * len(table[2:])
    assert len(table) > 3


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
