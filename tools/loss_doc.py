"""Writes docs/losses.md from the table of divergences itself, so that no name, option or formula is out of date.

python tools/loss_doc.py            prints the page; tests/test_docs.py compares it with the file
"""

from kdpipe.stages.loss import DIVERGENCES

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

TAIL = """
Logarithms are natural. Probabilities that tie count in the order of the vocabulary wherever an order decides.

## How it is computed

`fused_distill_loss` takes hidden states and heads. Four matrix products run on chunks of tokens, in the inputs' dtype;
what lies between them is one pass over a few rows at a time, in fp32, compiled by torch.compile where the work is worth
the seconds that takes (2^24 logits and more) and a compiler is there, else operator by operator.
`TORCH_COMPILE_DISABLE=1` turns compiling off. No array of all tokens by all logits exists; the gradient is made in the
forward pass. Measured by `tools/bench/loss.py --json`, against the four products alone.

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


def page() -> str:
    """The whole of docs/losses.md."""
    lines = []
    for divergence in DIVERGENCES.values():
        options = "; ".join(
            f"`{name}` = {option.default:g}: {option.meaning}" for name, option in divergence.options.items()
        )
        cells = (f"`{divergence.name}`", divergence.formula, options or "none", divergence.source)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return HEAD + "".join(lines) + TAIL


if __name__ == "__main__":
    print(page(), end="")
