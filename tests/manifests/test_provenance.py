"""Digests say what a thing was made of: every change of that gives another, and nothing else does."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kdpipe.manifests.provenance import TOKENIZER_FILES, digest_code, digest_model, digest_tokenizer

CONFIG = {"hidden_size": 4, "rope_theta": 1e4, "dtype": "float32"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode() * 9)
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a value of the config": lambda folder: edit(folder, rope_theta=1e6),
    "a key of the config": lambda folder: edit(folder, attention_bias=False),
    "a byte of the weights": lambda folder: (folder / "b.safetensors").write_bytes(b"bbbbbbbba"),
    "a file of weights less": lambda folder: (folder / "b.safetensors").unlink(),
    "another file's name": lambda folder: (folder / "b.safetensors").rename(folder / "c.safetensors"),
    "weights that changed places": lambda folder: [
        (folder / f"{name}.safetensors").write_bytes(other * 9) for name, other in (("a", b"b"), ("b", b"a"))
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_has_another_digest(change: str, model: Path) -> None:
    before = digest_model(model)
    CHANGES[change](model)
    assert digest_model(model) != before


def test_a_copy_of_a_model_has_the_same_digest(model: Path) -> None:
    before = digest_model(model)
    edit(model, _name_or_path="/elsewhere", transformers_version="9.9", use_cache=False)
    (model / "README.md").write_text("a note")
    (model / "config.json").write_text(
        json.dumps(dict(reversed(json.loads((model / "config.json").read_text()).items())))
    )
    assert digest_model(model) == before
    assert digest_model(model, "code") != before


def test_infinity_in_a_config_has_a_digest(model: Path) -> None:
    found = []
    for value in ("Infinity", "-Infinity", "0"):
        (model / "config.json").write_text(f'{{"time_step_limit": [0.0, {value}]}}')
        found.append(digest_model(model))
    assert len(set(found)) == 3


def test_every_file_of_a_tokenizer_counts(tmp_path: Path) -> None:
    seen = {digest_tokenizer(tmp_path)}
    for number, name in enumerate(TOKENIZER_FILES, start=1):
        (tmp_path / name).write_text("{}")
        seen.add(digest_tokenizer(tmp_path))
        assert len(seen) == number + 1, name
    assert {"merges.txt", "tokenizer.json", "tokenizer.model", "vocab.json", "chat_template.jinja"} <= {
        *TOKENIZER_FILES
    }
    (tmp_path / "model.safetensors").write_text("{}")
    assert digest_tokenizer(tmp_path) in seen


def test_source_files_do_not_run_into_each_other() -> None:
    sources = [
        {"a.py": b"x", "b.py": b"y"},
        {"a.py": b"xb.py\0y"},
        {"a.py": b"y", "b.py": b"x"},
        {"a.py": b"x"},
        {"a.pyx": b"", "b.py": b"y"},
        {"a.py\0": b"", "b.py": b"y"},
        {"a.py": b"", "b.py": b"y"},
        {},
    ]
    assert len({digest_code(each) for each in sources}) == len(sources)
    assert digest_code({"b.py": b"y", "a.py": b"x"}) == digest_code(sources[0])
    assert digest_code({"a": b"b.pyb", "c": b""}) != digest_code({"a": b"", "b.pyb": b"", "c": b""})
