"""Chat data made of nonsense words: as many samples as a test wants, the same every time."""

import json
import random
from pathlib import Path

WORDS = ("teacher", "student", "row", "cache", "shard", "token", "hidden", "head", "plan", "gate", "seal", "salt")


def write_chats(path: Path, count: int, *, seed: int = 0, longest: int = 40) -> Path:
    """`count` one-turn chats as JSONL, answers of 1 to `longest` words."""
    chance = random.Random(seed)

    def text(words: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(words))

    with open(path, "w", encoding="utf-8") as file:
        for index in range(count):
            messages = [
                {"role": "user", "content": f"{index}: {text(chance.randint(1, 8))}?"},
                {"role": "assistant", "content": text(chance.randint(1, longest))},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
