"""The real SGLang, on CPU, against transformers: rows, order, chunks, ranks; what it starts is gone afterwards."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tests.conftest import Bench, Main
from tests.engines import FAULTS, engines_end, hosts
from tests.models import make_model, make_own, make_tokenizer
from tests.opened import teacher_in
from tests.stages.teacher.make_requests import NUMPY_DTYPES, WIDTH, make_request, pass_the_gate

from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.errors import ConfigError, EngineError, KdpipeError, TeacherError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.shard import commit_path
from kdpipe.manifests.specs import DataSpec, Dtype
from kdpipe.stages.extract import ExtractSpec, extract
from kdpipe.stages.extract.shards import fill, missing_shards
from kdpipe.stages.extract.staging import Staged, staged
from kdpipe.stages.models.own_code import code_digest
from kdpipe.stages.rows import TORCH_DTYPES, as_tensor
from kdpipe.stages.sglang.session import members
from kdpipe.stages.teacher.describe import describe_teacher
from kdpipe.stages.teacher.engine import Request, RowTarget
from kdpipe.stages.teacher.head import read_head
from kdpipe.stages.teacher.sglang_engine import SglangTeacher

pytestmark = pytest.mark.timeout(600)
SIZES = {"max_position_embeddings": 600}
LENGTHS = (1, 2, 3, 17, 600, 64, 128, 129, 300, 5, 511, 40, 1, 255, 600, 31, 90, 2, 470, 12)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    with engines_end():
        yield


def requests_into(path: Path, lengths: Sequence[int], dtype: str) -> list[Request]:
    """Requests of these lengths whose rows lie one after the other in a file, which is full of ones before."""
    made = [
        make_request(sample, length, dtype=dtype, probes=3 if sample % 5 == 0 else 1)
        for sample, length in enumerate(lengths)
    ]
    rows = sum(len(request.positions) for request in made)
    np.ones((rows, WIDTH), NUMPY_DTYPES[dtype]).tofile(path)
    array = np.memmap(path, NUMPY_DTYPES[dtype], "r+", shape=(rows, WIDTH))
    placed, first = [], 0
    for request in made:
        count = len(request.positions)
        target = RowTarget(array=array[first : first + count], path=path, offset=first * array.strides[0])
        placed.append(
            Request(
                sample=request.sample,
                token_ids=request.token_ids,
                positions=request.positions,
                probes=request.probes,
                scored=request.scored,
                target=target,
            )
        )
        first += count
    return placed


@torch.inference_mode()
def own_rows(folder: Path, dtype: str, requests: Sequence[Request]) -> torch.Tensor:
    """Transformers' rows of all requests, each sample alone, as float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=TORCH_DTYPES[dtype]).eval()
    return torch.cat(
        [
            model.model(torch.tensor(request.token_ids[None].astype(np.int64))).last_hidden_state[0][request.positions]
            for request in requests
        ]
    ).double()


USUAL = [("llama", "float32", "128")]
"""One, as an engine takes half a minute to start; every other model, dtype and chunk is for the long tests."""
LONG = [
    pytest.param(kind, dtype, chunk, marks=pytest.mark.slow)
    for kind, dtype, chunk in itertools.product(("llama", "qwen3"), ("float32", "bfloat16"), ("128", "-1"))
    if (kind, dtype, chunk) not in USUAL
]


