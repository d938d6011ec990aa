"""An adapter on a model, by peft: put beside its layers to be trained, or merged into their weights.

    inject -> base_layer.weight [out, in] frozen, lora_A [r, in], lora_B [out, r]:  x -> W x + scale * B (A x)

Invariant: `own_weights` names every weight as the model without the adapter does, whatever peft has put around it.
Room: peft is imported when an adapter is met, and not before; it takes seconds and is an extra.
"""

# Shapes: r rank of an adapter, out and in widths of a layer.

import copy
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from kdpipe.manifests.adapter import ADAPTER_WEIGHTS
from kdpipe.manifests.errors import InputError

NAME = "default"
"""Of the adapter, inside peft."""
PREFIX = "base_model.model."
"""Before the names in an adapter's file, by peft's own rule."""
ODD = "Found missing adapter keys"
"""How peft's warning begins where a file lacks weights that its config names."""


def require_peft(error: type[InputError], where: object) -> None:
    """Raises `error` where peft is not installed."""
    if find_spec("peft") is None:
        raise error("adapters need peft, which is not installed: pip install 'kdpipe[lora]'", where=where)
    import_bitsandbytes()


def import_bitsandbytes() -> None:
    """Import it where it is installed: peft does otherwise, with or without 4 bits.

    On some CPUs it asks a hub for a compiled kernel then, and says that there is none; products of a weight under an
    adapter never take it (ModelFolder.load_in_4_bits).
    """
    if "bitsandbytes" in sys.modules or find_spec("bitsandbytes") is None:
        return
    logger, kernels = logging.getLogger("bitsandbytes.backends.cpu.ops"), sys.modules.get("kernels")
    level = logger.level
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # its import fails, which bitsandbytes is ready for
    try:
        import_module("bitsandbytes")
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels


def loaded(model: Any, folder: Path) -> Any:
    """The model with the adapter in a folder around its layers, a PeftModel; on the meta device names and shapes alone.

    Raises whatever peft raises, its warning of weights that are missing, and ValueError for one that is left over.
    """
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    is_meta = next(model.parameters()).is_meta
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=ODD)
        found = PeftModel.from_pretrained(model, str(folder), low_cpu_mem_usage=is_meta, local_files_only=True)
        weights = load_peft_weights(str(folder), device="cpu")
        left = set_peft_model_state_dict(found, weights, low_cpu_mem_usage=is_meta).unexpected_keys
    if left:
        raise ValueError(f"its file holds '{left[0]}', which no layer of the base takes")
    return found


def merged(model: Any, folder: Path) -> Any:
    """The model with the adapter in a folder in its weights, each sum taken in float32. Raises as `loaded`."""
    return loaded(model, folder).merge_and_unload()


def changes(folder: Path, layer: str) -> bool:
    """Whether the adapter in a folder changes the layer of a name."""
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        return any(name.startswith(f"{PREFIX}{layer}.") for name in file.keys())  # noqa: SIM118 - it is no mapping


def inject(model: Any, config: Any) -> None:
    """Put an adapter beside the layers that a peft.LoraConfig names, its weights float32 on the meta device.

    Everything else is frozen.
    """
    from peft import inject_adapter_in_model

    with warnings.catch_warnings(action="ignore"):  # of GPT-2's layers, which keep their weights [in, out]
        inject_adapter_in_model(copy.deepcopy(config), model, adapter_name=NAME, low_cpu_mem_usage=True)
    model.requires_grad_(False)
    for layer in layers(model):
        for low in (layer.lora_A[NAME], layer.lora_B[NAME]):
            low.weight = nn.Parameter(torch.empty_like(low.weight, dtype=torch.float32, device="meta"))


def layers(model: nn.Module) -> Iterator[Any]:
    """The layers that have an adapter beside them."""
    return (module for module in model.modules() if has_adapter(module))


def has_adapter(layer: nn.Module) -> bool:
    """Whether a layer has an adapter beside it."""
    return hasattr(layer, "lora_A")


def low_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of a layer's adapter as they are now: A [r, in], B [out, r]."""
    return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The model as it is without its adapter, for as long as the block lasts."""
    adapted = list(layers(model))
    for layer in adapted:
        layer._disable_adapters = True  # peft's own switch freezes the adapter too
    try:
        yield
    finally:
        for layer in adapted:
            layer._disable_adapters = False


def is_adapted(model: nn.Module) -> bool:
    return any(True for _ in layers(model))


def own_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Any]]:
    """Every weight of the model itself, by its own name, and the layer whose adapter changes it, or None."""
    adapted = {id(layer.get_base_layer().weight): layer for layer in layers(model)}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            yield own_name(name), parameter, adapted.get(id(parameter))


def own_name(name: str) -> str:
    """A parameter's name without what peft has put around its layer."""
    return name.replace(".base_layer.", ".")


def file_name(name: str) -> str:
    """What a parameter of an adapter is called in its file: "q_proj.lora_A.default.weight" has no NAME there."""
    return PREFIX + name.replace(f".{NAME}.", ".")


def product(layer: Any, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What an adapter adds to its layer's weight, float32, in the shape that the weight is stored in."""
    added = layer.scaling[NAME] * (up.float() @ down.float())
    return added.T if layer.fan_in_fan_out else added


def in_4_bits(tensor: torch.Tensor) -> bool:
    """Whether bitsandbytes keeps it."""
    return getattr(tensor, "quant_state", None) is not None


def widened(weight: Any) -> torch.Tensor:
    """A weight in float32, out of its 4 bits where bitsandbytes keeps it."""
    if not in_4_bits(weight):
        wide: torch.Tensor = weight.float()
        return wide
    from bitsandbytes.functional import dequantize_4bit

    wide = dequantize_4bit(weight.data, weight.quant_state).float()
    return wide
