"""A disk that keeps only what was flushed: what a power cut would leave, step by step, while real code runs.

    with PowerCut(folder) as disk: ...code...; disk.restore(elsewhere)

os.fsync of a file puts its contents at that moment on the disk, os.fsync of a folder its names. Everything else
(writes, links, renames, removals) is lost unless a later flush covers it. `skip` makes places flush nothing. What
was seen is held open, so that no file made later gets its inode number.
"""

import os
import stat
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

Place = tuple[str, str]
"""Function that asked for a flush, and the folder it flushed or flushed a file in: "publish", "shards"."""
FLUSHES_OF_A_COPY: list[Place] = [
    ("make_folder", "live"),
    ("fsync_tree", "files"),
    ("fsync_tree", "folders"),
    ("_flush_name", "new"),
    ("write_once", "tmp"),
    ("ScratchFile.flush", "tmp"),
    ("publish", "shards"),
    ("publish", "commits"),
]
"""Every flush while a cache is made of another one, by convert or derive, in a parent folder that is new as well."""


class LostError(Exception):
    """A cut lost what was promised: what a test expects where a flush is left out, and no error of its own harness."""


@dataclass(eq=False)
class PowerCut:
    """Watches os.fsync while the block runs; `folder` and what is in it already counts as on the disk."""

    folder: Path
    skip: Collection[Place] = ()
    after_flush: Callable[["PowerCut"], None] | None = None
    contents: dict[int, bytes] = field(default_factory=dict)
    names: dict[int, dict[str, int]] = field(default_factory=dict)
    kinds: dict[int, bool] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    def __enter__(self) -> "PowerCut":
        for path in (self.folder, *self.folder.rglob("*")):
            self._keep(path)
        self._own, os.fsync = os.fsync, self._fsync
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync = self._own
        while self.held:
            os.close(self.held.pop())

    def _fsync(self, descriptor: int) -> None:
        self._own(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        place = self._place(path)
        if place not in self.places:
            self.places.append(place)
        if place in self.skip or self.folder not in (path, *path.parents):
            return
        self._keep(Path(f"/proc/self/fd/{descriptor}"))
        if self.after_flush is not None:
            self.after_flush(self)

    def _place(self, path: Path) -> Place:
        frame = sys._getframe(2)
        if frame.f_code.co_name == "fsync_folder" and frame.f_back is not None:
            frame = frame.f_back
        function = frame.f_code.co_qualname
        if function == "fsync_tree":
            return function, "folders" if path.is_dir() else "files"
        name = path.name if path.is_dir() else path.parent.name
        return function, "number" if name.isdecimal() else name

    def _keep(self, path: Path) -> None:
        status = path.stat()
        folder = stat.S_ISDIR(status.st_mode)
        self._see(status.st_ino, folder, path)
        if folder:
            with os.scandir(path) as entries:
                self.names[status.st_ino] = {entry.name: entry.inode() for entry in entries}
            for entry in os.scandir(path):
                self._see(entry.inode(), entry.is_dir(), path / entry.name)
        else:
            self.contents[status.st_ino] = path.read_bytes()

    def _see(self, inode: int, folder: bool, path: Path) -> None:
        if inode not in self.kinds:
            self.kinds[inode] = folder
            self.held.append(os.open(path, os.O_RDONLY))

    def restore(self, target: Path) -> None:
        """Make in `target` what the disk holds: a name whose file was never flushed is an empty file."""
        self._restore(self.folder.stat().st_ino, target)

    def _restore(self, inode: int, target: Path) -> None:
        if not self.kinds[inode]:
            target.write_bytes(self.contents.get(inode, b""))
            return
        target.mkdir()
        for name, child in self.names.get(inode, {}).items():
            self._restore(child, target / name)


def left_after_a_rename(cache: Path, folder: Path, go_on: Callable[[Path], object]) -> Path:
    """The cache after a power cut, where a kill came between its name and the flush of that, and go_on ran before."""
    staged = cache.rename(folder / "staged")
    with PowerCut(folder) as disk:
        staged.rename(cache)
        go_on(cache)
        disk.restore(folder / "left")
    return folder / "left" / cache.relative_to(folder)