@pytest.mark.parametrize(("kind", "dtype", "chunk"), [*USUAL, *LONG])
def test_every_row_is_there_in_order_and_transformers_own(kind: str, dtype: Dtype, chunk: str, tmp_path: Path) -> None:
    folder = make_model(kind, tmp_path / "teacher", dtype=dtype, sizes=SIZES)
    requests = requests_into(tmp_path / "rows", LENGTHS, dtype)
    options = EngineOptions(arguments=(("chunked_prefill_size", chunk),), timeout_s=120)
    engine = SglangTeacher(teacher_in(folder), dtype=dtype, device="cpu", options=options)
    try:
        head = read_head(describe_teacher(teacher_in(folder), dtype))
        measured = engine.canary(head, [request.token_ids[:50] for request in requests[3:6]])
        acks = list(engine.run([[request] for request in requests]))
    finally:
        engine.close()
    assert [ack.sample for ack in acks] == list(range(len(LENGTHS)))
    pass_the_gate(folder, dtype, requests, acks)
    found = torch.cat([as_tensor(np.array(request.target.array)) for request in requests]).double()
    truth = own_rows(folder, "float32", requests)
    error = (found - truth).norm() / truth.norm()
    if dtype == "float32":
        assert error <= 1e-5
        worst = ((found - truth).norm(dim=1) / truth.norm(dim=1)).max()
        assert worst <= 1e-5
        assert measured.row_error <= 1e-5
    else:
        theirs = (own_rows(folder, "bfloat16", requests) - truth).norm() / truth.norm()
        assert error <= 1.1 * theirs
        assert 0 < measured.row_error < 0.06


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [{"tp": 2}, {"dp": 2}], ids=["tp", "dp"])
def test_of_several_ranks_the_first_writes_each_row(ranks: dict[str, int], fault: Path, tmp_path: Path) -> None:
    fault.write_text("second rank")  # zeros there: two writers of equal rows would not show
    folder = make_model("llama", tmp_path / "teacher", sizes=SIZES)
    requests = requests_into(tmp_path / "rows", LENGTHS, "float32")
    engine = SglangTeacher(
        teacher_in(folder), dtype="float32", device="cpu", options=EngineOptions(timeout_s=120, **ranks)
    )
    try:
        acks = list(engine.run([requests[:7], requests[7:]]))
    finally:
        engine.close()
    pass_the_gate(folder, "float32", requests, acks)
    found = torch.cat([as_tensor(np.array(request.target.array)) for request in requests]).double()
    truth = own_rows(folder, "float32", requests)
    assert (found - truth).norm() <= 1e-5 * truth.norm()


def test_arguments_that_sglang_does_not_know_or_cannot_use_are_told(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "teacher")
    options = EngineOptions(arguments=(("chunked_prefil_size", "128"),))
    engine = SglangTeacher(teacher_in(folder), dtype="float32", device="cpu", options=options)
    with pytest.raises(ConfigError, match="did you mean 'chunked_prefill_size'"):
        list(engine.run([]))
    engine.close()
    options = EngineOptions(quantization="nonsense")
    engine = SglangTeacher(teacher_in(folder), dtype="float32", device="cpu", options=options)
    with pytest.raises(TeacherError, match=r"with quantization = nonsense .*Unknown quantization method"):
        list(engine.run([]))
    engine.close()
    engine.close()
    with pytest.raises(ConfigError, match="--deterministic: SGLang's attention on a CPU"):
        SglangTeacher(teacher_in(folder), dtype="float32", device="cpu", options=EngineOptions(deterministic=True))


# Faults inside the engine


@pytest.fixture
def fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose text is the fault of the engines that are started from here on."""
    file = tmp_path / "fault"
    monkeypatch.setenv("KDPIPE_FAULT", str(file))
    monkeypatch.setenv("PYTHONPATH", str(FAULTS), prepend=os.pathsep)
    return file


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder of a short name: paths of ZeroMQ's sockets have 107 characters at most, a worker's tmp_path has most."""
    with tempfile.TemporaryDirectory(prefix="kd-") as folder:
        yield Path(folder)


def spec_of(bench: Bench, **options: float | str) -> ExtractSpec:
    return ExtractSpec(
        teacher=bench.teacher,
        data=(bench.data,),
        data_spec=DataSpec(max_length=33, supervise="all"),  # many samples of one length, which a swap needs
        engine="sglang",
        device="cpu",
        options=EngineOptions(**options),  # type: ignore[arg-type]
    )


def fill_from(engine: SglangTeacher, plan: Staged) -> None:
    fill(plan.publish(), engine, plan.head, Silent(), missing_shards(plan.plan, plan.cache, None))


def test_what_the_engine_gets_wrong_is_caught_before_a_shard_is_committed(
    bench: Bench, fault: Path, tmp_path: Path
) -> None:
    spec = spec_of(bench, timeout_s=120)
    engine = SglangTeacher(teacher_in(bench.teacher), dtype="float32", device="cpu", options=spec.options)
    expected = {
        "swap": "the row is of another token or sample",
        "shift": "the row is of another token or sample",
        "drop": "hidden states came by",
        "nan": "is not finite",
        "silent": "without the sink's receipt",
        "misplace": "checksum",
    }
    try:
        for name, message in expected.items():
            fault.write_text(name)
            with staged(spec, tmp_path / name, Silent()) as plan, pytest.raises(KdpipeError, match=message):
                fill_from(engine, plan)
            assert not list((tmp_path / name / "commits").iterdir()), name
            assert not list((tmp_path / name / "shards").iterdir()), name
        fault.write_text("")
        with staged(spec, tmp_path / "swap", Silent()) as plan:
            fill_from(engine, plan)
        assert commit_path(tmp_path / "swap", 0).exists()
    finally:
        engine.close()


