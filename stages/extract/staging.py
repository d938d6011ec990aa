"""Staging: a plan and all that goes with it are made beside the cache and put in place at once.

Invariant: a cache folder appears under its name with its plan, samples, head and tokenizer all in it, or not at all.
Where the data has more samples than an existing one holds, it grows: a plan and tables of theirs appear in
CACHE/grown, in the same way, and what was there is left as it is.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import xxhash
from transformers import PreTrainedTokenizerBase

from kdpipe.manifests.cache import Cache, lost_teacher_files, teacher_files, write_head
from kdpipe.manifests.durable import (
    NO_RIGHT,
    canonical,
    disk_error,
    fsync_folder,
    fsync_tree,
    hold,
    make_folder,
    publish,
    scratch_name,
    scratch_of,
    share,
    sweep,
    write_once,
)
from kdpipe.manifests.errors import CacheError, CorruptError, TeacherError, TemporaryError
from kdpipe.manifests.failpoints import failpoint
from kdpipe.manifests.fitted import CODEC_FILE, Choice, Fitted, fitted_bytes
from kdpipe.manifests.places import require_outside
from kdpipe.manifests.plan import (
    FOLDERS,
    GROWN,
    PLAN_FILE,
    SAMPLES_FILE,
    Plan,
    check_folders,
    plan_folder,
    read_plan,
)
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.samples import Samples
from kdpipe.manifests.teacher import HeadRecord
from kdpipe.stages.extract.forecast import teacher_tokenizer
from kdpipe.stages.extract.inputs import Inputs
from kdpipe.stages.extract.planning import (
    engine_record,
    plan_cache,
    plan_without_samples,
    require_room,
    require_same,
)
from kdpipe.stages.extract.spec import ExtractSpec
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.head import Head
from kdpipe.stages.models.tokenizer import save_tokenizer
from kdpipe.stages.rows import as_array
from kdpipe.stages.teacher.describe import describe_teacher
from kdpipe.stages.teacher.head import read_head


@dataclass(frozen=True, kw_only=True, eq=False)
class Staged:
    """A plan ready to be put in place, or found in place already.

    teacher: its folder
    read: reads the teacher's head
    folder: where PLAN.json lies now, beside the cache; None where it is in place
    made: folders whose entries are new because the cache's parents were missing
    """

    plan: Plan
    teacher: ModelFolder
    read: Callable[[], Head]
    cache: Path
    folder: Path | None = None
    made: tuple[Path, ...] = ()

    @cached_property
    def head(self) -> Head:
        """Read where it is used: a finished cache does without."""
        return self.read()

    @property
    def lacks_codec(self) -> bool:
        """Whether its codec is one that is fitted and is not there: not yet, or lost."""
        if not Choice.read(self.plan.settings.codec).is_fitted:
            return False
        return CODEC_FILE not in self.plan.teacher_files or not (self.cache / "teacher" / CODEC_FILE).exists()

    @property
    def scratch(self) -> Path:
        """Where work in progress lies, which the next run sweeps."""
        return (self.cache if self.folder is None or self.plan.generation else self.folder) / "tmp"

    def first_samples(self) -> Samples:
        """Those of the cache's first plan, to which its codec is fitted."""
        if self.folder is None or self.plan.generation:
            return Samples(self.cache, read_plan(self.cache, 0))
        return Samples(self.folder, self.plan)

    def with_codec(self, fitted: Fitted) -> "Staged":
        """With the codec in its place. Raises CorruptError where one that was lost does not come out as it was."""
        is_new = CODEC_FILE not in self.plan.teacher_files
        if is_new:
            assert self.folder is not None, "a plan in place has its codec's digest"
            (self.folder / "teacher" / CODEC_FILE).write_bytes(fitted_bytes(fitted))
            plan = self.plan.changed(teacher_files=teacher_files(self.folder / "teacher"))
            (self.folder / PLAN_FILE).write_bytes(plan.to_bytes())
            fsync_tree(self.folder)
            failpoint("codec:flushed")
            return replace(self, plan=plan)
        data, place = fitted_bytes(fitted), self.cache / "teacher" / CODEC_FILE
        if xxhash.xxh3_128_hexdigest(data) != self.plan.teacher_files[CODEC_FILE]:
            raise CorruptError(
                "it is lost, and fitted again it is another, with other threads or libraries perhaps; without it no "
                "row can be read: put it back from a copy, or extract into another folder",
                where=place,
            )
        write_once(place, data, scratch_folder=self.cache / "tmp")
        return self

    def samples(self) -> Samples:
        """What there is to try the teacher on: the cache's samples, those of before where it grows."""
        if self.folder is None or self.plan.generation:
            return Samples(self.cache, read_plan(self.cache))
        return Samples(self.folder, self.plan)

    def publish(self) -> Cache:
        """Put the staged folder in place, unless the same plan is there; the cache, open.

        Raises CacheError where another plan is, TemporaryError where another extraction made the cache grow.
        """
        if self.folder is not None:
            place = plan_folder(self.cache, self.plan.generation)
            try:
                if self.plan.generation:
                    place.parent.mkdir(exist_ok=True)
                os.rename(self.folder, place)
            except OSError as err:
                # Another writer of the same plan was quicker, or the name is taken by something else.
                if not place.exists():
                    raise disk_error(err, place) from err
                self._agree(read_plan(self.cache, self.plan.generation))
            failpoint("plan:renamed")
            above = (place.parent, self.cache) if self.plan.generation else (self.cache.absolute().parent, *self.made)
            for each in above:
                fsync_folder(each)
            failpoint("plan:published")
        return Cache.open(self.cache)

    def as_published(self) -> "Staged":
        """What the cache has, where it is in place by now: another writer's codec is another one. Raises as publish."""
        if self.folder is None or self.plan.generation or not (self.cache / PLAN_FILE).exists():
            return self
        existing = read_plan(self.cache, 0)
        self._agree(existing)
        return replace(self, plan=existing, folder=None)

    def _agree(self, existing: Plan) -> None:
        """What another writer planned in the meantime must be the same."""
        require_same(self.plan, existing, self.cache)
        if _but_codec(self.plan) != _but_codec(existing):
            raise TemporaryError("another extraction put other samples there meanwhile; run it again", where=self.cache)


