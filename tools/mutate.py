"""Single-line faults put into a copy of the project, one at a time: do the tests that are named notice each?

    tools/faults/*.toml:  [[fault]]
                          file = "stages/train/schedule.py"            what is changed
                          old = "math.pi * done"                 text that occurs in it once
                          new = "math.pi * done / 2"             what stands there instead
                          tests = ["tests/stages/train/test_schedule.py"]   files or test ids; one of them must fail
                          says = "half a cosine"                 optional: what goes wrong then
                          harmless = "why nothing can change"    optional: the fault is listed, not run

python tools/mutate.py [NAME ...]   all faults, or those whose list, file or words have a NAME in them
python tools/mutate.py --check      only that every `old` occurs once and every test exists; tests/tools/test_mutate.py

Invariant: the working tree is never changed. A fault counts as noticed only where a test failed that passes without it;
a run that ends otherwise (nothing collected, a fault that does not compile) is an error of the list.
Cost: one start of pytest a fault, some ten seconds each.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "tools" / "faults"
PACKAGES = ("manifests", "stages", "pipeline")
FAULT_S, ALL_S = 600, 3600
"""Longest run of a fault's tests, and of all tests without a fault. A fault that makes them hang is noticed."""
FIRST_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One entry of a list; see the module."""

    where: str
    """Name of the list and number of the entry in it."""
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    says: str = ""
    harmless: str = ""

    @property
    def title(self) -> str:
        return f"{self.where} {self.file}: {self.says or self.new.strip() or 'removed ' + self.old.strip()}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a fault: "noticed", "harmless", or what is wrong with it or with the tests."""

    verdict: str
    detail: str = ""


def read_lists(folder: Path = LISTS) -> list[Fault]:
    """Every fault of every list, in their order. Raises TypeError for a key that a fault has not."""
    return [
        Fault(where=f"{path.stem}#{number}", **entry | {"tests": tuple(entry.get("tests", ()))})
        for path in sorted(folder.glob("*.toml"))
        for number, entry in enumerate(tomllib.loads(path.read_text()).get("fault", []), start=1)
    ]


def staleness(fault: Fault, root: Path = ROOT) -> str:
    """Why the entry is no longer a fault of today's files, "" where it is one."""
    path = root / fault.file
    count = path.read_text().count(fault.old) if path.is_file() else 0
    if count != 1 or fault.old == fault.new:
        return f"`old` occurs {count} times in {fault.file}" if count != 1 else "`new` is `old`"
    if not fault.tests and not fault.harmless:
        return "it names no test"
    for test in fault.tests:
        file, *names = re.sub(r"\[.*", "", test).split("::")
        text = (root / file).read_text() if (root / file).is_file() else None
        if text is None or not all(re.search(rf"\b(def|class) {name}\b", text) for name in names):
            return f"there is no test {test}"
    return ""


@contextmanager
def copied(fault: Fault | None = None) -> Iterator[Path]:
    """A copy of the files that git knows or would add, as they lie here, with the fault in it; removed afterwards."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    with tempfile.TemporaryDirectory(prefix="kdpipe-mutate-") as folder:
        tree = Path(folder)
        for name in filter(None, names):
            if os.path.lexists(ROOT / name):
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
        if fault is not None:
            path = tree / fault.file
            path.write_text(path.read_text().replace(fault.old, fault.new))
        yield tree


def environment(tree: Path) -> dict[str, str]:
    """That of processes which import kdpipe from the copy.

    The installed kdpipe is a map from its packages to the working tree, asked after sys.path: what PYTHONPATH has of
    the same name is found first, by every process that a test starts. tools/typing has links to the three packages.
    """
    own = {"PYTHONPATH": str(tree / "tools/typing"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | own


def require_copy(tree: Path) -> None:
    """Every package must come from the copy, or no fault would be in what is tested."""
    code = "\n".join(f"import kdpipe.{name}; print(kdpipe.{name}.__path__[0])" for name in PACKAGES)
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=tree, env=environment(tree), check=True, capture_output=True, text=True)
    for line in found.stdout.split():
        if not Path(line).resolve().is_relative_to(tree.resolve()):
            raise SystemExit(f"mutate: the tests would import {line}, not the copy in {tree}")


def pytest_in(tree: Path, tests: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """The tests in the copy, up to the first that fails. Raises subprocess.TimeoutExpired."""
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "--tb=line", "-rfE", *tests]
    return subprocess.run(
        command, cwd=tree, env=environment(tree), capture_output=True, text=True, timeout=timeout_s, check=False
    )


def try_fault(fault: Fault) -> Outcome:
    """Put the fault in and run its tests."""
    if stale := staleness(fault):
        return Outcome("stale", stale)
    if fault.harmless:
        return Outcome("harmless", fault.harmless)
    with copied(fault) as tree:
        try:
            ended = pytest_in(tree, fault.tests, FAULT_S)
        except subprocess.TimeoutExpired:
            return Outcome("noticed", f"no end after {FAULT_S} s")
    failed = FIRST_FAILED.search(ended.stdout)
    if ended.returncode == 1 and failed:
        return Outcome("noticed", failed[1])
    if ended.returncode == 0:
        return Outcome("SURVIVED", "all of " + " ".join(fault.tests) + " pass")
    return Outcome("broken", f"pytest ended with {ended.returncode}: {(ended.stdout + ended.stderr).strip()[-300:]}")


def require_passing(faults: Sequence[Fault]) -> None:
    """What is to notice faults must pass without one, in a copy as well."""
    tests = sorted({test for fault in faults for test in fault.tests if not fault.harmless})
    with copied() as tree:
        require_copy(tree)
        ended = pytest_in(tree, tests, ALL_S)
    if ended.returncode:
        raise SystemExit(f"mutate: the tests fail without any fault:\n{ended.stdout[-3000:]}{ended.stderr[-1000:]}")
    print(f"without a fault: {ended.stdout.strip().splitlines()[-1]}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every fault is noticed, or shown to be harmless; 1 where one is not, or is no fault of today's files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults whose list, file or words have it in them")
    parser.add_argument("--jobs", type=int, default=1, help="faults tried at a time, each on one core")
    parser.add_argument("--check", action="store_true", help="only whether every entry is still a fault; runs no test")
    asked = parser.parse_args(arguments)
    faults = [each for each in read_lists() if not asked.names or any(name in each.title for name in asked.names)]
    if not faults:
        raise SystemExit(f"mutate: no fault has {' or '.join(asked.names) or 'an entry'} in it")
    if asked.check:
        stale = [f"stale     {fault.title}: {why}" for fault in faults if (why := staleness(fault))]
        print("\n".join([*stale, f"{len(faults) - len(stale)} of {len(faults)} faults are of today's files"]))
        return 1 if stale else 0
    runnable = [fault for fault in faults if not staleness(fault)]
    if any(not fault.harmless for fault in runnable):
        require_passing(runnable)
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(max(asked.jobs, 1)) as pool:
        for fault, outcome in zip(faults, pool.map(try_fault, faults), strict=True):
            outcomes.append(outcome)
            print(f"{outcome.verdict:9} {fault.title} ({outcome.detail})", flush=True)
    counts = {name: sum(each.verdict == name for each in outcomes) for name in ("noticed", "harmless")}
    tried = len(outcomes) - counts["harmless"]
    share = f" ({100 * counts['noticed'] / tried:.0f} %)" if tried else ""
    print(f"{counts['noticed']} of {tried} faults noticed{share}, {counts['harmless']} shown to change nothing")
    return 0 if counts["noticed"] == tried else 1


if __name__ == "__main__":
    sys.exit(main())
