"""The same damage to a kdpipe cache and to what others keep hidden states in: how much of it is noticed when read back.

All hold the same samples (token ids, mask, bf16 rows), written and read by the plain calls of each library:

kdpipe        the cache as training reads it: `Rows`, the teacher's head, every sample once; checked on first touch
safetensors   save_file, load_file
torch.save    a dict of tensors; torch.load with weights_only
Arrow IPC     a record batch, a row a sample; the file mapped and opened with pyarrow's default options
DCP           torch.distributed.checkpoint's save and load, one process

Damage at random places: one bit; 1-4096 bytes of which each is changed; the end cut off; zeros from a page to the end,
as pages lost in a power cut leave. A place is drawn evenly over all bytes, for one line evenly over the files first.
What is read back is compared with what is read from the undamaged files:

noticed    an exception
harmless   no exception, and everything read is as it was
silent     no exception, and something read is not as it was
crashed    the reader died of a signal, or did not come back

Then writers are killed (SIGKILL) at random moments of their writing, all told the final name, as these calls are
commonly used; "+ rename" is told another one and renames. kdpipe's writer finds a planned cache, or a finished one that
it writes other rows over, and makes the shards; tests/stages/extract/test_extract_kills.py kills the planning too.

whole      what is read is what was written; over an older version: or the old one
absent     it is not there, or says that it is not finished and what is finished is right
refused    it looks finished, and reading it is an exception
lost       neither the old nor the new version can be read
"""

# Shapes: N samples, n tokens of all samples together, R rows, E teacher width.

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all Python adds

from tests.caches import make_plan

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import DriftError, IncompleteError, KdpipeError
from kdpipe.manifests.plan import read_plan
from kdpipe.manifests.sample import Sample, content_id
from kdpipe.manifests.samples import Samples
from kdpipe.manifests.shard import ShardWriter
from kdpipe.stages.feed.dataset import of_caches

WIDTH = 512
SHARD_TOKENS = 2048
PAGE = 4096
LONGEST_BURST = 4096
HUNG_S = 30.0
MOST_BYTES = 1 << 30
"""What a reader may allocate: a damaged length may ask for more than the machine has."""
FORK = multiprocessing.get_context("fork")

Data = dict[str, np.ndarray]


# ---- what is stored


def make_samples() -> list[Sample]:
    """32 prompts of 30 tokens with answers of 64 to 192: 4 MiB of rows, or so."""
    rng = np.random.default_rng(4)
    counts = rng.integers(64, 193, 32)
    return [
        Sample(
            content_id=content_id(index),
            source="bench",
            line=index + 1,
            token_ids=rng.integers(0, 97, 30 + count).astype(np.int32),
            supervised=np.arange(30 + count) >= 30,
        )
        for index, count in enumerate(counts)
    ]


def make_data(samples: Sequence[Sample], seed: int) -> Data:
    """token_ids, supervised [n]; hidden uint16 [R, E], the bits of bf16; offsets [N+1] of tokens and of rows."""
    num_tokens = [len(sample.token_ids) for sample in samples]
    num_rows = [int(sample.supervised.sum()) for sample in samples]
    hidden = np.random.default_rng(seed).standard_normal((sum(num_rows), WIDTH), dtype=np.float32)
    return {
        "hidden": hidden.astype(ml_dtypes.bfloat16).view(np.uint16),
        "token_ids": np.concatenate([sample.token_ids for sample in samples]),
        "supervised": np.concatenate([sample.supervised for sample in samples]),
        "token_offsets": np.cumsum([0, *num_tokens]),
        "row_offsets": np.cumsum([0, *num_rows]),
    }


def same(left: Data, right: Data) -> bool:
    """Whether both hold the same names, types, shapes and bytes."""
    return left.keys() == right.keys() and all(
        (mine.dtype, mine.shape) == (right[name].dtype, right[name].shape) and mine.tobytes() == right[name].tobytes()
        for name, mine in left.items()
    )


# ---- the formats


