"""Writes docs/run-file.md from the specs themselves, so that no key, default or sentence can be out of date.

python tools/run_file_doc.py            prints the page; tests/test_docs.py compares it with the file
"""

import ast
import inspect
import textwrap

from pydantic import BaseModel

from kdpipe.manifests.specs import RunSpec

HEAD = """# The run file

A TOML file given with `--config`; `--set table.key=value` overrides a key of it. An unknown key is an error that names
the nearest known one. `[data]` is read by `kdpipe plan` and `kdpipe extract` (their flags override it); in training it
must agree with the cache, save for `heldout_fraction`. A file may hold tables for several commands; `--set` of a
key that the command does not read is an error.

```toml
[loss]
divergence = "jsd"
kd_weight = 0.9
options = { beta = 0.5 }

[train]
lr = 1e-4
epochs = 3
```
"""


def sentences(model: type[BaseModel]) -> dict[str, str]:
    """The sentence under each field of a spec's source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def page() -> str:
    """The whole of docs/run-file.md."""
    lines = [HEAD]
    for table, entry in RunSpec.model_fields.items():
        model = entry.annotation
        assert inspect.isclass(model)
        assert issubclass(model, BaseModel)
        told = sentences(model)
        lines += [f"\n## [{table}]\n", "| key | default | meaning |", "|---|---|---|"]
        for key, field in model.model_fields.items():
            default = field.get_default(call_default_factory=True)
            shown = "not set" if default is None else str(list(default) if isinstance(default, tuple) else default)
            lines.append(f"| `{key}` | `{shown}` | {told[key]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
