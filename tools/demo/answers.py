"""What models answer to the same questions, side by side: a number says how near, an answer says to what."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = ("What is the capital of France?", "What is a list in Python?")
MAX_NEW_TOKENS = 48
WIDTH = 36


def side_by_side(models: Mapping[str, pathlib.Path], questions: Sequence[str] = QUESTIONS) -> str:
    """The greedy answers of the models in these folders, a column each."""
    said = [answers(folder, questions) for folder in models.values()]
    lines = [_row([[name] for name in models])]
    for question, row in zip(questions, zip(*said, strict=True), strict=True):
        lines += ["", question, _row([textwrap.wrap(answer, WIDTH - 2) for answer in row])]
    return "\n".join(lines)


@torch.inference_mode()
def answers(folder: pathlib.Path, questions: Sequence[str]) -> list[str]:
    """Greedy answers, cut after MAX_NEW_TOKENS, of a model as `from_pretrained` loads it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    found = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        made = model.generate(**asked, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0, asked["input_ids"].shape[1] :]
        cut = made[-1] != tokenizer.eos_token_id
        found.append(tokenizer.decode(made, skip_special_tokens=True).strip() + (" ..." if cut else ""))
    return found


def _row(cells: Sequence[Sequence[str]]) -> str:
    """Columns of lines, put beside each other."""
    height = max(map(len, cells))
    padded = [[*cell, *[""] * (height - len(cell))] for cell in cells]
    return "\n".join("".join(f"{text:{WIDTH}}" for text in line).rstrip() for line in zip(*padded, strict=True))
