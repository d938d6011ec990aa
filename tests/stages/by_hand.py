"""What training and evaluation must come to: the logits of transformers' own models, and loops written by hand.

Of kdpipe there is the samples' text, their order and the random numbers of a sampled loss; no head, row, formula,
loss, optimizer or schedule. Everything is in float64, each sample alone, every row dense.
"""

# Shapes: n tokens of a sample, R supervised ones, V vocabulary of the tokenizer.

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tests.conftest import Bench
from torch import Tensor

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.specs import LossSpec, TrainSpec
from kdpipe.stages.draws import mixed_seed, uniform

VOCAB_SIZE = 300
Model = transformers.PreTrainedModel
Parameters = dict[str, Tensor]


def load(folder: Path) -> Model:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """Sums over the supervised tokens of some samples; the metrics of every row in a tensor [R]."""

    loss: Tensor
    kd: float
    ce: float
    z: float
    num_tokens: int
    teacher_entropy: Tensor
    top1_agree: Tensor
    top_k_mass: Tensor


def sums(teacher: Model, student: Model, cache: Cache, members: Iterable[int], loss: LossSpec, seed: int) -> Sums:
    """The run file's loss over the samples at these places of the cache; seed: of the step, for a sampled loss."""
    kds, ces, zs, told = [], [], [], []
    for member in members:
        view = cache[member]
        ids = torch.tensor(view.token_ids, dtype=torch.int64)
        at = torch.nonzero(torch.tensor(view.supervised)[1:])[:, 0]
        with torch.no_grad():
            t = teacher(ids[None]).logits[0, at, :VOCAB_SIZE]
        s = student(ids[None]).logits[0, at, :VOCAB_SIZE]
        log_t, log_s = (logits.div(loss.temperature).log_softmax(-1) for logits in (t, s))
        keys = member * 2**32 + torch.arange(len(at))
        kds.append(divergence(log_t, log_s, loss, keys, seed) * (loss.temperature**2 if loss.scale_t2 else 1.0))
        log_p, target = s.log_softmax(-1), ids[at + 1][:, None]
        smooth = loss.label_smoothing
        ces.append(-(1.0 - smooth) * log_p.gather(1, target)[:, 0] - smooth * log_p.mean(-1))
        zs.append(s.logsumexp(-1) ** 2)
        top = log_t.topk(10, -1).indices
        told.append(
            torch.stack(
                [
                    -(log_t.exp() * log_t).sum(-1),
                    (log_t.argmax(-1) == log_s.argmax(-1)).double(),
                    log_s.gather(1, top).exp().sum(-1),
                ]
            ).detach()
        )
    kd, ce, z = (torch.cat(parts).sum() for parts in (kds, ces, zs))
    entropy, agree, mass = torch.cat(told, 1)
    return Sums(
        loss=loss.kd_weight * kd + (1.0 - loss.kd_weight) * ce + loss.z_loss * z,
        kd=float(kd.detach()),
        ce=float(ce.detach()),
        z=float(z.detach()),
        num_tokens=len(entropy),
        teacher_entropy=entropy,
        top1_agree=agree,
        top_k_mass=mass,
    )


def divergence(log_t: Tensor, log_s: Tensor, loss: LossSpec, keys: Tensor, seed: int) -> Tensor:
    """That of every row [R], of log-probabilities [R, V]."""
    t, s = log_t.exp(), log_s.exp()
    if loss.divergence == "forward_kl":
        return (t * (log_t - log_s)).sum(-1)
    if loss.divergence == "jsd":
        assert loss.options["beta"] == 0.5
        log_m = ((t + s) / 2).log()
        return ((t * (log_t - log_m)).sum(-1) + (s * (log_s - log_m)).sum(-1)) / 2
    assert loss.divergence == "sampled_kl"
    draws = uniform(keys, int(loss.options["samples"]), seed)
    places = (draws[:, :, None] >= t.cumsum(-1)[:, None, :]).sum(-1)
    return (log_t - log_s).gather(1, places).mean(-1)


def step_gradients(
    bench: Bench, student: Model, members: Iterable[int], loss: LossSpec, *, step: int = 0, run_seed: int = 0
) -> tuple[Parameters, Sums]:
    """Gradients of the mean loss over a step's samples, by parameter, and its sums."""
    cache = Cache.open(bench.cache)
    found = sums(load(bench.teacher), student, cache, members, loss, mixed_seed(run_seed, step))
    student.zero_grad()
    (found.loss / found.num_tokens).backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}, found


def scores(bench: Bench, members: Iterable[int]) -> dict[str, float]:
    """The figures of an evaluation."""
    cache, teacher, student = Cache.open(bench.cache), load(bench.teacher), load(bench.student)
    names = ("heldout_kl", "heldout_reverse_kl", "top1_agreement", "heldout_ce", "teacher_ce")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bench.student)
    total, count, num_bytes = dict.fromkeys(names, 0.0), 0, 0
    for index in members:
        ids = torch.tensor(cache[index].token_ids, dtype=torch.int64)
        at = torch.nonzero(torch.tensor(cache[index].supervised)[1:])[:, 0]
        with torch.no_grad():
            t, s = (model(ids[None]).logits[0, at, :VOCAB_SIZE].log_softmax(-1) for model in (teacher, student))
        total["heldout_kl"] += float((t.exp() * (t - s)).sum())
        total["heldout_reverse_kl"] += float((s.exp() * (s - t)).sum())
        total["top1_agreement"] += float((t.argmax(-1) == s.argmax(-1)).sum())
        total["heldout_ce"] -= float(s.gather(1, ids[at + 1][:, None]).sum())
        total["teacher_ce"] -= float(t.gather(1, ids[at + 1][:, None]).sum())
        count += len(at)
        num_bytes += len(tokenizer.decode(ids[at + 1], skip_special_tokens=True).encode())
    means = {name: value / count for name, value in total.items()}
    return means | {
        "heldout_bits_per_byte": total["heldout_ce"] / num_bytes / 0.6931471805599453,
        "perplexity": 2.718281828459045 ** means["heldout_ce"],
        "num_tokens": count,
    }


def trained(
    bench: Bench, members: Callable[[int], Iterable[int]], loss: LossSpec, spec: TrainSpec, rates: list[float]
) -> Parameters:
    """The weights after AdamW's steps (Loshchilov & Hutter 2019, algorithm 2) at these learning rates."""
    student = load(bench.student)
    (beta1, beta2), eps = spec.betas, 1e-8
    first, second = ({name: torch.zeros_like(p) for name, p in student.named_parameters()} for _ in range(2))
    for step, rate in enumerate(rates):
        gradients, _ = step_gradients(bench, student, members(step), loss, step=step, run_seed=spec.seed)
        norm = float(torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt())
        clip = min(1.0, spec.max_grad_norm / norm) if spec.max_grad_norm else 1.0
        with torch.no_grad():
            for name, weight in student.named_parameters():
                gradient = clip * gradients[name]
                first[name] = beta1 * first[name] + (1 - beta1) * gradient
                second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
                mean, variance = first[name] / (1 - beta1 ** (step + 1)), second[name] / (1 - beta2 ** (step + 1))
                decay = spec.weight_decay * weight if weight.ndim >= 2 else 0.0
                weight -= rate * (mean / (variance.sqrt() + eps) + decay)
    return {name: p.detach() for name, p in student.named_parameters()}
