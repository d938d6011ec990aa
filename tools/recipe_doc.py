"""Writes docs/recipes.md from the recipes themselves, so that no key, value or name can be out of date.

python tools/recipe_doc.py              prints the page; tests/test_docs.py compares it with the file
"""

import re

from kdpipe.pipeline.commands.recipe import recipes

HEAD = """# Recipes: other projects' examples as run files

```
kdpipe recipe                                       # which there are
kdpipe recipe torchtune-kd-lora --out run.toml      # write one, edit its paths
kdpipe extract --config run.toml                    # the commands stand at its top
kdpipe train --config run.toml
```

A recipe does what an example of KDFlow, torchtune or LLM-Dojo does, at its values. Sizes of steps are tokens here and
samples there: each recipe says what was reckoned. A name of theirs that is typed by habit is refused with ours
(`train.learning_rate`: did you mean `train.lr`?).

These options of theirs have no key, because it is always so: `packing_samples`, `packed` (samples are packed),
`apply_chat_template` (where the tokenizer has one), `optimizer.fused`, `logging_steps` (every step is logged),
`resume_from_checkpoint` (the same command goes on), `shuffle`, `chunked_loss_size` (`loss.chunk_tokens` where it is to
be chosen). `trust_remote_code` takes the digest of the code that may run: `student.trust_remote_code`,
`teacher.trust_remote_code`. `use_wandb` is `train.loggers=wandb`; `--nproc_per_node` is `--nproc`, all GPUs when left
out. `ray start`, DeepSpeed and accelerate configs have no counterpart.
"""


def page() -> str:
    """The whole of docs/recipes.md."""
    lines = [HEAD]
    for name, text in recipes().items():
        top, _, body = text.partition("\n\n")
        said = [line.removeprefix("#").strip() for line in top.splitlines()]
        lines += [f"\n## {name}\n", " ".join(line for line in said if line and not line.startswith("kdpipe ")), ""]
        commands = ", then ".join(f"`{' '.join(line.split())}`" for line in said if line.startswith("kdpipe "))
        lines += [f"{commands}\n", "| key | value | there |", "|---|---|---|"]
        lines += [f"| `{key}` | `{value}` | {there} |" for key, value, there in _keys(body)]
    return "\n".join(lines) + "\n"


def _keys(body: str) -> list[tuple[str, str, str]]:
    """Of each line `key = value  # what it is there` of a run file: a comment of its own goes to the next key."""
    found, table, above = [], "", ""
    for line in body.splitlines():
        if heading := re.match(r"\[(\w+)\]", line):
            table, above = heading[1], ""
        elif entry := re.match(r"(# )?(\w+) = (.*?)\s*(?:# (.*))?$", line):
            there = " ".join(filter(None, (above, entry[4] or ""))) + (" (commented out: for GPUs)" if entry[1] else "")
            found.append((f"{table}.{entry[2]}", entry[3], there.strip()))
            above = ""
        elif line.startswith("# "):
            above = line.removeprefix("# ")
    return found


if __name__ == "__main__":
    print(page(), end="")
