"""What a process of a test of generate does: a function of a module, so that other processes find it."""

import torch

from kdpipe.manifests import failpoints
from kdpipe.manifests.progress import Silent
from kdpipe.stages.generate import GenerateSpec, generate, run

WINDOW = 4


def generate_small(spec: GenerateSpec, kill: str = "") -> None:
    """Windows of four answers; dies at the failpoint."""
    run.WINDOW["cpu"] = WINDOW
    torch.set_num_threads(1)
    failpoints.arm(kill)
    generate(spec, Silent())
