"""Steps: what is left to do of a run file, each the words after `kdpipe`, as a function of the file and of the disk.

    RunFile, Disk -> steps_of -> extract -> seal -> train/NAME ... -> report

local.run works them off on this machine, slurm.render writes each as a script; anybody can type one.
Invariant: pure but for `disk_of`. What is finished has no step: taking the steps anew after any of them is to go on.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import ConfigError, IncompleteError
from kdpipe.manifests.fitted import all_stored_as, choose
from kdpipe.manifests.made_with import extract_again
from kdpipe.manifests.plan import PLAN_FILE
from kdpipe.manifests.provenance import digest_model, digest_tokenizer
from kdpipe.manifests.run import ELASTIC, RunInputs, read_run
from kdpipe.manifests.specs import OF_LORA, Member, RunFile, members_of, override, sweep_output
from kdpipe.pipeline.options import key_of
from kdpipe.pipeline.reads import OF_CACHES, READS, readers, within

EXTRACT, SEAL, REPORT = "extract", "seal", "report"
OF_SUBMIT = "slurm"
"""Table that decides where a run is computed, not what: it may vary, and no step is given it."""
OF_EACH = ("data.heldout_fraction", "data.subset")
"""Keys of [data] that may differ between the students of one cache."""
REPORT_FILE = "report.html"
OF_CACHE = ("max_length", "overlong", "supervise")
"""Keys of [data] that a student's record has from its cache."""
Digests = Callable[[Path], tuple[str, str] | None]
"""Of a student's folder: model and tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One command.

    argv: the words after `kdpipe`; of a step of several parts one is "{part}", filled with 1/n to n/n
    needs: names of the steps that come before
    output: folder or file that it makes
    whatever: whether it is taken however those before it ended, else only if all of them ended well
    member: the run of the sweep that it is
    """

    name: str
    argv: tuple[str, ...]
    needs: tuple[str, ...]
    output: Path
    parts: int = 1
    whatever: bool = False
    member: Member | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """What the folders of a run file say.

    complete: caches with every row
    finished: names of the members whose student is there and measured
    reported: whether the page that compares them is there
    """

    complete: frozenset[Path] = frozenset()
    finished: frozenset[str] = frozenset()
    reported: bool = False


def steps_of(
    config: Path | None, run: RunFile, disk: Disk, sets: tuple[str, ...] = (), *, parts: int = 1
) -> tuple[Step, ...]:
    """What is left to do of a run file, each step after those it needs.

    config: where the run file lies; sets: the --set that go with it; parts: processes that extract
    Raises ConfigError naming the run and the key that is wrong, IncompleteError for a cache that nothing here makes.
    """
    members = members_of(run)
    _check(run, members, sets)
    left = [member for member in members if member.name not in disk.finished]
    before = _cache_steps(config, run, left, disk, sets, parts)
    needs = tuple(step.name for step in before[-1:])
    students = [_member_step(config, run, member, sets, needs) for member in left]
    steps = [*before, *students]
    if run.sweep.report and (students or not disk.reported):
        steps.append(_report(run, members, tuple(step.name for step in students)))
    return tuple(steps)


def disk_of(run: RunFile) -> Disk:
    """What the folders of a run file say now; reads records, and the weights of students that are trained already.

    Raises ConfigError for a member's output that holds the student of another run.
    """
    members = members_of(run)
    complete = frozenset(path for path in _caches(members) if is_complete(path))
    digest = cache(_digests)  # once a student, however many runs
    finished = set()
    for member in members:
        record = read_run(member.output)
        if record is not None and record.metrics is not None:
            wanted = _inputs(member, record.inputs, command=run.sweep.command, digest=digest, complete=complete)
            if difference := wanted.difference(record.inputs, but=ELASTIC):
                raise ConfigError(
                    f"it holds the student of another run: {difference}; choose another output or remove the folder",
                    where=member.output,
                )
            finished.add(member.name)
    reported = (sweep_output(run) / REPORT_FILE).exists()
    return Disk(complete=complete, finished=frozenset(finished), reported=reported)


def is_complete(path: Path) -> bool:
    """Whether a cache is there with every row. Raises what opening a damaged one raises."""
    return (path / PLAN_FILE).exists() and Cache.open(path).complete


