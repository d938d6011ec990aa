"""Gathered: the runs that are meant, read one by one, with their caches, table and figures.

Cost: every run's events are read once; of many runs only the best keep their curves, so that memory stays bounded.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.plan import PLAN_FILE
from kdpipe.manifests.run import EVENTS, LOG, RUN_FILE
from kdpipe.manifests.running import RUNNING_FILE
from kdpipe.pipeline.report.caches import CacheStory, read_cache
from kdpipe.pipeline.report.figures import CURVES, LIVE, MOST_CURVES, Data, Figure, curves_of, drawn, scatters
from kdpipe.pipeline.report.story import Story, read_story
from kdpipe.pipeline.report.tables import Table, rank, result_of, tabulate, tails

TRACES = (EVENTS, RUN_FILE, RUNNING_FILE, "checkpoints", LOG)
"""What the output of a run has at least one of, from the moment it is started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """stories: as they were named; curves: the runs whose curves are drawn, the best first

    num_with_curves: runs that have any; num_left_out: points of the curves that are not drawn
    """

    title: str
    stories: tuple[Story, ...]
    caches: tuple[CacheStory, ...]
    table: Table
    figures: tuple[Figure, ...]
    data: Data
    curves: tuple[str, ...]
    num_with_curves: int
    num_left_out: int
    made_at: float
    version: str


def gather(paths: Sequence[Path]) -> Report:
    """A report of the runs that some paths name: an output folder each, or a folder of them.

    One that is not there is a run that never began, where others did. Raises ConfigError where a path holds something
    else, or nothing at all is found.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in _runs_in(path)))
    if not any(folder.exists() for folder in folders):
        raise ConfigError("there is no such folder; name the output of a run, or a folder of them", where=paths[0])
    stories, num_with_curves = _read(folders)
    table = tabulate(stories)
    best = [story for story in rank(stories, table.result) if story.steps or story.evals]
    data, left_out = curves_of(best)
    panels, data["runs"] = scatters(table)
    named = [path for story in stories for path in story.named("cache")]
    return Report(
        title=_title(paths),
        stories=tuple(stories),
        caches=tuple(read_cache(path) for path in dict.fromkeys(named)),
        table=table,
        figures=(*panels, *drawn(CURVES, data, "curves"), *drawn(LIVE, data, "live")),
        data=data,
        curves=tuple(story.name for story in best),
        num_with_curves=num_with_curves,
        num_left_out=left_out,
        made_at=time.time(),
        version=_version(),
    )


def _runs_in(path: Path) -> list[Path]:
    """The output folders that a path names. Raises ConfigError."""
    if not path.exists():
        return [path]
    if not path.is_dir():
        raise ConfigError("it is a file; name the output of a run, or a folder of them", where=path)
    if (path / PLAN_FILE).exists():
        raise ConfigError(
            "it is a cache; name the outputs of runs, their report says what it holds and cost", where=path
        )
    inside = [each for each in sorted(path.iterdir()) if each.is_dir() and is_run(each)]
    inside = inside or [path] * is_run(path)  # a sweep's own events lie in the folder of its runs
    if not inside:
        raise ConfigError(
            "there is no run in it, nor in the folders in it: neither events.jsonl nor kdpipe.json", where=path
        )
    return inside


def is_run(folder: Path) -> bool:
    """Whether a run was started with this output."""
    hidden = folder.name.startswith(".")  # a student whose export a kill has interrupted
    return not hidden and any((folder / name).exists() for name in TRACES) and not (folder / PLAN_FILE).exists()


def _read(folders: Sequence[Path]) -> tuple[list[Story], int]:
    """The stories, of which no more than MOST_CURVES, the best, keep their points; how many had any."""
    names, stories, count = tails(folders), [], 0
    kept: list[Story] = []
    for folder in folders:
        story = read_story(names[folder], folder)
        stories.append(story)
        if story.steps or story.evals:
            count += 1
            kept.append(story)
        for worst in rank(kept, result_of(kept))[MOST_CURVES:]:
            worst.forget_points()
            kept.remove(worst)
    return stories, count


def _title(paths: Sequence[Path]) -> str:
    """The folder that the runs have in common, or the one run."""
    if len(paths) == 1:
        return paths[0].absolute().name
    parents = {path.absolute().parent for path in paths}
    return parents.pop().name if len(parents) == 1 else f"{len(paths)} folders"


def _version() -> str:
    try:
        return version("kdpipe")
    except PackageNotFoundError:
        return "(not installed)"
