"""Folding: what a codec adds up lies in the teacher's head, which rows then enter as they are stored, in steps.

    decoded    row = origin + steps @ synthesis, rounded;  logits = row @ weight.T
    folded     logits = steps @ (weight @ synthesis.T).T + weight @ origin

It saves a product [R, E] x [E, E] in float32 for each batch, dear on a GPU beside a head in bfloat16. Steps are small
whole numbers, which rounding leaves alone, and logits are rounded before what all rows have in common is added.
Invariant: a codec is folded where that takes logits no further from those of exact rows than rounding decoded rows
does, but for PART of what the codec itself loses. That is measured when the head is loaded, on rows from all over the
cache, always the same ones; one rank that finds it worse decides for all.
Cost: a product [V, E] x [E, E] in float32 and some of SOME_SAMPLES * ROWS_A_SAMPLE rows with the head, once a process;
the folded head takes the place of the other.
"""

# Shapes: R rows, E teacher width, V rows of its head, C columns of a folded head.

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from kdpipe.manifests.fisher import Fisher
from kdpipe.manifests.row_source import CodedRowSource
from kdpipe.stages.codec.metric import ENTRIES_AT_ONCE, LOGITS_AT_ONCE, divergence
from kdpipe.stages.feed.dataset import Teacher
from kdpipe.stages.feed.decoding import FisherDecoder, finished, stored_rows
from kdpipe.stages.loss import Side
from kdpipe.stages.loss.layout import row_blocks
from kdpipe.stages.loss.metrics import wide_logits
from kdpipe.stages.models.head import Head
from kdpipe.stages.ranks import Ranks
from kdpipe.stages.student.student import TeacherHead, load_teacher_head

PART = 0.05
"""Of the mean KL that a codec loses: what folding may add to it."""
LARGEST = 256
"""Whole numbers up to it are exact in bfloat16, and so in every dtype of a pass."""
MULTIPLE = 8
"""Of columns: the matrix units of a GPU take rows of so many numbers of two bytes."""


class FoldedDecoder:
    """Of stored rows what enters a folded head [R, C]: a column a component, counted from the middle of its levels, and
    one more, LARGEST to a step, for each component of more levels than one column is exact for."""

    def __init__(self, codec: Fisher, plain: FisherDecoder, dtype: torch.dtype, device: torch.device) -> None:
        self._codec, self._plain, self._dtype, self._device = codec, plain, dtype, device
        levels = torch.from_numpy(codec.arrays["levels"].copy()).to(device)
        self._middle = torch.from_numpy(codec.lowest.copy()).to(device) + levels // 2
        self._wide = torch.nonzero(levels > 2 * LARGEST)[:, 0]
        self._unused = -(len(levels) + len(self._wide)) % MULTIPLE

    def rows(self, stored: Mapping[str, Tensor]) -> Tensor:
        steps = self._plain.steps(stored)
        if len(stored["whole_row"]):
            steps[stored["whole_row"]] = (self._plain.whole(stored) - self._mean) @ self._analysis
        steps -= self._middle
        high = (steps[:, self._wide] / LARGEST).round_()
        steps[:, self._wide] -= LARGEST * high
        found = torch.nn.functional.pad(torch.cat([steps, high], 1), (0, self._unused))
        return finished(found, self._dtype)  # as exact as its own numbers, of a row that is stored as it is

    def fold(self, head: Head) -> tuple[Tensor, Tensor]:
        """The folded weight [V, C], of the head's dtype, and the bias that goes with it, float32 [V]."""
        synthesis = torch.from_numpy(self._codec.synthesis.copy()).to(self._device)
        origin = (self._mean.double() + self._middle.double() @ synthesis.double()).float()
        width = len(synthesis) + len(self._wide)
        weight = head.weight.new_zeros(len(head.weight), width + self._unused)
        bias = torch.zeros(len(weight), device=self._device)
        if head.bias is not None:
            bias += head.bias
        for first in range(0, len(weight), ENTRIES_AT_ONCE):
            some = slice(first, first + ENTRIES_AT_ONCE)
            own = head.weight[some].float()
            step = own @ synthesis.T
            weight[some, :width] = torch.cat([step, LARGEST * step[:, self._wide]], 1).to(weight.dtype)
            bias[some] += own @ origin
        return weight, bias

    @cached_property
    def _mean(self) -> Tensor:
        return torch.from_numpy(self._codec.mean.copy()).to(self._device)

    @cached_property
    def _analysis(self) -> Tensor:
        """float32 [E, E]: z / step of what differs from the mean. Few caches have a row that needs it."""
        arrays = self._codec.arrays
        exact = arrays["analysis"] * arrays["unit"] / arrays["spread"][:, None]
        return torch.from_numpy(exact).to(self._device, torch.float32)


