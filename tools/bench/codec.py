"""Bytes of a stored row against what is lost of the teacher's distribution, for every codec and for top-k rows.

    python tools/bench/codec.py --json             SmolLM2-135M-Instruct on documentation chats, and the same teacher
                                                   with channels forty times the others: five minutes on one core
    python tools/bench/codec.py --json --quick     a teacher of random numbers: seconds, and figures that say little
    python tools/bench/codec.py --lines FILE --plot docs/codec.png      what an earlier run printed, drawn

Each case has one line for `bytes` (of a row, over those of a raw one) and one for `error` (mean KL in nats between the
teacher's distribution and that of the stored row, with its 99th percentile and the share of rows whose likeliest token
is the same), on rows of samples that no codec was fitted to. The rivals store the likeliest k tokens, six bytes each,
and the sum of all others, spread evenly over them. A case that is out of reach has no lines.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all Python adds
sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

import codec_plot
import corpus
from teacher import write_teacher
from tests.stages.codec.rows import drawn

from kdpipe.manifests.codec import Codec, as_stored
from kdpipe.manifests.fitted import Choice
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.codec.fit import curve, share_of
from kdpipe.stages.codec.metric import Lens
from kdpipe.stages.extract import ExtractSpec, extract
from kdpipe.stages.models.head import Head, loaded_head
from kdpipe.stages.rows import as_tensor

CODECS = {
    "int8": Choice("int8"),
    "fisher kl=3e-4": Choice("fisher", kl=3e-4),
    "fisher kl=1e-3": Choice("fisher", kl=1e-3),
    "fisher kl=3e-3": Choice("fisher", kl=3e-3),
    "fisher kl=1e-2": Choice("fisher", kl=1e-2),
    "fisher kl=3e-2": Choice("fisher", kl=3e-2),
    "fisher kl=1e-1": Choice("fisher", kl=1e-1),
}
TOP_K = (8, 16, 32, 64, 128)
ENTRY_BYTES = 6
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Subject:
    """A teacher's head, rows [N, E] that codecs are fitted to, and rows of other samples."""

    name: str
    fit: np.ndarray
    test: np.ndarray
    head: Head
    vocab_size: int


def of_smollm2(teacher: Path, folder: Path, num_chats: int) -> Subject:
    """Rows of documentation chats; the last sixth of them, 2,000 rows at most, are for the test."""
    corpus.write_chats(folder / "chats.jsonl", num_chats=num_chats)
    spec = ExtractSpec(teacher=teacher, data=(folder / "chats.jsonl",), data_spec=DataSpec(heldout_fraction=0.0))
    cache = extract(spec, folder / "cache", Silent())
    rows = [np.array(view.rows) for view in cache]
    cut = len(rows) * 5 // 6
    test = np.concatenate(rows[cut:])
    return Subject(
        name="SmolLM2-135M",
        fit=np.concatenate(rows[:cut]),
        test=test[np.linspace(0, len(test) - 1, min(len(test), 2000)).astype(np.int64)],
        head=loaded_head(cache.head(), cache.plan.head, CPU),
        vocab_size=cache.plan.head.vocab_size,
    )


def of_random_numbers() -> Subject:
    found = drawn(width=96, scale=0.3)
    return Subject(
        name="random", fit=found.rows[:4000], test=found.rows[4000:], head=found.head, vocab_size=found.vocab_size
    )