def test_a_teachers_own_code_runs_in_sglang_with_its_digest(bench: Bench, tmp_path: Path) -> None:
    teacher = make_own(make_tokenizer(make_model("llama", tmp_path / "own", vocab_size=304)), tmp_path / "ran")
    spec = replace(spec_of(bench, timeout_s=120, trust=code_digest(teacher)), teacher=teacher)
    assert extract(spec, tmp_path / "cache", Silent()).plan.head.architecture == "TinyForCausalLM"
    assert len((tmp_path / "ran").read_text().splitlines()) > 1, "here for the canary, and in SGLang"


@pytest.mark.slow
def test_a_sink_that_did_not_load_stops_the_run_before_anything_is_written(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "somebody_elses")
    with pytest.raises(KdpipeError, match="without the sink's receipt, so no row was written; is another plugin"):
        extract(spec_of(bench, timeout_s=120), tmp_path / "cache", Silent())
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("die", r"sample \d+ and \d+ more: SGLang died"),
        pytest.param("hang", r"sample \d+ and \d+ more: SGLang gave no sign for 8 s", marks=pytest.mark.slow),
    ],
)
def test_an_engine_that_dies_or_hangs_is_named_and_the_run_can_go_on(
    name: str, message: str, bench: Bench, fault: Path, tmp_path: Path
) -> None:
    spec = spec_of(bench, timeout_s=8)
    engine = SglangTeacher(teacher_in(bench.teacher), dtype="float32", device="cpu", options=spec.options)
    with staged(spec, tmp_path / "cache", Silent()) as plan:
        try:
            list(engine.run([]))  # up, and well
            fault.write_text(name)
            with pytest.raises(EngineError, match=message) as caught:
                fill_from(engine, plan)
        finally:
            engine.close()
    assert caught.value.exit_code == 75
    assert not list((tmp_path / "cache" / "commits").iterdir())
    assert not list((tmp_path / "cache" / "tmp").iterdir())


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["SIGKILL", "SIGTERM"]
)
def test_the_engine_ends_with_a_killed_extraction(
    number: signal.Signals, bench: Bench, fault: Path, scratch: Path, tmp_path: Path
) -> None:
    fault.write_text("hang")
    arguments = ["--teacher", bench.teacher, "--data", bench.data, "--cache", tmp_path / "cache", "--device", "cpu"]
    running = subprocess.Popen(
        [sys.executable, "-m", "kdpipe.pipeline.cli", "extract", "--engine", "sglang", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(scratch)},
    )
    until = time.monotonic() + 180
    while len(hosts()) < 5 and time.monotonic() < until:  # guard, host, tracker, scheduler, detokenizer
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.2)
    while not list(scratch.glob("*/canary")) and time.monotonic() < until:  # the engine is up
        time.sleep(0.2)
    time.sleep(1)
    leader = os.getsid(int(hosts()[0]))
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    while members(leader) and time.monotonic() < until:
        time.sleep(0.1)
    assert members(leader) == []
    assert not list(scratch.glob("kdpipe-sglang-*"))
    if number == signal.SIGTERM:
        assert (running.returncode, "stopped by SIGTERM; nothing was written" in said.splitlines()[-1]) == (75, True)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".cache")]


def test_a_student_trains_beside_it(bench: Bench, main: Main, tmp_path: Path) -> None:
    """kdpipe stream: rows go from SGLang's scheduler into the ring, and the first loss is that of the cached rows."""
    sets = ["train.max_steps=3", "train.dtype=float32", "train.batch_tokens=600", "train.save_every=0"]
    data = ["--data", bench.data, "--max-length", 128, "--heldout-fraction", 0.25, "--engine", "sglang"]
    words = {
        "live": ["stream", "--teacher", bench.teacher, *data],
        "cached": ["train", "--cache", bench.cache, "--nproc", 1],
    }
    losses = {}
    for name, first in words.items():
        code, _, err = main(*first, "--student", bench.student, "--output", tmp_path / name, "--set", *sets)
        assert code == 0, err
        events = [json.loads(line) for line in (tmp_path / name / "events.jsonl").read_text().splitlines()]
        losses[name] = [event["loss/mean"] for event in events if event["kind"] == "step"]
        assert ("teacher: canary: rows differ from transformers' own by" in err) == (name == "live")
    assert len(losses["live"]) == 3
    assert losses["live"] == pytest.approx(losses["cached"], rel=1e-4)
