"""Deriving: side-cars have what they say, serve what they can, and refuse the rest by name."""

# Shapes: R rows of a sample, V vocabulary.

import dataclasses
import json
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest
import torch
from tests.caches import fill_shard, grow_plan, make_cache, make_samples
from tests.conftest import Apart, Bench, Main
from tests.faults.powercut import FLUSHES_OF_A_COPY, Place, PowerCut
from tests.manifests.packing import PLENTY, tree
from tests.stages.deriving import K, asked, derive_until, derived
from tests.stages.ranks import Recorder, first_gradients

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CacheError, ConfigError, CorruptError
from kdpipe.manifests.fitted import CODEC_FILE, choose, open_fitted, require_kl
from kdpipe.manifests.pack import pack
from kdpipe.manifests.plan import read_plan
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.shard import blocks, shard_path
from kdpipe.manifests.sidecar import ARCHITECTURES, Kind, Sidecar
from kdpipe.manifests.specs import LossSpec, RunSpec, TrainSpec
from kdpipe.manifests.unpack import unpack
from kdpipe.pipeline.report.caches import read_cache
from kdpipe.stages.draws import uniform
from kdpipe.stages.evaluate import evaluate_student
from kdpipe.stages.exchange import Asked, derive
from kdpipe.stages.extract.convert import convert
from kdpipe.stages.loss import DIVERGENCES, DrawnSide
from kdpipe.stages.train import Training, check_training, train

CPU = torch.device("cpu")
KINDS: tuple[Kind, ...] = ("sampled", "logprob", "topk")
SERVED: dict[Kind, dict[str, Any]] = {
    "sampled": {"divergence": "forward_kl"},
    "logprob": {"divergence": "token_reverse_kl"},
    "topk": {"divergence": "top_k_kl", "options": {"k": K}},
}


@pytest.fixture(scope="module")
def sidecars(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Cache]:
    folder = tmp_path_factory.mktemp("sidecars")
    return {kind: derived(bench.cache, folder / kind, kind) for kind in KINDS}


@pytest.fixture
def whole(tmp_path: Path) -> Cache:
    """A cache that keeps every row, and grew."""
    folder = tmp_path / "whole"
    make_cache(folder, rows="all", has_bias=True)
    grow_plan(folder, make_samples(6, seed=9))
    for number in read_plan(folder).brought()[-1]:
        fill_shard(folder, number)
    return Cache.open(folder)


def logprobs_of(cache: Cache, index: int) -> np.ndarray:
    """The teacher's log-probabilities [R, V] at a sample's supervised tokens."""
    head, size = cache.head(), cache.plan.head.vocab_size
    logits = cache.rows(index).astype(np.float64) @ head.weight[:size].astype(np.float64).T
    if head.bias is not None:
        logits += head.bias[:size].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_the_rows_have_what_they_say_of_every_supervised_token(whole: Cache, tmp_path: Path) -> None:
    made = {kind: derived(whole.path, tmp_path / kind, kind) for kind in KINDS}
    for index in range(len(whole)):
        right, view = logprobs_of(whole, index), whole[index]
        tokens = view.token_ids[1:][view.supervised[1:]]
        at = np.arange(len(right))
        found = {kind: cache[index].rows for kind, cache in made.items()}
        np.testing.assert_allclose(found["logprob"][:, 0], right[at, tokens], atol=1e-5)
        values, ids = np.split(found["topk"], 2, axis=-1)
        np.testing.assert_allclose(values, -np.sort(-right, -1)[:, :K], atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(right, ids.astype(int), -1), values, atol=1e-5)
        drawn = DrawnSide.of(torch.from_numpy(np.array(found["sampled"])), 97)
        assert drawn.mean_logprob is not None
        keys = torch.from_numpy(index * 2**32 + np.arange(len(right)))  # of the row's number in the cache
        reach = torch.from_numpy(np.exp(right)).cumsum(-1)
        places = torch.searchsorted(reach, uniform(keys, K, 0) * reach[:, -1:], right=True)
        assert (places == drawn.hidden).float().mean() > 0.9 or not len(places)  # of fp32 some fall on the other side
        own = np.take_along_axis(right, drawn.hidden.long().numpy(), -1).mean(-1)
        np.testing.assert_allclose(drawn.mean_logprob, own, atol=1e-5)
    for cache in made.values():
        assert np.array_equal(cache.heldout(), whole.heldout())
        assert cache.plan.num_rows == whole.num_supervised().sum()
        assert cache.plan.fingerprint.data == whole.plan.fingerprint.data
        assert cache.plan.engine.arguments["cache"] == whole.plan.fingerprint.overall()
        assert cache.plan.engine.arguments["rows"] == whole.digest()


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(whole: Cache, tmp_path: Path) -> None:
    for kind in KINDS:
        first, second = (derived(whole.path, tmp_path / f"{name}-{kind}", kind) for name in "ab")
        assert tree(first.path) == tree(second.path)
    other = derived(whole.path, tmp_path / "other", "sampled", seed=1)
    assert (other[0].rows != Cache.open(tmp_path / "a-sampled")[0].rows).any()


