"""Packing: samples laid end to end, or padded, as the batch of one forward pass; teacher rows into reused buffers.

Cost: one copy of the rows, from their source into the buffer. On a GPU two pinned buffers take turns, and the copy to
the device has a stream of its own: a batch is packed and copied while the one before it is computed.
"""

# Shapes: L tokens of a batch, S samples in it, R supervised rows, E teacher width.

import contextlib
import itertools
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, cast

import numpy as np
import torch

from kdpipe.manifests.row_source import CodedRowSource
from kdpipe.manifests.sample import IGNORED, SampleTokens, row_positions
from kdpipe.stages.feed.dataset import Dataset
from kdpipe.stages.feed.decoding import stored_rows

ROWS_A_SAMPLE = 2**32
"""More than any sample has."""


TeacherRows = torch.Tensor | dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedBatch:
    """Samples ready for a forward pass: laid end to end in one row, or padded to one length each in a row of its own.

    input_ids, position_ids: int64 [1, L], or [S, L] padded; positions restart at every sample
    seq_lens: int32 [S], tokens of each sample
    bounds: where each packed sample begins, and L at the end: on the CPU, so that nobody waits for a GPU to read them;
        () where padded
    attention_mask: bool [S, L] where padded, None where packed
    row_positions: int64 [R], places in the flattened [S*L] whose next token is supervised
    labels: int64 [R], that next token; IGNORED where cross entropy is to leave it out
    keys: int64 [R], of each row a number that no other row of the run has: what a sampled loss draws by
    teacher_rows: of each teacher [R, E] as Teacher.carried_as says, valid until the next batch is made; or, of coded
        caches, what decoding.py makes them of
    teacher_places: of each teacher the rows of the batch that it has rows for, int64 [R_k]; () where every one has all
    stale: rows whose next token an older student wrote, int64 [K], and its log-probability then, the bits of fp32,
        int32 [K]; () for none
    aligned: of each teacher with another tokenizer three tensors: runs of the batch's rows and of its own that stand
        for the same text, each a first row and a number of rows, int64 [K, 2] twice, and the token that each of its
        rows predicts, int64 [P]; () where all have the student's
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    seq_lens: torch.Tensor
    attention_mask: torch.Tensor | None
    row_positions: torch.Tensor
    labels: torch.Tensor
    keys: torch.Tensor
    teacher_rows: tuple[TeacherRows, ...]
    bounds: tuple[int, ...] = ()
    teacher_places: tuple[torch.Tensor, ...] = ()
    stale: tuple[torch.Tensor, ...] = ()
    aligned: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...] = ()

    @property
    def next_tokens(self) -> torch.Tensor:
        """The token that each row predicts, int64 [R]."""
        return self.input_ids.flatten()[self.row_positions + 1]

    @property
    def taught_tokens(self) -> list[torch.Tensor]:
        """Of each teacher the token that each of its rows predicts; of no use where they are another tokenizer's."""
        tokens = self.next_tokens
        return [tokens[places] for places in self.teacher_places] or [tokens] * len(self.teacher_rows)

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch on another device; itself where it is there already."""
        if device.type != "cuda":
            return self._moved(device)
        stream, current = _copy_stream(device), torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):
            moved = self._moved(device)
        current.wait_stream(stream)
        for tensor in (moved.input_ids, moved.position_ids, moved.seq_lens, moved.attention_mask, *moved._of_rows()):
            if tensor is not None:
                tensor.record_stream(current)  # it was made on the other stream, whose next tensors may not take it
        return moved

    def _moved(self, device: torch.device) -> "PackedBatch":
        def move(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(device, non_blocking=True)
            if isinstance(value, dict):
                return {name: move(each) for name, each in value.items()}
            return tuple(move(each) for each in value) if isinstance(value, tuple) else value

        return PackedBatch(**{field.name: move(getattr(self, field.name)) for field in fields(self)})

    def _of_rows(self) -> tuple[torch.Tensor, ...]:
        rows = [[each] if isinstance(each, torch.Tensor) else each.values() for each in self.teacher_rows]
        of_teachers = *itertools.chain(*rows), *self.teacher_places, *itertools.chain(*self.aligned)
        return self.row_positions, self.labels, self.keys, *of_teachers, *self.stale


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Packer:
    """Packs samples of a data set into batches, in row buffers that grow to the largest batch and are used again."""

    def __init__(self, dataset: Dataset, *, padded: bool = False, pin: bool = False) -> None:
        self._dataset, self._padded, self._pin = dataset, padded, pin
        self._buffers = [RowBuffer(each.record.hidden_size, each.carried_as, pin=pin) for each in dataset.teachers]

    def pack(self, samples: Sequence[int] | np.ndarray) -> PackedBatch:
        """The samples as one batch, in this order, without padding unless the packer was made for it."""
        samples = np.asarray(samples, dtype=np.int64)
        texts = [self._dataset.tokens(sample) for sample in samples.tolist()]
        lengths = np.array([len(text.token_ids) for text in texts], dtype=np.int64)
        firsts = np.cumsum(lengths) - lengths
        ids = np.concatenate([text.token_ids for text in texts]).astype(np.int64)
        supervised = np.concatenate([text.supervised for text in texts])
        supervised[firsts] = False  # no sample's first token is predicted: the one before it is another sample's
        rows = row_positions(supervised)
        counts = np.add.reduceat(supervised.astype(np.int64), firsts)
        labels = ids[rows + 1]
        if not all(text.imitated for text in texts):
            labels[~np.repeat([text.imitated for text in texts], counts)] = IGNORED
        positions = np.arange(len(ids)) - np.repeat(firsts, lengths)
        shape, mask = (1, len(ids)), None
        if self._padded:
            shape = (len(texts), int(lengths.max()))
            places = np.repeat(np.arange(len(texts)) * shape[1], lengths) + positions
            ids, positions, rows = _spread(ids, places, shape), _spread(positions, places, shape), places[rows]
            mask = torch.from_numpy(np.arange(shape[1]) < lengths[:, None])
        return PackedBatch(
            input_ids=torch.from_numpy(ids.reshape(shape)),
            position_ids=torch.from_numpy(positions.reshape(shape)),
            seq_lens=torch.from_numpy(lengths.astype(np.int32)),
            bounds=() if self._padded else (*firsts.tolist(), int(lengths.sum())),
            attention_mask=mask,
            row_positions=torch.from_numpy(rows),
            labels=torch.from_numpy(labels),
            keys=torch.from_numpy(_row_keys(samples, counts)),
            teacher_rows=self._gather(samples, counts),
            teacher_places=self._places(samples, counts),
            stale=_stale(texts, counts),
            aligned=self._aligned(samples, counts),
        )

    def empty(self) -> PackedBatch:
        """The shortest thing a model can run with nothing to learn from: keeps a rank without samples in step."""
        return PackedBatch(
            input_ids=torch.zeros(1, 1, dtype=torch.int64),
            position_ids=torch.zeros(1, 1, dtype=torch.int64),
            seq_lens=torch.ones(1, dtype=torch.int32),
            bounds=() if self._padded else (0, 1),
            attention_mask=torch.ones(1, 1, dtype=torch.bool) if self._padded else None,
            row_positions=torch.zeros(0, dtype=torch.int64),
            labels=torch.zeros(0, dtype=torch.int64),
            keys=torch.zeros(0, dtype=torch.int64),
            teacher_rows=tuple(
                buffer.take(0) if teacher.codec is None else stored_rows(teacher.codec, (), pin=self._pin)
                for teacher, buffer in zip(self._dataset.teachers, self._buffers, strict=True)
            ),
            teacher_places=self._places(np.zeros(0, np.int64), np.zeros(0, np.int64)),
            aligned=self._aligned(np.zeros(0, np.int64), np.zeros(0, np.int64)),
        )

    def _aligned(
        self, samples: np.ndarray, counts: np.ndarray
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]:
        """PackedBatch.aligned of samples with so many rows each."""
        found = []
        for text in filter(None, (teacher.beside for teacher in self._dataset.teachers)):
            spans = [text.runs(sample) for sample in samples.tolist()]
            targets = [text.targets(sample) for sample in samples.tolist()]
            theirs = np.array([len(each) for each in targets], dtype=np.int64)
            runs = np.concatenate([np.zeros((0, 4), np.int64), *spans]).astype(np.int64)
            numbers = [len(each) for each in spans]
            runs[:, 0] += np.repeat(np.cumsum(counts) - counts, numbers)
            runs[:, 2] += np.repeat(np.cumsum(theirs) - theirs, numbers)
            tokens = np.concatenate([np.zeros(0, np.int64), *targets]).astype(np.int64)
            both = (np.ascontiguousarray(runs[:, pair]) for pair in (slice(0, 2), slice(2, 4)))
            student, teacher, predicted = map(torch.from_numpy, (*both, tokens))
            found.append((student, teacher, predicted))
        return tuple(found)

    def _taught(self, samples: np.ndarray) -> list[np.ndarray]:
        """Of each teacher which of the samples it teaches, bool [S]."""
        numbers, by = range(len(self._buffers)), self._dataset.taught_by
        return [np.ones(len(samples), dtype=bool) if by is None else by[samples] == number for number in numbers]

    def _places(self, samples: np.ndarray, counts: np.ndarray) -> tuple[torch.Tensor, ...]:
        """PackedBatch.teacher_places of samples with so many rows each."""
        if self._dataset.taught_by is None:
            return ()
        taught = self._taught(samples)
        return tuple(torch.from_numpy(np.flatnonzero(np.repeat(each, counts))) for each in taught)

    def _gather(self, samples: np.ndarray, counts: np.ndarray) -> tuple[TeacherRows, ...]:
        """The teachers' rows of the samples that they teach, one buffer a teacher; counts: rows of each sample."""
        gathered: list[TeacherRows] = []
        each = zip(self._dataset.teachers, self._buffers, self._taught(samples), strict=True)
        for teacher, buffer, taught in each:
            mine, num_rows = samples[taught], int(counts[taught].sum())
            if (text := teacher.beside) is not None:
                num_rows = sum(len(text.targets(sample)) for sample in mine.tolist())
            if teacher.codec is not None:
                source = cast(CodedRowSource, teacher.rows)
                parts = [source.parts(sample) for sample in mine.tolist()]
                gathered.append(stored_rows(teacher.codec, parts, pin=self._pin))
                teacher.rows.done(mine)
                continue
            rows = buffer.take(num_rows)
            # The copy moves bits and knows no dtype: torch and numpy do not share bfloat16.
            bits, at = rows.view(torch.uint8).numpy(), 0
            for sample in mine.tolist():
                found = teacher.rows.rows(sample)
                bits[at : at + len(found)] = found.view(np.uint8)
                at += len(found)
            assert at == num_rows, f"{at} rows for {num_rows} supervised tokens"
            teacher.rows.done(mine)
            gathered.append(rows)
        return tuple(gathered)