class Format:
    """A way of storing data: `write` puts it at a place, `read` gets it from there or raises."""

    def prepare(self, place: Path) -> None:
        """Make what is there before a writer starts."""

    def write(self, place: Path, data: Data) -> None:
        raise NotImplementedError

    def read(self, place: Path) -> Data:
        raise NotImplementedError

    def says_done(self, place: Path) -> bool:
        """Whether whoever looks without reading takes it for written."""
        return place.exists()

    def parts_agree(self, place: Path, data: Data) -> bool:
        """Whether what can be read of an unfinished one is right; of most formats nothing can."""
        return True


def to_tensors(data: Data) -> dict[str, torch.Tensor]:
    tensors = {name: torch.from_numpy(array) for name, array in data.items() if name != "hidden"}
    return {"hidden": torch.from_numpy(data["hidden"].view(np.int16)).view(torch.bfloat16), **tensors}


def to_data(tensors: Mapping[str, torch.Tensor]) -> Data:
    """Asked for by name, as a reader does: a damaged name is found missing."""
    names = ("token_ids", "supervised", "token_offsets", "row_offsets")
    return {
        "hidden": tensors["hidden"].view(torch.int16).numpy().view(np.uint16),
        **{name: tensors[name].numpy() for name in names},
    }


class Safetensors(Format):
    def write(self, place: Path, data: Data) -> None:
        save_file(to_tensors(data), place)

    def read(self, place: Path) -> Data:
        return to_data(load_file(place))


class TorchSave(Format):
    def write(self, place: Path, data: Data) -> None:
        torch.save(to_tensors(data), place)

    def read(self, place: Path) -> Data:
        return to_data(torch.load(place, weights_only=True))


class Renamed(TorchSave):
    """The cure for kills that everybody may use: another name until it is written."""

    def write(self, place: Path, data: Data) -> None:
        scratch = place.with_suffix(".tmp")
        super().write(scratch, data)
        scratch.replace(place)


class Arrow(Format):
    """One record batch; ids and mask lists, rows a binary value."""

    def write(self, place: Path, data: Data) -> None:
        tokens, rows = pa.array(data["token_offsets"].astype(np.int32)), data["row_offsets"]
        batch = pa.record_batch(
            {
                "token_ids": pa.ListArray.from_arrays(tokens, data["token_ids"]),
                "supervised": pa.ListArray.from_arrays(tokens, data["supervised"]),
                "rows": pa.array([data["hidden"][a:b].tobytes() for a, b in pairwise(rows)], pa.large_binary()),
            }
        )
        with pa.OSFile(str(place), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)

    def read(self, place: Path) -> Data:
        reader = pa.ipc.open_file(pa.memory_map(str(place)))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        return joined(
            [
                (
                    batch.column("token_ids")[row].values.to_numpy(),
                    batch.column("supervised")[row].values.to_numpy(zero_copy_only=False),
                    np.frombuffer(batch.column("rows")[row].as_buffer(), np.uint16).reshape(-1, WIDTH),
                )
                for batch in batches
                for row in range(batch.num_rows)
            ]
        )


class Dcp(Format):
    """A folder of .metadata and a file a process; loading fills tensors that the reader has made."""

    def __init__(self, data: Data) -> None:
        self._like = data

    def write(self, place: Path, data: Data) -> None:
        dcp.save(to_tensors(data), checkpoint_id=place)

    def read(self, place: Path) -> Data:
        tensors = {name: torch.zeros_like(tensor) for name, tensor in to_tensors(self._like).items()}
        dcp.load(tensors, checkpoint_id=place)
        return to_data(tensors)

    def says_done(self, place: Path) -> bool:
        return (place / ".metadata").exists()


