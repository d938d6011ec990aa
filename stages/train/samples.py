"""Samples: data files prepared with the student's own tokenizer, for a training that has no teacher.

    .OUTPUT.samples/{samples.arrow, shards.arrow, runs/, PREPARED.json}      beside OUTPUT

Invariant: the folder appears under its name whole or not at all, and holds what the data are now. It is there as long
as a run in the output may go on from it.
Cost: the data tokenised once; not again while no file changes.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from kdpipe.manifests.durable import (
    disk_error,
    fsync_folder,
    fsync_tree,
    scratch_folder,
    scratch_name,
    scratch_of,
    sweep,
)
from kdpipe.manifests.errors import KdpipeError, TemporaryError
from kdpipe.manifests.prepared import PREPARED_FILE, Prepared, read_prepared
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.running import require_nobody_in
from kdpipe.manifests.samples import Samples
from kdpipe.stages.extract.inputs import Inputs
from kdpipe.stages.extract.reading import INCIDENTS, Reading, unread_record, write_samples
from kdpipe.stages.train.output import Output


def samples_folder(output: Path) -> Path:
    """Where the samples of a training lie that writes to `output`."""
    place = output.absolute()
    return place.parent / f".{place.name}.samples"


def prepare_samples(reading: Reading, output: Path, progress: Progress, *, vocab_size: int) -> Samples:
    """The samples of the data as they are now, those beside the output where nothing has changed since.

    vocab_size: ids that the student's head has a row for
    Raises the errors of data and tokenizer, SpaceError.
    """
    place = samples_folder(output)
    sweep(scratch_of(place.parent, place.name))
    existing = read_prepared(place)
    inputs = Inputs() if existing is None else Inputs.of(place)
    wanted = unread_record(reading, reading.spec.heldout_fraction)
    choices = {
        "prepared": wanted.model_dump(mode="json"),
        "spec": reading.spec.model_dump(mode="json", exclude={"subset"}),
        "context": None if reading.context is None else reading.context.tokens,
        "vocab_size": vocab_size,
    }
    asked = inputs.asked(reading.model.path, reading.data, choices)
    try:
        if existing is None or not inputs.were_asked(asked):
            place.parent.mkdir(parents=True, exist_ok=True)
            with scratch_folder(place.parent, place.name) as folder:
                (folder / INCIDENTS).parent.mkdir()
                written = write_samples(
                    reading, folder, progress, vocab_size=vocab_size, shard_tokens=wanted.settings.shard_tokens
                )
                existing = wanted.changed(
                    **written.fields(),
                    fingerprint=wanted.fingerprint.model_copy(update={"data": written.data_digest}),
                )
                inputs.remember(folder, asked)
                (folder / PREPARED_FILE).write_bytes(existing.to_bytes())
                fsync_tree(folder)
                _put(folder, place)
        else:
            progress.note(f"no input has changed since the data were prepared: {existing.num_samples:,} samples")
    except OSError as err:
        raise disk_error(err, place) from err
    return _opened(place, existing)


def open_samples(output: Path, data: str) -> Samples:
    """The samples that the launcher of this rank has prepared. data: their digest. Raises TemporaryError."""
    place = samples_folder(output)
    prepared = read_prepared(place)
    if prepared is None or prepared.fingerprint.data != data:
        raise TemporaryError("the samples prepared for this run are gone or others; run it again", where=place)
    return _opened(place, prepared)


@contextlib.contextmanager
def samples_beside(output: Path) -> Iterator[None]:
    """When the block ends, the samples beside the output are removed, unless a run in it may go on from them."""
    place = samples_folder(output)
    made = [above for above in place.parents if not above.exists()]
    try:
        yield
    finally:
        with contextlib.suppress(KdpipeError):  # where another run is at work, the samples are its own
            require_nobody_in(output)
            prepared, inputs = read_prepared(place), Output(output).goes_on()
            if prepared is None or inputs is None or inputs.data != prepared.fingerprint.data:
                shutil.rmtree(place, ignore_errors=True)
                for above in made:
                    with contextlib.suppress(OSError):  # the output is in it
                        above.rmdir()


def _opened(place: Path, prepared: Prepared) -> Samples:
    samples = Samples(place, prepared)
    samples.verify()
    return samples


def _put(folder: Path, place: Path) -> None:
    """Give the samples their place, in which those of other data, or the same by another rank of torchrun, may lie."""
    ours = read_prepared(folder)
    if place.exists() and read_prepared(place) == ours:
        return
    if place.exists():
        aside = scratch_name(place.parent, place.name)
        with contextlib.suppress(FileNotFoundError):
            place.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        folder.rename(place)
    except OSError:
        if read_prepared(place) != ours:
            raise
    fsync_folder(place.parent)
