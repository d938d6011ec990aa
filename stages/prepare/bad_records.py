"""Bad records: what is said of those that cannot be read, and how many may be left out.

Invariant: what is said names file, line and reason, never the text. The reasons that differ in numbers alone are one
kind. Where bad records stop the work, up to LOOK_AHEAD records after the first are looked at too, so that one error
shows what there is to mend.
"""

import re
from collections import Counter
from collections.abc import Iterable

from kdpipe.manifests.errors import DataError
from kdpipe.stages.prepare.files import Note

SHOWN = 10
SHOWN_KINDS = 5
LOOK_AHEAD = 10_000
KIND_CHARS = 80


class BadRecords:
    """The bad records among those read so far."""

    def __init__(self) -> None:
        self.num = 0
        self._first: list[DataError] = []
        self._kinds: Counter[str] = Counter()

    def add(self, error: DataError) -> None:
        self.num += 1
        self._kinds[_kind(error)] += 1
        if len(self._first) < SHOWN:
            self._first.append(error)

    def stop(self, following: Iterable[DataError | None], num_good: int, note: Note) -> DataError:
        """The error of the first bad record, which begins `following`; the first ten are noted where there are more."""
        num_read = num_good
        for error in following:
            num_read += 1
            if error is not None:
                self.add(error)
        first = self._first[0]
        if num_read == self.num:
            way_out = "" if self.num == 1 else f"; so are all {self.num:,} records read so far"
        else:
            way_out = "; --bad-records skip leaves such records out"
        if 1 < self.num < num_read:
            way_out = f"; {self.num:,} of the {num_read:,} records read so far are bad: {self._told(note)}{way_out}"
        elif self.num > 1:
            way_out += f": {self._told(note)}"
        return DataError(f"{first.args[0]}{way_out}", where=first.where)

    def too_many(self, num_read: int, limit: float, where: str, note: Note) -> DataError:
        """The error of more bad records than may be left out."""
        return DataError(
            f"{self.num:,} of {num_read:,} records are bad, more than --max-bad {limit:g} allows: {self._told(note)}",
            where=where,
        )

    def _told(self, note: Note) -> str:
        """How many there are of each kind; the first of them are noted."""
        for error in self._first:
            note(f"bad record {error.where}: {error.args[0]}")
        kinds = self._kinds.most_common()
        told = [f"{count:,} x {kind}" for kind, count in kinds[:SHOWN_KINDS]]
        if rest := sum(count for _, count in kinds[SHOWN_KINDS:]):
            told.append(f"{rest:,} of {len(kinds) - SHOWN_KINDS} other kinds")
        return ", ".join(told)


def _kind(error: DataError) -> str:
    """A reason without its numbers, and cut: what is alike is counted together."""
    kind = re.sub(r"\d+", "N", error.args[0])
    return kind if len(kind) <= KIND_CHARS else kind[: KIND_CHARS - 3] + "..."
