"""Adapter: a folder of low-rank weights beside a base model in another folder, as peft writes it; read without torch.

    adapter_config.json (names the base), adapter_model.safetensors, base.json (kdpipe's: the base's digest)

What such a folder stands for is its base with the adapter merged in. Its tokenizer is its own where it has one.
"""

import json
from pathlib import Path

from kdpipe.manifests.errors import InputError, StudentError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_RECORD = "base.json"
"""Beside an adapter of ours: {"digest": of the base that it was trained on}."""
BASE_KEY = "base_model_name_or_path"
OWN_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
"""A folder with one of them has a tokenizer of its own."""


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def base_of(folder: Path, error: type[InputError] = StudentError) -> Path:
    """The model folder that an adapter is for; the folder itself where it is no adapter.

    Raises `error` for a base that is not a folder here, or is an adapter too; ValueError for a config that is no JSON.
    """
    if not is_adapter(folder):
        return folder
    config = folder / ADAPTER_CONFIG
    named = adapter_config(folder).get(BASE_KEY)
    places = [Path(named), folder / named] if isinstance(named, str) and named else []
    base = next((place for place in places if place.is_dir()), None)
    if base is None:
        raise error(
            f"{BASE_KEY} is {named!r}, which is no folder here; put the path of the base model there", where=config
        )
    if is_adapter(base):
        raise error(f"its base {base} is an adapter too; merge that one into its own base first", where=config)
    return base


def adapter_config(folder: Path) -> dict[str, object]:
    """The JSON object in an adapter's config. Raises ValueError, OSError."""
    found = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{ADAPTER_CONFIG} is not one JSON object")
    return found


def with_tokenizer(folder: Path) -> Path:
    """Where the tokenizer of a model folder lies: there, or with the base of an adapter that has none."""
    if is_adapter(folder) and not any((folder / name).is_file() for name in OWN_TOKENIZER):
        return base_of(folder)
    return folder