@pytest.fixture
def coded(tmp_path: Path) -> Cache:
    """A cache of coded rows that grew."""
    folder = tmp_path / "coded"
    make_cache(folder, has_bias=True, codec="fisher kl=0.01")
    grow_plan(folder, make_samples(6, seed=9))
    for number in read_plan(folder).brought()[-1]:
        fill_shard(folder, number)
    return Cache.open(folder)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("of", ["whole", "coded"])
def test_one_that_was_killed_anywhere_goes_on_to_the_same_bytes(
    of: str, request: pytest.FixtureRequest, apart: Apart, tmp_path: Path
) -> None:
    whole = request.getfixturevalue(of)
    right = derived(whole.path, tmp_path / "right", "logprob")
    out = tmp_path / "out"
    for place in ("derive:planned", "shards:published#2", "derive:shard"):
        assert apart(derive_until, place, whole.path, out, "logprob") == -signal.SIGKILL, place
        assert not Cache.open(out).complete
    inodes = {path.name: path.stat().st_ino for path in (out / "shards").iterdir()}
    assert len(inodes) >= 3
    made = derived(whole.path, out, "logprob")
    assert tree(made.path) == tree(right.path)
    assert {name: (out / "shards" / name).stat().st_ino for name in inodes} == inodes
    assert derived(whole.path, out, "logprob").complete  # nothing is left to do


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("place", [None, *FLUSHES_OF_A_COPY], ids=str)
def test_one_that_was_cut_from_power_goes_on_and_every_flush_is_needed(
    place: Place | None, coded: Cache, tmp_path: Path
) -> None:
    live, cuts = tmp_path / "live", []
    live.mkdir()

    def cut(disk: PowerCut) -> None:
        cuts.append(tmp_path / f"cut{len(cuts)}")
        disk.restore(cuts[-1])

    with PowerCut(live, skip=[] if place is None else [place], after_flush=cut if place is None else None) as disk:
        made = derived(coded.path, live / "new" / "out", "logprob")
        disk.restore(tmp_path / "left")
    assert set(disk.places) == set(FLUSHES_OF_A_COPY)
    there = tmp_path / "left" / "new" / "out"
    assert (there.exists() and tree(there) == tree(made.path)) == (place is None)
    for left in cuts:
        assert tree(derived(coded.path, left / "new" / "out", "logprob").path) == tree(made.path), left.name
        shutil.rmtree(left)


def test_a_damaged_cache_is_refused_before_a_row_of_it_is_used(whole: Cache, tmp_path: Path) -> None:
    path, layout = shard_path(whole.path, 1), whole.shard(1).layout
    data = bytearray(path.read_bytes())
    data[layout.body + 1] ^= 8
    crcs = layout.tensors["crc32c"].view(data)  # the block agrees with its checksum, the shard not with its digest
    crcs[:] = [crc32c.crc32c(bytes(data[begin:end])) for begin, end in blocks(layout)]
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"000001.safetensors"):
        derived(whole.path, tmp_path / "out", "logprob")
    assert not Cache.open(tmp_path / "out").complete


def test_a_place_that_is_taken_is_refused(whole: Cache, tmp_path: Path) -> None:
    derived(whole.path, tmp_path / "out", "sampled")
    with pytest.raises(CacheError, match="another --kind: sampled, not logprob; choose another OUT"):
        derived(whole.path, tmp_path / "out", "logprob")
    with pytest.raises(CacheError, match="another --seed: 0, not 7"):
        derived(whole.path, tmp_path / "out", "sampled", seed=7)
    with pytest.raises(CacheError, match="it is a whole cache, and none that this command makes"):
        derived(whole.path, whole.path, "sampled")
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="it exists and is not a cache"):
        derived(whole.path, tmp_path / "file", "sampled")
    with pytest.raises(ConfigError, match="lies in the cache"):
        derived(whole.path, whole.path / "in", "sampled")
    with pytest.raises(ConfigError, match="it has 12 drawn tokens of a row: derive from the cache it was made of"):
        derived(tmp_path / "out", tmp_path / "again", "logprob")
    with pytest.raises(ConfigError, match="98 tokens of a vocabulary of 97; keep fewer"):
        derive(whole, tmp_path / "x", Asked(sidecar=Sidecar(kind="topk", entries=98)), CPU, Silent())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out", "whole"]


