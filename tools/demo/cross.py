"""Students with a tokenizer of their own, taught from one cache of SmolLM2: each method beside cross-entropy.

    make demo && python tools/demo/cross.py --out .demo

The teacher answers the demo's questions once (`kdpipe generate`, `extract`). The student is the demo's with another
vocabulary: a byte-level BPE of 8,192 tokens that reads three digits as one, another chat template, and as embedding of
each new token the mean of the teacher's tokens of the same text. Students differ by `student.align` alone, or have no
teacher (`loss.kd_weight=0`); the same start, samples and steps, three seeds. Ends with a table and cross.json;
finished students are kept, so that the same command goes on. Cost: a minute a student on two cores, 21 students.

Bits per byte are of the held-out answers. Digits are the share of their tokens with a digit in them that
the student finds likeliest, everything before them given.
"""

import argparse
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import corpus
import run
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from kdpipe.manifests.cache import Cache

METHODS = ("ce", "shared-vocab", "uld", "gold", "xtoken", "chunk", "dskd")
VOCAB = 8192
QUESTIONS = 240
NEW_TOKENS = 96
HELDOUT = 0.2
TRAIN = {"batch_tokens": 512, "epochs": 1, "lr": 5e-4, "warmup_ratio": 0.1, "eval_tokens": 512, "save_every": 0}
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Not the teacher's, and without its system prompt."""
COLUMNS = {"heldout_bits_per_byte": "bits per byte", "digits": "digits right", "seconds": "seconds"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(".demo"), help="folder of the demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="order of samples")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    asked = parser.parse_args()
    out = asked.out / "cross"
    out.mkdir(exist_ok=True)
    prepare(asked.out, out)
    found = {name: [student(out, name, seed) for seed in asked.seeds] for name in asked.methods}
    (out / "cross.json").write_text(json.dumps(found, indent=2) + "\n")
    run.say(f"\n{table(found)}")


def prepare(demo: pathlib.Path, out: pathlib.Path) -> None:
    """The teacher's answers, their cache, and the student before training; what is there is kept."""
    teacher, dtype = demo / "teacher", precision()
    corpus.write_chats(out / "questions.jsonl", num_chats=QUESTIONS)
    answers = ["--model", teacher, "--prompts", out / "questions.jsonl", "--out", out / "answers.jsonl"]
    run.kdpipe("generate", *answers, "--dtype", dtype, "--max-new-tokens", NEW_TOKENS)
    data = ["--teacher", teacher, "--data", out / "answers.jsonl", "--heldout-fraction", HELDOUT]
    run.kdpipe("extract", *data, "--cache", out / "cache", "--dtype", dtype)
    if not (out / "student" / "config.json").exists():
        write_student(demo, out)


def write_student(demo: pathlib.Path, out: pathlib.Path) -> None:
    """The demo's student with embeddings of another vocabulary, the mean of the teacher's tokens of the same text."""
    tokenizer, old = write_tokenizer(out / "student"), transformers.AutoTokenizer.from_pretrained(demo / "student")
    model = transformers.AutoModelForCausalLM.from_pretrained(demo / "student", dtype="auto")
    embedding = model.get_input_embeddings().weight.detach().float()
    texts = [tokenizer.decode([number]) for number in range(len(tokenizer))]
    special = {"<|end|>": "<|im_end|>", "<|user|>": "<|im_start|>user", "<|assistant|>": "<|im_start|>assistant"}
    ids = [old(special.get(text, text), add_special_tokens=False).input_ids or [old.eos_token_id] for text in texts]
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.stack([embedding[each].mean(0) for each in ids]))
    model.tie_weights()
    end = tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = None, end, end
    model.save_pretrained(out / "student")


def write_tokenizer(folder: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
    """Trained on the documentation that ships with Python."""
    own = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}"), "isolated")
    own.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    own.decoder = decoders.ByteLevel()
    special, alphabet = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    numbers = (str(number) for number in range(1000))
    texts = (f"{sample.question}\n{sample.answer}" for sample in corpus.gather_samples())
    own.train_from_iterator([*texts, *numbers], trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|end|>", pad_token="<|end|>")
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return made


def student(out: pathlib.Path, name: str, seed: int) -> dict[str, float]:
    """One student, unless it is there already; its figures."""
    output, dtype = out / "runs" / f"{name}-{seed}", precision()
    sets = [f"train.{key}={value}" for key, value in (TRAIN | {"seed": seed, "dtype": dtype}).items()]
    sets += ["loss.kd_weight=0"] if name == "ce" else ["loss.kd_weight=0.5", f"student.align={name}"]
    given = ["--cache", out / "cache", "--data", out / "answers.jsonl"]
    seconds = run.kdpipe("train", "--student", out / "student", *given, "--output", output, "--set", *sets)
    kept = output / "cross.json"
    if not kept.exists():
        scores = json.loads((output / "kdpipe.json").read_text())["metrics"]
        kept.write_text(json.dumps(scores | {"digits": digits(output, out), "seconds": seconds}))
    found: dict[str, float] = json.loads(kept.read_text())
    return found


@torch.no_grad()
def digits(folder: pathlib.Path, out: pathlib.Path) -> float:
    """Of the answers to questions that no student saw, see above."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    right = count = 0
    for chat in heldout(out):
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids = torch.tensor(encoded.input_ids)
        likeliest = model(input_ids=ids[None]).logits[0, :-1].argmax(-1)
        for place, (start, end) in enumerate(encoded.offset_mapping[1:]):
            if start >= len(prompt) and any(letter.isdigit() for letter in text[start:end]):
                right, count = right + int(likeliest[place] == ids[place + 1]), count + 1
    return right / max(count, 1)


def heldout(out: pathlib.Path) -> list[list[dict[str, str]]]:
    """The held-out chats, by the cache's own split."""
    cache = Cache.open(out / "cache")
    lines = cache.samples.column("line")[cache.heldout()]
    chats = [json.loads(line)["messages"] for line in (out / "answers.jsonl").read_text().splitlines()]
    return [chats[line - 1] for line in lines.tolist()]


def table(found: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """A line a method: the mean of its seeds, and each seed's bits per byte."""
    lines = [f"{'':14}" + "".join(f"{head:>16}" for head in COLUMNS.values()) + "   bits per byte of each seed"]
    for name, runs in found.items():
        means = [statistics.fmean(each[column] for each in runs) for column in COLUMNS]
        seeds = "  ".join(f"{each['heldout_bits_per_byte']:.4f}" for each in runs)
        lines.append(f"{name:14}{means[0]:16.4f}{means[1]:16.3f}{means[2]:16.0f}   {seeds}")
    return "\n".join(lines)


def precision() -> str:
    return "bfloat16" if run.has_bf16_arithmetic() else "float32"


if __name__ == "__main__":
    main()
