"""Run: prompts -> answers -> a file of records, resumed at its last whole window.

    data -> prompts (prepare) -> windows of answers -> writer (rollout) -> records (answers) -> file

Invariant: an answer is drawn by seed, number of its prompt in the data and number of the answer alone; what is computed
together is a pure function of prompts and settings. So an interrupted run ends, after the same command, with the bytes
of one that was not; on a GPU the bits of a sum may differ between runs, and so may an answer.
Cost: the writer's; prompts and their forms are in memory.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kdpipe.manifests.durable import canonical, disk_error, make_folder, write_once
from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.errors import ConfigError, DataError, TeacherError
from kdpipe.manifests.generated import SIDECAR_ENDING, GeneratedRecord, SamplingRecord, WritingRecord
from kdpipe.manifests.made_with import MadeWith
from kdpipe.manifests.places import require_outside
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.provenance import digest_file, digest_json
from kdpipe.manifests.record import read_record
from kdpipe.manifests.sample import Incident
from kdpipe.manifests.specs import DataSpec, Device, DeviceChoice, DtypeChoice, LiveSpec
from kdpipe.stages.draws import mixed_seed
from kdpipe.stages.extract.reading import NOT_READ, counts_of
from kdpipe.stages.generate.answers import OTHERWISE, SAME, Answers
from kdpipe.stages.generate.file import AnswersFile, count_lines, whole_lines
from kdpipe.stages.models.context import context_of
from kdpipe.stages.models.device import pick_device
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.vocabulary import tokenizer_digest
from kdpipe.stages.prepare.files import list_files
from kdpipe.stages.prepare.samples import Asked, prompts
from kdpipe.stages.rollout.local import LocalWriter
from kdpipe.stages.rollout.sampling import Sampling
from kdpipe.stages.rollout.sglang_writer import SglangWriter
from kdpipe.stages.rollout.writer import Prompt
from kdpipe.stages.rows import TORCH_DTYPES
from kdpipe.stages.teacher import engine_class, pick_engine
from kdpipe.stages.teacher.describe import TeacherInfo, describe_teacher

WINDOW: dict[Device, int] = {"cpu": 64, "cuda": 256}
"""Answers that are written and flushed together: what a kill can lose."""
TRIED_TOKENS = 64
SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateSpec:
    """What to write.

    model: folder that from_pretrained loads, a teacher or a trained student
    prompts: data files and folders; the answers that are in them are not read
    out: the file of answers, .jsonl
    sampling: how answers are drawn, and how many to a prompt
    seed: another one gives other answers
    data_spec: how records become prompts
    engine: "auto", or a name in kdpipe.stages.teacher.ENGINES; options: how it is run
    made_with: the command, for people
    """

    model: Path
    prompts: tuple[Path, ...]
    out: Path
    sampling: LiveSpec = field(default_factory=LiveSpec)
    seed: int = 0
    data_spec: DataSpec = field(default_factory=DataSpec)
    dtype: DtypeChoice = "auto"
    device: DeviceChoice = "auto"
    engine: str = "auto"
    options: EngineOptions = field(default_factory=EngineOptions)
    made_with: MadeWith | None = None


def generate(spec: GenerateSpec, progress: Progress) -> dict[str, object]:
    """Write the answers that are missing; what the file then holds, as `summary` says it.

    Raises the errors of model and data; ConfigError for a file that is something else or of other settings, BusyError
    where another run writes it, SpaceError.
    """
    _check_places(spec)
    model = ModelFolder(spec.model, TeacherError, spec.options.trust)
    info = describe_teacher(model, spec.dtype, head_is_read=False)
    device: Device = "cuda" if pick_device(spec.device).type == "cuda" else "cpu"
    choice = pick_engine(spec.engine, architecture=info.architecture, device=device)
    if spec.engine == "auto" and device == "cuda":
        progress.note(f"engine {choice.name}: {choice.reason}")
    writing = _writing(spec, info, device, choice.name)
    sidecar = spec.out.with_name(spec.out.name + SIDECAR_ENDING)
    there = _found(spec.out, sidecar, writing)
    if there is not None and count_lines(spec.out) == there.num_answers:
        progress.note(f"all {there.num_answers:,} answers are there already")
        return summary(spec.out, there)
    asked, counts = _read_prompts(spec, info, progress)
    record = GeneratedRecord(
        writing=writing,
        num_prompts=len(asked),
        num_answers=len(asked) * spec.sampling.samples_per_prompt,
        counts=counts,
        made_with=spec.made_with,
    )
    if there is None:
        _write_sidecar(sidecar, record, writing)
    with AnswersFile(spec.out) as file:
        _write_answers(file, asked, record, info, spec.options, progress)
    made = summary(spec.out, record)
    _report(made, progress)
    return made


def summary(out: Path, record: GeneratedRecord) -> dict[str, object]:
    """What a finished file of answers holds."""
    verdicts: Counter[str] = Counter()
    num_tokens = num_cut = 0
    logprob = 0.0
    for line in whole_lines(out):
        found = json.loads(line)
        said = found["kdpipe"]
        verdicts[said["read_again"]] += 1
        num_tokens += said["num_tokens"]
        logprob += said["num_tokens"] * said["mean_logprob"]
        num_cut += found["finish_reason"] == "length"
    return {
        "out": out,
        "num_prompts": record.num_prompts,
        "num_answers": record.num_answers,
        "num_tokens": num_tokens,
        "num_cut": num_cut,
        "num_read_otherwise": verdicts[OTHERWISE],
        "num_left_out_when_read": sum(verdicts.values()) - verdicts[OTHERWISE] - verdicts[SAME],
        "mean_logprob": logprob / max(num_tokens, 1),
    }


def _check_places(spec: GenerateSpec) -> None:
    out = spec.out
    if out.suffix.lower() != ".jsonl":
        raise ConfigError("a file of answers is JSON Lines; name it *.jsonl", where=out)
    if out.is_dir() or out.is_symlink():
        raise ConfigError(f"it is a {'link' if out.is_symlink() else 'folder'}; name a file", where=out)
    require_outside(out, option="--out")
    for path in (*spec.prompts, *list_files(spec.prompts)):
        is_read = path.is_dir() and out.resolve().parent == path.resolve() and not out.name.startswith(".")
        if out.resolve() == path.resolve() or is_read:
            raise ConfigError(
                f"its answers would be read as prompts of {path} the next time; choose another --out", where=out
            )


def _writing(spec: GenerateSpec, info: TeacherInfo, device: Device, engine: str) -> WritingRecord:
    """Raises ConfigError for options that the engine does not have."""
    model, wanted, kind = info.folder, spec.sampling, engine_class(engine)
    kind.determinism(device, spec.options)
    tokenizer = model.tokenizer
    data = [[path.suffix.lower(), digest_file(path)] for path in list_files(spec.prompts)]
    return WritingRecord(
        model=model.digest(),
        tokenizer=tokenizer_digest(tokenizer),
        template=digest_json(tokenizer.chat_template),
        prompts=digest_json(data),
        max_length=spec.data_spec.max_length,
        bad_records=spec.data_spec.bad_records,
        strict=spec.data_spec.strict,
        sampling=SamplingRecord(
            max_new_tokens=wanted.max_new_tokens,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            top_k=wanted.top_k,
            samples_per_prompt=wanted.samples_per_prompt,
            stop_ids=tuple(sorted(_stop_ids(model))),
        ),
        seed=spec.seed,
        dtype=info.dtype,
        device=device,
        engine=engine,
        version=kind.version(),
        arguments=spec.options.identity(),
    )


def _stop_ids(model: ModelFolder) -> frozenset[int]:
    """Tokens that end an answer: those of the generation config, and the tokenizer's end of text."""
    end = model.tokenizer.eos_token_id
    return model.stop_ids | (frozenset() if end is None else frozenset([end]))