class Kdpipe(Format):
    """A cache of a few shards."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def prepare(self, place: Path) -> None:
        make_plan(place, self._samples, hidden_size=WIDTH, shard_tokens=SHARD_TOKENS)

    def write(self, place: Path, data: Data) -> None:
        plan, first = read_plan(place), 0
        samples = Samples(place, plan)
        for number, shard in enumerate(plan.shards):
            with contextlib.suppress(DriftError):  # another is there: the next shard is tried all the same
                with ShardWriter(place, plan, number, samples.shard(number)) as writer:
                    writer.hidden.view(np.uint16)[:] = data["hidden"][first : first + shard.num_rows]
                    writer.commit()
            first += shard.num_rows

    def read(self, place: Path) -> Data:
        """All that training reads: the split and the head too."""
        cache = Cache.open(place)
        dataset, head = of_caches([cache]), cache.head()
        tokens = [dataset.tokens(index) for index in range(len(cache))]
        rows = [dataset.teachers[0].rows.rows(index) for index in range(len(cache))]
        train, heldout = dataset.split(None)
        return {
            **joined(
                [
                    (text.token_ids, text.supervised, some.view(np.uint16))
                    for text, some in zip(tokens, rows, strict=True)
                ]
            ),
            "num_tokens": dataset.num_tokens,
            "num_supervised": dataset.num_supervised,
            "split": np.concatenate([train, [-1], heldout]),
            "head": head.weight.view(np.uint16),
        }

    def says_done(self, place: Path) -> bool:
        """A commit record for every shard, and a head: without, it is said to be unfinished."""
        try:
            cache = Cache.open(place)
            cache.require_complete()
            cache.head()
        except IncompleteError:
            return False
        return True

    def parts_agree(self, place: Path, data: Data) -> bool:
        """Every committed shard of a cache that is not finished."""
        cache, at = Cache.open(place), data["row_offsets"]
        shards = [cache.plan.shards[number] for number in cache.committed()]
        return all(
            np.array_equal(cache[index].rows.view(np.uint16), data["hidden"][at[index] : at[index + 1]])
            for shard in shards
            for index in range(shard.first_sample, shard.first_sample + shard.num_samples)
        )


def joined(views: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Data:
    """Samples' (ids, mask, rows) as the arrays they came from."""
    token_ids, supervised, hidden = zip(*views, strict=True)
    return {
        "hidden": np.concatenate(hidden),
        "token_ids": np.concatenate(token_ids),
        "supervised": np.concatenate(supervised),
        "token_offsets": np.cumsum([0, *map(len, token_ids)]),
        "row_offsets": np.cumsum([0, *map(len, hidden)]),
    }


# ---- damage


@dataclass(frozen=True, kw_only=True, slots=True)
class Wound:
    """Damage of a kind to bytes begin..end of one file of the stored thing."""

    file: str
    begin: int
    end: int
    kind: str
    seed: int

    def changed(self, good: bytes) -> bytes:
        """What bytes begin..end become."""
        middle, rng = np.frombuffer(good[self.begin : self.end], np.uint8), np.random.default_rng(self.seed)
        if self.kind in ENDS:
            return bytes(len(middle))
        if self.kind == "burst":
            return (middle ^ rng.integers(1, 256, len(middle), dtype=np.uint8)).tobytes()
        return (middle ^ np.uint8(1 << rng.integers(8))).tobytes()

    @contextlib.contextmanager
    def inflicted(self, folder: Path, good: bytes) -> Iterator[None]:
        """The file of these good bytes is damaged while the block runs."""
        with open(folder / self.file, "r+b", buffering=0) as file:
            file.seek(self.begin)
            if self.kind == "truncated":
                file.truncate()
            else:
                file.write(self.changed(good))
            yield
            file.seek(self.begin)
            file.write(good[self.begin : self.end])


KINDS = ("bit flip", "bit flip, a file drawn first", "burst", "truncated", "zeros to the end")
ENDS = KINDS[-2:]


def draw_wound(kind: str, sizes: Mapping[str, int], rng: np.random.Generator) -> Wound:
    """Damage of a kind to one of the files of these sizes."""
    names = sorted(name for name, size in sizes.items() if size)
    weights = np.array([1 if kind == KINDS[1] else sizes[name] for name in names], np.float64)
    file = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    begin = int(rng.integers(sizes[file]))
    end = begin + 1
    if kind == "burst":
        end = min(begin + int(rng.integers(1, LONGEST_BURST + 1)), sizes[file])
    elif kind == "zeros to the end":
        begin -= begin % PAGE
    if kind in ENDS:
        end = sizes[file]
    return Wound(file=file, begin=begin, end=end, kind=kind, seed=int(rng.integers(1 << 32)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one case; for errors of kdpipe, which file and which bytes they name."""

    became: str
    where: str = ""
    message: str = ""

    def names_file(self, wound: Wound) -> bool:
        return self.where.endswith(wound.file)

    def names_bytes(self, wound: Wound) -> bool:
        """Whether the error names a file and bytes in it of which some are damaged."""
        found = re.search(r"\bbytes (\d+)-(\d+)|\bat byte (\d+)", self.message)
        if not found or not self.names_file(wound):
            return False
        first, last = int(found[1] or found[3]), int(found[2] or found[3])
        return first < wound.end and wound.begin <= last


def files_of(place: Path) -> dict[str, bytes]:
    """Everything stored at a place, by name below its folder's."""
    paths = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(place.parent)): path.read_bytes() for path in paths}


