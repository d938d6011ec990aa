"""Faults of model folders and data files, some two hundred: what a download, a script or an editor leaves behind.

Each either changes nothing that counts, or makes the folder or file one that cannot be used. None of them is a valid
model or valid data that merely differs.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

Role = Literal["teacher", "student", "data"]
Change = Callable[[Path], object]
CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
MODEL_FILES = (CONFIG, TOKENIZER, "tokenizer_config.json", "generation_config.json", "chat_template.jinja", WEIGHTS)
ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """role: whose folder `change` is applied to; kind: of data, the file's name in it"""

    name: str
    role: Role
    change: Change


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 + 5])  # in the middle of a line, too


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


WHOLE_FILE: dict[str, Change] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut in half": half,
    "a folder": folder_instead,
    "a dangling link": dangling_link,
    "a pipe": pipe,
    "noise": lambda path: path.write_bytes(bytes(np.random.default_rng(0).integers(0, 256, 500, np.uint8))),
    "an LFS pointer": lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    ),
    "a page of HTML": lambda path: path.write_text("<html><body>404 Not Found</body></html>\n"),
}
AS_JSON: dict[str, Change] = {
    "a list": lambda path: path.write_text("[1, 2]"),
    "null": lambda path: path.write_text("null"),
    "a string": lambda path: path.write_text('"x"'),
    "deeply nested": lambda path: path.write_text('{"a": ' * 100_000),
    "in UTF-16": lambda path: path.write_text(path.read_text(), encoding="utf-16"),
}

CONFIG_VALUES: dict[str, tuple[object, ...]] = {
    "hidden_size": ("48", -48, 0, 49, 10**12, None, [48]),
    "vocab_size": ("304", -1, 0, 1, 305, 10**15),
    "num_hidden_layers": (0, 1, 3, "2", -1, 10**9),
    "num_attention_heads": (0, -4, 7, 1.5),
    "num_key_value_heads": (0, 3, "x"),
    "intermediate_size": (0, 10**12, {}),
    "hidden_act": ("nope", None, 5),
    "rms_norm_eps": ("x", float("nan")),
    "rope_parameters": ({"rope_type": "nope"}, "x", {"rope_type": "default", "rope_theta": "x"}),
    "max_position_embeddings": (0, -1, "x"),
    "pad_token_id": (10**6, -400, "x"),
    "eos_token_id": (10**6, "x", [None]),
    "model_type": (ABSENT, "nope", "", 5, "bert", "t5"),
    "architectures": (ABSENT, ["Nope"], [], "X", 5),
    "dtype": ("float999", 5, "int8", ABSENT),
    "tie_word_embeddings": ("x", None),
    "attention_dropout": ("x",),
    "quantization_config": ({"quant_method": "nope"}, {}, 5, {"quant_method": "gptq", "bits": 4}),
    "auto_map": (5, {"AutoConfig": "x.Y"}, {"AutoConfig": 5}),
    "layer_types": (["nope"], 5),
    "transformers_weights": ("x.bin", "../x.safetensors", 5),
    "_attn_implementation": ("nope",),
}
TOKENIZER_CONFIG_VALUES: dict[str, tuple[object, ...]] = {
    "tokenizer_class": (5, "NoSuchTokenizer", "T5Tokenizer", "BertTokenizer"),
    "eos_token": (5, ["x"], {"a": 1}),
    "added_tokens_decoder": (5, {"x": {}}, {"3": {"content": "<|im_start|>"}}, {"9999999": {"content": "<new>"}}),
    "extra_special_tokens": (5, [5]),
    "model_max_length": ("x",),
    "auto_map": ({"AutoTokenizer": ["x.Y", None]}, 5),
    "chat_template": (5,),
}


def edited(name: str, change: Callable[[Any], object]) -> Change:
    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return apply


def with_value(name: str, key: str, value: object) -> Change:
    def change(config: dict[str, Any]) -> None:
        if value is ABSENT:
            config.pop(key, None)
        else:
            config[key] = value

    return edited(name, change)


