"""Places: where a folder that a command makes comes to lie.

Not in a cache or a model, which are copied and removed as a whole.
"""

from pathlib import Path

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.plan import PLAN_FILE, SAMPLES_FILE


def kind_of(folder: Path) -> str:
    """ "cache", "model", trained or not, or "" for a folder that is neither."""
    if (folder / PLAN_FILE).is_file() and (folder / SAMPLES_FILE).is_file():
        return "cache"
    return "model" if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else ""


def nearest_folder(path: Path) -> Path:
    """The path, or the nearest one above it that is there: on the disk that it will be on."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return there


def require_outside(folder: Path, *, option: str) -> None:
    """A folder to be made lies in no cache and in no model. Raises ConfigError.

    option: what the user named it by
    """
    for above in folder.resolve().parents:
        if kind := kind_of(above):
            raise ConfigError(f"it lies in the {kind} {above}; choose another {option}, outside of it", where=folder)