def _check(run: RunFile, members: tuple[Member, ...], sets: tuple[str, ...]) -> None:
    """Every key that varies is read by the command, and every run has what it needs. Raises ConfigError."""
    command = run.sweep.command
    for member in members:
        where = f"run {member.name}"
        for key in member.overrides:
            if not _is_passed(command, key, member) and not within(key, OF_SUBMIT):
                raise ConfigError(f"'{key}' cannot vary: {_why_not(command, key)}", where=where)
        for key in READS[command].needs:
            if not getattr(getattr(member.run, key.partition(".")[0]), key.rpartition(".")[2]):
                raise ConfigError(f"it has no {key}; give it in the run file or let it vary", where=where)
        student = member.run.student
        if not student.lora_rank and (idle := sorted(student.model_fields_set & {*OF_LORA})):
            raise ConfigError(
                f"student.{idle[0]} is of use with student.lora_rank alone; give both or none", where=where
            )
        if command == "train":
            _check_sources(member, sets)
    varied = {key for member in members for key in member.overrides}
    for given in map(key_of, sets):
        heard = READS["extract"].includes(given) or any(_is_passed(command, given, member) for member in members)
        if not (heard or within(given, "sweep") or within(given, OF_SUBMIT)):
            raise ConfigError(f"'{given}': {_why_not(command, given)}", where="--set")
        if other := next((key for key in varied if within(key, given) or within(given, key)), None):
            raise ConfigError(
                f"'{given}': the sweep varies {other}; set sweep.grid.{other}=[...] instead", where="--set"
            )


def _check_sources(member: Member, sets: tuple[str, ...]) -> None:
    """As kdpipe train sees what a run trains on: a teacher without a cache is not left out unasked."""
    run, where = member.run, f"run {member.name}"
    if not run.cache.path and not run.data.paths:
        raise ConfigError("it has neither a cache.path nor data.paths to train on", where=where)
    if not run.cache.path and run.teacher.path and "data.paths" not in {*member.overrides, *map(key_of, sets)}:
        raise ConfigError(
            "the run file names a teacher and no cache of its rows: give cache.path, leave teacher.path out, or train "
            "beside the teacher with sweep.command = 'stream'",
            where=where,
        )


def _is_passed(command: str, key: str, member: Member) -> bool:
    """Whether a key goes to the command that makes a student; where there is a cache, little of [data] does."""
    if command == "train" and member.run.cache.path and within(key, "data"):
        return key in (OF_EACH if key in member.overrides else OF_CACHES)
    return READS[command].includes(key) and not within(key, "sweep")


def _why_not(command: str, key: str) -> str:
    if READS[command].includes(key):
        return "the samples of a cache are made with one; give each run its cache.path"
    return f"kdpipe {command} does not read it, it is for {readers(key)}"


def _cache_steps(
    config: Path | None, run: RunFile, left: list[Member], disk: Disk, sets: tuple[str, ...], parts: int
) -> list[Step]:
    """Extract and seal the run file's cache, where a run that is left lacks rows of it.

    Raises IncompleteError for another cache without all its rows, or where no teacher is named.
    """
    reads = READS[run.sweep.command].includes("cache.path")
    missing = [path for path in _caches(left) if path not in disk.complete] if reads else []
    if not missing:
        return []
    own = run.cache.path[0] if len(run.cache.path) == 1 and run.teacher.path and run.data.paths else None
    for path in missing:
        if path != own:
            raise IncompleteError(
                "the cache lacks rows, and this run file does not say how to extract them (teacher.path, data.paths, "
                "one cache.path)",
                where=path,
                hint=extract_again(path),
            )
    assert own is not None, "it is what is missing"
    _require_fine_enough(run, left)
    part = ("--part", "{part}") if parts > 1 else ()
    extract = Step(name=EXTRACT, argv=(*words_of("extract", config, sets), *part), needs=(), output=own, parts=parts)
    seal = Step(name=SEAL, argv=("cache", "verify", str(own), "--quick"), needs=(EXTRACT,), output=own)
    return [extract, seal]