def of_tensors(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Change:
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def text_of(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text)


def sharded(change: Callable[[Path, dict[str, Any]], object]) -> Change:
    """The weights in two files with an index, which `change` then gets."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(tensors)
        parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, some in parts.items():
            save_file({name: tensors[name] for name in some}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, some in parts.items() for name in some}}
        (folder / INDEX).write_text(json.dumps(index))
        change(folder, index)

    return apply


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, dict[str, Any]], object]:
    def apply(folder: Path, index: dict[str, Any]) -> None:
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return apply


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"
WEIGHT_FAULTS: dict[str, Change] = {
    "none left": of_tensors(lambda w: {}),
    "one missing": of_tensors(lambda w: {k: v for k, v in w.items() if k != NORM}),
    "the head missing": of_tensors(lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}),
    "one left over": of_tensors(lambda w: w | {"model.more": np.zeros(3, np.float32)}),
    "a prefix of torch.compile": of_tensors(lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}),
    "names of another model": of_tensors(lambda w: {f"{i}": v for i, v in enumerate(w.values())}),
    "another shape": of_tensors(lambda w: w | {NORM: w[NORM][:5]}),
    "an empty tensor": of_tensors(lambda w: w | {NORM: w[NORM][:0]}),
    "a scalar": of_tensors(lambda w: w | {NORM: np.float32(1)[None][0:1].reshape(())}),
    "not a number": of_tensors(lambda w: w | {NORM: np.full_like(w[NORM], np.nan)}),
    "infinite": of_tensors(lambda w: w | {NORM: np.full_like(w[NORM], np.inf)}),
    "integers": of_tensors(lambda w: w | {NORM: w[NORM].astype(np.int64) * 0 + 2**40}),
    "a header that lies": lambda folder: (folder / WEIGHTS).write_bytes(
        b"\xff" * 8 + (folder / WEIGHTS).read_bytes()[8:]
    ),
    "a byte too many": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"x"),
    "a pickle": lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
    "an adapter": lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.safetensors"),
    "an adapter beside": text_of("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "x/y"}'),
    "sharded": sharded(lambda folder, index: None),
    "a shard missing": sharded(lambda folder, index: (folder / SECOND).unlink()),
    "a shard cut": sharded(lambda folder, index: half(folder / SECOND)),
    "a shard empty": sharded(lambda folder, index: (folder / FIRST).write_bytes(b"")),
    "a shard twice": sharded(lambda folder, index: shutil.copy(folder / FIRST, folder / SECOND)),
    "an index of nothing": sharded(rewritten(lambda index: index.update(weight_map={}))),
    "an index without map": sharded(rewritten(lambda index: index.pop("weight_map"))),
    "an index that is a list": sharded(lambda folder, index: (folder / INDEX).write_text("[]")),
    "an index cut": sharded(lambda folder, index: half(folder / INDEX)),
    "an index of other names": sharded(rewritten(lambda index: index["weight_map"].update({"model.absent": FIRST}))),
    "an index of numbers": sharded(rewritten(lambda index: index["weight_map"].update({NORM: 5}))),
    "an index that leaves one out": sharded(rewritten(lambda index: index["weight_map"].pop(NORM))),
    "an index of a file above": sharded(
        rewritten(lambda index: index["weight_map"].update({NORM: "../x.safetensors"}))
    ),
}
TOKENIZER_FAULTS: dict[str, Change] = {
    "another version": edited(TOKENIZER, lambda t: t.update(model={"type": "NewBPE", "vocab": {}, "merges": []})),
    "no model": edited(TOKENIZER, lambda t: t.pop("model")),
    "no vocabulary": edited(TOKENIZER, lambda t: t["model"].update(vocab={})),
    "a vocabulary of strings": edited(TOKENIZER, lambda t: t["model"].update(vocab={"a": "b"})),
    "merges of unknown tokens": edited(TOKENIZER, lambda t: t["model"].update(merges=[["no", "pe"]])),
    "no added tokens": edited(TOKENIZER, lambda t: t.update(added_tokens=[])),
    "added tokens that are a number": edited(TOKENIZER, lambda t: t.update(added_tokens=5)),
    "an added token that clashes": edited(
        TOKENIZER, lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"content": "<clash>"})
    ),
    "an unknown pre-tokenizer": edited(TOKENIZER, lambda t: t.update(pre_tokenizer={"type": "Nope"})),
    "a broken regex": edited(
        TOKENIZER,
        lambda t: t.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
        ),
    ),
    "a post-processor of unknown tokens": edited(
        TOKENIZER,
        lambda t: t.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
    ),
    "a template that does not parse": text_of("chat_template.jinja", "{% for m in messages %}"),
    "a template that raises": text_of("chat_template.jinja", "{{ raise_exception('no') }}"),
    "a template of unknown filters": text_of("chat_template.jinja", "{{ messages | nope }}"),
    "a template that divides by zero": text_of("chat_template.jinja", "{{ 1 // 0 }}"),
    "a template without end": text_of("chat_template.jinja", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    "a template that prints nothing": text_of("chat_template.jinja", ""),
    "a template that writes": text_of("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "a special tokens map that is a list": text_of("special_tokens_map.json", "[]"),
    "a special tokens map of numbers": text_of("special_tokens_map.json", '{"eos_token": 5}'),
    "added tokens in a list": text_of("added_tokens.json", "[]"),
}
GENERATION_VALUES: dict[str, tuple[object, ...]] = {
    "temperature": (0.7, "x", -1),
    "eos_token_id": ("x", 10**6),
    "max_length": ("x",),
    "cache_implementation": ("nope",),
}


def model_faults(role: Role) -> Iterator[Fault]:
    def fault(name: str, change: Change) -> Fault:
        return Fault(name=f"{role}: {name}", role=role, change=change)

    for file in MODEL_FILES:
        for name, change in (WHOLE_FILE | (AS_JSON if file.endswith(".json") else {})).items():
            yield fault(f"{file} {name}", lambda folder, file=file, change=change: change(folder / file))  # type: ignore[misc]
    for file, table in (
        (CONFIG, CONFIG_VALUES),
        ("tokenizer_config.json", TOKENIZER_CONFIG_VALUES),
        ("generation_config.json", GENERATION_VALUES),
    ):
        for key, values in table.items():
            for value in values:
                said = "absent" if value is ABSENT else json.dumps(value)
                yield fault(f"{file} {key} = {said}", with_value(file, key, value))
    for name, change in (WEIGHT_FAULTS | TOKENIZER_FAULTS).items():
        yield fault(name, change)


CHATS = [
    [{"role": "user", "content": f"hello world {number}"}, {"role": "assistant", "content": "how are you"}]
    for number in range(6)
]


def write_table(path: Path, table: pa.Table) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)


def write_data(path: Path) -> None:
    """Six records, the same in every format."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"messages": chat} for chat in CHATS]))
    else:
        write_table(path, pa.table({"messages": CHATS}))


DATA_FILES = ("d.jsonl", "d.json", "d.parquet", "d.arrow")
LINE_FAULTS: dict[str, str] = {
    "not JSON": "{'messages': []}",
    "a list": "[]",
    "null": "null",
    "a number": "7",
    "cut": '{"messages": [{"role": "user", "con',
    "two records": json.dumps({"messages": CHATS[0]}) * 2,
    "no known column": '{"a": 1}',
    "messages that are a number": '{"messages": 5}',
    "messages that are text": '{"messages": "hello"}',
    "a message that is text": '{"messages": ["hello"]}',
    "a message without a role": '{"messages": [{"content": "x"}]}',
    "a role that is a number": '{"messages": [{"role": 5, "content": "x"}]}',
    "content that is a number": '{"messages": [{"role": "user", "content": 5}]}',
    "deep nesting": '{"messages": ' + "[" * 100_000,
    "NaN": '{"messages": NaN}',
    "half a surrogate pair": '{"messages": [{"role": "\\ud800", "content": "\\udc00"}]}',
    "a huge number": '{"messages": 1' + "0" * 5000 + "}",
}
BYTE_FAULTS: dict[str, Change] = {
    "not UTF-8": lambda path: path.write_bytes(path.read_bytes().replace(b"hello", b"h\xff\xfello")),
    "NUL bytes": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 100),
    "a byte order mark": lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()),
    "CRLF": lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")),
    "in UTF-16": lambda path: path.write_text(path.read_text(), encoding="utf-16"),
}


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 3, len(data) // 3 + 40):
        data[place] ^= 0x5A
    path.write_bytes(data)


