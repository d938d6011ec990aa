"""Writes docs/scale.md: what large plans ask of disks, networks and name servers, every number from pipeline/scale.py.

python tools/scale_doc.py > docs/scale.md            tests/test_docs.py compares the two
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from textwrap import fill

from kdpipe.pipeline.scale import (
    NAME_OPERATIONS,
    SAMPLES_A_SECOND,
    Demands,
    Load,
    Machines,
    demands,
    staged_tokens,
    staging_rate,
)

NVME_BYTES, FILE_SYSTEM, NAMES, OPENS = 15e12, 1e12, 20_000, 50_000
"""What a large cluster has: a node's own disk; bytes a second of its file system; requests a second that make names,
and that look one up."""
LARGE = Load(tokens=1e12, teacher_params=70e9, width=8192, student_params=1e9)
SIZES = {
    "one node": (replace(LARGE, tokens=1e9), Machines(nodes=1)),
    "32 nodes": (replace(LARGE, tokens=5e10), Machines(nodes=32)),
    "1,000 nodes": (LARGE, Machines(nodes=1000)),
}
UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
"""Powers of ten, not of two."""


def count(value: float, unit: str = "") -> str:
    """8.2e15 B -> "8.2 PB"; three digits at most."""
    for size, letter in UNITS:
        if value >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def span(seconds: float) -> str:
    """43750 -> "12.2 hours"."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.3g} seconds"


def rows() -> list[list[str]]:
    """Of the table: a demand, its formula, its value at each size."""
    found = {name: (load, demands(load, machines)) for name, (load, machines) in SIZES.items()}

    def row(what: str, formula: str, value: Callable[[Load, Demands], str]) -> list[str]:
        return [what, formula, *(value(load, asked) for load, asked in found.values())]

    return [
        ["", "", *SIZES],
        row("tokens", "T", lambda load, _: count(load.tokens)),
        row("cache, raw bf16 rows", "T (2 E s + 10)", lambda load, _: count(load.cache_bytes, "B")),
        row("shards of 65,536 tokens", "T / t", lambda load, _: count(load.num_shards)),
        row("a shard", "t (2 E s + 10)", lambda load, _: count(load.shard_bytes, "B")),
        row("teacher's pass", "2 P T / (G f)", lambda _, asked: span(asked.teacher_seconds)),
        row("written by a GPU, a second", "cache / pass / G", lambda _, asked: count(asked.write_a_rank, "B")),
        row("written by all, a second", "cache / pass", lambda _, asked: count(asked.write_all, "B")),
        row("names, requests a second", "16 shards / pass", lambda _, asked: count(asked.names_a_second)),
        row("an epoch of the student", "(6 p + 2 V E s) T / (G f)", lambda _, asked: span(asked.epoch_seconds)),
        row("read by a GPU, a second", "cache / epoch / G", lambda _, asked: count(asked.read_a_rank, "B")),
        row("read by a node, a second", "8 times that", lambda _, asked: count(asked.read_a_node, "B")),
        row("read by all, a second", "cache / epoch", lambda _, asked: count(asked.read_all, "B")),
        row("shards opened, a second", "T / n / epoch", lambda _, asked: count(asked.opens_a_second)),
        row("samples.arrow", "5 T + 72 T / n", lambda load, _: count(load.table_bytes, "B")),
        row("order of an epoch, a rank", "24 T / n", lambda _, asked: count(asked.order_bytes, "B")),
        row("tokenising, one process", f"T / n / {SAMPLES_A_SECOND:,}", lambda _, asked: span(asked.prepare_seconds)),
    ]


def table() -> str:
    lines = [" | ".join(cells) for cells in rows()]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join(["---"] * len(rows()[0])), *lines[1:]])


def page() -> str:
    """The text of docs/scale.md."""
    return "\n\n".join([*map(filled, INTRODUCTION), table(), *map(filled, paragraphs())]) + "\n"


