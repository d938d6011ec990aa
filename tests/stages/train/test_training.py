"""What a training is asked to do: refused before anything is written, or said, where it is not what was meant."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Bench
from tests.stages.ranks import Recorder
from torch._inductor import config as inductor

from kdpipe.manifests.errors import CacheError, ConfigError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.specs import DataSpec, FsdpSpec, LossSpec, RunSpec, TrainSpec
from kdpipe.stages.evaluate import evaluate_student
from kdpipe.stages.extract import ExtractSpec, extract
from kdpipe.stages.models import folder
from kdpipe.stages.train import train
from kdpipe.stages.train.training import Training, check_training

TRAIN = TrainSpec(batch_tokens=900, dtype="float32", max_steps=1)


def training_for(bench: Bench, output: Path, *caches: Path, **data: float) -> Training:
    """One step of the bench's student."""
    spec = RunSpec(data=DataSpec.model_validate(data), train=TRAIN, loss=LossSpec())
    return Training(student=bench.student, caches=caches or (bench.cache,), output=output, spec=spec, device="cpu")


def cache_of(bench: Bench, folder: Path, lines: list[str], max_length: int) -> Path:
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(lines))
    spec = DataSpec(max_length=max_length, heldout_fraction=0.25)
    extract(
        ExtractSpec(teacher=bench.teacher, data=(folder / "data.jsonl",), data_spec=spec), folder / "cache", Silent()
    )
    return folder / "cache"


def test_the_same_data_extracted_with_other_settings_is_not_trained_on_twice(bench: Bench, tmp_path: Path) -> None:
    lines = bench.data.read_text().splitlines(keepends=True)
    again = cache_of(bench, tmp_path / "again", lines, max_length=100)
    with pytest.raises(CacheError, match=r"all its 60 texts are in .* leave one of the two caches out"):
        check_training(training_for(bench, tmp_path / "out", bench.cache, again), 1)
    assert not (tmp_path / "out").exists()
    some = cache_of(bench, tmp_path / "some", [*lines[:5], *(line.replace("?", "!") for line in lines[5:12])], 100)
    training, recorder = training_for(bench, tmp_path / "out", bench.cache, some), Recorder()
    check_training(training, 1)
    train(training, recorder)
    assert [note for note in recorder.notes if f"5 of the 12 texts of {some} are in {bench.cache} too" in note]


@pytest.mark.parametrize("place", ["student", "cache", "teacher", "cache/runs"])
def test_an_output_in_a_model_or_a_cache_is_refused(place: str, bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bench.cache.parent / place)
    before = sorted(bench.cache.parent.rglob("*"))
    for output in (bench.cache.parent / place / "out", tmp_path / "link" / "far" / "out"):
        with pytest.raises(ConfigError, match=r"out: it lies in the (model|cache) .*; choose another --output"):
            check_training(training_for(bench, output), 1)
        with pytest.raises(ConfigError, match=r"out: it lies in the (model|cache) .*; choose another --cache"):
            extract(ExtractSpec(teacher=bench.teacher, data=(bench.data,)), output, Silent())
    assert sorted(bench.cache.parent.rglob("*")) == before


def test_starting_again_what_is_finished_is_refused_and_says_how(bench: Bench, tmp_path: Path) -> None:
    """Defect: --resume never was taken without a word, and nothing was trained."""
    training = training_for(bench, tmp_path / "out")
    again = dataclasses.replace(training, resume="never")
    check_training(again, 1)
    train(again, Silent())
    with pytest.raises(ConfigError, match=r"--resume never has nothing to do; to train it again remove the folder or"):
        check_training(again, 1)
    check_training(training, 1)


def test_where_nothing_was_held_out_the_next_command_is_one_that_measures(bench: Bench, tmp_path: Path) -> None:
    """Defect: the command that train named failed, and eval said that the cache was at fault."""
    training, recorder = training_for(bench, tmp_path / "out", heldout_fraction=0), Recorder()
    train(training, recorder)
    command = f"kdpipe eval --student {training.output} --cache OTHER --heldout-fraction 1"
    assert recorder.notes[-1].endswith(
        f"nothing was held out of its training, so measure it on a cache of other texts: {command}"
    )
    with pytest.raises(ConfigError, match=r"out: it was trained with 0\.0 of the samples held out, which is none of"):
        measure(training.output, bench.cache, None)
    assert measure(training.output, bench.cache, 1.0)["num_tokens"] > 0
    with pytest.raises(ConfigError, match=r"no sample of this cache is held out; give a larger --heldout-fraction"):
        measure(bench.student, bench.cache, 0.0)


def measure(student: Path, cache: Path, fraction: float | None) -> dict[str, float]:
    return evaluate_student(
        student,
        [cache],
        heldout_fraction=fraction,
        device="cpu",
        dtype="auto",
        batch_tokens=900,
        progress=Silent(),
    )


def test_a_process_asks_about_the_student_once(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked, then trained: its code is looked at once, its weights are digested once."""
    asked: list[str] = []
    for name in ("allowed_code", "digest_model"):
        own = getattr(folder, name)

        def counted(path: Path, *rest: object, name: str = name, own: Callable[..., object] = own) -> object:
            asked.append(name if path == bench.student else "another")
            return own(path, *rest)

        monkeypatch.setattr(folder, name, counted)
    training = training_for(bench, tmp_path / "out")
    train(training, Silent(), check_training(training, 1))
    assert sorted(each for each in asked if each != "another") == ["allowed_code", "digest_model"]


def test_what_the_launcher_found_is_not_found_again_by_a_rank(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = training_for(bench, tmp_path / "out")
    training = dataclasses.replace(training, inputs=check_training(training, 1).inputs)
    monkeypatch.setattr(folder, "digest_model", lambda *_: pytest.fail("the weights were digested again"))
    train(training, Silent())


def on_ranks(training: Training, **way: object) -> Training:
    train = training.spec.train.model_copy(update={"fsdp": FsdpSpec.model_validate(way)})
    return dataclasses.replace(training, spec=training.spec.model_copy(update={"train": train}))


def test_groups_of_ranks_that_leave_some_over_are_refused(bench: Bench, tmp_path: Path) -> None:
    training = on_ranks(training_for(bench, tmp_path / "out"), shard_size=2)
    check_training(training, 4)
    with pytest.raises(ConfigError, match=r"^E-CONFIG train.fsdp.shard_size: 3 ranks do not make groups of 2; take a"):
        check_training(training, 3)
    assert not (tmp_path / "out").exists()


def test_compiling_without_a_compiler_is_refused(bench: Bench, tmp_path: Path) -> None:
    training = on_ranks(training_for(bench, tmp_path / "out"), compile=True)
    check_training(training, 1)
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigError, match=r"train.fsdp.compile: torch.compile needs a C\+\+ compiler .* missing here"),
    ):
        check_training(training, 1)
    assert not (tmp_path / "out").exists()
