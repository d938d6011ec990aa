"""Staging: a plan and all that goes with it are made beside the cache and put in place at once.

Invariant: a cache folder appears under its name with its plan, samples, head and tokenizer all in it, or not at all.
Where the data has more samples than an existing one holds, it grows: a plan and samples.arrow of theirs appear in
CACHE/grown, in the same way, and what was there is left as it is.
"""

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kdpipe.manifests.cache import Cache, teacher_files, write_head
from kdpipe.manifests.durable import (
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
)
from kdpipe.manifests.errors import CacheError, CorruptError, TemporaryError
from kdpipe.manifests.failpoints import failpoint
from kdpipe.manifests.plan import (
    FOLDERS,
    GROWN,
    PLAN_FILE,
    SAMPLES_FILE,
    Plan,
    Samples,
    check_folders,
    plan_folder,
    read_plan,
)
from kdpipe.manifests.progress import Progress
from kdpipe.stages.causal_lm import save_tokenizer
from kdpipe.stages.extract.planning import ExtractSpec, engine_record, plan_cache, require_same, teacher_tokenizer
from kdpipe.stages.teacher.describe import describe_teacher
from kdpipe.stages.teacher.head import Head, read_head
from kdpipe.stages.teacher.rows import as_array


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Staged:
    """A plan ready to be put in place, or found in place already.

    folder: where PLAN.json lies now, beside the cache; None where it is in place
    made: folders whose entries are new because the cache's parents were missing
    """

    plan: Plan
    head: Head
    cache: Path
    folder: Path | None = None
    made: tuple[Path, ...] = ()

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

    def _agree(self, existing: Plan) -> None:
        """What another writer planned in the meantime must be the same."""
        require_same(self.plan, existing, self.cache)
        if self.plan != existing:
            raise TemporaryError("another extraction put other samples there meanwhile; run it again", where=self.cache)


@contextmanager
def staged(spec: ExtractSpec, cache: Path, progress: Progress) -> Iterator[Staged]:
    """Plan the extraction; what was staged and not published is gone when the block ends.

    Raises the errors of teacher, tokenizer and data; CacheError for a folder that is another cache or none; SpaceError.
    """
    info = describe_teacher(spec.teacher, spec.dtype, spec.options.trust)
    engine = engine_record(spec, info, progress)
    tokenizer = teacher_tokenizer(spec, progress)
    check_folders(cache)
    if cache.resolve() == Path.cwd():
        raise CacheError("this is the folder you are in; name one in it", where=cache)
    if cache.exists() and not (cache / PLAN_FILE).exists() and (not cache.is_dir() or any(cache.iterdir())):
        if any(os.path.lexists(cache / name) for name in (SAMPLES_FILE, GROWN, PLAN_FILE)):
            read_plan(cache)  # says that the plan of a cache is lost
        raise CacheError("it exists and is not a cache; choose another name or remove it", where=cache)
    parent = cache.absolute().parent
    made = [above for above in (parent, *parent.parents) if not above.exists()]
    folder = scratch_name(parent, f".{cache.name}.plan")
    try:
        folder.mkdir(parents=True)
        share(folder, spec.group)
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as err:
        raise CacheError(f"cannot be created: {err.strerror}", where=cache) from None
    hold(held)
    sweep([*scratch_of(parent, f".{cache.name}.plan"), *(cache / "tmp").glob("*")])
    try:
        plan, is_new = plan_cache(spec, info, engine, tokenizer, folder, progress, cache=cache)
        head = read_head(spec.teacher, info, plan.head.vocab_size)
        for name in FOLDERS:  # a copy of a cache may lack those that were empty
            (cache / name if plan.teacher_files else folder / name).mkdir(exist_ok=True)
        if not plan.teacher_files:
            write_teacher(tokenizer, head, folder / "teacher")
            plan = Plan.model_validate(plan.model_dump() | {"teacher_files": teacher_files(folder / "teacher")})
        elif lost := [name for name in plan.teacher_files if not os.path.lexists(cache / "teacher" / name)]:
            restore_teacher(tokenizer, head, folder / "restored", plan, cache, lost)
        if is_new:
            (folder / PLAN_FILE).write_bytes(plan.to_bytes())
            failpoint("plan:written")
            fsync_tree(folder)
            failpoint("plan:flushed")
        yield Staged(
            plan=plan,
            head=head,
            cache=cache,
            folder=folder if is_new else None,
            made=tuple(above.parent for above in made),
        )
    except OSError as err:
        raise disk_error(err, cache) from err
    finally:
        os.close(held)
        shutil.rmtree(folder, ignore_errors=True)
        for above in made:
            with contextlib.suppress(OSError):  # not empty: the cache is in it
                above.rmdir()


def write_teacher(tokenizer: PreTrainedTokenizerBase, head: Head, folder: Path) -> None:
    """What a cache keeps of its teacher, into a fresh folder."""
    save_tokenizer(tokenizer, folder)
    (folder / "head.json").write_bytes(canonical(head.record.model_dump()))
    bias = None if head.bias is None else as_array(head.bias)
    write_head(folder, as_array(head.weight), bias, dtype=head.record.dtype)
    failpoint("teacher:written")


def restore_teacher(
    tokenizer: PreTrainedTokenizerBase, head: Head, scratch: Path, plan: Plan, cache: Path, lost: Collection[str]
) -> None:
    """Make the lost files of cache/teacher again. Raises CorruptError where one does not come out as it was."""
    scratch.mkdir()
    write_teacher(tokenizer, head, scratch)
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