def restrict() -> None:
    """A reader of damaged files: no core, no endless memory, no traces on the screen."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def judge(form: Format, place: Path, truth: Data) -> Outcome:
    try:
        return Outcome(became="harmless" if same(form.read(place), truth) else "silent")
    except KdpipeError as err:
        return Outcome(became="noticed", where=err.where or "", message=str(err))
    except BaseException as err:  # DCP's is no Exception, nor is a panic of Rust
        return Outcome(became="noticed", message=f"{type(err).__name__}: {err}")


def read_damaged(
    form: Format, place: Path, good: Mapping[str, bytes], truth: Data, wounds: Sequence[Wound], told: Connection
) -> None:
    """In a process of its own: each wound alone, an outcome sent for each."""
    restrict()
    for wound in wounds:
        with wound.inflicted(place.parent, good[wound.file]):
            told.send(judge(form, place, truth))
    told.send(judge(form, place, truth))  # of nothing damaged: whether all that left the reader itself whole


def outcomes(
    form: Format, place: Path, good: Mapping[str, bytes], truth: Data, wounds: Sequence[Wound]
) -> Iterator[Outcome]:
    """An outcome for every wound; a reader that dies or hangs costs its own case and a new process."""
    done = 0
    while done < len(wounds):
        for name, data in good.items():
            (place.parent / name).write_bytes(data)
        told, tell = FORK.Pipe(duplex=False)
        process = FORK.Process(target=read_damaged, args=(form, place, good, truth, wounds[done:], tell))
        process.start()
        tell.close()
        try:
            while done < len(wounds) and told.poll(HUNG_S):
                yield told.recv()
                done += 1
            if done == len(wounds) and told.recv().became != "harmless":
                raise RuntimeError(f"{type(form).__name__}: the undamaged is not read as it was")
        except EOFError:
            pass
        if done < len(wounds):
            process.kill()
            yield Outcome(became="crashed")
            done += 1
        process.join()
        told.close()


# ---- kills


def write_and_tell(form: Format, place: Path, data: Data, told: Connection) -> None:
    """In a process of its own: say when writing starts and how long it took."""
    told.send("starts")
    started = time.perf_counter()
    form.write(place, data)
    told.send(time.perf_counter() - started)
    os._exit(0)  # nothing of what Python does at its end counts as writing


def writer(form: Format, place: Path, data: Data, kill_after: float | None) -> float | None:
    """Write, and kill the writer after so many seconds; how long it took, None where it was killed before."""
    told, tell = FORK.Pipe(duplex=False)
    process = FORK.Process(target=write_and_tell, args=(form, place, data, tell))
    process.start()
    tell.close()
    told.recv()
    if kill_after is not None:
        until = time.perf_counter() + kill_after
        while time.perf_counter() < until:  # sleeping is not exact enough
            pass
        process.kill()
    process.join()
    try:
        return told.recv()
    except EOFError:
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"the writer ended with {process.exitcode}") from None
        return None
    finally:
        told.close()


def look(form: Format, place: Path, old: Data | None, new: Data, written: Data, told: Connection) -> None:
    """In a process of its own: what a kill left. old, new: as they are read when whole; written: new, before that."""
    restrict()
    became = judge(form, place, new).became
    if became == "silent" and old is not None:
        became = judge(form, place, old).became
    if became == "noticed":
        became = "lost" if old is not None else what_is_left(form, place, written)
    told.send("whole" if became == "harmless" else became)


def what_is_left(form: Format, place: Path, written: Data) -> str:
    try:
        if not form.says_done(place):
            return "absent" if form.parts_agree(place, written) else "silent"
    except KdpipeError:
        pass
    return "refused"


def read_whole(form: Format, place: Path, told: Connection) -> None:
    told.send(form.read(place))


def apart(function: Callable[..., None], *args: object) -> object:
    """What the function sends from a process of its own; "crashed" where it dies or hangs."""
    told, tell = FORK.Pipe(duplex=False)
    process = FORK.Process(target=function, args=(*args, tell))
    process.start()
    tell.close()
    try:
        return told.recv() if told.poll(HUNG_S) else "crashed"
    except EOFError:
        return "crashed"
    finally:
        process.kill()
        process.join()
        told.close()


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def stored(form: Format, place: Path, data: Data) -> Data:
    """Store data where nothing is; what is read of it then."""
    clear(place.parent)
    form.prepare(place)
    writer(form, place, data, None)
    found = apart(read_whole, form, place)
    if not isinstance(found, dict) or any(found[name].tobytes() != data[name].tobytes() for name in data):
        raise RuntimeError(f"{type(form).__name__}: what is read is not what was written")
    return found


def kills(
    form: Format, place: Path, old: Data | None, new: Data, num_kills: int, rng: np.random.Generator
) -> Counter[str]:
    """What kills during the writing of `new` left, over an older version or over nothing."""
    before = place.parent.with_name("before")
    as_read = stored(form, place, new)
    old_as_read = None if old is None else stored(form, place, old)
    if old is None:
        clear(place.parent)
        form.prepare(place)
    shutil.copytree(place.parent, before)

    def attempt(kill_after: float | None) -> float | None:
        shutil.rmtree(place.parent)
        shutil.copytree(before, place.parent)
        return writer(form, place, new, kill_after)

    seconds = statistics.median(attempt(None) or 0.0 for _ in range(3))
    became: Counter[str] = Counter()
    while became.total() < num_kills:
        if attempt(rng.uniform(0, seconds)) is None:
            became[str(apart(look, form, place, old_as_read, as_read, new))] += 1
    shutil.rmtree(before)
    return became


# ---- the table


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Shares of one case and metric by format; kdpipe's own metrics have no rivals."""

    case: str
    metric: str
    unit: str
    shares: dict[str, float]

    def to_json(self) -> str:
        rivals = {name: round(share, 4) for name, share in self.shares.items() if name != "kdpipe"}
        line = {"bench": "damage", "case": self.case, "metric": self.metric, "unit": self.unit}
        return json.dumps({**line, "kdpipe": round(self.shares["kdpipe"], 4), "rivals": rivals})


