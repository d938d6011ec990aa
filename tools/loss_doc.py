"""Writes docs/losses.md from the table of divergences itself, so that no name, option or formula is out of date.

python tools/loss_doc.py            prints the page; tests/test_docs.py compares it with the file, and `methods()` with
                                    the table in docs/cross-losses.md
"""

from kdpipe.manifests.specs import PRESETS
from kdpipe.stages.loss import DIVERGENCES
from kdpipe.stages.loss.cross import METHODS

HEAD = """# Losses

The loss of a supervised token is `kd_weight * D(T, S) + (1 - kd_weight) * CE`. T and S are
softmax(logits / temperature) of teacher and student over the vocabulary that both have, in fp32; the cross-entropy is
taken at temperature 1. `scale_t2 = true` multiplies the divergence by temperature squared. A step divides the sum over
its tokens once, by their number over all ranks and accumulation. The teacher's row is exact, so every divergence is of
whole distributions.

```
kdpipe train --student S --cache C --output O --set loss.divergence=skew_kl loss.options.alpha=0.2 loss.temperature=2
```

| name | value of a token | options | source |
|---|---|---|---|
"""

MIDDLE = """
Logarithms are natural. Probabilities that tie count in the order of the vocabulary wherever an order decides. A value
that is never negative is so to fp32 rounding of the log-probabilities, some 5e-7 a token.

`label_smoothing` is that of the cross-entropy. `z_loss` adds `z_loss * logsumexp(logits)^2` of every token to the loss,
whatever `kd_weight` is. `sampled_kl` draws anew in every step, by `train.seed`, the step and the token alone: the same
on one rank and on many. `token_reverse_kl` looks at the text's own tokens: on texts that the student wrote, or a model
near it, it is the policy gradient of the reverse KL; on others it is not. Side-cars of a cache, of a few bytes a token,
serve some of these: [derive.md](derive.md).

## Other projects' losses

`kdpipe train --loss-preset NAME` (or `loss.preset`) starts from another project's loss at its defaults; any key of
`[loss]` given beside it wins. `tests/stages/loss/test_presets.py` works the values out by hand,
`tests/stages/loss/test_rivals.py` compares values and gradients with TRL's and Liger's own installed code.

| preset | what it sets | how that project's names map |
|---|---|---|
"""

MAPPING = {
    "kdflow": "`kd_ratio` is `kd_weight`; `kl`, `rkl`, `skl`, `srkl`, `akl`, `hrl` are `forward_kl`, `reverse_kl`, "
    "`skew_kl`, `skew_reverse_kl`, `adaptive_kl`, `hierarchical_ranking` (theirs ignores the temperature); "
    "`skew_lambda`, `adaptive_alpha` are `alpha`, `hrl_topk` is `k`; `jsd_beta` is 1 - `beta`. It applies no head "
    "bias, softcap or logit scale; kdpipe always does.",
    "trl": "`beta` is `loss.options.beta`: 0 forward KL, 1 reverse KL. GKD's `temperature` (0.9) is that of sampling "
    "alone: its trainer does not hand it to the loss (1.16.0). `DistillationTrainer` has `temperature` 1 for the loss "
    "and `beta` 1, reverse KL, by default: set `loss.options.beta=1`.",
    "torchtune": "`kd_ratio` is `kd_weight`. `ForwardKLLoss` leaves out the teacher's entropy: `soft_cross_entropy`, "
    "with forward KL's gradient. `ReverseKLLoss` is `reverse_kl`; `SymmetricKLLoss` is `symmetric_kl` with "
    "`sym_kd_ratio` as `forward_share`, less that share of the entropy.",
    "distillkit": "A loss function's `weight` over the sum of weights is `kd_weight`; `kl` and `jsd` are multiplied by "
    "temperature squared; `kl`, `jsd` (`beta` 0.5), `tvd` have the same names.",
    "trl-gold": "With `student.align=gold`: GOLD with `uld_use_hybrid_loss`; docs/cross-losses.md says what differs.",
    "trl-uld": "With `student.align=uld`: GOLD with `use_extended_uld=False`; docs/cross-losses.md says what differs.",
}