class RowBuffer:
    """Memory for the rows [R, E] of one batch after the other.

    pin: for copies to a GPU: pinned, and two in turn, so that one is filled while the other is copied
    """

    def __init__(self, width: int, dtype: torch.dtype, *, pin: bool) -> None:
        self._width, self._dtype, self._pin = width, dtype, pin
        self._slots = [torch.empty(0, width, dtype=dtype) for _ in range(2 if pin else 1)]
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._slots)
        self._turn = 0

    def take(self, num_rows: int) -> torch.Tensor:
        """[num_rows, E], uninitialised, until the next one is taken."""
        if self._pin:
            # The batch before this one was given to the copy stream before this one is asked for.
            before, self._turn = self._turn, (self._turn + 1) % len(self._slots)
            self._copied[before] = _copy_stream(torch.device("cuda", torch.cuda.current_device())).record_event()
            if (event := self._copied[self._turn]) is not None:
                event.synchronize()
        if num_rows > len(self._slots[self._turn]):
            self._slots[self._turn] = row_buffer(num_rows, self._width, self._dtype, pin=self._pin)
        return self._slots[self._turn][:num_rows]


def _row_keys(samples: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A sample's number and a row's number within it as one, for every row: int64 [R]; counts: rows of each sample."""
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(samples * ROWS_A_SAMPLE, counts) + within


def _stale(texts: Sequence[SampleTokens], counts: np.ndarray) -> tuple[torch.Tensor, ...]:
    """PackedBatch.stale of samples with so many rows each."""
    firsts = (np.cumsum(counts) - counts).tolist()
    old = [(first, text.written) for first, text in zip(firsts, texts, strict=True) if text.written is not None]
    if not old:
        return ()
    rows = np.concatenate([first + np.arange(len(written)) for first, written in old])
    written = np.concatenate([written for _, written in old]).astype(np.float32, copy=False)
    return torch.from_numpy(rows), torch.from_numpy(written.view(np.int32))  # a sharded student would round floats


def _spread(values: np.ndarray, places: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """values at their places in a flattened array of this shape, zero elsewhere."""
    flat = np.zeros(shape[0] * shape[1], dtype=values.dtype)
    flat[places] = values
    return flat


def row_buffer(num_rows: int, width: int, dtype: torch.dtype, *, pin: bool) -> torch.Tensor:
    """An uninitialised [num_rows, width] buffer: pinned, or in huge pages where the kernel has them."""
    if pin:
        # A copy to the GPU takes it as it is; from other memory the driver copies it to a pinned place first.
        return torch.empty(num_rows, width, dtype=dtype, pin_memory=True)
    # Measured: rows of 256 x 1024 bf16 copy at 1.0 of memcpy into huge pages, at 0.8-0.9 into small ones.
    memory = mmap.mmap(-1, num_rows * width * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(num_rows, width)
