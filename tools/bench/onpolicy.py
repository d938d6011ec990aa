"""`kdpipe onpolicy` against TRL's GKD: seconds a step, and the reverse KL of the student that comes out.

    kdpipe   the whole command: its teacher on one core, its student on the other; a step in two micro-batches, so that
             one is trained on while the teacher scores the other
    trl-gkd  GKDTrainer of the installed TRL in one process, both cores
    naive    transformers' generate, dense logits of both models, torch's KL and AdamW in one process, both cores

All three start from the same folders and take the same optimizer steps (fp32, AdamW, the same learning rate, clipping
and divergence) on the same prompts and answers in the same order: the token ids of kdpipe's plan. Each step's answers
are the student's own, or with lmbda 0.5 half of them: kdpipe draws sample by sample, TRL step by step, so a step's
seconds are the mean over all steps but the first. Each is a process of its own, in turn in every round, a seed a round.

Afterwards each student answers the same held-out prompts, by transformers' generate with the same seed; its reverse KL
to the teacher on these answers, over the whole vocabulary, is taken from the dense fp32 logits of both. One function
for all.

Models and tokenizer are made first: two small causal LMs that see a few hundred chats of Python's documentation, the
student fewer than the teacher, until answers end by themselves.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all Python adds
sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

import corpus
from tests.models import CHAT_TEMPLATE, make_model

from kdpipe.manifests.progress import Silent
from kdpipe.manifests.sample import prompt_of
from kdpipe.manifests.specs import DataSpec, RunSpec, TrainSpec
from kdpipe.stages.extract import ExtractSpec
from kdpipe.stages.extract.staging import staged
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.live.beside import find_beside
from kdpipe.stages.train import Training

VOCAB = 4096
TEACHER = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8}
STUDENT = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 6}
SIZES = {"max_position_embeddings": 512, "num_key_value_heads": 2, "initializer_range": 0.02}
NEW_TOKENS = 48
BATCH_TOKENS = 1024
LR = 3e-4
SKIPPED = 2
"""Steps at the start of a run that are not timed: what they need is made and read then."""
HELDOUT = 0.15
MEASURED = 4
"""Answers to each held-out prompt that a student is measured on."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a rival is given, as JSON.

    samples: of every step the token ids of its samples, and how many of them are the prompt
    """

    folder: str
    output: str
    lmbda: float
    seed: int
    samples: list[list[tuple[list[int], int]]]


def write_tokenizer(texts: Iterable[str], folders: Sequence[Path]) -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<|im_end|>", "<|pad|>", "<|im_start|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1])
    fast.chat_template = CHAT_TEMPLATE
    for folder in folders:
        fast.save_pretrained(folder)
    return fast


def write_chats(path: Path, count: int) -> list[str]:
    """Questions of the demo's corpus with the first sentence of each answer; all texts."""
    corpus.write_chats(path, num_chats=count, seed=0)
    chats = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    for chat in chats:
        chat[1]["content"] = chat[1]["content"].split(". ")[0].split(".\n")[0][:200].strip() or "None"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return [turn["content"] for chat in chats for turn in chat]


