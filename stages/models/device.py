"""Device: where a model runs, of the one that is asked for."""

import torch

from kdpipe.manifests.errors import ConfigError


def pick_device(wanted: str) -> torch.device:
    """ "auto", "cpu" or "cuda" as a device: auto is a GPU where there is one. Raises ConfigError for none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no GPU that torch can see; leave it out or say cpu", where="--device cuda")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def described(device: torch.device) -> str:
    """For a log: "cpu", "NVIDIA H200"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
