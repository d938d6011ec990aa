"""Import: top-k rows of other projects as a cache, which serves what they say and refuses the rest."""

# Shapes: n tokens of a sample, R rows of it, K tokens of each.

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.conftest import Bench, Main
from tests.stages.ranks import Recorder, first_gradients

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import ConfigError, DataError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.run import read_run
from kdpipe.manifests.specs import LossSpec, RunSpec, TrainSpec
from kdpipe.stages.exchange import export_cache, import_rows
from kdpipe.stages.loss import Head, Side, TopKSide, distill, pose, reference_distill_loss
from kdpipe.stages.loss.reference import loss_of_logits
from kdpipe.stages.train import Training, check_training, train

K = 12


def export(cache: Cache, out: Path, columns: str) -> Path:
    export_cache(cache, out, columns=columns, files="parquet", top_k=K, device=torch.device("cpu"), progress=Silent())
    return out


def import_from(folder: Path, cache: Path, bench: Bench) -> Cache:
    import_rows(cache, [folder], bench.teacher, heldout_fraction=0.25, progress=Silent())
    return Cache.open(cache)


@pytest.fixture(scope="module")
def imported(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("imported")
    return import_from(export(Cache.open(bench.cache), folder / "top", "top-k"), folder / "cache", bench)


def training_of(bench: Bench, cache: Path, output: Path, **loss: Any) -> Training:
    return Training(
        student=bench.student,
        caches=(cache,),
        output=output,
        spec=RunSpec(
            # A step is all samples: the two caches have them in another order.
            train=TrainSpec(lr=1e-3, batch_tokens=10**6, dtype="float32", max_steps=2),
            loss=LossSpec.model_validate({"divergence": "top_k_kl", "options": {"k": K}} | loss),
        ),
        device="cpu",
    )


@pytest.mark.parametrize("columns", ["top-k", "distillkit", "axolotl"])
def test_what_was_exported_is_what_is_imported(columns: str, bench: Bench, tmp_path: Path) -> None:
    exact = Cache.open(bench.cache)
    folder = export(exact, tmp_path / "out", columns)
    found = import_from(folder, tmp_path / "cache", bench)
    source = pq.read_table(export(exact, tmp_path / "plain", "top-k") / "train-00000.parquet").to_pylist()
    source += pq.read_table(tmp_path / "plain" / "test-00000.parquet").to_pylist()
    by_text = {tuple(row["input_ids"]): row for row in source}
    assert len(found) == len(source)
    rows = 0
    for index, view in enumerate(found):
        row = by_text[tuple(view.token_ids.tolist())]
        place = {position: number for number, position in enumerate(row["positions"])}
        at = (np.flatnonzero(view.supervised) - 1).tolist()
        if columns != "distillkit":  # whose mask leaves the first target of an answer out
            assert at == row["positions"]
        logprobs, ids = np.split(view.rows, 2, axis=-1)
        right = np.array([row["logprobs"][place[t]] for t in at])
        if columns == "axolotl":
            right = right - np.log(np.exp(right).sum(-1, keepdims=True))
        np.testing.assert_allclose(logprobs, right, atol=1e-6)
        assert ids.astype(int).tolist() == [row["token_ids"][place[t]] for t in at]
        if columns == "top-k":
            assert found.samples.column("content_id")[index].tobytes().hex() == row["content_id"]
        rows += len(at)
    assert found.plan.num_rows == rows
    assert found.info()["biased"] == f"imported: {K} tokens of a row alone"
    assert found.info()["complete"]


def test_a_student_learns_what_it_would_from_the_whole_rows(bench: Bench, imported: Cache, tmp_path: Path) -> None:
    for divergence in ("top_k_kl", "top_k_reverse_kl"):
        runs = {
            name: training_of(bench, cache, tmp_path / f"{name}-{divergence}", divergence=divergence, kd_weight=0.8)
            for name, cache in (("exact", bench.cache), ("imported", imported.path))
        }
        first_gradients(runs, tmp_path)
        (whole, sums, _), (some, theirs, scores) = (torch.load(tmp_path / name) for name in runs)
        assert theirs["kd"] == pytest.approx(sums["kd"], rel=1e-5)
        for name, gradient in whole.items():
            assert (some[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
        assert "heldout_ce" in scores
        assert not {"heldout_kl", "heldout_reverse_kl", "top1_agreement", "teacher_ce"} & set(scores)


def test_a_run_says_that_it_is_biased(bench: Bench, imported: Cache, tmp_path: Path) -> None:
    recorder = Recorder()
    train(training_of(bench, imported.path, tmp_path / "out"), recorder)
    assert any(f"has {K} tokens of a row: a loss on it is biased: of all" in note for note in recorder.notes)
    record = read_run(tmp_path / "out")
    assert record is not None
    assert record.metrics is not None
    assert "heldout_kl" not in record.metrics


@pytest.mark.parametrize(
    ("loss", "problem"),
    [
        ({"divergence": "forward_kl", "options": {}}, r"loss.divergence: .* has 12 tokens of a row: forward_kl needs"),
        ({"options": {"k": K + 1}}, r"loss.divergence: .*top_k_kl needs more; take top_k_kl .* of at most 12"),
        ({"options": {}}, r"loss.divergence: .*top_k_kl needs more"),
        ({"temperature": 2.0}, r"loss.temperature: .* at temperature 1 alone"),
    ],
)
def test_a_loss_that_needs_more_is_refused(
    loss: dict[str, Any], problem: str, bench: Bench, imported: Cache, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_training(training_of(bench, imported.path, tmp_path / "out", **loss), 1)


def test_beside_a_whole_teacher_its_losses_are_averaged_and_its_distribution_not(
    bench: Bench, imported: Cache, tmp_path: Path
) -> None:
    both = (bench.cache, imported.path)
    for mix in ("losses", "distributions"):
        training = dataclasses.replace(training_of(bench, bench.cache, tmp_path / mix, teacher_mix=mix), caches=both)
        if mix == "losses":
            check_training(training, 1)
            continue
        with pytest.raises(ConfigError, match="its losses can be averaged, its distribution not"):
            check_training(training, 1)


def test_a_top_k_side_is_the_definition_over_its_tokens_and_one_bucket() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(23, 57, generator=generator) for _ in range(2))
    top = teacher.log_softmax(-1).topk(9, -1)
    side = TopKSide.of(torch.cat([top.values, top.indices.float()], -1), 57)
    eye = torch.eye(57)
    for divergence, options in (("top_k_kl", {"k": 9.0}), ("top_k_reverse_kl", {"k": 4.0}), ("top1_ce", {})):
        wide = [each.double() for each in (student, eye, teacher, eye)]
        right = float(reference_distill_loss(*wide, divergence=divergence, **options).kd)
        loss = LossSpec(divergence=divergence, options=options)
        problem = pose(Side(student.clone().requires_grad_(), Head(eye)), [side], None, loss=loss)
        assert float(distill(problem).kd) == pytest.approx(right, rel=1e-5)
        assert float(loss_of_logits(problem, student, [side.dense(57)]).kd) == pytest.approx(right, rel=1e-5)


RECORD: dict[str, Any] = {
    "input_ids": [5, 6, 7, 8],
    "positions": [1, 2],
    "token_ids": [[1, 2], [3, 4]],
    "logprobs": [[-0.5, -1.0], [-0.1, -3.0]],
}
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "another format": ({"positions": None}, "none of the formats that are known"),
    "a position beyond": ({"positions": [1, 3]}, r":1: positions that are not rising, or beyond its 4 tokens"),
    "positions that fall": ({"positions": [2, 1]}, "positions that are not rising"),
    "a row too few": ({"token_ids": [[1, 2]]}, r":1: 2 positions, \(1, 2\) ids"),
    "rows of other lengths": ({"token_ids": [[1, 2], [3]]}, "rows of 'token_ids' have 1 to 2 entries"),
    "a token twice": ({"token_ids": [[1, 1], [3, 4]]}, "a row has a token twice"),
    "a foreign token": ({"token_ids": [[1, 2], [3, 400]]}, "likely tokens beyond the vocabulary of 300"),
    "a foreign text": ({"input_ids": [5, 6, 7, 900]}, "token ids beyond the vocabulary of 300"),
    "logits": ({"logprobs": [[7.0, 3.0], [-0.1, -3.0]]}, "sum to 1117: are they logits"),
    "nan": ({"logprobs": [[float("nan"), -1.0], [-0.1, -3.0]]}, "not finite"),
    "no list": ({"positions": 1}, "'positions' is not a list"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_record_that_is_wrong_is_named_with_its_place(kind: str, bench: Bench, tmp_path: Path) -> None:
    changes, problem = BROKEN[kind]
    record = {name: value for name, value in (RECORD | changes).items() if value is not None}
    pq.write_table(pa.table({name: [value] for name, value in record.items()}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=problem) as caught:
        import_from(tmp_path / "a.parquet", tmp_path / "cache", bench)
    assert "a.parquet" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_files_of_other_numbers_of_tokens_do_not_go_together(bench: Bench, tmp_path: Path) -> None:
    wide = RECORD | {"token_ids": [[1, 2, 3], [3, 4, 5]], "logprobs": [[-0.5, -1.5, -3.0], [-0.5, -1.5, -3.0]]}
    for name, record in (("a", RECORD), ("b", wide)):
        pq.write_table(pa.table({key: [value] for key, value in record.items()}), tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"b.parquet:1: 3 tokens of a row, those before have 2"):
        import_from(tmp_path, tmp_path / "cache", bench)


@pytest.mark.parametrize(
    ("line", "problem"),
    [("exact_k: 3", "exact_k is 3"), ("delta_encoding: true", "delta_encoding is true"), ("d:", "d")],
)
def test_distillkit_rows_that_were_approximated_are_refused(
    line: str, problem: str, bench: Bench, tmp_path: Path
) -> None:
    folder = export(Cache.open(bench.cache), tmp_path / "out", "distillkit")
    path, name = folder / "compression_config.yaml", line.partition(":")[0]
    lines = [each for each in path.read_text().splitlines() if not each.startswith(f"{name}:")]
    path.write_text("\n".join(lines + ([line] if line != "d:" else [])) + "\n")
    with pytest.raises(DataError, match=problem):
        import_from(folder, tmp_path / "cache", bench)
    path.unlink()
    with pytest.raises(DataError, match=r"compression_config.yaml: it is missing"):
        import_from(folder, tmp_path / "cache", bench)


def test_the_commands_go_both_ways_and_verify_what_was_imported(bench: Bench, main: Main, tmp_path: Path) -> None:
    assert main("cache", "export", bench.cache, tmp_path / "out", "--top-k", "5")[0] == 0
    code, out, _ = main(
        *("cache", "import", tmp_path / "c", "--from", tmp_path / "out", "--tokenizer", bench.teacher, "--json")
    )
    found = json.loads(out)
    assert (code, found["top_k"], found["num_rows"]) == (0, 5, Cache.open(bench.cache).plan.num_rows)
    assert 0 < found["left_out"] < 1
    assert main("cache", "verify", tmp_path / "c", "--deep")[0] == 0
    code, _, err = main("cache", "export", tmp_path / "c", tmp_path / "again")
    assert (code, "has 5 tokens of a row: export the cache" in err) == (4, True)
    code, _, err = main("cache", "import", tmp_path / "c", "--from", tmp_path / "out", "--tokenizer", bench.teacher)
    assert (code, "it is there already" in err) == (4, True)