def _require_fine_enough(run: RunFile, left: list[Member]) -> None:
    """What the cache's codec may lose is what its students take. Raises ConfigError, before the teacher runs."""
    asked = choose(run.cache.codec, run.cache.codec_kl, run.cache.codec_bytes)
    for member in left:
        most = member.run.cache.max_codec_kl
        if most is not None and asked.is_fitted and (most == 0 or (asked.kl or 0.0) > most):
            raise ConfigError(
                f"cache.max_codec_kl allows a loss of {most:g} nats, and the cache is to be made under '{asked}' "
                "(cache.codec, codec_kl); make one of them fit the other",
                where=f"run {member.name}",
            )


def _member_step(
    config: Path | None, run: RunFile, member: Member, sets: tuple[str, ...], needs: tuple[str, ...]
) -> Step:
    command = run.sweep.command
    given = [text for text in sets if _is_passed(command, key_of(text), member)]
    varied = [override(key, value) for key, value in member.overrides.items() if not within(key, OF_SUBMIT)]
    return Step(
        name=f"{command}/{member.name}",
        argv=(*words_of(command, config, [*given, *varied]), "--output", str(member.output)),
        needs=needs,
        output=member.output,
        member=member,
    )


def _report(run: RunFile, members: tuple[Member, ...], needs: tuple[str, ...]) -> Step:
    page = sweep_output(run) / REPORT_FILE
    outputs = (str(member.output) for member in members)
    return Step(name=REPORT, argv=("report", *outputs, "--out", str(page)), needs=needs, output=page, whatever=True)


def words_of(command: str, config: Path | None, sets: Sequence[str]) -> tuple[str, ...]:
    """A command with the run file and those --set that it reads.

    ("train", "--config", "run.toml", "--set", "train.lr=0.1", "train.seed=1")
    """
    from_file = () if config is None else ("--config", str(config))
    read = [text for text in sets if READS[command].includes(key_of(text))]
    return (command, *from_file, *(("--set", *read) if read else ()))


def _caches(members: Iterable[Member]) -> list[Path]:
    """Every cache that the members train on, once."""
    return list(dict.fromkeys(path for member in members for path in member.run.cache.path))


def _inputs(
    member: Member, recorded: RunInputs, *, command: str, digest: Digests, complete: frozenset[Path]
) -> RunInputs:
    """What the run depends on as the run file says it now; what only its command can tell is as it was recorded."""
    asked, made = member.run.training(), recorded.spec
    if command != "train":  # a live run decides some of its loss and data itself
        own = {"student": asked.student, "train": asked.train}
        return recorded.model_copy(update={"spec": made.model_copy(update=own)})
    if not recorded.caches:
        asked = asked.without_teacher()
    of_cache = {} if not recorded.caches else {name: getattr(made.data, name) for name in OF_CACHE}
    fraction = asked.data.heldout_fraction if "heldout_fraction" in asked.data.model_fields_set else None
    if fraction is None:
        fraction = recorded.heldout_fraction
    data = asked.data.model_copy(update={**of_cache, "heldout_fraction": fraction})
    student, trust = member.run.student.path, member.run.student.trust_remote_code
    changes: dict[str, object] = {
        "spec": asked.model_copy(update={"data": data}),
        "heldout_fraction": fraction,
        **_of_caches(member, recorded, complete),
        "cache_weights": member.run.cache.weights,
    }
    if student is not None and trust is None and (found := digest(student)) is not None:
        changes["student"], changes["tokenizer"] = found
    return recorded.model_copy(update=changes)


def _digests(student: Path) -> tuple[str, str] | None:
    """Of model and tokenizer; None where the folder cannot be read any more: the student made of it is there."""
    try:
        return digest_model(student), digest_tokenizer(student)
    except (OSError, ValueError):
        return None


def _of_caches(member: Member, recorded: RunInputs, complete: frozenset[Path]) -> dict[str, tuple[str, ...]]:
    """Fingerprints and codecs of the caches of now; as recorded for one that has grown since, or is gone."""
    paths = member.run.cache.path
    if not set(paths) <= complete:
        return {}
    now = [Cache.open(path) for path in paths]
    codecs = all_stored_as([one.plan for one in now])
    if len(now) == len(recorded.caches) and all(
        was in one.fingerprints() for one, was in zip(now, recorded.caches, strict=True)
    ):
        return {"codecs": codecs}
    return {"caches": tuple(one.plan.fingerprint.overall() for one in now), "codecs": codecs}
