"""What SGLang is started with, where a model brings code of its own."""

from pathlib import Path

import pytest

from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.errors import ConfigError
from kdpipe.stages.sglang.arguments import host_environment, server_arguments


def test_sglang_trusts_code_only_where_a_digest_allows_it(tmp_path: Path) -> None:
    arguments = [
        server_arguments(tmp_path, "float32", 512, "cpu", EngineOptions(trust=trust), {}) for trust in (None, "0" * 64)
    ]
    assert [each.get("trust_remote_code", False) for each in arguments] == [False, True]


def test_an_engine_argument_cannot_trust_code_past_the_digest(tmp_path: Path) -> None:
    options = EngineOptions(arguments=(("trust_remote_code", "true"),))
    with pytest.raises(ConfigError, match="'trust_remote_code' is set by kdpipe"):
        server_arguments(tmp_path, "float32", 512, "cpu", options, {})


def test_its_modules_lie_in_the_engines_own_folder(tmp_path: Path) -> None:
    env = host_environment(tmp_path, "cpu", EngineOptions())
    assert Path(env["HF_MODULES_CACHE"]).parent == tmp_path