def test_of_a_coded_cache_the_rows_are_read_as_they_are_decoded_and_it_is_packed_as_any(tmp_path: Path) -> None:
    coded = tmp_path / "coded"
    convert(make_cache(tmp_path / "raw", num_samples=80), coded, choose("fisher", share=0.3), Silent())
    cache, made = Cache.open(coded), derived(coded, tmp_path / "out", "logprob")
    assert made.plan.engine.arguments["codec"] == "fisher bytes=0.3"
    assert made.plan.settings.codec == "raw"
    assert CODEC_FILE not in made.plan.teacher_files
    for index in range(0, len(cache), 7):
        view = cache[index]
        tokens = view.token_ids[1:][view.supervised[1:]]
        right = logprobs_of(cache, index)[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(made[index].rows[:, 0], right, atol=1e-5)
    loss = open_fitted(coded, cache.plan).record.kl_mean
    assert made.plan.engine.arguments["codec_kl"] == repr(loss)
    info, told = made.info(), read_cache(made.path).info
    assert (info["source_codec"], info["source_codec_kl_mean"]) == (cache.plan.settings.codec, loss)
    assert told is not None
    assert told.codec["codec of its cache"] == f"{cache.plan.settings.codec}, mean KL {loss:.2g} nats"
    assert told.codec["bias"] == info["bias"]
    assert "codec" not in told.codec
    require_kl(made.path, made.plan, loss)
    said = r"the codec 'fisher bytes=0.3' of the cache it was made of loses a mean KL of .*allow more, or derive from"
    with pytest.raises(CacheError, match=said):
        require_kl(made.path, made.plan, loss / 2)
    unknown = {name: value for name, value in made.plan.engine.arguments.items() if name != "codec_kl"}
    before = made.plan.changed(engine=made.plan.engine.model_copy(update={"arguments": unknown}))
    with pytest.raises(CacheError, match=r"of the cache it was made of loses was not measured"):
        require_kl(made.path, before, 1.0)
    pack(cache, tmp_path / "packed", Silent(), most_bytes=PLENTY)
    assert tree(unpack(tmp_path / "packed", tmp_path / "back", Silent(), most_bytes=PLENTY).path) == tree(coded)


def training_of(bench: Bench, cache: Path, output: Path, *, dtype: str = "float32", **loss: Any) -> Training:
    return Training(
        student=bench.student,
        caches=(cache,),
        output=output,
        spec=RunSpec(
            train=TrainSpec.model_validate({"lr": 1e-3, "batch_tokens": 10**6, "dtype": dtype, "max_steps": 2}),
            loss=LossSpec.model_validate(loss),
        ),
        device="cpu",
    )


def test_a_student_learns_from_a_side_car_what_it_would_from_whole_rows(
    bench: Bench, sidecars: dict[Kind, Cache], tmp_path: Path
) -> None:
    for kind in ("logprob", "topk"):
        runs = {
            name: training_of(bench, cache, tmp_path / f"{name}-{kind}", **SERVED[kind], kd_weight=0.8)
            for name, cache in (("whole", bench.cache), ("side", sidecars[kind].path))
        }
        first_gradients(runs, tmp_path)
        (right, sums, _), (found, theirs, scores) = (torch.load(tmp_path / name) for name in runs)
        assert theirs["kd"] == pytest.approx(sums["kd"], rel=1e-5)
        for name, gradient in right.items():
            assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
        assert "heldout_ce" in scores
        assert not {"heldout_kl", "heldout_reverse_kl", "top1_agreement", "teacher_ce"} & set(scores)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_a_side_car_are_the_same_in_a_pass_of_bfloat16(
    kind: Kind, bench: Bench, sidecars: dict[Kind, Cache], tmp_path: Path
) -> None:
    """Most ids above 256 are not in bfloat16, to which a sharded student casts the floats that it is given."""
    runs = {
        dtype: training_of(bench, sidecars[kind].path, tmp_path / f"in {dtype}", dtype=dtype, **SERVED[kind])
        for dtype in ("float32", "bfloat16")
    }
    first_gradients(runs, tmp_path)
    (_, sums, _), (_, theirs, _) = (torch.load(tmp_path / dtype) for dtype in runs)
    assert theirs["kd"] == pytest.approx(sums["kd"], rel=5e-3)


def test_a_student_learns_from_drawn_tokens_about_what_it_would_from_whole_rows(bench: Bench, tmp_path: Path) -> None:
    """The more are drawn, the nearer: with 400 a row the noise is a few percent of the gradient."""
    derive(
        Cache.open(bench.cache), tmp_path / "many", Asked(sidecar=Sidecar(kind="sampled", entries=400)), CPU, Silent()
    )
    derived(bench.cache, tmp_path / "few", "sampled")
    runs = {
        name: training_of(bench, cache, tmp_path / f"of {name}", divergence="forward_kl")
        for name, cache in (("whole", bench.cache), ("m", tmp_path / "many"), ("f", tmp_path / "few"))
    }
    first_gradients(runs, tmp_path)
    (right, sums, _), (many, of_many, _), (few, of_few, _) = (torch.load(tmp_path / name) for name in runs)
    assert of_many["kd"] == pytest.approx(sums["kd"], rel=0.02)
    assert of_few["kd"] == pytest.approx(sums["kd"], rel=0.15)
    size = torch.stack([gradient.norm() for gradient in right.values()]).norm()
    off, far = (
        torch.stack([(each[name] - gradient).norm() for name, gradient in right.items()]).norm() / size
        for each in (many, few)
    )
    assert off < 0.1
    assert 3 < far / off < 9  # sqrt(400 / 12) = 5.8


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_says_what_it_trains_on_and_measures_no_divergence(
    kind: Kind, bench: Bench, sidecars: dict[Kind, Cache], tmp_path: Path
) -> None:
    recorder, sidecar = Recorder(), asked(kind).sidecar
    found = train(training_of(bench, sidecars[kind].path, tmp_path / "out", **SERVED[kind]), recorder)
    assert any("measure it on a whole cache of its teacher: kdpipe eval" in note for note in recorder.notes)
    assert any(f"has {sidecar.has}: a loss on it is {sidecar.bias}" in note for note in recorder.notes)
    assert "heldout_ce" in found
    assert "heldout_kl" not in found
    steps = [fields for name, fields in recorder.events if name == "step"]
    assert ("top1_agreement" in steps[0]) == (kind == "topk")
    again = Recorder()
    found = evaluate_student(
        tmp_path / "out",
        [sidecars[kind].path],
        heldout_fraction=None,
        device="cpu",
        dtype="float32",
        batch_tokens=4096,
        progress=again,
    )
    assert "heldout_kl" not in found
    assert any("no divergence from its teacher is measured; for that take a cache of" in note for note in again.notes)


REFUSED: list[tuple[Kind, dict[str, Any], str]] = [
    ("sampled", {"divergence": "reverse_kl"}, r"drawn tokens of a row: reverse_kl needs more; take forward_kl, soft_"),
    ("sampled", {"divergence": "sampled_kl"}, r"sampled_kl needs more; .* sampled_kl with loss.options.samples=12"),
    ("sampled", {"divergence": "token_reverse_kl"}, "token_reverse_kl needs more"),
    ("sampled", {"temperature": 2.0}, r"loss.temperature: .* at temperature 1 alone"),
    ("logprob", {"divergence": "forward_kl"}, "own tokens: forward_kl needs more; take token_reverse_kl"),
    ("logprob", {"divergence": "top1_ce"}, "top1_ce needs more; take token_reverse_kl"),
    ("topk", {"divergence": "forward_kl"}, r"12 tokens of a row: forward_kl needs more; take top_k_kl or top_k_rev"),
    ("topk", {"divergence": "token_reverse_kl"}, "token_reverse_kl needs more"),
]


@pytest.mark.parametrize(("kind", "loss", "problem"), REFUSED, ids=str)
def test_a_loss_that_needs_more_is_refused_with_what_is_served(
    kind: Kind, loss: dict[str, Any], problem: str, bench: Bench, sidecars: dict[Kind, Cache], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_training(training_of(bench, sidecars[kind].path, tmp_path / "out", **loss), 1)


def test_drawn_tokens_do_not_teach_the_samples_of_another_teacher(
    bench: Bench, sidecars: dict[Kind, Cache], tmp_path: Path
) -> None:
    both = (bench.cache, sidecars["sampled"].path)
    for mix, problem in (("losses", "it teaches alone"), ("distributions", "its distribution not")):
        training = dataclasses.replace(training_of(bench, bench.cache, tmp_path / mix, teacher_mix=mix), caches=both)
        with pytest.raises(ConfigError, match=problem):
            check_training(training, 1)


def test_what_a_kind_says_that_it_serves_is_what_the_table_of_divergences_allows() -> None:
    for kind in ARCHITECTURES.values():
        sidecar = asked(kind).sidecar
        fitting = {
            name
            for name, divergence in DIVERGENCES.items()
            if divergence.is_of(
                sidecar,
                {
                    option: K
                    for option in ("k", "samples")
                    if option in divergence.options and name != "hierarchical_ranking"
                },
            )
        }
        assert fitting == {name for name in DIVERGENCES if name in sidecar.serves.replace(",", " ").split()}


def test_the_command_makes_what_info_says_and_what_repair_and_derive_make_again(
    bench: Bench, main: Main, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, said, _ = main("cache", "derive", bench.cache, out, "--kind", "sampled", "--device", "cpu", "--json")
    found = json.loads(said)
    assert (code, found["row_bytes"], found["num_rows"]) == (0, 4 + 12 * 2, Cache.open(bench.cache).plan.num_rows)
    told = json.loads(main("cache", "info", out, "--json")[1])
    assert told["rows_have"] == "12 drawn tokens of a row"
    assert told["serves"].startswith("forward_kl, soft_cross_entropy")
    assert told["bias"].startswith("unbiased")
    assert told["engine"]["arguments"]["tokens"] == "12"
    before = tree(out)
    path = shard_path(out, 0)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    code, _, err = main("cache", "verify", out)
    again = f"kdpipe cache derive {bench.cache} {out} --kind sampled --device cpu --json"
    assert code == 1
    assert f"kdpipe cache repair {shlex.quote(str(out))} ; then run again: " in err
    assert again in err
    assert main("cache", "repair", out)[0] == 2
    for path in (out / "teacher").iterdir():
        path.unlink()
    assert main("cache", "derive", bench.cache, out, "--kind", "sampled", "--device", "cpu")[0] == 0
    assert {name: data for name, data in tree(out).items() if not name.startswith("runs")} == {
        name: data for name, data in before.items() if not name.startswith("runs")
    }
    shutil.move(out, tmp_path / "moved")
    (tmp_path / "moved" / "commits" / "000000.json").unlink()
    again = again.replace(str(out), str(tmp_path / "moved")).removesuffix(" --json")
    assert again in main("cache", "verify", tmp_path / "moved")[2]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ("derive", "C", "x", "--kind", "logprob", "--samples", "3"),
            "--samples: it is of use with --kind sampled alone",
        ),
        (("derive", "C", "x", "--kind", "topk", "--seed", "3"), "--seed: it is of use with --kind sampled alone"),
        (("derive", "C", "x", "--kind", "sampled", "--top-k", "3"), "--top-k: it is of use with --kind topk alone"),
        (("derive", "C", "x", "--kind", "topk", "--top-k", "999"), "--top-k: 999 tokens of a vocabulary of 300"),
        (("derive", "S", "x", "--kind", "sampled"), "derive from the cache it was made of"),
        (("export", "S", "x"), "it has 12 drawn tokens of a row: export the cache that it was made of"),
        (("compare", "C", "S"), "it has 12 drawn tokens of a row: these have no distance"),
        (("verify", "S", "--recompute", "3", "--teacher", "t"), "verify the cache that it was made of"),
    ],
    ids=str,
)
def test_what_a_side_car_is_not_for_is_refused(
    words: tuple[str, ...], problem: str, bench: Bench, sidecars: dict[Kind, Cache], main: Main, tmp_path: Path
) -> None:
    places = {"C": bench.cache, "S": sidecars["sampled"].path, "x": tmp_path / "x", "t": bench.teacher}
    code, _, err = main("cache", *(places.get(word, word) for word in words))
    assert (code, problem in err) == (4, True), err


@pytest.mark.parametrize("kind", KINDS)
def test_every_check_of_a_cache_is_one_of_a_side_car(kind: Kind, sidecars: dict[Kind, Cache], main: Main) -> None:
    assert main("cache", "verify", sidecars[kind].path, "--deep")[0] == 0


def test_a_derive_that_is_refused_leaves_no_log_in_a_cache(bench: Bench, main: Main) -> None:
    """Defect: the log of one into its own source became what that cache was made with."""
    before = sorted((bench.cache / "runs").iterdir())
    code, _, err = main("cache", "derive", bench.cache, bench.cache, "--kind", "logprob", "--device", "cpu")
    assert (code, "it is a whole cache" in err) == (4, True)
    assert sorted((bench.cache / "runs").iterdir()) == before
