"""Provenance: digests that say what something was made of, whatever its path, its host or its modification time.

Cost: a model is read once at the speed of its disk (xxh3-128, 25 GB/s a core).
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import xxhash

from kdpipe.manifests.adapter import BASE_KEY, adapter_config, base_of, is_adapter, with_tokenizer
from kdpipe.manifests.durable import canonical

PIECE = 1 << 24
# What a config says of itself that does not change what the model computes.
COSMETIC = {"_name_or_path", "transformers_version", "use_cache"}
COSMETIC_ADAPTER = {BASE_KEY, "revision", "inference_mode", "peft_version"}
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""What goes with a model beside config and weights: how texts become ids and ids texts, and where an answer ends."""
SHORTEST_DIGEST = 12
"""Characters that a digest may be cut to where a person gives it."""


def digest_file(path: Path) -> str:
    """xxh3-128 of a file's bytes."""
    with open(path, "rb") as file:
        return digest_stream(file)


def digest_stream(file: BinaryIO) -> str:
    """xxh3-128 of what is left of an open file."""
    digest = xxhash.xxh3_128()
    while piece := file.read(PIECE):
        digest.update(piece)
    return digest.hexdigest()


def digest_json(value: object) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def num_bytes(folder: Path) -> int:
    """Size of the files in a model folder; of an adapter's, those of its base are counted too."""
    return sum(path.stat().st_size for place in {folder, base_of(folder)} for path in place.iterdir() if path.is_file())


def digest_code(files: Mapping[str, bytes]) -> str:
    """sha256 over source files, in the order of their names: each name, a zero byte, the sha256 of its bytes."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(os.fsencode(name) + b"\0" + hashlib.sha256(files[name]).digest())
    return digest.hexdigest()


def digest_model(folder: Path, code: str = "", digest: Callable[[Path], str] = digest_file) -> str:
    """sha256 over a model folder's config and its safetensors files (name, size, xxh3-128).

    code: digest of the folder's own code, where that is run; without any the digest is what it was before there was one
    digest: xxh3-128 of a file, for a caller that knows some
    An adapter's is over its own config and weights and the digest of its base.
    """
    if is_adapter(folder):
        settings = adapter_config(folder)
        own = {key: settings[key] for key in sorted(settings.keys() - COSMETIC_ADAPTER)}
        base = digest_model(base_of(folder), code, digest)
        return digest_json({"adapter": own, "weights": _digest_weights(folder, digest), "base": base})
    # Infinity, as in Mamba 2's configs, has no place in canonical JSON: its name stands for it.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"), parse_constant=str)
    made_of = {
        "config": {key: config[key] for key in sorted(config.keys() - COSMETIC)},
        "weights": _digest_weights(folder, digest),
    }
    return digest_json(made_of | ({"code": code} if code else {}))


def _digest_weights(folder: Path, digest: Callable[[Path], str]) -> list[tuple[str, int, str]]:
    return [(path.name, path.stat().st_size, digest(path)) for path in sorted(folder.glob("*.safetensors"))]


def digest_tokenizer(folder: Path) -> str:
    """sha256 over the files of a model folder that are its tokenizer's: name and xxh3-128 of each."""
    folder = with_tokenizer(folder)
    return digest_json([(name, digest_file(folder / name)) for name in TOKENIZER_FILES if (folder / name).is_file()])
