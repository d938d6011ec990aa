"""kdpipe generate: answers that a model writes to prompts, as data for extract."""

from pathlib import Path

import click

from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.specs import RunFile
from kdpipe.pipeline.options import PATH, RunCommand, json_option, this_command
from kdpipe.pipeline.output import results_only, show
from kdpipe.pipeline.progress import EventLog, watch


@click.command("generate", cls=RunCommand)
@click.option("--out", type=PATH, metavar="FILE.jsonl", help="Where the answers go, a record each.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Another seed gives other answers.")
@json_option
def command(run: RunFile, out: Path | None, seed: int, as_json: bool) -> None:
    """Have a model write answers to prompts: data that extract, and every other tool, reads.

    The model is a teacher or a trained student. Prompts are data of every form; of a record with an answer its prompt
    is taken. In a run file they are teacher.path and data.paths.

    Each answer is a record: the conversation with the answer as its last turn, where it comes from, whether it came to
    an end or was cut, and whether reading it again gives the tokens that were written. An answer depends on the seed,
    its prompt and its number alone, but for rounding; SGLang (--engine sglang) draws anew each time. Interrupted? The
    same command again goes on, and ends with the same file. What it was written with is in FILE.jsonl.json; other
    settings are refused. A prompt longer than --max-length is left out.

    \b
    kdpipe generate --model models/large --prompts chat.jsonl --out answers.jsonl
    kdpipe generate --model models/large --prompts chat.jsonl --out four.jsonl --samples-per-prompt 4 --temperature 0.7
    kdpipe extract  --teacher models/large --data answers.jsonl --cache cache
    """
    model, prompts = run.teacher.path, run.data.paths
    assert model is not None, "RunCommand has asked for it"
    if out is None:
        raise ConfigError("option '--out' is missing; see: kdpipe generate --help", where="kdpipe generate")
    from kdpipe.stages.generate import GenerateSpec, generate  # torch takes seconds: not for --help

    spec = GenerateSpec(
        model=model,
        prompts=prompts,
        out=out,
        sampling=run.live,
        seed=seed,
        data_spec=run.samples(),
        dtype=run.teacher.dtype,
        device=run.engine.device,
        engine=run.engine.name,
        options=EngineOptions.of(run),
        made_with=this_command(model=model, prompts=prompts, out=out),
    )
    with results_only(), watch("generate", EventLog(None), where=out, kept=lambda: _kept(out)) as progress:
        made = generate(spec, progress)
    show(made, as_json=as_json)


def _kept(out: Path) -> str:
    """What of the answers is there when a signal ends the command."""
    from kdpipe.stages.generate.file import whole_lines

    count = sum(1 for _ in whole_lines(out))
    return f"{count:,} answers are finished and kept" if count else "nothing was written"
