"""Code of a model's folder: refused unread, allowed by digest, and nothing else than what was digested is run."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.models import OWN_MODELING, make_model, make_own, make_tokenizer
from tests.opened import load_student, student_in, teacher_in

from kdpipe.manifests.errors import ConfigError, StudentError, TeacherError
from kdpipe.manifests.provenance import digest_code, digest_file, digest_json, digest_model
from kdpipe.stages.models import folder as model_folder
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.own_code import OwnCode, allowed_code, code_digest
from kdpipe.stages.student import checkpoint_dtype
from kdpipe.stages.teacher.describe import describe_teacher
from kdpipe.stages.teacher.transformers_engine import TransformersEngine

CPU = torch.device("cpu")
TOKENIZER = """from transformers import PreTrainedTokenizerFast

open({marker!r}, "a").write(__name__)


class TinyTokenizerFast(PreTrainedTokenizerFast):
    pass
"""
LOADERS: dict[str, Callable[[Path, str | None], object]] = {
    "describe": lambda folder, trust: describe_teacher(teacher_in(folder, trust)),
    "engine": lambda folder, trust: TransformersEngine(teacher_in(folder, trust), dtype="float32", device="cpu"),
    "tokenizer": lambda folder, trust: ModelFolder(folder, TeacherError, trust).tokenizer,
    "student": lambda folder, trust: load_student(folder, torch.float32, CPU, trust),
    "dtype": lambda folder, trust: checkpoint_dtype(student_in(folder, trust)),
}
"""Everything that hands a model's folder to transformers."""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A model with its own code, which leaves tmp_path/ran when it is imported."""
    return make_own(make_tokenizer(make_model("llama", tmp_path / "own", vocab_size=304)), tmp_path / "ran")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Refused


