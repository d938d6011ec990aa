"""What several tests of whole runs compare with."""

import pytest
from tests.conftest import Bench
from tests.integration.running import SETS, ended, started


@pytest.fixture(scope="session")
def offline(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the student of a cache."""
    output = tmp_path_factory.mktemp("offline") / "out"
    words = ["--student", bench.student, "--cache", bench.cache, "--output", output, "--set", *SETS]
    code, _, err = ended(started("train", *words, "--nproc", "1"))
    assert code == 0, err
    return (output / "model.safetensors").read_bytes()
