"""Provenance: digests that say what something was made of, whatever its path, its host or its modification time.

Cost: a model is read once at the speed of its disk (xxh3-128, 25 GB/s a core).
"""

import hashlib
import json
from pathlib import Path

import xxhash

from kdpipe.manifests.durable import canonical

PIECE = 1 << 24
# What a config says of itself that does not change what the model computes.
COSMETIC = {"_name_or_path", "transformers_version", "use_cache"}


def digest_file(path: Path) -> str:
    """xxh3-128 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def digest_json(value: object) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def num_bytes(folder: Path) -> int:
    """Size of the files in a model folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def digest_model(folder: Path) -> str:
    """sha256 over a model folder's config and its safetensors files (name, size, xxh3-128)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = [(path.name, path.stat().st_size, digest_file(path)) for path in sorted(folder.glob("*.safetensors"))]
    return digest_json({"config": {key: config[key] for key in sorted(config.keys() - COSMETIC)}, "weights": weights})
