"""Live runs: both roles started, joined by rings and ended together, whatever the student makes of the rows.

planned (a plan of the samples) -> checked -> run_live: teacher's process + the student's ranks -> metrics
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.cores import given_cores
from kdpipe.manifests.errors import ConfigError, KdpipeError
from kdpipe.manifests.made_with import MadeWith
from kdpipe.manifests.plan import PLAN_FILE, read_plan
from kdpipe.manifests.ring import RingEnd, RingReader, make_ring
from kdpipe.manifests.shard import DTYPES, TAGS
from kdpipe.manifests.specs import RunFile
from kdpipe.pipeline.exporters import require_installed
from kdpipe.pipeline.progress import EventLog, watch
from kdpipe.pipeline.roles import Share, share_cores, share_gpus, visible_gpus
from kdpipe.pipeline.teacher_role import teacher_beside
from kdpipe.pipeline.training import choose_device, choose_nproc, launch_training, train_rank

if TYPE_CHECKING:
    from kdpipe.stages.train import Found, Training

MIB = 1 << 20

FedBy = Callable[["Training", RingReader, "Found | None"], "Found"]
"""What a rank's training names, with the rows of a ring; picklable, as it goes to the ranks."""


def choose_ranks(run: RunFile, command: str) -> tuple[str, int]:
    """The student's device, and how many ranks it has.

    Raises ConfigError under torchrun, or where what train.loggers need is not installed.
    """
    require_installed(run.train.loggers)
    if "RANK" in os.environ:
        raise ConfigError("it starts its ranks itself, with --nproc", where=f"kdpipe {command}")
    device, gpus = choose_device(run.train.device)
    return device, choose_nproc(run.train.nproc, device, len(shares(run, device)[1].gpus) or gpus)


def shares(run: RunFile, student_device: str) -> tuple[Share, Share]:
    """What of this machine is the teacher's, and what the student's."""
    import torch

    from kdpipe.stages.models.device import pick_device

    devices = {pick_device(run.engine.device).type, student_device}
    if devices == {"cuda"}:
        return share_gpus(run.live, run.engine, visible_gpus(torch.cuda.device_count()))
    return share_cores(run.live, given_cores()) if devices == {"cpu"} else (Share(), Share())


def planned(run: RunFile, folder: Path, command: str, *, keep_rows: bool, prompts: bool = False) -> Cache:
    """The plan of the samples. prompts: records without an answer are samples too

    Raises ConfigError for a tee whose rows are coded.
    """
    from kdpipe.stages.extract import ExtractSpec
    from kdpipe.stages.extract.staging import staged

    # A codec is fitted before the first row is kept, which a live run does not wait for.
    spec = replace(
        ExtractSpec.of(run), keep_rows=keep_rows, prompts=prompts, codec="raw", codec_kl=None, codec_bytes=None
    )
    if keep_rows and (folder / PLAN_FILE).exists() and (codec := read_plan(folder).settings.codec) != "raw":
        raise ConfigError(
            f"{folder} has rows under the codec '{codec}', and rows are kept as they are here; name another folder",
            where="--tee",
        )
    with watch(command, EventLog(None)) as progress, staged(spec, folder, progress) as found:
        if run.live.tee is not None and run.cache.codec != "raw":
            progress.note(
                f"{run.live.tee}: rows are kept as they are, not under cache.codec = '{run.cache.codec}'; kdpipe cache "
                "convert codes them afterwards"
            )
        return found.publish()


def training_of(
    run: RunFile, plan: Path, device: str, *, resume: str, made_with: MadeWith, data: tuple[Path, ...] = ()
) -> "Training":
    """The student's side of a live run; plan: the folder of the samples' plan.

    data: what the plan is of, for a student that may have another tokenizer
    """
    from kdpipe.stages.train import Training

    assert run.student.path is not None, "RunCommand has asked for it"
    assert run.train.output is not None, "RunCommand has asked for it"
    return Training(
        student=run.student.path,
        caches=(plan,),
        data=data,
        align=run.student.align,
        align_floor=run.student.align_floor,
        workers=run.data.workers,
        output=run.train.output,
        spec=run.training(),
        device=device,
        trust=run.student.trust_remote_code,
        resume=resume,
        loggers=run.train.loggers,
        made_with=made_with,
    )


@contextmanager
def gone_if_refused(folder: Path) -> Iterator[None]:
    """A plan that was made in the block goes with what refuses the run."""
    was_there = folder.exists()
    try:
        yield
    except KdpipeError:
        if not was_there:
            forget(folder)
        raise


def plan_folder_of(output: Path, command: str) -> Path:
    """Beside the output: of a plan that goes when the run is finished."""
    return output.absolute().parent / f".{output.name}.{command}"


def forget(folder: Path) -> None:
    """Of `plan_folder_of`, when the run is finished."""
    shutil.rmtree(folder, ignore_errors=True)


def run_live(
    run: RunFile,
    training: "Training",
    found: "Found",
    plan: Cache,
    nproc: int,
    fed_by: FedBy,
    *,
    command: str,
    most_rows: int,
) -> dict[str, object]:
    """Both roles at work; the student's metrics.

    most_rows: of the longest sample
    """
    size = run.live.ring_mib * MIB
    longest = most_rows * plan.plan.head.hidden_size * DTYPES[TAGS[plan.plan.head.dtype]].itemsize
    if longest > size:
        raise ConfigError(
            f"{run.live.ring_mib} MiB do not hold the rows of the longest sample; take {-(-longest // MIB)} or more",
            where="live.ring_mib",
        )
    teachers, students = shares(run, training.device)
    keep_to(students)
    theirs, ours = zip(*(make_ring(size) for _ in range(nproc)), strict=True)
    try:
        with teacher_beside(run, plan.path, theirs, teachers):
            try:
                if nproc == 1:
                    return live_rank(training, ours, fed_by, command, found)
                return launch_training(training, nproc, ours, fed_by, command, rank=live_rank)
            finally:
                for end in ours:
                    end.close()
    finally:
        for end in theirs:
            end.close()


def keep_to(share: Share) -> None:
    """This process, and all that it starts from now on, keeps to its share."""
    import torch

    if share.cores is not None:
        share.cores.keep()
        torch.set_num_threads(share.cores.threads(os.environ))
    share.settle(os.environ)


def live_rank(
    training: "Training", ends: Sequence[RingEnd], fed_by: FedBy, command: str, found: "Found | None" = None
) -> dict[str, object]:
    """One rank's work, with its own of the readers' ends; its metrics, with the share of time each side waited.

    found: what this process has opened already
    """
    rank = int(os.environ.get("RANK", "0"))
    for number, end in enumerate(ends):
        if number != rank:
            end.close()
    with RingReader(ends[rank]) as ring:
        with _closing(fed_by(training, ring, found)) as fed:
            metrics = train_rank(training, fed, command=command)
        ring.finish()
        ring.take("the end")
        waited = {"share_waiting": ring.waited_s, "teacher_share_waiting": ring.peer_waited_s}
        return metrics | {name: round(ring.share(seconds), 3) for name, seconds in waited.items()}


@contextmanager
def _closing(found: "Found") -> Iterator["Found"]:
    try:
        yield found
    finally:
        if found.own is not None:
            found.own.close()
