"""Version: which SGLang is installed, and whether kdpipe was tried with it."""

import importlib.metadata

import torch

from kdpipe.manifests.errors import ConfigError

TRIED = ("0.5.23",)
"""Versions of SGLang that the tests ran with."""


def sglang_version() -> str:
    """SGLang's version and torch's. Raises ConfigError where it is absent or was not tried."""
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "sglang is not installed; on a GPU machine: pip install 'kdpipe[sglang]', without a GPU: make sglang",
            where="--engine sglang",
        ) from None
    if version not in TRIED:
        raise ConfigError(
            f"sglang {version} is installed, kdpipe was tried with {' and '.join(TRIED)}; install one of these, "
            "or use --engine transformers",
            where="--engine sglang",
        )
    return f"sglang {version} torch {torch.__version__}"
