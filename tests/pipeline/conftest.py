"""Runs the command line as a user does: in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def python() -> Run:
    """Run Python with arguments, where kdpipe can be imported; the finished process with its text."""
    paths = [str(ROOT / "tools" / "typing"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    env = {key: value for key, value in env.items() if key not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}

    def run(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=cwd, check=False)

    return run


@pytest.fixture
def kdpipe(python: Run) -> Run:
    return lambda *args, **options: python("-m", "kdpipe.pipeline.cli", *args, **options)