def _found(out: Path, sidecar: Path, writing: WritingRecord) -> GeneratedRecord | None:
    """What is said of a file that is there. Raises ConfigError for another one than is asked for."""
    there = read_record(sidecar, GeneratedRecord)
    if there is None:
        if out.exists():
            raise ConfigError(
                f"it exists, and no {sidecar.name} says that kdpipe generate wrote it; choose another --out",
                where=out,
            )
        return None
    if difference := there.difference(writing):
        raise ConfigError(
            f"it was written with {difference}; choose another --out, or remove it and {sidecar.name}", where=out
        )
    return there


def _write_sidecar(sidecar: Path, record: GeneratedRecord, writing: WritingRecord) -> None:
    parent = sidecar.absolute().parent
    try:
        make_folder(parent)
    except OSError as err:
        raise disk_error(err, parent) from err
    if not write_once(sidecar, canonical(record.model_dump(mode="json")), scratch_folder=parent):
        _found(sidecar.with_suffix(""), sidecar, writing)  # another run was quicker


def _read_prompts(spec: GenerateSpec, info: TeacherInfo, progress: Progress) -> tuple[list[Asked], dict[str, int]]:
    """All prompts, and what became of the records that were read."""
    incidents: list[Incident] = []
    unread: Counter[str] = Counter()
    found = []
    progress.begin("prepare", total=None, unit="prompts")
    read = prompts(
        spec.prompts,
        info.folder.tokenizer,
        spec.data_spec,
        on_incident=incidents.append,
        stop_ids=info.folder.stop_ids,
        on_note=progress.note,
        unread=unread,
    )
    with closing(read):
        for asked in read:
            _check_prompt(asked, spec, info)
            found.append(asked)
            progress.advance(1)
    progress.end()
    counts = counts_of(len(found), Counter(incident.kind for incident in incidents), unread)
    _note_incidents(incidents, counts, progress)
    return found, counts


