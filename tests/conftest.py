"""What most tests of the stages start from: a tiny teacher, its cache, a student; made once for all of them."""

import dataclasses
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import torch
from tests import tokenizers
from tests.chats import write_chats
from tests.models import make_model, make_tokenizer

from kdpipe.manifests.cores import GIVEN, THREADS
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.specs import DataSpec
from kdpipe.pipeline import cli

Main = Callable[..., tuple[int, str, str]]

LONGEST = "teacher/test_sglang_engine.py"

# Two workers share the machine with what else runs there: how long an example takes says nothing of the code.
hypothesis.settings.register_profile("kdpipe", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("kdpipe")


def pytest_configure() -> None:
    """Where the tests run in a shell's background, Ctrl-C is ignored by them and by all that they start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of several workers the first begins with the longest file, which would otherwise keep one of them at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Folders of a whole small run. The student is narrower than the teacher and pads its vocabulary further."""

    teacher: Path
    student: Path
    data: Path
    cache: Path


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    from kdpipe.stages.extract import ExtractSpec, extract

    folder = tmp_path_factory.mktemp("bench")
    teacher = make_tokenizer(make_model("qwen3", folder / "teacher", vocab_size=304))
    student = make_tokenizer(make_model("llama", folder / "student", vocab_size=320, seed=1, sizes={"hidden_size": 32}))
    data = write_chats(folder / "data.jsonl", 60)
    spec = ExtractSpec(teacher=teacher, data=(data,), data_spec=DataSpec(max_length=128, heldout_fraction=0.25))
    extract(spec, folder / "cache", Silent())
    return Bench(teacher=teacher, student=student, data=data, cache=folder / "cache")


@pytest.fixture(scope="session")
def far_bench(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The same with a student that has a tokenizer and a chat template of its own."""
    folder = tmp_path_factory.mktemp("far") / "student"
    make_model("llama", folder, vocab_size=560, seed=1, sizes={"hidden_size": 32})
    return dataclasses.replace(bench, student=tokenizers.save_chatting(tokenizers.unigram(540), folder))


Apart = Callable[..., int]


@pytest.fixture(scope="session")
def failing_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/faults/failing.c, compiled."""
    library = tmp_path_factory.mktemp("faults") / "failing.so"
    source = Path(__file__).parent / "faults" / "failing.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture(scope="session")
def apart(failing_library: Path) -> Apart:
    """Run a function of a module in a process of its own, which starts in a moment; its exit code.

    apart(function, *args, kill_after=SECONDS) kills it with SIGKILL then, if it still runs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kdpipe.stages.train", "kdpipe.stages.extract", "tests.stages.ranks"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(failing_library))  # it does nothing until it is armed
        multiprocessing.forkserver.ensure_running()

    def run(function: Callable[..., object], *args: object, kill_after: float | None = None) -> int:
        process = context.Process(target=function, args=args)
        process.start()
        process.join(120 if kill_after is None else kill_after)
        if process.exitcode is None:
            process.kill()
            process.join()
            assert kill_after is not None, "the process hangs"
        assert process.exitcode is not None
        return process.exitcode

    return run


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of its own of a size, "8m"."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False).returncode:
            pytest.skip("mounting a small disk takes a privileged user; RLIMIT_FSIZE is tested in its place")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes apart: how a sum is divided among threads decides its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def main(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Main:
    """Run the command line in this process: exit code, stdout, stderr."""
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    for key in (THREADS, GIVEN):  # live modes set them for their process, which is this one here
        before = os.environ.get(key)
        monkeypatch.setenv(key, before or "")
        if before is None:
            monkeypatch.delenv(key)

    def run(*args: object) -> tuple[int, str, str]:
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)}
        cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
        try:
            with pytest.raises(SystemExit) as done:
                cli.main([str(arg) for arg in args])
        finally:
            os.sched_setaffinity(0, cores)
            torch.set_num_threads(threads)
            for number, handler in before.items():
                signal.signal(number, handler)
        out, err = capfd.readouterr()
        return int(done.value.code or 0), out, err

    return run
