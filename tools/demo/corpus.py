"""Real text that ships with Python, as chat samples: a question and its documentation.

Owns what the demo's models read: the language reference (`pydoc_data.topics`) cut into pieces section by section,
and the docstrings of the standard library, read with `ast` so that no module is imported for them.
Invariant: a pure function of the Python installation and the seed. The samples and their order do not depend on the
clock, the environment or the order in which a folder lists its files; no answer occurs twice.
Cost: three seconds and nothing outside the standard library.
"""

import ast
import hashlib
import inspect
import itertools
import json
import pathlib
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

MAX_ANSWER_CHARS = 640  # about 160 tokens
MIN_ANSWER_CHARS = 250  # a chat costs 50 tokens beside its answer, of which nothing is learnt
MAX_SIGNATURE_CHARS = 80
UNDERLINES = frozenset('*=-^~"')
# Tests, bundled copies and programs that happen to live beside the library, and what later Pythons dropped.
SKIPPED_FOLDERS = frozenset({
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "encodings", "distutils",
    "site-packages", "dist-packages", "lib-dynload",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    question: str
    answer: str

    def messages(self) -> list[dict[str, str]]:
        """The sample in the chat layout that `kdpipe --data` and chat templates read."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


def pieces(text: str, *, max_chars: int = MAX_ANSWER_CHARS) -> list[str]:
    """Whole paragraphs put together while they fit in `max_chars`; one that is longer alone is cut between lines."""
    units: list[tuple[str, str]] = []  # (what joins it to the text before it, the text)
    for paragraph in text.split("\n\n"):
        lines = [paragraph] if len(paragraph) <= max_chars else paragraph.splitlines()
        units += [("\n" if place else "\n\n", line[:max_chars].rstrip()) for place, line in enumerate(lines)]
    packed: list[str] = []
    for joint, unit in units:
        if packed and len(packed[-1]) + len(joint) + len(unit) <= max_chars:
            packed[-1] += joint + unit
        else:
            packed.append(unit)
    return [stripped for piece in packed if (stripped := piece.strip("\n"))]


def sections(text: str) -> Iterator[tuple[str, str]]:
    """(heading, text below it) for every heading of a topic: a line over an equally long line of `*`, `=` or `-`."""
    heading, body = "", list[str]()
    lines = text.splitlines()
    for place, line in enumerate(lines):
        rule = lines[place + 1] if place + 1 < len(lines) else ""
        if _is_heading(line, rule=rule):
            yield heading, "\n".join(body)
            heading, body = line, []
        elif not (place and _is_heading(lines[place - 1], rule=line)):
            body.append(line)
    yield heading, "\n".join(body)


def _is_heading(line: str, *, rule: str) -> bool:
    return len(rule) >= 3 and len(rule) == len(line) and len(set(rule)) == 1 and rule[0] in UNDERLINES


def topic_samples() -> Iterator[Sample]:
    """The language reference: every section of every topic, in pieces; pieces after the first say which they are."""
    for topic in sorted(topics):
        for heading, body in sections(topics[topic]):
            for part, piece in enumerate(pieces(body), start=1):
                title = heading or f"the topic {topic}"
                which = title if part == 1 else f"{title}, part {part}"
                yield Sample(question=f"What does the language reference say about: {which}?", answer=piece)


def library_files(root: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    """(module, file) for every source file of the standard library below `root`, sorted by module."""
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and not SKIPPED_FOLDERS & set(parts):
            found.append((".".join(parts).removesuffix(".__init__"), path))
    return sorted(found)


def docstring_samples(source: str, *, module: str) -> Iterator[Sample]:
    """The docstrings of one source file: the module's, its classes' and functions', methods included."""
    tree = ast.parse(source)
    yield from _documented(tree, question=f"What is the module {module} for?")
    yield from _members(tree, prefix=module)


def _members(parent: ast.AST, *, prefix: str) -> Iterator[Sample]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef):
            name = f"{prefix}.{node.name}"
            yield from _documented(node, question=f"What is the class {name}?")
            yield from _members(node, prefix=name)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{node.name}"
            signature = ast.unparse(node.args)
            shown = signature if len(signature) <= MAX_SIGNATURE_CHARS else "..."
            yield from _documented(node, question=f"What does {name}({shown}) do?")


def _documented(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, *, question: str
) -> Iterator[Sample]:
    answers = pieces(inspect.cleandoc(ast.get_docstring(node) or ""))
    if answers:
        yield Sample(question=question, answer=answers[0])


def gather_samples(*, seed: int = 0) -> list[Sample]:
    """Every sample of this Python in an order that the seed decides, one for each answer, short answers left out."""
    candidates = list(topic_samples())
    for module, path in library_files(pathlib.Path(sysconfig.get_path("stdlib"))):
        candidates += docstring_samples(path.read_text(encoding="utf-8"), module=module)
    first: dict[str, Sample] = {}
    for sample in candidates:
        if len(sample.answer) >= MIN_ANSWER_CHARS:
            first.setdefault(" ".join(sample.answer.split()), sample)
    # By digest: shuffled, yet a sample more or less (another Python) moves no other sample relative to the rest.
    return sorted(first.values(), key=lambda sample: _digest(sample, seed=seed))


def write_chats(path: pathlib.Path, *, num_chats: int, seed: int = 0) -> None:
    """Write the first `num_chats` samples as JSON Lines for `kdpipe --data`."""
    lines = (json.dumps({"messages": sample.messages()}, ensure_ascii=False) for sample in gather_samples(seed=seed))
    path.write_text("".join(line + "\n" for line in itertools.islice(lines, num_chats)), encoding="utf-8")


def _digest(sample: Sample, *, seed: int) -> str:
    return hashlib.sha256(json.dumps([seed, sample.question, sample.answer]).encode()).hexdigest()