def load_teacher_heads(
    teachers: Sequence[Teacher], device: torch.device, *, as_rows: bool = False, ranks: Ranks | None = None
) -> list[TeacherHead]:
    """The heads of some teachers, with the codec folded in where that is exact enough.

    as_rows: none is folded, for whoever looks at the rows themselves
    Collective where there are ranks.
    """
    heads = []
    for teacher in teachers:
        head, fitted = load_teacher_head(teacher, device), teacher.fitted
        if fitted is not None and isinstance(fitted.codec, Fisher) and not as_rows:
            other = folded(head, fitted.codec, device)
            is_worse = not is_exact_enough(other, head, teacher)
            if ranks is not None:
                (is_worse,) = map(bool, ranks.largest([float(is_worse)]))
            head = head if is_worse else other
        heads.append(head)
    return heads


@torch.no_grad()
def folded(plain: TeacherHead, codec: Fisher, device: torch.device) -> TeacherHead:
    """The same head with the codec folded in."""
    assert isinstance(plain.decoder, FisherDecoder)
    decoder = FoldedDecoder(codec, plain.decoder, plain.head.weight.dtype, device)
    weight, bias = decoder.fold(plain.head)
    head = replace(plain.head, weight=weight, bias=None)
    return replace(plain, head=head, decoder=decoder, origin=bias.view(torch.int32))


def is_exact_enough(other: TeacherHead, plain: TeacherHead, teacher: Teacher) -> bool:
    """Whether a folded head keeps to the invariant, in an evaluation and in a loss."""
    assert teacher.fitted is not None
    allowed = PART * teacher.fitted.record.kl_mean
    return all(folded <= decoded + allowed for decoded, folded in zip(*lost((plain, other), teacher), strict=True))


@torch.no_grad()
def lost(heads: Sequence[TeacherHead], teacher: Teacher) -> list[tuple[float, float]]:
    """Of each head the mean KL from the logits of exact rows, made as in an evaluation, and as in a loss in bfloat16.

    The first of the heads is not folded. A dtype with more bits than bfloat16 loses no more.
    """
    assert teacher.codec is not None
    plain, device = heads[0], heads[0].head.weight.device
    assert isinstance(plain.decoder, FisherDecoder)
    parts = stored_rows(teacher.codec, cast(CodedRowSource, teacher.rows).some_parts())
    stored = {name: tensor.to(device) for name, tensor in parts.items()}
    exact = Side(plain.decoder.exact(stored), plain.head)
    sides = [head.side(stored, stored["row"]) for head in heads]
    coarse = [_in_bfloat16(side) for side in sides]
    count, size = len(exact.hidden), plain.vocab_size
    sums = torch.zeros(len(heads), 2, dtype=torch.float64)
    for block in row_blocks(count, max(LOGITS_AT_ONCE // size, 1)):
        out = exact.hidden.new_empty(block.stop - block.start, size)
        wanted = wide_logits(exact, block.start, block.stop, out).log_softmax(-1)
        for number, (side, low) in enumerate(zip(sides, coarse, strict=True)):
            raw = low.raw_logits(block.start, block.stop, out.bfloat16())
            for way, logits in enumerate(
                (wide_logits(side, block.start, block.stop, out), low.head.finish.apply(raw.float(), low.head.bias))
            ):
                sums[number, way] += divergence(wanted, logits.log_softmax(-1)).sum().cpu()
    return [(float(wide), float(low)) for wide, low in sums / count]


def _in_bfloat16(side: Side) -> Side:
    """As a sharded student is given it whose pass is in bfloat16."""
    return Side(side.hidden.bfloat16(), replace(side.head, weight=side.head.weight.bfloat16()))