def _but_codec(plan: Plan) -> Plan:
    """The plan without the digest of its codec: of two writers that fitted one at once the first one's counts."""
    files = {name: digest for name, digest in plan.teacher_files.items() if name != CODEC_FILE}
    return plan.changed(teacher_files=files)


@contextmanager
def staged(spec: ExtractSpec, cache: Path, progress: Progress) -> Iterator[Staged]:
    """Plan the extraction; what was staged and not published is gone when the block ends.

    Raises the errors of teacher, tokenizer and data; CacheError for a folder that is another cache or none; SpaceError.
    """
    teacher = ModelFolder(spec.teacher, TeacherError, spec.options.trust)
    info = describe_teacher(teacher, spec.dtype)
    engine = engine_record(spec, info, progress)
    tokenizer = teacher_tokenizer(teacher, progress)
    _require_free(cache)
    sweep(scratch_of(cache.absolute().parent, f".{cache.name}.plan"))
    existing = read_plan(cache) if (cache / PLAN_FILE).exists() else None
    inputs = Inputs() if spec.check_inputs or existing is None else Inputs.of(plan_folder(cache, existing.generation))
    wanted = plan_without_samples(spec, info, engine, tokenizer, inputs)
    if existing is not None:
        require_same(wanted, existing, cache)
    choices = {"spec": spec.choices(), "plan": wanted.model_dump(mode="json"), "max_positions": info.max_positions}
    asked = inputs.asked(spec.teacher, spec.data, choices)
    if existing is not None and inputs.were_asked(asked) and not lost_teacher_files(existing, cache):
        progress.note(f"no input has changed since the plan was made: {existing.num_samples:,} samples")
        with _as_disk_error(cache):
            Samples(cache, existing).verify()
            _prepare_folders(cache)
            if spec.keep_rows:
                require_room(existing, cache, cache)
            inputs.remember(plan_folder(cache, existing.generation), asked)
            yield Staged(plan=existing, teacher=teacher, read=lambda: read_head(info), cache=cache)
        return
    with _scratch_folder(spec, cache, is_there=existing is not None) as (folder, made), _as_disk_error(cache):
        plan, is_new = plan_cache(spec, info, wanted, folder, progress, cache=cache)
        head = read_head(info)
        _prepare_folders(cache if plan.teacher_files else folder)
        if not plan.teacher_files:
            write_teacher(tokenizer, head, plan.head, folder / "teacher")
            plan = plan.changed(teacher_files=teacher_files(folder / "teacher"))
        elif lost := lost_teacher_files(plan, cache):
            restore_teacher(tokenizer, head, folder / "restored", plan, cache, lost)
        inputs.remember(folder if is_new else plan_folder(cache, plan.generation), asked)
        if is_new:
            (folder / PLAN_FILE).write_bytes(plan.to_bytes())
            failpoint("plan:written")
            fsync_tree(folder)
            failpoint("plan:flushed")
        yield Staged(
            plan=plan, teacher=teacher, read=lambda: head, cache=cache, folder=folder if is_new else None, made=made
        )


