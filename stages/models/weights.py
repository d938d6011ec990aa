"""Weights: which safetensors files of a model folder hold them, and whether a model got every one of them.

Cost: the headers of the files are read, the weights are not.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kdpipe.manifests.adapter import ADAPTER_CONFIG
from kdpipe.manifests.errors import InputError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SHOWN_NAMES = 3
"""Names of weights in an error message; their number is given too."""

WRITERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "peft",
}
"""Programs by what they put before every name."""


def weight_files(folder: Path, error: type[InputError]) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it, by `model.safetensors` or its index.

    A file that is not whole, or lacks a tensor that the index says it has, is an error.
    Raises `error`, and what safetensors and json raise.
    """
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(_names(folder / WEIGHTS), folder / WEIGHTS)
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {key: folder / name for key, name in index.items()}
        names = {file: _shard_names(file, error) for file in sorted(set(files.values()))}
        for key, file in files.items():
            if key not in names[file]:
                raise error(f"{INDEX} says that '{key}' is in this file, which lacks it; copy both again", where=file)
        return files
    raise error(_what_is_there(folder), where=folder)


def stored_dtype(files: Mapping[str, Path]) -> torch.dtype:
    """The dtype of the first weight; float32 for one that no model computes in."""
    for name, file in files.items():
        with safe_open(file, "pt") as opened:
            return DTYPES.get(opened.get_slice(name).get_dtype(), torch.float32)
    return torch.float32


def require_fitting(model: Any, files: Mapping[str, Path], error: type[InputError], folder: Path) -> None:
    """Weights that model and files have by the same name have as many elements, and numbers where it has numbers.

    Else memory would be made for noise, or integers be cast. Elements and not shapes: transformers transposes some
    while it loads.
    """
    built = model.state_dict()
    for file in sorted(set(files.values())):
        with safe_open(file, "pt") as opened:
            for name in sorted(built.keys() & set(opened.keys())):
                stored = opened.get_slice(name)
                if math.prod(stored.get_shape()) != built[name].numel():
                    raise error(_mismatch(name, stored.get_shape(), built[name].shape), where=folder)
                if built[name].is_floating_point() and not stored.get_dtype().startswith(("F", "BF")):
                    raise error(
                        f"'{name}' holds {stored.get_dtype()} in the weight files, not floating point numbers, and "
                        "config.json names no quantization; copy the model again",
                        where=file,
                    )


def require_all(loading: Mapping[str, Any], names: Iterable[str], error: type[InputError], folder: Path) -> None:
    """Every weight of the model was in the files, and nothing else: transformers fills what lacks with noise.

    loading: output_loading_info of from_pretrained; names: those in the files
    """
    missing, left = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    if missing or left:
        said = [f"{_listed(missing)} missing"] if missing else []
        said += [f"{_listed(left)} left over"] if left else []
        raise error(f"its weights are not those of its config: {'; '.join(said)}{_cause(missing, names)}", where=folder)
    for name, stored, expected in sorted(loading["mismatched_keys"]):
        raise error(_mismatch(name, stored, expected), where=folder)


def _mismatch(name: str, stored: Iterable[int], expected: Iterable[int]) -> str:
    return (
        f"'{name}' has shape {list(stored)} in the weight files and {list(expected)} by config.json; "
        "is it the config of another model?"
    )


def _shard_names(file: Path, error: type[InputError]) -> set[str]:
    if not file.is_file():
        raise error(f"{INDEX} names {file.name}, which is missing; copy it again", where=file.parent)
    return set(_names(file))


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:  # checks that the file is as long as its header says
        return list(opened.keys())


def _what_is_there(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin")):
        return "only pytorch_model.bin here, which kdpipe does not read; convert to safetensors"
    if any(folder.glob("adapter_model.*")):
        return f"no weights: neither {WEIGHTS} nor {INDEX}, only an adapter without its {ADAPTER_CONFIG}; copy it again"
    return f"no weights: neither {WEIGHTS} nor {INDEX}"


def _listed(names: list[str]) -> str:
    """3 weights ('a', 'b', ...)"""
    shown = ", ".join(f"'{name}'" for name in names[:SHOWN_NAMES])
    return f"{len(names)} weight{'s' * (len(names) != 1)} ({shown}{', ...' * (len(names) > SHOWN_NAMES)})"


def _cause(missing: list[str], names: Iterable[str]) -> str:
    """The likely cause: a prefix before the names in the files, else a model that was not saved whole."""
    names = set(names)
    for prefix in {name.removesuffix(missing[0]) for name in names if missing and name.endswith(missing[0])}:
        if all(prefix + name in names for name in missing):
            writer = f" ({WRITERS[prefix]})" if prefix in WRITERS else ""
            return f". The names in the files start with '{prefix}'{writer}; save them again without it"
    return ". Is this the whole model, saved with save_pretrained?"
