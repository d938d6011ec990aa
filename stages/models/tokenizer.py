"""The tokenizer of a model folder: ids are those of the folder's own tokenizer.json.

transformers picks a tokenizer class by tokenizer_config.json and the model's type; some classes are then built anew
from vocabulary and merges, with a pre-tokenizer of the class: 2023 becomes "2023" where the file says "2", "0", "2",
"3", or the other way round. No error is raised. So what it makes is compared with the file on probe texts, and where
they differ the file is used as it is, with the special tokens and chat template that stand beside it.
Cost: tokenizer.json is parsed twice, three times where it is used as it is.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kdpipe.manifests.errors import InputError, is_of_others

TOKENIZER = "tokenizer.json"
CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
FILES = (
    TOKENIZER,
    *CONFIGS,
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
"""Patterns of the files that a tokenizer is read from."""
PROBED_TOKENS = 64
"""Added tokens that stand in the probe texts, from either end of their list."""

# ruff: noqa: RUF001 - letters that look alike are meant
# Each breaks one of the ways in which tokenizers differ: digits, blanks, case, accents, scripts, marks, lines, code.
PROBES = (
    "",
    " ",
    "In 2023 it was 650841823, then 1,234.50 and 3.14159265; 007, 1e-9, 2²=4.",
    "hello world how are you",
    " leading and trailing  blanks   of   several    lengths ",
    "Don't you'll we've I'M SHE'S they'd",
    "ALL CAPS, CamelCase, snake_case, kebab-case, x86_64",
    "Salut, ça va? naïve café Ünïcödé Ångström",
    "cafe\u0301 A\u030a \ufb01ne \u2460 \uff21\uff22\uff23 \u00bd \u212b",
    "一种做蚕茧的结构, 另一种充当粘合剂或是基质。2023年",
    "こんにちは世界、カタカナとﾊﾝｶｸ 안녕하세요 세계",
    "Привет, мир! Γειά σου שלום עולם مرحبا بالعالم ١٢٣ नमस्ते १२३ สวัสดี",
    "🙂 👩‍👩‍👧‍👦 🇫🇷 ✅ ☕️",
    "def f(x):\n    if x:\n\treturn {'a': [1, 2]}  # 4 blanks, a tab\n\n\n        pass\n",
    "a\nb\r\nc\n\nd \n e\n\n\n\nf\t\tg",
    "<b>x</b> &amp; https://example.org/a?b=c&d=%20 me@example.org \\n \\\\ //",
    "...!!??--==[[({<>})]] $#@%^&*~`|'\"“”‘’—…",
    "zero\u200bwidth\u00a0no-break\ufeffmark \u2028line \x00\x07nul",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 00000000000000000000 --------------------------------",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """A tokenizer, and a line on how it was made where that needs to be said."""

    tokenizer: PreTrainedTokenizerBase
    note: str = ""


def read_tokenizer(place: Path, made_by_auto: Callable[[], Any], error: type[InputError], folder: Path) -> Read:
    """The tokenizer at `place`, with the ids of its tokenizer.json where there is one.

    made_by_auto: what AutoTokenizer makes of it; folder: what the user calls `place`
    Raises `error` for a folder without a tokenizer and where no way gives the file's ids; what libraries raise.
    """
    if not tokenizer_files(place):
        raise error("no tokenizer in this folder; copy tokenizer.json and tokenizer_config.json into it", where=folder)
    if not (place / TOKENIZER).is_file():
        return Read(tokenizer=made_by_auto())
    own = tokenizers.Tokenizer.from_file(str(place / TOKENIZER))
    own.no_truncation()
    own.no_padding()
    try:
        made = made_by_auto()
    except Exception as err:  # a class that cannot be made of the file; what else is wrong is raised again below
        if is_of_others(err):
            raise
        made, reason = None, f"transformers cannot make its class of it ({type(err).__name__})"
    else:
        if _is_own_code(made):
            return Read(tokenizer=made)
        reason = _difference(made, own, place)
        if not reason:
            return Read(tokenizer=made)
    as_filed = PreTrainedTokenizerFast.from_pretrained(
        str(place), tokenizer_file=str(place / TOKENIZER), local_files_only=True, **_defaults(made, own, place)
    )
    if left := _difference(as_filed, own, place):
        raise error(f"no way to load its tokenizer gives the ids of its {TOKENIZER}: {left}", where=folder)
    return Read(tokenizer=as_filed, note=f"{folder / TOKENIZER} is used as it is: {reason}")


def tokenizer_files(folder: Path) -> tuple[str, ...]:
    """Names of the files in `folder` that its tokenizer is read from, sorted."""
    found = {path for pattern in FILES for path in folder.glob(pattern) if path.is_file()}
    return tuple(sorted(path.relative_to(folder).as_posix() for path in found))


def _difference(made: Any, own: tokenizers.Tokenizer, place: Path) -> str:
    """How the ids of `made` differ from those of the file, in words; "" where they do not."""
    if not getattr(made, "is_fast", False):
        return f"{type(made).__name__} of transformers does not read it"
    name, vocabulary, filed = type(made).__name__, made.get_vocab(), own.get_vocab()
    for token, index in filed.items():
        if vocabulary.get(token) != index:
            return f"{name} of transformers has '{token}' as {vocabulary.get(token)}, not {index}"
    if invented := sorted(vocabulary.keys() - filed.keys() - _named_tokens(place)):
        return f"{name} of transformers adds '{invented[0]}', which no file names"
    texts = [*PROBES, *_token_probes(own)]
    for special in (False, True):
        found = made(texts, add_special_tokens=special, verbose=False)["input_ids"]
        for text, ids in zip(texts, found, strict=True):
            if ids != own.encode(text, add_special_tokens=special).ids:
                return f"{name} of transformers gives other ids for {text[:40]!r}"
    return ""


def _token_probes(own: tokenizers.Tokenizer) -> Iterator[str]:
    """The added tokens in texts: with and without blanks around them, beside letters and digits."""
    tokens = [token.content for _, token in sorted(own.get_added_tokens_decoder().items())]
    chosen = tokens if len(tokens) <= 2 * PROBED_TOKENS else tokens[:PROBED_TOKENS] + tokens[-PROBED_TOKENS:]
    yield "".join(chosen)
    for token in chosen:
        yield f"a{token}b {token} 1{token}\n{token}  c"


def _named_tokens(place: Path) -> set[str]:
    """Every string in the configs beside tokenizer.json, keys too: tokens that they add are the folder's own."""
    found: set[str] = set()

    def walk(value: object) -> None:
        if isinstance(value, str):
            found.add(value)
        elif isinstance(value, dict):
            found.update(value)
            for each in value.values():
                walk(each)
        elif isinstance(value, list):
            for each in value:
                walk(each)

    for name in CONFIGS:
        if (place / name).is_file():
            walk(json.loads((place / name).read_text(encoding="utf-8")))
    return found


def _defaults(made: Any, own: tokenizers.Tokenizer, place: Path) -> dict[str, str]:
    """Special tokens that the class of transformers stands for, the file has and its configs do not name.

    GPT-2's folders, for one, leave it to the class that <|endoftext|> ends a text.
    """
    if made is None:
        return {}
    named = _named_tokens(place)
    return {
        kind: str(token)
        for kind, token in made.special_tokens_map.items()
        if isinstance(token, str) and kind not in named and own.token_to_id(token) is not None
    }


def _is_own_code(made: Any) -> bool:
    return type(made).__module__.startswith("transformers_modules")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's files. Raises OSError."""
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as err:
        # tokenizers' own code tells a failed write by a bare Exception with the system's number in its text.
        number = re.search(r"\(os error (\d+)\)", str(err))
        if number is None or isinstance(err, OSError):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from err