def damage_lines(forms: Mapping[str, Format], data: Data, folder: Path, num_cases: int, seed: int) -> Iterator[Line]:
    truth, good = {}, {}
    for name, form in forms.items():
        place = folder / name / "stored"
        truth[name], good[name] = stored(form, place, data), files_of(place)
    for number, kind in enumerate(KINDS):
        became: dict[str, Counter[str]] = {}
        for column, (name, form) in enumerate(forms.items()):
            rng = np.random.default_rng([seed, number, column])
            sizes = {file: len(content) for file, content in good[name].items()}
            wounds = [draw_wound(kind, sizes, rng) for _ in range(num_cases)]
            found = list(outcomes(form, folder / name / "stored", good[name], truth[name], wounds))
            became[name] = Counter(outcome.became for outcome in found)
            if name == "kdpipe":
                located = list(located_lines(kind, wounds, found))
        for metric in ("noticed", "harmless", "silent", "crashed"):
            yield Line(
                case=kind,
                metric=metric,
                unit="share of cases",
                shares={name: count[metric] / num_cases for name, count in became.items()},
            )
        yield from located


def located_lines(kind: str, wounds: Sequence[Wound], found: Sequence[Outcome]) -> Iterator[Line]:
    """Of kdpipe's errors: whether they name the damaged file, and bytes of which some are damaged."""
    pairs = list(zip(wounds, found, strict=True))
    named = [outcome.names_file(wound) for wound, outcome in pairs]
    yield Line(case=kind, metric="file named", unit="share of cases", shares={"kdpipe": float(np.mean(named))})
    inside = [outcome.names_bytes(wound) for wound, outcome in pairs if "/shards/" in wound.file]
    if kind != "truncated" and inside:
        share = float(np.mean(inside))
        yield Line(case=kind, metric="bytes named", unit="share of cases in shards", shares={"kdpipe": share})


