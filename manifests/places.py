"""Places: a folder that a command makes does not lie in a cache or a model, which are copied and removed as a whole."""

from pathlib import Path

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.plan import PLAN_FILE, SAMPLES_FILE


def require_outside(folder: Path, *, option: str) -> None:
    """A folder to be made lies in no cache and in no model, trained or not. Raises ConfigError.

    option: what the user named it by
    """
    for above in folder.resolve().parents:
        is_cache = (above / PLAN_FILE).is_file() and (above / SAMPLES_FILE).is_file()
        is_model = (above / "config.json").is_file() and any(above.glob("*.safetensors"))
        if is_cache or is_model:
            what = "cache" if is_cache else "model"
            raise ConfigError(f"it lies in the {what} {above}; choose another {option}, outside of it", where=folder)
