"""The demo's teacher: a small Qwen3 trained on the spot with plain PyTorch, as any teacher not made by kdpipe would be.

Invariant: the folder appears under its name only when training is over and every file is in it; an interrupted
training leaves a `.partial` folder at most, which the next one sweeps.
Cost: 470 CPU seconds for three epochs of the demo corpus (bfloat16 matmuls, 6,700 tokens a second on two cores);
1.3 GB of memory.
"""

import math
import os
import pathlib
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from architecture import qwen3_config
from transformers import AutoTokenizer, Qwen3ForCausalLM

Chat = list[dict[str, str]]

BATCH_TOKENS = 4096
WARMUP_FRACTION = 0.05
MAX_GRAD_NORM = 1.0
WEIGHT_DECAY = 0.1
LOG_EVERY_S = 10.0
WIDTH_STEP = 32
IGNORED = -100  # the label that cross_entropy leaves out


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherInfo:
    num_parameters: int
    num_steps: int
    num_tokens: int
    """Tokens of one epoch, padding left out."""
    loss: float
    """Mean over the tokens of the last epoch, in nats."""
    duration_s: float


def width(num_tokens: int) -> int:
    """The padded length of a chat: oneDNN compiles a kernel for every new shape, so there are few shapes."""
    return math.ceil(num_tokens / WIDTH_STEP) * WIDTH_STEP


def batches(lengths: Sequence[int], *, batch_tokens: int, rng: random.Random) -> list[list[int]]:
    """Positions put into batches of about equal length, none larger than `batch_tokens` with its padding, shuffled.

    Unsorted, short chats are padded to the longest of a random batch and the training takes four times longer."""
    order = list(range(len(lengths)))
    rng.shuffle(order)  # ties between equal widths fall differently every epoch
    order.sort(key=lambda position: width(lengths[position]))
    made: list[list[int]] = [[]]
    for position in order:  # ascending: the newcomer is the widest of its batch
        if made[-1] and (len(made[-1]) + 1) * width(lengths[position]) > batch_tokens:
            made.append([])
        made[-1].append(position)
    rng.shuffle(made)
    return made


def learning_rate_factor(step: int, *, num_steps: int) -> float:
    """Linear warmup over the first twentieth of the steps, then half a cosine down to zero."""
    num_warmup = max(1, round(WARMUP_FRACTION * num_steps))
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


def padded(chats: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels) [B, T]: the chats side by side; the label at t is the token at t + 1, IGNORED past the end."""
    shape = (len(chats), width(max(map(len, chats))))
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    for row, chat in enumerate(chats):
        ids[row, : len(chat)] = torch.tensor(chat)
        labels[row, : len(chat) - 1] = torch.tensor(chat[1:])
    return ids, labels


def token_loss(model: Qwen3ForCausalLM, ids: torch.Tensor, *, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token. No attention mask: padding is on the right, out of sight."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bf16_arithmetic()):
        logits = model(input_ids=ids).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def has_bf16_arithmetic() -> bool:
    """Whether the processor multiplies bfloat16 itself; where it does not, emulation is slower than fp32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class _Progress:
    """A line every ten seconds: how far, at which rate, how long still."""

    def __init__(self, *, total: int) -> None:
        self.total, self.done = total, 0
        self.started = self.spoken = time.monotonic()

    def advance(self, num_tokens: int, *, loss: float) -> None:
        self.done += num_tokens
        now = time.monotonic()
        if now - self.spoken >= LOG_EVERY_S or self.done == self.total:
            self.spoken = now
            rate = self.done / (now - self.started)
            left = (self.total - self.done) / rate
            print(
                f"teacher: {self.done:,}/{self.total:,} tokens, loss {loss:.3f}, {rate:,.0f} tok/s, {left:.0f} s left",
                flush=True,
            )


def train_teacher(
    chats: Sequence[Chat],
    *,
    tokenizer_folder: pathlib.Path,
    out: pathlib.Path,
    num_epochs: int = 3,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> TeacherInfo:
    """Train a teacher on `chats` and write it, with its tokenizer, to the folder `out`, which must not exist yet."""
    if out.exists():
        raise FileExistsError(f"{out}: there is a teacher already; remove the folder to train another")
    started = time.monotonic()
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(qwen3_config(tokenizer_folder, width=256, layers=4, heads=4))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    token_ids = tokenizer.apply_chat_template(list(chats), return_dict=True)["input_ids"]
    num_tokens = sum(map(len, token_ids))
    loss, num_steps = _fit(model, token_ids, num_epochs=num_epochs, learning_rate=learning_rate, seed=seed)
    _publish(model, tokenizer_folder=tokenizer_folder, out=out)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return TeacherInfo(
        num_parameters=num_parameters,
        num_steps=num_steps,
        num_tokens=num_tokens,
        loss=loss,
        duration_s=time.monotonic() - started,
    )


def _fit(
    model: Qwen3ForCausalLM, token_ids: Sequence[Sequence[int]], *, num_epochs: int, learning_rate: float, seed: int
) -> tuple[float, int]:
    """Train in place; (mean loss of the last epoch, number of steps)."""
    rng = random.Random(seed)
    lengths = [len(ids) for ids in token_ids]
    epochs = [batches(lengths, batch_tokens=BATCH_TOKENS, rng=rng) for _ in range(num_epochs)]
    num_steps = sum(map(len, epochs))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, num_steps=num_steps)
    )
    progress = _Progress(total=num_epochs * sum(lengths))
    model.train()
    mean = math.nan
    for epoch in epochs:
        total = 0.0
        for batch in epoch:
            ids, labels = padded([token_ids[position] for position in batch])
            loss = token_loss(model, ids, labels=labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            num_batch_tokens = sum(lengths[position] for position in batch)
            total += loss.item() * num_batch_tokens
            progress.advance(num_batch_tokens, loss=loss.item())
        mean = total / sum(lengths)
    return mean, num_steps


def _publish(model: Qwen3ForCausalLM, *, tokenizer_folder: pathlib.Path, out: pathlib.Path) -> None:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(partial)
    os.replace(partial, out)
