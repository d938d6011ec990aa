"""Placeholder for sgl_kernel, SGLang's compiled kernels, of which only CUDA builds exist.

On a CPU SGLang computes with torch's own operators and never calls these, but imports some names at module level. Each
name can be imported and raises when it is called.
"""

from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0.0.0+placeholder"


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(f"sgl_kernel.{name} is a placeholder: sgl-kernel has no build for a CPU")

    missing.__name__ = missing.__qualname__ = name
    return missing
