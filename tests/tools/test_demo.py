"""The demo's parts, without the network: a tiny wheel that carries a tiny GGUF takes the teacher's place."""

import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
import torch
from tests.conftest import Bench, Main
from tests.models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.specs import load
from kdpipe.stages.loss import find_divergence

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "tools" / "demo"
LAYERS = 6


def demo_module(name: str) -> ModuleType:
    """As in `python tools/demo/run.py`, whose folder is the first on the path."""
    sys.path.insert(0, str(DEMO))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DEMO))


answers, coded, corpus, plot, run, student, teacher = map(
    demo_module, ("answers", "coded", "corpus", "plot", "run", "student", "teacher")
)


# The corpus


@pytest.fixture(scope="module")
def samples() -> list:
    return corpus.gather_samples(seed=3)


def test_corpus_is_the_same_in_a_process_with_another_hash_seed(samples: list) -> None:
    code = "import corpus, hashlib; print(hashlib.sha256(repr(corpus.gather_samples(seed=3)).encode()).hexdigest())"
    environment = {**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": str(DEMO)}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == hashlib.sha256(repr(samples).encode()).hexdigest()


def test_samples_are_many_within_their_lengths_and_unlike_each_other(samples: list) -> None:
    assert len(samples) > 4 * run.NUM_CHATS
    assert len({" ".join(sample.answer.split()) for sample in samples}) == len(samples)
    assert max(len(sample.answer) for sample in samples) <= corpus.MAX_ANSWER_CHARS
    assert min(len(sample.answer) for sample in samples) >= corpus.MIN_ANSWER_CHARS


def test_chats_of_another_seed_are_others_and_whole(
    samples: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = [corpus.Sample(question="What is\u2028this?", answer=f'a line\n    "{n}"\x0b\x1c, é') for n in range(40)]
    monkeypatch.setattr(corpus, "MIN_ANSWER_CHARS", 1)
    monkeypatch.setattr(corpus, "topic_samples", lambda: odd)
    monkeypatch.setattr(corpus, "library_files", lambda root: [])
    drawn = []
    for seed in (1, 2):
        corpus.write_chats(tmp_path / "chats", num_chats=20, seed=seed)
        lines = (tmp_path / "chats").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        drawn.append([json.loads(line)["messages"] for line in lines])
        assert len(lines) == 20
        assert all(messages in [sample.messages() for sample in odd] for messages in drawn[-1])
    assert drawn[0] != drawn[1]
    assert [turn["role"] for turn in drawn[0][0]] == ["user", "assistant"]


def test_pieces_keep_every_word_and_the_limit() -> None:
    text = "one two\n\n" + "\n".join(f"line {n}" for n in range(30)) + "\n\nlast"
    cut = corpus.pieces(text, max_chars=50)
    assert " ".join(cut).split() == text.split()
    assert max(map(len, cut)) <= 50


def test_sections_are_told_apart_by_their_underlines() -> None:
    found = list(corpus.sections("Top\n***\n\nbody\n\nLower\n=====\n\nmore\n---\n"))
    assert [(heading, body.split()) for heading, body in found] == [
        ("", []),
        ("Top", ["body"]),
        ("Lower", ["more", "---"]),
    ]


def test_docstrings_are_found_in_methods_and_private_functions() -> None:
    source = '"""M."""\nclass A:\n    "C."\n    async def f(self, x=1):\n        "F."\ndef _g(): pass\n'
    found = [(sample.question, sample.answer) for sample in corpus.docstring_samples(source, module="pkg.mod")]
    assert found == [
        ("What is the module pkg.mod for?", "M."),
        ("What is the class pkg.mod.A?", "C."),
        ("What does pkg.mod.A.f(self, x=1) do?", "F."),
    ]


# The teacher


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of six layers in the teacher's precision, with a tokenizer that takes digits one by one."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 1024}
    make_model("llama", folder, dtype="bfloat16", vocab_size=300, sizes=sizes)
    make_tokenizer(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    saved["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, saved["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    return folder


@pytest.fixture(scope="module")
def wheel(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that carries the tiny model as GGUF; the pin for it lies beside it."""
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(tiny, folder / "tiny.gguf")
    path = folder / "tiny_llm-0.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny_llm/tiny.gguf")
        archive.writestr("tiny_llm-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-llm\nVersion: 0.1\n")
        archive.writestr("tiny_llm-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_llm-0.1.dist-info/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name("pin.txt").write_text(f"tiny-llm==0.1 --hash=sha256:{digest}\n")
    return path


def write_gguf(model: Path, path: Path) -> None:
    """A llama of ours as llama.cpp's converter writes one."""
    config = json.loads((model / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    special = {token["content"] for token in tokenizer["added_tokens"]}
    entries = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(entries)
    writer.add_token_types([gguf.TokenType.CONTROL if entry in special else gguf.TokenType.NORMAL for entry in entries])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(config[f"{name}_token_id"])
    writer.add_chat_template((model / "chat_template.jinja").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in AutoModelForCausalLM.from_pretrained(model).state_dict().items():
        array = weight.float().numpy()
        if "q_proj" in name or "k_proj" in name:  # GGUF has rotary pairs side by side, transformers half a head apart
            count = heads if "q_proj" in name else kv_heads
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def pinned(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny wheel in the teacher's place."""
    monkeypatch.setattr(teacher, "PIN", wheel.with_name("pin.txt"))
    return wheel


@pytest.fixture
def fetched(pinned: Path, tmp_path: Path) -> Path:
    """A folder of a demo in which the wheel lies already, as where there is no network."""
    (tmp_path / "wheel").mkdir()
    (tmp_path / "wheel" / pinned.name).symlink_to(pinned)
    return tmp_path


def test_teacher_is_the_model_of_the_wheel_with_its_tokenizer(tiny: Path, fetched: Path) -> None:
    teacher.write_teacher(fetched / "teacher")
    assert sorted(path.name for path in fetched.iterdir()) == ["teacher", "wheel"]
    mine, theirs = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
        for folder in (fetched / "teacher", tiny)
    )
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    ids = [
        [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (fetched / "teacher", tiny)]
        for text in ("In 2024, 12 of 1,234.5", "v3.11  99 and 89", "<|im_start|>naïve — λ 🐍 ½ ²³<|im_end|>")
    ]
    assert all(made == true for made, true in ids)
    assert AutoTokenizer.from_pretrained(fetched / "teacher").chat_template


@pytest.mark.parametrize("changed", [("sha256:..", "sha256:00"), (" --hash=.*", "")], ids=["another hash", "no hash"])
def test_teacher_is_nothing_but_what_the_pin_says(
    changed: tuple[str, str], pinned: Path, fetched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = fetched / "pin.txt"
    pin.write_text(re.sub(*changed, pinned.with_name("pin.txt").read_text()))
    monkeypatch.setattr(teacher, "PIN", pin)
    with pytest.raises(SystemExit, match=r"demo: no teacher: the wheel that pin.txt names .* pip says: .*\nWithout a"):
        teacher.write_teacher(fetched / "teacher")
    assert not (fetched / "teacher").exists()


def test_teacher_that_cannot_be_fetched_is_one_line_and_the_way_without_a_network(
    pinned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit) as caught:
        teacher.write_teacher(tmp_path / "teacher")
    said = str(caught.value)
    assert "pip says: ERROR: No matching distribution found for tiny-llm==0.1" in said
    assert f"into {tmp_path / 'wheel'}/" in said
    assert len(said.splitlines()) == 2


# The student


@pytest.mark.parametrize(("kind", "drop"), [("llama", {2, 3}), ("gemma2", {1, 2, 4})])
def test_student_is_its_teacher_without_some_layers(kind: str, drop: set[int], tmp_path: Path) -> None:
    keep = [layer for layer in range(LAYERS) if layer not in drop]
    whole = make_tokenizer(make_model(kind, tmp_path / "whole", sizes={"num_hidden_layers": LAYERS}, vocab_size=300))
    count = student.cut(whole, tmp_path / "cut", drop=drop)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "cut", whole))
    assert sum(parameter.numel() for parameter in ours.parameters()) == count
    assert len(ours.model.layers) == len(keep)
    rest = {name: weight for name, weight in theirs.state_dict().items() if ".layers." not in name}
    for place, layer in enumerate(keep):
        own = theirs.model.layers[layer].state_dict()
        rest |= {f"model.layers.{place}.{name}": weight for name, weight in own.items()}
    assert ours.state_dict().keys() == rest.keys()
    assert all(torch.equal(weight, rest[name]) for name, weight in ours.state_dict().items())
    kinds = getattr(theirs.config, "layer_types", None)
    assert kinds is None or ours.config.layer_types == [kinds[layer] for layer in keep]
    for path in whole.glob("token*"):
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "cut").chat_template


@pytest.mark.parametrize("drop", [range(5, 6), range(4, 8), range(3, 3)])
def test_layers_that_cannot_be_left_out_are_named(drop: range, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"student: layers .* cannot be left out of .*; give some of 1 to 4"):
        student.cut(tiny, tmp_path / "cut", drop=drop)
    assert not list(tmp_path.iterdir())


# What is shown


def test_answers_stand_side_by_side_under_their_question(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 16)
    monkeypatch.setattr(answers, "WIDTH", 12)
    shown = answers.side_by_side({"one": tiny, "the other": tiny}, ["What is a row?", "And a cache?"]).splitlines()
    assert shown[0].split() == ["one", "the", "other"]
    assert shown[2] == "What is a row?"
    assert shown.index("And a cache?") > 3
    columns = [(line[: answers.WIDTH].strip(), line[answers.WIDTH :].strip()) for line in shown[3:] if "?" not in line]
    assert all(left == right for left, right in columns)
    assert len("".join(left for left, _ in columns)) > 20
    assert len(columns) > 4


def test_table_has_a_line_a_model_and_a_column_a_figure() -> None:
    row = {"heldout_kl": 0.5, "top1_agreement": 0.25, "heldout_ce": 3.0625, "tokens_per_s": 1234.5, "seconds": 99.6}
    shown = run.table({"teacher": row, "kd": row, "ce": row}).splitlines()
    assert [line[:12].strip() for line in shown] == ["", "teacher", "KD student", "CE student"]
    assert all(line[12:].split() == ["0.500", "0.250", "3.062", "1,234", "100"] for line in shown[1:])
    assert len({len(line) for line in shown}) == 1


def test_plot_shows_both_students_and_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plot.pyplot, "close", drawn.append)  # the figure is looked at before it goes
    for name, start in (("kd", 3.0), ("ce", 4.0)):
        (tmp_path / name).mkdir()
        scores = [{"kind": "eval", "step": n, "heldout_kl": start / n, "heldout_ce": start + n} for n in (1, 2, 4)]
        lines = [{"kind": "step", "step": 1}, *scores, {"kind": "done"}]
        (tmp_path / name / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot.draw({name: tmp_path / name for name in ("kd", "ce")}, tmp_path / "plot.png", teacher_ce=2.5)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    kl, ce = drawn[0].axes
    assert [line.get_ydata().tolist() for line in kl.lines] == [[3.0, 1.5, 0.75], [4.0, 2.0, 1.0]]
    assert [line.get_xdata().tolist() for line in ce.lines[:2]] == [[1, 2, 4]] * 2
    assert set(ce.lines[2].get_ydata()) == {2.5}
    assert [text.get_text() for text in ce.get_legend().get_texts()] == [*plot.LABELS.values(), "the teacher itself"]


def test_every_cache_of_the_students_is_made_of_the_raw_one_and_serves_its_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Bench, main: Main
) -> None:
    shutil.copytree(bench.cache, tmp_path / "raw")
    typed: list[list[object]] = []
    monkeypatch.setattr(coded.run, "kdpipe", lambda *words: typed.append([*words]))
    coded.prepare(tmp_path, tmp_path, [*coded.KINDS])
    assert typed.pop(0)[0] == "extract"
    for words in typed:
        assert main(*words)[0] == 0, words
    assert {path.parent.name for path in tmp_path.glob("*/PLAN.json")} == {*coded.KINDS}
    sizes = {name: coded.row_bytes(tmp_path / name) for name in coded.KINDS}
    assert sizes["fisher-3e-2"] < sizes["fisher-1e-2"] < sizes["raw"]
    for name in ("sampled", "topk"):
        sidecar, loss = Cache.open(tmp_path / name).plan.head.sidecar, load(None, coded.KINDS[name].loss).loss
        assert find_divergence(loss.divergence).is_of(sidecar, loss.options)
    scores = {"heldout_kl": 0.5, "top1_agreement": 0.25, "heldout_ce": 3.0}
    shown = coded.table({name: [scores] for name in coded.KINDS}, sizes, scores).splitlines()
    assert [line[:14].strip() for line in shown] == ["", "no training", *coded.KINDS]
    assert len({line.split()[-1] for line in shown[2:]}) == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_whole_demo_on_the_tiny_teacher(
    fetched: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    small = {"NUM_CHATS": 24, "DROPPED": range(2, 4), "TRAIN": run.TRAIN | {"batch_tokens": 2048, "eval_every": 2}}
    for name, value in small.items():
        monkeypatch.setattr(run, name, value)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(fetched), "--seed", "1"])
    run.main()
    out, _ = capfd.readouterr()
    for line in (*answers.QUESTIONS, "KD student", "train.seed=1", "times as far from the teacher", "plot.png"):
        assert line in out
    summary = json.loads((fetched / "summary.json").read_text())
    assert summary.keys() == {"teacher", "students", "seconds"}
    assert summary["students"].keys() == {"kd", "ce"}
    assert summary["seconds"].keys() == {"teacher", "extract", "kd", "ce", "total"}
    for row in (summary["teacher"], *summary["students"].values()):
        assert set(run.COLUMNS) <= row.keys()
    assert (fetched / "plot.png").stat().st_size > 10_000
    run.prepare(fetched, seed=1)
    assert "The teacher is there already" in capfd.readouterr().out
