"""Writes docs/run-file.md from the specs themselves, so that no key, default or sentence can be out of date.

python tools/run_file_doc.py            prints the page; tests/test_docs.py compares it with the file
"""

from kdpipe.manifests.specs import fields, flag_of
from kdpipe.pipeline.reads import READS

HEAD = """# The run file

A TOML file that describes a whole run, given with `--config` to every command; each reads its part:

```toml
[teacher]
path = "models/large"

[data]
paths = ["chat.jsonl"]

[cache]
path = "/scratch/cache"

[student]
path = "models/small"

[loss]
divergence = "jsd"
options = { beta = 0.5 }

[train]
output = "runs/a"
lr = 1e-4
epochs = 3
```

```
kdpipe plan    --config run.toml
kdpipe extract --config run.toml
kdpipe train   --config run.toml --set train.lr=3e-4 train.output=runs/b
kdpipe eval    --config run.toml
```

Paths are relative to the folder where the command runs. `--set table.key=value` overrides a key of the file, an option
of the command line overrides both; that of a list takes several values, is repeated, or takes the list as the file
writes it: `--lora-targets q_proj v_proj` is `--lora-targets '["q_proj", "v_proj"]'`. An unknown key is an error that
names the nearest known one, and so is `--set` of a key that the command does not read. In training `[data]` must agree
with the cache, save for `heldout_fraction`; data of a file without `[teacher]` and `[cache]` are trained on alone, by
cross-entropy.
"""


def page() -> str:
    """The whole of docs/run-file.md."""
    lines, table = [HEAD], ""
    for key, field in fields().items():
        if (now := key.partition(".")[0]) != table:
            table = now
            lines += [f"\n## [{table}]\n", "| key | option | default | meaning |", "|---|---|---|---|"]
        default = field.get_default(call_default_factory=True)
        shown = "not set" if default in (None, ()) else str(list(default) if isinstance(default, tuple) else default)
        option = f"`{flag_of(key).name}`" if any(key in reads.of_options() for reads in READS.values()) else ""
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{key.partition('.')[2]}` | {option} | `{shown}` | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
