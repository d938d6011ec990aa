"""Deriving a side-car in a process of its own, which may be killed on the way."""

from pathlib import Path

import torch

from kdpipe.manifests import failpoints
from kdpipe.manifests.cache import Cache
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.sidecar import Kind, Sidecar
from kdpipe.stages.exchange import Asked, derive

K = 12


def asked(kind: Kind, seed: int = 0) -> Asked:
    return Asked(sidecar=Sidecar(kind=kind, entries=1 if kind == "logprob" else K), seed=seed)


def derived(cache: Path, out: Path, kind: Kind, seed: int = 0) -> Cache:
    derive(Cache.open(cache), out, asked(kind, seed), torch.device("cpu"), Silent())
    return Cache.open(out)


def derive_until(place: str, cache: Path, out: Path, kind: Kind) -> None:
    """Die at a failpoint."""
    torch.set_num_threads(1)
    failpoints.arm(place)
    derived(cache, out, kind)