TAIL = """
The values are those of a token, and so of the mean over the supervised tokens of a step, which kdpipe, KDFlow and TRL
once by their number over all ranks and accumulation. DistillKit and torchtune divide each micro-batch by its own
number, and DistillKit takes the divergence at labelled positions where the cross-entropy is that of the one before.

## What a step tells of itself

Every step's event (`OUTPUT/events.jsonl`) has, per supervised token, `loss/mean`, `kd/mean`, `ce/mean` and `z/mean`
(what `z_loss` multiplies). With a teacher (`kd_weight` above 0) it has `teacher_entropy/mean` and, over every 16th
token of each batch, `top1_agreement` (the student likes no token better than the teacher's likeliest) and `top_k_mass`
(its probability of the teacher's ten likeliest); these three are at the loss's temperature. They come from the same
pass as the loss. Across tokenizers [they are over other tokens](cross-losses.md#what-a-step-tells-of-itself).

## How it is computed

`fused_distill_loss` takes hidden states and heads. Four matrix products run on chunks of tokens, in the inputs' dtype;
what lies between them is one pass over a few rows at a time, in fp32, compiled by torch.compile where the work is worth
the seconds that takes (2^24 logits and more) and a compiler is there, else operator by operator.
`TORCH_COMPILE_DISABLE=1` turns compiling off. Of the logits only those of a chunk exist, of both models: 512 tokens on
a CPU, 2048 on a GPU; batches of up to that and the student's width are one chunk, which then is both faster and smaller
than an fp32 sum of the head's gradient over several. The gradient is made in the forward pass. Measured by
`tools/bench/loss.py --json`, against the four products alone.

## Adding a divergence

A definition in `stages/loss/dense.py`, from log-probabilities [T, V] to values [T]:

```python
def reverse_kl(log_p_teacher, log_p_student):
    return kl(log_p_student, log_p_teacher)
```

its twin in `stages/loss/pointwise.py`, from a block of rows to values and the gradient with respect to the student's
logits:

```python
def reverse_kl(rows):
    apart = rows.log_p_student - rows.log_p_teacher
    value = (rows.p_student * apart).sum(-1)
    return value, rows.p_student * (apart - value[:, None])
```

and an entry of `DIVERGENCES` in `stages/loss/divergences.py` with formula, source and options. The tests run over the
table: values and gradients against fp64, extreme logits, bias, softcap, scale, weights, the compiled pass.
"""

METHODS_MIDDLE = """
A divergence is one of [losses.md](losses.md), with its own options beside the method's. What a method does not take is
refused by name, a misspelt option with the nearest.

## When to take which

"""


def page() -> str:
    """The whole of docs/losses.md."""
    lines = []
    for divergence in DIVERGENCES.values():
        options = "; ".join(
            f"`{name}` = {option.default:g}: {option.meaning}" for name, option in divergence.options.items()
        )
        cells = (f"`{divergence.name}`", divergence.formula, options or "none", divergence.source)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    rows = []
    for name, keys in PRESETS.items():
        told = ", ".join(f"`{key} = {_toml(value)}`" for key, value in keys.items())
        rows.append(f"| `{name}` | {told} | {MAPPING[name]} |\n")
    return HEAD + "".join(lines) + MIDDLE + "".join(rows) + TAIL


def methods() -> str:
    """The table of docs/cross-losses.md, and its list of when to take which."""
    rows, when = [], []
    for method in METHODS.values():
        taken = ", ".join(f"`{name}`" for name in method.divergences) or "its own"
        left = [name for name in DIVERGENCES if name not in method.divergences]
        if method.divergences and len(left) <= 1:
            taken = f"all but {', '.join(f'`{name}`' for name in left)}" if left else "all"
        options = "; ".join(
            f"`{name}` = {option.default:g}: {option.meaning}" for name, option in method.options.items()
        )
        cells = (f"`{method.name}`", method.formula, taken, options or "none", method.source)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
        when.append(f"- `{method.name}`: {method.when}.\n")
    return "".join(rows) + METHODS_MIDDLE + "".join(when)


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


if __name__ == "__main__":
    print(page(), end="")
