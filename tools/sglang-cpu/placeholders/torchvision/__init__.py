"""Placeholder for torchvision, which has no build that loads beside a CPU build of torch.

SGLang imports torchvision at module level for its multimodal models, also when it serves text. Every name below can be
imported; what it stands for raises when it is made.
"""

import sys
import types
from typing import Any, NoReturn

__version__ = "0.0.0+placeholder"

MODULES = ("transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional", "io", "ops", "utils")


class InterpolationMode:
    """Constants that are read while modules load."""

    NEAREST, NEAREST_EXACT, BILINEAR = "nearest", "nearest-exact", "bilinear"
    BICUBIC, BOX, HAMMING, LANCZOS = "bicubic", "box", "hamming", "lanczos"


class _Module(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - what makes it a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = InterpolationMode if name == "InterpolationMode" else _missing(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


def _missing(name: str) -> type:
    def refuse(self: object, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(f"{name} is a placeholder: torchvision is not installed")

    return type(name.rpartition(".")[2], (), {"__init__": refuse})


for _name in MODULES:
    _module = _Module(f"{__name__}.{_name}")
    sys.modules[_module.__name__] = _module
    _parent, _, _child = _module.__name__.rpartition(".")
    setattr(sys.modules[_parent], _child, _module)
