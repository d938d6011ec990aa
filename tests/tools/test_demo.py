"""The demo's data and models: the corpus is a function of this Python alone; the tokenizer masks what it should."""

import importlib
import json
import os
import pathlib
import random
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = pathlib.Path(__file__).parents[2] / "tools" / "demo"


def demo_module(name: str) -> ModuleType:
    """As in `python tools/demo/run.py`, whose folder is the first on the path."""
    sys.path.insert(0, str(DEMO))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DEMO))


corpus, bpe, teacher, student = map(demo_module, ("corpus", "bpe", "teacher", "student"))


NUM_TRANSFER = 500


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("corpus")
    corpus.write_corpus(folder / "teacher", transfer_path=folder / "transfer", num_transfer=NUM_TRANSFER)
    return folder


@pytest.fixture(scope="module")
def samples(corpus_folder: pathlib.Path) -> list:
    return corpus.read_samples(corpus_folder / "teacher") + corpus.read_samples(corpus_folder / "transfer")


@pytest.fixture(scope="module")
def tokenizer_folder(samples: list, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("demo") / "tokenizer"
    texts = (text for sample in samples for text in (sample.question, sample.answer))
    assert bpe.train_tokenizer(texts, folder=folder) == bpe.VOCAB_SIZE
    return folder


def test_corpus_is_the_same_in_a_process_with_another_hash_seed(corpus_folder: pathlib.Path, samples: list) -> None:
    code = "import corpus; print(corpus._digest(corpus.gather_samples()))"
    environment = {**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": str(DEMO)}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == corpus._digest(sorted(samples, key=lambda sample: corpus._digest([sample])))


def test_corpus_is_not_tiny_and_its_two_files_share_no_answer(corpus_folder: pathlib.Path) -> None:
    seen, kept = (corpus.read_samples(corpus_folder / name) for name in ("teacher", "transfer"))
    assert len(seen) > 3000
    assert len(kept) == NUM_TRANSFER
    assert sum(len(sample.answer) for sample in seen) > 700_000
    assert not {sample.answer for sample in seen} & {sample.answer for sample in kept}


def test_samples_are_short_and_unlike_each_other(samples: list) -> None:
    assert len({" ".join(sample.answer.split()) for sample in samples}) == len(samples)
    assert max(len(sample.answer) for sample in samples) <= corpus.MAX_ANSWER_CHARS
    assert min(len(sample.answer) for sample in samples) >= corpus.MIN_ANSWER_CHARS


def test_sample_is_read_back_as_it_was_written(tmp_path: pathlib.Path) -> None:
    written = corpus.Sample(question="What is\u2028this?", answer='a line\n    "another"\x0b\x1c, é')
    corpus._write_jsonl(tmp_path / "one", samples=[written])
    assert corpus.read_samples(tmp_path / "one") == [written]
    assert json.loads((tmp_path / "one").read_text(encoding="utf-8"))["messages"][1]["role"] == "assistant"


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


@pytest.mark.parametrize("text", ["def f(x):\n    return x\n", "  naïve — λ\t\x00 🐍", "<|nothing|>", " ,. '' n't"])
def test_tokenizer_gives_back_every_text(text: str, tokenizer_folder: pathlib.Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_training_is_deterministic(tmp_path: pathlib.Path) -> None:
    texts = ["What is a tie? ab ba ab ba", "the order of ties: cd dc cd dc"]
    for run in "ab":
        bpe.train_tokenizer(texts, folder=tmp_path / run, vocab_size=270)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


@pytest.mark.parametrize("answer", ["It is a list.", "  indented first\n", "ends in a space "])
def test_mask_covers_the_assistants_text_and_its_end_and_nothing_else(
    answer: str, tokenizer_folder: pathlib.Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    encoded = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    supervised = [id for id, asked in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if asked]
    assert tokenizer.decode(supervised) == f"{answer}<|end|>Yes.<|end|>"


def test_generation_prompt_is_what_stands_before_an_answer(tokenizer_folder: pathlib.Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == f"{prompt}So.<|end|>"


def test_student_folder_loads_and_depends_on_its_seed_alone(
    tmp_path: pathlib.Path, tokenizer_folder: pathlib.Path
) -> None:
    heads = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        num_parameters = student.write_student(tmp_path / name, tokenizer_folder=tokenizer_folder, seed=seed)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters < 1_000_000
        heads.append(model.lm_head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    # The model type must not talk AutoTokenizer into another tokenizer class.
    text = "def f(x):\n    return  x"
    ids = [AutoTokenizer.from_pretrained(folder).encode(text) for folder in (tokenizer_folder, tmp_path / "a")]
    assert ids[0] == ids[1]


def test_batches_hold_every_chat_once_within_their_tokens() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(3, 300) for _ in range(211)]
    made = teacher.batches(lengths, batch_tokens=1000, rng=rng)
    assert sorted(position for batch in made for position in batch) == list(range(211))
    widest = [len(batch) * max(teacher.width(lengths[position]) for position in batch) for batch in made]
    assert max(widest) <= 1000


def test_training_learns_and_an_interrupted_one_leaves_no_teacher(
    tmp_path: pathlib.Path, tokenizer_folder: pathlib.Path, samples: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = [sample.messages() for sample in samples if len(sample.answer) < 60][:12]

    def train(num_epochs: int) -> float:
        return teacher.train_teacher(
            chats, tokenizer_folder=tokenizer_folder, out=tmp_path / "teacher", num_epochs=num_epochs
        ).loss

    with monkeypatch.context() as patched:
        patched.setattr(teacher.os, "replace", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(1)
    assert not (tmp_path / "teacher").exists()
    assert train(6) < 6.5  # log(2048) = 7.6 before it has seen anything
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    with pytest.raises(FileExistsError, match="teacher already"):
        train(1)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