@pytest.mark.parametrize("loader", LOADERS)
def test_without_the_digest_nothing_of_it_is_run(loader: str, own: Path, tmp_path: Path) -> None:
    with pytest.raises((TeacherError, StudentError)) as caught:
        LOADERS[loader](own, None)
    said = str(caught.value)
    assert (caught.value.exit_code, "\n" in said) == (4, False)
    assert "brings its own code (configuration_tiny.py, modeling_tiny.py)" in said
    assert said.endswith(f"--trust-remote-code {code_digest(own)}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("loader", LOADERS)
def test_one_changed_byte_is_refused_naming_both_digests(loader: str, own: Path, tmp_path: Path) -> None:
    before = code_digest(own)
    helper = own / "convert_tiny.py"
    helper.write_text(helper.read_text().replace("Nothing", "nothing"))
    with pytest.raises((TeacherError, StudentError), match="the code has changed") as caught:
        LOADERS[loader](own, before)
    assert re.findall("[0-9a-f]{64}", str(caught.value)) == [code_digest(own), before]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("trust", ["", "{:.11}", "f{:.12}", "{}0"])
def test_what_is_not_the_start_of_its_digest_allows_nothing(trust: str, own: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="was allowed"):
        describe_teacher(teacher_in(own, trust.format(code_digest(own))))
    assert not (tmp_path / "ran").exists()


FOREIGN = {
    "another repository": ("config.json", {"AutoConfig": "owner/repo--modeling.X"}, "owner/repo, which would be"),
    "another repository's tokenizer": (
        "tokenizer_config.json",
        {"AutoTokenizer": [None, "o/r--tokenization.X"]},
        "o/r, which would be",
    ),
    "a file elsewhere": ("config.json", {"AutoConfig": "{tmp}/elsewhere.X"}, "not in the folder"),
    "a file above": ("config.json", {"AutoConfig": "../elsewhere.X"}, "not in the folder"),
    "a file that is not there": ("config.json", {"AutoConfig": "absent.X"}, "'absent.X' is code that is not"),
    "no file": ("config.json", {"AutoConfig": "X"}, "not in the folder"),
    "a processor's": ("preprocessor_config.json", {"AutoProcessor": "o/r--x.X"}, "o/r, which would be"),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("trusted", [False, True])
def test_code_from_elsewhere_is_refused_with_any_digest(case: str, trusted: bool, own: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(OWN_MODELING.format(marker=str(tmp_path / "ran")))
    name, auto_map, said = FOREIGN[case]
    if not (own / name).exists():
        (own / name).write_text("{}")
    edit_json(own / name, auto_map=json.loads(json.dumps(auto_map).replace("{tmp}", str(tmp_path))))
    with pytest.raises(TeacherError, match=said) as caught:
        describe_teacher(teacher_in(own, code_digest(own) if trusted else None))
    assert name in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_an_auto_map_inside_the_config_asks_for_code_too(own: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    edit_json(own / "config.json", auto_map={}, text_config={"auto_map": config["auto_map"]})
    with pytest.raises(TeacherError, match="brings its own code"):
        describe_teacher(teacher_in(own))


def test_a_digest_for_a_model_without_code_is_an_error(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "plain")
    (folder / "train.py").write_text("raise SystemExit\n")
    assert (
        describe_teacher(teacher_in(folder)).architecture == "LlamaForCausalLM"
    )  # code that nothing asks for is not its own
    with pytest.raises(ConfigError, match="brings no code of its own"):
        describe_teacher(teacher_in(folder, code_digest(folder)))


# Allowed


@pytest.mark.parametrize("loader", LOADERS)
def test_with_its_digest_or_the_start_of_it_the_model_loads(loader: str, own: Path, tmp_path: Path) -> None:
    for trust in (code_digest(own), code_digest(own)[:12].upper()):
        LOADERS[loader](own, trust)
    assert not list(own.rglob("__pycache__"))


def test_what_loads_is_the_folders_own_class(own: Path, tmp_path: Path) -> None:
    assert describe_teacher(teacher_in(own, code_digest(own))).architecture == "TinyForCausalLM"
    model = load_student(own, torch.float32, CPU, code_digest(own))
    assert (type(model).__name__, model.config.model_type) == ("TinyForCausalLM", "tiny")
    stock = make_model("llama", tmp_path / "stock", vocab_size=304)
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, load_student(stock, torch.float32, CPU)(ids).logits)


def test_two_models_that_share_their_configs_code_run_each_its_own(own: Path, tmp_path: Path) -> None:
    other = make_own(make_model("llama", tmp_path / "other" / "own", vocab_size=304), tmp_path / "other ran")
    load_student(own, torch.float32, CPU, code_digest(own))
    load_student(other, torch.float32, CPU, code_digest(other))
    assert (tmp_path / "other ran").exists()


def test_where_transformers_knows_the_type_its_own_class_is_taken_unless_the_code_is_allowed(
    own: Path, tmp_path: Path
) -> None:
    edit_json(own / "config.json", model_type="llama", auto_map={"AutoModelForCausalLM": "modeling_tiny.TinyLlama"})
    text = (own / "modeling_tiny.py").read_text().replace("    config_class = TinyConfig", "    ...")
    (own / "modeling_tiny.py").write_text(text.replace("class TinyForCausalLM", "class TinyLlama"))
    assert describe_teacher(teacher_in(own)).architecture == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()
    assert describe_teacher(teacher_in(own, code_digest(own))).architecture == "TinyLlama"
    edit_json(own / "config.json", auto_map={})
    assert describe_teacher(teacher_in(own)).architecture == "LlamaForCausalLM"  # nothing of the other stays behind


def test_a_tokenizers_code_needs_the_digest_too(tmp_path: Path) -> None:
    folder = make_tokenizer(make_model("llama", tmp_path / "own", vocab_size=304))
    (folder / "tokenization_tiny.py").write_text(TOKENIZER.format(marker=str(tmp_path / "ran")))
    auto_map = {"AutoTokenizer": [None, "tokenization_tiny.TinyTokenizerFast"]}
    edit_json(folder / "tokenizer_config.json", tokenizer_class="TinyTokenizer", auto_map=auto_map)
    with pytest.raises(StudentError, match=r"its own code \(tokenization_tiny.py\)"):
        _ = ModelFolder(folder, StudentError).tokenizer
    assert not (tmp_path / "ran").exists()
    tokenizer = ModelFolder(folder, StudentError, code_digest(folder)).tokenizer
    assert type(tokenizer).__name__ == "TinyTokenizerFast"
    assert tokenizer.decode(tokenizer("a row")["input_ids"]) == "a row"


@pytest.mark.parametrize("line", ["raise AttributeError('nope')", "def (", "import no_such_package", "1 // 0"])
def test_code_that_does_not_run_is_the_folders_fault_in_one_line(line: str, own: Path) -> None:
    (own / "modeling_tiny.py").write_text((own / "modeling_tiny.py").read_text() + line + "\n")
    with pytest.raises(TeacherError) as caught:
        TransformersEngine(teacher_in(own, code_digest(own)), dtype="float32", device="cpu")
    assert "\n" not in str(caught.value)


# What runs is what was digested


def test_code_that_changes_after_it_was_digested_is_not_run(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, real = code_digest(own), model_folder.allowed_code

    def allowed_then_changed(folder: Path, *args: object) -> OwnCode:
        code = real(folder, *args)  # type: ignore[arg-type]
        (own / "modeling_tiny.py").write_text(OWN_MODELING.format(marker=str(tmp_path / "changed")))
        edit_json(own / "config.json", auto_map={"AutoModelForCausalLM": "convert_tiny.Other"})
        return code

    monkeypatch.setattr(model_folder, "allowed_code", allowed_then_changed)
    model = load_student(own, torch.float32, CPU, digest)
    assert type(model).__name__ == "TinyForCausalLM"
    assert (tmp_path / "ran").exists()
    assert not (tmp_path / "changed").exists()


def test_transformers_cache_of_modules_is_neither_read_nor_written(own: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared" / "transformers_modules"
    shared.mkdir(parents=True)
    (shared / "__init__.py").write_text(f"open({str(tmp_path / 'poisoned')!r}, 'w')\n")
    code = f"""
import sys
from pathlib import Path
sys.path.append({str(shared.parent)!r})
from kdpipe.manifests.errors import TeacherError
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.teacher.describe import describe_teacher
folder = ModelFolder(Path({str(own)!r}), TeacherError, {code_digest(own)!r})
print(describe_teacher(folder).architecture)
"""
    env = os.environ | {"HF_MODULES_CACHE": str(shared.parent), "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "TinyForCausalLM\n", done.stderr
    assert not (tmp_path / "poisoned").exists()
    assert [path.name for path in shared.iterdir()] == ["__init__.py"]
    assert list((tmp_path / "tmp").iterdir()) == [], "the private copies are gone with the process"


# The digest


def test_digest_is_over_names_and_bytes_of_every_source_below(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.py").write_bytes(b"1")
    (tmp_path / "sub" / "a.py").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"2")
    lines = b"b.py\0" + hashlib.sha256(b"1").digest() + b"sub/a.py\0" + hashlib.sha256(b"").digest()
    assert code_digest(tmp_path) == hashlib.sha256(lines).hexdigest()
    (tmp_path / "notes.txt").write_bytes(b"3")
    assert code_digest(tmp_path) == hashlib.sha256(lines).hexdigest()
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    assert code_digest(tmp_path) != hashlib.sha256(lines).hexdigest()
    assert digest_code({"a": b"b"}) != digest_code({"a": b"", "b": b""})


def test_the_models_digest_covers_code_that_runs_and_is_otherwise_what_it_was(own: Path, tmp_path: Path) -> None:
    plain = make_model("llama", tmp_path / "plain")
    before = digest_model(plain)
    (plain / "train.py").write_text("# Nothing asks for it.\n")
    assert digest_model(plain, allowed_code(plain, None, TeacherError).digest) == before
    config = json.loads((plain / "config.json").read_text())
    del config["transformers_version"], config["use_cache"]
    (weights,) = [(p.name, p.stat().st_size, digest_file(p)) for p in plain.glob("*.safetensors")]
    assert before == digest_json({"config": config, "weights": [weights]})
    first = digest_model(own, allowed_code(own, code_digest(own), TeacherError).digest)
    (own / "convert_tiny.py").write_text("# other\n")
    assert digest_model(own, allowed_code(own, code_digest(own), TeacherError).digest) != first