def pretrain(folder: Path, chats: Path, tokenizer: transformers.PreTrainedTokenizerFast, steps: int) -> None:
    """A model that was made at random learns the chats by cross-entropy."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lines = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    ids = [tokenizer.apply_chat_template(chat, return_dict=False)[:160] for chat in lines]
    optimizer, chance = torch.optim.AdamW(model.parameters(), lr=2e-3), torch.Generator().manual_seed(0)
    for step in range(steps):
        picked = [ids[place] for place in torch.randint(len(ids), (24,), generator=chance).tolist()]
        batch = padded(picked, 0)
        labels = padded(picked, -100)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 10) * (1 - step / steps)
        model(input_ids=batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)


def padded(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    """Rows of unequal lengths as one int64 tensor."""
    longest = max(map(len, rows))
    gaps = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, gaps, strict=True)])


def prepare(folder: Path, *, num_chats: int, steps: tuple[int, int]) -> None:
    texts = write_chats(folder / "chats.jsonl", num_chats)
    models = folder / "teacher", folder / "student"
    special = {"eos_token_id": 0, "pad_token_id": 1}
    for seed, (model, sizes) in enumerate(zip(models, (TEACHER, STUDENT), strict=True)):
        make_model("llama", model, sizes=sizes | SIZES | special, seed=seed, vocab_size=VOCAB)
    tokenizer = write_tokenizer(texts, models)
    for model, number in zip(models, steps, strict=True):
        pretrain(model, folder / "chats.jsonl", tokenizer, number)


@dataclass(frozen=True, slots=True)
class Planned:
    """Token ids and length of the prompt of every sample, by step; and the held-out prompts."""

    steps: list[list[tuple[list[int], int]]]
    heldout: list[list[int]]


def planned(folder: Path, seed: int, num_steps: int) -> Planned:
    """What `kdpipe onpolicy` plans for these data, this seed and so many steps."""
    data = DataSpec(heldout_fraction=HELDOUT)
    spec = ExtractSpec(
        teacher=folder / "teacher", data=(folder / "chats.jsonl",), data_spec=data, keep_rows=False, prompts=True
    )
    with tempfile.TemporaryDirectory(dir=folder) as name:
        plan = Path(name) / "plan"
        with staged(spec, plan, Silent()) as found_plan:
            found_plan.publish()
        training = Training(
            student=folder / "student",
            caches=(plan,),
            output=Path(name) / "out",
            spec=RunSpec(train=TrainSpec(seed=seed, batch_tokens=BATCH_TOKENS, epochs=100, max_steps=num_steps)),
        )
        found = find_beside(training)
        samples, heldout = found.samples
        batches = PlannedBatches(
            found.dataset, samples, seed=seed, batch_tokens=BATCH_TOKENS, epochs=100, max_steps=num_steps
        )

        def text(sample: int) -> tuple[list[int], int]:
            tokens = found.dataset.tokens(int(sample))
            return tokens.token_ids.tolist(), len(prompt_of(tokens))

        steps = [[text(sample) for sample in batches.samples(step)] for step in range(num_steps)]
        return Planned(steps, [ids[:cut] for ids, cut in map(text, heldout)])


def run_kdpipe(work: Work) -> list[float]:
    """Seconds of each step but the first: from the end of one to the end of the next."""
    folder = Path(work.folder)
    models = ["--teacher", folder / "teacher", "--student", folder / "student", "--output", work.output]
    data = ["--prompts", folder / "chats.jsonl", "--heldout-fraction", HELDOUT]
    how = ["--lmbda", work.lmbda, "--beta", 1, "--max-new-tokens", NEW_TOKENS, "--dtype", "float32"]
    train = {
        "batch_tokens": BATCH_TOKENS,
        "epochs": 100,
        "max_steps": len(work.samples),
        "lr": LR,
        "schedule": "constant",
        "warmup_ratio": 0,
        "dtype": "float32",
        "seed": work.seed,
        "save_every": 0,
        "save_minutes": 0,
        "grad_accum": 2,
        "eval_tokens": 64,
    }
    sets = [f"train.{key}={value}" for key, value in train.items()]
    command = ["-m", "kdpipe.pipeline.cli", "onpolicy", *models, *data, *how, "--set", *sets]
    in_process(command)
    events = [json.loads(line) for line in (Path(work.output) / "events.jsonl").read_text().splitlines()]
    times = [event["time"] for event in events if event["kind"] == "step"]
    return [after - before for before, after in pairwise(times)]


def in_process(words: Sequence[object]) -> None:
    """A Python of its own on both cores, without settings of OpenMP."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"onpolicy: {words} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def run_rival(name: str, work: Work) -> list[float]:
    """As run_kdpipe."""
    given = Path(f"{work.output}.json")
    given.write_text(json.dumps({field: getattr(work, field) for field in work.__slots__}))
    in_process([__file__, "--as", name, given])
    times: list[float] = json.loads((Path(work.output) / "times.json").read_text())
    return [after - before for before, after in pairwise(times)]


def trl_gkd(work: Work) -> None:
    """GKDTrainer with its own collator, on batches of the very token ids."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from torch.utils.data import DataLoader
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    records = [
        {"prompt": "", "input_ids": ids, "completion_mask": [0] * cut + [1] * (len(ids) - cut)}
        for step in work.samples
        for ids, cut in step
    ]
    numbers = iter(range(len(records)))
    order = [[next(numbers) for _ in step] for step in work.samples]
    times: list[float] = []

    class Trainer(GKDTrainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(self.train_dataset, batch_sampler=order, collate_fn=self.data_collator)

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(time.time())

    arguments = GKDConfig(
        output_dir=work.output,
        lmbda=work.lmbda,
        beta=1.0,
        temperature=1.0,
        max_new_tokens=NEW_TOKENS,
        max_steps=len(order),
        per_device_train_batch_size=len(order[0]),
        learning_rate=LR,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        seed=work.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    folder = Path(work.folder)
    trainer = Trainer(
        model=load(folder / "student"),
        teacher_model=load(folder / "teacher"),
        args=arguments,
        train_dataset=Dataset(InMemoryTable.from_pylist(records), fingerprint="bench"),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "student"),
        callbacks=[Clock()],
    )
    trainer.train()
    trainer.save_model(work.output)
    write_times(work, times)


def naive(work: Work) -> None:
    """The loop as it is written first: generate, two dense forward passes, a KL, AdamW."""
    torch.manual_seed(work.seed)
    folder, times = Path(work.folder), list[float]()
    student, teacher = load(folder / "student"), load(folder / "teacher")
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    for samples in work.samples:
        own = torch.rand(len(samples)) < work.lmbda
        asked = [ids[:cut] for (ids, cut), mine in zip(samples, own, strict=True) if mine]
        texts = [each for each, mine in zip(samples, own, strict=True) if not mine]
        texts += [(text, len(prompt)) for prompt, text in zip(asked, answers(student, asked), strict=True)]
        kl, mask = reverse_kl_of(student, teacher, texts)
        (kl[mask].sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.time())
    student.save_pretrained(work.output)
    write_times(work, times)


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def write_times(work: Work, times: list[float]) -> None:
    (Path(work.output) / "times.json").write_text(json.dumps(times))


@torch.no_grad()
def answers(model: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Each prompt with an answer by transformers' generate, up to its end."""
    if not prompts:
        return []
    ids, stop = padded(prompts, 1, left=True), model.generation_config.eos_token_id
    mask = padded([[1] * len(prompt) for prompt in prompts], 0, left=True)
    ends = {"pad_token_id": 1, "eos_token_id": stop, "max_new_tokens": NEW_TOKENS}
    how = transformers.GenerationConfig(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, **ends)
    model.eval()
    written = model.generate(input_ids=ids, attention_mask=mask, generation_config=how)[:, ids.shape[1] :].tolist()
    model.train()
    lengths = [row.index(stop) + 1 if stop in row else len(row) for row in written]
    return [prompt + row[:length] for prompt, row, length in zip(prompts, written, lengths, strict=True)]