def kill_lines(
    forms: Mapping[str, Format], old: Data, new: Data, folder: Path, num_kills: int, seed: int
) -> Iterator[Line]:
    for number, (case, before) in enumerate((("kill, nothing there before", None), ("kill, over an older one", old))):
        became = {}
        for column, (name, form) in enumerate(forms.items()):
            rng = np.random.default_rng([seed, len(KINDS) + number, column])
            became[name] = kills(form, folder / name / "stored", before, new, num_kills, rng)
        good = ("whole",) if before is not None else ("whole", "absent")
        bad = ("lost",) if before is not None else ("refused",)
        for metric in (*good, *bad, "silent", "crashed"):
            shares = {name: count[metric] / num_kills for name, count in became.items()}
            yield Line(case=case, metric=metric, unit="share of kills", shares=shares)


RIVALS: dict[str, Callable[[Data], Format]] = {
    "safetensors": lambda data: Safetensors(),
    "torch.save": lambda data: TorchSave(),
    "Arrow IPC": lambda data: Arrow(),
    "DCP": Dcp,
    "torch.save + rename": lambda data: Renamed(),
}
KILLED_ALONE = "torch.save + rename"
"""Damaged, its file is that of torch.save."""


def run(folder: Path, rivals: Sequence[str], *, num_cases: int, num_kills: int, seed: int) -> Iterator[Line]:
    samples = make_samples()
    old, new = make_data(samples, 1), make_data(samples, 2)
    forms: dict[str, Format] = {"kdpipe": Kdpipe(samples), **{name: RIVALS[name](new) for name in rivals}}
    for name in forms:
        (folder / name).mkdir()
    damaged = {name: form for name, form in forms.items() if name != KILLED_ALONE}
    yield from damage_lines(damaged, new, folder, num_cases, seed)
    yield from kill_lines(forms, old, new, folder, num_kills, seed)


def table(lines: Iterable[Line]) -> Iterator[str]:
    """Markdown, a row at a time; a cell is empty where there is nothing to measure."""
    columns, case = [""], ""
    for line in lines:
        if list(line.shares) != columns and len(line.shares) > 1:
            columns = list(line.shares)
            yield from ("", f"| damage | | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 2))
        cells = [f"{line.shares[name] * 100:.3g} %" if name in line.shares else "" for name in columns]
        yield f"| {line.case if line.case != case else ''} | {line.metric} | {' | '.join(cells)} |"
        case = line.case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a Markdown table")
    parser.add_argument("--quick", action="store_true", help="few cases: under a minute")
    parser.add_argument("--cases", type=int, help="cases of every format and kind of damage; 1000, or 80 if quick")
    parser.add_argument("--kills", type=int, help="kills of every format's writer; 200, or 15 if quick")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS), help="all by default")
    parser.add_argument("--seed", type=int, default=0, help="draws the damage; kills are drawn, but not repeatable")
    parser.add_argument("--folder", type=Path, help="where the files go; the system's temporary folder by default")
    arguments = parser.parse_args()
    num_cases = arguments.cases or (80 if arguments.quick else 1000)
    num_kills = arguments.kills or (15 if arguments.quick else 200)
    warnings.simplefilter("ignore")  # DCP's, that there is one process
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="kdpipe-bench-", dir=arguments.folder))
    try:
        lines = run(folder, arguments.rivals, num_cases=num_cases, num_kills=num_kills, seed=arguments.seed)
        for text in (line.to_json() for line in lines) if arguments.json else table(lines):
            print(text, flush=True)
        if not arguments.json:
            versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors", "pyarrow"))
            print(f"\n{num_cases} cases, {num_kills} kills, seed {arguments.seed}; {versions}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