def filled(text: str) -> str:
    """A paragraph, a heading or a numbered item in lines of 120."""
    indent = "   " if text[:1].isdecimal() else ""
    words = " ".join(text.split())
    return fill(words, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


INTRODUCTION = (
    "# Beyond one cluster: 10^12 tokens, 1,000 nodes",
    """What kdpipe asks of machines is arithmetic: `kdpipe plan` does it for data that are there, this page for sizes
    that nobody has at hand. Every number here is made by `tools/scale_doc.py` from the functions of
    `pipeline/scale.py`, and compared by a test. Nothing on this page was measured at such a size; what kdpipe was
    tested with is one machine.""",
    """T tokens of n = 1,000 a sample, a share s = 0.5 of them supervised; a teacher of P = 70e9 parameters and width
    E = 8,192, a student of p = 1e9 with V = 151,936; G GPUs, eight a node, that reach f = 4e14 operations a second
    each; shards of t tokens. All GPUs run the teacher at once, or train one student at once.""",
)


def paragraphs() -> Iterator[str]:
    """What the numbers say, and what breaks first."""
    load, machines = SIZES["1,000 nodes"]
    asked, quarter = demands(load, machines), replace(load, row_share=0.25)
    small, piece = demands(quarter, machines), replace(load, tokens=1e10)
    of_piece, wide = demands(piece, machines), replace(load, shard_tokens=1 << 20)
    of_wide, names = demands(wide, machines), ", ".join(f"{count} {what}" for what, count in NAME_OPERATIONS.items())
    yield "## What the numbers say"
    yield f"""**The teacher's pass is easy on everything.** A GPU writes {count(asked.write_a_rank, "B")} a second,
    because the teacher takes {count(load.teacher_operations)} operations for a token that leaves
    {count(load.bytes_a_token, "B")}. All together write {count(asked.write_all, "B")} a second for
    {span(asked.teacher_seconds)}; a live teacher takes these hours again in every epoch of every student."""
    yield f"""**Name servers.** A shard costs {sum(NAME_OPERATIONS.values())} requests ({names}). With
    {load.shard_tokens:,} tokens a shard that is {count(asked.names_a_second)} a second, in three folders, of some
    {count(NAMES)} that a good server does in all. `cache.shard_tokens = {wide.shard_tokens}` makes it
    {count(of_wide.names_a_second)}, in shards of {count(wide.shard_bytes, "B")}; a kill then loses
    {span(of_wide.shard_seconds)} of a GPU's work instead of {span(asked.shard_seconds)}."""
    yield f"""**Bytes decide the epochs.** A token costs the student {count(load.student_operations)} operations, a
    share of {load.student_operations / load.teacher_operations:.2g} of the teacher's, so rows are read so much faster
    than they were written: {count(asked.read_a_rank, "B")} a second and GPU, {count(asked.read_a_node, "B")} a node,
    {count(asked.read_all, "B")} in all, where a large file system gives {count(FILE_SYSTEM, "B")}. Rows that are
    stored in a quarter of the bytes, by a codec, make it {count(small.read_all, "B")}. The larger the student, the
    fewer bytes a second: they fall as its operations a token rise."""
    yield f"""**A node's own disk.** In a quarter of the bytes a disk of {count(NVME_BYTES, "B")} holds a cache of
    {count(staged_tokens(quarter, NVME_BYTES))} tokens, and the next one while the first is read. Were each node to
    train on caches of its own, the file system would give
    {count(staging_rate(quarter, machines, NVME_BYTES, shared=False), "B")} a second: what is read anyway, but once and
    in whole files. Where all nodes train on one cache, as they do, each needs all of it:
    {count(staging_rate(quarter, machines, NVME_BYTES, shared=True), "B")} a second. So staging
    (`slurm.stage_dir`) is for sweeps, whose students each have a node or two and read one cache many times."""
    yield "## What breaks first"
    yield "In this order, as T grows, and what to do:"
    yield f"""1. **One plan by one process.** Tokenising takes {span(asked.prepare_seconds)} of a process, and
    `samples.arrow` of {count(load.table_bytes, "B")} is written by one and mapped by all. Cut the data into caches of
    10^9 to 10^10 tokens, each planned and extracted by itself, with `--prepare-workers` on a node of its own;
    `kdpipe train --cache A B C` takes several. At 10^10 tokens a plan is {span(of_piece.prepare_seconds)} of one
    process, its table {count(piece.table_bytes, "B")}."""
    yield f"""2. **The order of an epoch.** Each rank hashes every sample's number: {count(asked.order_bytes, "B")} a
    rank. Over 10^10 tokens it is {count(of_piece.order_bytes, "B")}. Train through groups of caches, a run after the
    other, or on a part of the data."""
    yield f"""3. **Opening shards.** Samples are taken in random order, so each is an open and a read of
    {count(load.sample_tokens * load.supervised * load.row_bytes, "B")}: {count(asked.opens_a_second)} a second over
    all ranks, of some {count(OPENS)} names that a server looks up. From a node's own disk there is no server to
    ask."""
    yield """4. **Bandwidth of the shared file system**, as above: a codec, then a larger student a pass."""
    yield """5. **Names**, as above: larger shards."""
    yield """What does not break: the format (a shard may hold 2^30 tokens; shards are rows of a table of 32 bytes
    each), many writers (shards are claimed one by one, and have a commit record each), and resuming (what a kill loses
    stays one shard a writer)."""
    yield """What is not built: an order that keeps the samples of a shard together, so that a node could do with a part
    of a cache, and a plan that several processes write. Both come before a single cache of 10^12 tokens makes
    sense."""


if __name__ == "__main__":
    print(page(), end="")
