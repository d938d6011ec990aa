"""Machine: what a command runs on and with, for whoever wants to repeat it. Nothing is loaded to find out."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from kdpipe.manifests.cores import given_cores

PACKAGES = ("kdpipe", "torch", "transformers", "sglang")


def environment() -> dict[str, object]:
    """As JSON values: {"python": "3.11.2", "versions": {"torch": "2.13.0", ...}, "cores": 2}, with the Slurm job."""
    found: dict[str, object] = {"python": platform.python_version(), "versions": _versions()}
    job = os.environ.get("SLURM_JOB_ID")
    return found | {"cores": given_cores().count} | ({"slurm_job": job} if job else {})


def _versions() -> dict[str, str]:
    """Of the packages that decide a result, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