def reverse_kl_of(student: Any, teacher: Any, texts: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """KL(student, teacher) before each token of texts [B, n - 1], and which of them are of an answer.

    texts: token ids, and how many of them are the prompt
    """
    ids = padded([text for text, _ in texts], 1)
    mask = padded([[0] * cut + [1] * (len(text) - cut) for text, cut in texts], 0)[:, 1:].bool()
    log_s = student(input_ids=ids).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        log_t = teacher(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return (log_s.exp() * (log_s - log_t)).sum(-1), mask


@torch.no_grad()
def heldout_reverse_kl(folder: Path, teacher: Any, prompts: Sequence[list[int]]) -> float:
    """Mean over the tokens of a student's own answers to held-out prompts."""
    student = load(folder).eval()
    student.generation_config.eos_token_id = teacher.generation_config.eos_token_id
    total, count = 0.0, 0
    torch.manual_seed(0)
    for _ in range(MEASURED):
        texts = [(text, len(prompt)) for prompt, text in zip(prompts, answers(student, prompts), strict=True)]
        student.eval()
        kl, mask = reverse_kl_of(student, teacher, texts)
        total, count = total + float(kl[mask].double().sum()), count + int(mask.sum())
    return total / count


RIVALS: dict[str, Callable[[Work], None]] = {"trl-gkd": trl_gkd, "naive": naive}


def measure(folder: Path, lmbda: float, *, rounds: int, num_steps: int) -> dict[str, dict[str, list[float]]]:
    """Of each of them seconds a step and reverse KL, a round each; and the reverse KL before."""
    teacher = load(folder / "teacher").eval()
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "kl": []} for name in ("kdpipe", *RIVALS)}
    for seed in range(rounds):
        plan = planned(folder, seed, num_steps)
        for name, results in found.items():
            work = Work(str(folder), str(folder / f"{name}-{lmbda}-{seed}"), lmbda, seed, plan.steps)
            seconds = run_kdpipe(work) if name == "kdpipe" else run_rival(name, work)
            step, kl = statistics.fmean(seconds[SKIPPED:]), heldout_reverse_kl(Path(work.output), teacher, plan.heldout)
            results["seconds"].append(step)
            results["kl"].append(kl)
            print(f"lmbda {lmbda} seed {seed} {name}: {step:.3f} s, KL {kl:.4f}", file=sys.stderr)
    found["before"] = {"kl": [heldout_reverse_kl(folder / "student", teacher, plan.heldout)]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="lmbda 1 and a few steps: within a minute")
    parser.add_argument("--as", dest="name", choices=RIVALS, help=argparse.SUPPRESS)
    parser.add_argument("work", nargs="?", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.name:
        return RIVALS[asked.name](Work(**json.loads(asked.work.read_text())))
    with tempfile.TemporaryDirectory(prefix="kdpipe-bench-") as name:
        folder = Path(name)
        prepare(folder, num_chats=80 if asked.quick else 400, steps=(4, 2) if asked.quick else (120, 30))
        for lmbda in (1.0,) if asked.quick else (1.0, 0.5):
            rounds, steps = (1, 5) if asked.quick else (3, 20)
            report(lmbda, measure(folder, lmbda, rounds=rounds, num_steps=steps), steps, as_json=asked.json)
    return None


def report(lmbda: float, found: dict[str, dict[str, list[float]]], steps: int, *, as_json: bool) -> None:
    before = found.pop("before")["kl"][0]
    case = f"lmbda {lmbda}, {steps} steps, V={VOCAB}, teacher 6x256, student 3x192, fp32; KL before {before:.3f}"
    for key, metric, unit in (("seconds", "time", "s a step"), ("kl", "error", "nats, held-out reverse KL")):
        figures = {name: round(statistics.median(each[key]), 4) for name, each in found.items()}
        if as_json:
            line = {"bench": "onpolicy", "case": case, "metric": metric, "unit": unit}
            print(json.dumps({**line, "kdpipe": figures.pop("kdpipe"), "rivals": figures}))
        else:
            print(f"{case}: {', '.join(f'{name} {figure}' for name, figure in figures.items())} {unit}")


if __name__ == "__main__":
    main()