def with_outliers(subject: Subject) -> Subject:
    """The same with six channels of forty times their numbers, which the head takes back."""
    channels = np.random.default_rng(0).permutation(subject.fit.shape[1])[:6]
    weight = subject.head.weight.clone()
    weight[:, torch.from_numpy(channels)] /= 40

    def scaled(rows: np.ndarray) -> np.ndarray:
        rows = rows.copy()
        rows[:, channels] = (rows[:, channels].astype(np.float32) * 40).astype(rows.dtype)
        return rows

    return Subject(
        name=f"{subject.name}, outliers x40",
        fit=scaled(subject.fit),
        test=scaled(subject.test),
        head=Head(weight, subject.head.bias, subject.head.softcap, subject.head.scale),
        vocab_size=subject.vocab_size,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """share: bytes of a row over those of a raw one; kl, p99, same_top: of the test rows."""

    share: float
    kl: float
    p99: float
    same_top: float

    @classmethod
    def of(cls, share: float, kl: Tensor, same_top: Tensor) -> "Point":
        return cls(
            share=share,
            kl=float(kl.mean()),
            p99=float(kl.quantile(0.99)),
            same_top=float(same_top.double().mean()),
        )


def coded(subject: Subject, lens: Lens, codec: Codec) -> Point:
    """A codec on rows that it was not fitted to."""
    exact, stored = (as_tensor(rows).float() for rows in (subject.test, as_stored(codec, subject.test)))
    found = lens.compare(exact, stored)
    return Point.of(share_of(codec, subject.test), found.kl, found.same_top)


def top_k(subject: Subject, lens: Lens, k: int) -> Point:
    """The likeliest k tokens, and the sum of all others spread evenly over them."""
    kls = []
    rows = as_tensor(subject.test).float()
    for block in lens.blocks(len(rows)):
        wanted = lens.logits(rows[block]).double().log_softmax(-1)
        kept = wanted.topk(k, -1)
        others = (1 - kept.values.exp().sum(-1)).clamp_min(1e-12) / (wanted.shape[1] - k)
        got = others.log()[:, None].expand_as(wanted).scatter(1, kept.indices, kept.values)
        kls.append((wanted.exp() * (wanted - got)).sum(-1).clamp_min(0))
    kl = torch.cat(kls)
    return Point.of(ENTRY_BYTES * k / subject.test[0].nbytes, kl, torch.ones(len(kl)))


def points(subject: Subject) -> dict[str, Point]:
    """Of each case, of raw rows first; and of each rival, under names that begin with top-."""
    lens = Lens.of(subject.head, subject.vocab_size, CPU)
    found = {f"top-{k}": top_k(subject, lens, k) for k in TOP_K if k < subject.vocab_size}
    found["raw"] = Point(share=1.0, kl=0.0, p99=0.0, same_top=1.0)
    names = {str(choice): name for name, choice in CODECS.items()}
    codecs = curve(list(CODECS.values()), subject.fit, subject.head, vocab_size=subject.vocab_size, device=CPU)
    return found | {names[each.record.codec]: coded(subject, lens, each.codec) for each in codecs}


def lines(subject: Subject) -> Iterator[dict[str, object]]:
    """Two for each case."""
    found = points(subject)
    rivals = {name: point for name, point in found.items() if name.startswith("top-")}
    for case, point in found.items():
        if case in rivals:
            continue
        name = {"bench": "codec", "case": case, "teacher": subject.name}
        shares = {rival: round(each.share, 4) for rival, each in rivals.items()}
        raw = {"raw_bytes": subject.test[0].nbytes}
        yield {**name, "metric": "bytes", "unit": "x raw", "kdpipe": round(point.share, 4), **raw, "rivals": shares}
        errors = {rival: digits(each.kl) for rival, each in rivals.items()}
        rest: dict[str, object] = {"p99": digits(point.p99), "top1": round(point.same_top, 4)}
        rest["rivals_p99"] = {rival: digits(each.p99) for rival, each in rivals.items()}
        yield {**name, "metric": "error", "unit": "nats", "kdpipe": digits(point.kl), **rest, "rivals": errors}


def digits(value: float) -> float:
    """Three of them."""
    return float(f"{value:.3g}")


def subjects(quick: bool, teacher: Path | None, num_chats: int, folder: Path) -> Iterator[Subject]:
    if quick:
        first = of_random_numbers()
    else:
        if teacher is None:
            teacher = folder / "teacher"
            write_teacher(teacher)
        first = of_smollm2(teacher, folder, num_chats)
    yield first
    yield with_outliers(first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="a teacher of random numbers")
    parser.add_argument("--teacher", type=Path, help="folder of SmolLM2, where it was unpacked already")
    parser.add_argument("--chats", type=int, default=300, help="documentation chats, 50 rows each")
    parser.add_argument("--plot", type=Path, help="picture to draw of the lines")
    parser.add_argument("--lines", type=Path, help="what an earlier run with --json printed, in place of measuring")
    options = parser.parse_args()
    if options.lines:
        found = [json.loads(line) for line in options.lines.read_text().splitlines()]
    else:
        found = list(measured(options))
    if options.plot:
        codec_plot.draw(found, options.plot)


def measured(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Every line, printed."""
    with tempfile.TemporaryDirectory(prefix="kdpipe-bench-") as folder:
        for subject in subjects(options.quick, options.teacher, options.chats, Path(folder)):
            for line in lines(subject):
                if options.json:
                    print(json.dumps(line), flush=True)
                else:
                    rest = "" if line["metric"] == "bytes" else f"  p99 {line['p99']}  top-1 {line['top1']}"
                    said = f"{line['case']}: {line['metric']} {line['kdpipe']} {line['unit']}{rest}"
                    print(f"{line['teacher']}: {said}", flush=True)
                yield line


if __name__ == "__main__":
    main()
