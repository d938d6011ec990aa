"""A student cut from its teacher: a run of layers is left out, everything else stays (depth pruning).

    python tools/demo/student.py --teacher .demo/teacher --out .demo/student --drop 12 19

What is left speaks badly until it is trained ("healed"), for which distillation from the uncut model is the usual way
(Minitron, arXiv 2407.14679; a run of layers rather than every n-th: arXiv 2403.17887).
Invariant: what stays is the teacher's, weights bit for bit and tokenizer files byte for byte.
"""

import argparse
import os
import pathlib
import shutil
import sys
from collections.abc import Collection, Sequence

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

TOKENIZER_FILES = ("token*", "vocab*", "merges*", "special_tokens_map.json", "chat_template*")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=pathlib.Path, required=True, help="folder that from_pretrained loads")
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="folder to write, in place of one that is there"
    )
    parser.add_argument("--drop", type=int, nargs=2, required=True, help="first and last layer to leave out, from 0")
    asked = parser.parse_args()
    cut(asked.teacher, asked.out, drop=range(asked.drop[0], asked.drop[1] + 1))


def cut(teacher: pathlib.Path, out: pathlib.Path, *, drop: Collection[int]) -> int:
    """Write the teacher without the layers `drop` to `out`; the number of parameters that are left.

    The first and the last layer stay: without one of them a model is too far from its teacher to be healed."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto")
    decoder = model.get_decoder()
    inner = range(1, len(decoder.layers) - 1)
    if not drop or not set(drop) <= set(inner):
        sys.exit(
            f"student: layers {sorted(drop)} cannot be left out of {teacher}; give some of {inner[0]} to {inner[-1]}"
        )
    keep = [place for place in range(len(decoder.layers)) if place not in drop]
    decoder.layers = torch.nn.ModuleList(decoder.layers[place] for place in keep)
    shorten(model.config, keep)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for pattern in TOKENIZER_FILES:
        for path in teacher.glob(pattern):
            shutil.copy(path, partial)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    return sum(parameter.numel() for parameter in model.parameters())


def shorten(config: PretrainedConfig, keep: Sequence[int]) -> None:
    """The config of a model of which the layers `keep` are left; also where it says something of each layer."""
    of = config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == of:
            setattr(config, name, [value[place] for place in keep])
    config.num_hidden_layers = len(keep)


if __name__ == "__main__":
    main()
