"""JSON files of any size: the elements of an array, or objects one after another, with the line of each.

Invariant: at most one chunk beyond the element being parsed is held; what is malformed is a DataError naming its line.
Cost: an element that crosses the end of a chunk is parsed twice; chunks double while one element is not complete.
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kdpipe.manifests.errors import DataError

CHUNK_BYTES = 1 << 18
BLANK = re.compile(r"[ \t\r\n]*")
DEEPEST = 100
"""Levels of brackets in what is read of a record, or in JSON text within it; far from Python's limit of calls."""
LONGEST_NUMBER = 4300  # digits that Python reads; beside it stands a column of somebody else


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonValue:
    """A value of a JSON file, an object where all is well, the line it begins on and its 1-based number in the file."""

    value: Any
    line: int
    number: int


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A value of a file that has no like in JSON; `kind` is what it is there."""

    kind: str


def kind_of(value: object) -> str:
    """What a JSON value is, for an error message that must not show the value."""
    if value is None:
        return "null"
    if isinstance(value, Unreadable):
        return value.kind
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


class Doubled(dict[str, Any]):
    """An object in which a key, `name`, stands twice; it holds the last, as everywhere in Python."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.name = next(name for name in names if names.count(name) > 1)


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values, which says where a key stands twice."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else Doubled(pairs)


def _whole_number(digits: str) -> int | Unreadable:
    return int(digits) if len(digits) <= LONGEST_NUMBER else Unreadable(f"a number of {len(digits):,} digits")


DECODER = json.JSONDecoder(parse_int=_whole_number, object_pairs_hook=object_of)


def is_too_deep(value: object) -> bool:
    """Whether a JSON value has more than DEEPEST levels of lists and objects. Cost: each item is looked at once."""
    level = [value]
    for _ in range(DEEPEST + 1):
        nested = [each for each in level if isinstance(each, dict | list)]
        level = [item for each in nested for item in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return False
    return True


def parse_object(text: str, place: str) -> dict[str, Any]:
    """The one JSON object that `text` is. Raises DataError at `place` for anything else."""
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as err:
        raise DataError(f"not JSON: {err.msg} at column {err.pos + 1}", where=place) from err
    except RecursionError:
        raise DataError("not JSON that can be read: brackets are nested too deep", where=place) from None
    return check_object(value, place)


def check_object(value: Any, place: str) -> dict[str, Any]:
    """`value`, which must be an object. Raises DataError at `place`."""
    if not isinstance(value, dict):
        raise DataError(f"expected an object, found {kind_of(value)}", where=place)
    return value


def json_values(path: Path) -> Iterator[JsonValue]:
    """The values in a .json file, lazily: those of its array, or those that follow each other (JSON lines)."""
    with path.open("rb") as file:
        window = _Window(file, path)
        in_array = window.peek() == "["
        if in_array:
            window.advance(1)
        number = 0
        while (char := window.peek()) and not (in_array and char == "]"):
            if in_array and number:
                window.expect(",")
                window.peek()
            number += 1
            line = window.line
            yield JsonValue(value=window.take_value(), line=line, number=number)
        if in_array:
            window.expect("]")
            if window.peek():
                raise window.error("expected the end of the file after the array")


class _Window:
    """A stretch of a UTF-8 file: `text[at:]` is still to be parsed and begins on `line`."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = path
        self.line = 1
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._num_read = 0
        self._text = ""
        self._at = 0
        self._ended = False

    def error(self, message: str) -> DataError:
        return DataError(message, where=f"{self.path}:{self.line}")

    def advance(self, num_chars: int) -> None:
        self.line += self._text.count("\n", self._at, self._at + num_chars)
        self._at += num_chars

    def peek(self) -> str:
        """The next character that is not blank, or "" at the end of the file."""
        while True:
            blank = BLANK.match(self._text, self._at)
            self.advance(blank.end() - self._at if blank else 0)
            if self._at < len(self._text) or not self._grow(CHUNK_BYTES):
                return self._text[self._at : self._at + 1]

    def expect(self, char: str) -> None:
        found = self.peek()
        if found != char:
            came = "the file ends" if not found else "something else came"
            raise self.error(f"expected '{char}' and {came}: the JSON array is cut off or malformed")
        self.advance(1)

    def take_value(self) -> Any:
        """Parse the value that begins here, reading on until it is complete."""
        if self.peek() in ("", "]", ","):
            raise self.error("expected an object, found the end of the file or of the array")
        num_bytes = CHUNK_BYTES
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as err:
                # Incomplete text fails at its end, or at the start of the string that it cuts; anything else is wrong.
                cut = err.msg.startswith("Unterminated string") or err.pos >= len(self._text) - len("\\u0000")
                if not (cut and self._grow(num_bytes)):
                    self.advance(err.pos - self._at)
                    raise self.error(f"not JSON: {err.msg}") from None
                num_bytes *= 2
            except RecursionError:
                raise self.error("not JSON that can be read: brackets are nested too deep") from None
            else:
                if isinstance(value, int | float) and end > len(self._text) - len("1e+") and self._grow(num_bytes):
                    continue  # more digits may follow
                self.advance(end - self._at)
                return value

    def _grow(self, num_bytes: int) -> bool:
        """Drop what was parsed and read on; False at the end of the file."""
        if self._ended:
            return False
        raw = self._file.read(num_bytes)
        self._num_read += len(raw)
        self._ended = not raw
        try:
            more = self._decoder.decode(raw, final=self._ended)
        except UnicodeDecodeError as err:
            # The bytes that the decoder saw are the last ones read, whatever it had kept back from before.
            bad = self._num_read - len(err.object) + err.start
            self.line += self._text.count("\n", self._at) + err.object[: err.start].count(b"\n")
            raise self.error(f"not UTF-8 at byte {bad}; convert the file to UTF-8") from None
        self._text = self._text[self._at :] + more
        self._at = 0
        return not self._ended or bool(more)