def _require_free(cache: Path) -> None:
    """The folder is a cache, empty or not there. Raises CacheError, or LayoutError for a cache that lost its plan."""
    check_folders(cache)
    if cache.resolve() == Path.cwd():
        raise CacheError("this is the folder you are in; name one in it", where=cache)
    if not (cache / PLAN_FILE).exists():
        require_outside(cache, option="--cache")
    if cache.exists() and not (cache / PLAN_FILE).exists() and (not cache.is_dir() or any(cache.iterdir())):
        if any(os.path.lexists(cache / name) for name in (SAMPLES_FILE, GROWN, PLAN_FILE)):
            read_plan(cache)  # says that the plan of a cache is lost
        raise CacheError("it exists and is not a cache; choose another name or remove it", where=cache)


def _prepare_folders(cache: Path) -> None:
    """Make the folders that a copy of a cache may lack because they were empty; sweep what killed writers left."""
    for name in FOLDERS:
        (cache / name).mkdir(exist_ok=True)
    sweep((cache / "tmp").glob("*"))


@contextmanager
def _scratch_folder(spec: ExtractSpec, cache: Path, *, is_there: bool) -> Iterator[tuple[Path, tuple[Path, ...]]]:
    """A folder beside the cache, gone when the block ends, and the folders above it that were made for it.

    is_there: the cache exists; where nothing can be made beside it, all may be in it already, and any place will do
    """
    parent = cache.absolute().parent
    made = [above for above in (parent, *parent.parents) if not above.exists()]
    folder = scratch_name(parent, f".{cache.name}.plan")
    try:
        try:
            folder.mkdir(parents=True)
        except OSError as err:
            if not is_there or err.errno not in NO_RIGHT:
                raise
            folder = Path(tempfile.mkdtemp(prefix="kdpipe-plan-"))
        share(folder, spec.group)
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as err:
        raise CacheError(f"cannot be created: {err.strerror}", where=cache) from None
    hold(held)
    try:
        yield folder, tuple(above.parent for above in made)
    finally:
        os.close(held)
        shutil.rmtree(folder, ignore_errors=True)
        for above in made:
            with contextlib.suppress(OSError):  # not empty: the cache is in it
                above.rmdir()


@contextmanager
def _as_disk_error(cache: Path) -> Iterator[None]:
    """A failed system call of the block is an error of ours."""
    try:
        yield
    except OSError as err:
        raise disk_error(err, cache) from err


def write_teacher(tokenizer: PreTrainedTokenizerBase, head: Head, record: HeadRecord, folder: Path) -> None:
    """What a cache keeps of its teacher, into a fresh folder."""
    save_tokenizer(tokenizer, folder)
    (folder / "head.json").write_bytes(canonical(record.model_dump()))
    bias = None if head.bias is None else as_array(head.bias)
    write_head(folder, as_array(head.weight), bias, dtype=record.dtype)
    failpoint("teacher:written")


def restore_teacher(
    tokenizer: PreTrainedTokenizerBase, head: Head, scratch: Path, plan: Plan, cache: Path, lost: Collection[str]
) -> None:
    """Make the lost files of cache/teacher again. Raises CorruptError where one does not come out as it was."""
    scratch.mkdir()
    write_teacher(tokenizer, head, plan.head, scratch)
    fsync_tree(scratch)
    made = teacher_files(scratch)
    for name in sorted(made.keys() & lost):
        place = cache / "teacher" / name
        if made[name] != plan.teacher_files[name]:
            raise CorruptError(
                "it is lost and cannot be made as it was, with another version of transformers perhaps; put it back "
                "from a copy",
                where=place,
            )
        make_folder(place.parent)
        publish(scratch / name, place)
    shutil.rmtree(scratch)