TABLE_FAULTS: dict[str, Callable[[], pa.Table]] = {
    "messages of numbers": lambda: pa.table({"messages": [1, 2]}),
    "messages of dates": lambda: pa.table({"messages": pa.array([1, 2], pa.timestamp("ns"))}),
    "null messages": lambda: pa.table({"messages": pa.array([None, None], pa.string())}),
    "no columns": lambda: pa.table({}),
    "no rows": lambda: pa.table({"messages": pa.array([], pa.list_(pa.struct({"role": pa.string()})))}),
    "no known column": lambda: pa.table({"a": [1]}),
    "binary text": lambda: pa.table({"text": pa.array([b"\xff\xfe"], pa.binary())}),
    "text of lists": lambda: pa.table({"text": [["a"]]}),
    "a column twice": lambda: pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
}


def data_faults() -> Iterator[Fault]:
    for file in DATA_FILES:
        binary = file.endswith(("parquet", "arrow"))
        changes = dict(WHOLE_FILE)
        if binary:
            changes |= {"bytes changed": flipped}
            for name, make in TABLE_FAULTS.items():
                changes[name] = lambda path, make=make: write_table(path, make())  # type: ignore[misc]
        else:
            changes |= BYTE_FAULTS
        if file == "d.jsonl":
            for name, line in LINE_FAULTS.items():
                changes[name] = lambda path, line=line: path.write_text(path.read_text() + line + "\n")  # type: ignore[misc]
        for name, change in changes.items():
            yield Fault(
                name=f"data: {file} {name}",
                role="data",
                change=lambda folder, file=file, change=change: (write_data(folder / file), change(folder / file)),  # type: ignore[misc]
            )


FAULTS = {fault.name: fault for fault in [*model_faults("teacher"), *model_faults("student"), *data_faults()]}