def _check_prompt(asked: Asked, spec: GenerateSpec, info: TeacherInfo) -> None:
    """The model has an embedding for each of its ids and reads it to the end of its answer. Raises DataError."""
    ids, where = asked.sample.token_ids, f"{asked.sample.source}:{asked.sample.line}"
    if (highest := int(ids.max())) >= info.head_rows:
        token = info.folder.tokenizer.convert_ids_to_tokens(highest)
        raise DataError(f"token id {highest} ({token}) is beyond the model's {info.head_rows}", where=where)
    context, longest = context_of(info.folder.config), spec.sampling.max_new_tokens
    if context is None or len(ids) + longest <= context.tokens:
        return
    room = context.tokens - longest
    way = f"--max-length {room} leaves longer prompts out" if room > 0 else f"it has no room for {longest} new ones"
    raise DataError(
        f"a prompt of {len(ids)} tokens, the model reads {context.tokens} ({context.field}) with the answer; {way}, or "
        "give a smaller --max-new-tokens",
        where=where,
    )


def _note_incidents(incidents: Sequence[Incident], counts: dict[str, int], progress: Progress) -> None:
    by_kind: dict[str, list[Incident]] = {}
    for incident in incidents:
        by_kind.setdefault(incident.kind, []).append(incident)
    for kind, found in sorted(by_kind.items()):
        first = ", ".join(f"{each.source}:{each.line} ({each.detail})" for each in found[:SHOWN])
        more = f" and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
        progress.note(f"{len(found)} of {counts['read']} prompts {kind.replace('_', ' ')}: {first}{more}")
    unread = {name.removeprefix(NOT_READ): count for name, count in counts.items() if name.startswith(NOT_READ)}
    if unread:
        listed = ", ".join(f"{name} ({count:,})" for name, count in unread.items())
        progress.note(f"not read, with the number of records that have it: {listed}")


def _write_answers(
    file: AnswersFile,
    asked: Sequence[Asked],
    record: GeneratedRecord,
    info: TeacherInfo,
    options: EngineOptions,
    progress: Progress,
) -> None:
    writing, total = record.writing, record.num_answers
    window, per_prompt = WINDOW[writing.device], writing.sampling.samples_per_prompt
    done = file.keep(window, total, _keys(len(asked), per_prompt))
    if done == total:
        return
    sampling = Sampling(
        temperature=writing.sampling.temperature,
        top_p=writing.sampling.top_p,
        top_k=writing.sampling.top_k,
        max_new_tokens=writing.sampling.max_new_tokens,
        stop_ids=frozenset(writing.sampling.stop_ids),
    )
    answers = Answers(info.folder.tokenizer, info.folder.stop_ids)
    num_tokens = 0

    def told(num_answers: int, tokens: int) -> None:
        nonlocal num_tokens
        num_tokens += tokens
        progress.advance(num_answers, f"{num_tokens:,} tokens")

    text = np.concatenate([each.sample.token_ids for each in asked[:TRIED_TOKENS]])[:TRIED_TOKENS]
    with closing(_writer(writing, info.folder, options, text, told)) as writer:
        for note in (*info.folder.notes, *writer.notes):
            progress.note(note)
        progress.begin("generate", total=total, unit="answers")
        progress.advance(done)
        for start in range(done, total, window):
            places = [divmod(each, per_prompt) for each in range(start, min(start + window, total))]
            wanted = [Prompt(key=_key(*place), token_ids=asked[place[0]].sample.token_ids) for place in places]
            written = writer.write(wanted, sampling, writing.seed)
            if writing.engine != "transformers":
                told(len(written), sum(len(answer.token_ids) for answer in written))
            file.append(
                [
                    answers.record(
                        asked[prompt],
                        answer,
                        source=Path(asked[prompt].sample.source).name,
                        number=number,
                        key=_key(prompt, number),
                    )
                    for (prompt, number), answer in zip(places, written, strict=True)
                ]
            )
        progress.end()


def _writer(
    writing: WritingRecord,
    model: ModelFolder,
    options: EngineOptions,
    text: np.ndarray,
    told: Callable[[int, int], None],
) -> LocalWriter | SglangWriter:
    if writing.engine == "sglang":
        model.require_no_adapter("SGLang")
        return SglangWriter(model, dtype=writing.dtype, device=writing.device, options=options)
    return LocalWriter(
        model,
        dtype=TORCH_DTYPES[writing.dtype],
        device=pick_device(writing.device),
        text=text,
        on_answers=told,
    )


def _keys(num_prompts: int, per_prompt: int) -> Iterator[int]:
    return (_key(prompt, number) for prompt in range(num_prompts) for number in range(per_prompt))


def _key(prompt: int, number: int) -> int:
    """By what an answer's tokens are drawn: its prompt's number in the data, and its own."""
    return mixed_seed(prompt, number)


def _report(made: dict[str, object], progress: Progress) -> None:
    total = made["num_answers"]
    for name, what in (
        ("num_cut", "were cut at --max-new-tokens and have no end"),
        ("num_read_otherwise", "are tokenised otherwise when read again ('read_again' in each)"),
        ("num_left_out_when_read", "are left out when read again ('read_again' says why)"),
    ):
        if made[name]:
            progress.note(f"{made[name]} of {total} answers {what}")
