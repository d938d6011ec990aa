"""A model folder's own code: Python that from_pretrained would run, and the digest by which it is allowed to.

    folder -> OwnCode (bytes, digest) -> allowed by --trust-remote-code? -> a private copy -> from_pretrained

A folder whose configs name classes in files beside them (auto_map), of a type that transformers does not have, asks for
its own code; of one that it has, only where that is allowed. Its revision is the sha256 of every *.py below it: a
folder, unlike a repository, has no other.
Invariant: nothing of a folder is executed whose digest was not given, and what is executed are the bytes that were
digested. transformers loads from a copy that this process made of them and keeps its modules in a folder of this
process, so neither a change under way nor what another left in transformers' own cache of modules can be run.
Cost: the source files and configs are read at each load, and copied where they are run; weights are linked.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import transformers
import transformers.dynamic_module_utils as dynamic_modules
from transformers import CONFIG_MAPPING

from kdpipe.manifests.errors import ConfigError, InputError
from kdpipe.manifests.provenance import SHORTEST_DIGEST, digest_code

PACKAGE = dynamic_modules.TRANSFORMERS_DYNAMIC_MODULE_NAME


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnCode:
    """The code of a model folder that was allowed to run; empty where none is asked for.

    files: every *.py below the folder by its name there, a/b.py
    configs: the configs that say what of them is run
    """

    files: Mapping[str, bytes]
    configs: Mapping[str, bytes]
    digest: str

    def __bool__(self) -> bool:
        return bool(self.files)

    def write(self, folder: Path) -> None:
        """The source files, in `folder` as they were in theirs."""
        for name, source in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(source)


NO_CODE = OwnCode(files={}, configs={}, digest="")


def code_digest(folder: Path) -> str:
    """sha256 over the names and bytes of every *.py below the folder: what --trust-remote-code takes."""
    return digest_code(_sources(folder))


def asks_for_code(folder: Path) -> bool:
    """Whether the folder's configs name classes in files of its own."""
    return any(_references(_parsed(text)) for text in _configs(folder).values())


def allowed_code(folder: Path, trust: str | None, error: type[InputError]) -> OwnCode:
    """The code that the model in `folder` asks for, if it is the one that `trust` (a digest, or its start) allows.

    Raises `error` for code that was not allowed, that changed since, or that would be fetched from elsewhere;
    ConfigError where there is none to allow.
    """
    configs = _configs(folder)
    wanted = {name: _references(_parsed(text)) for name, text in configs.items()}
    if not any(wanted.values()):
        if trust is not None:
            raise ConfigError(f"{folder} brings no code of its own; leave it out", where="--trust-remote-code")
        return NO_CODE
    if trust is None and all(_is_known(name, _parsed(configs[name])) for name, asks in wanted.items() if asks):
        return NO_CODE  # transformers has a class of its own for the model, and takes it where no code is trusted
    files = _sources(folder)
    for name, references in wanted.items():
        for reference in references:
            _require_own(reference, files, error, where=folder / name)
    code = OwnCode(files=files, configs=configs, digest=digest_code(files))
    if trust is None:
        asked = ", ".join(sorted({_file_of(each) for references in wanted.values() for each in references}))
        raise error(
            f"this model brings its own code ({asked}); read it, then allow exactly this code with "
            f"--trust-remote-code {code.digest}",
            where=folder,
        )
    if len(trust) < SHORTEST_DIGEST or not code.digest.startswith(trust.lower()):
        raise error(
            f"the code has changed: its digest is {code.digest}, {trust} was allowed; read it, then allow it by its "
            "own digest",
            where=folder,
        )
    return code


def place_of(folder: Path, code: OwnCode) -> Path:
    """Where the model may be loaded from: the folder, or where its code is to be run a copy that nobody else changes.

    The copy has the code and the configs as they were when they were allowed, and links to all the rest; it lasts as
    long as this process.
    """
    if not code:
        return folder
    # transformers names modules by this folder and by part of the sources, and takes the model class it first saw with
    # a config class: without the digest, one model's config would bring another's model along.
    copy = Path(tempfile.mkdtemp(dir=_private_folder().name)) / f"code_{code.digest}"
    copy.mkdir()
    code.write(copy)
    for name, text in code.configs.items():
        (copy / name).write_bytes(text)
    for path in folder.rglob("*"):
        place = copy / path.relative_to(folder)
        if path.is_file() and path.suffix != ".py" and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path.resolve())
    return copy


@cache
def _private_folder() -> "tempfile.TemporaryDirectory[str]":
    """A folder of this process, gone when it ends; from now on transformers keeps the modules it runs in there.

    Its usual place is one for all of the user's processes: modules found there are run without another look.
    """
    folder = tempfile.TemporaryDirectory(prefix="kdpipe-code-", ignore_cleanup_errors=True)
    modules = Path(folder.name).resolve() / "modules"
    modules.mkdir()
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    dynamic_modules.HF_MODULES_CACHE = str(modules)
    # First, not last where transformers would put it: a package of the same name elsewhere must not be found. A rank
    # inherits its launcher's sys.path, and with it the launcher's.
    sys.path.insert(0, str(modules))
    return folder


def _sources(folder: Path) -> dict[str, bytes]:
    """Every *.py below the folder; folders that are links are not entered."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py") if path.is_file()}


def _configs(folder: Path) -> dict[str, bytes]:
    """config.json, tokenizer_config.json and the like."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*config.json")) if path.is_file()}


def _parsed(text: bytes) -> object:
    """JSON; None for what is none, which transformers will refuse in its own words."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _references(config: object) -> list[str]:
    """Every class that an auto_map names, at any depth: "modeling_x.XForCausalLM", "owner/repo--modeling_x.X"."""

    def walk(value: object, inside: bool) -> Iterator[str]:
        if isinstance(value, dict):
            for key, each in value.items():
                yield from walk(each, inside or key == "auto_map")
        elif isinstance(value, list):
            for each in value:
                yield from walk(each, inside)
        elif isinstance(value, str) and inside:
            yield value

    return list(walk(config, False))


def _file_of(reference: str) -> str:
    return reference.rpartition(".")[0] + ".py"


def _require_own(reference: str, files: Mapping[str, bytes], error: type[InputError], *, where: Path) -> None:
    """The class must be in one of the folder's own files: only those are digested."""
    repository, dashes, _ = reference.rpartition("--")
    if dashes:
        raise error(
            f"'{reference}' is code of another repository, {repository}, which would be fetched; "
            f"copy it into the folder and take '{repository}--' away",
            where=where,
        )
    if _file_of(reference) not in files:
        raise error(f"'{reference}' is code that is not in the folder; copy it there", where=where)


def _is_known(name: str, config: object) -> bool:
    """Whether transformers itself has the class that a config's own code stands for."""
    if not isinstance(config, dict):
        return False
    if name == "tokenizer_config.json":
        return hasattr(transformers, str(config.get("tokenizer_class")))
    return config.get("model_type") in CONFIG_MAPPING
